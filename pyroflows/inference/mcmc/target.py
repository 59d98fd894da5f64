"""The posterior in the base space of a flow, where it is close to the base whatever its shape is elsewhere."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyroflows.flows import Flow

LogDensity = Callable[[Tensor], Tensor]
# Base values (C, D) of C chains -> their log density (C,) and its gradient (C, D), both without autograd history.
ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


def pulled_back(flow: Flow, log_joint: LogDensity) -> LogDensity:
    r"""The log joint as a density of base values, :math:`\log p(T(z), y) + \log|\det \partial T / \partial z|`.

    It is the base's own log density, up to the log evidence, where the flow is exact (NeuTra, Hoffman et al. 2019,
    arXiv:1903.03704).

    Args:
        flow: of transform T.
        log_joint: of unconstrained vectors ``(C, D)``; ``(C,)``.
    """

    def log_density(z: Tensor) -> Tensor:
        x, ladj = flow.transform.forward_and_ladj(z)
        return log_joint(x) + ladj

    return log_density


def with_gradient(log_density: LogDensity) -> ValueAndGrad:
    """A log density with its gradient by autograd.

    Where a matrix is singular the density is zero: only the chain that it belongs to must notice.
    """

    def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        try:
            with torch.enable_grad():
                value = log_density(z)
                (gradient,) = torch.autograd.grad(value.sum(), z)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if len(z) == 1:
                return z.new_full((1,), -torch.inf), torch.zeros_like(z)
            halves = [value_and_grad(half) for half in z.detach().tensor_split(2)]
            return torch.cat([v for v, _ in halves]), torch.cat([g for _, g in halves])
        return value.detach(), gradient

    return value_and_grad


def where_finite(value_and_grad: ValueAndGrad) -> ValueAndGrad:
    """The same with log density -inf where it is NaN or infinite, and gradient 0 where that is.

    So NaN stays in the proposal that met it, which is then rejected. Any gradient leaves the chains exact: leapfrog
    steps preserve volume and are reversible whatever function of the position the force is.
    """

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = value_and_grad(z)
        value = torch.where(value.isfinite(), value, -torch.inf)
        return value, torch.where(gradient.isfinite(), gradient, 0.0)

    return run

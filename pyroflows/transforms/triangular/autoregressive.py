"""Autoregressive structure: the parameters of each dimension depend on those before it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyroflows.compiling.eager import is_transformed
from pyroflows.errors import OptionError
from pyroflows.nets import MADE, CausalConv, Incremental, IncrementalConv, ResMADE
from pyroflows.nets.checks import checked_conditioner
from pyroflows.shapes import as_given
from pyroflows.transforms.base import Pair, Triple, pull_back
from pyroflows.transforms.triangular.base import TriangularTransform
from pyroflows.transforms.triangular.transposed_solve import attached, parameters_and_solver
from pyroflows.transforms.univariate import Additive, Affine, Univariate, univariate_named

Conditioner = Callable[..., nn.Module]
_CONDITIONERS: dict[str, Conditioner] = {"made": MADE, "residual": ResMADE, "causal_conv": CausalConv}
# What computes a network place by place.
_STEPS: dict[type[nn.Module], Callable[..., Incremental | IncrementalConv]] = {
    MADE: Incremental,
    CausalConv: IncrementalConv,
}


class Autoregressive(TriangularTransform):
    r""":math:`x_j = T(z_j; \theta_j(z_{<j}, c))`, with all :math:`\theta_j` from one masked network.

    Events are vectors, or sequences of vectors, ``(channels, length)``: then j is a time, and the parameters of all
    channels at j depend on all channels at the times before.

    The forward direction is parallel; the inverse fills in one dimension after the other. With the affine map, a stack
    of these layers is an inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934), and a stack of their
    inverses a masked autoregressive flow (Papamakarios et al. 2017, arXiv:1705.07057).

    Args:
        dim: the event size D, or the event shape ``(length,)`` or ``(channels, length)``.
        univariate: the map T, a name or an instance.
        order: a permutation of ``range(D)``, or of the times, the order in which they see each other; ascending by
            default.
        conditioner: "made", "residual", or "causal_conv" for sequences; or a factory called as ``factory(order,
            num_params, hidden_dims, context_dim)``, with ``channels=`` for events ``(channels, length)``, whose module
            maps ``(z, context)`` to ``(*z.shape, num_params)`` autoregressively in that order.
        hidden_dims: widths of the conditioner's hidden layers.
        context_dim: size of the context c; with "causal_conv" also ``(context_channels, length)``, a sequence that is
            known in full.

    Raises:
        OptionError: if ``order`` is no permutation, a name is unknown, the conditioner contains dropout or batch
            normalisation, or it is for vectors and the event or the context is none.

    Example:
        >>> iaf = Autoregressive(3)          # samples in one pass
        >>> maf = Autoregressive(3).inv      # scores in one pass
        >>> z = torch.randn(5, 3)
        >>> torch.allclose(maf.inv(maf(z)), z, atol=1e-5)
        True
        >>> wavenet = Autoregressive((2, 50), conditioner="causal_conv", hidden_dims=[16] * 6, context_dim=(1, 50))
        >>> wavenet.condition(torch.randn(1, 50))(torch.randn(5, 2, 50)).shape
        torch.Size([5, 2, 50])
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        univariate: str | Univariate = "affine",
        order: Sequence[int] | None = None,
        conditioner: str | Conditioner = "made",
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(dim, context_dim)
        *channels, length = self.event_shape
        order = list(range(length)) if order is None else list(order)
        if sorted(order) != list(range(length)):
            raise OptionError(f"order must be a permutation of 0 to {length - 1}, got {order}")
        if isinstance(conditioner, str) and conditioner not in _CONDITIONERS:
            raise OptionError(f"conditioner must be one of {sorted(_CONDITIONERS)} or a factory, got {conditioner!r}")
        if len(channels) > 1:
            raise OptionError(f"Autoregressive takes vectors or (channels, length), but got {tuple(self.event_shape)}")
        if len(self.context_shape) == 2 and self.context_shape[-1] != length:
            raise OptionError(
                f"a conditioning sequence of {length} times has shape (channels, {length}), got {context_dim}"
            )
        if conditioner in ("made", "residual") and (channels or len(self.context_shape) > 1):
            raise OptionError(
                f"conditioner={conditioner!r} takes vectors, but got dim={dim} and context_dim={context_dim}: use "
                '"causal_conv" or a factory'
            )
        factory = _CONDITIONERS[conditioner] if isinstance(conditioner, str) else conditioner
        self.order = order
        self.univariate = univariate_named(univariate)
        options = {"channels": channels[0]} if channels else {}
        net = factory(order, self.univariate.num_params, hidden_dims, as_given(self.context_shape), **options)
        self.conditioner = checked_conditioner(net)

    @property
    def triangular_order(self) -> tuple[int, ...]:
        return tuple(self.order)

    @property
    def is_affine(self) -> bool:
        return isinstance(self.univariate, Additive | Affine)

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.univariate.forward_and_ladj(z, self.conditioner(z, context))

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        theta, solve = parameters_and_solver(self.conditioner, z, context)
        direct = z.view_as(z)  # what T sees, apart from what the network sees
        x, log_slopes = self.univariate.forward_and_ladj(direct, theta)
        with torch.no_grad():
            ones = torch.ones_like(x)
            (x_by_theta,) = pull_back((x,), (ones,), (theta,))
            by_z, by_theta = pull_back((log_slopes,), (ones,), (direct, theta))
            score = solve(score - by_z, torch.exp(log_slopes), x_by_theta, by_theta)
        return x, self._summed(log_slopes), score

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        if is_transformed():
            return self._inverse_by_passes(x, context)
        z, log_slopes = self._solve(x, context)
        if torch.is_grad_enabled():
            z = self._attached(z, x, context)
            log_slopes = -self._forward_and_log_slopes(z, context)[1]
        return z, log_slopes

    def _inverse_by_passes(self, x: Tensor, context: Tensor | None) -> Pair:
        """One pass of the network a place: for any conditioner, and for tracing."""
        # theta_j needs z_<j only, so the zeros that stand for later places do not matter.
        columns = [torch.zeros_like(x[..., 0])] * len(self.order)
        log_slopes = columns.copy()
        for j in self.order:
            theta = self.conditioner(torch.stack(columns, -1), context)
            columns[j], log_slopes[j] = self.univariate.inverse_and_ladj(x[..., j], theta[..., j, :])
        return torch.stack(columns, -1), torch.stack(log_slopes, -1)

    def _solve(self, x: Tensor, context: Tensor | None) -> Pair:
        """The inverse without gradients, by steps of the network if it has them."""
        incremental = next((steps for kind, steps in _STEPS.items() if isinstance(self.conditioner, kind)), None)
        if incremental is None:
            with torch.no_grad():
                return self._inverse_by_passes(x, context)
        with torch.inference_mode():  # half the overhead of no_grad; what leaves it is cloned
            rows = x.reshape(-1, *self.event_shape)
            steps = incremental(self.conditioner, len(rows), self._context_rows(x, context))
            z, log_slopes = self._solve_by_steps(rows, steps)
        z, log_slopes = (t.clone(memory_format=torch.contiguous_format) for t in (z, log_slopes))
        return z.reshape(x.shape), log_slopes.reshape(x.shape)

    def _context_rows(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """``(N, *context_shape)``, or ``(1, *context_shape)`` where all have the same."""
        if context is not None and context.numel() != self.context_dim:
            context = context.expand(*x.shape[: -len(self.event_shape)], *self.context_shape)
        return None if context is None else context.reshape(-1, *self.context_shape)

    def _solve_by_steps(self, x: Tensor, steps: Incremental | IncrementalConv) -> Pair:
        """The inverse of rows ``(N, *event_shape)``."""
        # Row i of what follows stands for place i.
        index_of_place = torch.as_tensor(self.order, device=x.device)
        values = x.transpose(0, -1)[index_of_place]
        parameters_last = (*range(1, x.dim()), 0)
        log_slopes = []
        for i, (value, z) in enumerate(zip(values.unbind(), steps.inputs.unbind(), strict=True)):
            root, log_slope = self.univariate.inverse_and_ladj(value, steps.parameters_at(i).permute(parameters_last))
            z.copy_(root)
            log_slopes.append(log_slope)
        place = index_of_place.argsort()
        return steps.inputs[place].transpose(0, -1), torch.stack(log_slopes)[place].transpose(0, -1)

    def _attached(self, z: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """z with the gradients of the inverse."""
        theta, solve = parameters_and_solver(self.conditioner, z, context)
        residual = self.univariate.forward_and_ladj(z, theta)[0] - x

        def solve_transposed(gradient: Tensor) -> Tensor:
            inputs = z.detach(), theta.detach()
            derivatives = torch.func.vjp(lambda *args: self.univariate.forward_and_ladj(*args)[0], *inputs)[1]
            slope, x_by_theta = derivatives(torch.ones_like(z))
            return solve(gradient, slope, x_by_theta, gradient.new_zeros(theta.shape))

        return attached(z, residual, solve_transposed)

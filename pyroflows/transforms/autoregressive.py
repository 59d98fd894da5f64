"""Autoregressive structure: the parameters of each dimension depend on those before it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import FlowError, OptionError
from pyroflows.nets import MADE, CausalConv, Incremental, IncrementalGradient, ResMADE
from pyroflows.nets.checks import checked_conditioner
from pyroflows.shapes import as_given
from pyroflows.transforms.base import Pair, Triple, pull_back
from pyroflows.transforms.root import runs_in_python
from pyroflows.transforms.triangular import TriangularTransform
from pyroflows.transforms.univariate import Additive, Affine, Univariate, univariate_named

Conditioner = Callable[..., nn.Module]
_CONDITIONERS: dict[str, Conditioner] = {"made": MADE, "residual": ResMADE, "causal_conv": CausalConv}


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
        net = self.conditioner
        if not isinstance(net, MADE):
            return super()._forward_and_score(z, score, context)
        hidden = net.pre_activations(z, context)
        theta = net.parameters_from(hidden)
        direct = z.view_as(z)  # what T sees, apart from what the network sees
        x, ladj = self.univariate.forward_and_ladj(direct, theta)
        with torch.no_grad():
            ones = torch.ones_like(x)
            (x_by_theta,) = pull_back((x,), (ones,), (theta,))
            ladj_by_z, ladj_by_theta = pull_back((ladj,), (ones,), (direct, theta))
            slope = torch.exp(ladj)
            score = self._solve_transposed(net, hidden, score - ladj_by_z, slope, x_by_theta, ladj_by_theta)
        return x, self._summed(ladj), score

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        if not (isinstance(self.conditioner, MADE) and runs_in_python()):
            return self._inverse_by_passes(x, context)
        rows = None if context is None else context.expand(*x.shape[:-1], -1).reshape(-1, self.context_dim)
        with torch.inference_mode():  # half the overhead of no_grad; what leaves it is cloned
            z, log_slopes = self._solve(self.conditioner, x.reshape(-1, self.dim), rows)
        z, log_slopes = z.clone().reshape(x.shape), log_slopes.clone().reshape(x.shape)
        if torch.is_grad_enabled():
            z = self._attached(self.conditioner, z, x, context)
            log_slopes = -self._forward_and_log_slopes(z, context)[1]
        return z, log_slopes

    def _inverse_by_passes(self, x: Tensor, context: Tensor | None) -> Pair:
        """One pass of the network a dimension: for any conditioner, and for tracing."""
        # theta_j needs z_<j only, so the zeros that stand for later dimensions do not matter.
        columns = [torch.zeros_like(x[..., 0])] * len(self.order)
        log_slopes = columns.copy()
        for j in self.order:
            theta = self.conditioner(torch.stack(columns, -1), context)
            columns[j], log_slopes[j] = self.univariate.inverse_and_ladj(x[..., j], theta[..., j, :])
        return torch.stack(columns, -1), torch.stack(log_slopes, -1)

    def _solve(self, net: MADE, x: Tensor, context: Tensor | None) -> Pair:
        """The inverse of rows ``(N, D)``, each hidden unit computed once, without gradients."""
        # Row i of what follows stands for place i.
        values = x.T[net.index_of_place]
        log_slopes = []
        steps = Incremental(net, len(x), context)
        for i, (value, z) in enumerate(zip(values.unbind(), steps.inputs.unbind(), strict=True)):
            root, log_slope = self.univariate.inverse_and_ladj(value, steps.parameters_at(i).T)
            z.copy_(root)
            log_slopes.append(log_slope)
        place = net.index_of_place.argsort()
        return steps.inputs[place].T, torch.stack(log_slopes)[place].T

    def _attached(self, net: MADE, z: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        r"""z with the gradients of the implicit function :math:`F(z; c, \mathrm{weights}) = x`.

        As in :func:`increasing_root`, by a Newton step :math:`z - J^{-1} (F(z) - x)`, which changes no value.
        """
        hidden = net.pre_activations(z, context)
        theta = net.parameters_from(hidden)
        residual = self.univariate.forward_and_ladj(z, theta)[0] - x

        def solve_transposed(gradient: Tensor) -> Tensor:
            inputs = z.detach(), theta.detach()
            derivatives = torch.func.vjp(lambda *args: self.univariate.forward_and_ladj(*args)[0], *inputs)[1]
            slope, x_by_theta = derivatives(torch.ones_like(z))
            nothing = gradient.new_zeros(theta.shape)
            return self._solve_transposed(net, hidden, gradient, slope, x_by_theta, nothing)

        return _NewtonStep.apply(residual, z, solve_transposed)

    def _solve_transposed(
        self, net: MADE, hidden: list[Tensor], gradient: Tensor, slope: Tensor, x_by_theta: Tensor, by_theta: Tensor
    ) -> Tensor:
        r"""The v with :math:`J^\top v + (\partial\theta/\partial z)^\top c = g`, J being the Jacobian at z.

        Component j reads :math:`T_j' v_j + \sum_{k>j} \partial_{z_j} \theta_k \cdot (c_k + v_k\, \partial_\theta T_k) =
        g_j`: backward substitution, where the sum is what the network's backward pass brings to input j once all later
        :math:`v_k` are known.

        Args:
            net: the network.
            hidden: its pre-activations at z.
            gradient: g.
            slope: T'.
            x_by_theta: :math:`\partial_\theta T`.
            by_theta: c.
        """

        def by_dimension(t: Tensor) -> tuple[Tensor, ...]:
            """D blocks ``(num_params, N)`` of memory of their own."""
            return t.reshape(-1, self.dim, net.num_params).permute(1, 2, 0).contiguous().unbind()

        # What is left of g, (D, N): from the last place on each v_k, known by then, takes its share from those before.
        rest = gradient.reshape(-1, self.dim).T.clone(memory_format=torch.contiguous_format)
        rests, factors, cotangents = (
            rest.unbind(),
            by_dimension(-x_by_theta / slope[..., None]),
            by_dimension(-by_theta),
        )
        steps = IncrementalGradient(net, [h.detach().reshape(-1, h.shape[-1]) for h in hidden], rest)
        for place in reversed(range(1, self.dim)):
            j = self.order[place]
            steps.parameter_gradient(place, cotangents[j].addcmul_(rests[j], factors[j]))
        return rest.T.reshape(gradient.shape) / slope


class _NewtonStep(torch.autograd.Function):
    """``z - J^{-1} residual`` where the residual is zero but has gradients."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, z: Tensor, solve_transposed: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve_transposed = solve_transposed
        return z.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # once_differentiable would not do: torch.autograd.functional.hessian then returns zeros.
        if torch.is_grad_enabled():
            raise FlowError(
                "create_graph=True has no second derivatives of this direction of Autoregressive: use torch.func, or a "
                "flow that goes here in one pass, which is MAF for a density and IAF for a sample"
            )
        return -ctx.solve_transposed(gradient), None, None

"""Recipes of continuous flows."""

from collections.abc import Sequence

from torch.distributions import constraints

from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.options import checked_int, checked_number
from pyroflows.shapes import shape_of
from pyroflows.transforms import Adaptive, Continuous, FixedSteps, FlowTransform, Standardize


class CNF(Flow):
    r"""The continuous normalizing flow (Chen et al. 2018, arXiv:1806.07366; Grathwohl et al. 2019, arXiv:1810.01367):
    one layer that carries base values along a velocity field v, one free-form network,

    .. math:: \frac{dz}{dt} = v(z, t, c), \quad z(0) = z, \quad x = z(1),

    see :class:`pyroflows.transforms.Continuous`. Every dimension depends freely on every other, in one layer.

    Draws, latents and log-densities are solved adaptively, to a tolerance. Training uses equal steps instead, which
    take the same time at each step and can be compiled. Where the field becomes so steep that these steps are not
    enough, the validation of a fit and the verdict on a posterior show it, since both are adaptive: give more steps, or
    a small ``kinetic_energy``, which keeps paths straight (Finlay et al. 2020, arXiv:2002.02798).

    Training by maximum likelihood takes a solve in each step. :func:`pyroflows.fit_flow_matching` trains the same flow
    without any.

    Args:
        dim: the event size D, or the event shape, such as (C, H, W), whose network is convolutional.
        hidden_dims: widths, or channels, of the hidden layers of v. Three suit flow matching. With two, the exact
            trace costs little in any dimension, so that training by solves is several times as fast: take
            ``(64, 64)`` for maximum likelihood and for posteriors.
        num_steps: the number of equal steps of a solve in training, four evaluations each; None to train with adaptive
            steps, which takes several times longer and is never compiled.
        tolerance: the tolerance of adaptive solves, absolute and relative.
        trace: how training computes the trace of the Jacobian, "exact", or "hutchinson" for an estimate; "auto" is the
            exact one where that costs little. Reported densities are exact in any case.
        kinetic_energy: the coefficient of :math:`\int |v|^2 dt` in the loss of a fit.
        jacobian_norm: the coefficient of :math:`\int \|\partial v / \partial z\|_F^2\, dt` in the loss of a fit.
        adjoint: whether gradients come from the adjoint equation, in the memory of one step, instead of from the steps.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`pyroflows.Flow`.
        support: the constraint that the data meet, see :class:`pyroflows.Flow`.

    Shapes: ``flow()`` has the event shape ``(dim,)``, or the shape given; for a context ``(..., context_dim)``,
    ``flow(context)`` has batch shape ``(...)``.

    Raises:
        OptionError: if an option is unknown or outside its range.

    Example:
        >>> flow = CNF(2, context_dim=3)
        >>> x, log_q = flow(torch.zeros(5, 3)).rsample_and_log_prob()
        >>> x.shape, log_q.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        hidden_dims: Sequence[int] = (64, 64, 64),
        num_steps: int | None = 8,
        tolerance: float = 1e-5,
        trace: str = "auto",
        kinetic_energy: float = 0.0,
        jacobian_norm: float = 0.0,
        adjoint: bool = False,
        *,
        context_dim: int | Sequence[int] = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
    ) -> None:
        checked_number("tolerance", tolerance)
        adaptive = Adaptive(tolerance, tolerance, adjoint=adjoint)
        fixed = None if num_steps is None else FixedSteps(checked_int("num_steps", num_steps), adjoint=adjoint)
        layer = Continuous(
            dim,
            hidden_dims,
            context_dim,
            fixed or adaptive,
            exact_solver=adaptive,
            trace=trace,
            kinetic_energy=kinetic_energy,
            jacobian_norm=jacobian_norm,
        )
        shape = shape_of(dim)
        by_channel: list[FlowTransform] = [Standardize(shape, by_channel=True)] if len(shape) == 3 else []
        super().__init__([layer, *by_channel], base, support)

"""One map for all steps of a chain, where a flow solves a differential equation adaptively."""

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflows.errors import warn
from pyroflows.transforms import FlowTransform
from pyroflows.transforms.continuous.equal_steps import enough_steps, equal_steps

# Log-determinants, in nats, and values, in standard deviations, differ by less from those of an adaptive solve.
TOLERANCE = 1e-3
NUM_CHECKED = 500
# Beyond this difference at the draws of the chains, their law is noticeably another one.
MAX_DIFFERENCE = 0.05


class SteadyMap:
    """The map from base to data by which chains move, the same function of each row at all steps.

    The steps of an adaptive solve depend on all rows of a batch and jump from place to place, so that a chain, which
    needs one differentiable target, would see errors of the size of the tolerance, and no step of it could be recorded.
    Equal steps take their place, as many as agree with the adaptive solve at draws of the base. Where no number of
    equal steps does, the map is the adaptive one.

    Args:
        transform: the exact transform of a flow of vectors.
        base: the law of base values.

    Attributes:
        num_steps: the number of equal steps; None if the transform does not solve adaptively, or needs more.

    Example:
        >>> flow = pf.flows.CNF(2)
        >>> SteadyMap(flow.transform.exact(), flow.base()).num_steps
        4
    """

    def __init__(self, transform: FlowTransform, base: Distribution) -> None:
        self._transform = transform
        self.num_steps: int | None = None
        if transform.reads_values:
            z = base.sample((NUM_CHECKED,))
            self.num_steps = enough_steps(lambda: self._in_units(z), TOLERANCE)

    @property
    def can_be_recorded(self) -> bool:
        """Whether the map runs without reading values."""
        return self.num_steps is not None or not self._transform.reads_values

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the log-determinant of rows z ``(n, dim)``."""
        if self.num_steps is None:
            return self._transform.forward_and_ladj(z)
        with equal_steps(self.num_steps):
            return self._transform.forward_and_ladj(z)

    def check(self, z: Tensor) -> None:
        """Warn if the map differs from the adaptive one at draws ``(n, dim)`` of chains."""
        if self.num_steps is None:
            return
        z = z[torch.linspace(0, len(z) - 1, min(NUM_CHECKED, len(z)), device=z.device).long()]
        _, exact = self._in_units(z)
        with equal_steps(self.num_steps):
            _, found = self._in_units(z)
        if not (difference := (found - exact).abs().max().item()) < MAX_DIFFERENCE:
            warn(
                f"the chains moved by {self.num_steps} equal steps of the continuous flow, whose log-densities differ "
                f"by up to {difference:.2g} nats from those of an adaptive solve at the draws: the flow is too far "
                "from the posterior there; train it for longer"
            )

    @torch.no_grad()
    def _in_units(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return x in units of its standard deviations, and log-determinants."""
        x, ladj = self._transform.forward_and_ladj(z)
        return x / x.std(0) if len(x) > 1 else x, ladj

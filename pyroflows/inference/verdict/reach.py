"""Draws that reach further than a flow's own, and what they tell of the posterior beyond the flow's draws.

The tail of importance weights says little about what lies beyond it: a generalised Pareto shape, fitted to the few
hundred largest weights, extrapolates over orders of magnitude, and is often far above its threshold where next to
nothing lies beyond. Draws that reach further measure it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, constraints

from pyroflows.errors import InversionError
from pyroflows.flows.mixture_distribution import MixtureDistribution
from pyroflows.inference.verdict.figures import Estimate, Unseen
from pyroflows.models.log_joint import LogJoint

# A base value is stretched by this factor along one of its coordinates, or by 1 + 1 / sqrt(D) along all D of them. That
# is about as far as all can go at once: the squares of stretched weights then have a mean that does not grow with D.
STRETCH = 3.0


@dataclass(frozen=True)
class ReachingDraws:
    r"""Weights of draws from a law r whose tails are heavier than those of a flow's law q.

    In the base space of the flow, r is the mixture in equal parts of the base itself, of the base stretched along one
    coordinate, which is chosen at random, and of the base stretched along all. So q / r is at most 3, and p / r is
    bounded where the posterior p is wider than q by less than the stretch.

    Args:
        log_weights: :math:`\log p(x, y) - \log q(x)` of the draws, ``(S,)``; -inf where it is not finite.
        log_ratios: :math:`\log q - \log r` of the draws, ``(S,)``.
    """

    log_weights: Tensor
    log_ratios: Tensor

    @classmethod
    @torch.no_grad()
    def drawn(cls, law: Any, log_joint: LogJoint, num_samples: int) -> "ReachingDraws | None":
        """Draw from torch's global generator.

        Args:
            law: the law of a flow; of a mixture of flows each component is stretched by itself.
            log_joint: the log joint of the model.
            num_samples: the number S of draws.

        Returns:
            The draws; None if the base of the flow is not over the reals, or the components cannot be scored that far
            out.
        """
        is_mixture = isinstance(law, MixtureDistribution)
        components = law.components if is_mixture else [law]
        if not all(_is_real(component.base) for component in components):
            return None
        shares = law.log_weights().exp() if is_mixture else torch.ones(1)
        counts = torch.multinomial(shares, num_samples, replacement=True).bincount(minlength=len(components))
        log_weights, log_ratios = [], []
        for component, count in zip(components, counts.tolist(), strict=True):
            if not count:
                continue
            z, log_ratio = _stretched(component.base, component.base.sample((count,)))
            x, log_q = component.transport(z)
            try:
                log_weights.append(log_joint.in_chunks(x) - (law.log_prob(x) if is_mixture else log_q))
            except InversionError:
                return None
            log_ratios.append(log_ratio)
        joined = torch.cat(log_weights).cpu().double()
        return cls(torch.where(joined.isfinite(), joined, -torch.inf), torch.cat(log_ratios).cpu().double())

    def joined(self, other: "ReachingDraws") -> "ReachingDraws":
        """These draws and others from the same law."""
        log_ratios = torch.cat([self.log_ratios, other.log_ratios])
        return ReachingDraws(torch.cat([self.log_weights, other.log_weights]), log_ratios)

    def unseen(self, num_draws: int) -> Unseen:
        """The share of the posterior that lies where weights are larger than those of draws from the flow.

        Args:
            num_draws: the number of draws from the flow, which show weights that at least one draw in so many has.
        """
        order = self.log_weights.argsort(descending=True)
        of_flow = torch.softmax(self.log_ratios, 0)[order]
        of_posterior = torch.softmax(self.log_weights + self.log_ratios, 0)[order]
        is_unseen = (of_flow.cumsum(0) <= 1 / num_draws).double()
        share = of_posterior @ is_unseen
        error = (of_posterior * (is_unseen - share)).norm()
        return Unseen(Estimate(share.item(), error.item()), num_draws)


def _is_real(base: Any) -> bool:
    """Whether the coordinates of a base value are independent and real."""
    return isinstance(base, Independent) and isinstance(base.base_dist.support, type(constraints.real))


def _stretched(base: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    """Stretch a third of draws along one coordinate, and another third along all.

    Args:
        base: the law of the draws, of independent coordinates.
        z: draws ``(S, *base_shape)``.

    Returns:
        The draws, and their log-density under the base less that under the mixture of the three laws, ``(S,)``.
    """
    size = base.event_shape.numel()
    along_all = 1 + 1 / math.sqrt(size)
    factors = torch.ones(len(z), size).to(z)
    factors[1::3] = along_all
    chosen = torch.randint(size, (len(factors[2::3]), 1), device=z.device)
    factors[2::3] = factors[2::3].scatter(1, chosen, STRETCH)
    z = z * factors.reshape(z.shape)

    def log_prob(stretch: float) -> Tensor:
        """The log-densities of the coordinates, stretched, ``(S, size)``."""
        return base.base_dist.log_prob(z / stretch).flatten(1) - math.log(stretch)

    plain = log_prob(1.0)
    of_one = (log_prob(STRETCH) - plain).logsumexp(-1) - math.log(size)
    of_all = (log_prob(along_all) - plain).sum(-1)
    return z, math.log(3) - torch.stack([torch.zeros_like(of_one), of_one, of_all]).logsumexp(0)

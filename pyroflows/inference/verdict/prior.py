"""What draws of the prior tell of the part of a posterior that draws from a flow do not see.

Where a posterior keeps much of its prior, as a narrow spike on a broad slab does, a flow at the spike never visits the
rest, and no start ends there. Many draws of the prior do.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.errors import InversionError
from pyroflows.flows import Law
from pyroflows.inference.verdict.figures import Estimate
from pyroflows.models.log_joint import LogJoint

NUM_PRIOR_DRAWS = 4000


@dataclass(frozen=True)
class PriorDraws:
    r"""The weights of draws of the prior :math:`\pi`.

    Args:
        log_weights: :math:`\log p(x, y) - \log \pi(x)`, the log-likelihoods, ``(S,)``; -inf where not finite.
        log_flow_weights: :math:`\log p(x, y) - \log q(x)` for the law q of a flow, ``(S,)``.
    """

    log_weights: Tensor
    log_flow_weights: Tensor

    @classmethod
    @torch.no_grad()
    def drawn(cls, law: Law, log_joint: LogJoint) -> "PriorDraws | None":
        """Draw from torch's global generator; None where the prior cannot be drawn, or the flow not be scored.

        Args:
            law: the law q of a flow.
            log_joint: the log joint of the model.
        """
        if not log_joint.structure.has_data or (drawn := log_joint.draw_prior(NUM_PRIOR_DRAWS)) is None:
            return None
        vectors, log_prior = drawn
        log_p = log_joint.in_chunks(vectors)
        log_weights = log_p - log_prior
        finite = log_weights.isfinite()
        log_flow_weights = torch.full_like(log_weights, -torch.inf)
        try:
            log_flow_weights[finite] = log_p[finite] - law.log_prob(vectors[finite])
        except InversionError:
            return None
        return cls(log_weights.where(finite, -torch.inf).cpu().double(), log_flow_weights.cpu().double())

    def unseen(self, level: float, log_evidence: float) -> Estimate:
        """Estimate the share of the posterior that lies where the flow's weights are larger than its draws show.

        Args:
            level: the largest log weight among the draws from the flow.
            log_evidence: the log evidence of what these draws see.
        """
        # A flow that scores a draw as impossible has an infinite weight there.
        is_unseen = (self.log_flow_weights > level) | self.log_flow_weights.isnan()
        masses = torch.exp(self.log_weights.where(is_unseen, -torch.inf) - log_evidence)
        mass, error = masses.mean().item(), masses.std().item() / math.sqrt(len(masses))
        if not math.isfinite(mass):
            return Estimate(1.0, 0.0 if math.isfinite(error) else math.inf)
        return Estimate(mass / (1 + mass), error / (1 + mass) ** 2)

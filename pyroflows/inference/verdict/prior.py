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
# Draws of the prior that together hold less than this share of the posterior are not compared with the flow.
NEGLIGIBLE_SHARE = 1e-5


@dataclass(frozen=True)
class PriorDraws:
    r"""The weights of those of n draws of the prior :math:`\pi` that are not negligible.

    Args:
        log_weights: :math:`\log p(x, y) - \log \pi(x)`, the log-likelihoods, ``(S,)``, S at most n.
        log_flow_weights: :math:`\log p(x, y) - \log q(x)` for the law q of a flow, ``(S,)``.
    """

    log_weights: Tensor
    log_flow_weights: Tensor

    @classmethod
    @torch.no_grad()
    def drawn(cls, law: Law, log_joint: LogJoint, log_evidence: float) -> "PriorDraws | None":
        """Draw from torch's global generator; None where the prior cannot be drawn, or the flow not be scored.

        Args:
            law: the law q of a flow.
            log_joint: the log joint of the model.
            log_evidence: the log evidence of what draws from the flow see, by which draws of the prior are negligible.
        """
        if not log_joint.structure.has_data or (drawn := log_joint.draw_prior(NUM_PRIOR_DRAWS)) is None:
            return None
        vectors, log_prior = drawn
        log_p = log_joint.in_chunks(vectors)
        log_weights = log_p - log_prior
        # Each of n draws with a weight w has the share w / n of the evidence; to score the flow is what takes long.
        counts = log_weights.isfinite() & (log_weights > log_evidence + math.log(NEGLIGIBLE_SHARE))
        try:
            log_flow_weights = log_p[counts] - law.log_prob(vectors[counts])
        except InversionError:
            return None
        return cls(log_weights[counts].cpu().double(), log_flow_weights.cpu().double())

    def unseen(self, level: float, log_evidence: float) -> Estimate:
        r"""Estimate the share of the posterior that lies where the flow's weights are larger than its draws show.

        With the mass there, :math:`m = \frac1n \sum_i w_i` over the draws in this region, and the evidence e that the
        draws of the flow see, the share is :math:`m / (m + e)`, and its error is that of m by the delta method.

        Args:
            level: the largest log weight among the draws from the flow.
            log_evidence: the log evidence of what these draws see.
        """
        # A flow that scores a draw as impossible has an infinite weight there.
        is_unseen = (self.log_flow_weights > level) | self.log_flow_weights.isnan()
        log_weights = self.log_weights[is_unseen]
        if not len(log_weights):
            return Estimate(0.0, 0.0)
        log_total = torch.logsumexp(log_weights, 0)
        share = torch.sigmoid(log_total - math.log(NUM_PRIOR_DRAWS) - log_evidence).item()
        square = torch.exp(torch.logsumexp(2 * log_weights, 0) - 2 * log_total).item()
        relative_error = math.sqrt(max(0.0, square - 1 / NUM_PRIOR_DRAWS))
        return Estimate(share, share * (1 - share) * relative_error)

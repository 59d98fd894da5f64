"""Candidates for the posterior of a model: each is a family of flows with its starts, fitted and then compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from pyroflows.flows import Flow, Law, Mixture
from pyroflows.guides.hierarchical import HierarchicalGaussian, hierarchy_near
from pyroflows.guides.packed import FlowFn, flow_near
from pyroflows.inference.search.gaussians import GaussianApproximation
from pyroflows.inference.search.starts import Starts
from pyroflows.inference.verdict.diagnosis import Diagnosis
from pyroflows.inference.verdict.draws import DiagnosticDraws, default_num_samples
from pyroflows.models.log_joint import LogJoint
from pyroflows.training.history import History

NUM_EVIDENCE_DRAWS = 4000
# A Gaussian is enough up to this variance of its log weights, this share of the posterior that its draws do not see,
# and this change under the weights of any mean (in standard deviations) and any standard deviation (relative).
MAX_VARIANCE, MAX_SHARE, MAX_MOVE = 0.05, 0.001, 0.05

# Most Gaussians are not: so many draws show it where the variance lies this many standard errors above its limit.
NUM_FIRST_LOOK, SURELY = 1000, 5.0

# It trains a flow in place, given a function that makes the whole candidate from the history of this training.
Start: TypeAlias = GaussianApproximation | HierarchicalGaussian
Train: TypeAlias = Callable[[Flow, Callable[[History], "FittedCandidate"]], History]


@dataclass(frozen=True)
class Candidate:
    """A family of flows, and the Gaussians at which its flows start.

    Args:
        flow_fn: a recipe, or a function of the user's, ``latent_dim -> flow``.
        starts: one Gaussian, of all latents or of a hierarchy, for each separate mode; where there are several, a flow
            is fitted at each, and the flows are mixed, weighted by their evidences.
        is_trained: whether the flows are trained; otherwise they stay as they start.

    Example:
        >>> from pyroflows.flows import Recipe
        >>> start = GaussianApproximation(torch.zeros(2), torch.eye(2), elbo=0.0)
        >>> Candidate(Recipe("Gaussian"), (start,), is_trained=False).flow_fn
        Recipe('Gaussian')
    """

    flow_fn: FlowFn
    starts: tuple[Start, ...]
    is_trained: bool = True

    def fit(self, log_joint: LogJoint, train: Train, found: Starts | None) -> "FittedCandidate":
        """Build and train a flow at each start, and mix them where there are several.

        Args:
            log_joint: the log joint of the model.
            train: a function that trains a flow in place. It also gets a function that makes the candidate as it is by
                then from the history of this training.
            found: what the search for starts found; None if it has found nothing yet.

        Raises:
            DivergedError: if a training diverges.
        """
        flows: list[Flow] = []
        histories: list[History] = []

        def so_far(history: History) -> FittedCandidate:
            # A flow that was not trained yet stays at its start. To make it now must not change the draws of the fit.
            with torch.random.fork_rng():
                all_flows = flows + [self._flow_at(start) for start in self.starts[len(flows) :]]
            return FittedCandidate(self, _mixed(all_flows, log_joint), [*histories, history][0], log_joint, found)

        for start in self.starts:
            flows.append(self._flow_at(start))
            histories.append(train(flows[-1], so_far) if self.is_trained else History())
        return so_far(History())

    def _flow_at(self, start: Start) -> Flow:
        if isinstance(start, HierarchicalGaussian):
            return hierarchy_near(start, self.flow_fn, has_local_flow=self.is_trained)
        return flow_near(self.flow_fn, start.loc, start.scale_tril, start.centering)


@dataclass(frozen=True)
class FittedCandidate:
    """A candidate after its fit.

    Args:
        candidate: the candidate that was fitted.
        flow: its flow, or the mixture of its flows.
        history: the history of its training; that of the first flow where there are several.
        log_joint: the log joint of the model.
        found: what the search for starts found; None if it has found nothing yet.
    """

    candidate: Candidate
    flow: Flow
    history: History
    log_joint: LogJoint
    found: Starts | None

    @cached_property
    def few_draws(self) -> DiagnosticDraws:
        """A few draws, which show whether the flow is far from the posterior."""
        return DiagnosticDraws.first(self.flow(), self.log_joint, NUM_FIRST_LOOK)

    @cached_property
    def first_draws(self) -> DiagnosticDraws:
        """A batch of draws for a first look, made at the first use."""
        return DiagnosticDraws.first(self.flow(), self.log_joint, default_num_samples(self.flow.dim))

    @cached_property
    def draws(self) -> DiagnosticDraws:
        """The draws on which the verdict rests."""
        return self.first_draws.settled()

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """The verdict on the flow."""
        return self.draws.diagnosis(self.flow, self.history, self.found)


def is_enough(gaussian: FittedCandidate) -> bool:
    """Whether a Gaussian is so close to the posterior that a flow could not improve on it."""
    if gaussian.few_draws.figures.log_weight_variance.at(-SURELY) > MAX_VARIANCE:
        return False
    figures = gaussian.first_draws.figures
    # What takes no further draws comes first, since most Gaussians are not enough.
    if figures.log_weight_variance.value >= MAX_VARIANCE:
        return False
    if max(figures.mean_shift.value, abs(figures.sd_ratio.value - 1)) >= MAX_MOVE:
        return False
    # That few starts might have missed a mode counts against a flow at the same starts as well.
    found = gaussian.found and replace(gaussian.found, new_mode_probability=0.0)
    diagnosis = gaussian.draws.diagnosis(gaussian.flow, gaussian.history, found)
    return diagnosis.verdict == "good" and (diagnosis.unseen_share or 0.0) < MAX_SHARE


def _mixed(flows: list[Flow], log_joint: LogJoint) -> Flow:
    """Mix flows, weighted by the evidences of the parts of the posterior that they cover; one stays as it is."""
    if len(flows) == 1:
        return flows[0]
    mixture = Mixture(flows, torch.stack([_log_evidence(flow(), log_joint) for flow in flows]))
    mixture.gate.requires_grad_(False)  # The evidences are the weights.
    return mixture


@torch.no_grad()
def _log_evidence(law: Law, log_joint: LogJoint) -> Tensor:
    """Estimate, by importance sampling, the log evidence of the part of the posterior that a law covers."""
    x, log_q = law.rsample_and_log_prob((NUM_EVIDENCE_DRAWS,))
    log_weights = log_joint.in_chunks(x) - log_q
    return torch.logsumexp(log_weights.where(log_weights.isfinite(), -torch.inf), 0)

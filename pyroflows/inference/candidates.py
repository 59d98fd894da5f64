"""What a fit may try, as a value: a family of flows and where they start; fitting it gives another, to compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyroflows.flows import Flow, Mixture
from pyroflows.guides.packed import FlowFn, flow_near
from pyroflows.inference.diagnosis import Diagnosis, diagnose
from pyroflows.inference.pathfinder import GaussianApproximation
from pyroflows.inference.starts import Starts
from pyroflows.inference.weights import Weights
from pyroflows.models.log_joint import LogJoint
from pyroflows.randomness import seeded
from pyroflows.training.history import History

NUM_EVIDENCE_DRAWS = 4000
NUM_DIAGNOSTIC_SAMPLES = 10_000


@dataclass(frozen=True)
class DiagnosticDraws:
    """The draws from a flow behind the figures that a posterior reports of itself.

    Args:
        latents: unconstrained draws ``(S, dim)``.
        raw_log_weights: their log weights :math:`\\log p(x, y) - \\log q(x)`, ``(S,)``.
        weights: the smoothed weights.
    """

    latents: Tensor
    raw_log_weights: Tensor
    weights: Weights

    @classmethod
    def drawn(cls, flow: Flow, log_joint: LogJoint, num_samples: int) -> "DiagnosticDraws":
        """Draws of a flow, the same at each call; they leave the global generator as it was."""
        with seeded(0), torch.no_grad():
            latents, log_q = flow().rsample_and_log_prob((num_samples,))
            raw = log_joint.in_chunks(latents) - log_q
        return cls(latents, raw, Weights.smoothed(raw))


@dataclass(frozen=True)
class Candidate:
    """A family of flows, and the Gaussians near which flows of it start.

    Args:
        flow_fn: a recipe, or a function of the user's, ``latent_dim -> flow``.
        starts: a Gaussian for each separate mode. The flows of several are mixed, weighted by their evidences.
        is_trained: whether the flows are trained, or taken as they start.
    """

    flow_fn: FlowFn
    starts: tuple[GaussianApproximation, ...]
    is_trained: bool = True

    def fit(self, log_joint: LogJoint, train: Callable[[Flow], History], found: Starts) -> "FittedCandidate":
        """Build and train the flows.

        Args:
            log_joint: the log joint of the model.
            train: trains a flow in place.
            found: what the search for starts found.

        Raises:
            DivergedError: if a training diverges.
        """
        flows, histories = [], [History()]
        for start in self.starts:
            flow = flow_near(self.flow_fn, start.loc, start.scale_tril)
            if self.is_trained:
                histories.append(train(flow))
            flows.append(flow)
        mixed = flows[0] if len(flows) == 1 else _mixed(flows, log_joint)
        return FittedCandidate(self, mixed, histories[1 if self.is_trained else 0], log_joint, found)


@dataclass(frozen=True)
class FittedCandidate:
    """A fitted candidate, with its verdict.

    Args:
        candidate: what was fitted.
        flow: the flow, or the mixture of flows.
        history: of the training, that of the first flow where there are several.
        log_joint: the log joint of the model.
        found: what the search for starts found.
    """

    candidate: Candidate
    flow: Flow
    history: History
    log_joint: LogJoint
    found: Starts

    @cached_property
    def draws(self) -> DiagnosticDraws:
        """The draws behind the verdict."""
        return DiagnosticDraws.drawn(self.flow, self.log_joint, NUM_DIAGNOSTIC_SAMPLES)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """The verdict."""
        return diagnosed(self.draws, self.flow, self.history, self.found)


def diagnosed(draws: DiagnosticDraws, flow: Flow, history: History, found: Starts | None) -> Diagnosis:
    """The verdict on a flow, by its draws and by what the starts found."""
    num_other_modes = 0 if found is None else len(found.modes) - len(flow.components)
    modes = None if found is None else str(found)
    return diagnose(draws.raw_log_weights, draws.weights, draws.latents, history, modes, num_other_modes)


def _mixed(flows: Sequence[Flow], log_joint: LogJoint) -> Mixture:
    return Mixture(flows, torch.stack([_log_evidence(flow, log_joint) for flow in flows]))


@torch.no_grad()
def _log_evidence(flow: Flow, log_joint: LogJoint) -> Tensor:
    """The log evidence of the part of the posterior that a flow covers, by importance sampling."""
    x, log_q = flow().rsample_and_log_prob((NUM_EVIDENCE_DRAWS,))
    return torch.logsumexp(log_joint.in_chunks(x) - log_q, 0)

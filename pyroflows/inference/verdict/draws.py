"""The draws from a flow on which a verdict rests, and the facts that they show of a fit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyroflows.flows import Flow, Law
from pyroflows.guides.centering import centerings
from pyroflows.inference.search.starts import Starts
from pyroflows.inference.verdict.diagnosis import Diagnosis, Facts, diagnose
from pyroflows.inference.verdict.figures import CLEARLY_UNSEEN, Estimate, Figures, Unseen
from pyroflows.inference.verdict.mismatch import helpful_forms, worst_sites
from pyroflows.inference.verdict.prior import PriorDraws
from pyroflows.inference.verdict.reach import ReachingDraws
from pyroflows.inference.weights import Weights
from pyroflows.models.log_joint import LogJoint
from pyroflows.randomness import seeded
from pyroflows.training.history import History

NUM_DIAGNOSTIC_SAMPLES = 10_000
# With thousands of latents there are fewer draws, of about so many numbers in all.
MAX_NUMBERS = 2e6
# Where figures that decide lie within so many standard errors of their limits, there are so many batches of draws.
MIN_DISTANCE, NUM_BATCHES = 1.0, 4
# Seeds of further draws, far from those of the first.
SEED_OF_BATCHES, SEED_OF_REACH, SEED_OF_PRIOR = 2**20, 2**21, 2**22
NUM_EXTREME = 3  # draws of each kind are compared with single runs
NUM_LOOKS = 200  # at draws where the log joint is not finite
MIN_STEPS_OF_TREND = 100


def default_num_samples(dim: int) -> int:
    """The number of draws on which a verdict rests by default.

    Example:
        >>> default_num_samples(10), default_num_samples(10_000)
        (10000, 1000)
    """
    return max(1000, min(NUM_DIAGNOSTIC_SAMPLES, int(MAX_NUMBERS / dim)))


@dataclass(frozen=True)
class DiagnosticDraws:
    r"""The draws from a flow on which the figures and the verdict of a posterior rest.

    Args:
        law: the law of the flow.
        log_joint: the log joint of the model.
        latents: unconstrained draws ``(S, dim)``.
        raw_log_weights: their log weights :math:`\log p(x, y) - \log q(x)`, ``(S,)``.
        weights: the same weights, smoothed.
        seed: the seed of the draws.
        batch_size: the number of draws in a batch, of which there may be several.
    """

    law: Law
    log_joint: LogJoint
    latents: Tensor
    raw_log_weights: Tensor
    weights: Weights
    seed: int
    batch_size: int

    @classmethod
    def first(cls, law: Law, log_joint: LogJoint, num_samples: int, seed: int = 0) -> "DiagnosticDraws":
        """Draw one batch from the law of a flow, the same whenever the seed is the same."""
        with seeded(seed):
            latents, raw = _weighted(law, log_joint, num_samples)
        return cls(law, log_joint, latents, raw, Weights.smoothed(raw), seed, num_samples)

    @classmethod
    def drawn(cls, law: Law, log_joint: LogJoint, num_samples: int, seed: int = 0) -> "DiagnosticDraws":
        """Draw a batch, and more of them if the verdict needs them."""
        return cls.first(law, log_joint, num_samples, seed).settled()

    def settled(self) -> "DiagnosticDraws":
        """Add batches if figures that decide the verdict lie within their errors of the limits.

        There is only the first batch where the model runs draw by draw, which is slow.
        """
        verdicts = [self.figures.verdict(self.unseen, errors) for errors in (-MIN_DISTANCE, MIN_DISTANCE)]
        if verdicts[0] == verdicts[1] or self.log_joint.batched.mode == "loop":
            return self
        with seeded(SEED_OF_BATCHES + self.seed):
            latents, raw = _weighted(self.law, self.log_joint, (NUM_BATCHES - 1) * self.batch_size)
        latents, raw = torch.cat([self.latents, latents]), torch.cat([self.raw_log_weights, raw])
        settled = replace(self, latents=latents, raw_log_weights=raw, weights=Weights.smoothed(raw))
        if "_reach" in vars(self):  # which does not depend on these draws
            vars(settled)["_reach"] = self._reach
        return settled

    @cached_property
    def figures(self) -> Figures:
        """The figures of the draws."""
        return Figures.of(self.raw_log_weights, self.weights, self.latents)

    @cached_property
    def unseen(self) -> Unseen | None:
        """The share of the posterior that one batch does not see; None if k-hat is low, or it cannot be measured."""
        return None if self.figures.khat_is_low else self._reach

    @cached_property
    def _reach(self) -> Unseen | None:
        with seeded(SEED_OF_REACH + self.seed):
            draws = ReachingDraws.drawn(self.law, self.log_joint, self.batch_size)
            if draws is None:
                return None
            unseen = draws.unseen(self.batch_size)
            may_be_good = self.figures.verdict_on_moments(-MIN_DISTANCE) == "good"
            if unseen.is_certain(CLEARLY_UNSEEN, may_be_good) or self.log_joint.batched.mode == "loop":
                return unseen
            more = ReachingDraws.drawn(self.law, self.log_joint, (NUM_BATCHES - 1) * self.batch_size)
        return unseen if more is None else draws.joined(more).unseen(self.batch_size)

    @cached_property
    def unseen_by_prior(self) -> Estimate | None:
        """The share of the posterior that draws of the prior see and those of the flow do not; None if unknown."""
        finite = self.raw_log_weights[self.raw_log_weights.isfinite()]
        if not len(finite):
            return None
        with seeded(SEED_OF_PRIOR + self.seed):
            draws = PriorDraws.drawn(self.law, self.log_joint, self.weights.log_evidence)
        return None if draws is None else draws.unseen(finite.max().item(), self.weights.log_evidence)

    def diagnosis(self, flow: Flow, history: History, starts: Starts | None) -> Diagnosis:
        """Judge the flow by these draws, its training, and its starts where it had several."""
        facts = self._facts(flow, history, starts)
        diagnosis = diagnose(self.figures, self.unseen, facts)
        if diagnosis.verdict == "good":
            return diagnosis
        return diagnose(self.figures, self.unseen, replace(facts, mismatch=tuple(self._mismatch(flow))))

    def _facts(self, flow: Flow, history: History, starts: Starts | None) -> Facts:
        facts = Facts(
            elbo_growth=elbo_growth(history),
            has_data=self.log_joint.structure.has_data,
            non_finite=self._non_finite_sites(),
            shares_at_edges=self.log_joint.shares_at_edges(self.latents),
            unseen_by_prior=self.unseen_by_prior,
        )
        if starts is None:
            return facts
        # Modes that symmetries of the model map to each other may be too many to fit.
        num_modes = max(len(starts.modes), starts.num_equal)
        return replace(
            facts,
            modes=str(starts),
            num_other_modes=num_modes - len(flow.components),
            num_equal_modes=starts.num_equal,
            new_mode_probability=starts.new_mode_probability,
        )

    def _non_finite_sites(self) -> str:
        """Name the sites at which the log joint is not finite, in words."""
        bad = self.latents[~torch.isfinite(self.raw_log_weights)][:NUM_LOOKS]
        sites = self.log_joint.non_finite_sites(bad) if len(bad) else {}
        return f", at site {' and '.join(repr(name) for name in sites)}" if sites else ""

    def _mismatch(self, flow: Flow) -> Iterator[str]:
        if len(self.raw_log_weights) - self.figures.num_zero - self.figures.num_nan < 2:
            return
        log_weights, weights = self.raw_log_weights.double(), self.weights.normalized.to(self.latents.device)
        sites = worst_sites(self.log_joint.layout, self.latents.double(), log_weights, weights)
        if sites:
            yield f"flow and posterior differ most at site {' and at site '.join(map(str, sites))}"
        learned = {name for layer in centerings(flow) for name in layer.names}
        yield from helpful_forms(self.log_joint, self.latents, log_weights, [site.name for site in sites], learned)


@torch.no_grad()
def _weighted(law: Law, log_joint: LogJoint, num_samples: int) -> tuple[Tensor, Tensor]:
    """Draw from the law of a flow; the draws ``(S, dim)`` and their log weights ``(S,)``."""
    latents, log_q = law.rsample_and_log_prob((num_samples,))
    log_weights = log_joint.in_chunks(latents) - log_q
    if log_joint.run_singly_if_wrong(latents, _extreme_rows(latents, log_weights)):
        log_weights = log_joint.in_chunks(latents) - log_q
    return latents, log_weights


def _extreme_rows(latents: Tensor, log_weights: Tensor) -> Tensor:
    """The indices of the draws of the largest and smallest weights, of those furthest out, and of a few of any kind."""
    by_weight = log_weights.argsort()
    by_distance = ((latents - latents.mean(0)) / latents.std(0)).abs().amax(-1).argsort()
    some = torch.arange(min(NUM_EXTREME, len(latents)), device=latents.device)
    parts = [by_weight[:NUM_EXTREME], by_weight[-NUM_EXTREME:], by_distance[-NUM_EXTREME:], some]
    return torch.cat(parts).unique()


def elbo_growth(history: History | None) -> float:
    """By how much the mean ELBO of the last tenth of the steps exceeds that of the tenth before, or 0.

    The growth counts only if it is more than three standard errors.

    Args:
        history: the history of a training, which need not have steps.
    """
    if history is None or history.num_steps < MIN_STEPS_OF_TREND:
        return 0.0
    size = history.num_steps // 10
    last, before = history.recent("elbo", size), history.recent("elbo", 2 * size)[:-size]
    noise = math.sqrt((last.var() + before.var()) / size)
    growth = float(last.mean() - before.mean())
    return growth if growth > 3 * noise else 0.0

"""The verdict on a fit in words, and the draws and the facts behind it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pyroflows.flows import Flow, Law
from pyroflows.inference.search.starts import Starts
from pyroflows.inference.verdict.figures import (
    CLEARLY_ABOVE,
    CLEARLY_UNSEEN,
    MAX_CORRECTABLE_SHARE,
    MAX_LOG_WEIGHT_VARIANCE,
    MAX_UNSEEN_SHARE,
    Estimate,
    Figures,
    Unseen,
    Verdict,
    worst,
)
from pyroflows.inference.verdict.mismatch import helpful_forms, worst_sites
from pyroflows.inference.verdict.prior import PriorDraws
from pyroflows.inference.verdict.reach import ReachingDraws
from pyroflows.inference.weights import Weights
from pyroflows.models.log_joint import LogJoint
from pyroflows.randomness import seeded
from pyroflows.training.history import History

NUM_DIAGNOSTIC_SAMPLES = 10_000
# Where figures that decide lie within so many standard errors of their limits, there are so many batches of draws.
MIN_DISTANCE, NUM_BATCHES = 1.0, 4
# Seeds of further draws, far from those of the first.
SEED_OF_BATCHES, SEED_OF_REACH, SEED_OF_PRIOR = 2**20, 2**21, 2**22
# A share that few draws of the prior show counts if it is larger than its limit by so many standard errors.
SURELY_MISSED = 3.0
NUM_LOOKS = 200  # at draws where the log joint is not finite
MAX_EDGE_SHARE = 0.01
MAX_NEW_MODE_PROBABILITY = 0.06
MAX_GROWTH = 0.05  # of the ELBO, in nats, over the last tenth of the training
MIN_STEPS_OF_TREND = 100


@dataclass(frozen=True)
class Facts:
    """What is known of a fit besides the figures of its draws.

    Args:
        elbo_growth: the growth of the ELBO over the last tenth of the training, in nats.
        modes: a sentence on what the starts found; None where there were none.
        num_other_modes: the number of separate modes that the starts found and the fit leaves out.
        new_mode_probability: the probability that a further start would find a new mode.
        has_data: whether anything is observed.
        shares_at_edges: by site, the share of draws at which it lies at the edge of its support in floating-point
            numbers.
        unseen_by_prior: the share of the posterior that draws of the prior see and those of the flow do not; None where
            it is unknown.
        non_finite: the sites at which the log joint is not finite, in words such as ", at site 'y'".
        mismatch: sentences on the sites with the worst mismatch, and on what would help.
    """

    elbo_growth: float = 0.0
    modes: str | None = None
    num_other_modes: int = 0
    new_mode_probability: float = 0.0
    has_data: bool = True
    shares_at_edges: Mapping[str, float] = field(default_factory=dict)
    unseen_by_prior: Estimate | None = None
    non_finite: str = ""
    mismatch: tuple[str, ...] = ()

    @property
    def clamped(self) -> dict[str, float]:
        """The shares at edges that are too large."""
        return {name: share for name, share in self.shares_at_edges.items() if share > MAX_EDGE_SHARE}

    def misses_prior(self, share: float) -> bool:
        """Whether draws of the prior surely show that the flow misses more than a share of the posterior."""
        return self.unseen_by_prior is not None and self.unseen_by_prior.at(-SURELY_MISSED) > share

    @property
    def verdict(self) -> Verdict:
        """The best verdict that these facts allow."""
        if self.num_other_modes or self.clamped or self.misses_prior(MAX_CORRECTABLE_SHARE):
            return "do not use"
        is_open = (
            self.misses_prior(MAX_UNSEEN_SHARE)
            or self.elbo_growth > MAX_GROWTH
            or self.new_mode_probability > MAX_NEW_MODE_PROBABILITY
        )
        return "correct it" if is_open else "good"


@dataclass(frozen=True)
class Diagnosis:
    r"""A verdict on whether a flow posterior can be trusted, with its reasons and the figures behind them.

    Args:
        verdict: "good" if the draws can be used as they are; "correct it" if importance weights are needed, and can be
            trusted; "do not use" if the weights cannot be trusted either.
        reasons: sentences that explain the verdict and say what to do.
        khat: Pareto k-hat of the importance weights.
        khat_se: standard error of k-hat.
        khat_threshold: the threshold :math:`\min(1 - 1/\log_{10} S, 0.7)`, above which weights cannot be trusted
            (Vehtari et al. 2024, JMLR 25(72)), if what lies in their tail matters.
        unseen_share: the share of the posterior where weights are larger than those that the draws show, measured by
            draws that reach further; None if k-hat is clearly below its threshold, so that it was not measured, or if
            the flow's base cannot be stretched.
        ess: effective sample size of the weights, between 1 and S.
        num_samples: the number of draws S.
        log_weight_variance: variance of the log weights; about twice the KL divergence where it is small.
        mean_shift: the largest change of a mean under the weights, over the unconstrained components, in standard
            deviations of the draws.
        sd_ratio: the ratio of the standard deviation under the weights to that of the draws, for the unconstrained
            component where it is farthest from 1.
        num_non_finite: the number of draws at which the log joint is not finite.
        elbo_growth: the growth of the ELBO over the last tenth of the training, in nats; 0 if it is within noise.
        num_other_modes: the number of separate modes that the starts found and the fit leaves out.
        new_mode_probability: an estimate of the probability that a further start would find a new mode.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = pf.FlowVI(model, seed=0, progress_bar=False).run(torch.tensor(1.0))
        >>> diagnosis = posterior.diagnose()
        >>> diagnosis.verdict, diagnosis.reasons[-2]
        ('good', 'the draws can be used as they are')
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    khat: float
    khat_se: float
    khat_threshold: float
    unseen_share: float | None
    ess: float
    num_samples: int
    log_weight_variance: float
    mean_shift: float
    sd_ratio: float
    num_non_finite: int
    elbo_growth: float = 0.0
    num_other_modes: int = 0
    new_mode_probability: float = 0.0

    def __str__(self) -> str:
        return "\n".join([f"verdict: {self.verdict}", *(f"  - {reason}" for reason in self.reasons)])


def diagnose(figures: Figures, unseen: Unseen | None = None, facts: Facts | None = None) -> Diagnosis:
    """Judge a fit by the figures of its draws and by what else is known of it.

    Args:
        figures: the figures of the draws.
        unseen: the share of the posterior that the draws do not see; None where it is unknown.
        facts: what is known besides; None for nothing.
    """
    facts = facts or Facts()
    verdict = worst(figures.verdict(unseen), facts.verdict)
    reasons = [
        *_on_density(figures, facts),
        _on_tail(figures, unseen),
        *_on_moments(figures),
        *_on_search(facts),
        *facts.mismatch,
        _advice(verdict, figures.verdict_on_tail(unseen)),
        "none of this can see a mode that neither the flow nor a start visits: other seeds may",
    ]
    return Diagnosis(
        verdict=verdict,
        reasons=tuple(reasons),
        khat=figures.khat.value,
        khat_se=figures.khat.se,
        khat_threshold=figures.khat_threshold,
        unseen_share=None if unseen is None else unseen.share.value,
        ess=figures.ess,
        num_samples=figures.num_samples,
        log_weight_variance=figures.log_weight_variance.value,
        mean_shift=figures.mean_shift.value,
        sd_ratio=figures.sd_ratio.value,
        num_non_finite=figures.num_zero + figures.num_nan,
        elbo_growth=facts.elbo_growth,
        num_other_modes=facts.num_other_modes,
        new_mode_probability=facts.new_mode_probability,
    )


def _on_density(figures: Figures, facts: Facts) -> Iterator[str]:
    if not facts.has_data:
        yield "nothing is observed: this is the prior; is obs= or an argument missing?"
    if facts.num_other_modes:
        yield f"the fit leaves out {facts.num_other_modes} separate mode(s) that its starts found"
    if figures.num_nan:
        yield (
            f"the log joint is NaN or infinite at {figures.num_nan} of {figures.num_samples} draws{facts.non_finite}, "
            "which count as draws without density: its log-density must be a number wherever the latents can be"
        )
    if figures.num_zero:
        yield (
            f"the density is zero at {_percent(figures.num_zero / figures.num_samples)} of {figures.num_samples} draws"
            f"{facts.non_finite}: the weights leave them out"
        )
    if facts.unseen_by_prior is not None and facts.misses_prior(MAX_UNSEEN_SHARE):
        yield (
            f"draws of the prior show that about {_percent(facts.unseen_by_prior.value)} of the posterior lies where "
            "the flow has next to no draws"
        )
    for name, share in facts.clamped.items():
        yield (
            f"at {_percent(share)} of the draws site '{name}' lies at the edge of its support, where its dtype has no "
            "further numbers and its density is wrong: use dtype=torch.float64"
        )


def _on_tail(figures: Figures, unseen: Unseen | None) -> str:
    khat, threshold = figures.khat, f"the threshold {figures.khat_threshold:.2f} for {figures.num_samples} draws"
    text = f"k-hat of the importance weights is {khat.value:.2f} +- {khat.se:.2f}"
    if figures.khat_is_low:
        return f"{text}, below {threshold}"
    share = (
        "" if unseen is None else f"{100 * unseen.share.value:.2f} +- {100 * unseen.share.se:.2f} % of the posterior"
    )
    where = "" if unseen is None else f"where weights are larger than those that {unseen.num_draws} draws show"
    if figures.verdict_on_tail(unseen) == "good":
        return f"{share} lies {where}, as draws that reach further tell: the tail of the weights does not matter"
    is_above = khat.at(-CLEARLY_ABOVE) > figures.khat_threshold
    text += f", {'above' if is_above else 'too close to'} {threshold}"
    return text if unseen is None else f"{text}, and {share} lies {where}"


def _on_moments(figures: Figures) -> Iterator[str]:
    variance, shift, ratio = figures.log_weight_variance, figures.mean_shift, figures.sd_ratio
    yield (
        f"effective sample size {figures.ess:.0f} of {figures.num_samples}; variance of the log weights "
        f"{variance.value:.3f} +- {variance.se:.3f} (good: at most {MAX_LOG_WEIGHT_VARIANCE})"
    )
    yield (
        f"under the weights means move by at most {shift.value:.2f} +- {shift.se:.2f} sd, and the sd changes by at "
        f"most {100 * abs(ratio.value - 1):.0f} +- {100 * ratio.se:.0f} %"
    )
    if figures.moves_too_far(0.0):
        yield f"the weights move a mean by {shift.value:.1f} sd, to where the flow has few draws"
    if figures.is_too_narrow(0.0):
        yield (
            f"under the weights an sd grows {figures.widening.value:.1f} times: the flow is too narrow for them to be "
            "right"
        )


def _on_search(facts: Facts) -> Iterator[str]:
    if facts.elbo_growth > MAX_GROWTH:
        yield (
            f"the ELBO still grew by {facts.elbo_growth:.2f} nats over the last tenth of the training: give more steps"
        )
    if facts.modes is not None:
        yield facts.modes
    if facts.new_mode_probability > MAX_NEW_MODE_PROBABILITY:
        yield (
            f"the starts have not found all modes: a further one would find a new mode with a probability of about "
            f"{_percent(facts.new_mode_probability)}; fit with more num_starts"
        )


def _advice(verdict: Verdict, on_tail: Verdict) -> str:
    if verdict == "good":
        return "the draws can be used as they are"
    if verdict == "do not use":
        return (
            "use posterior.mcmc and look at its R-hat; or try more steps, another form of the model, or "
            "dtype=torch.float64"
        )
    if on_tail == "correct it":
        return "use posterior.importance_sample(num_samples) with more draws and look at its k-hat, or posterior.mcmc"
    return "use posterior.importance_sample(num_samples), whose weights are reliable here, or posterior.mcmc"


def _percent(share: float) -> str:
    return f"{100 * share:.{2 if share < 0.995 else 3}g} %"


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
        return replace(self, latents=latents, raw_log_weights=raw, weights=Weights.smoothed(raw))

    @cached_property
    def figures(self) -> Figures:
        """The figures of the draws."""
        return Figures.of(self.raw_log_weights, self.weights, self.latents)

    @cached_property
    def unseen(self) -> Unseen | None:
        """The share of the posterior that one batch does not see; None if k-hat is low, or it cannot be measured."""
        if self.figures.khat_is_low:
            return None
        with seeded(SEED_OF_REACH + self.seed):
            draws = ReachingDraws.drawn(self.law, self.log_joint, self.batch_size)
            if draws is None:
                return None
            unseen = draws.unseen(self.batch_size)
            if unseen.is_certain(CLEARLY_UNSEEN) or self.log_joint.batched.mode == "loop":
                return unseen
            more = ReachingDraws.drawn(self.law, self.log_joint, (NUM_BATCHES - 1) * self.batch_size)
        return unseen if more is None else draws.joined(more).unseen(self.batch_size)

    def diagnosis(self, flow: Flow, history: History, starts: Starts | None) -> Diagnosis:
        """Judge the flow by these draws, its training, and its starts where it had several."""
        facts = self._facts(flow, history, starts)
        diagnosis = diagnose(self.figures, self.unseen, facts)
        if diagnosis.verdict == "good":
            return diagnosis
        return diagnose(self.figures, self.unseen, replace(facts, mismatch=tuple(self._mismatch())))

    def _facts(self, flow: Flow, history: History, starts: Starts | None) -> Facts:
        facts = Facts(
            elbo_growth=elbo_growth(history),
            has_data=self.log_joint.structure.has_data,
            non_finite=self._non_finite_sites(),
            shares_at_edges=self.log_joint.shares_at_edges(self.latents),
            unseen_by_prior=self._unseen_by_prior(),
        )
        if starts is None:
            return facts
        # Modes that symmetries of the model map to each other may be too many to fit.
        num_modes = max(len(starts.modes), starts.num_equal)
        return replace(
            facts,
            modes=str(starts),
            num_other_modes=num_modes - len(flow.components),
            new_mode_probability=starts.new_mode_probability,
        )

    def _unseen_by_prior(self) -> Estimate | None:
        """The share of the posterior that draws of the prior see and those of the flow do not; None if unknown."""
        finite = self.raw_log_weights[self.raw_log_weights.isfinite()]
        if not len(finite):
            return None
        with seeded(SEED_OF_PRIOR + self.seed):
            draws = PriorDraws.drawn(self.law, self.log_joint)
        return None if draws is None else draws.unseen(finite.max().item(), self.weights.log_evidence)

    def _non_finite_sites(self) -> str:
        """Name the sites at which the log joint is not finite, in words."""
        bad = self.latents[~torch.isfinite(self.raw_log_weights)][:NUM_LOOKS]
        sites = self.log_joint.non_finite_sites(bad) if len(bad) else {}
        return f", at site {' and '.join(repr(name) for name in sites)}" if sites else ""

    def _mismatch(self) -> Iterator[str]:
        if len(self.raw_log_weights) - self.figures.num_zero - self.figures.num_nan < 2:
            return
        log_weights, weights = self.raw_log_weights.double(), self.weights.normalized.to(self.latents.device)
        sites = worst_sites(self.log_joint.layout, self.latents.double(), log_weights, weights)
        if sites:
            yield f"flow and posterior differ most at site {' and at site '.join(map(str, sites))}"
        yield from helpful_forms(self.log_joint, self.latents, log_weights, [site.name for site in sites])


@torch.no_grad()
def _weighted(law: Law, log_joint: LogJoint, num_samples: int) -> tuple[Tensor, Tensor]:
    """Draw from the law of a flow; the draws ``(S, dim)`` and their log weights ``(S,)``."""
    latents, log_q = law.rsample_and_log_prob((num_samples,))
    return latents, log_joint.in_chunks(latents) - log_q


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

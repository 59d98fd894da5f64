"""The verdict on a fit in words, and the facts behind it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pyroflows.inference.verdict.figures import (
    CLEARLY_ABOVE,
    MAX_CORRECTABLE_SHARE,
    MAX_LOG_WEIGHT_VARIANCE,
    MAX_UNSEEN_SHARE,
    Estimate,
    Figures,
    Unseen,
    Verdict,
    worst,
)

# A share that few draws of the prior show counts if it is larger than its limit by so many standard errors.
SURELY_MISSED = 3.0
MAX_EDGE_SHARE = 0.01
MAX_NEW_MODE_PROBABILITY = 0.06
# The log weights of draws with next to no density vary without bound, and these draws weigh nothing.
LARGE_VARIANCE, MANY_EFFECTIVE = 1e3, 0.1
HOPELESS = (
    "use posterior.mcmc and look at its R-hat; or try more steps, another form of the model, or dtype=torch.float64"
)
MAX_GROWTH = 0.05  # of the ELBO, in nats, over the last tenth of the training


@dataclass(frozen=True)
class Facts:
    """What is known of a fit besides the figures of its draws.

    Args:
        elbo_growth: the growth of the ELBO over the last tenth of the training, in nats.
        modes: a sentence on what the starts found; None where there were none.
        num_other_modes: the number of separate modes that the starts found and the fit leaves out.
        num_equal_modes: the number of modes of the fit that are the same but for exchanged components or signs.
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
    num_equal_modes: int = 1
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

    :meth:`pyroflows.Posterior.diagnose` returns it. Printed, it is the verdict and its reasons. Its figures are on the
    unconstrained space, where the flow is fitted.

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
        _limits(facts),
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
    is_of_few = variance.value > LARGE_VARIANCE and figures.ess > MANY_EFFECTIVE * figures.num_samples
    of_few = ", from draws with next to no density" if is_of_few else ""
    yield (
        f"effective sample size {figures.ess:.0f} of {figures.num_samples}; variance of the log weights "
        f"{variance.in_words(3)}{of_few} (good: at most {MAX_LOG_WEIGHT_VARIANCE})"
    )
    change = Estimate(100 * abs(ratio.value - 1), 100 * ratio.se)
    yield (
        f"under the weights means move by at most {shift.in_words(2)} sd, and the sd changes by at most "
        f"{change.in_words(0)} %"
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
    if facts.num_equal_modes > 1 and not facts.num_other_modes:
        yield (
            f"{facts.num_equal_modes} modes are the same but for exchanged components or signs: the mean and the "
            "quantiles of a single component average over them; to tell components apart, order them, or fix the "
            "signs, in the model"
        )
    if facts.new_mode_probability > MAX_NEW_MODE_PROBABILITY:
        yield (
            f"the starts have not found all modes: a further one would find a new mode with a probability of about "
            f"{_percent(facts.new_mode_probability)}; fit with more num_starts"
        )


def _advice(verdict: Verdict, on_tail: Verdict) -> str:
    if verdict == "good":
        return "the draws can be used as they are"
    if verdict == "do not use":
        return HOPELESS
    if on_tail == "correct it":
        return "use posterior.importance_sample(num_samples) with more draws and look at its k-hat, or posterior.mcmc"
    return "use posterior.importance_sample(num_samples), whose weights are reliable here, or posterior.mcmc"


def _limits(facts: Facts) -> str:
    ending = ", and no search for modes was made" if facts.modes is None else ": other seeds may"
    return f"none of this can see a mode that neither the flow nor a start visits{ending}"


def _percent(share: float) -> str:
    return f"{100 * share:.{2 if share < 0.995 else 3}g} %"

"""The verdict on a fit in words, and the figures and the draws behind it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyroflows.flows import Flow
from pyroflows.inference.arviz import pareto_k_threshold
from pyroflows.inference.starts import Starts
from pyroflows.inference.weights import Weights
from pyroflows.models.log_joint import LogJoint
from pyroflows.randomness import seeded
from pyroflows.training.history import History

Verdict = Literal["good", "correct it", "do not use"]

NUM_DIAGNOSTIC_SAMPLES = 10_000

MAX_LOG_WEIGHT_VARIANCE = 0.1
MAX_MEAN_SHIFT = 0.1
MAX_SD_CHANGE = 0.1
# Up to this variance of the log weights KL(q || p) is below a fortieth of a nat, and k-hat, an estimate from the small
# differences that are left, says little, unless a few large weights lower the effective sample size all the same.
NEARLY_EXACT, MIN_RELATIVE_ESS = 0.05, 0.95
# A Gaussian proposal that is narrower than its Gaussian target by this factor has weights of Pareto shape 0.7, which an
# estimate of k-hat from a few thousand draws may miss.
MAX_WIDENING = 0.3**-0.5
# If the weights move a mean by more standard deviations than this, they cannot be trusted to correct it.
MAX_CORRECTION = 1.0
MAX_GROWTH = 0.05  # of the ELBO, in nats, over the last tenth of the training
MIN_STEPS_OF_TREND = 100


@dataclass(frozen=True)
class Diagnosis:
    r"""A verdict on whether a flow posterior can be trusted, with its reasons and the figures behind them.

    Args:
        verdict: "good" if the draws can be used as they are; "correct it" if importance weights are needed, and can be
            trusted; "do not use" if the weights cannot be trusted either.
        reasons: sentences that explain the verdict and say what to do.
        khat: Pareto k-hat of the importance weights.
        khat_threshold: the threshold :math:`\min(1 - 1/\log_{10} S, 0.7)`, above which weights cannot be trusted
            (Vehtari et al. 2024, JMLR 25(72)).
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
    khat_threshold: float
    ess: float
    num_samples: int
    log_weight_variance: float
    mean_shift: float
    sd_ratio: float
    num_non_finite: int
    elbo_growth: float = 0.0
    num_other_modes: int = 0

    def __str__(self) -> str:
        return "\n".join([f"verdict: {self.verdict}", *(f"  - {reason}" for reason in self.reasons)])


def diagnose(
    raw_log_weights: Tensor,
    weights: Weights,
    latents: Tensor,
    history: History | None = None,
    modes: str | None = None,
    num_other_modes: int = 0,
) -> Diagnosis:
    """Judge a fit by its importance weights, its training and its starts.

    Args:
        raw_log_weights: the log weights of draws from the flow, ``(S,)``.
        weights: the same weights, smoothed.
        latents: the draws, unconstrained, ``(S, dim)``.
        history: the history of the training, which shows whether the ELBO still grows.
        modes: a sentence on what the starts found, which becomes one of the reasons.
        num_other_modes: the number of separate modes that the starts found and the fit does not cover.
    """
    finite = torch.isfinite(raw_log_weights)
    num_samples, num_bad = len(finite), int((~finite).sum())
    variance = raw_log_weights[finite].double().var().item()
    shift, ratio, widening = _moment_change(latents.double(), weights.normalized.to(latents.device))
    threshold = pareto_k_threshold(num_samples)
    growth = _elbo_growth(history)
    khat_is_high = weights.khat > threshold
    moved = shift > MAX_MEAN_SHIFT or abs(ratio - 1) > MAX_SD_CHANGE
    reasons = [
        f"k-hat of the importance weights is {weights.khat:.2f}, {'above' if khat_is_high else 'below'} the threshold "
        f"{threshold:.2f} for {num_samples} draws",
        f"effective sample size {weights.ess:.0f} of {num_samples}; variance of the log weights {variance:.3f} "
        f"(good: at most {MAX_LOG_WEIGHT_VARIANCE})",
        f"under the weights means move by at most {shift:.2f} sd, and the sd changes by at most {abs(ratio - 1):.0%}",
    ]
    is_close = variance <= MAX_LOG_WEIGHT_VARIANCE and not moved and growth <= MAX_GROWTH
    verdict: Verdict = "good" if is_close else "correct it"
    if growth > MAX_GROWTH:
        reasons.append(f"the ELBO still grew by {growth:.2f} nats over the last tenth of the training: give more steps")
    if modes is not None:
        reasons.append(modes)
    if khat_is_high and variance <= NEARLY_EXACT and weights.ess >= MIN_RELATIVE_ESS * num_samples:
        reasons.append("the flow is nearly exact, and its k-hat is fitted to next to nothing: it does not count")
    elif khat_is_high:
        verdict = "do not use"
    if shift > MAX_CORRECTION:
        verdict = "do not use"
        reasons.append(f"the weights move a mean by {shift:.1f} sd, to where the flow has few draws")
    if widening > MAX_WIDENING:
        verdict = "do not use"
        reasons.append(
            f"under the weights an sd grows {widening:.1f} times: the flow is too narrow for them to be right"
        )
    if num_other_modes:
        verdict = "do not use"
        reasons.insert(0, f"the fit leaves out {num_other_modes} separate mode(s) that its starts found")
    if num_bad:
        verdict = "do not use"
        reasons.insert(0, f"the log joint is not finite at {num_bad} of {num_samples} draws")
    reasons.append(_ADVICE[verdict])
    reasons.append("none of this can see a mode that neither the flow nor a start visits: other seeds may")
    return Diagnosis(
        verdict,
        tuple(reasons),
        weights.khat,
        threshold,
        weights.ess,
        num_samples,
        variance,
        shift,
        ratio,
        num_bad,
        growth,
        num_other_modes,
    )


_ADVICE: dict[Verdict, str] = {
    "good": "the draws can be used as they are",
    "correct it": "use posterior.importance_sample(num_samples), whose weights are reliable here, or posterior.mcmc",
    "do not use": "use posterior.mcmc and look at its R-hat; or try more steps, another form of the model, or "
    "dtype=torch.float64",
}


@dataclass(frozen=True)
class DiagnosticDraws:
    r"""The draws from a flow on which the figures and the verdict of a posterior rest.

    Args:
        latents: unconstrained draws ``(S, dim)``.
        raw_log_weights: their log weights :math:`\log p(x, y) - \log q(x)`, ``(S,)``.
        weights: the same weights, smoothed.
    """

    latents: Tensor
    raw_log_weights: Tensor
    weights: Weights

    @classmethod
    def drawn(cls, flow: Flow, log_joint: LogJoint, num_samples: int) -> "DiagnosticDraws":
        """Draw from a flow under a fixed seed, so that every call gives the same figures."""
        with seeded(0), torch.no_grad():
            latents, log_q = flow().rsample_and_log_prob((num_samples,))
            raw = log_joint.in_chunks(latents) - log_q
        return cls(latents, raw, Weights.smoothed(raw))

    def diagnosis(self, flow: Flow, history: History, starts: Starts | None) -> Diagnosis:
        """Judge the flow by these draws, its training, and its starts where it had several."""
        modes, num_other_modes = None, 0
        if starts is not None:
            modes, num_other_modes = str(starts), len(starts.modes) - len(flow.components)
        return diagnose(self.raw_log_weights, self.weights, self.latents, history, modes, num_other_modes)


def _elbo_growth(history: History | None) -> float:
    """By how much the mean ELBO of the last tenth of the steps exceeds that of the tenth before, or 0.

    The growth counts only if it is more than three standard errors.
    """
    if history is None or history.num_steps < MIN_STEPS_OF_TREND:
        return 0.0
    size = history.num_steps // 10
    last, before = history.recent("elbo", size), history.recent("elbo", 2 * size)[:-size]
    noise = math.sqrt((last.var() + before.var()) / size)
    growth = float(last.mean() - before.mean())
    return growth if growth > 3 * noise else 0.0


def _moment_change(latents: Tensor, weights: Tensor) -> tuple[float, float, float]:
    """Compare moments of the draws with and without weights.

    Returns:
        The largest move of a mean in standard deviations, the ratio of standard deviations that is farthest from 1, and
        the largest of these ratios.
    """
    mean, sd = latents.mean(0), latents.std(0)
    weighted_mean = weights @ latents
    weighted_sd = (weights @ (latents - weighted_mean) ** 2).sqrt()
    ratio = weighted_sd / sd
    shift = ((weighted_mean - mean).abs() / sd).max()
    return shift.item(), ratio[ratio.log().abs().argmax()].item(), ratio.max().item()

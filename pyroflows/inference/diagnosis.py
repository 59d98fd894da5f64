"""The verdict on a fit, in words, with the figures behind it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyroflows.inference.arviz import pareto_k_threshold
from pyroflows.inference.weights import Weights
from pyroflows.training.history import History

Verdict = Literal["good", "correct it", "do not use"]

MAX_LOG_WEIGHT_VARIANCE = 0.1
MAX_MEAN_SHIFT = 0.1
MAX_SD_CHANGE = 0.1
# Up to this variance q is p to a KL of a fortieth of a nat, and k-hat, fitted to what is left, says little: unless a
# few weights are so large that they lower the effective sample size all the same.
NEARLY_EXACT, MIN_RELATIVE_ESS = 0.05, 0.95
# Between Gaussians the weights of a proposal that is narrower by this factor have a Pareto shape of 0.7, which k-hat
# from a few thousand draws may miss.
MAX_WIDENING = 0.3**-0.5
# In sds: what means may move for the weights to be trusted with it.
MAX_CORRECTION = 1.0
MAX_GROWTH = 0.05  # nats, of the ELBO in the last tenth of the training
MIN_STEPS_OF_TREND = 100


@dataclass(frozen=True)
class Diagnosis:
    r"""Whether a flow posterior can be trusted, and why.

    Args:
        verdict: "good": use the draws; "correct it": use ``importance_sample``; "do not use": its weights cannot be
            trusted either.
        reasons: sentences.
        khat: Pareto k-hat of the importance weights.
        khat_threshold: what it should stay below, :math:`\min(1 - 1/\log_{10} S, 0.7)` (Vehtari et al. 2024).
        ess: effective sample size of the weights.
        num_samples: number of draws S.
        log_weight_variance: variance of the log weights; about twice the KL divergence where it is small.
        mean_shift: largest change of a mean under the weights, in standard deviations, over the unconstrained
            components.
        sd_ratio: the standard deviation under the weights over that of the draws, of the component where it is farthest
            from 1.
        num_non_finite: draws whose log joint was not finite.
        elbo_growth: of the ELBO over the last tenth of the training, in nats, where it is more than its noise; else 0.
        num_other_modes: separate modes that the starts found and the fit leaves out.
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
    """The verdict on a fit.

    Args:
        raw_log_weights: of draws, ``(S,)``.
        weights: their smoothed version.
        latents: the unconstrained draws, ``(S, dim)``.
        history: of the training, for the trend of the ELBO.
        modes: what the starts found, in words.
        num_other_modes: how many separate modes they found besides those that the fit covers.
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


def _elbo_growth(history: History | None) -> float:
    """Of its mean from the last but one to the last tenth of the steps, if more than three standard errors."""
    if history is None or history.num_steps < MIN_STEPS_OF_TREND:
        return 0.0
    size = history.num_steps // 10
    last, before = history.recent("elbo", size), history.recent("elbo", 2 * size)[:-size]
    noise = math.sqrt((last.var() + before.var()) / size)
    growth = float(last.mean() - before.mean())
    return growth if growth > 3 * noise else 0.0


def _moment_change(latents: Tensor, weights: Tensor) -> tuple[float, float, float]:
    """Largest move of a mean in sds, the most extreme and the largest ratio of sds, under the weights."""
    mean, sd = latents.mean(0), latents.std(0)
    weighted_mean = weights @ latents
    weighted_sd = (weights @ (latents - weighted_mean) ** 2).sqrt()
    ratio = weighted_sd / sd
    shift = ((weighted_mean - mean).abs() / sd).max()
    return shift.item(), ratio[ratio.log().abs().argmax()].item(), ratio.max().item()

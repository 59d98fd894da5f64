"""What the draws from a flow show of its posterior: figures with their errors, and the verdict on the draws alone."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyroflows.inference.arviz import pareto_k_threshold
from pyroflows.inference.weights import Weights

Verdict = Literal["good", "correct it", "do not use"]
VERDICTS: tuple[Verdict, ...] = ("good", "correct it", "do not use")

MAX_LOG_WEIGHT_VARIANCE = 0.1
MAX_MEAN_SHIFT = 0.1
MAX_SD_CHANGE = 0.1
# A Gaussian proposal that is narrower than its Gaussian target by this factor has weights of Pareto shape 0.7, which an
# estimate of k-hat from a few thousand draws may miss.
MAX_WIDENING = 0.3**-0.5
# If the weights move a mean by more standard deviations than this, they cannot be trusted to correct it.
MAX_CORRECTION = 1.0
# k-hat is clearly above its threshold by two standard errors. It is clearly below by four, and where it is not, the
# share of the posterior that the draws do not see is measured.
CLEARLY_ABOVE, CLEARLY_BELOW = 2.0, 4.0
# Draws do not see what lies some five standard deviations away. A share of this size there changes an sd by about a
# twentieth, so that a smaller one does not matter, whatever k-hat is.
MAX_UNSEEN_SHARE = 0.005
# A few large weights can make a share large. It counts if it is above the limit by so many standard errors, or above so
# many times the limit: an estimate that is too coarse to tell does not show that the share is small.
CLEARLY_UNSEEN, MAX_EXCESS = 2.0, 2.0
# The Gaussian proposal of Pareto shape 0.7 leaves 3 % unseen by 10,000 draws.
MAX_CORRECTABLE_SHARE = 0.03
MAX_NAN_SHARE = 0.01
# A few far draws can move a moment by more than its limit. It counts as moved if it is beyond the limit by this many
# standard errors.
SURELY = 1.0


class Estimate(NamedTuple):
    """An estimate with its standard error.

    Args:
        value: the estimate.
        se: its standard error.

    Example:
        >>> Estimate(0.5, 0.25).at(-2)
        0.0
    """

    value: float
    se: float

    def at(self, errors: float) -> float:
        """The value that lies so many standard errors above the estimate."""
        return self.value + errors * self.se

    def in_words(self, digits: int) -> str:
        """The estimate with its error, to so many digits after the point; to fewer where the error is large.

        Example:
            >>> Estimate(0.5, 0.25).in_words(3), Estimate(10310636425.381, 7311857651.964).in_words(3)
            ('0.500 +- 0.250', '1.03e+10 +- 7.31e+09')
        """
        form = f".{digits}f" if self.se < 10 else ".0f" if self.se < 1e4 else ".3g"
        return f"{self.value:{form}} +- {self.se:{form}}"


class Unseen(NamedTuple):
    """The share of the posterior that draws from a flow do not see.

    Args:
        share: the share that lies where weights are larger than those that the draws show.
        num_draws: the number of draws.
    """

    share: Estimate
    num_draws: int

    @property
    def is_small(self) -> bool:
        """Whether the share does not matter, as far as it is known."""
        limit = min(MAX_UNSEEN_SHARE + CLEARLY_UNSEEN * self.share.se, MAX_EXCESS * MAX_UNSEEN_SHARE)
        return self.share.value <= limit

    def is_certain(self, errors: float, may_be_good: bool) -> bool:
        """Whether the limits of the verdict lie at least so many standard errors away.

        Args:
            errors: the number of standard errors.
            may_be_good: whether the verdict could be "good"; otherwise the limit of that does not matter.
        """
        limits = (MAX_UNSEEN_SHARE, MAX_CORRECTABLE_SHARE) if may_be_good else (MAX_CORRECTABLE_SHARE,)
        return all(abs(self.share.value - limit) > errors * self.share.se for limit in limits)


@dataclass(frozen=True)
class Figures:
    """What the draws from a flow and their log weights show.

    Args:
        num_samples: the number of draws S.
        khat: Pareto k-hat of the importance weights.
        ess: effective sample size of the weights.
        log_weight_variance: variance of the log weights.
        mean_shift: the largest change of a mean under the weights, in standard deviations of the draws.
        sd_ratio: the sd under the weights over that of the draws, where it is farthest from 1.
        widening: the largest of these ratios.
        num_zero: the number of draws at which the log joint is -inf.
        num_nan: the number of draws at which it is NaN or +inf.
    """

    num_samples: int
    khat: Estimate
    ess: float
    log_weight_variance: Estimate
    mean_shift: Estimate
    sd_ratio: Estimate
    widening: Estimate
    num_zero: int
    num_nan: int

    @classmethod
    def of(cls, raw_log_weights: Tensor, weights: Weights, latents: Tensor) -> "Figures":
        """Compute them from log weights ``(S,)``, the same smoothed, and draws ``(S, dim)``."""
        raw = raw_log_weights.double()
        num_zero = int(torch.isneginf(raw).sum())
        finite = raw[torch.isfinite(raw)]
        squares = (finite - finite.mean()) ** 2
        error = ((squares - squares.mean()) ** 2).mean().sqrt() / len(finite) ** 0.5
        variance = Estimate(squares.mean().item(), error.item())
        moments = _moment_change(latents.double(), weights.normalized.to(latents.device))
        num_nan = len(raw) - len(finite) - num_zero
        khat = Estimate(weights.khat, weights.khat_se)
        return cls(len(raw), khat, weights.ess, variance, *moments, num_zero, num_nan)

    @property
    def khat_threshold(self) -> float:
        """The threshold above which weights cannot be trusted."""
        return pareto_k_threshold(self.num_samples)

    @property
    def khat_is_low(self) -> bool:
        """Whether k-hat is clearly below its threshold, so that the draws see all that matters."""
        return self.khat.at(CLEARLY_BELOW) < self.khat_threshold

    def verdict(self, unseen: Unseen | None, errors: float = 0.0) -> Verdict:
        """The verdict on the draws alone.

        Args:
            unseen: the share of the posterior that they do not see; None where it is unknown.
            errors: by how many standard errors each figure is taken to be worse than its estimate.
        """
        return worst(self.verdict_on_moments(errors), self.verdict_on_tail(unseen, errors))

    def verdict_on_moments(self, errors: float = 0.0) -> Verdict:
        """The verdict that weights and moments allow at best, whatever their tail is."""
        is_hopeless = self.moves_too_far(errors) or self.is_too_narrow(errors)
        if is_hopeless or self.num_nan > MAX_NAN_SHARE * self.num_samples:
            return "do not use"
        change = Estimate(abs(self.sd_ratio.value - 1), self.sd_ratio.se)
        # A figure that is NaN is not within its limit.
        is_close = (
            self.log_weight_variance.at(errors) <= MAX_LOG_WEIGHT_VARIANCE
            and self.mean_shift.at(errors - SURELY) <= MAX_MEAN_SHIFT
            and change.at(errors - SURELY) <= MAX_SD_CHANGE
            and self.num_nan + self.num_zero == 0
        )
        return "good" if is_close else "correct it"

    def verdict_on_tail(self, unseen: Unseen | None, errors: float = 0.0) -> Verdict:
        """The verdict that the tail of the weights allows at best, by k-hat and by what the draws do not see."""
        if self.khat_is_low or (unseen is not None and unseen.is_small):
            return "good"
        is_far = unseen is not None and unseen.share.value > MAX_CORRECTABLE_SHARE
        is_high = self.khat.at(errors - CLEARLY_ABOVE) > self.khat_threshold
        return "do not use" if is_far or is_high else "correct it"

    def moves_too_far(self, errors: float) -> bool:
        """Whether the weights move a mean too far to be trusted."""
        return self.mean_shift.at(errors) > MAX_CORRECTION

    def is_too_narrow(self, errors: float) -> bool:
        """Whether the weights widen a standard deviation too much to be trusted."""
        return self.widening.at(errors) > MAX_WIDENING


def worst(*verdicts: Verdict) -> Verdict:
    """Return the worst of verdicts."""
    return max(verdicts, key=VERDICTS.index)


def _moment_change(latents: Tensor, weights: Tensor) -> tuple[Estimate, Estimate, Estimate]:
    """Compare moments of draws ``(S, dim)`` with and without weights ``(S,)``, which sum to one.

    Returns:
        The largest move of a mean in standard deviations, the ratio of standard deviations that is farthest from 1, and
        the largest of these ratios. Their errors are those of the differences, since the draws are the same.
    """
    z = (latents - latents.mean(0)) / latents.std(0)
    excess = (weights - 1 / len(weights))[:, None]
    shift = weights @ z
    ratio = (weights @ (z - shift) ** 2).sqrt()
    shift_se = ((excess * z) ** 2).sum(0).sqrt()
    # By the delta method: a change of the square changes the root by half as much over the root.
    ratio_se = ((excess * z**2) ** 2).sum(0).sqrt() / (2 * ratio)

    def at(values: Tensor, errors: Tensor, place: Tensor) -> Estimate:
        return Estimate(values[place].item(), errors[place].item())

    return (
        at(shift.abs(), shift_se, shift.abs().argmax()),
        at(ratio, ratio_se, ratio.log().abs().argmax()),
        at(ratio, ratio_se, ratio.argmax()),
    )

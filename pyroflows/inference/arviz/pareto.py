"""Pareto-smoothed importance sampling, and how far its estimates can be trusted."""

import math

import numpy as np

from . import generations

# Of fewer weights less than six belong to the tail, to which ArviZ 1.x fits nothing.
MIN_WEIGHTS = 30
# Log weights that differ by less count as equal: float32 rounds a log-density of 1e4 as coarsely, and changes of a
# weight by a thousandth do not matter to an estimate, whatever their tail is.
EQUAL = 1e-3


def pareto_smoothed(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    r"""Smooth log weights by a Pareto tail, and give :math:`\hat k`, the tail index of the weights.

    A generalised Pareto distribution F is fitted to the M largest of S weights, about :math:`\min(S/5, 3\sqrt S)`.
    Its quantiles :math:`F^{-1}((i - 1/2) / M)`, cut off at the largest raw weight, replace them (Vehtari et al. 2024,
    JMLR 25(72)). :math:`\hat k` above :func:`pareto_k_threshold` says that the estimates cannot be trusted.

    The fit is ArviZ's; three things differ from it:

    - the weights are not normalised, since their mean is the evidence: the weights below the tail stay as they are;
    - a tail of equal weights (an exact flow; bounded weights) is no tail: :math:`\hat k = 0` and nothing changes,
      where ArviZ reports infinity or an error;
    - zero weights (-inf) stay zero and are left out of S: only the others tell the tail.

    Args:
        log_weights: log p - log q, ``(S,)``.

    Returns:
        The smoothed log weights in float64, ``(S,)``, and :math:`\hat k`. If fewer than 30 weights are not zero, or too
        many of the largest are tied, nothing can be fitted: :math:`\hat k` is infinite, and the weights are unchanged.

    Raises:
        ValueError: for weights that are NaN or +inf.

    Examples:
        >>> log_weights = np.random.default_rng(0).normal(loc=-100, size=4000)   # log-normal, mean exp(-99.5)
        >>> smoothed, khat = pareto_smoothed(log_weights)
        >>> bool(khat < pareto_k_threshold(4000))
        True
        >>> print(f"{np.logaddexp.reduce(smoothed) - np.log(4000):.1f}")
        -99.5
    """
    log_weights = np.array(log_weights, dtype=np.float64)
    if log_weights.ndim != 1:
        raise ValueError(f"log weights must have shape (S,), one a draw, not {log_weights.shape}")
    if bad := np.count_nonzero(np.isnan(log_weights) | np.isposinf(log_weights)):
        raise ValueError(
            f"{bad} of {log_weights.size} log weights are NaN or +inf: the log joint or the proposal's log-density is "
            "not finite at these draws; correct it there (a draw outside the support has log weight -inf)"
        )
    positive = np.isfinite(log_weights)
    log_weights[positive], khat = _smoothed_finite(log_weights[positive])
    return log_weights, khat


def pareto_smoothed_rows(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Smooth each row of log weights, as :func:`pareto_smoothed` does, and give all :math:`\hat k`.

    Args:
        log_weights: log p - log q, ``(R, S)``.

    Returns:
        The smoothed log weights in float64, ``(R, S)``, and :math:`\hat k`, ``(R,)``.

    Raises:
        ValueError: for weights that are NaN or +inf.

    Examples:
        >>> log_weights = np.random.default_rng(0).normal(size=(3, 1000))
        >>> smoothed, khat = pareto_smoothed_rows(log_weights)
        >>> bool(khat[1] == pareto_smoothed(log_weights[1])[1])
        True
    """
    smoothed, khat = np.array(log_weights, dtype=np.float64), np.full(len(log_weights), np.nan)
    num_tail = _tail_size(smoothed.shape[1]) + 1
    # ArviZ smooths many rows in a third of the time that as many calls take.
    if smoothed.shape[1] >= MIN_WEIGHTS:
        spread = np.ptp(_largest(smoothed, num_tail), axis=1)
        plain = np.flatnonzero(np.isfinite(smoothed).all(1) & (spread > EQUAL))
        with np.errstate(all="ignore"):
            found, khat[plain] = generations.installed().psislw(smoothed[plain])
        found += np.median(smoothed[plain] - found, axis=1, keepdims=True)
        is_fitted = np.isfinite(khat[plain]) & np.isfinite(found).all(1)
        smoothed[plain[is_fitted]] = found[is_fitted]
        khat[plain[~is_fitted]] = np.nan
    for row in np.flatnonzero(np.isnan(khat)):
        smoothed[row], khat[row] = pareto_smoothed(smoothed[row])
    return smoothed, khat


def pareto_k_threshold(num_samples: int) -> float:
    r"""The largest :math:`\hat k` with which an estimate from S weights can be trusted.

    .. math:: \min(1 - 1 / \log_{10} S,\ 0.7)

    (Vehtari et al. 2024, JMLR 25(72)). From one draw nothing can be trusted: -inf.

    Examples:
        >>> pareto_k_threshold(100), pareto_k_threshold(10_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(num_samples), 0.7) if num_samples > 1 else -math.inf


def pareto_k_se(khat: float, num_weights: int) -> float:
    r"""The asymptotic standard error of :math:`\hat k` as fitted to S weights, which are not zero.

    .. math:: (1 + k) / \sqrt M, \quad k > -1/2

    with the M weights of the tail (Smith 1987, Annals of Statistics 15(3)). Below -1/2, where the estimate converges
    faster, it is the value at -1/2. It is 0 where there was no tail to fit, or none that could be fitted.

    Examples:
        >>> round(pareto_k_se(0.5, 10_000), 3)
        0.087
    """
    if khat == 0 or not math.isfinite(khat):
        return 0.0
    return (1 + max(khat, -0.5)) / math.sqrt(_tail_size(num_weights))


def _smoothed_finite(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    size = log_weights.size
    # If there are too few weights for a tail, all of them must be equal to count as without one.
    num_tail = _tail_size(size) if size >= MIN_WEIGHTS else size
    # The fit starts at the largest weight below the tail, which is hence compared too.
    if size > 1 and np.ptp(_largest(log_weights, min(num_tail + 1, size))) <= EQUAL:
        return log_weights, 0.0
    if size < MIN_WEIGHTS:
        return log_weights, math.inf
    # Ties, or one weight that exceeds the others by more than float64's range, make the fit divide by zero: NaN below.
    with np.errstate(all="ignore"):
        smoothed, khat = generations.installed().psislw(log_weights)
    if not (np.isfinite(khat) and np.isfinite(smoothed).all()):
        return log_weights, math.inf
    # ArviZ normalises the weights. Most are below the tail and otherwise unchanged, so the median change undoes that.
    return smoothed + np.median(log_weights - smoothed), float(khat)


def _tail_size(num_weights: int) -> int:
    return math.ceil(min(num_weights / 5, 3 * math.sqrt(num_weights)))


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    return np.partition(values, values.shape[-1] - count)[..., -count:]

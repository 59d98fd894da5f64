"""Tests of uniform ranks: shift, spread, Kolmogorov-Smirnov and chi-square, and what holds of all of them together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

# Every bin of the chi-square test expects at least this many ranks, and there are at most MAX_BINS.
MIN_EXPECTED, MAX_BINS = 5, 20


@dataclass(frozen=True)
class Test:
    """A test of one quantity.

    Args:
        quantity: the name of the quantity, such as ``"theta[0]"``.
        kind: "shift", "spread" or "shape".
        p_value: the chance of ranks that are as unlike uniform ones as these, if the fit is exact.
        weight: the share of the false alarms that the test may cause, relative to the other tests.
    """

    quantity: str
    kind: str
    p_value: float
    weight: float


def scores(levels: np.ndarray) -> np.ndarray:
    r"""Normal scores :math:`z = \Phi^{-1}(u)` of levels u between 0 and 1; standard normal if u is uniform.

    Where a posterior and its fit are Gaussian, z is the distance of the true value from the mean of the fit in units of
    its standard deviation.
    """
    return stats.norm.ppf(levels)


def shift_p(z: np.ndarray) -> np.ndarray:
    r"""Test normal scores ``(N, ...)`` for a mean of zero by :math:`\sqrt N\,\bar z`, which is standard normal."""
    return 2 * stats.norm.sf(abs(z.mean(0)) * len(z) ** 0.5)


def spread_p(z: np.ndarray) -> np.ndarray:
    r"""Test normal scores ``(N, ...)`` for a variance of one by :math:`\sum_n (z_n - \bar z)^2 \sim \chi^2_{N-1}`.

    With :func:`shift_p` it is a smooth test of order 2 (Neyman 1937), with the Hermite instead of the Legendre
    polynomials. Errors of location and scale of a Gaussian are seen with the full power that the data allow: those of
    Legendre lose 5 % of the data sets for a shift, and a quarter for a spread.
    """
    total, degrees = len(z) * z.var(0), len(z) - 1
    tails = stats.chi2.cdf(total, degrees), stats.chi2.sf(total, degrees)
    return np.minimum(1.0, 2 * np.minimum(*tails))


def pooled_shift_p(z: np.ndarray) -> float:
    """Test whether normal scores ``(N, C)`` of several components are shifted together, by Student's t of their means.

    The components of one data set depend on one another, and the data sets do not.
    """
    return float(stats.ttest_1samp(z.mean(1), 0.0).pvalue)


def pooled_spread_p(z: np.ndarray) -> float:
    r"""Test whether normal scores ``(N, C)`` of several components are too narrow or too wide together.

    This is Student's t of the mean of :math:`|z|^{2/3}`, a power of a squared normal variable that is nearly normal
    itself (Wilson and Hilferty 1931), against its known mean :math:`2^{1/3}\,\Gamma(5/6) / \Gamma(1/2)`.
    """
    expected = 2 ** (1 / 3) * special.gamma(5 / 6) / special.gamma(1 / 2)
    return float(stats.ttest_1samp((abs(z) ** (2 / 3)).mean(1), expected).pvalue)


def kolmogorov_p(levels: np.ndarray) -> np.ndarray:
    """Compare the distribution of levels ``(N, C)`` with the uniform one, for each column, by Kolmogorov's distance."""
    return np.array([stats.kstest(column, "uniform").pvalue for column in levels.T])


def chi_square_p(levels: np.ndarray) -> np.ndarray:
    """Compare a histogram of levels ``(N, C)`` with a flat one, for each column (Talts et al. 2018)."""
    num_bins = int(np.clip(len(levels) // MIN_EXPECTED, 2, MAX_BINS))
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    return np.array([stats.chisquare(np.histogram(column, edges)[0]).pvalue for column in levels.T])


def adjusted(tests: Sequence[Test]) -> np.ndarray:
    r"""Adjust the p-values of several tests, so that with exact fits none is below :math:`\alpha` with
    probability :math:`1 - \alpha` or more, however the tests depend on one another.

    This is Holm's procedure (1979) with weights: sorted by :math:`p_i / w_i`, each ratio is multiplied by the sum of
    the weights from there on, and made no smaller than those before it.

    Example:
        >>> adjusted([Test("x", "shift", 0.01, 1.0), Test("x", "spread", 0.04, 1.0)]).tolist()
        [0.02, 0.04]
    """
    weights = np.array([test.weight for test in tests])
    ratios = np.array([test.p_value for test in tests]) / weights
    order = np.argsort(ratios)
    remaining = weights[order][::-1].cumsum()[::-1]
    result = np.empty(len(tests))
    result[order] = np.minimum(1.0, np.maximum.accumulate(ratios[order] * remaining))
    return result

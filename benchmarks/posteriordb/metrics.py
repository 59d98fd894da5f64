"""How far draws are from reference draws, by their worst scalar component."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

LEVELS = (0.05, 0.5, 0.95)
# Of a normal distribution: the width from its 5 to its 95 % quantile, in standard deviations.
WIDTH = 3.29
MAX_MEAN_ERROR = 0.1
MAX_SD_CHANGE = 0.1


@dataclass(frozen=True)
class Accuracy:
    """The worst over all scalar components.

    Args:
        mean_error: of ``abs(mean - reference mean) / reference sd``; for components compared by quantiles, of the
            distances of the logarithms' 5, 50 and 95 % quantiles, in units of the reference's 5-95 % width / 3.29,
            which is the sd of a normal distribution.
        sd_ratio: sd / reference sd, the one farthest from 1; for components compared by quantiles, of 5-95 % widths.
    """

    mean_error: float
    sd_ratio: float

    @property
    def is_close(self) -> bool:
        return self.mean_error <= MAX_MEAN_ERROR and abs(self.sd_ratio - 1) <= MAX_SD_CHANGE


def accuracy(
    draws: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    by_quantiles: Collection[str] = (),
    weights: np.ndarray | None = None,
) -> Accuracy:
    """Of draws ``(S, *shape)`` of all the reference's parameters, with weights ``(S,)`` that sum to one, or equal ones.

    Other sites are left out.
    """
    errors, ratios = [], []
    for name in reference:
        x, ref = (a[name].reshape(len(a[name]), -1).astype(np.float64) for a in (draws, reference))
        if name in by_quantiles:
            # Of the logarithm: the upper quantile of a heavy tail is known too badly to compare with.
            q, q_ref = _quantiles(np.log(x), weights), _quantiles(np.log(ref))
            width = q_ref[-1] - q_ref[0]
            errors.append((np.abs(q - q_ref) / width * WIDTH).max())
            ratios.append((q[-1] - q[0]) / width)
        else:
            mean = np.average(x, 0, weights)
            sd = np.average((x - mean) ** 2, 0, weights) ** 0.5
            errors.append((np.abs(mean - ref.mean(0)) / ref.std(0)).max())
            ratios.append(sd / ref.std(0))
    ratio = np.concatenate(ratios)
    with np.errstate(divide="ignore"):
        worst = ratio[np.abs(np.log(ratio)).argmax()]
    return Accuracy(float(np.max(errors)), float(worst))


def _quantiles(x: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Of the columns of ``(S, D)``, at each of the levels: ``(levels, D)``."""
    if weights is None:
        return np.quantile(x, LEVELS, axis=0)
    order = x.argsort(0)
    below = weights[order].cumsum(0)
    return np.stack(
        [np.take_along_axis(x, order[(below < level).sum(0)[None], range(x.shape[1])], 0)[0] for level in LEVELS]
    )

"""Statistics and pictures of draws: R-hat, effective sample sizes, intervals, bands, marginals and pairs."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import generations
from .data import to_arviz_data


def rhat(draws: np.ndarray) -> np.ndarray:
    r"""Compute the rank-normalised split :math:`\hat R` of each component (Vehtari et al. 2021, arXiv:1903.08008).

    It compares the halves of a single chain. It is infinite if every chain stays at one value, and these differ; it is
    NaN if all draws are equal, or some are not finite.

    Args:
        draws: draws ``(chain, draw, ...)``, at least 4 of each chain.

    Examples:
        >>> draws = np.random.default_rng(0).normal(size=(4, 250, 3))
        >>> rhat(draws).shape, bool((rhat(draws) < 1.05).all())
        ((3,), True)
    """
    # ArviZ refuses a single chain, although it would compare its halves.
    if len(draws) == 1:
        half = draws.shape[1] // 2
        draws = np.concatenate([draws[:, :half], draws[:, -half:]])
    return _by_component(generations.installed().rhat, draws)


def ess(draws: np.ndarray, method: str = "bulk") -> np.ndarray:
    """Compute the effective sample size of each component, over all chains (Vehtari et al. 2021, arXiv:1903.08008).

    Args:
        draws: draws ``(chain, draw, ...)``, at least 4 of each chain.
        method: "bulk" for that of the ranks, "mean" for that of the values.

    Examples:
        >>> draws = np.random.default_rng(0).normal(size=(4, 250, 3))
        >>> bool((ess(draws) > 500).all())
        True
    """
    return _by_component(lambda component: generations.installed().ess(component, method), draws)


def hdi(values: np.ndarray, prob: float) -> tuple[float, float]:
    """The ends of the highest-density interval of draws ``(S,)``, the shortest one that holds a share of them.

    Args:
        values: the draws.
        prob: the share.

    Examples:
        >>> hdi(np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0]), 0.5)
        (8.0, 9.5)
    """
    low, high = generations.installed().hdi(values, prob)
    return float(low), float(high)


def plot_components(components: Mapping[str, np.ndarray], title: str | None = None, **kwargs: Any) -> Any:
    """Plot marginals and pairs of components by ArviZ's ``plot_pair``, or one marginal by its ``plot_dist``.

    Args:
        components: draws ``(S,)`` by the name that the picture shows, at most six.
        title: the title; None for none.
        kwargs: further options of the function of the installed ArviZ.

    Returns:
        A matplotlib figure (0.x) or ArviZ's ``PlotMatrix`` or ``PlotCollection`` (1.x); all have ``savefig``.
    """
    backend = generations.installed()
    # ArviZ 1.x refuses a slash in a name; this one looks the same.
    draws = {name.replace("/", "\u2215"): values[None] for name, values in components.items()}
    data = to_arviz_data({"posterior": draws})
    if len(components) == 1:
        return backend.plot_dist(data, title=title, **kwargs)
    return backend.plot_pair(data, title=title, num_components=len(components), **kwargs)


def ecdf_band(num: int, points: np.ndarray, prob: float) -> tuple[np.ndarray, np.ndarray]:
    """The band that holds the empirical distribution of N uniform numbers at all points at once.

    The band is ArviZ's, found by simulation (Säilynoja et al. 2022, arXiv:2103.10522).

    Args:
        num: the number N.
        points: points between 0 and 1.
        prob: the probability.

    Examples:
        >>> low, high = ecdf_band(100, np.array([0.25, 0.5, 0.75]), 0.95)
        >>> bool((low < 0.5).any() and high[1] < 0.7)
        True
    """
    return generations.installed().ecdf_band(num, points, prob)


def _by_component(function: Callable[[np.ndarray], Any], draws: np.ndarray) -> np.ndarray:
    components = draws.reshape(*draws.shape[:2], -1)
    # Chains that stand still divide by zero.
    with np.errstate(all="ignore"):
        values = [float(function(components[..., i])) for i in range(components.shape[-1])]
    return np.array(values).reshape(draws.shape[2:])

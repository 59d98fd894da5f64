"""What is used of ArviZ, with one signature for both generations: 0.x, and 1.x of several packages.

ArviZ is imported where it is first used: importing 0.x takes seconds.
"""

import importlib.metadata
import textwrap
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from arviz import InferenceData
    from xarray import Dataset, DataTree

LABEL_WIDTH = 16  # characters in a line of an axis label
BAND_TRIALS = 1000  # simulated distributions for a band around them


class Generation(NamedTuple):
    """The functions of ArviZ that are used, with the same signatures for both generations."""

    dataset: Callable[..., "Dataset"]
    container: Callable[[dict[str, "Dataset"]], Any]
    psislw: Callable[[np.ndarray], tuple[np.ndarray, Any]]
    rhat: Callable[[np.ndarray], Any]
    ess: Callable[[np.ndarray, str], Any]
    hdi: Callable[[np.ndarray, float], np.ndarray]
    plot_pair: Callable[..., Any]
    plot_dist: Callable[..., Any]
    ecdf_band: Callable[[int, np.ndarray, float], tuple[np.ndarray, np.ndarray]]
    allows_slashes: bool


@cache
def installed() -> Generation:
    """The functions of the ArviZ that is installed.

    Raises:
        ImportError: if there is none.
    """
    try:
        generation = int(importlib.metadata.version("arviz").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        # ArviZ 1.x is three packages, and the two that compute can be installed without the one named arviz.
        generation = 1
    try:
        return arviz_0() if generation == 0 else arviz_1()
    except ImportError as error:
        raise ImportError(f"ArviZ cannot be imported ({error}); install it with: pip install arviz") from error


def arviz_0() -> Generation:
    """The functions of ArviZ 0.x."""
    with warnings.catch_warnings():
        # The import warns of ArviZ 1, about which a user of pyroflows has nothing to do.
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        import arviz

    def dataset(arrays: dict[str, np.ndarray], sample_dims: list[str], **options: Any) -> "Dataset":
        with warnings.catch_warnings():
            # ArviZ warns that the axes may be swapped, which here they never are.
            warnings.filterwarnings("ignore", "More chains", UserWarning)
            return arviz.dict_to_dataset(arrays, default_dims=sample_dims, **options)

    def hdi(values: np.ndarray, prob: float) -> np.ndarray:
        return arviz.hdi(values, hdi_prob=prob)

    def plot_pair(data: "InferenceData", title: str | None, **options: Any) -> Any:
        size = (2.2 * options.pop("num_components"),) * 2
        # Faint points, since thousands of them overlap.
        look = {"kind": "scatter", "marginals": True, "figsize": size, "textsize": 11, "scatter_kwargs": {"alpha": 0.2}}
        axes = quietly(arviz.plot_pair, data, **{**look, **options})
        return finished(axes.flat[0].figure, title)

    def plot_dist(data: "InferenceData", title: str | None, **options: Any) -> Any:
        import matplotlib.pyplot as plt

        ((name, values),) = data["posterior"].data_vars.items()
        _, axis = plt.subplots(figsize=options.pop("figsize", (4.0, 3.0)))
        quietly(arviz.plot_dist, values.values.ravel(), ax=axis, **{"textsize": 11, **options})
        axis.set_xlabel(name, fontsize=11)
        axis.set_yticks([])
        return finished(axis.figure, title)

    def quietly(plot: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            # ArviZ uses a call that matplotlib 3.11 deprecates.
            warnings.filterwarnings("ignore", "Passing a dict or None as alias_mapping")
            return plot(*args, **options)

    def finished(figure: Any, title: str | None) -> Any:
        figure.set_layout_engine("constrained")
        for axis in figure.axes:  # long labels would run into those of the panels beside
            axis.set_xlabel(textwrap.fill(axis.get_xlabel(), LABEL_WIDTH, break_long_words=False))
            axis.set_ylabel(textwrap.fill(axis.get_ylabel(), LABEL_WIDTH, break_long_words=False))
        if title is not None:
            figure.suptitle(title, fontsize=12)
        return figure

    def ess(draws: np.ndarray, method: str) -> Any:
        return arviz.ess(draws, method=method)

    def ecdf_band(num: int, points: np.ndarray, prob: float) -> tuple[np.ndarray, np.ndarray]:
        from arviz.stats.ecdf_utils import ecdf_confidence_band
        from scipy.stats import uniform

        # Without rvs ArviZ warns that it takes the variable as continuous, which a level is.
        options = {"rvs": uniform(0, 1).rvs, "num_trials": BAND_TRIALS, "random_state": np.random.default_rng(0)}
        return ecdf_confidence_band(num, points, points, prob, method="simulated", **options)

    def container(datasets: dict[str, "Dataset"]) -> Any:
        return arviz.InferenceData(**datasets)

    return Generation(
        dataset, container, arviz.psislw, arviz.rhat, ess, hdi, plot_pair, plot_dist, ecdf_band, allows_slashes=True
    )


def arviz_1() -> Generation:
    """The functions of ArviZ 1.x."""
    import arviz_base
    from arviz_stats.base import array_stats
    from xarray import DataTree

    def dataset(arrays: dict[str, np.ndarray], sample_dims: list[str], **options: Any) -> "Dataset":
        # The check of conventions gives the warning that arviz_0 silences.
        return arviz_base.dict_to_dataset(arrays, sample_dims=sample_dims, check_conventions=False, **options)

    def psislw(log_weights: np.ndarray) -> tuple[np.ndarray, Any]:
        # Unlike 0.x, this function takes log-likelihoods, as in leave-one-out, which are negated log weights.
        return array_stats.psislw(-log_weights)

    def rhat(draws: np.ndarray) -> Any:
        return array_stats.rhat(draws, chain_axis=0, draw_axis=1)

    def ess(draws: np.ndarray, method: str) -> Any:
        return array_stats.ess(draws, chain_axis=0, draw_axis=1, method=method)

    def plot_pair(data: "DataTree", title: str | None, **options: Any) -> Any:
        import arviz_plots

        options.pop("num_components")
        # Without a backend ArviZ draws nothing, and fails only when the figure is saved.
        return finished(arviz_plots.plot_pair(data, **{"backend": "matplotlib", **options}), title)

    def plot_dist(data: "DataTree", title: str | None, **options: Any) -> Any:
        import arviz_plots

        return finished(arviz_plots.plot_dist(data, **{"backend": "matplotlib", **options}), title)

    def finished(plots: Any, title: str | None) -> Any:
        if title is not None:
            plots.viz["figure"].item().suptitle(title, fontsize=12)
        return plots

    def ecdf_band(num: int, points: np.ndarray, prob: float) -> tuple[np.ndarray, np.ndarray]:
        from arviz_stats import ecdf_utils

        rng = np.random.default_rng(0)
        pointwise = ecdf_utils.simulate_confidence_bands(num, 1, points, prob, BAND_TRIALS, rng)
        return ecdf_utils.get_pointwise_confidence_band(pointwise, num, points)

    return Generation(
        dataset,
        DataTree.from_dict,
        psislw,
        rhat,
        ess,
        array_stats.hdi,
        plot_pair,
        plot_dist,
        ecdf_band,
        allows_slashes=False,
    )

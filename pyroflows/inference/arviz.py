"""The interface to ArviZ: conversion to its data, Pareto-smoothed importance sampling, R-hat, ESS, intervals, pictures.

No other file uses ArviZ. Both generations are supported: 0.x with ``InferenceData``, and 1.x with xarray's
``DataTree``. Everything here takes NumPy arrays, and neither torch nor the rest of pyroflows is needed, so
that each generation can be tested in an environment of its own. ArviZ is imported where it is first used: importing
0.x takes seconds.
"""

import importlib.metadata
import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from arviz import InferenceData
    from xarray import Dataset, DataTree

SAMPLED_GROUPS = ("posterior", "sample_stats", "log_likelihood", "posterior_predictive", "prior", "prior_predictive")
DATA_GROUPS = ("observed_data", "constant_data")

SAMPLE_DIMS = ("chain", "draw")
LABEL_WIDTH = 16  # characters in a line of an axis label
BAND_TRIALS = 1000  # simulated distributions for a band around them

# Of fewer weights less than six belong to the tail, to which ArviZ 1.x fits nothing.
MIN_WEIGHTS = 30
# Log weights that differ by less count as equal: float32 rounds a log-density of 1e4 as coarsely, and changes of a
# weight by a thousandth do not matter to an estimate, whatever their tail is.
EQUAL = 1e-3


def to_arviz_data(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, str | Sequence[str]] | None = None,
    attrs: Mapping[str, Any] | None = None,
    seen_rows: Mapping[str, np.ndarray] | None = None,
) -> "InferenceData | DataTree":
    """Convert arrays, by group and variable, to the data of the installed ArviZ.

    Args:
        groups: arrays ``(chain, draw, ...)`` by variable for each of :data:`SAMPLED_GROUPS`, and arrays of any shape
            for each of :data:`DATA_GROUPS`; empty groups are left out.
        coords: labels by dimension.
        dims: names of dimensions by variable, without chain and draw, in every group. A log-likelihood, which lacks the
            event dimensions of its data, takes as many of the names as it needs.
        attrs: attributes of the posterior, such as ``inference_library``.
        seen_rows: booleans by variable of the log-likelihood, of its shape without chain and draw; where they are
            False, an observation is missing, and is left out. A log-likelihood of several dimensions is flattened then.

    Raises:
        ValueError: for a group not among these, or shapes that do not fit the group, the names or each other.

    Examples:
        >>> draws = np.random.default_rng(0).normal(size=(4, 250, 3))
        >>> data = to_arviz_data({"posterior": {"b": draws}}, coords={"age": ["<20", "<40", "40+"]}, dims={"b": "age"})
        >>> dict(data.posterior["b"].sizes)
        {'chain': 4, 'draw': 250, 'age': 3}
    """
    if unknown := set(groups) - {*SAMPLED_GROUPS, *DATA_GROUPS}:
        raise ValueError(f"no such group: {sorted(unknown)}; there are {', '.join(SAMPLED_GROUPS + DATA_GROUPS)}")
    backend = _backend()
    names = {variable: [n] if isinstance(n, str) else list(n) for variable, n in (dims or {}).items()}
    datasets = {}
    for group, variables in groups.items():
        if variables:
            arrays = {variable: np.asarray(values) for variable, values in variables.items()}
            sample_dims = ["chain", "draw"] if group in SAMPLED_GROUPS else []
            lacks_event_dims = group == "log_likelihood"
            _check_ranks(group, arrays, sample_dims, {} if lacks_event_dims else names)
            labels, group_names = dict(coords or {}), names
            if lacks_event_dims:
                arrays, labels, group_names = _seen(arrays, seen_rows or {}, labels, names)
            datasets[group] = backend.dataset(
                arrays,
                sample_dims,
                coords=labels,
                dims=group_names,
                attrs=dict(attrs or {}) if group == "posterior" else None,
                skip_event_dims=lacks_event_dims,
            )
            _check_aligned(group, arrays, datasets[group])
    return backend.container(datasets)


def allows_slashes() -> bool:
    """Whether variables and dimensions may have a slash in their names; 1.x takes it as one between groups."""
    return _backend().allows_slashes


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
    return _by_component(_backend().rhat, draws)


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
    return _by_component(lambda component: _backend().ess(component, method), draws)


def hdi(values: np.ndarray, prob: float) -> tuple[float, float]:
    """The ends of the highest-density interval of draws ``(S,)``, the shortest one that holds a share of them.

    Args:
        values: the draws.
        prob: the share.

    Examples:
        >>> hdi(np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0]), 0.5)
        (8.0, 9.5)
    """
    low, high = _backend().hdi(values, prob)
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
    backend = _backend()
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
    return _backend().ecdf_band(num, points, prob)


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


def _by_component(function: Callable[[np.ndarray], Any], draws: np.ndarray) -> np.ndarray:
    components = draws.reshape(*draws.shape[:2], -1)
    # Chains that stand still divide by zero.
    with np.errstate(all="ignore"):
        values = [float(function(components[..., i])) for i in range(components.shape[-1])]
    return np.array(values).reshape(draws.shape[2:])


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
        smoothed, khat = _backend().psislw(log_weights)
    if not (np.isfinite(khat) and np.isfinite(smoothed).all()):
        return log_weights, math.inf
    # ArviZ normalises the weights. Most are below the tail and otherwise unchanged, so the median change undoes that.
    return smoothed + np.median(log_weights - smoothed), float(khat)


def _tail_size(num_weights: int) -> int:
    return math.ceil(min(num_weights / 5, 3 * math.sqrt(num_weights)))


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    return np.partition(values, values.size - count)[-count:]


def _check_ranks(group: str, arrays: dict[str, np.ndarray], sample_dims: list[str], names: dict[str, list]) -> None:
    for variable, values in arrays.items():
        expected = [*sample_dims, *names.get(variable, [])]
        if values.ndim < len(expected):
            raise ValueError(
                f"{variable!r} in {group} has shape {values.shape}, too few dimensions for ({', '.join(expected)}, ...)"
            )


def _seen(
    arrays: dict[str, np.ndarray], seen_rows: Mapping[str, np.ndarray], coords: dict, names: dict[str, list]
) -> tuple[dict[str, np.ndarray], dict, dict[str, list]]:
    """Leave the rows out of log-likelihoods that are not seen, and label the others; with coordinates and names."""
    dims = {variable: _row_dims(values.ndim - 2, variable, names) for variable, values in arrays.items()}
    seen, coords, names = {}, dict(coords), dict(names)
    for variable, values in arrays.items():
        is_seen = seen_rows.get(variable, np.array(True))
        if is_seen.all():
            seen[variable] = values
        elif is_seen.any():
            seen[variable] = values[:, :, is_seen]
            # Another variable may have other rows of the same plate.
            is_shared = any(set(dims[variable]) & set(dims[other]) for other in arrays if other != variable)
            is_flattened = is_seen.ndim > 1
            name = "_".join([*([variable] if is_shared or is_flattened else []), *dims[variable]])
            names[variable], coords[name] = [name], _labels(is_seen, coords.get(name))
    return seen, coords, names


def _row_dims(num_dims: int, variable: str, names: Mapping[str, list]) -> list[str]:
    given = names.get(variable, [])[:num_dims]
    return [*given, *(f"{variable}_dim_{i}" for i in range(len(given), num_dims))]


def _labels(is_seen: np.ndarray, given: Sequence | None) -> list:
    """Labels of the rows that are seen: those that are given, or their indices."""
    indices = np.argwhere(is_seen)
    if is_seen.ndim > 1:
        return [", ".join(map(str, index)) for index in indices]
    return [index if given is None else given[index] for (index,) in indices]


def _check_aligned(group: str, arrays: dict[str, np.ndarray], dataset: "Dataset") -> None:
    """Raise if arrays share a dimension and differ in its length, since xarray fills the shorter ones with NaN."""
    for variable, values in arrays.items():
        if dataset[variable].size != values.size:
            raise ValueError(
                f"{variable!r} in {group} has shape {values.shape}, but another variable there has another length "
                f"along one of its dimensions {dataset[variable].dims}: give both the same length, or the dimensions "
                "two names"
            )


class _Backend(NamedTuple):
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
def _backend() -> _Backend:
    try:
        generation = int(importlib.metadata.version("arviz").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        # ArviZ 1.x is three packages, and the two that compute can be installed without the one named arviz.
        generation = 1
    try:
        return _arviz_0() if generation == 0 else _arviz_1()
    except ImportError as error:
        raise ImportError(f"ArviZ cannot be imported ({error}); install it with: pip install arviz") from error


def _arviz_0() -> _Backend:
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

    return _Backend(
        dataset, container, arviz.psislw, arviz.rhat, ess, hdi, plot_pair, plot_dist, ecdf_band, allows_slashes=True
    )


def _arviz_1() -> _Backend:
    import arviz_base
    from arviz_stats.base import array_stats
    from xarray import DataTree

    def dataset(arrays: dict[str, np.ndarray], sample_dims: list[str], **options: Any) -> "Dataset":
        # The check of conventions gives the warning that _arviz_0 silences.
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

    return _Backend(
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

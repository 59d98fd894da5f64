"""ArviZ, the only place that knows it: conversion to its data, Pareto-smoothed importance sampling, R-hat and ESS.

Both generations are supported, and whichever ``arviz`` is installed decides: 0.x with ``InferenceData``, 1.x with
xarray's ``DataTree``. Everything here takes NumPy arrays, and neither torch nor the rest of pyroflows is needed, so
that each generation can be tested in an environment of its own. ArviZ is imported where it is first used: importing
0.x takes seconds.
"""

import importlib.metadata
import math
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
MAX_PAIRS = 6  # of components: ArviZ 1.x refuses more than 40 panels

# Fewer weights leave the tail less than six of them, to which ArviZ 1.x fits nothing.
MIN_WEIGHTS = 30
# Log weights this close are equal: float32 rounds a log density of 1e4 that coarsely, and to an estimate a part in a
# thousand of a weight is nothing, whatever the tail of those parts.
EQUAL = 1e-3


def to_arviz_data(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, str | Sequence[str]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> "InferenceData | DataTree":
    """Arrays, by group and variable, as the data of the installed ArviZ.

    Args:
        groups: of :data:`SAMPLED_GROUPS`, arrays (chain, draw, ...); of :data:`DATA_GROUPS`, arrays of any shape.
            Empty groups are left out.
        coords: dimension -> its labels.
        dims: variable -> names of its dimensions, chain and draw excepted; they hold for it in every group. A log
            likelihood, which lacks the event dimensions of its data, takes as many of the names as it needs.
        attrs: facts noted on the posterior, such as ``inference_library``.

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
            datasets[group] = backend.dataset(
                arrays,
                sample_dims,
                coords=dict(coords or {}),
                dims=names,
                attrs=dict(attrs or {}) if group == "posterior" else None,
                skip_event_dims=lacks_event_dims,
            )
            _check_aligned(group, arrays, datasets[group])
    return backend.container(datasets)


def pareto_smoothed(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    r"""Pareto-smoothed log weights, and :math:`\hat k`, the tail index of the weights.

    A generalised Pareto distribution F is fitted to the M largest of S weights, about :math:`\min(S/5, 3\sqrt S)`.
    Its quantiles :math:`F^{-1}((i - 1/2) / M)`, cut off at the largest raw weight, replace them (Vehtari et al. 2024,
    JMLR 25(72)). :math:`\hat k` above :func:`pareto_k_threshold` says that the estimates cannot be trusted.

    The fit is ArviZ's; three things differ from it:

    - the weights are not normalised, since their mean is the evidence: the weights below the tail stay as they are;
    - a tail of equal weights (an exact flow; bounded weights) is no tail: :math:`\hat k = 0` and nothing changes,
      where ArviZ reports infinity or an error;
    - zero weights (-inf) stay zero and are left out of S: only the others tell the tail.

    Args:
        log_weights: log p - log q, (S,).

    Returns:
        The smoothed log weights in float64, (S,), and :math:`\hat k`. It is infinite, and the weights are as they
        were, where nothing can be fitted: fewer than 30 weights that are not zero, or too many ties among the largest.

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
            f"{bad} of {log_weights.size} log weights are NaN or +inf: the log joint or the proposal's log density is "
            "not finite at these draws; correct it there (a draw outside the support has log weight -inf)"
        )
    positive = np.isfinite(log_weights)
    log_weights[positive], khat = _smoothed_finite(log_weights[positive])
    return log_weights, khat


def rhat(draws: np.ndarray) -> np.ndarray:
    r"""Rank-normalised split :math:`\hat R` of draws (chain, draw, ...), of each component.

    See Vehtari et al. (2021, arXiv:1903.08008). Of a single chain it compares the halves. Infinite where every chain
    stands still, each at another value; NaN where all draws are equal, or not all finite.

    Examples:
        >>> draws = np.random.default_rng(0).normal(size=(4, 250, 3))
        >>> rhat(draws).shape, bool((rhat(draws) < 1.05).all())
        ((3,), True)
    """
    # ArviZ refuses one chain, though the halves are what is compared.
    if len(draws) == 1:
        half = draws.shape[1] // 2
        draws = np.concatenate([draws[:, :half], draws[:, -half:]])
    return _by_component(_backend().rhat, draws)


def ess(draws: np.ndarray, method: str = "bulk") -> np.ndarray:
    """Effective sample size (Vehtari et al. 2021, arXiv:1903.08008) of draws (chain, draw, ...), of each component.

    Args:
        draws: of all chains, four at least of each.
        method: "bulk" for ranks, "mean" for the values themselves.
    """
    return _by_component(lambda component: _backend().ess(component, method), draws)


def plot_pairs(
    data: "InferenceData | DataTree",
    var_names: Sequence[str] | None = None,
    coords: Mapping[str, Sequence] | None = None,
    **kwargs: Any,
) -> Any:
    """Marginals and pairs of two to six components of the posterior, by ArviZ's ``plot_pair``.

    Args:
        data: of :func:`to_arviz_data`.
        var_names: variables to show; all by default.
        coords: dimension -> the labels to show.
        kwargs: more for ``plot_pair`` of the installed ArviZ.

    Returns:
        What has ``savefig``: a matplotlib figure (0.x) or ArviZ's ``PlotMatrix`` (1.x).

    Raises:
        ValueError: if there are fewer than two components to show, or more than six.
    """
    posterior: Any = data["posterior"]
    chosen = list(var_names or posterior.data_vars)
    shown = dict(coords or {})
    if unknown := set(shown) - set(posterior.dims):
        raise ValueError(f"there are no dimensions {sorted(unknown)} to choose from, only {list(posterior.dims)}")
    parts = [posterior[name].sel({d: shown[d] for d in posterior[name].dims if d in shown}) for name in chosen]
    num = sum(part[0, 0].size for part in parts)
    if not 2 <= num <= MAX_PAIRS:
        dimensions = [d for d in posterior.dims if d not in SAMPLE_DIMS]
        raise ValueError(
            f"a pair plot shows 2 to {MAX_PAIRS} components, but {chosen} have {num}: choose by var_names and coords, "
            f"from variables {list(posterior.data_vars)} and dimensions {dimensions}"
        )
    return _backend().plot_pair(data, var_names=chosen, coords=shown, num_components=num, **kwargs)


def pareto_k_threshold(num_samples: int) -> float:
    r"""The largest :math:`\hat k` with which an estimate from S weights can be trusted.

    .. math:: \min(1 - 1 / \log_{10} S,\ 0.7)

    (Vehtari et al. 2024, JMLR 25(72)). From one draw nothing can be trusted: -inf.

    Examples:
        >>> pareto_k_threshold(100), pareto_k_threshold(10_000)
        (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(num_samples), 0.7) if num_samples > 1 else -math.inf


def _by_component(function: Callable[[np.ndarray], Any], draws: np.ndarray) -> np.ndarray:
    components = draws.reshape(*draws.shape[:2], -1)
    # Chains that stand still divide by zero.
    with np.errstate(all="ignore"):
        values = [float(function(components[..., i])) for i in range(components.shape[-1])]
    return np.array(values).reshape(draws.shape[2:])


def _smoothed_finite(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    size = log_weights.size
    # Where there are too few for a tail, all of them must be equal to be without one.
    num_tail = math.ceil(min(size / 5, 3 * math.sqrt(size))) if size >= MIN_WEIGHTS else size
    # The fit starts at the largest weight below the tail, hence one more.
    if size > 1 and np.ptp(_largest(log_weights, min(num_tail + 1, size))) <= EQUAL:
        return log_weights, 0.0
    if size < MIN_WEIGHTS:
        return log_weights, math.inf
    # Ties, or one weight that dwarfs the rest by more than float64's range, make the fit divide by zero: NaN below.
    with np.errstate(all="ignore"):
        smoothed, khat = _backend().psislw(log_weights)
    if not (np.isfinite(khat) and np.isfinite(smoothed).all()):
        return log_weights, math.inf
    # ArviZ normalises. Most weights are below the tail and untouched, so the median change is what it subtracted.
    return smoothed + np.median(log_weights - smoothed), float(khat)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    return np.partition(values, values.size - count)[-count:]


def _check_ranks(group: str, arrays: dict[str, np.ndarray], sample_dims: list[str], names: dict[str, list]) -> None:
    for variable, values in arrays.items():
        expected = [*sample_dims, *names.get(variable, [])]
        if values.ndim < len(expected):
            raise ValueError(
                f"{variable!r} in {group} has shape {values.shape}, too few dimensions for ({', '.join(expected)}, ...)"
            )


def _check_aligned(group: str, arrays: dict[str, np.ndarray], dataset: "Dataset") -> None:
    """Xarray fills up arrays that share a dimension and differ in its length with NaN."""
    for variable, values in arrays.items():
        if dataset[variable].size != values.size:
            raise ValueError(
                f"{variable!r} in {group} has shape {values.shape}, but another variable there has another length "
                f"along one of its dimensions {dataset[variable].dims}: give both the same length, or the dimensions "
                "two names"
            )


class _Backend(NamedTuple):
    """What is used of ArviZ, in the same terms for both generations."""

    dataset: Callable[..., "Dataset"]
    container: Callable[[dict[str, "Dataset"]], Any]
    psislw: Callable[[np.ndarray], tuple[np.ndarray, Any]]
    rhat: Callable[[np.ndarray], Any]
    ess: Callable[[np.ndarray, str], Any]
    plot_pair: Callable[..., Any]


@cache
def _backend() -> _Backend:
    try:
        generation = int(importlib.metadata.version("arviz").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        # ArviZ 1.x is three packages, two of which do without the one named arviz.
        generation = 1
    try:
        return _arviz_0() if generation == 0 else _arviz_1()
    except ImportError as error:
        raise ImportError(f"ArviZ cannot be imported ({error}); install it with: pip install arviz") from error


def _arviz_0() -> _Backend:
    with warnings.catch_warnings():
        # It announces ArviZ 1, which is nothing a user of pyroflows has to act on.
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        import arviz

    def dataset(arrays: dict[str, np.ndarray], sample_dims: list[str], **options: Any) -> "Dataset":
        with warnings.catch_warnings():
            # A guess that the axes are swapped, which here they never are.
            warnings.filterwarnings("ignore", "More chains", UserWarning)
            return arviz.dict_to_dataset(arrays, default_dims=sample_dims, **options)

    def plot_pair(data: "InferenceData", **options: Any) -> Any:
        size = (2.2 * options.pop("num_components"),) * 2
        # Faint points, since thousands of them overlap.
        look = {"kind": "scatter", "marginals": True, "figsize": size, "scatter_kwargs": {"alpha": 0.2}}
        with warnings.catch_warnings():
            # It uses a call that matplotlib 3.11 deprecates.
            warnings.filterwarnings("ignore", "Passing a dict or None as alias_mapping")
            axes = arviz.plot_pair(data, **{**look, **options})
        figure = axes.flat[0].figure
        figure.set_layout_engine("constrained")
        return figure

    def ess(draws: np.ndarray, method: str) -> Any:
        return arviz.ess(draws, method=method)

    return _Backend(dataset, lambda datasets: arviz.InferenceData(**datasets), arviz.psislw, arviz.rhat, ess, plot_pair)


def _arviz_1() -> _Backend:
    import arviz_base
    from arviz_stats.base import array_stats
    from xarray import DataTree

    def dataset(arrays: dict[str, np.ndarray], sample_dims: list[str], **options: Any) -> "Dataset":
        # The conventions are the guess that _arviz_0 silences.
        return arviz_base.dict_to_dataset(arrays, sample_dims=sample_dims, check_conventions=False, **options)

    def psislw(log_weights: np.ndarray) -> tuple[np.ndarray, Any]:
        # Unlike 0.x it takes negated log weights: a log likelihood, as leave-one-out has it.
        return array_stats.psislw(-log_weights)

    def rhat(draws: np.ndarray) -> Any:
        return array_stats.rhat(draws, chain_axis=0, draw_axis=1)

    def ess(draws: np.ndarray, method: str) -> Any:
        return array_stats.ess(draws, chain_axis=0, draw_axis=1, method=method)

    def plot_pair(data: "DataTree", **options: Any) -> Any:
        import arviz_plots

        options.pop("num_components")
        # Without a backend it draws nothing, and says so only when the figure is saved.
        return arviz_plots.plot_pair(data, **{"backend": "matplotlib", **options})

    return _Backend(dataset, DataTree.from_dict, psislw, rhat, ess, plot_pair)

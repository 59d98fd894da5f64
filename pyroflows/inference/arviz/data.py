"""Conversion of arrays to the data of ArviZ."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import generations

if TYPE_CHECKING:
    from arviz import InferenceData
    from xarray import Dataset, DataTree

SAMPLED_GROUPS = ("posterior", "sample_stats", "log_likelihood", "posterior_predictive", "prior", "prior_predictive")
DATA_GROUPS = ("observed_data", "constant_data")

SAMPLE_DIMS = ("chain", "draw")


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
    backend = generations.installed()
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
    return generations.installed().allows_slashes


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

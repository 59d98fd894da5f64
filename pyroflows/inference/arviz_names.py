"""The names of sites and dimensions in ArviZ data, and the labels of dimensions."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyroflows.errors import OptionError
from pyroflows.inference.arviz import DATA_GROUPS, SAMPLE_DIMS, allows_slashes
from pyroflows.models.structure import Site

Groups = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class ArvizNames:
    """How ArviZ data name sites and dimensions.

    Args:
        sites: the name in the data, by site whose own name cannot be taken.
        plates: the name in the data, by plate whose own name cannot be taken.
        dims: the names of dimensions, by site; as many as its array has.
        coords: labels by dimension.
    """

    dims: dict[str, list[str]]
    coords: dict[str, Sequence[Any]]
    sites: dict[str, str] = field(default_factory=dict)
    plates: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        groups: Groups,
        sites: Collection[Site],
        coords: Mapping[str, Sequence[Any]] | None,
        dims: Mapping[str, str | Sequence[str]] | None,
    ) -> "ArvizNames":
        """Name the dimensions of all arrays: by the user, by plates, or by numbers, as ArviZ does.

        Args:
            groups: arrays by group and site.
            sites: the sites of the model; none if it is not known.
            coords: labels by dimension, as the user gives them.
            dims: dimension names by site, as the user gives them.

        Raises:
            OptionError: if a site or a dimension does not exist, or has another number of dimensions or labels; the
                message lists what exists.
        """
        shapes = _shapes(groups)
        known = list(dict.fromkeys([*shapes, *(site.name for site in sites)]))
        plate_names = {name for site in sites for name in site.plate_names if name is not None}
        new_sites = _renamed(known, SAMPLE_DIMS, "site")
        new_plates = _renamed(sorted(plate_names), {*SAMPLE_DIMS, *known}, "plate")
        named = _of_user(dims or {}, shapes, known, new_plates)
        for site in sites:
            named.setdefault(site.name, [new_plates.get(name, name) if name else None for name in site.plate_names])
        full = {name: _numbered(name, shape, named.get(name, [])) for name, shape in shapes.items()}
        full = _without_conflicts(full, shapes, set(dims or {}))
        labels = {new_plates.get(dim, dim): values for dim, values in (coords or {}).items()}
        others = {new_plates.get(name, name) for name in plate_names} | {
            dim for of in named.values() for dim in of if dim
        }
        _check_coords(labels, full, shapes, others)
        return cls(full, labels, new_sites, new_plates)


def _shapes(groups: Groups) -> dict[str, tuple[int, ...]]:
    """The shapes of draws by site: of a site that is in several groups, the one with the most dimensions."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group, arrays in groups.items():
        if group != "sample_stats":
            for name, array in arrays.items():
                shape = array.shape if group in DATA_GROUPS else array.shape[2:]
                shapes[name] = max(shapes.get(name, ()), shape, key=len)
    return shapes


def _renamed(names: Iterable[str], taken: Collection[str], kind: str) -> dict[str, str]:
    """Other names for those that ArviZ cannot take: of its own dimensions, and under 1.x those with a slash."""
    names = list(names)
    new: dict[str, str] = {}
    for name in names:
        good = name if allows_slashes() else name.replace("/", ".")
        good = f"{good}_{kind}" if good in taken else good
        while good != name and good in {*names, *taken, *new.values()}:
            good += "_"
        if good != name:
            new[name] = good
    return new


def _of_user(
    dims: Mapping[str, str | Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    known: Sequence[str],
    new_plates: Mapping[str, str],
) -> dict[str, list[str | None]]:
    if unknown := [name for name in dims if name not in known]:
        raise OptionError(f"dims name a site {unknown[0]!r}, but the sites are {list(known)}")
    found: dict[str, list[str | None]] = {}
    for site, given in dims.items():
        names = [given] if isinstance(given, str) else list(given)
        shape = shapes.get(site)
        if shape is not None and len(names) > len(shape):
            raise OptionError(f"dims name {len(names)} dimensions {names} of site {site!r}, which has shape {shape}")
        names = [new_plates.get(name, name) for name in names]
        for name in names:
            why = ""
            if name in {*SAMPLE_DIMS, *known}:
                why = "is the name of a site, or ArviZ's own"
            elif "/" in name and not allows_slashes():
                why = "has a slash, which ArviZ 1.x refuses"
            elif names.count(name) > 1:
                why = "stands there twice"
            if why:
                raise OptionError(f"dims name a dimension of site {site!r} {name!r}, which {why}: give it another name")
        found[site] = list(names)
    return found


def _numbered(name: str, shape: tuple[int, ...], named: Sequence[str | None]) -> list[str]:
    """Names of all dimensions of a site: those it has, and numbers as ArviZ gives them."""
    given = [*named, *[None] * len(shape)][: len(shape)]
    return [dim or f"{name}_dim_{i}" for i, dim in enumerate(given)]


def _without_conflicts(
    dims: dict[str, list[str]], shapes: Mapping[str, tuple[int, ...]], of_user: Collection[str]
) -> dict[str, list[str]]:
    """Tell dimensions apart that have one name and several lengths, as those of a plate without a size.

    Raises:
        OptionError: if the user has named one of them.
    """
    lengths = _lengths(dims, shapes)
    for dim, by_length in lengths.items():
        users = [site for sites in by_length.values() for site in sites if site in of_user]
        if len(by_length) > 1 and users:
            found = ", ".join(f"{length} at {sites[0]!r}" for length, sites in by_length.items())
            raise OptionError(
                f"dims name a dimension {dim!r} of site {users[0]!r}, but dimensions of that name have several lengths "
                f"({found}): give each a name of its own"
            )
    return {site: [f"{site}_{dim}" if len(lengths[dim]) > 1 else dim for dim in names] for site, names in dims.items()}


def _lengths(
    dims: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[int, list[str]]]:
    """The sites with a dimension, by its length, by dimension."""
    found: dict[str, dict[int, list[str]]] = {}
    for site, names in dims.items():
        for dim, length in zip(names, shapes[site], strict=True):
            found.setdefault(dim, {}).setdefault(length, []).append(site)
    return found


def _check_coords(
    coords: Mapping[str, Sequence[Any]],
    dims: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    others: Collection[str],
) -> None:
    lengths = {dim: next(iter(by_length)) for dim, by_length in _lengths(dims, shapes).items()}
    for dim, values in coords.items():
        if dim not in {*lengths, *others, *SAMPLE_DIMS}:
            raise OptionError(f"coords label a dimension {dim!r}, but the dimensions are {list(lengths)}")
        if dim in lengths and len(values) != lengths[dim]:
            raise OptionError(f"coords give {len(values)} labels of dimension {dim!r}, which has length {lengths[dim]}")

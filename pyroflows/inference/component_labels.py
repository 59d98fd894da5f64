"""The names of dimensions and the labels along them, which tables, pictures, ArviZ data and files share."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.models.structure import ModelStructure, Site
from pyroflows.shapes import listed

Coords: TypeAlias = Mapping[str, Sequence[Any]]
Dims: TypeAlias = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class ComponentLabels:
    """The names of the dimensions of sites, and labels along them.

    Args:
        coords: the labels by dimension.
        dims: the names of all dimensions by site, for sites of which a user has named one.
        plates: the same for the other sites that are in plates.

    Example:
        >>> labels = ComponentLabels({"school": ("Choate", "Exeter")}, {"theta": ("school", "theta_dim_1")})
        >>> labels.component("theta", (1, 0)), labels.component("mu", ())
        ('theta[Exeter, 0]', 'mu')
    """

    coords: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    plates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, structure: ModelStructure, coords: Coords | None = None, dims: Dims | None = None) -> "ComponentLabels":
        """Check names and labels that a user gave against the structure of a model.

        Args:
            structure: the structure of the model, whose plates name dimensions by default.
            coords: labels by dimension; None for none.
            dims: names of dimensions by site, from the left; None for those of the plates.

        Raises:
            OptionError: if there is no such site or dimension, or if the number of names or of labels does not fit; it
                lists what there is.
        """
        named = {site: _names(site, names, structure) for site, names in _mapping("dims", dims).items()}
        labelled = {name: _as_tuple(labels) for name, labels in _mapping("coords", coords).items()}
        by_site = {site.name: _dims_of(site, named.get(site.name, ())) for site in _sites(structure)}
        sizes = _sizes(structure, by_site)
        for name, labels in labelled.items():
            if name not in sizes:
                existing = listed([f"'{dim}' ({size})" for dim, size in sizes.items()], 20)
                raise OptionError(
                    f"coords has labels of the dimension '{name}', but the dimensions of the model are "
                    f"{existing}: a plate is a dimension, and dims= names others"
                )
            if len(labels) != sizes[name]:
                raise OptionError(
                    f"coords has {len(labels)} labels of the dimension '{name}', which has {sizes[name]} entries"
                )
        given = {name: by_site[name] for name in named}
        in_plates = [site.name for site in _sites(structure) if any(site.plate_names) and site.name not in named]
        return cls(labelled, given, {name: by_site[name] for name in in_plates})

    def updated(
        self, structure: ModelStructure, coords: Coords | None = None, dims: Dims | None = None
    ) -> "ComponentLabels":
        """Keep what fits a model at other data, where a plate may have other rows, and put others in its place.

        Args:
            structure: the structure of the model at these data.
            coords: further labels by dimension, which replace those of the same dimension; None for none.
            dims: further names of dimensions by site, which replace those of the same site; None for none.

        Raises:
            OptionError: as for :meth:`of`.
        """
        ranks = {site.name: len(site.shape) for site in _sites(structure)}
        kept = {name: names for name, names in self.dims.items() if ranks.get(name) == len(names)}
        dims = {**kept, **_mapping("dims", dims)}
        checked = ComponentLabels.of(structure, dims=dims)
        sizes = _sizes(
            structure, {site.name: checked.dims_of(site.name, len(site.shape)) for site in _sites(structure)}
        )
        own = {name: labels for name, labels in self.coords.items() if sizes.get(name) == len(labels)}
        return ComponentLabels.of(structure, {**own, **_mapping("coords", coords)}, dims)

    def component(self, site: str, index: tuple[int, ...]) -> str:
        """The name of a component of a site, such as ``theta[Choate]`` with labels and ``theta[0]`` without."""
        if not index:
            return site
        return f"{site}[{', '.join(str(label) for _, label in self.entries(site, index))}]"

    def entries(self, site: str, index: tuple[int, ...]) -> list[tuple[str, Any]]:
        """The dimension and the label, or the number, of a component along each of its dimensions."""
        dims = self.dims_of(site, len(index))
        return [(dim, self.coords[dim][i] if dim in self.coords else i) for dim, i in zip(dims, index, strict=True)]

    def dims_of(self, site: str, num_dims: int) -> tuple[str, ...]:
        """The names of all dimensions of a site."""
        return self.dims.get(site) or self.plates.get(site) or _default_dims(site, num_dims)

    def to_json(self) -> dict[str, Any]:
        """The names and labels as strings and numbers; other labels, such as dates, become strings."""
        return {
            "coords": {name: [_plain(label) for label in labels] for name, labels in self.coords.items()},
            "dims": {name: list(names) for name, names in self.dims.items()},
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "ComponentLabels":
        """Read what :meth:`to_json` wrote."""
        coords, dims = ({name: tuple(values) for name, values in saved[part].items()} for part in ("coords", "dims"))
        return cls(coords, dims)


NO_LABELS = ComponentLabels()


def _mapping(option: str, value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise OptionError(f"{option} must be a dictionary, such as {{'school': [...]}}, got {type(value).__name__}")
    return value or {}


def _names(name: str, names: str | Iterable[str], structure: ModelStructure) -> tuple[str, ...]:
    """Check the names of the dimensions of a site, which may be fewer than its dimensions."""
    sites = {site.name: site for site in _sites(structure)}
    if name not in sites:
        raise OptionError(f"dims has names for the site '{name}', but the model has the sites {listed([*sites], 20)}")
    chosen = (names,) if isinstance(names, str) else tuple(names)
    shape = list(sites[name].shape)
    if len(chosen) > len(shape) or len(set(chosen)) < len(chosen):
        raise OptionError(
            f"dims has the names {list(chosen)} for site '{name}', whose dimensions have the sizes {shape}: give each "
            "at most one name, of its own"
        )
    return chosen


def _sites(structure: ModelStructure) -> tuple[Site, ...]:
    return (*structure.latents, *structure.enumerated, *structure.deterministic, *structure.observed)


def _dims_of(site: Site, given: tuple[str, ...]) -> tuple[str, ...]:
    """The names of all dimensions of a site: those that are given, then those of plates, then numbers as in ArviZ."""
    names = [*site.plate_names, *[None] * site.event_dim]
    defaults = [name or default for name, default in zip(names, _default_dims(site.name, len(names)), strict=True)]
    return (*given, *defaults[len(given) :])


def _default_dims(site: str, num_dims: int) -> tuple[str, ...]:
    return tuple(f"{site}_dim_{i}" for i in range(num_dims))


def _sizes(structure: ModelStructure, dims: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    """The number of entries of each dimension; that of a plate counts all rows, also where a run sees only a part.

    Raises:
        OptionError: if two sites have dimensions of one name and different sizes.
    """
    sizes: dict[str, int] = {}
    for site in _sites(structure):
        plates = (*site.plate_names, *[None] * site.event_dim)
        for dim, plate, size in zip(dims.get(site.name, ()), plates, site.shape, strict=False):
            size = size if plate is None else structure.plates[plate].size
            if sizes.setdefault(dim, size) != size:
                raise OptionError(
                    f"the dimension '{dim}' has {size} entries at site '{site.name}', but {sizes[dim]} elsewhere: give "
                    "them two names"
                )
    return sizes


def _as_tuple(labels: Any) -> tuple[Any, ...]:
    return tuple(labels.tolist() if isinstance(labels, Tensor) else labels)


def _plain(label: Any) -> Any:
    """A label as JSON has it."""
    label = label.item() if isinstance(label, np.generic) and not isinstance(label, np.datetime64) else label
    is_number = isinstance(label, int | float) and math.isfinite(label)
    return label if is_number else str(label)

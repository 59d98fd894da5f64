"""The levels of a hierarchical model: its global latents, and the latents that are local to rows of plates."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyroflows.errors import ModelError
from pyroflows.models.layout import Layout
from pyroflows.models.masks import Given
from pyroflows.models.structure import Plate, Site
from pyroflows.models.tracing import Model, sample_nodes

MAX_FACTORS = 200

# Points (S, dim) and vectors (S, dim) to the products (S, dim) of the Hessians at the points with the vectors.
TimesHessian = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class SiteLevel:
    """The latents that are local to the rows of the same plates.

    Args:
        plates: the plates, from left to right in shapes; none for the global latents.
        sites: the latent sites.
        places: the indices of the latents in the packed vector, by row, ``(R, d)``.
        rows: the index of each row in each plate, ``(R, number of plates)``.
        parents: the indices of the levels that enclose this one, among all that are not global.
    """

    plates: tuple[Plate, ...]
    sites: tuple[Site, ...]
    places: Tensor
    rows: Tensor
    parents: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The names of the plates."""
        return ", ".join(plate.name for plate in self.plates)

    @property
    def num_rows(self) -> int:
        """The number of rows of the full plates."""
        return prod(plate.size for plate in self.plates)

    def row_of(self, other: "SiteLevel") -> Tensor:
        """The row of an enclosing level in which each row of this one lies, ``(R,)``.

        Raises:
            ModelError: if a mask leaves out such a row.
        """
        sizes = [plate.subsample_size for plate in other.plates]
        index = torch.full((prod(sizes),), -1)
        index[flat_places(other.rows, sizes)] = torch.arange(len(other.rows))
        found = index[flat_places(self.rows[:, [self.plates.index(plate) for plate in other.plates]], sizes)]
        if bool((found < 0).any()):
            raise ModelError(
                f"a mask leaves out a row of plate '{other.name}' and not what lies in it in plate '{self.name}': mask "
                "both"
            )
        return found

    @property
    def is_kept(self) -> Tensor | None:
        """Which rows of the full plates have latents, booleans ``(N,)``; None if a mask leaves out none of them."""
        if len(self.rows) == self.num_rows:
            return None
        return torch.zeros(self.num_rows, dtype=torch.bool).index_fill(0, self.ids({}), True)

    def ids(self, subsample: Mapping[str, Tensor]) -> Tensor:
        """The index of each row among those of the full plates, ``(R,)``.

        Args:
            subsample: the indices of the rows that a run sees, by subsampled plate.
        """
        columns = zip(self.plates, self.rows.unbind(-1), strict=True)
        rows = [subsample[plate.name][row] if plate.name in subsample else row for plate, row in columns]
        return flat_places(torch.stack(rows, -1) if rows else self.rows, [plate.size for plate in self.plates])

    @property
    def is_subsampled(self) -> bool:
        """Whether a run sees a part of the rows."""
        return any(plate.is_subsampled for plate in self.plates)

    def by_site(self, rows: Tensor) -> dict[str, Tensor]:
        """Give values of the rows ``(R,)`` the dimensions of each site's batch shape, where no row is left out."""
        found = {}
        for site in self.sites:
            shape = [1] * (len(site.shape) - site.event_dim)
            for plate in self.plates:
                shape[plate.dim or 0] = plate.subsample_size
            found[site.name] = rows.reshape(shape)
        return found

    @property
    def weight(self) -> float:
        """The number of rows for which each one stands in a subsampled run."""
        return prod(plate.size / plate.subsample_size for plate in self.plates if plate.is_subsampled)


def flat_places(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """The place of rows, given by their index in each plate, among all rows of plates of these sizes."""
    places = torch.zeros(len(rows), dtype=torch.long)
    for column, size in enumerate(sizes):
        places = places * size + rows[:, column]
    return places


def levels_of(layout: Layout, local: Collection[str] | None = None) -> tuple[SiteLevel, ...]:
    """Sort the latents of a model into levels, the global one first, and each after those that enclose it.

    Args:
        layout: the layout of the latents.
        local: the names of the plates whose rows have latents of their own; None for all plates. Other plates are
            ignored, so that their latents belong to the level of the plates around them.

    Raises:
        ModelError: if a mask leaves out a part of the latents of a row; names the site.
    """
    by_plates: dict[tuple[Plate, ...], list[Site]] = {(): []}
    for site in layout.structure.latents:
        plates = [p for p in site.plates if p.dim is not None and (local is None or p.name in local)]
        by_plates.setdefault(tuple(sorted(plates, key=lambda p: p.dim or 0)), []).append(site)
    order = sorted(by_plates, key=len)
    enclosing = [tuple(i for i, other in enumerate(order[1:]) if set(other) < set(plates)) for plates in order]
    return tuple(
        SiteLevel(plates, tuple(by_plates[plates]), *_placed(layout, plates, by_plates[plates]), parents)
        for plates, parents in zip(order, enclosing, strict=True)
    )


def _placed(layout: Layout, plates: Sequence[Plate], sites: Sequence[Site]) -> tuple[Tensor, Tensor]:
    """The places of the latents of each row in the packed vector, and the row's index in each plate."""
    shape = [plate.subsample_size for plate in plates]
    parts = [_places_by_row(layout, site, plates).expand(*shape, -1) for site in sites]
    places = torch.cat(parts, -1).flatten(0, len(plates) - 1) if parts else torch.zeros(1, 0, dtype=torch.long)
    if not plates:
        return places.reshape(1, -1), torch.zeros(1, 0, dtype=torch.long)
    rows = torch.cartesian_prod(*(torch.arange(size) for size in shape)).reshape(-1, len(plates))
    is_kept = (places >= 0).all(-1)
    if bool(((places >= 0).any(-1) != is_kept).any()):
        raise ModelError(
            f"a mask leaves out some latents of a row of plate '{plates[-1].name}', and not others "
            f"({', '.join(site.name for site in sites)}): mask whole rows, or use AutoFlow"
        )
    return places[is_kept], rows[is_kept]


def _places_by_row(layout: Layout, site: Site, plates: Sequence[Plate]) -> Tensor:
    """The places of a site's entries, ``(*sizes of the plates, entries)``; -1 for those that a mask leaves out."""
    assert site.unconstrained_shape is not None
    part = layout.slices[site.name]
    shape = site.unconstrained_shape
    if site.kept is None:
        places = torch.arange(part.start, part.stop).reshape(shape)
    else:
        kept = site.kept.cpu().reshape(site.kept.shape + (1,) * (len(shape) - site.kept.dim())).expand(shape)
        places = torch.where(kept, kept.reshape(-1).cumsum(0).reshape(shape) - 1 + part.start, -1)
    batch_dim = len(site.shape) - site.event_dim
    axes = [batch_dim + (plate.dim or 0) for plate in plates]
    return places.movedim(axes, list(range(len(axes)))).reshape(*(shape[axis] for axis in axes), -1)


def shared_factors(model: Model, args: Any, kwargs: Any, layout: Layout, vector: Tensor) -> Tensor:
    """Which latents each factor of the log joint depends on, booleans ``(number of factors, dim)``.

    A factor is the log-density of a site. Where there are very many, all count as depending on everything.

    Args:
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        layout: the layout of its latents.
        vector: an unconstrained vector ``(dim,)`` at which the log joint has derivatives.
    """
    with torch.enable_grad():
        leaf = vector.detach().requires_grad_()
        values, _ = layout.constrain(leaf)
        with poutine.block(), poutine.trace() as tracer, Given(values):
            model(*args, **kwargs)
        nodes = list(sample_nodes(tracer.trace))
        if len(nodes) > MAX_FACTORS:
            return torch.ones(1, layout.dim, dtype=torch.bool)
        found = []
        for node in nodes:
            log_prob = scale_and_mask(node["fn"].log_prob(node["value"]), node["scale"], node["mask"]).sum()
            if log_prob.requires_grad:
                (gradient,) = torch.autograd.grad(
                    log_prob, leaf, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                found.append(gradient != 0)
    return torch.stack(found) if found else torch.zeros(0, layout.dim, dtype=torch.bool)


def read_by(levels: Sequence[SiteLevel], factors: Tensor) -> list[Tensor]:
    """The global latents on which the rows of each local level depend, by index among the global ones.

    Given these, and the rows that enclose it, a row is independent of all other global latents: they are those that
    share a factor with latents of the row, or of the rows that it encloses.

    Args:
        levels: the levels of the model, the global one first.
        factors: which latents each factor depends on, see :func:`shared_factors`.
    """
    places = levels[0].places[0]
    found = []
    for i, level in enumerate(levels[1:]):
        family = [level, *(other for other in levels[1:] if i in other.parents)]
        touched = torch.zeros(factors.shape[1], dtype=torch.bool)
        touched[torch.cat([member.places.flatten() for member in family])] = True
        related = factors[(factors & touched).any(-1)].any(0)
        found.append(related[places].nonzero().flatten())
    return found


# Rows are few below this number, and stay with the global latents.
MIN_ROWS = 8
# Products of the Hessian of log joints are taken at so many points, each with another half of the rows.
NUM_HALVES = 12


def independent_levels(layout: Layout, times_hessian: TimesHessian, points: Tensor) -> tuple[SiteLevel, ...]:
    r"""Find the levels whose rows are independent of one another given the global latents and the rows around them.

    The Hessian of the log joint then has no block between two rows, :math:`\partial^2 f / \partial x_r \partial x_s =
    0`, where the elements of a row include those of the rows within it. To test this it is multiplied by random vectors
    on a random half of the rows, at several points: the product must vanish at all other local latents. Plates alone do
    not tell: the coefficients of a regression stand in a plate, and are not independent given its data. The plates with
    the most latents are tried first, and those that are not independent given the others are left to the global level.

    Args:
        layout: the layout of the latents.
        times_hessian: a function that multiplies the Hessians at points ``(S, dim)`` by vectors ``(S, dim)``.
        points: unconstrained vectors ``(S, dim)``, of which a dozen tell.

    Returns:
        The levels, the global one first, which is the only one where no rows are independent.
    """
    sizes: dict[str, int] = {}
    for site in layout.structure.latents:
        size = layout.slices[site.name].stop - layout.slices[site.name].start
        for plate in site.plates:
            if plate.dim is not None and plate.size >= MIN_ROWS:
                sizes[plate.name] = sizes.get(plate.name, 0) + size
    local: set[str] = set()
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        levels = levels_of(layout, {*local, name})
        if _are_nested(levels) and _are_independent(levels, times_hessian, points):
            local.add(name)
    return levels_of(layout, local)


def _are_nested(levels: Sequence[SiteLevel]) -> bool:
    """Whether of any two levels that enclose a third, one encloses the other."""
    return all(
        a in levels[1 + b].parents
        for level in levels[1:]
        for i, b in enumerate(level.parents)
        for a in level.parents[:i]
    )


def _are_independent(levels: Sequence[SiteLevel], times_hessian: TimesHessian, points: Tensor) -> bool:
    for i, level in enumerate(levels[1:]):
        rows = torch.full(points.shape[1:], -1)
        rows[level.places] = torch.arange(len(level.places))[:, None]
        for other in levels[1:]:
            if i in other.parents:
                rows[other.places] = other.row_of(level)[:, None]
        is_around = torch.zeros(points.shape[1:], dtype=torch.bool)
        for place in [levels[0].places, *(levels[1 + parent].places for parent in level.parents)]:
            is_around[place.flatten()] = True
        half = torch.rand(len(points), len(level.places)) < 0.5
        chosen = half[:, rows.clamp(min=0)] & (rows >= 0)
        vectors = torch.where(chosen, torch.randn(points.shape), 0.0)
        product = times_hessian(points, vectors.to(points)).abs()
        within = torch.where(chosen, product, 0.0).amax(-1)
        across = torch.where(chosen | is_around, 0.0, product).amax(-1)
        limit = torch.finfo(points.dtype).eps ** 0.5 * within
        if not bool((across <= limit).all()):
            return False
    return True

"""Exact symmetries of a log joint: sign changes, and permutations of exchangeable components.

A symmetry maps each mode to a mode of the same mass, without a search. Candidates follow from the shapes of the
latents; which of them are symmetries, the log joint itself tells.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from pyroflows.models.layout import Layout
from pyroflows.models.structure import Site

# Axes up to this length are searched for exchangeable components.
MAX_COMPONENTS = 10
# Up to this many axes of one length, all subsets of them are tried.
MAX_AXES = 4
MAX_SITES, MAX_COORDINATES = 12, 64
MAX_CANDIDATES = 512
# The log joint counts as unchanged up to this many nats, and up to this multiple of its value.
TOLERANCE, RELATIVE_TOLERANCE = 1e-3, 1e-5


@dataclass(frozen=True)
class Axis:
    """An axis of a latent's value.

    Args:
        site: the latent.
        dim: the axis, negative.
    """

    site: Site
    dim: int

    @property
    def size(self) -> int:
        """The length of the axis."""
        return self.site.shape[self.dim]


@dataclass(frozen=True, eq=False)
class Symmetry:
    """A map of unconstrained vectors that may leave a log joint unchanged.

    Args:
        index: entries of the vector from which those of the image are taken, ``(D,)``.
        signs: factors of the entries of the image, 1 or -1, ``(D,)``.
        swaps: permutations of the values of sites, whose unconstrained entries do not move along.
        layout: the layout of the vector.

    Shapes: vectors ``(S, D)`` are mapped to vectors ``(S, D)``.

    Example:
        >>> mirror = Symmetry(torch.arange(2), torch.tensor([1.0, -1.0]))
        >>> mirror(torch.tensor([[3.0, 4.0]]))
        tensor([[ 3., -4.]])
    """

    index: Tensor
    signs: Tensor
    swaps: tuple[tuple[Axis, Tensor], ...] = ()
    layout: Layout | None = None

    def __call__(self, vectors: Tensor) -> Tensor:
        image = vectors[:, self.index] * self.signs.to(vectors)
        for axis, order in self.swaps:
            assert self.layout is not None
            assert axis.site.bijection is not None
            part, bijection = self.layout.slices[axis.site.name], axis.site.bijection
            value, _ = bijection.constrain(image[:, part].reshape(-1, *bijection.unconstrained_shape))
            moved = bijection.unconstrain(value.index_select(axis.dim, order.to(value.device))).flatten(1).to(image)
            image = torch.cat([image[:, : part.start], moved, image[:, part.stop :]], -1)
        return image

    @property
    def is_permutation(self) -> bool:
        """Whether components are exchanged; otherwise signs change."""
        return bool((self.signs > 0).all())

    def root_of_image(self, loc: Tensor, root: Tensor) -> Tensor:
        """Map a square root ``(D, D)`` of a covariance by the Jacobian at a vector ``(D,)``."""
        if not self.swaps:
            return root[self.index] * self.signs.to(root)[:, None]
        jacobian = torch.autograd.functional.jacobian(lambda u: self(u[None])[0], loc)
        return jacobian @ root


def find_symmetries(layout: Layout, log_density: Callable[[Tensor], Tensor], points: Tensor) -> list[Symmetry]:
    """Find sign changes and transpositions of components that leave a log-density unchanged.

    Args:
        layout: the layout of the latents.
        log_density: vectors ``(S, D)`` to log-densities ``(S,)``; S is as large as it takes.
        points: vectors ``(S, D)``, at each of which the log-density must be unchanged; the first of them sorts out most
            candidates, so it should be in the bulk of the density and lie on no plane of symmetry.

    Example:
        >>> from pyroflows.models.structure import describe
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
        >>> layout = Layout(describe(model, (), {}))
        >>> found = find_symmetries(layout, lambda u: -u[:, 0].abs() + u[:, 1], torch.rand(5, 2))
        >>> [symmetry.signs for symmetry in found]
        [tensor([-1.,  1.])]
    """
    found = candidates(layout)
    for part in (points[:1], points[1:]):
        if not found or not len(part):
            continue
        images = torch.cat([candidate(part) for candidate in found])
        values = log_density(torch.cat([part, images]))
        before, after = values[: len(part)], values[len(part) :].reshape(len(found), len(part))
        same = (after - before).abs() <= TOLERANCE + RELATIVE_TOLERANCE * before.abs()
        found = [candidate for candidate, is_same in zip(found, same.all(-1).tolist(), strict=True) if is_same]
    return found


def candidates(layout: Layout) -> list[Symmetry]:
    """List the maps that may be symmetries, a bounded number of them, each once.

    These are sign changes of whole sites, of pairs of sites and of all sites; of a column, and of columns of several
    sites together, as those of loadings and factors; and of single entries; for sites whose entries are mapped to their
    supports one by one. Besides, exchanges of two components along one axis, and along axes of several sites together,
    as those of weights, means and scales of a mixture.
    """
    seen: set[bytes] = set()
    found = []
    for candidate in _all_candidates(layout):
        key = b"" if candidate.swaps else candidate.index.numpy().tobytes() + candidate.signs.numpy().tobytes()
        if key not in seen:
            found.append(candidate)
        if key:
            seen.add(key)
        if len(found) == MAX_CANDIDATES:
            break
    return found


def _all_candidates(layout: Layout) -> Iterator[Symmetry]:
    sites = [site for site in layout.structure.latents if _is_entrywise(layout, site)]
    whole = [layout.slices[site.name] for site in sites[:MAX_SITES]]
    everything = torch.arange(layout.dim)
    yield from (_flip(layout, [everything[s]]) for s in whole)
    yield from (_flip(layout, [everything[a], everything[b]]) for a, b in combinations(whole, 2))
    yield _flip(layout, [everything[layout.slices[site.name]] for site in sites])
    for axes in exchangeable_axes(layout):
        for group in _subsets(axes):
            components = range(group[0].size)
            if all(axis.site in sites for axis in group):
                yield from (_flip(layout, [_entries(layout, axis, k) for axis in group]) for k in components)
            yield from (_swap(layout, group, i, j) for i, j in combinations(components, 2))
    if layout.dim <= MAX_COORDINATES:
        yield from (_flip(layout, [everything[i : i + 1]]) for i in range(layout.dim))


def exchangeable_axes(layout: Layout) -> list[list[Axis]]:
    """Group the axes of all latents along which components may be exchanged by their length."""
    axes = [Axis(site, dim) for site in layout.structure.latents if _is_packed(site, layout) for dim in _dims(site)]
    return [[axis for axis in axes if axis.size == size] for size in sorted({axis.size for axis in axes})]


def permutation(layout: Layout, axes: Iterable[Axis], order: Tensor) -> Symmetry:
    """The map that permutes the components along several axes in the same way.

    Args:
        layout: the layout of the vector.
        axes: axes of one length K.
        order: the components that come to the places 0 to K - 1, ``(K,)``.
    """
    index = torch.arange(layout.dim)
    swaps = []
    for axis in axes:
        if _is_entrywise(layout, axis.site):
            part = layout.slices[axis.site.name]
            index[part] = index[part].reshape(axis.site.shape).index_select(axis.dim, order).flatten()
        else:
            swaps.append((axis, order))
    return Symmetry(index, torch.ones(layout.dim), tuple(swaps), layout)


def _swap(layout: Layout, axes: Iterable[Axis], i: int, j: int) -> Symmetry:
    axes = list(axes)
    order = torch.arange(axes[0].size)
    order[[i, j]] = order[[j, i]]
    return permutation(layout, axes, order)


def _flip(layout: Layout, entries: Iterable[Tensor]) -> Symmetry:
    signs = torch.ones(layout.dim)
    for part in entries:
        signs[part] *= -1
    return Symmetry(torch.arange(layout.dim), signs)


def _entries(layout: Layout, axis: Axis, k: int) -> Tensor:
    part = layout.slices[axis.site.name]
    return torch.arange(part.start, part.stop).reshape(axis.site.shape).select(axis.dim, k).flatten()


def _subsets(axes: list[Axis]) -> Iterator[tuple[Axis, ...]]:
    """All subsets of a few axes; of many, all together, those of a plate, one by one, and in pairs."""
    if len(axes) <= MAX_AXES:
        for size in range(len(axes), 0, -1):
            yield from combinations(axes, size)
        return
    yield tuple(axes)
    names = {name for axis in axes if (name := _plate(axis)) is not None}
    yield from (tuple(axis for axis in axes if _plate(axis) == name) for name in sorted(names))
    yield from combinations(axes, 1)
    yield from combinations(axes, 2)


def _plate(axis: Axis) -> str | None:
    names = axis.site.plate_names
    place = len(axis.site.shape) + axis.dim
    return names[place] if place < len(names) else None


def _dims(site: Site) -> list[int]:
    return [dim - len(site.shape) for dim, size in enumerate(site.shape) if 2 <= size <= MAX_COMPONENTS]


def _is_packed(site: Site, layout: Layout) -> bool:
    """Whether all entries of a site are in the vector."""
    part = layout.slices[site.name]
    return site.unconstrained_shape is not None and part.stop - part.start == prod(site.unconstrained_shape)


def _is_entrywise(layout: Layout, site: Site) -> bool:
    """Whether each entry of the vector belongs to one entry of the value; an order among them would be noticed."""
    return _is_packed(site, layout) and site.unconstrained_shape == site.shape

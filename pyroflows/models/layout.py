"""The layout of a model's latents in one unconstrained vector."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyroflows.errors import DataError, ShapeError
from pyroflows.models.bijections import Bijection
from pyroflows.models.edges import Logs
from pyroflows.models.structure import ModelStructure, Site


@dataclass(frozen=True, eq=False)
class Block:
    """Latent sites that are adjacent in the packed vector.

    Args:
        sites: the sites, in the order in which they are packed.
        start: the index of the block's first entry.
        stop: the index after its last entry.
    """

    sites: tuple[Site, ...]
    start: int
    stop: int


class Layout:
    r"""Maps the latents of a model to one unconstrained vector, and back.

    The value of each site is mapped to the reals by the bijection of its support and flattened; the sites follow one
    another in the order of the model. Nothing else in the package depends on this order. Entries of a masked site that
    do not belong to the posterior are left out of the vector; in values they stand at a constant, which is feasible.

    Args:
        structure: the structure of a model that :func:`pyroflows.models.requirements.require_flow` accepts.

    Attributes:
        structure: the structure of the model.
        dim: the size of the vector.
        dtype: the dtype of the vector.
        blocks: the blocks of the vector, so far a single one with all latents.
        slices: the entries of each latent in the vector, by site.

    Shapes:
        Vectors are ``(*batch, dim)``, and values ``(*batch, *site shape)``.

    Example:
        >>> from pyroflows.models.structure import describe
        >>> def model():
        ...     pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        >>> layout = Layout(describe(model, (), {}))
        >>> layout.slices
        {'scale': slice(0, 1, None), 'weights': slice(1, 3, None)}
        >>> values, ladj = layout.constrain(torch.zeros(7, 3))
        >>> values["weights"].shape, ladj.shape
        (torch.Size([7, 3]), torch.Size([7]))
    """

    def __init__(self, structure: ModelStructure) -> None:
        self.structure = structure
        self.dtype = structure.dtype
        self.slices: dict[str, slice] = {}
        self.dim = 0
        for site in structure.latents:
            size = _num_kept(site) * prod(_entry_shape(site))
            self.slices[site.name] = slice(self.dim, self.dim + size)
            self.dim += size
        self.blocks = (Block(structure.latents, 0, self.dim),)
        self._parts: Mapping[str, Tensor] = {}

    def split(self, vector: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """Iterate over the sites, each with its part ``(*batch, size)`` of a vector ``(*batch, dim)``."""
        for block in self.blocks:
            for site in block.sites:
                part = self._parts.get(site.name)
                yield site, vector[..., self.slices[site.name]] if part is None else part

    def with_parts(self, parts: Mapping[str, Tensor]) -> "Layout":
        """A layout that reads some sites from tensors of their own, and does not look at their places in a vector.

        So what depends on these sites alone has no gradient by the vector, which need not be computed.

        Args:
            parts: tensors ``(*batch, size)`` by site.
        """
        made = copy.copy(self)
        made._parts = parts
        return made

    def constrain(self, vector: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        r"""Map an unconstrained vector u to the values x of the latents.

        Args:
            vector: u, ``(*batch, dim)``.

        Returns:
            The values ``(*batch, *site shape)`` by site, and :math:`\log|\det \partial x / \partial u|` of all
            sites together, ``(*batch,)``. Where x has fewer free entries than entries, as on a simplex, the determinant
            is that of the free ones.

        Example:
            >>> from pyroflows.models.structure import describe
            >>> def model():
            ...     pyro.sample("scale", dist.HalfNormal(1.0))
            >>> values, ladj = Layout(describe(model, (), {})).constrain(torch.tensor([[0.0], [1.0]]))
            >>> values["scale"], ladj
            (tensor([1.0000, 2.7183]), tensor([0., 1.]))
        """
        values, ladjs = self.constrain_sites(vector)
        batch_dim = vector.dim() - 1
        totals = (sum_rightmost(ladj, ladj.dim() - batch_dim) for ladj in ladjs.values())
        return values, sum(totals, vector.new_zeros(vector.shape[:-1]))

    def constrain_sites(self, vector: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Map an unconstrained vector to the values of the latents, with the log-determinant of each site.

        Args:
            vector: an unconstrained vector, ``(*batch, dim)``.

        Returns:
            The values ``(*batch, *site shape)``, and log-determinants ``(*batch, *batch shape of the site)``, or of the
            shape of its mask, by site.
        """
        values, ladjs = {}, {}
        for site, unconstrained in self._unconstrained(vector):
            value, ladjs[site.name] = constrain_site(site, unconstrained)
            values[site.name] = value.reshape(vector.shape[:-1] + site.shape)
        return values, ladjs

    def logs(self, vector: Tensor) -> dict[str, Logs]:
        """The logarithms of the distances from the edges, see :mod:`pyroflows.models.edges`, by site that needs them.

        Args:
            vector: an unconstrained vector, ``(*batch, dim)``.

        Returns:
            Tensors ``(*batch, *site shape)``.
        """
        return {
            site.name: _bijection(site).logs(u) for site, u in self._unconstrained(vector) if _bijection(site).has_logs
        }

    def at_edges(self, vector: Tensor) -> dict[str, Tensor]:
        """Whether a component is the nearest number to an edge of its support, by site whose density depends on that.

        Args:
            vector: an unconstrained vector, ``(*batch, dim)``.

        Returns:
            Booleans ``(*batch,)``; those sites are left out for which :meth:`logs` has tensors.
        """
        batch_shape = vector.shape[:-1]
        return {
            site.name: _bijection(site).is_at_edge(u).reshape((*batch_shape, -1)).any(-1)
            for site, u in self._unconstrained(vector)
            if not _bijection(site).has_logs
        }

    @property
    def centers(self) -> dict[str, Tensor]:
        """The angles at the origin of the unconstrained space, by site on circles."""
        centers = {site.name: _bijection(site).center for site in self.structure.latents}
        return {name: center for name, center in centers.items() if center is not None}

    def at_centers(self, centers: Mapping[str, Tensor]) -> "Layout":
        """A layout with other angles at the origin, and else the same.

        Args:
            centers: angles by site on circles.
        """
        centers = {name: centers[name] for name in self.centers.keys() & centers.keys()}
        if not centers:
            return self
        latents = tuple(
            replace(site, bijection=_bijection(site).at_center(centers[site.name])) if site.name in centers else site
            for site in self.structure.latents
        )
        return Layout(replace(self.structure, latents=latents))

    def _unconstrained(self, vector: Tensor) -> Iterator[tuple[Site, Tensor]]:
        for site, part in self.split(vector):
            yield site, unpack(site, part)

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Pack values of the latents into an unconstrained vector, the inverse of :meth:`constrain`.

        Args:
            values: tensors ``(*batch, *site shape)`` by site, inside the supports of the sites.

        Returns:
            The vector, ``(*batch, dim)``.
        """
        parts = []
        for site in self.structure.latents:
            value = torch.as_tensor(values[site.name], dtype=self.dtype)
            parts.append(pack(site, _bijection(site).unconstrain(value)))
        return torch.cat(parts, -1)

    def check_draws(self, draws: Mapping[str, Tensor]) -> None:
        """Raise if draws are not values ``(S, *site shape)`` of all latent sites, with the same S.

        Args:
            draws: tensors by site.

        Raises:
            ShapeError: if a latent site is missing or has another shape.
            DataError: if a value is outside of its site's support.
        """
        num_draws = None
        for site in self.structure.latents:
            value = draws.get(site.name)
            got = None if value is None else tuple(value.shape)
            num_draws = got[0] if num_draws is None and got else num_draws
            if value is None or got != (num_draws, *site.shape):
                expected = "".join(f", {size}" for size in site.shape) or ","
                raise ShapeError(
                    f"draws of site '{site.name}' must have shape (S{expected}), got {got}, with S={num_draws}"
                )
            assert site.support is not None
            is_feasible = site.support.check(value)
            if site.kept is not None and site.kept.dim() == is_feasible.dim() - 1:
                is_feasible = is_feasible | ~site.kept
            if not is_feasible.all():
                raise DataError(f"draws of site '{site.name}' are not all in its support, {site.support}")


def pack(site: Site, unconstrained: Tensor) -> Tensor:
    """Flatten unconstrained values ``(*batch, *unconstrained_shape)`` of a site, ``(*batch, size)``."""
    shape = _bijection(site).unconstrained_shape
    flat = unconstrained.reshape(*unconstrained.shape[: unconstrained.dim() - len(shape)], shape.numel())
    return flat if site.kept is None else flat[..., _places(site).to(flat.device)]


def unpack(site: Site, part: Tensor) -> Tensor:
    """Give a part ``(*batch, size)`` of a vector the shape of a site, ``(*batch, *unconstrained_shape)``.

    Entries that are left out of the vector are zero.
    """
    shape = part.shape[:-1] + _bijection(site).unconstrained_shape
    if site.kept is None:
        return part.reshape(shape)
    # One zero behind the part serves all entries that are left out. In-place writes would not run under vmap.
    num = part.shape[-1]
    places = torch.full((_bijection(site).unconstrained_shape.numel(),), num)
    places[_places(site)] = torch.arange(num)
    extended = torch.cat([part, part.new_zeros(*part.shape[:-1], 1)], -1)
    return extended[..., places.to(part.device)].reshape(shape)


def constrain_site(site: Site, unconstrained: Tensor) -> tuple[Tensor, Tensor]:
    r"""Map unconstrained values of a site to its support, and give :math:`\log|\det \partial x / \partial u|`.

    The log-determinant has the batch shape of the site, or that of its mask; at entries that are left out it is zero.
    """
    value, ladj = _bijection(site).constrain(unconstrained)
    return value, ladj if site.kept is None else torch.where(site.kept.to(ladj.device), ladj, 0.0)


def _num_kept(site: Site) -> int:
    return 1 if site.kept is None else int(site.kept.sum())


def _entry_shape(site: Site) -> torch.Size:
    """The unconstrained shape of an entry that is kept or left out; of the whole site without a mask."""
    return _bijection(site).unconstrained_shape[0 if site.kept is None else site.kept.dim() :]


def _places(site: Site) -> Tensor:
    """The places of the entries that are kept in the flattened unconstrained value of a site."""
    assert site.kept is not None
    entries = site.kept.cpu().reshape(-1, 1).expand(-1, prod(_entry_shape(site)))
    return entries.reshape(-1).nonzero().squeeze(-1)


def _bijection(site: Site) -> Bijection:
    assert site.bijection is not None, f"site '{site.name}' has no bijection to the reals"
    return site.bijection

"""The layout of a model's latents in one unconstrained vector."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyroflows.errors import DataError, ShapeError
from pyroflows.models.bijections import Bijection
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
    another in the order of the model. Nothing else in the package depends on this order.

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
        >>> from pyroflows.models.bijections import Bijection
from pyroflows.models.structure import describe
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
            size = prod(_unconstrained_shape(site))
            self.slices[site.name] = slice(self.dim, self.dim + size)
            self.dim += size
        self.blocks = (Block(structure.latents, 0, self.dim),)

    def split(self, vector: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """Iterate over the sites, each with its part ``(*batch, size)`` of a vector ``(*batch, dim)``."""
        for block in self.blocks:
            for site in block.sites:
                yield site, vector[..., self.slices[site.name]]

    def constrain(self, vector: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        r"""Map an unconstrained vector u to the values x of the latents.

        Args:
            vector: u, ``(*batch, dim)``.

        Returns:
            The values ``(*batch, *site shape)`` by site, and :math:`\log|\det \partial x / \partial u|` of all
            sites together, ``(*batch,)``. Where x has fewer free entries than entries, as on a simplex, the determinant
            is that of the free ones.

        Example:
            >>> from pyroflows.models.bijections import Bijection
from pyroflows.models.structure import describe
            >>> def model():
            ...     pyro.sample("scale", dist.HalfNormal(1.0))
            >>> values, ladj = Layout(describe(model, (), {})).constrain(torch.tensor([[0.0], [1.0]]))
            >>> values["scale"], ladj
            (tensor([1.0000, 2.7183]), tensor([0., 1.]))
        """
        batch_shape = vector.shape[:-1]
        values = {}
        ladj = vector.new_zeros(batch_shape)
        for site, part in self.split(vector):
            unconstrained = part.reshape(batch_shape + _unconstrained_shape(site))
            value, site_ladj = _bijection(site).constrain(unconstrained)
            ladj = ladj + sum_rightmost(site_ladj, site_ladj.dim() - len(batch_shape))
            values[site.name] = value.reshape(batch_shape + site.shape)
        return values, ladj

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
            batch_shape = value.shape[: value.dim() - len(site.shape)]
            parts.append(_bijection(site).unconstrain(value).reshape((*batch_shape, -1)))
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
            if not site.support.check(value).all():
                raise DataError(f"draws of site '{site.name}' are not all in its support, {site.support}")


def _unconstrained_shape(site: Site) -> torch.Size:
    return _bijection(site).unconstrained_shape


def _bijection(site: Site) -> Bijection:
    assert site.bijection is not None, f"site '{site.name}' has no bijection to the reals"
    return site.bijection

"""The observed sites of a simulator: their values as rows of numbers, and those that a user gives as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from pyroflows.arrays import as_numbers
from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.models.masks import to_rank
from pyroflows.models.structure import Site
from pyroflows.models.supports import bounds


@dataclass(frozen=True, eq=False)
class DataSites:
    """The observed sites of a simulator.

    Args:
        shapes: the shape of a value, by site.
        dtypes: the dtype of a value, by site.
        masks: which entries count, booleans over leading dimensions, by site that has a mask.
        supports: the supports that are the same in all simulations, by site.
        is_single: whether the user named one site instead of a list, so that an embedding takes a tensor; otherwise it
            takes a dictionary.

    Shapes: a row has the entries of all sites, flattened one after the other.

    Example:
        >>> sites = DataSites({"y": torch.Size([2, 3])}, {"y": torch.float32}, {}, {}, is_single=True)
        >>> sites.rows({"y": torch.ones(5, 2, 3)}).shape
        torch.Size([5, 6])
        >>> sites.read([[1, 2, 3], [4, 5, 6]])["y"].dtype
        torch.float32
    """

    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]
    masks: Mapping[str, Tensor]
    supports: Mapping[str, Constraint]
    is_single: bool

    @classmethod
    def of(cls, sites: Mapping[str, Site], values: Mapping[str, Tensor], is_single: bool) -> "DataSites":
        """Describe sites by one run of the model, and by the values that it gave them."""
        return cls(
            {name: value.shape for name, value in values.items()},
            {name: value.dtype for name, value in values.items()},
            {name: site.mask for name, site in sites.items() if site.mask is not None},
            {name: site.support for name, site in sites.items() if site.support is not None and _is_fixed(site)},
            is_single,
        )

    @property
    def num_entries(self) -> int:
        """The number of entries of a row."""
        return sum(shape.numel() for shape in self.shapes.values())

    def rows(self, values: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Flatten values ``(*batch, *site shape)`` by site into rows ``(*batch, num_entries)``, 0 in masked entries."""
        parts = []
        for name, shape in self.shapes.items():
            value = values[name].to(dtype)
            if name in self.masks:
                value = torch.where(to_rank(self.masks[name], len(shape)), value, 0.0)
            parts.append(value.reshape(*value.shape[: value.dim() - len(shape)], shape.numel()))
        return torch.cat(parts, -1)

    def by_site(self, rows: Tensor) -> dict[str, Tensor]:
        """Give rows ``(n, num_entries)`` the shapes of the sites again, ``(n, *site shape)`` by site."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), rows.split(sizes, -1), strict=True)
        return {name: part.reshape(len(rows), *shape) for (name, shape), part in parts}

    def read(self, data: Any, num_batch_axes: int = 0) -> dict[str, Tensor]:
        """Read data as values by site.

        Args:
            data: a dictionary of values by site, or the value of the only site.
            num_batch_axes: the number of leading axes, 1 for several data sets.

        Raises:
            OptionError: if the names are not those of the sites.
            ShapeError: if a value has another shape than its site.
            DataError: if a value is not finite where it counts, or no number.
        """
        if not isinstance(data, Mapping):
            if len(self.shapes) > 1:
                raise OptionError(
                    f"data of several sites are a dictionary by site, {sorted(self.shapes)}: got {data!r}"
                )
            data = {next(iter(self.shapes)): data}
        if data.keys() != self.shapes.keys():
            raise OptionError(f"data must have values of the sites {sorted(self.shapes)}, got {sorted(data)}")
        values = {name: self._value(name, data[name], num_batch_axes) for name in self.shapes}
        if len({value.shape[:num_batch_axes] for value in values.values()}) > 1:
            raise ShapeError("the sites have values of different numbers of data sets")
        return values

    def _value(self, name: str, given: Any, num_batch_axes: int) -> Tensor:
        value = as_numbers(f"the value of site '{name}'", given).detach()
        shape, dtype = self.shapes[name], self.dtypes[name]
        if value.dim() != num_batch_axes + len(shape) or value.shape[num_batch_axes:] != shape:
            expected = tuple(shape) if not num_batch_axes else f"(data sets, {', '.join(map(str, shape))})"
            hint = ""
            if num_batch_axes and value.shape == shape:
                hint = "; a single data set is given as y[None]"
            elif not num_batch_axes and value.shape[1:] == shape:
                hint = "; draws for many data sets are made by amortized.sample"
            raise ShapeError(
                f"site '{name}' has shape {expected} in the simulations, but its value has shape "
                f"{tuple(value.shape)}: an amortised posterior takes data of the shape that it was trained on{hint}"
            )
        is_bad = ~value.isfinite()
        if name in self.masks:
            is_bad = is_bad & to_rank(self.masks[name], len(shape))
        if is_bad.any():
            raise DataError(
                f"the value of site '{name}' has {int(is_bad.sum())} NaN or infinite entries of {value.numel()}, and "
                "nothing was simulated with missing values: drop or impute them, or mask them in the model by "
                "poutine.mask and simulate anew"
            )
        support = self.supports.get(name)
        if support is not None and not support.check(value).all():
            raise DataError(f"the value of site '{name}' is not in the support of its distribution, {support}")
        cast = value.to(dtype)
        if not dtype.is_floating_point and not torch.equal(cast.to(value.dtype), value):
            raise DataError(f"the value of site '{name}' must hold integers, as the simulations do")
        return cast


def _is_fixed(site: Site) -> bool:
    """Whether the support of a site is given by numbers, and counts for all entries."""
    return (
        site.support is not None and site.mask is None and not any(isinstance(b, Tensor) for b in bounds(site.support))
    )


class SiteEmbedding(nn.Module):
    """An embedding of the user's that takes rows, to which it gives the shapes of the sites.

    Args:
        embedding: the user's module. It takes a tensor ``(n, *site shape)`` if the user named one site, or else a
            dictionary of such tensors by site, and returns vectors ``(n, k)``.
        sites: the observed sites.
    """

    def __init__(self, embedding: nn.Module, sites: DataSites) -> None:
        super().__init__()
        self.embedding = embedding
        self.sites = sites

    def forward(self, rows: Tensor) -> Tensor:
        values = self.sites.by_site(rows)
        return self.embedding(next(iter(values.values())) if self.sites.is_single else values)

"""What a call of a model shows of its plates: how many rows, and which."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyroflows.models.layout import Layout
from pyroflows.models.levels import SiteLevel, levels_of
from pyroflows.models.structure import Site, describe
from pyroflows.models.tracing import Model


def random_rows(size: int, count: int) -> Tensor:
    """Draw indices of different rows, uniformly, ``(count,)``.

    Args:
        size: the number of all rows.
        count: the number of rows to draw, at most ``size``.

    Example:
        >>> random_rows(1_000_000, 10).unique().shape
        torch.Size([10])
    """
    if count**2 > size:
        return torch.randperm(size)[:count]
    while True:  # a draw with repeated rows, of which there is a chance below a half, is left out
        rows = torch.randint(size, (count,))
        if len(rows.unique()) == count:
            return rows


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a model whose plates may see a part of their rows.

    Where they do, the layout has a place for each row, also for those that a mask leaves out.

    Args:
        layout: the layout of the latents of this call.
        levels: their levels.
        given: the place, among the tensors of the arguments, of the rows of each plate that is given them, by plate;
            None where they are no argument, so that only a run of the model shows them.
    """

    layout: Layout
    levels: tuple[SiteLevel, ...]
    given: Mapping[str, int | None]

    @property
    def partial(self) -> tuple[str, ...]:
        """The names of the plates whose rows are a part of all, or are given in an order of their own."""
        plates = self.layout.structure.plates
        return tuple(name for name, plate in plates.items() if plate.is_subsampled or name in self.given)


class Calls:
    """The kinds of calls of a model, of which those with tensors of equal shapes are one.

    Args:
        model: the Pyro model.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._found: dict[Any, Call] = {}

    def kind(self, args: Any, kwargs: Any) -> Call:
        """The kind of a call; one that was not seen before runs the model."""
        leaves, spec = tree_flatten((args, kwargs))
        kinds = ((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        key = (str(spec), tuple(kinds))
        if key not in self._found:
            rows = GivenRows()
            structure = describe(rows(self._model), args, kwargs).summed_out()
            if structure.subsampled:
                structure = replace(structure, latents=tuple(_with_all_rows(site) for site in structure.latents))
            layout = Layout(structure)
            places = {
                name: next((i for i, leaf in enumerate(leaves) if leaf is given), None)
                for name, given in rows.found.items()
            }
            self._found[key] = Call(layout, levels_of(layout), places)
        return self._found[key]

    def given_rows(self, call: Call, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """The rows of plates that are given them, by plate."""
        if not call.given:
            return {}
        leaves, _ = tree_flatten((args, kwargs))
        if None not in call.given.values():
            return {name: leaves[place] for name, place in call.given.items() if place is not None}
        with poutine.block(), GivenRows() as rows, torch.no_grad():
            self._model(*args, **kwargs)
        return rows.found


def _with_all_rows(site: Site) -> Site:
    """A site whose rows are all in the packed vector, since other calls see rows that are masked otherwise."""
    is_by_row = site.kept is not None and site.kept.dim() <= len(site.shape) - site.event_dim
    return replace(site, kept=None) if is_by_row and site.plate_scale != 1 else site


class GivenRows(Messenger):
    """An effect handler that notes the rows of plates with ``subsample=``.

    Attributes:
        found: the rows, by plate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample" and msg["value"] is not None:
            self.found[msg["name"]] = msg["value"]

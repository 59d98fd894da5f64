"""The entries of masked latents that have no posterior: given the rest, they follow their own priors."""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.util import ignore_jit_warnings
from torch import Tensor

from pyroflows.models.masks import drawn_where_left_out, entry_mask, require_same_mask
from pyroflows.models.structure import ModelStructure
from pyroflows.models.tracing import Model


def with_left_out(
    values: dict[str, Tensor], structure: ModelStructure, model: Model, args: Any, kwargs: Any
) -> dict[str, Tensor]:
    """Draw the entries of masked latents that have no posterior, given the rest, by a run of the model.

    The run also shows whether the masks are those of the structure.

    Args:
        values: values by latent site.
        structure: the structure of the model.
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ModelError: if a latent has another mask; names the site.
    """
    if all(site.mask is None for site in structure.latents):
        return values
    left_out = _LeftOut(values, structure)
    # The guide's handlers must not see this run, whose draws carry no gradients.
    with poutine.block(), left_out, pyro.validation_enabled(False), ignore_jit_warnings(), torch.no_grad():
        model(*args, **kwargs)
    return {
        name: torch.where(structure.kept[name].to(value.device), value, left_out.values[name])
        if name in structure.kept
        else value
        for name, value in values.items()
    }


class _LeftOut(Messenger):
    """An effect handler that gives latents their values, and draws the entries without a posterior."""

    def __init__(self, values: Mapping[str, Tensor], structure: ModelStructure) -> None:
        super().__init__()
        self.values = dict(values)
        self._sites = {site.name: site for site in structure.latents}
        self._kept = structure.kept

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self.values:
            return
        site = self._sites[name]
        require_same_mask(name, site.mask, entry_mask(fn, msg["mask"], site.shape))
        if name in self._kept:
            self.values[name] = drawn_where_left_out(fn, self.values[name], self._kept[name])
        msg["value"] = self.values[name]

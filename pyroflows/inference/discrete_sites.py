"""Draws of the discrete latents that a fit sums out, and of what follows from them."""

from typing import Any

import pyro
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.models.batching import BatchedModel
from pyroflows.models.run import SiteValues
from pyroflows.models.structure import Enumeration, ModelStructure, Site, describe
from pyroflows.models.tracing import Model


def completed(
    batched: BatchedModel, structure: ModelStructure, values: dict[str, Tensor], num_draws: int
) -> dict[str, Tensor]:
    """Add discrete and deterministic sites to draws of the other latents.

    Discrete sites are drawn from their joint conditional given the others. Entries of masked latents that have no
    posterior are drawn from their prior given the rest. Sites in a subsampled plate, whose rows differ from run to run,
    are left out.

    Args:
        batched: the model, which sums its discrete sites out.
        structure: its structure.
        values: draws ``(num_draws, *site shape)`` by latent site.
        num_draws: the number of draws.
    """
    subsampled = {plate.name for plate in structure.subsampled}

    def names_of(sites: tuple[Site, ...]) -> list[str]:
        return [site.name for site in sites if not subsampled.intersection(site.plate_names)]

    discrete, deterministic = names_of(structure.enumerated), names_of(structure.deterministic)
    values = dict(values)
    if structure.enumerated:
        drawn = batched.discrete_draws.in_chunks(values, num_draws).values
        values |= {name: drawn[name] for name in discrete}
    kept = structure.kept
    if not deterministic and not kept:
        return values
    if len(discrete) < len(structure.enumerated):
        batched = batched.drawing(values, kept)
    elif kept or structure.enumerated:
        batched = batched.filling(values, kept)
    recorded = batched.in_chunks(values, num_draws).values
    return {name: recorded[name] for name in (*values, *deterministic)}


def without_local(structure: ModelStructure, values: SiteValues) -> dict[str, Tensor]:
    """Draws without those of discrete latents that belong to rows of data, which do not serve other rows."""
    return {name: value for name, value in values.items() if name not in structure.local}


def local_draws(
    model: Model, args: Any, kwargs: Any, structure: ModelStructure, values: SiteValues, num_draws: int
) -> dict[str, Tensor]:
    """Draw the discrete latents that belong to rows of data, given data at other arguments.

    Args:
        model: a Pyro model.
        args: the new arguments.
        kwargs: the new keyword arguments.
        structure: the structure of the model at the arguments of the fit.
        values: draws ``(num_draws, *site shape)`` of all other latents, by site.
        num_draws: the number of draws.

    Returns:
        Draws ``(num_draws, *site shape)`` by site; none without data, where the sites follow their prior.
    """
    first = {name: value[0] for name, value in values.items()}
    with pyro.validation_enabled(False):
        here = describe(model, args, kwargs, init_to_value(values=first))
    data = {site.name for site in structure.observed}
    anew = [site for site in here.latents if site.name not in values]
    names = frozenset(site.name for site in anew if site.is_enumerable and site.name not in data)
    if not names or not here.observed:
        return {}
    unscored = frozenset(site.name for site in anew if site.name not in names)
    enumeration = Enumeration(names, here.max_plate_nesting, shares_results=False, unscored=unscored)
    batched = BatchedModel(model, args, kwargs, values, enumeration=enumeration)
    return batched.discrete_draws.in_chunks(values, num_draws).values

"""Draws from a whole model: posterior predictive, prior and prior predictive."""

from torch import Tensor

from pyroflows.errors import warn
from pyroflows.models.batching import BatchedModel
from pyroflows.models.run import SiteValues
from pyroflows.models.structure import ModelStructure


def posterior_predictive(batched: BatchedModel, latents: SiteValues, num_samples: int) -> dict[str, Tensor]:
    """Draw the observed and deterministic sites given draws of the latents, ``(num_samples, *site shape)`` by site.

    Args:
        batched: the model, in a form that draws every site without a given value.
        latents: draws ``(num_samples, *site shape)`` by site.
        num_samples: the number of draws.
    """
    values = batched.in_chunks(latents, num_samples).values
    return {name: value for name, value in values.items() if name not in latents}


def prior_draws(
    batched: BatchedModel, structure: ModelStructure, num_samples: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw from the prior: the latent and deterministic sites, and apart from them the observed sites.

    Where a prior cannot be drawn from, a warning says so, and both results are empty.

    Args:
        batched: the model.
        structure: its structure.
        num_samples: the number of draws.
    """
    flat = [site.name for site in structure.latents if site.is_flat]
    if flat:
        warn(
            f"the priors of {flat} are flat and cannot be drawn from: prior and prior predictive draws are left out",
        )
        return {}, {}
    try:
        values = batched.drawing({}).in_chunks({}, num_samples).values
    # A prior may have no sampler, and the rest of the model may refuse what is drawn.
    except (NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warn(f"prior and prior predictive draws are left out, since drawing fails: {reason}")
        return {}, {}
    observed = {site.name for site in structure.observed}
    return (
        {name: value for name, value in values.items() if name not in observed},
        {name: value for name, value in values.items() if name in observed},
    )

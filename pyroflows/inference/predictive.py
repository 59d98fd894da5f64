"""Draws of a whole model: posterior predictive and prior."""

import warnings

from torch import Tensor

from pyroflows.models.batching import BatchedModel, SiteValues
from pyroflows.models.structure import ModelStructure


def posterior_predictive(batched: BatchedModel, latents: SiteValues, num_samples: int) -> dict[str, Tensor]:
    """Draws ``(num_samples, ...)`` of the observed and deterministic sites, given draws of the latents.

    Args:
        batched: the model, drawing what has no value.
        latents: draws by site ``(num_samples, *site shape)``.
        num_samples: the number of draws.
    """
    values = batched.in_chunks(latents, num_samples).values
    return {name: value for name, value in values.items() if name not in latents}


def prior_draws(
    batched: BatchedModel, structure: ModelStructure, num_samples: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Prior draws of latent and deterministic sites, and of observed sites; both empty where a prior has no sampler."""
    flat = [site.name for site in structure.latents if site.is_flat]
    if flat:
        warnings.warn(
            f"the priors of {flat} are flat and cannot be drawn from: prior and prior predictive draws are left out",
            stacklevel=2,
        )
        return {}, {}
    try:
        values = batched.drawing({}).in_chunks({}, num_samples).values
    except (NotImplementedError, ValueError) as error:  # no sampler, or a draw that the rest of the model refuses
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"prior and prior predictive draws are left out, since drawing fails: {reason}", stacklevel=2)
        return {}, {}
    observed = {site.name for site in structure.observed}
    return (
        {name: value for name, value in values.items() if name not in observed},
        {name: value for name, value in values.items() if name in observed},
    )

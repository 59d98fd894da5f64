"""Draws from a whole model: posterior predictive, prior and prior predictive."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyroflows.models.batching import BatchedModel
from pyroflows.models.replicates import SamplerError
from pyroflows.models.run import RunRecord, SiteValues
from pyroflows.models.structure import ModelStructure, Site

Reasons = dict[str, str]  # by site: why it is left out, as a clause


def posterior_predictive(batched: BatchedModel, latents: SiteValues, num_samples: int) -> dict[str, Tensor]:
    """Draw the observed and deterministic sites given draws of the latents, ``(num_samples, *site shape)`` by site.

    Args:
        batched: the model, in a form that draws every site without a given value.
        latents: draws ``(num_samples, *site shape)`` by site.
        num_samples: the number of draws.
    """
    values = batched.in_chunks(latents, num_samples).values
    return {name: value for name, value in values.items() if name not in latents}


def replicates(
    batched: BatchedModel, observed: Sequence[Site], latents: SiteValues, num_samples: int
) -> tuple[dict[str, Tensor], Reasons]:
    """Draw the observed sites given draws of the latents, except those that cannot be drawn.

    Args:
        batched: the model.
        observed: its observed sites.
        latents: draws ``(num_samples, *site shape)`` by site.
        num_samples: the number of draws.

    Returns:
        Tensors ``(num_samples, *site shape)`` by site, in the shape of the data, and why other sites are left out.
    """
    return _drawn(lambda undrawn: batched.drawing(latents, undrawn=undrawn), latents, num_samples, observed, (), {})


def prior_draws(
    batched: BatchedModel, structure: ModelStructure, num_samples: int
) -> tuple[dict[str, Tensor], Reasons]:
    """Draw all sites from the prior, observed ones included, except those that cannot be drawn.

    Args:
        batched: the model.
        structure: its structure.
        num_samples: the number of draws.

    Returns:
        Tensors ``(num_samples, *site shape)`` by site, and why other sites are left out.
    """
    flat = {site.name: "its prior is flat (give it a proper one)" for site in structure.latents if site.is_flat}
    sampled = (*structure.latents, *structure.enumerated, *structure.observed)
    return _drawn(
        lambda undrawn: batched.drawing({}, undrawn=undrawn), {}, num_samples, sampled, structure.deterministic, flat
    )


def _drawn(
    drawing: Callable[[frozenset[str]], BatchedModel],
    given: SiteValues,
    num_samples: int,
    sampled: Sequence[Site],
    deterministic: Sequence[Site],
    undrawn: Reasons,
) -> tuple[dict[str, Tensor], Reasons]:
    """Draw sites anew without each that turns out to have no draws, and leave out what follows from those."""
    undrawn, roots = dict(undrawn), list(undrawn)
    names = [site.name for site in (*sampled, *deterministic)]
    while True:
        try:
            record = drawing(frozenset(undrawn)).in_chunks(given, num_samples)
            break
        except SamplerError as error:
            # A sampler may fail because it has been given NaN.
            follows = error.has_sampler and bool(roots)
            undrawn[error.site] = f"it follows from {_listed(roots)}" if follows else error.reason
            roots += [] if follows else [error.site]
        except Exception as error:  # the rest of a model may refuse what is drawn, and NaN in place of a draw
            lines = str(error).splitlines() or [""]
            without = f" without {_listed(roots)}" if roots else ""
            reason = f"the model fails{without} with [{type(error).__name__}: {lines[0]}]"
            return {}, dict.fromkeys(names, reason) | {n: r for n, r in undrawn.items() if n in names}
    reasons = {name: reason for name, reason in undrawn.items() if name in names}
    # A model may compute NaN on purpose, unless it has been given NaN.
    for site in (*sampled, *(deterministic if undrawn else ())):
        if site.name in undrawn or not (num_nan := _num_nan(record, site.name)):
            continue
        if undrawn and num_nan == num_samples:
            reasons[site.name] = f"it follows from {_listed(roots)}"
        else:
            reasons[site.name] = (
                f"{num_nan} of {num_samples} draws are NaN, as where a scale overflows, or a matrix has no Cholesky "
                "factor (narrower priors help)"
            )
    for site in sampled:
        shape = record.values[site.name].shape[1:] if site.name not in undrawn else site.full_shape
        if shape != site.full_shape:
            reasons.setdefault(
                site.name, f"its draws have shape {tuple(shape)}, and its value has shape {tuple(site.full_shape)}"
            )
    return {name: record.values[name] for name in names if name not in reasons}, reasons


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _num_nan(record: RunRecord, name: str) -> int:
    """The number of draws at which a site is NaN, or has a log-density of NaN: not every sampler passes NaN on."""
    tensors = [record.values[name], *([record.log_probs[name]] if name in record.log_probs else [])]
    is_nan = [tensor.isnan().reshape(len(tensor), -1).any(-1) for tensor in tensors]
    return int(torch.stack(is_nan).any(0).sum())

"""Convert draws, with the model's predictions and likelihoods at them, to ArviZ data."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.grad_mode import with_gradients
from pyroflows.inference.arviz import to_arviz_data
from pyroflows.inference.predictive import posterior_predictive as draw_posterior_predictive
from pyroflows.inference.predictive import prior_draws
from pyroflows.models.arguments import usable_arguments
from pyroflows.models.batching import BatchedModel
from pyroflows.models.masks import to_rank
from pyroflows.models.requirements import describe_for_flow
from pyroflows.models.structure import ModelStructure, Site
from pyroflows.models.tracing import Model

Arrays = dict[str, np.ndarray]


@with_gradients
def to_arviz(
    draws: Mapping[str, Tensor],
    model: Model | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_chains: int = 1,
    sample_stats: Mapping[str, Tensor] | None = None,
    log_likelihood: bool = True,
    posterior_predictive: bool = True,
    prior: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Convert draws to ArviZ data: InferenceData (ArviZ 0.x) or DataTree (1.x), whichever is installed.

    Args:
        draws: tensors ``(S, *site shape)`` by site.
        model: the Pyro model of the draws; None for a posterior group alone.
        args: its positional arguments.
        kwargs: its keyword arguments.
        num_chains: number of chains of equal length, whose draws follow one another; must divide S.
        sample_stats: tensors ``(S,)`` by name.
        log_likelihood: whether to add the pointwise log-likelihood, which ``az.loo`` needs, of all observations that
            are not masked.
        posterior_predictive: whether to add posterior predictive draws.
        prior: whether to add S prior and prior predictive draws; priors that cannot be drawn from are left out with a
            warning.
        coords: coordinates by dimension.
        dims: dimension names by site; a dimension of a plate has the plate's name by default.

    Raises:
        ModelError: if a flow could not fit the model, or the draws do not fit its sites; names the site.

    Example:
        >>> data = to_arviz({"mu": torch.zeros(100)})
        >>> data["posterior"]["mu"].shape
        (1, 100)
    """
    structure = batched = None
    if model is not None:
        args, kwargs = usable_arguments(model, tuple(args), dict(kwargs or {}))
        first = {name: value[0] for name, value in draws.items()}
        structure, _ = describe_for_flow(model, args, kwargs, init_to_value(values=first))
        batched = BatchedModel(model, args, kwargs, {site.name: draws[site.name] for site in structure.latents})
    return arviz_data(
        draws,
        structure,
        batched,
        num_chains=num_chains,
        sample_stats=sample_stats,
        log_likelihood=log_likelihood,
        posterior_predictive=posterior_predictive,
        prior=prior,
        coords=coords,
        dims=dims,
    )


def arviz_data(
    draws: Mapping[str, Tensor],
    structure: ModelStructure | None,
    batched: BatchedModel | None,
    *,
    num_chains: int = 1,
    sample_stats: Mapping[str, Tensor] | None = None,
    log_likelihood: bool = True,
    posterior_predictive: bool = True,
    prior: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Convert draws as :func:`to_arviz` does, with a model that was described before, or None for both."""
    groups: dict[str, Arrays] = {
        "posterior": _in_chains(draws, num_chains),
        "sample_stats": _in_chains(_double(sample_stats or {}), num_chains),
    }
    named: dict[str, list[str]] = {}
    rows: dict[str, np.ndarray] = {}
    if structure is not None and batched is not None:
        num_samples = len(next(iter(draws.values())))
        latents = {site.name: draws[site.name] for site in structure.latents}
        named = _dims(structure)
        if structure.observed:
            # A scale weights an observation in the log joint; the likelihood of the observation is without it.
            record = batched.unscaled().in_chunks(latents, num_samples)
            observed_data = {s.name: _with_missing(s, record.values[s.name][0]) for s in structure.observed}
            groups["observed_data"] = {name: _array(value) for name, value in observed_data.items()}
            if log_likelihood:
                log_probs = {s.name: record.log_probs[s.name] for s in structure.observed}
                groups["log_likelihood"] = _in_chains(_double(log_probs), num_chains)
                rows = {s.name: _seen_rows(s, observed_data[s.name]).cpu().numpy() for s in structure.observed}
            if posterior_predictive:
                drawn = draw_posterior_predictive(batched.drawing(latents), latents, num_samples)
                observed = {s.name: drawn[s.name] for s in structure.observed}
                groups["posterior_predictive"] = _in_chains(observed, num_chains)
        if prior:
            latent, predicted = prior_draws(batched, structure, num_samples)
            groups["prior"], groups["prior_predictive"] = _in_chains(latent, 1), _in_chains(predicted, 1)
    attrs = {"inference_library": "pyroflows", "inference_library_version": version("pyroflows")}
    return to_arviz_data(groups, coords=coords, dims={**named, **(dims or {})}, attrs=attrs, seen_rows=rows)


def _with_missing(site: Site, value: Tensor) -> Tensor:
    """An observed value, NaN where it is masked."""
    if site.mask is None or site.mask.all():
        return value
    value = value if value.is_floating_point() else value.double()
    return torch.where(to_rank(site.mask, value.dim()).to(value.device), value, torch.nan)


def _seen_rows(site: Site, value: Tensor) -> Tensor:
    """The observations, in the batch shape of a site, that are not missing altogether."""
    is_seen = ~value.isnan()
    return is_seen.reshape(*value.shape[: value.dim() - site.event_dim], -1).any(-1)


def _dims(structure: ModelStructure) -> dict[str, list[str]]:
    """Name the dimensions of sites in plates; dimensions without a plate are numbered, as ArviZ does."""
    sites: tuple[Site, ...] = (*structure.latents, *structure.deterministic, *structure.observed)
    named = {}
    for site in sites:
        if any(site.plate_names):
            plates = (*site.plate_names, *[None] * site.event_dim)
            named[site.name] = [plate or f"{site.name}_dim_{i}" for i, plate in enumerate(plates)]
    return named


def _double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cast to float64, since ArviZ's own sums in float32 can be NaN."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _in_chains(tensors: Mapping[str, Tensor], num_chains: int) -> Arrays:
    return {name: _array(tensor.unflatten(0, (num_chains, -1))) for name, tensor in tensors.items()}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()

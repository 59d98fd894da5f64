"""Draws, and what the model says of them, as ArviZ data."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.inference.arviz import to_arviz_data
from pyroflows.inference.batching import BatchedModel
from pyroflows.inference.predictive import posterior_predictive as draw_posterior_predictive
from pyroflows.inference.predictive import prior_draws
from pyroflows.model import Model, ModelStructure, Site, inspect_model

Arrays = dict[str, np.ndarray]


def to_arviz(
    draws: Mapping[str, Tensor],
    model: Model | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    sample_stats: Mapping[str, Tensor] | None = None,
    log_likelihood: bool = True,
    posterior_predictive: bool = True,
    prior: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """ArviZ data of one chain: InferenceData (ArviZ 0.x) or DataTree (1.x), whichever is installed.

    Args:
        draws: site to tensor ``(S, *site shape)``.
        model: the Pyro model of the draws; without it there are no groups but the posterior.
        args: its positional arguments.
        kwargs: its keyword arguments.
        sample_stats: name to tensor ``(S,)``.
        log_likelihood: whether to add the pointwise log-likelihood, which ``az.loo`` needs.
        posterior_predictive: whether to add posterior predictive draws.
        prior: whether to add S prior and prior predictive draws; priors that cannot be drawn from are left out with a
            warning.
        coords: coordinates by dimension.
        dims: dimension names by site; plates name theirs.

    Example:
        >>> data = to_arviz({"mu": torch.zeros(100)})
        >>> data["posterior"]["mu"].shape
        (1, 100)
    """
    groups: dict[str, Arrays] = {
        "posterior": _one_chain(draws),
        "sample_stats": _one_chain(_double(sample_stats or {})),
    }
    named: dict[str, list[str]] = {}
    if model is not None:
        kwargs = kwargs or {}
        first = {name: value[0] for name, value in draws.items()}
        structure = inspect_model(model, args, kwargs, init_to_value(values=first))
        num_samples = len(next(iter(draws.values())))
        latents = {site.name: draws[site.name] for site in structure.latents}
        named = _dims(structure)
        if structure.observed:
            record = BatchedModel(model, args, kwargs, latents).in_chunks(latents, num_samples)
            groups["observed_data"] = {s.name: _array(record.values[s.name][0]) for s in structure.observed}
            if log_likelihood:
                groups["log_likelihood"] = _one_chain(
                    _double({s.name: record.log_probs[s.name] for s in structure.observed})
                )
            if posterior_predictive:
                drawn = draw_posterior_predictive(model, args, kwargs, latents, num_samples)
                groups["posterior_predictive"] = _one_chain({s.name: drawn[s.name] for s in structure.observed})
        if prior:
            latent, observed = prior_draws(model, args, kwargs, structure, num_samples)
            groups["prior"], groups["prior_predictive"] = _one_chain(latent), _one_chain(observed)
    attrs = {"inference_library": "pyroflows", "inference_library_version": version("pyroflows")}
    return to_arviz_data(groups, coords=coords, dims={**named, **(dims or {})}, attrs=attrs)


def _dims(structure: ModelStructure) -> dict[str, list[str]]:
    """Dimension names of the sites in plates; dimensions without a plate are numbered, as ArviZ does."""
    sites: tuple[Site, ...] = (*structure.latents, *structure.deterministic, *structure.observed)
    named = {}
    for site in sites:
        if any(site.plates):
            plates = (*site.plates, *[None] * (len(site.shape) - len(site.plates)))
            named[site.name] = [plate or f"{site.name}_dim_{i}" for i, plate in enumerate(plates)]
    return named


def _double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float64: ArviZ's own sums in float32 can come out NaN."""
    return {name: tensor.double() for name, tensor in tensors.items()}


def _one_chain(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: _array(tensor)[None] for name, tensor in tensors.items()}


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()

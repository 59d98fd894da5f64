"""Convert draws, with the model's predictions and likelihoods at them, to ArviZ data."""

from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.errors import ModelError, OptionError, warn
from pyroflows.grad_mode import isolated
from pyroflows.inference.arviz import SAMPLED_GROUPS, to_arviz_data
from pyroflows.inference.arviz_names import ArvizNames
from pyroflows.inference.predictive import Reasons, prior_draws, replicates
from pyroflows.models.arguments import require_arguments, usable_arguments
from pyroflows.models.batching import BatchedModel
from pyroflows.models.masks import to_rank
from pyroflows.models.requirements import describe_for_flow
from pyroflows.models.run import RunRecord
from pyroflows.models.structure import ModelStructure, Site
from pyroflows.models.tracing import Model
from pyroflows.randomness import seeded

Arrays = dict[str, np.ndarray]
PREDICTED_GROUPS = ("observed_data", "posterior_predictive", "prior_predictive")
MAX_NAMES = 5  # in a warning
# The option that asks for a group, by the group that may lack sites.
OPTIONS = {
    "log_likelihood": "log_likelihood",
    "posterior_predictive": "posterior_predictive",
    "prior": "prior",
    "prior_predictive": "prior",
}


@isolated
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
    seed: int | None = None,
) -> Any:
    """Convert draws to ArviZ data: InferenceData (ArviZ 0.x) or DataTree (1.x), whichever is installed.

    What cannot be drawn or scored is left out, and one warning says which site of which group, and why. Names that
    ArviZ cannot take are changed with a warning.

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
        prior: whether to add S prior and prior predictive draws.
        coords: labels by dimension.
        dims: dimension names by site; a dimension of a plate has the plate's name by default.
        seed: seed that makes the predictive and prior draws reproducible and leaves the global generator as it was;
            None to use the global generator.

    Raises:
        OptionError: if the model does not take these arguments.
        ModelError: if a flow could not fit the model, or the draws do not fit its sites; names the site.
        OptionError: if ``coords`` or ``dims`` name what does not exist, or give a wrong number of labels.

    Example:
        >>> data = to_arviz({"mu": torch.zeros(100)})
        >>> data["posterior"]["mu"].shape
        (1, 100)
    """
    lengths = {len(value) for value in draws.values()}
    if len(lengths) != 1 or num_chains < 1 or lengths.pop() % num_chains:
        shapes = {name: tuple(value.shape) for name, value in draws.items()}
        raise OptionError(f"draws need one length at all sites, which num_chains={num_chains} divides, got {shapes}")
    structure = batched = None
    if model is not None:
        require_arguments(model, args, kwargs or {})
        args, kwargs = usable_arguments(model, tuple(args), dict(kwargs or {}))
        first = {name: value[0] for name, value in draws.items()}
        structure, _ = describe_for_flow(model, args, kwargs, init_to_value(values=first))
        names = [site.name for site in structure.latents]
        if missing := [name for name in names if name not in draws]:
            raise ModelError(f"draws of site '{missing[0]}' are missing: the latents of the model are {names}")
        latents = {name: draws[name] for name in names}
        batched = BatchedModel(model, args, kwargs, latents, needs_densities=False, enumeration=structure.enumeration)
    with seeded(seed):
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
    groups: dict[str, Mapping[str, Tensor]] = {"posterior": draws, "sample_stats": _double(sample_stats or {})}
    left_out: dict[str, Reasons] = {}
    seen_rows: dict[str, Tensor] = {}
    if structure is not None and batched is not None:
        num_samples = len(next(iter(draws.values())))
        latents = {site.name: draws[site.name] for site in structure.latents}
        if structure.observed:
            # A scale weights an observation in the log joint; the likelihood of the observation is without it.
            record = batched.unscaled().in_chunks(latents, num_samples)
            data = {site.name: _observed(site, record.values[site.name][0]) for site in structure.observed}
            groups["observed_data"] = data
            if log_likelihood:
                seen_rows = {site.name: _seen_rows(site, data[site.name]) for site in structure.observed}
                found = _likelihoods(structure, record, batched.groups)
                groups["log_likelihood"], left_out["log_likelihood"] = found
            if posterior_predictive:
                groups["posterior_predictive"], left_out["posterior_predictive"] = replicates(
                    batched, structure.observed, latents | _discrete(structure, batched, draws), num_samples
                )
        elif structure.factors:
            reason = "a factor has no values and no log-density of single observations (observe them by pyro.sample)"
            asked = {"log_likelihood": log_likelihood, "posterior_predictive": posterior_predictive}
            left_out = {group: {structure.factors[0].name: reason} for group, is_asked in asked.items() if is_asked}
        if prior:
            names = [site.name for site in structure.observed]
            groups |= prior_groups(batched, structure, names, num_samples, left_out)
    sites: tuple[Site, ...] = ()
    if structure is not None:
        sites = (*structure.latents, *structure.enumerated, *structure.deterministic, *structure.observed)
    return labelled_data(groups, sites, left_out, coords, dims, num_chains, seen_rows)


def prior_groups(
    batched: BatchedModel,
    structure: ModelStructure,
    data: Collection[str],
    num_samples: int,
    left_out: dict[str, Reasons],
) -> dict[str, Mapping[str, Tensor]]:
    """Draw the groups prior and prior_predictive.

    Args:
        batched: the model.
        structure: its structure.
        data: the names of the sites that are data.
        num_samples: the number of draws.
        left_out: gets the reasons why sites are left out, by group and site.
    """
    drawn, reasons = prior_draws(batched, structure, num_samples)
    groups: dict[str, Mapping[str, Tensor]] = {}
    for group, is_data in (("prior", False), ("prior_predictive", True)):
        groups[group] = {name: value for name, value in drawn.items() if (name in data) == is_data}
        left_out[group] = {name: reason for name, reason in reasons.items() if (name in data) == is_data}
    return groups


def labelled_data(
    groups: Mapping[str, Mapping[str, Tensor]],
    sites: Sequence[Site],
    left_out: Mapping[str, Reasons],
    coords: Mapping[str, Sequence[Any]] | None,
    dims: Mapping[str, Sequence[str]] | None,
    num_chains: int = 1,
    seen_rows: Mapping[str, Tensor] | None = None,
) -> Any:
    """Name sites and dimensions of groups, and convert them to ArviZ data.

    Args:
        groups: by group, tensors by site: draws ``(S, *site shape)``, or observed values.
        sites: the sites of the model, whose plates name dimensions.
        left_out: the reasons why sites of a group are left out, by group and site, of which a warning tells.
        coords: labels by dimension.
        dims: dimension names by site.
        num_chains: the number of chains of the posterior; draws of the prior are one.
        seen_rows: the observations that are not missing, as booleans by site of the log-likelihood.

    Raises:
        OptionError: if ``coords`` or ``dims`` name what does not exist, or give a wrong number of labels.
    """
    chains = {group: 1 if group.startswith("prior") else num_chains for group in SAMPLED_GROUPS}
    arrays = {
        group: {name: _array(tensor, chains.get(group)) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }
    arrays |= {group: _counted(arrays[group], sites) for group in PREDICTED_GROUPS if group in arrays}
    names = ArvizNames.of(arrays, sites, coords, dims)
    for text in (_left_out_in_words(left_out), _renamed_in_words(names)):
        if text:
            warn(text)
    new = names.sites
    renamed = {
        group: {name if group == "sample_stats" else new.get(name, name): array for name, array in of_group.items()}
        for group, of_group in arrays.items()
    }
    return to_arviz_data(
        renamed,
        coords=names.coords,
        dims={new.get(name, name): dims for name, dims in names.dims.items()},
        attrs={"inference_library": "pyroflows", "inference_library_version": version("pyroflows")},
        seen_rows={new.get(name, name): rows.cpu().numpy() for name, rows in (seen_rows or {}).items()},
    )


def _discrete(structure: ModelStructure, batched: BatchedModel, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The draws of the discrete latents, which are drawn given the others if they are not among the draws."""
    names = [site.name for site in structure.enumerated]
    if any(name not in draws for name in names):
        draws = batched.discrete_draws.in_chunks(draws, len(next(iter(draws.values())))).values
    return {name: draws[name] for name in names}


def _likelihoods(
    structure: ModelStructure, record: RunRecord, groups: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, Tensor], Reasons]:
    """The log-likelihoods of single observations, and why those of other sites are left out.

    Observations that depend on the same discrete latents, which are summed out, have one log-likelihood together.
    """
    log_probs: dict[str, Tensor] = {}
    reasons: Reasons = {}
    observed = {site.name for site in structure.observed}
    joint = {name: key for key, names in groups.items() for name in names}
    for key, names in groups.items():
        if others := [name for name in names if name not in observed]:
            why = f"discrete latents are summed out of it together with those of the density of '{others[0]}'"
            reasons |= dict.fromkeys((name for name in names if name in observed), why)
        elif len(names) > 1:
            log_probs[key] = record.log_probs[key]
    for site in structure.observed:
        if site.name in reasons or joint.get(site.name, site.name) in log_probs:
            continue
        if site.name not in record.log_probs:
            reasons[site.name] = f"its distribution {site.family} has no log-density (give the class a method log_prob)"
            continue
        log_prob = record.log_probs[site.name]
        is_nan = log_prob.isnan().reshape(len(log_prob), -1).any(-1)
        if site.is_flat and site.mask is None:
            reasons[site.name] = f"its distribution {site.family} has no density of its own (give it a proper one)"
        elif is_nan.any():
            reasons[site.name] = f"it is NaN at {int(is_nan.sum())} of {len(is_nan)} draws"
        else:
            log_probs[site.name] = log_prob
    return _double(log_probs), reasons


def _observed(site: Site, value: Tensor) -> Tensor:
    """An observed value in the shape of its replicates, NaN where it is masked."""
    value = value.expand(site.full_shape)
    if site.mask is None or site.mask.all():
        return value
    value = value if value.is_floating_point() else value.double()
    return torch.where(to_rank(site.mask, value.dim()).to(value.device), value, torch.nan)


def _seen_rows(site: Site, value: Tensor) -> Tensor:
    """The observations, in the batch shape of a site, that are not missing altogether."""
    is_seen = ~value.isnan()
    return is_seen.reshape(*value.shape[: value.dim() - site.event_dim], -1).any(-1)


def _counted(arrays: Arrays, sites: Sequence[Site]) -> Arrays:
    """Make discrete data integers, which ArviZ plots as such; those with missing values stay as they are."""
    discrete = {site.name for site in sites if site.is_discrete and (site.mask is None or site.mask.all())}
    are_counts = {name: name in discrete and np.isfinite(array).all() for name, array in arrays.items()}
    return {name: array.astype(np.int64) if are_counts[name] else array for name, array in arrays.items()}


def _left_out_in_words(left_out: Mapping[str, Reasons]) -> str:
    """One sentence for each reason, such as "without posterior_predictive of 'y', since ..."; empty without reasons."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for group, reasons in left_out.items():
        for site, reason in reasons.items():
            by_reason.setdefault(reason, {}).setdefault(group, []).append(repr(site))
    if not by_reason:
        return ""
    parts = []
    for reason, groups in by_reason.items():
        what = " and ".join(f"{group} of {', '.join(sites)}" for group, sites in groups.items())
        parts.append(f"{what}, since {reason}")
    options = dict.fromkeys(f"{OPTIONS[group]}=False" for group, reasons in left_out.items() if reasons)
    return f"the ArviZ data are without {'; '.join(parts)}. {', '.join(options)} asks for no such groups, and is silent"


def _renamed_in_words(names: ArvizNames) -> str:
    kinds = (("site", names.sites), ("plate", names.plates))
    new = [f"{kind} '{old}' is '{name}'" for kind, renamed in kinds for old, name in renamed.items()]
    more = ", ..." if len(new) > MAX_NAMES else ""
    return f"ArviZ cannot take all names of the model: in its data {', '.join(new[:MAX_NAMES])}{more}" if new else ""


def _double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cast to float64, since ArviZ's own sums in float32 can be NaN."""
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _array(tensor: Tensor, num_chains: int | None) -> np.ndarray:
    split = tensor if num_chains is None else tensor.unflatten(0, (num_chains, -1))
    return split.detach().cpu().numpy()

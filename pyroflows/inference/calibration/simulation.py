"""Latents and data drawn jointly from a model, and the model with such data in place of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyroflows.errors import DataError, ModelError, OptionError
from pyroflows.models.batching import BatchedModel
from pyroflows.models.requirements import describe_for_flow
from pyroflows.models.signature import bound_arguments, missing_arguments
from pyroflows.models.simulation import require_continuous, require_drawable
from pyroflows.models.structure import ModelStructure, describe
from pyroflows.models.tracing import Model


class ConditionedModel:
    """A model whose data are simulated values, with the arguments for which they were simulated.

    Args:
        model: a Pyro model.
        data: values by observed site, which replace what the model observes there.
        args: the arguments with which it runs if it is called without any.
        kwargs: the same for keyword arguments.

    Example:
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     return pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> conditioned = ConditionedModel(model, {"y": torch.tensor(3.0)}, (), {})
        >>> conditioned(), conditioned.data
        (tensor(3.), {'y': tensor(3.)})
    """

    def __init__(self, model: Model, data: Mapping[str, Tensor], args: Any, kwargs: Any) -> None:
        self.model, self.data, self.args, self.kwargs = model, dict(data), args, kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            args, kwargs = self.args, self.kwargs
        with poutine.condition(data={name: _at_least_default(value) for name, value in self.data.items()}):
            return self.model(*args, **kwargs)


@dataclass(frozen=True)
class Simulations:
    """Draws from the joint distribution of a model.

    Args:
        structure: the structure of the model, conditioned on simulated data.
        latents: values ``(num_datasets, *site shape)`` by latent site.
        data: values ``(num_datasets, *site shape)`` by observed site.
        references: further, independent values of the latents, of the same shapes.
        nuisance: the names of the latents that do not count.
    """

    structure: ModelStructure
    latents: dict[str, Tensor]
    data: dict[str, Tensor]
    references: dict[str, Tensor]
    nuisance: list[str]


@torch.no_grad()
def simulate(
    model: Model,
    args: Any,
    kwargs: Any,
    observed: Sequence[str],
    latents: Sequence[str] | None,
    num_datasets: int,
) -> Simulations:
    """Draw latents and data from a model.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        observed: the sites that are data, besides those that the model observes with these arguments.
        latents: the latents that count; None for all.
        num_datasets: the number of draws.

    Raises:
        OptionError: if no site is data, or ``observed`` or ``latents`` names something else than a site.
        ModelError: if the model cannot be simulated, or a flow could not be its posterior; names the site.
        DataError: if simulated values are not finite; names the site.
    """
    free = _described(model, args, kwargs, observed)
    names = _data_sites(free, observed, bound_arguments(model, args, kwargs))
    hidden = _nuisance(free, names, latents)
    require_drawable(free, names)
    require_continuous(free, (*names, *hidden))
    values = BatchedModel(model, args, kwargs, {}, draw=True).in_chunks({}, 2 * num_datasets).values
    conditioned = ConditionedModel(model, {name: values[name][0] for name in names}, args, kwargs)
    # A block of nothing hides all sites.
    structure, _ = describe_for_flow(poutine.block(conditioned, hide=hidden) if hidden else conditioned, args, kwargs)
    if structure.parameters:
        raise ModelError(
            f"the model has parameters of its own {list(structure.parameters)}, which a fit would learn from each data "
            "set: calibrate it with fixed values in their place, or freeze its modules by .requires_grad_(False)"
        )
    inferred = {site.name: values[site.name] for site in structure.latents}
    data = {name: values[name] for name in names}
    for name, value in (inferred | data).items():
        _require_finite(name, value)
    return Simulations(
        structure,
        {name: value[:num_datasets] for name, value in inferred.items()},
        {name: value[:num_datasets] for name, value in data.items()},
        {name: value[num_datasets:] for name, value in inferred.items()},
        hidden,
    )


def _described(model: Model, args: Any, kwargs: Any, observed: Sequence[str]) -> ModelStructure:
    try:
        return describe(model, args, kwargs)
    except (TypeError, AttributeError) as error:
        empty = [name for name, value in bound_arguments(model, args, kwargs).items() if value is None]
        if not empty:
            raise
        # An argument that has a default, or is a site that is data, may well be None.
        missing = [name for name in missing_arguments(model, (), {}) if name in empty and name not in observed] or empty
        raise OptionError(
            f"the model does not run without a value of {missing} ({error}): give one of the right shape and type, "
            "by position or name; data are not needed, unless the model asks for their shape, and their numbers do not "
            "matter"
        ) from error


def _data_sites(structure: ModelStructure, observed: Sequence[str], arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the sites that are data, in the order of the model."""
    drawn = [site.name for site in (*structure.latents, *structure.deterministic)]
    given = [site.name for site in structure.observed]
    if unknown := sorted({*observed} - {*drawn, *given}):
        raise OptionError(f"observed must name sites of the model, but it has no {unknown}, only {[*drawn, *given]}")
    if not observed and not given:
        # By convention data are an argument with the name of their site, None where there are none.
        observed = [name for name in drawn if name in arguments and arguments[name] is None]
    names = (*given, *(name for name in drawn if name in observed))
    if not names and structure.factors:
        raise ModelError(
            f"the model observes nothing with these arguments, and pyro.factor('{structure.factors[0].name}', ...) has "
            "no law to draw data from: observe the data by pyro.sample(..., obs=...) in its place"
        )
    if not names:
        example = structure.latents[-1].name if structure.latents else "y"
        raise OptionError(
            f"the model observes nothing with these arguments, so that all of its sites {drawn} are latent: say which "
            f'of them are data, as in observed="{example}", or give arguments with which the model observes them'
        )
    return tuple(dict.fromkeys(names))


def _nuisance(structure: ModelStructure, data: Sequence[str], latents: Sequence[str] | None) -> list[str]:
    """The latents that do not count, in the order of the model."""
    free = [site.name for site in structure.latents if site.name not in data]
    if latents is None:
        return []
    if unknown := sorted({*latents} - {*free}):
        raise OptionError(f"latents must name latents of the model, but {unknown} are none, only {free}")
    return [name for name in free if name not in latents]


def _require_finite(name: str, value: Tensor) -> None:
    is_bad = ~value.reshape(len(value), -1).isfinite().all(-1)
    if is_bad.any():
        raise DataError(
            f"{int(is_bad.sum())} of {len(value)} draws of site '{name}' from the model's prior hold values that are "
            "not finite: choose priors with less mass at such values, or float64"
        )


def _at_least_default(value: Tensor) -> Tensor:
    """Widen floating values to torch's default dtype, which is that of a fit while the model runs in it."""
    if not value.is_floating_point():
        return value
    return value.to(torch.promote_types(value.dtype, torch.get_default_dtype()))

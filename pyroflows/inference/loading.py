"""Make posteriors of what files hold, with the data of the fit, with other data, or without data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.errors import CheckpointError, OptionError
from pyroflows.grad_mode import isolated
from pyroflows.guides import AutoFlow
from pyroflows.guides.centering import centerings
from pyroflows.guides.packed import FlowFn
from pyroflows.inference.files import SavedPosterior, read
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.without_data import PosteriorWithoutData
from pyroflows.models.all_rows import WithAllRows
from pyroflows.models.arguments import in_dtype, require_own_options, usable_arguments
from pyroflows.models.layout import Layout
from pyroflows.models.saved_sites import difference, structure_of
from pyroflows.models.signature import missing_arguments
from pyroflows.models.structure import ModelStructure, describe, model_parameters
from pyroflows.models.tracing import Model
from pyroflows.randomness import seeded


@isolated
def load_posterior(
    path: str | Path,
    model: Model,
    *args: Any,
    flow_fn: FlowFn | None = None,
    guide: AutoFlow | None = None,
    **kwargs: Any,
) -> Posterior:
    """Read a posterior from the file that :meth:`Posterior.save` wrote.

    Given the model's arguments, the posterior is what it was; at other data it judges itself against these. Draws,
    ``log_prob``, ``summary`` and predictions need no data: leave out all arguments, or the observed values alone, as in
    ``load_posterior(path, model, x)`` for a model of ``x`` and ``y=None``. The posterior then has the verdict that the
    fit had when it was saved, in words. What needs the data raises a ``ModelError``; ``with_data(...)`` gives them.

    Args:
        path: the path of the file.
        model: the Pyro model that was fitted.
        args: the model's arguments.
        flow_fn: the function that made the flow, if it was the user's own.
        guide: a fresh :class:`pyroflows.guides.AutoStructuredFlow` of the model, made like that of the fit, if that had
            an encoder or flow functions of the user's. A model with an argument of this name gets it by position.
        kwargs: the model's keyword arguments.

    Raises:
        CheckpointError: if the file cannot be read, is damaged, needs ``flow_fn`` or the arguments, or belongs to a
            model with other latents, supports, masks or parameters.
        ModelError: if a flow cannot fit the model; names the site.

    Example:
        >>> import tempfile
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.tensor(1.0)
        >>> posterior = pf.FlowVI(model, seed=0, progress_bar=False).run(y)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     posterior.save(f"{folder}/posterior.safetensors")
        ...     loaded = load_posterior(f"{folder}/posterior.safetensors", model, y)
        ...     without_data = load_posterior(f"{folder}/posterior.safetensors", model)
        >>> loaded.elbo == posterior.elbo
        True
        >>> without_data.predictive(100)["y"].shape
        torch.Size([100])
    """
    # A flow is made at random before it gets the saved values.
    with seeded(0):
        require_own_options({"flow_fn": flow_fn is not None, "guide": guide is not None}, model, args)
        saved = read(path)
        if saved.structured is not None:
            return _loaded_structured(saved, model, args, kwargs, guide)
        if guide is not None:
            raise OptionError(
                f"{path} holds no AutoStructuredFlow: leave guide out, and give flow_fn if it was your own"
            )
        return _loaded(saved, model, args, kwargs, flow_fn)


def _loaded_structured(
    saved: SavedPosterior, model: Model, args: Any, kwargs: Any, guide: AutoFlow | None
) -> Posterior:
    """A posterior of all rows, whose guide is built by the model's arguments."""
    args, kwargs = usable_arguments(in_dtype(model, saved.dtype), args, kwargs, saved.dtype)
    if missing := missing_arguments(model, args, kwargs):
        raise CheckpointError(
            f"{saved.path} was fitted with an AutoStructuredFlow, which is built by all arguments of the model: "
            f"'{missing[0]}' is missing"
        )
    whole = WithAllRows(model)
    guide = saved.structured_guide(model, guide, args, kwargs)
    _require_same(saved, guide, whole, args, kwargs)
    return Posterior(
        whole,
        guide,
        args,
        kwargs,
        history=saved.history,
        starts=saved.starts,
        outcome=saved.outcome,
        labels=saved.labels,
    )


def _loaded(saved: SavedPosterior, model: Model, args: Any, kwargs: Any, flow_fn: FlowFn | None) -> Posterior:
    args, kwargs = usable_arguments(in_dtype(model, saved.dtype), args, kwargs, saved.dtype)
    structure = _run(saved, model, args, kwargs)
    no_arguments = not args and not kwargs
    known: Any = {"history": saved.history, "starts": saved.starts, "outcome": saved.outcome, "labels": saved.labels}
    # With arguments the run that builds the guide explains what is wrong.
    has_data = not no_arguments if structure is None else not _lacks_data(saved, structure)
    if has_data:
        return Posterior(model, _guide(saved, model, flow_fn, args, kwargs), args, kwargs, **known)
    # What was observed in the fit is no latent where it has no value.
    without_data = poutine.block(model, hide=list(saved.without_values))
    # Missing values are latents of the file, but not of a model without the values that are there.
    if structure is None or saved.without_values.difference(saved.data) & {site.name for site in structure.latents}:
        guide = _unbuilt_guide(saved, without_data, flow_fn)
    else:
        guide = _guide(saved, without_data, flow_fn, args, kwargs)
    posterior = PosteriorWithoutData(
        model, guide, args, kwargs, saved.verdict, structure is not None, saved.without_values, **known
    )
    if structure is not None:
        posterior.require_latents(structure)
    return posterior


def _run(saved: SavedPosterior, model: Model, args: Any, kwargs: Any) -> ModelStructure | None:
    """The structure of a model at its arguments; None if it does not run."""
    if not args and not kwargs and missing_arguments(model, args, kwargs):
        return None
    try:
        return describe(in_dtype(model, saved.dtype), args, kwargs).summed_out()
    except Exception:  # a model may raise anything without its data
        return None


def _lacks_data(saved: SavedPosterior, structure: ModelStructure) -> bool:
    """Whether a run of a model had no data, neither those of the fit nor others."""
    drawn = {site.name for site in structure.latents} - saved.shapes.keys()
    has_none = bool(saved.data) and not structure.observed and not structure.factors
    return drawn <= saved.without_values and (bool(drawn) or has_none)


def _guide(saved: SavedPosterior, model: Model, flow_fn: FlowFn | None, args: Any, kwargs: Any) -> AutoFlow:
    """Make a guide of the model at its arguments, and put the saved values into the model's parameters."""
    guide = saved.guide(model, flow_fn)
    guide._setup_prototype(*args, **kwargs)
    _require_same(saved, guide, model, args, kwargs)
    return guide


def _require_same(saved: SavedPosterior, guide: AutoFlow, model: Model, args: Any, kwargs: Any) -> None:
    """Raise if a guide has other latents than a file, and put the saved values into the model's parameters."""
    assert guide.layout is not None
    structure = guide.layout.structure
    # Latents are packed in the order of the model, so that the order counts too.
    found = {site.name: site.shape for site in structure.latents}
    if list(found.items()) != list(saved.shapes.items()):
        raise CheckpointError(
            f"{saved.path} belongs to a model with latent sites {_listed(saved.shapes)}, but this one has "
            f"{_listed(found)}"
        )
    if saved.latents is not None and (other := difference(saved.latents, structure.latents)):
        raise CheckpointError(f"{saved.path} belongs to a model {other}")
    init_fn = init_to_value(values=guide.layout.constrain(guide._init_loc())[0])
    parameters = model_parameters(structure, in_dtype(model, saved.dtype), args, kwargs, init_fn)
    _set_parameters(parameters, saved)
    for layer in centerings(guide._built()):
        layer.require_priors()


def _set_parameters(parameters: Mapping[str, Tensor], saved: SavedPosterior) -> None:
    if {name: p.shape for name, p in parameters.items()} != {name: p.shape for name, p in saved.parameters.items()}:
        raise CheckpointError(
            f"{saved.path} belongs to a model with parameters {sorted(saved.parameters)}, not {sorted(parameters)}"
        )
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(saved.parameters[name])


def _unbuilt_guide(saved: SavedPosterior, model: Model, flow_fn: FlowFn | None) -> AutoFlow:
    """Make a guide that has the layout of the file, without a run of the model."""
    guide = saved.guide(model, flow_fn)
    assert guide.flow is not None
    if saved.latents is None:
        raise CheckpointError(
            f"{saved.path} holds a latent with a support of a class of the user's, which the model has to show: give "
            "load_posterior the model's arguments"
        )
    if saved.parameters:
        raise CheckpointError(
            f"{saved.path} holds values of the model's parameters {sorted(saved.parameters)}, which the model has to "
            "make first: give load_posterior the model's arguments"
        )
    if layers := centerings(guide.flow):
        raise CheckpointError(
            f"{saved.path} holds a flow whose draws pass through the priors of the sites {list(layers[0].names)}, "
            "which the model has to show: give load_posterior the model's arguments"
        )
    guide.layout = Layout(structure_of(saved.latents, next(guide.flow.parameters()).dtype)).at_centers(guide._centers)
    if guide.layout.dim != guide.flow.dim:
        raise CheckpointError(f"{saved.path} holds a flow of another dimension than its latents")
    return guide


def _listed(shapes: Mapping[str, torch.Size]) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in shapes.items()}

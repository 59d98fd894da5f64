"""Write posteriors to safetensors files, and read them; no pickle is involved."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.archive import read_archive, write_archive
from pyroflows.errors import CheckpointError, OptionError
from pyroflows.flows import Recipe
from pyroflows.guides import AutoFlow
from pyroflows.guides.packed import FlowFn
from pyroflows.inference.search.starts import Starts
from pyroflows.models.arguments import in_dtype, usable_arguments
from pyroflows.models.structure import model_parameters
from pyroflows.models.tracing import Model
from pyroflows.training.history import History

FORMAT = 3


def save(
    guide: AutoFlow, parameters: dict[str, Tensor], history: History, starts: Starts | None, path: str | Path
) -> None:
    """Write a guide's flow with its recipe, the model's parameters, the history and the result of the starts.

    Args:
        guide: a flow guide, built.
        parameters: the unconstrained parameters of the model, by name.
        history: the history of the training.
        starts: the result of the search for modes, if there was one.
        path: the path of the file.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    tensors = {f"flow.{name}": value for name, value in guide.state_dict().items()}
    tensors |= {f"param.{name}": value.detach() for name, value in parameters.items()}
    tensors |= {f"history.{name}": torch.from_numpy(values) for name, values in history.items()}
    assert guide.structure is not None
    header = {
        "recipe": guide.flow_fn.to_json() if isinstance(guide.flow_fn, Recipe) else None,
        "dtype": None if guide.dtype is None else str(guide.dtype).removeprefix("torch."),
        "sites": {site.name: list(site.shape) for site in guide.structure.latents},
        "starts": None if starts is None else asdict(starts),
    }
    write_archive(path, "posterior", FORMAT, header, tensors)


def load(
    path: str | Path, model: Model, args: Any, kwargs: Any, flow_fn: FlowFn | None
) -> tuple[AutoFlow, History, Starts | None]:
    """Read a file that :func:`save` wrote, and put the saved values into the model's parameters.

    Args:
        path: the path of the file.
        model: the Pyro model that was fitted.
        args: its positional arguments.
        kwargs: its keyword arguments.
        flow_fn: the function that made the flow, if it was the user's own.

    Returns:
        The guide, built, the history of its training, and the result of the search for modes.

    Raises:
        CheckpointError: if the file cannot be read, belongs to another model, or needs ``flow_fn``.
    """
    header, tensors = read_archive(path, "posterior", FORMAT)
    dtype = None if header["dtype"] is None else getattr(torch, header["dtype"])
    guide = AutoFlow(model, flow_fn or _recipe(header["recipe"], path), dtype=dtype)
    try:
        guide.load_state_dict(_part(tensors, "flow."))
    except (RuntimeError, CheckpointError) as error:
        raise CheckpointError(f"{path} holds another flow than flow_fn makes: {error}") from error
    args, kwargs = usable_arguments(guide.model, args, kwargs, dtype)
    guide._setup_prototype(*args, **kwargs)
    assert guide.layout is not None
    structure = guide.layout.structure
    sites = {site.name: list(site.shape) for site in structure.latents}
    # Latents are packed in the order of the model, so that the order counts too.
    if list(sites.items()) != list(header["sites"].items()):
        raise CheckpointError(
            f"{path} belongs to a model with latent sites {header['sites']}, but this one has {sites}"
        )
    init_fn = init_to_value(values=guide.layout.constrain(guide._init_loc())[0])
    parameters = model_parameters(structure, in_dtype(model, dtype), args, kwargs, init_fn)
    saved = _part(tensors, "param.")
    if {name: p.shape for name, p in parameters.items()} != {name: p.shape for name, p in saved.items()}:
        raise CheckpointError(f"{path} belongs to a model with parameters {sorted(saved)}, not {sorted(parameters)}")
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(saved[name])
    history = History({name: values.tolist() for name, values in _part(tensors, "history.").items()})
    found = header["starts"]
    starts = found and Starts(**{**found, "elbos": tuple(found["elbos"]), "modes": tuple(found["modes"])})
    return guide, history, starts


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _recipe(saved: dict[str, Any] | None, path: str | Path) -> Recipe:
    if saved is None:
        raise CheckpointError(
            f"{path} was fitted with a flow function of the user's: give load_posterior the same flow_fn"
        )
    try:
        return Recipe.from_json(saved)
    except OptionError as error:
        raise CheckpointError(f"{path} was fitted with a recipe that this version does not have: {error}") from error

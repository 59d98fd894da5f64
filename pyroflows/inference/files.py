"""Write posteriors to safetensors files, and read what these hold; no pickle is involved."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from pyroflows.archive import decoding, part_of, read_archive, write_archive
from pyroflows.errors import CheckpointError, OptionError
from pyroflows.flows import Recipe
from pyroflows.guides import AutoFlow
from pyroflows.guides.centering import centerings
from pyroflows.guides.packed import FlowFn
from pyroflows.guides.row_flows import default_local_flow
from pyroflows.guides.state import FlowState
from pyroflows.guides.structured import AutoStructuredFlow
from pyroflows.inference.component_labels import ComponentLabels
from pyroflows.inference.outcome import Ending, Outcome
from pyroflows.inference.search.starts import Starts
from pyroflows.models.requirements import require_dtype
from pyroflows.models.saved_sites import decode_sites, encode_sites, names_without_values
from pyroflows.models.structure import ModelStructure, Site
from pyroflows.models.tracing import Model
from pyroflows.options import kind
from pyroflows.training.history import History

FORMAT = 4


def save(
    guide: AutoFlow,
    structure: ModelStructure,
    parameters: dict[str, Tensor],
    history: History,
    starts: Starts | None,
    verdict: str | None,
    outcome: Outcome | None,
    labels: ComponentLabels,
    path: str | Path,
) -> None:
    """Write a guide's flow with its recipe, the latents and parameters of the model, and what is known of the fit.

    Args:
        guide: a flow guide, built.
        structure: the structure of the model.
        parameters: the unconstrained parameters of the model, by name.
        history: the history of the training.
        starts: the result of the search for modes, if there was one.
        verdict: the verdict in words, if it is known.
        outcome: how the fit ended, if it is known.
        labels: the labels of components.
        path: the path of the file.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    assert guide.flow is not None
    for layer in centerings(guide.flow):
        layer.note_priors()
    tensors = {f"flow.{name}": value for name, value in guide.state_dict().items()}
    tensors |= {f"param.{name}": value.detach() for name, value in parameters.items()}
    tensors |= {f"history.{name}": torch.from_numpy(values) for name, values in history.items()}
    latents, of_latents = encode_sites(structure.latents)
    tensors |= {f"latents.{name}": value for name, value in of_latents.items()}
    header = {
        "recipe": guide.flow_fn.to_json() if isinstance(guide.flow_fn, Recipe) else None,
        "structured": _structured(guide),
        "dtype": None if guide.dtype is None else str(guide.dtype).removeprefix("torch."),
        "sites": {site.name: list(site.shape) for site in structure.latents},
        "latents": latents,
        "data": [site.name for site in (*structure.observed, *structure.factors)],
        "starts": None if starts is None else asdict(starts),
        "verdict": verdict,
        "outcome": None if outcome is None else asdict(outcome),
        "labels": labels.to_json(),
    }
    write_archive(path, "posterior", FORMAT, header, tensors)


def _structured(guide: AutoFlow) -> dict[str, Any] | None:
    """What a file says of a structured guide: its option, and whether it holds functions or modules of the user's."""
    if not isinstance(guide, AutoStructuredFlow):
        return None
    is_plain = guide.encoder is None and guide.local_flow_fn is default_local_flow
    return {"learned_rows": guide.learned_rows, "is_plain": is_plain}


@dataclass(frozen=True, eq=False)
class SavedPosterior:
    """What the file of a posterior holds; :func:`read` makes it.

    Args:
        path: the path of the file.
        recipe: the recipe of the flow; None for a function of the user's.
        structured: how an ``AutoStructuredFlow`` was made; None for another guide.
        dtype: the dtype of the fit; None for that of the model.
        flow: the state of the guide.
        parameters: the unconstrained parameters of the model, by name.
        shapes: the shapes of the latents by name, in the order of the model.
        latents: the latents; None if one of them has a support that only the model can rebuild.
        data: the names of the observed sites and of the factors.
        history: the history of the training.
        starts: the result of the search for modes, if there was one.
        verdict: the verdict in words, if it was known.
        outcome: how the fit ended, if it was known.
        labels: the labels of components.
    """

    path: str | Path
    recipe: Recipe | None
    structured: Mapping[str, Any] | None
    dtype: torch.dtype | None
    flow: dict[str, Tensor]
    parameters: dict[str, Tensor]
    shapes: dict[str, torch.Size]
    latents: tuple[Site, ...] | None
    data: tuple[str, ...]
    history: History
    starts: Starts | None
    verdict: str | None
    outcome: Outcome | None
    labels: ComponentLabels

    @property
    def without_values(self) -> frozenset[str]:
        """The names of the latents that the model has in place of its data, where they have no value."""
        return names_without_values(self.data, self.shapes)

    def structured_guide(self, model: Model, guide: AutoFlow | None, args: Any, kwargs: Any) -> AutoFlow:
        """Make a structured guide with the flow of the file, which is built by the model's arguments.

        Args:
            model: the Pyro model.
            guide: the guide, made like that of the fit; None to make it where the file says how.
            args: the model's arguments.
            kwargs: the model's keyword arguments.

        Raises:
            CheckpointError: if the guide is needed, or is another one than that of the file.
        """
        if guide is None and (self.recipe is None or self.structured is None or not self.structured["is_plain"]):
            raise CheckpointError(
                f"{self.path} was fitted with an AutoStructuredFlow with an encoder or flow functions of the user's: "
                "give load_posterior a guide that is made like it, as in "
                "guide=AutoStructuredFlow(model, encoder=encoder)"
            )
        if guide is not None and not isinstance(guide, AutoStructuredFlow):
            raise CheckpointError(f"{self.path} was fitted with an AutoStructuredFlow, not with {kind(guide)}")
        if guide is None:
            assert self.structured is not None
            learned_rows = self.structured["learned_rows"]
            guide = AutoStructuredFlow(model, self.recipe, learned_rows=learned_rows, dtype=self.dtype)
        guide._setup_prototype(*args, **kwargs)
        try:
            guide.load_state_dict(self.flow)
        except (RuntimeError, CheckpointError) as error:
            raise CheckpointError(f"{self.path} holds another flow than the guide: {error}") from error
        return guide

    def guide(self, model: Model, flow_fn: FlowFn | None) -> AutoFlow:
        """Make a guide with the flow of the file; it is not built yet.

        Args:
            model: the Pyro model.
            flow_fn: the function that made the flow; None to make it by the recipe.

        Raises:
            CheckpointError: if the flow needs ``flow_fn``, or is another one than that makes.
        """
        if flow_fn is None and self.recipe is None:
            raise CheckpointError(
                f"{self.path} was fitted with a flow function of the user's: give load_posterior the same flow_fn"
            )
        guide = AutoFlow(model, flow_fn or self.recipe, dtype=self.dtype)
        try:
            if flow_fn is None:
                with decoding(self.path):
                    guide.load_state_dict(self.flow)
            else:
                guide.load_state_dict(self.flow)
        except (RuntimeError, CheckpointError) as error:
            raise CheckpointError(f"{self.path} holds another flow than flow_fn makes: {error}") from error
        return guide


def read(path: str | Path) -> SavedPosterior:
    """Read a file that :func:`save` wrote.

    Args:
        path: the path of the file.

    Raises:
        CheckpointError: if there is no such file, it is damaged, or its contents make no sense.
    """
    header, tensors = read_archive(path, "posterior", FORMAT)
    with decoding(path):
        flow = part_of(tensors, "flow.")
        _check_sizes(header["recipe"], flow)
        dtype = None if header["dtype"] is None else getattr(torch, header["dtype"])
        require_dtype(dtype)
        latents = decode_sites(header["latents"], part_of(tensors, "latents."))
        shapes = {name: torch.Size(shape) for name, shape in header["sites"].items()}
        if latents is not None and shapes != {site.name: site.shape for site in latents}:
            raise CheckpointError("it says two things of its latents")
        return SavedPosterior(
            path=path,
            recipe=_recipe(header["recipe"], path),
            structured=_options_of_structured(header.get("structured")),
            dtype=dtype,
            flow=flow,
            parameters=part_of(tensors, "param."),
            shapes=shapes,
            latents=latents,
            data=tuple(map(_word, header["data"])),
            history=History({name: values.tolist() for name, values in part_of(tensors, "history.").items()}),
            starts=_starts(header["starts"]),
            verdict=None if header["verdict"] is None else _word(header["verdict"]),
            outcome=_outcome(header["outcome"]),
            labels=_labels(header["labels"]),
        )


def _options_of_structured(value: Any) -> dict[str, Any] | None:
    """What :func:`_structured` wrote."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"learned_rows", "is_plain"}:
        raise CheckpointError("it does not say how its AutoStructuredFlow was made")
    if any(option not in (None, True, False) for option in value.values()):
        raise CheckpointError("it has options of AutoStructuredFlow that are neither true nor false")
    return value


def _check_sizes(recipe: Any, flow: Mapping[str, Tensor]) -> None:
    """Raise if the flow would have more numbers than the file has, before it is made, or if some are NaN."""
    state = FlowState.from_tensor(flow["_extra_state"])
    most = sum(value.numel() for value in flow.values())
    if max(state.dim, state.num_components, *_whole_numbers(recipe)) > most:
        raise CheckpointError(f"its flow is said to have more than the {most} numbers that it holds")
    if bad := [name for name, value in flow.items() if value.is_floating_point() and value.isnan().any()]:
        raise CheckpointError(f"its flow has NaN among the numbers of {bad[0]}")


def _whole_numbers(value: Any) -> list[int]:
    """The whole numbers in JSON."""
    if isinstance(value, dict | list):
        return [
            number for item in (value.values() if isinstance(value, dict) else value) for number in _whole_numbers(item)
        ]
    return [value] if isinstance(value, int) else []


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def _starts(found: Any) -> Starts | None:
    if found is None:
        return None
    starts = Starts(**{**found, "elbos": tuple(found["elbos"]), "modes": tuple(found["modes"])})
    str(starts)  # raises if a number is none
    return starts


def _outcome(found: Any) -> Outcome | None:
    if found is None:
        return None
    outcome = Outcome(seconds=float(found["seconds"]), ending=found["ending"])
    if outcome.ending not in get_args(Ending):
        raise ValueError(f"no fit ends by being {outcome.ending!r}")
    return outcome


def _labels(found: Any) -> ComponentLabels:
    labels = ComponentLabels.from_json(found)
    if not all(isinstance(name, str) for names in labels.dims.values() for name in names):
        raise TypeError("a name of a dimension is none")
    return labels


def _recipe(saved: dict[str, Any] | None, path: str | Path) -> Recipe | None:
    try:
        return None if saved is None else Recipe.from_json(saved)
    except OptionError as error:
        raise CheckpointError(f"{path} was fitted with a recipe that this version does not have: {error}") from error

"""Facts about a flow that no tensor holds; its state dict carries them, so that another flow can refuse the state.

Shapes of parameters tell few flows apart: masks, orders, bounds, supports and bases can differ without changing them.
"""

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import StateError
from pyroflows.flows.encoding import CONSTRAINTS, PARTS, attributes_of, class_of, is_from_library
from pyroflows.transforms.held import Held

Facts = dict[str, Any] | list[Any] | bool | int | float | str | None

# An attribute that is no fact, such as a tensor.
_NO_FACT = object()
# Messages leave out these classes, which wrap what stands in an attribute of theirs.
_WRAPPINGS = {
    "Independent": "base_dist",
    "IndependentConstraint": "base_constraint",
}
_NAMES = {"codomain": "support", "held_codomain": "support", "flows": "components"}
_SILENT = (*_WRAPPINGS.values(), "transform", "held", "layer")
# Parts with more options, and longer sequences, are not written out in messages.
_MOST_OPTIONS, _LONGEST = 5, 16


def facts_of(part: Any) -> Facts:
    """Return the facts about a flow or a part of one, as JSON: its class, its options, and the facts about its parts.

    Values of tensors are no facts. Neither are options of modules that other libraries or users define, since those may
    change during training: of these modules only the class and the modules in them count.

    Example:
        >>> facts_of(pf.transforms.univariate.Spline(bins=4))
        {'class': 'Spline', 'bins': 4, 'bound': 5.0, 'num_params': 11}
    """
    return _facts(part, ())


def _facts(value: Any, owners: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | nn.ModuleList):
        facts = [_facts(item, owners) for item in value]
        return _NO_FACT if any(fact is _NO_FACT for fact in facts) else facts
    # A transform and its inverse refer to each other.
    is_part = isinstance(value, PARTS) or hasattr(value, "num_params")
    return _facts_of_part(value, (*owners, id(value))) if is_part and id(value) not in owners else _NO_FACT


def _facts_of_part(part: Any, owners: tuple[int, ...]) -> Any:
    if isinstance(part, Held):
        return _facts_of_held(part, owners)
    cls = class_of(part)
    facts: dict[str, Any] = {"class": cls.__name__}
    if hasattr(part, "standardization"):
        facts = _facts_of_flow(part, owners)
    if not isinstance(part, nn.Module) or is_from_library(cls):
        for name, attribute in attributes_of(part).items():
            if name != "training" and (not name.startswith("_") or isinstance(attribute, PARTS)):
                facts[name] = _facts(attribute, owners)
    if isinstance(part, nn.Module):
        facts |= {name: _facts(child, owners) for name, child in part._modules.items()}
    return {name: fact for name, fact in facts.items() if fact is not _NO_FACT}


def _facts_of_flow(flow: Any, owners: tuple[int, ...]) -> dict[str, Any]:
    """Return the facts that users know a flow by, which messages name before finer ones.

    A recipe is no kind of flow, but a name for a stack of layers. The support of a mixture is that of its components.
    """
    is_mixture = hasattr(flow, "gate")
    shapes = {name: list(getattr(flow, name)) for name in ("event_shape", "context_shape")}
    support = {} if is_mixture else {"support": _facts(flow.support, owners)}
    return {"class": "Mixture" if is_mixture else "Flow", **shapes, **support}


def _facts_of_held(held: Held, owners: tuple[int, ...]) -> Any:
    """Return the facts about an object that a module holds in parts."""
    facts = _facts(held.template, owners)
    parts = {name: _facts(part, owners) for name, part in held._modules.items()}
    if isinstance(facts, list):
        return [parts.get(str(i), fact) for i, fact in enumerate(facts)]
    if facts is _NO_FACT:  # such as the Gaussians of Pyro's hidden Markov models
        facts = {"class": type(held.template).__name__}
    return {**facts, **{name: fact for name, fact in parts.items() if fact is not _NO_FACT}}


def json_to_tensor(value: Any) -> Tensor:
    """Write JSON into a tensor, since a state dict should hold tensors alone.

    Example:
        >>> json_from_tensor(json_to_tensor({"bins": 8}))
        {'bins': 8}
    """
    # Numbers of two bytes do not overflow where states are summed to average them.
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.int16)


def json_from_tensor(tensor: Tensor) -> Any:
    """Read what :func:`json_to_tensor` wrote.

    Raises:
        ValueError: if the tensor cannot be read.
    """
    return json.loads(bytes(tensor.double().round().long().tolist()))


def require_same(saved: Facts, own: Facts) -> None:
    """Raise if a state of one flow cannot be loaded into another.

    Facts that only one of the two states, since another version made it, do not count.

    Args:
        saved: the facts about the flow of the state.
        own: the facts about the flow that the state is loaded into.

    Raises:
        StateError: if the facts differ; names the first difference.

    Example:
        >>> require_same(facts_of(pf.flows.NSF(2)), facts_of(pf.flows.NSF(2, bound=3.0)))
        Traceback (most recent call last):
        pyroflows.errors.StateError: this state is of another flow: univariate of layer 0 (Coupling) is ...
    """
    if (found := _difference(saved, own, "")) is not None:
        place, theirs, ours = found
        place = place or "the kind of flow"
        raise StateError(
            f"this state is of another flow: {place} is {theirs} in the state and {ours} in this flow; load it into a "
            "flow that is made with the same arguments"
        )


def _difference(saved: Any, own: Any, place: str) -> tuple[str, str, str] | None:
    """Return the place of the first difference and what stands there in each, or None."""
    here = place, _written(saved), _written(own)
    if isinstance(saved, dict) and isinstance(own, dict):
        if saved.get("class") != own.get("class"):
            return here
        if saved.get("class") == "_Components":  # They are the base of a mixture, to which users gave them as flows.
            place = place.removeprefix("base").removeprefix(" of ")
        both = [name for name in saved if name in own]
        found = _first(_difference(saved[name], own[name], _place_of(name, place)) for name in both)
        return here if found and _is_flat(saved) else found
    if isinstance(saved, list) and isinstance(own, list):
        if _is_short(saved) and _is_short(own):
            return None if saved == own else here
        if place.startswith("layers") and (numbers := _numbers_of_layers(saved, own)):
            return f"the number of {place}", *numbers
        pairs = enumerate(zip(saved, own, strict=False))
        found = _first(_difference(a, b, _place_of_item(i, place, a, b)) for i, (a, b) in pairs)
        lengths = f"the number of {place}", str(len(saved)), str(len(own))
        return found or (None if len(saved) == len(own) else lengths)
    is_same = saved == own or (saved != saved and own != own)  # the latter for NaN
    return None if is_same else here


def _numbers_of_layers(saved: list[Any], own: list[Any]) -> tuple[str, str] | None:
    """Return how many layers of the commonest kind each flow stacks, if it is another number; None if one has none.

    That is what users call the number of layers, whatever layers for mixing, scale and support stand between them.
    """
    if not saved or not all(isinstance(layer, dict) for layer in saved + own):
        return None
    kinds, own_kinds = [_kind(layer) for layer in saved], [_kind(layer) for layer in own]
    commonest = max(kinds, key=kinds.count)
    count, own_count = kinds.count(commonest), own_kinds.count(commonest)
    return (str(count), str(own_count)) if own_count not in (0, count) else None


def _kind(layer: dict[str, Any]) -> tuple[str, ...]:
    """Return the class of a layer, after those of views of it, such as its inverse."""
    return (str(layer.get("class")), *(_kind(layer["layer"]) if "layer" in layer else ()))


def _first(found: Iterable[Any]) -> Any:
    return next((difference for difference in found if difference is not None), None)


def _place_of(name: str, owner: str) -> str:
    if name in _SILENT:
        return owner
    name = _NAMES.get(name, name.lstrip("_"))
    return f"{name} of {owner}" if owner else name


def _place_of_item(i: int, place: str, saved: Any, own: Any) -> str:
    """Return the words for an item of a list, such as "layer 2 (Coupling)" for one of "layers"."""
    kind, _, owner = place.partition(" of ")
    words = f"{kind.removesuffix('s')} {i}"
    is_same_kind = isinstance(saved, dict) and isinstance(own, dict) and _written(saved) == _written(own)
    if is_same_kind and saved["class"] != "Flow":
        words += f" ({_written(saved)})"
    return f"{words} of {owner}" if owner else words


def _is_short(items: list[Any]) -> bool:
    """Return whether a list can be written out, since it is short and has numbers or words only."""
    return len(items) <= _LONGEST and not any(isinstance(item, dict) for item in items)


def _is_flat(facts: dict[str, Any]) -> bool:
    """Return whether a part can be written out, since it has few options and no parts."""
    values = list(facts.values())
    return len(values) <= _MOST_OPTIONS and not any(isinstance(value, dict | list) for value in values)


def _written(fact: Any) -> str:
    """Return a fact as Python code would have it, and a part with many options by its class."""
    if isinstance(fact, list):
        return f"[{', '.join(map(_written, fact))}]"
    if not isinstance(fact, dict):
        return repr(fact)
    if names := [name for name, constraint in CONSTRAINTS.items() if facts_of(constraint) == fact]:
        return names[0]
    name = str(fact.get("class")).removeprefix("_")
    if name in _WRAPPINGS:
        return _written(fact.get(_WRAPPINGS[name]))
    if "layer" in fact:
        return f"{'inverse' if name.endswith('Inverse') else name} of {_written(fact['layer'])}"
    options = [f"{key}={value!r}" for key, value in fact.items() if key not in ("class", "num_params")]
    return f"{name}({', '.join(options)})" if options and _is_flat(fact) else name

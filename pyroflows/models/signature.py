"""The names of a model's arguments."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from pyro.poutine.messenger import unwrap
from torch.utils._pytree import keystr, tree_flatten_with_path

from pyroflows.models.all_rows import WithAllRows
from pyroflows.models.observations import is_list
from pyroflows.models.tracing import Model


def signature_of(model: Model) -> inspect.Signature:
    """The signature of a model, be it a function, a module, or either with effect handlers around it.

    Raises:
        TypeError: if it is not a callable.
        ValueError: if it shows no signature.
    """
    if isinstance(model, WithAllRows):
        return signature_of(model.model)
    # What effect handlers around the model give is such an object, which shows no names.
    function = unwrap(model) if type(model).__name__ == "_bound_partial" else model
    return inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function)


def bound_arguments(model: Model, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, defaults included; by position where a model shows no names.

    Example:
        >>> bound_arguments(lambda x, y=None: None, (1,), {})
        {'x': 1, 'y': None}
    """
    try:
        bound = signature_of(model).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {str(i): value for i, value in enumerate(args)} | kwargs
    bound.apply_defaults()
    return dict(bound.arguments)


def missing_arguments(model: Model, args: Any, kwargs: Any) -> list[str]:
    """The names of the arguments that a model needs and that a call lacks; none where a model shows no names.

    Example:
        >>> missing_arguments(lambda x, y, z=None: None, (1,), {})
        ['y']
    """
    try:
        signature = signature_of(model)
        given = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind in kinds]
    return [name for name in needed if name not in given]


def named_leaves(model: Model, args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    """The arguments by name, those inside of dictionaries and lists too, as in ``data['x'][0]``."""
    for name, value in bound_arguments(model, args, kwargs).items():
        for path, leaf in tree_flatten_with_path(value, is_leaf=is_list)[0]:
            yield f"{name}{keystr(path)}", leaf

"""Encode a flow as JSON and tensors, and decode it; the JSON says nothing but classes and the values of attributes.

A class is decoded without a call of its constructor, and only if this library defines it, or if it is a module,
distribution, transform or constraint of torch or Pyro. So a file can put such parts together, but cannot run code.
"""

import sys
import weakref
from types import MethodType
from typing import Any

import numpy as np
import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import _InverseTransform

from pyroflows.errors import CheckpointError, OptionError
from pyroflows.transforms.foreign import is_cache

# The number of the format of files of flows. It grows if an older version could not rebuild what is written.
FORMAT = 1
PARTS = (nn.Module, Distribution, Transform, Constraint)
_PACKAGES = (
    "torch.nn.modules.",
    "torch.distributions.",
    "pyro.distributions.",
    "pyro.nn.auto_reg_nn",
    "pyro.nn.dense_nn",
)
# Constraints that exist once, by name; torch and Pyro compare some of them by identity.
CONSTRAINTS = {
    name: value
    for module in (pyro_constraints, constraints)
    for name, value in vars(module).items()
    if isinstance(value, Constraint)
}
_NAMES = {id(value): name for name, value in CONSTRAINTS.items()}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_COLLECTIONS: dict[Any, str] = {tuple: "tuple", torch.Size: "size", set: "set"}
# What each module has of its own. Hooks are functions, which no file can hold.
_OF_MODULES = frozenset(vars(nn.Module()))
_CONTENTS_OF_MODULES = {"training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"}
# More numbers along an axis than any flow has.
_LARGEST_SIZE = 2**31
_HOOKS = _OF_MODULES - _CONTENTS_OF_MODULES - {"_is_full_backward_hook"}


def class_of(part: Any) -> type:
    """Return the class of a part of a flow; of a module that became a Pyro module, the class that it had before."""
    cls = type(part)
    return cls.__bases__[0] if "<locals>" in cls.__qualname__ and cls.__module__ == "pyro.nn.module" else cls


def is_from_library(cls: type) -> bool:
    """Return whether files may name this class.

    Example:
        >>> [is_from_library(cls) for cls in (pf.Flow, torch.nn.Linear, dist.Normal, dict)]
        [True, True, True, False]
    """
    if cls.__module__.startswith("pyroflows."):
        return True
    return issubclass(cls, PARTS) and cls.__module__.startswith(_PACKAGES)


def attributes_of(part: Any) -> dict[str, Any]:
    """Return the attributes that make an object what it is, without what it remembers of its last call.

    Example:
        >>> attributes_of(torch.distributions.transforms.AffineTransform(0.0, 2.0))
        {'_cache_size': 0, '_inv': None, 'loc': 0.0, 'scale': 2.0, '_event_dim': 0}
    """
    # Torch's own state of a transform lacks the transform that it inverts.
    own_state = not isinstance(part, nn.Module | Transform) and "__getstate__" in vars(type(part))
    attributes = part.__getstate__() if own_state else vars(part)
    caches = {name for name in attributes if is_cache(name)} if isinstance(part, Transform) else set()
    if not isinstance(part, _InverseTransform):
        caches.add("_inv")  # torch keeps the inverse that a transform gave last
    return {
        name: None if isinstance(value, weakref.ref) or name in caches else value
        for name, value in attributes.items()
        if name not in _HOOKS and not _is_own_method(value, name, part)
    }


def _is_own_method(value: Any, name: str, part: Any) -> bool:
    """Return whether an attribute repeats a method of its object, as in ``self._params = self._params``."""
    return isinstance(value, MethodType) and value.__self__ is part and value.__name__ == name


def encode(part: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return JSON and tensors from which :func:`decode` rebuilds a flow, or a part of one.

    Args:
        part: the flow.

    Raises:
        OptionError: if it holds what no file can, such as an object of a class of the user's; names the place.

    Example:
        >>> code, tensors = encode(pf.flows.Gaussian(2))
        >>> type(decode(code, tensors)), "transform.layers.0.matrix_of.value" in tensors
        (<class 'pyroflows.flows.recipes.Gaussian'>, True)
    """
    encoder = _Encoder()
    return encoder.encode(part, ""), encoder.tensors


def decode(code: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the flow that :func:`encode` wrote. The random state stays as it is.

    Args:
        code: the JSON.
        tensors: the tensors; the flow gets them as they are, not copies.

    Raises:
        CheckpointError: if the code names a class that may not stand there, or cannot be read.
    """
    try:
        return _Decoder(tensors).decode(code)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"this version cannot rebuild what is saved: {error!r}") from error


class _Encoder:
    """It encodes an object that occurs twice once, and refers to it by its number the second time."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._numbers: dict[int, int] = {}
        # The objects are kept alive, since others could have their identities otherwise.
        self._seen: list[Any] = []

    def encode(self, value: Any, path: str) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in _NAMES:
            return {"constraint": _NAMES[id(value)]}
        if type(value) is list:
            return [self.encode(item, _joined(path, i)) for i, item in enumerate(value)]
        if type(value) in _COLLECTIONS:
            return {_COLLECTIONS[type(value)]: [self.encode(item, _joined(path, i)) for i, item in enumerate(value)]}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": {key: self.encode(item, _joined(path, key)) for key, item in value.items()}}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value)}
        if isinstance(value, slice):
            return {"slice": [value.start, value.stop, value.step]}
        if id(value) in self._numbers:
            return {"same": self._numbers[id(value)]}
        self._numbers[id(value)] = len(self._seen)
        self._seen.append(value)
        return self._tensor(value, path) if isinstance(value, Tensor) else self._part(value, path)

    def _tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        while path in self.tensors:
            path += "_"
        self.tensors[path] = value
        return {"tensor": path, "is_parameter": isinstance(value, nn.Parameter), "trains": value.requires_grad}

    def _part(self, value: Any, path: str) -> dict[str, Any]:
        cls = class_of(value)
        if not is_from_library(cls) or not hasattr(value, "__dict__") or cls is not type(value):
            kind = cls.__qualname__ if cls is type(value) else f"{cls.__qualname__} turned into a PyroModule"
            raise OptionError(
                f"{path or 'this flow'} is a {kind}, which no file can rebuild: save flow.state_dict(), and load it "
                "into a flow that the same code makes"
            )
        if hooks := [name for name in _HOOKS if vars(value).get(name)]:
            raise OptionError(f"{path or 'the flow'} has hooks, {sorted(hooks)}, which no file can hold: remove them")
        attributes = {name: self.encode(v, _joined(path, name)) for name, v in attributes_of(value).items()}
        return {"class": f"{cls.__module__}:{cls.__qualname__}", "has": attributes}


class _Decoder:
    """It rebuilds the objects in the order in which they were encoded."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: list[Any] = []
        # The numbers of the parts that are not finished. Modules that hold themselves would recurse for ever.
        self._around: set[int] = set()

    def decode(self, code: Any) -> Any:
        if isinstance(code, list):
            return [self.decode(item) for item in code]
        if not isinstance(code, dict):
            return code
        for kind, name in _COLLECTIONS.items():
            if name in code:
                value = kind(self.decode(item) for item in code[name])
                if kind is torch.Size and not all(0 <= size <= _LARGEST_SIZE for size in value):
                    raise CheckpointError(f"{tuple(value)} is no shape of a tensor")
                return value
        if "constraint" in code:
            return CONSTRAINTS[code["constraint"]]
        if "dict" in code:
            return {key: self.decode(item) for key, item in code["dict"].items()}
        if "dtype" in code:
            return _DTYPES[code["dtype"]]
        if "slice" in code:
            return slice(*code["slice"])
        if "same" in code:
            return self._made_before(code["same"])
        return self._tensor(code) if "tensor" in code else self._part(code)

    def _made_before(self, number: int) -> Any:
        if number < 0 or number in self._around:
            raise CheckpointError("a part is said to hold itself")
        return self._made[number]

    def _tensor(self, code: dict[str, Any]) -> Tensor:
        value = self._tensors[code["tensor"]]
        value = nn.Parameter(value, False) if code["is_parameter"] else value
        self._made.append(value.requires_grad_(code["trains"]))
        return value

    def _part(self, code: dict[str, Any]) -> Any:
        part: Any = object.__new__(_class_named(code["class"]))
        number = len(self._made)
        self._made.append(part)
        self._around.add(number)
        if isinstance(part, nn.Module):
            nn.Module.__init__(part)
        vars(part).update({attribute: self.decode(value) for attribute, value in code["has"].items()})
        if isinstance(part, Transform):
            vars(part)["_cached_x_y"] = (None, None)
        self._around.remove(number)
        return part


def _joined(path: str, name: str | int) -> str:
    """Return the path of an attribute as ``named_parameters`` writes it."""
    if name in _CONTENTS_OF_MODULES:
        return path
    return f"{path}.{name}" if path else str(name)


def _class_named(name: str) -> type:
    """Return the class of this name, such as "pyroflows.flows.flow:Flow", if files may name it."""
    module, _, path = name.partition(":")
    # Modules are looked up, never imported, since an import runs code.
    found: Any = sys.modules.get(module)
    for attribute in path.split("."):
        found = getattr(found, attribute, None)
    if not isinstance(found, type) or found.__module__ != module or not is_from_library(found):
        raise CheckpointError(f"this version has no class {name} that a flow could hold")
    return found

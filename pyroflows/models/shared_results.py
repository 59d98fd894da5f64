"""Compute once what a model computes many times from the same tensors, as the steps of a chain do.

Where a discrete site takes all of its values at once, its value is the same at every step of a chain, and so is all
that follows from it and from parameters, such as the rows of a transition matrix and their normalisation. Shared, it
costs one operation, and one of the backward pass, instead of one for each step.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.overrides import TorchFunctionMode

_SHARED = {
    *("__getitem__", "add", "sub", "rsub", "mul", "div", "true_divide", "neg", "pow", "square", "sqrt", "reciprocal"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__neg__"),
    *("__div__", "__rdiv__", "__pow__", "__matmul__", "matmul", "exp", "log", "log1p", "expm1", "sigmoid", "softmax"),
    *("log_softmax", "logsigmoid", "softplus", "logsumexp", "sum", "clamp", "lgamma", "where", "stack", "cat"),
    *("expand", "reshape", "view", "unsqueeze", "squeeze", "transpose", "permute", "broadcast_tensors", "contiguous"),
}


class WrittenShared(Exception):
    """A model writes in place into a tensor that several of its operations share."""


class SharedResults(TorchFunctionMode):
    """A context in which an operation that was done before, on the same tensors, gives the same tensor again.

    Raises:
        WrittenShared: where such a tensor would be written into.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> with SharedResults():
        ...     a, b = x.exp(), x.exp()
        >>> a is b
        True
    """

    def __init__(self) -> None:
        super().__init__()
        # Results, what they were when they were made, and the tensors that were given, which are kept so that no other
        # tensor gets their identity.
        self._results: dict[Hashable, tuple[Any, Hashable, Any]] = {}
        self._memories: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name not in _SHARED:
            if (name.endswith("_") and not name.startswith("_")) or name == "__setitem__" or name in _IN_PLACE:
                self._require_unshared(args[0])
            return function(*args, **kwargs)
        key = (function, _key(args), _key(kwargs), torch.is_grad_enabled())
        if key in self._results:
            output, version, _ = self._results[key]
            if version == _key(output):
                self._memories |= {_memory(t) for t in (output if isinstance(output, tuple | list) else (output,))}
                return output
        output = function(*args, **kwargs)
        self._results[key] = output, _key(output), (args, kwargs)
        return output

    def _require_unshared(self, target: Any) -> None:
        if isinstance(target, Tensor) and _memory(target) in self._memories:
            raise WrittenShared


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}


def _key(value: Any) -> Hashable:
    """Something that is equal for the same tensors with the same numbers, and for equal values of Python."""
    if isinstance(value, Tensor):
        return id(value), _version(value)
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(part)) for name, part in value.items())
    if isinstance(value, slice):
        return "slice", _key(value.start), _key(value.stop), _key(value.step)
    return type(value), value if isinstance(value, Hashable) else id(value)


def _unwrapped(tensor: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _version(tensor: Tensor) -> Hashable:
    inner = _unwrapped(tensor)
    return object() if inner.is_inference() else inner._version


def _memory(tensor: Tensor) -> int:
    return _unwrapped(tensor).untyped_storage()._cdata

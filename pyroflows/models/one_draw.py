"""Let code that is written for one draw run under vmap, where it fills tensors in place or branches on a value."""

import sys
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from types import CodeType, FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from pyroflows.compiling.record import tensors_in
from pyroflows.errors import ModelError
from pyroflows.models.lines import line_of_frame

# The code of a function, and the offset in it of the call that makes a tensor.
Place: TypeAlias = tuple[CodeType, int]

_functorch = torch._C._functorch
# Operators such as |= have methods of these names; x += y calls x.add_(y).
_IN_PLACE = {"__setitem__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__idiv__"}
_RANDOM = {"bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"}
_COMPARISONS = {"eq", "ge", "gt", "le", "lt", "ne"}
_MIRRORED = {"lt": "gt", "le": "ge"}
# These run row by row under vmap, unlike the functions without the underscore.
_SLOW_IN_PLACE = {"index_copy_", "masked_fill_", "masked_scatter_", "scatter_"}
# The gradients of these need no numbers of their arguments, which are not copied therefore.
_VIEWS = {
    *("__get__", "__getitem__", "__iter__", "adjoint", "as_strided", "chunk", "contiguous", "detach", "diagonal"),
    *("expand", "expand_as", "flatten", "movedim", "narrow", "permute", "ravel", "reshape", "reshape_as", "select"),
    *("split", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type_as", "unbind"),
    *("unflatten", "unfold", "unsqueeze", "view", "view_as"),
}
# What these do concerns the tensor itself, and not its numbers.
_OF_ITSELF = {"__set__", "backward", "grad", "register_hook", "retain_grad"}


class WritesOutside(ModelError):
    """A model writes values that depend on a draw into a tensor that it did not make."""


class ManyPaths(Exception):
    """The branches of a model have more paths than are run."""


class MustFollow(Exception):
    """A tensor has no dimension for the draws, but values that differ between draws are written into it.

    Args:
        place: where the tensor was made.
    """

    def __init__(self, place: Place) -> None:
        super().__init__("a tensor that the model fills must follow the batch")
        self.place = place


# Stands for all tensors from outside of the context that need gradients, such as parameters. Where there are branches
# they follow the batch too, so that each draw has a gradient of its own.
PARAMETERS: Place = ((lambda: None).__code__, -1)


class OneDraw(TorchFunctionMode):
    """A context inside of a function under vmap, in which code for one draw may fill tensors and branch.

    vmap cannot write values of a batch into a tensor that all draws share, such as ``torch.zeros(3)``, nor give Python
    the truth of a condition that differs between draws. In this context tensors that are made at given places differ
    between draws from the start, and conditions have outcomes that were decided beforehand.

    Args:
        token: a tensor that differs between draws, of the vmap in which the context stands.
        places: where tensors are made that differ between draws.
        outcomes: what the conditions on single numbers are taken to be, in their order; those after them are True, and
            are added to the list.
        max_conditions: the largest number of conditions.
        gate: is applied to tensors from outside that need gradients, once they are repeated for each draw; None to
            let them be.

    Attributes:
        conditions: the conditions that the code met, as boolean tensors without dimensions.

    Raises:
        MustFollow: at a write into a tensor from a place that is not among the given ones.
        WritesOutside: at a write into a tensor that was made outside of the context.
        ManyPaths: at one condition too many.

    Example:
        >>> def largest(x, token):
        ...     with OneDraw(token, set(), outcomes=[]) as context:
        ...         value = max(x[0], x[1])  # asks whether x[1] > x[0]
        ...     return value, context.conditions[0]
        >>> torch.func.vmap(largest)(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), torch.arange(2))
        (tensor([2., 3.]), tensor([ True, False]))
    """

    def __init__(
        self,
        token: Tensor,
        places: Iterable[Place],
        outcomes: list[bool],
        max_conditions: int = sys.maxsize,
        gate: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._num_draws, self._gate = len(_unwrapped(token)), gate
        self._has_read_parameters = False
        self.conditions: list[Tensor] = []
        self._is_draw = token == token
        self._level = _functorch.maybe_get_level(token)
        self._places, self._outcomes, self._max_conditions = frozenset(places), outcomes, max_conditions
        # By memory: where tensors without a dimension for the draws were made, which are kept, so that no other tensor
        # gets their memory; and the memory of those that were given one.
        self._made: dict[int, tuple[Place, Tensor]] = {}
        self._followers: dict[int, Tensor] = {}
        # What was compared, by the identity of the result, with the tensors, which are kept, and the version of the
        # result, which a write changes; and the answers so far.
        self._comparisons: dict[int, tuple[Hashable, Hashable, Any]] = {}
        self._known: dict[Hashable, bool] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, caller = kwargs or {}, sys._getframe(1)
        name = getattr(function, "__name__", "")
        if name in ("__bool__", "item") and self._is_condition(args[0], name):
            return self._outcome(args[0])
        if self._gate is not None and name not in _VIEWS | _OF_ITSELF and torch.is_grad_enabled():
            num_targets = int(_writes(name))
            args = (*args[:num_targets], *self._with_gates(args[num_targets:]))
            kwargs = self._with_gates(kwargs)
        if args and _writes(name):
            return self._write(function, name, args, kwargs, caller)
        if self._followers and name not in _VIEWS | _OF_ITSELF and torch.is_grad_enabled():
            output = _on_copies(function, args, kwargs, self._copied)
        else:
            output = function(*args, **kwargs)
        if name in _COMPARISONS and len(args) == 2 and not kwargs and all(map(_is_comparable, args)):
            numbers = map(_identity, args if name not in _MIRRORED else args[::-1])
            self._comparisons[id(output)] = (_MIRRORED.get(name, name), *numbers), _version(output), (output, args)
        if isinstance(output, Tensor):
            return self._follow(output, args, kwargs, caller)
        if type(output) in (tuple, list):
            return type(output)(
                self._follow(part, args, kwargs, caller) if isinstance(part, Tensor) else part for part in output
            )
        return output

    # Branches

    def _is_condition(self, tensor: Tensor, name: str) -> bool:
        return (
            self._differs(tensor)
            and _functorch.maybe_get_level(tensor) == self._level
            and tensor.numel() == 1
            and (name == "__bool__" or tensor.dtype == torch.bool)
        )

    def _outcome(self, condition: Tensor) -> bool:
        asked, version, _ = self._comparisons.get(id(condition), (None, 0, None))
        if asked is not None and version != _version(condition):
            asked = None  # such as after condition &= other
        if asked in self._known:
            return self._known[asked]
        if self._has_read_parameters:
            raise MustFollow(PARAMETERS)
        index = len(self.conditions)
        if index == self._max_conditions:
            raise ManyPaths(f"one run has more than {index} conditions on values of latents")
        self.conditions.append(condition.reshape(()) != 0)
        if index == len(self._outcomes):
            self._outcomes.append(True)
        if asked is not None:
            self._known[asked] = self._outcomes[index]
        return self._outcomes[index]

    # Tensors that are filled in place

    def _write(self, function: Any, name: str, args: Any, kwargs: Any, caller: FrameType) -> Any:
        target = args[0]
        written = tensors_in((args[1:], kwargs))
        if not self._differs(target) and (name in _RANDOM or any(map(self._differs, written))):
            memory = _memory(target)
            if memory not in self._made:
                raise WritesOutside(
                    f"the model writes in place into a tensor that it did not make{line_of_frame(caller)}: this "
                    "changes the tensor itself, and later runs of the model see the changed values. Make a copy in the "
                    "model and write into that: x = x.clone()"
                )
            raise MustFollow(self._made[memory][0])
        args, kwargs = (target, *self._copied(args[1:])), self._copied(kwargs)
        if name == "__setitem__" and self._is_mask(args[1]) and _is_number(args[2]):
            # vmap cannot count the entries of a mask that differs between draws.
            mask = args[1].reshape(args[1].shape + (1,) * (target.dim() - args[1].dim()))
            return target.copy_(torch.where(mask, torch.as_tensor(args[2]).to(target).reshape(()), target))
        if name in _SLOW_IN_PLACE:
            return target.copy_(getattr(Tensor, name[:-1])(*args, **kwargs))
        return function(*args, **kwargs)

    def _is_mask(self, index: Any) -> bool:
        return isinstance(index, Tensor) and index.dtype == torch.bool and self._differs(index)

    def _follow(self, output: Tensor, args: Any, kwargs: Any, caller: FrameType) -> Tensor:
        """Note where a tensor was made, and let it differ between draws if it was made at one of the places."""
        if self._differs(output):
            return output
        memory = _memory(output)
        if memory in self._made or any(
            memory == _memory(t) for t in tensors_in((args, kwargs)) if not self._differs(t)
        ):
            return output
        place = (caller.f_code, caller.f_lasti)
        if place not in self._places:
            self._made[memory] = place, output
            return output
        follower = torch.where(self._is_draw.to(output.device), output, output)
        self._followers[_memory(follower)] = follower
        return follower

    def _with_gates(self, tree: Any) -> Any:
        """Let parameters differ between draws, and no gradient flow into them from draws that do not take the path."""
        if isinstance(tree, Tensor):
            if not tree.requires_grad or _functorch.is_functorch_wrapped_tensor(tree):
                return tree
            if PARAMETERS not in self._places and not self.conditions:
                self._has_read_parameters = True
                return tree
            assert self._gate is not None
            gated = self._gate(tree.expand(self._num_draws, *tree.shape))
            return _functorch._add_batch_dim(gated, 0, self._level)
        if type(tree) in (tuple, list):
            return type(tree)(self._with_gates(part) for part in tree)
        return {name: self._with_gates(part) for name, part in tree.items()} if isinstance(tree, dict) else tree

    def _copied(self, tree: Any) -> Any:
        """Copy what an operation reads of a filled tensor, since later writes would change what its gradient needs."""
        if isinstance(tree, Tensor):
            return tree.clone() if self._differs(tree) and _memory(tree) in self._followers else tree
        if type(tree) in (tuple, list):
            return type(tree)(self._copied(part) for part in tree)
        return {name: self._copied(part) for name, part in tree.items()} if isinstance(tree, dict) else tree

    def _differs(self, tensor: Any) -> bool:
        """Whether a tensor differs between draws, also inside of further vmaps or gradients of the model's own."""
        while isinstance(tensor, Tensor) and _functorch.is_functorch_wrapped_tensor(tensor):
            if _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) == self._level:
                return True
            tensor = _functorch.get_unwrapped(tensor)
        return False


class CopiedReads(TorchFunctionMode):
    """A context in which operations read copies, so that code that writes into what they read has gradients.

    Torch refuses the gradient of ``y[1] = x * y[0]`` otherwise, since the product keeps ``y`` for its gradient. Copies
    take time, and :class:`OneDraw` makes only those that are needed.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> with CopiedReads():
        ...     y = torch.ones(2)
        ...     y[0] = x
        ...     y[1] = x * y[0]
        >>> y[1].backward()
        >>> x.grad
        tensor(6.)
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name not in _VIEWS | _OF_ITSELF and torch.is_grad_enabled():
            if not _writes(name):
                return _on_copies(function, args, kwargs, partial(tree_map_only, Tensor, torch.clone))
            rest, kwargs = tree_map_only(Tensor, torch.clone, (args[1:], kwargs))
            args = (*args[:1], *rest)
        return function(*args, **kwargs)


def _on_copies(function: Any, args: Any, kwargs: Any, copied: Callable[[Any], Any]) -> Any:
    """Call a function with copies, or with its arguments themselves if it returns a view of them or writes into them.

    Many functions return their argument itself in some cases, such as ``float()`` and ``F.dropout(training=False)``, or
    write into it on demand, such as ``F.relu(inplace=True)``.
    """
    tree = copied((args, kwargs))
    pairs = [(t, copy) for t, copy in zip(tensors_in((args, kwargs)), tensors_in(tree), strict=True) if t is not copy]
    versions = [_version(copy) for _, copy in pairs]
    output = function(*tree[0], **tree[1])
    written = [pair for pair, version in zip(pairs, versions, strict=True) if version != _version(pair[1])]
    for target, copy in written:
        if output is copy:
            # The gradient of the write can need the copy, which later writes do not change.
            return target.copy_(copy)
    memories = {_memory(copy) for _, copy in pairs}
    is_view = any(_memory(t) in memories for t in tensors_in(output))
    return function(*args, **kwargs) if is_view or written else output


def _is_comparable(value: Any) -> bool:
    return isinstance(value, Tensor | int | float)


def _identity(value: Any) -> Hashable:
    """Something that is equal for tensors that show the same numbers, and for equal numbers."""
    if not isinstance(value, Tensor):
        return value
    inner = _unwrapped(value)
    return _memory(value), _version(value), inner.storage_offset(), inner.shape, inner.stride(), inner.dtype


def _version(tensor: Tensor) -> Hashable:
    """Something that every write into the memory of a tensor changes; never equal where torch does not count writes."""
    inner = _unwrapped(tensor)
    return object() if inner.is_inference() else inner._version


def _writes(name: str) -> bool:
    return name in _IN_PLACE or (name.endswith("_") and not name.startswith("_"))


def _memory(tensor: Tensor) -> int:
    return _unwrapped(tensor).untyped_storage()._cdata


def _unwrapped(tensor: Tensor) -> Tensor:
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, Tensor) and value.numel() == 1)

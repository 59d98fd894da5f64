"""A function of tensors recorded once, gradients included, as the list of operations that the dispatcher sees.

``make_fx`` does the same with a proxy for each tensor, and takes some fifteen times as long, which loops in a model
make seconds of.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.eager import Recording
from pyroflows.errors import UntraceableError

_aten = torch.ops.aten
# The shape of their outputs depends on the values of a mask, which may be a constant.
_SELECTIONS = {_aten.index.Tensor, _aten.masked_select.default}


@dataclass(frozen=True)
class Operation:
    """A call of an operator of torch: its arguments, what it returned, and whether a run has to repeat it."""

    function: Any
    args: Any
    kwargs: Any
    inputs: list[Tensor]
    output: Any
    outputs: list[Tensor]
    varies: bool  # between runs: it depends on the inputs or draws random numbers

    @property
    def is_draw(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.function.tags

    @property
    def written(self) -> list[Tensor]:
        """The arguments that it writes into."""
        if not self.function._schema.is_mutable:
            return []
        arguments = self.function._schema.arguments
        named = [(argument, self.kwargs[argument.name]) for argument in arguments if argument.name in self.kwargs]
        return tensors_in(
            [
                value
                for argument, value in [*zip(arguments, self.args, strict=False), *named]
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
        )


class Recorder(Recording):
    """Records operations, and whether they vary: whether they read memory that does, or draw random numbers.

    Args:
        inputs: tensors whose values are others at each run.
        state: tensors whose values are read at each run. They may be looked at.

    Attributes:
        operations: what was recorded.
        decisive: tensors of the state whose values decided what was recorded.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True, the default, imports torch._dynamo, which takes a second.
        return False

    def __init__(self, inputs: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.decisive: list[Tensor] = []
        self._state = list(state)
        self._inputs = memories(inputs)
        self._varying = self._inputs | memories(state)
        self._created: set[int] = set()
        # Outcomes of validation.
        self._checks: set[int] = set()
        # What operations that vary have read.
        self._read: set[int] = set()
        # Memory made without the inputs and then written to with them, or after it was read.
        self._overwritten: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        before = memories(inputs)
        varies = not before.isdisjoint(self._varying)
        if varies and (looked_at := self._looked_at(function, args)):
            self._decide(function, looked_at)
        output = function(*args, **kwargs)
        # A draw is another one at each run.
        varies = varies or torch.Tag.nondeterministic_seeded in function.tags
        operation = Operation(function, args, kwargs, inputs, output, tensors_in(output), varies)
        after = memories(operation.outputs)
        self._created |= after - before
        if function._schema.is_mutable:
            self._overwrite(operation)
        if varies:
            self._varying |= after
            self._read |= before
        if function is _aten._is_all_true.default:
            self._checks.add(id(output))
        self.operations.append(operation)
        if function is _aten.linalg_cholesky_ex.default:
            # A program has no checks of factorisations, which are operations without a result. This one leaves finite
            # numbers.
            factor, info = output
            with self:
                return factor.masked_fill((info != 0)[..., None, None], torch.nan), info
        if function is _aten.lift_fresh.default:
            # What torch.tensor makes is first seen here. A copy can be written to, and made again by a run.
            with self:
                return output.clone()
        return output

    def _looked_at(self, function: Any, args: Any) -> list[Tensor]:
        """The varying tensors whose values Python, or the shape of the output, depends on."""
        if function in _SELECTIONS:
            masks = [index for index in tensors_in(args[1]) if index.dtype in (torch.bool, torch.uint8)]
            return [mask for mask in masks if _memory(mask) in self._varying]
        if torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags:
            # A distribution looks at its own validation: what fails raises, what passes is not repeated.
            return [tensor for tensor in tensors_in(args) if id(tensor) not in self._checks]
        return []

    def _decide(self, function: Any, looked_at: list[Tensor]) -> None:
        """Note the state that the tensors looked at were computed from, which must be all that they depend on."""
        memory = memories(looked_at)
        is_drawn = False
        for operation in reversed(self.operations):
            if not memory.isdisjoint(memories([*operation.outputs, *operation.written])):
                memory |= memories(operation.inputs)
                is_drawn |= operation.is_draw
        if is_drawn or not memory.isdisjoint(self._inputs):
            raise UntraceableError(
                f"{function} needs the value of a tensor that depends on the inputs: an if, a float(), an .item() or a "
                "boolean mask; use torch.where instead"
            )
        self.decisive += [tensor for tensor in self._state if _memory(tensor) in memory]

    def _overwrite(self, operation: Operation) -> None:
        for tensor in operation.written:
            memory = _memory(tensor)
            if memory not in self._created:
                raise UntraceableError(f"{operation.function} writes into a tensor from outside of the function")
            if memory not in self._varying and (operation.varies or memory in self._read):
                self._overwritten.add(memory)
            if operation.varies:
                self._varying.add(memory)

    def varying(self) -> list[Operation]:
        """The operations that a run has to repeat."""
        return [
            operation
            for operation in self.operations
            if operation.varies or not self._overwritten.isdisjoint(memories(operation.outputs))
        ]

    def varies(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory holds other values at each run."""
        return _memory(tensor) in self._varying


# Arguments of operations are tensors, and lists of them; torch's general trees would take most of the time.


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in an argument of an operation, or in what it returned."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    if isinstance(tree, list | tuple | dict):
        for part in tree.values() if isinstance(tree, dict) else tree:
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, list | tuple | dict):
                found += tensors_in(part)
    return found


def memories(tensors: Iterable[Tensor]) -> set[int]:
    """What identifies the memory of tensors, which views share."""
    return {_memory(tensor) for tensor in tensors}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

"""Record a function of tensors once, gradients included, as the list of operations that the dispatcher sees.

``make_fx`` does the same with a proxy for each tensor, but takes about fifteen times as long, which means seconds for a
model with loops.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.eager import Recording
from pyroflows.compiling.singular import nan_where_failed
from pyroflows.errors import UntraceableError

_aten = torch.ops.aten
# The output of these operators has a shape that depends on the values of a mask, which may be a constant.
_SELECTIONS = {_aten.index.Tensor, _aten.masked_select.default}


@dataclass(frozen=True)
class Operation:
    """An operation is one call of an operator of torch, with its arguments and what it returned.

    Args:
        function: the operator.
        args: its positional arguments.
        kwargs: its keyword arguments.
        inputs: the tensors among the arguments.
        output: what it returned.
        outputs: the tensors in what it returned.
        varies: whether each run has to repeat it, because it depends on the inputs or draws random numbers.
    """

    function: Any
    args: Any
    kwargs: Any
    inputs: list[Tensor]
    output: Any
    outputs: list[Tensor]
    varies: bool

    @property
    def is_draw(self) -> bool:
        """Tell whether it draws random numbers."""
        return torch.Tag.nondeterministic_seeded in self.function.tags

    @property
    def written(self) -> list[Tensor]:
        """Return the arguments that it writes into."""
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
    """A recorder notes the operations that run inside of it, and whether each of them varies from run to run.

    An operation varies if it reads memory that varies, or draws random numbers.

    Args:
        inputs: tensors that have other values at each run.
        state: tensors whose values are read at each run; the function may branch on them.

    Attributes:
        operations: the operations so far.
        decisive: tensors of the state whose values decided what was recorded.

    Raises:
        UntraceableError: where the function needs the value of a tensor that depends on the inputs, or writes into a
            tensor that it did not make.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default, True, would import torch._dynamo, which takes a second.
        return False

    def __init__(self, inputs: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.decisive: list[Tensor] = []
        self._state = list(state)
        self._inputs = memories(inputs)
        self._varying = self._inputs | memories(state)
        self._created: set[int] = set()
        # The results of validation by distributions, by id.
        self._checks: set[int] = set()
        # The memory that varying operations have read.
        self._read: set[int] = set()
        # Memory that was made without the inputs, and written to with values that depend on them or after it was read.
        self._overwritten: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        before = memories(inputs)
        varies = not before.isdisjoint(self._varying)
        if varies and (looked_at := self._looked_at(function, args)):
            self._decide(function, looked_at)
        output = function(*args, **kwargs)
        # Each run draws other numbers.
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
            # A program does not repeat checks, which are operations without a result; without this one, a failed
            # factorisation would leave finite numbers.
            factor, info = output
            with self:
                return nan_where_failed(factor, info), info
        if function is _aten.lift_fresh.default:
            # What torch.tensor makes is first seen here. A copy can be written to, and made again by a run.
            with self:
                return output.clone()
        return output

    def _looked_at(self, function: Any, args: Any) -> list[Tensor]:
        """Return the varying tensors whose values decide what Python does next, or the shape of the output."""
        if function in _SELECTIONS:
            masks = [index for index in tensors_in(args[1]) if index.dtype in (torch.bool, torch.uint8)]
            return [mask for mask in masks if _memory(mask) in self._varying]
        if torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags:
            # A distribution reads the result of its own validation: a failure raises, a success is not repeated.
            return [tensor for tensor in tensors_in(args) if id(tensor) not in self._checks]
        return []

    def _decide(self, function: Any, looked_at: list[Tensor]) -> None:
        """Note the state that the given tensors were computed from, and refuse those that depend on anything else."""
        memory = memories(looked_at)
        is_drawn = False
        for operation in reversed(self.operations):
            if not memory.isdisjoint(memories([*operation.outputs, *operation.written])):
                memory |= memories(operation.inputs)
                is_drawn |= operation.is_draw
        if is_drawn or not memory.isdisjoint(self._inputs):
            raise UntraceableError(
                f"{function} needs the value of a tensor that depends on the inputs, as an if, a float(), an .item() "
                "and a boolean mask do; use torch.where instead"
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
        """Return the operations that each run has to repeat."""
        return [
            operation
            for operation in self.operations
            if operation.varies or not self._overwritten.isdisjoint(memories(operation.outputs))
        ]

    def varies(self, tensor: Tensor) -> bool:
        """Tell whether the memory of a tensor holds other values at each run."""
        return _memory(tensor) in self._varying


# The arguments of operations are tensors and lists of tensors; torch's general trees would take most of the time.


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in the arguments of an operation, or in what it returned."""
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
    """Return numbers that identify the memory of tensors; a view has the number of the tensor that it shows."""
    return {_memory(tensor) for tensor in tensors}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

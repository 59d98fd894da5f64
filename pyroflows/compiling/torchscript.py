"""Build graphs of TorchScript operation by operation; its tracer would run all of them once more."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# TorchScript knows memory formats by their numbers in the enumeration of C++.
_MEMORY_FORMATS = {torch.contiguous_format: 0, torch.preserve_format: 1, torch.channels_last: 2}


class Graph:
    """A graph collects operations that TorchScript's interpreter runs: deprecated, but the fastest on small tensors.

    Args:
        num_inputs: number of tensors that the graph takes.

    Attributes:
        inputs: the values of the graph that stand for these tensors.
    """

    def __init__(self, num_inputs: int) -> None:
        self._graph: Any = torch._C.Graph()  # Any, since torch's stubs lack some of its methods
        self.inputs = [self._graph.addInput() for _ in range(num_inputs)]
        self._literals: dict[str, Any] = {}

    def constant(self, tensor: Tensor) -> Any:
        """Add a constant, and return the value that stands for it."""
        return self._graph.insertConstant(tensor)

    def call(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], num_outputs: int) -> Sequence[Any]:
        """Add a call of an operator, and return the values that stand for its outputs.

        Args:
            function: the operator.
            args: its positional arguments, with values of the graph in the place of tensors.
            kwargs: its keyword arguments, likewise.
            num_outputs: the number of tensors that it returns, which a list of tensors does not tell.
        """
        name, parameters, returned = _signature(function)
        inputs = [
            self._argument(args[i] if i < len(args) else kwargs.get(key, default), type_)
            for i, (key, type_, default) in enumerate(parameters)
        ]
        node = self._graph.appendNode(self._graph.create(name, inputs, len(returned)))
        outputs = list(node.outputs())
        for output, type_ in zip(outputs, returned, strict=True):
            output.setType(type_)
        if len(returned) == 1 and isinstance(returned[0], torch.ListType):
            unpacked = self._graph.create("prim::ListUnpack", outputs, num_outputs)
            outputs = list(self._graph.appendNode(unpacked).outputs())
        return outputs

    def function(self, outputs: Sequence[Any]) -> Callable[..., tuple[Tensor, ...]]:
        """Return the graph as a function from its inputs to a tuple of these outputs."""
        node = self._graph.create("prim::TupleConstruct", list(outputs))
        node.output().setType(torch.TupleType([torch.TensorType.get() for _ in outputs]))
        self._graph.registerOutput(self._graph.appendNode(node).output())
        # This pass removes double transposes and products with one.
        torch._C._jit_pass_peephole(self._graph)
        # The function has a compilation unit of its own, and is freed with it: torch.jit.trace would register it in a
        # table of the process for good.
        program = torch._C._create_function_from_graph("program", self._graph)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            # The other passes of the optimiser make no run faster, and take as long as a hundred runs of a small
            # program, or seconds for a long one.
            is_optimized = torch._C._get_graph_executor_optimize()
            torch._C._set_graph_executor_optimize(False)
            try:
                return program(*inputs)
            finally:
                torch._C._set_graph_executor_optimize(is_optimized)

        return run

    def _argument(self, argument: Any, type_: Any) -> Any:
        """Return the value that stands for an argument of an operator."""
        if isinstance(argument, torch._C.Value):
            return argument
        if isinstance(argument, list | tuple) and (
            not argument or any(isinstance(part, torch._C.Value) for part in argument)
        ):
            type_ = _element(type_)
            parts = [self._argument(part, type_.getElementType()) for part in argument]
            node = self._graph.create("prim::ListConstruct", parts)
            node.output().setType(type_)
            return self._graph.appendNode(node).output()
        if isinstance(argument, bool) and isinstance(_element(type_), torch._C.NumberType | torch.TensorType):
            # For TorchScript's schemas a boolean is no scalar.
            node = self._graph.create("aten::ScalarImplicit", [self._graph.insertConstant(torch.tensor(argument))])
            node.output().setType(torch._C.NumberType.get())
            return self._graph.appendNode(node).output()
        key = repr(argument)  # since 0.0 equals -0.0, and 1 equals 1.0 and True
        if key not in self._literals:
            is_format = isinstance(argument, torch.memory_format)
            self._literals[key] = self._graph.insertConstant(_MEMORY_FORMATS[argument] if is_format else argument)
        return self._literals[key]


def _element(type_: Any) -> Any:
    """The type without the option of None."""
    return type_.getElementType() if isinstance(type_, torch.OptionalType) else type_


@cache
def _signature(function: Any) -> tuple[str, list[tuple[str, Any, Any]], list[Any]]:
    """Return the name of an operator, its parameters with types and defaults, and the types that it returns."""
    schema = function._schema
    parameters = [(argument.name, argument.type, argument.default_value) for argument in schema.arguments]
    return schema.name, parameters, [returned.type for returned in schema.returns]

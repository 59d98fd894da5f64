"""A function of tensors recorded once as a list of operations, and run without Python and autograd in between.

What the function computes from its inputs, gradients included, is recorded operation by operation as the dispatcher
sees it; what does not depend on the inputs is computed once. ``make_fx`` does the same with a proxy for each tensor,
and takes some fifteen times as long, which loops in a model make seconds of.
"""

import operator
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from pyroflows.errors import UntraceableError

Function = Callable[..., Sequence[Tensor]]

# TorchScript's optimiser gains a fifth on small programs, and takes seconds, more than in proportion, on long ones.
MAX_OPTIMIZED = 3000

_aten = torch.ops.aten
# The shape of their outputs depends on the values of a mask, which may be a constant.
_SELECTIONS = {_aten.index.Tensor, _aten.masked_select.default}
# They give their input another name.
_ALIASES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}


def _cholesky_or_nan(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    factor, info = _aten.linalg_cholesky_ex.default(*args, **kwargs)
    return factor.masked_fill((info != 0)[..., None, None], torch.nan), info


# A program has no checks of factorisations, which are operations without a result. This one leaves finite numbers.
_SUBSTITUTES = {_aten.linalg_cholesky_ex.default: _cholesky_or_nan}


@cache
def _convolution_backward() -> Any:
    """A function of TorchScript, whose tracer knows no arrays of booleans and no results that are not there."""
    source = """
    def convolution_backward(
        gradient: Tensor, x: Tensor, weight: Tensor, bias: Optional[List[int]], stride: List[int], padding: List[int],
        dilation: List[int], transposed: bool, output_padding: List[int], groups: int, wanted: List[bool]
    ):
        a, b, c = torch.ops.aten.convolution_backward(
            gradient, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, wanted
        )
        none = torch.empty([0])
        return a if wanted[0] else none, b if wanted[1] else none, c if wanted[2] else none
    """
    return torch.jit.CompilationUnit(textwrap.dedent(source)).convolution_backward


def _traceable(function: Any) -> Any:
    return _convolution_backward() if function is _aten.convolution_backward.default else function


@dataclass(frozen=True)
class _Operation:
    function: Any
    args: Any
    kwargs: Any
    output: Any
    depends: bool  # on the inputs

    @property
    def outputs(self) -> list[Tensor]:
        return _tensors(self.output)


def compiled(function: Function, examples: Sequence[Tensor], executor: str = "trace") -> Function:
    """The function as one program, for inputs of the examples' shapes and dtypes.

    Args:
        function: maps tensors to a sequence of tensors without gradients. Tensors that it reads without being given
            them, such as the parameters of a module, are inputs too if they stand among the examples; all others are
            constants.
        examples: inputs.
        executor: "trace", the interpreter of TorchScript, costs little more than a few runs; "inductor" generates
            machine code, tens of seconds, for runs by the ten thousands; "none" is the function itself.

    Where a matrix has no Cholesky factor the program gives NaN instead of an error: the rows beside it go on.

    Raises:
        UntraceableError: if the function needs the value of a tensor that depends on its inputs.

    Example:
        >>> square = compiled(lambda x: [x * x], [torch.ones(2)])
        >>> square(torch.tensor([2.0, 3.0]))
        (tensor([4., 9.]),)
    """
    if executor == "none":
        return function
    program = _Program(function, examples)
    return torch.compile(program.graph_module(), dynamic=False) if executor == "inductor" else program.traced()


class _Program:
    """The recorded operations, in terms of numbered places for tensors."""

    def __init__(self, function: Function, examples: Sequence[Tensor]) -> None:
        with _Recorder(examples) as recorder:
            outputs = list(function(*examples))
        aliases = {
            id(op.output): op.args[0]
            for op in recorder.operations
            if op.function in _ALIASES and op.output is not op.args[0]
        }

        def source(tensor: Tensor) -> Tensor:
            while id(tensor) in aliases:
                tensor = aliases[id(tensor)]
            return tensor

        self._source = source
        self._inputs, self._outputs = list(examples), [source(output) for output in outputs]
        self._keep = recorder  # whose tensors keep their identity only as long as they live
        self._operations = self._needed([op for op in recorder.recorded() if op.function not in _ALIASES])
        computed = {id(tensor) for op in self._operations for tensor in op.outputs} | {id(t) for t in self._inputs}
        used = [source(tensor) for op in self._operations for tensor in _tensors((op.args, op.kwargs))]
        self._constants = {id(t): t.detach() for t in [*used, *self._outputs] if id(t) not in computed}

    def _needed(self, operations: list[_Operation]) -> list[_Operation]:
        """Those that the outputs depend on, and those that write into a tensor."""
        wanted = {id(output) for output in self._outputs}
        kept = []
        for op in reversed(operations):
            if op.function._schema.is_mutable or any(id(out) in wanted for out in op.outputs):
                kept.append(op)
                wanted.update(id(self._source(tensor)) for tensor in _tensors((op.args, op.kwargs)))
        return kept[::-1]

    def _run(self, inputs: Sequence[Any], constants: dict[int, Any], call: Callable[..., Any]) -> Any:
        values = constants | {id(tensor): value for tensor, value in zip(self._inputs, inputs, strict=True)}

        def value(tensor: Tensor) -> Any:
            return values[id(self._source(tensor))]

        for op in self._operations:
            kwargs = {name: _mapped(value, argument) for name, argument in op.kwargs.items()}
            function = _SUBSTITUTES.get(op.function, op.function)
            result = call(function, _mapped(value, op.args), kwargs)
            if isinstance(op.output, Tensor):
                values[id(op.output)] = result
            else:
                for i, out in enumerate(op.output):
                    if isinstance(out, Tensor):
                        values[id(out)] = call(operator.getitem, (result, i), {})
        return tuple(value(output) for output in self._outputs)

    def traced(self) -> Function:
        """For TorchScript's interpreter: the fastest on small tensors, though deprecated."""

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            return self._run(inputs, self._constants, lambda f, args, kwargs: _traceable(f)(*args, **kwargs))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            # A TracerWarning, whose class torch.jit does not export: sizes in the graph are those of the examples.
            warnings.simplefilter("ignore", UserWarning)
            inputs = tuple(tensor.detach() for tensor in self._inputs)
            program = torch.jit.trace(run, inputs, check_trace=False)
        is_long = len(self._operations) > MAX_OPTIMIZED
        # What was traced keeps this object, which keeps every tensor of the recorded run.
        vars(self).clear()
        return _as_it_is(program) if is_long or not _is_optimized_rightly(program, inputs) else program

    def graph_module(self) -> fx.GraphModule:
        root, graph = torch.nn.Module(), fx.Graph()
        inputs = [graph.placeholder(f"input_{i}") for i in range(len(self._inputs))]
        constants = {}
        for i, (key, tensor) in enumerate(self._constants.items()):
            root.register_buffer(f"constant_{i}", tensor)
            constants[key] = graph.get_attr(f"constant_{i}")
        graph.output(self._run(inputs, constants, graph.call_function))
        return fx.GraphModule(root, graph)


class _Recorder(TorchDispatchMode):
    """Records operations, and whether they depend on the inputs: whether they read memory that does."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True, the default, imports torch._dynamo, which takes a second.
        return False

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self._dependent = {_memory(tensor) for tensor in inputs}
        self._created: set[int] = set()
        # Outcomes of validation.
        self._checks: set[int] = set()
        # Memory made without the inputs and then written to with them.
        self._overwritten: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        depends = any(_memory(tensor) in self._dependent for tensor in tensors)
        if depends and self._looks_at_values(function, args) and not self._is_validation(function, args):
            raise UntraceableError(
                f"{function} needs the value of a tensor that depends on the inputs: an if, a float(), an .item() or a "
                "boolean mask; use torch.where instead"
            )
        output = function(*args, **kwargs)
        # A draw is another one at each run.
        depends = depends or torch.Tag.nondeterministic_seeded in function.tags
        before = {_memory(tensor) for tensor in tensors}
        after = {_memory(tensor) for tensor in _tensors(output)}
        self._created |= after - before
        if depends:
            if function._schema.is_mutable:
                self._overwrite([t for t in tensors if _memory(t) not in self._dependent], function, args, kwargs)
            self._dependent |= after
        if function is _aten._is_all_true.default:
            self._checks.add(id(output))
        self.operations.append(_Operation(function, args, kwargs, output, depends))
        return output

    def _looks_at_values(self, function: Any, args: Any) -> bool:
        if function in _SELECTIONS:
            masks = [index for index in _tensors(args[1]) if index.dtype in (torch.bool, torch.uint8)]
            return any(_memory(mask) in self._dependent for mask in masks)
        return torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags

    def _is_validation(self, function: Any, args: Any) -> bool:
        """Whether a distribution looks at its own validation: what fails raises, what passes is not repeated."""
        return function is _aten._local_scalar_dense.default and id(args[0]) in self._checks

    def _overwrite(self, others: list[Tensor], function: Any, args: Any, kwargs: Any) -> None:
        written = [
            value
            for argument, value in [*zip(function._schema.arguments, args, strict=False), *_named(function, kwargs)]
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for tensor in _tensors(written):
            if any(tensor is other for other in others):
                if _memory(tensor) not in self._created:
                    raise UntraceableError(f"{function} writes into a tensor from outside of the function")
                self._overwritten.add(_memory(tensor))
                self._dependent.add(_memory(tensor))

    def recorded(self) -> list[_Operation]:
        """Operations that a run has to repeat."""
        return [
            op
            for op in self.operations
            if op.depends or any(_memory(tensor) in self._overwritten for tensor in op.outputs)
        ]


def _named(function: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    return [(argument, kwargs[argument.name]) for argument in function._schema.arguments if argument.name in kwargs]


# Arguments of operations are tensors, and lists of them; torch's general trees would take most of the time.


def _is_optimized_rightly(program: Function, inputs: Sequence[Tensor]) -> bool:
    """Whether TorchScript's optimiser leaves a program that runs: batching products of matrices, it can break one."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            program(*inputs)
        except RuntimeError:
            return False
    return True


def _as_it_is(program: Function) -> Function:
    def run(*inputs: Tensor) -> Sequence[Tensor]:
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            return program(*inputs)

    return run


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return _tensors(list(tree.values()))
    return [tensor for part in tree for tensor in _tensors(part)] if isinstance(tree, list | tuple) else []


def _mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    return type(tree)(_mapped(function, part) for part in tree) if isinstance(tree, list | tuple) else tree


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata

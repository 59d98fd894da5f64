"""A recorded function as a program, run without Python and autograd in between."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from pyroflows.compiling.record import Operation, Recorder, memories
from pyroflows.compiling.torchscript import Graph
from pyroflows.errors import UntraceableError

Function: TypeAlias = Callable[..., Sequence[Tensor]]
State: TypeAlias = Iterable[nn.Module | Tensor]
# Where a tensor stands: a module's dictionary of parameters or buffers, and its name there.
_Place: TypeAlias = tuple[dict[str, Any], str]

_aten = torch.ops.aten
# They give their input another name.
_ALIASES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}


def compiled(function: Function, examples: Sequence[Tensor], executor: str = "trace", state: State = ()) -> Function:
    """The function as one program, for inputs of the examples' shapes and dtypes.

    The program reads the tensors of the state anew at each call. Should one of them have another shape by then, or
    another value where the function decided by its value, the function is recorded again.

    Args:
        function: maps tensors to a sequence of tensors without gradients. Tensors that it reads without being given
            them are inputs if they stand among the examples or in the state; all others are constants.
        examples: inputs.
        executor: "trace", the interpreter of TorchScript, costs little more than a few runs; "inductor" generates
            machine code, tens of seconds, for runs by the ten thousands; "none" is the function itself.
        state: modules, of whose parameters and buffers the function may read some, and further such tensors. Buffers
            that are not persistent, in no state dict, are constants: they follow from what a module was made of.

    Where a matrix has no Cholesky factor the program gives NaN instead of an error: the rows beside it go on.

    Raises:
        UntraceableError: if the function needs the value of a tensor that depends on its inputs, or writes into a
            tensor that it did not make.

    Example:
        >>> scale = torch.tensor(1.0)
        >>> scaled_square = compiled(lambda x: [scale * x * x], [torch.ones(2)], state=[scale])
        >>> scale += 9.0
        >>> scaled_square(torch.tensor([2.0, 3.0]))
        (tensor([40., 90.]),)
    """
    if executor == "none":
        return function
    state = list(state)

    def record() -> _Program:
        # A run draws what the function draws, and no more.
        with torch.random.fork_rng():
            return _Program(function, examples, _places(state, examples))

    program = record()
    run = _Reading(record, program, executor) if program.places else _run_by(executor, program)
    return torch.no_grad()(run)


def _places(state: State, examples: Sequence[Tensor]) -> list[_Place]:
    """Where the tensors of the state stand, each once, without those that are given at each call."""
    places: list[_Place] = []
    for part in state:
        if isinstance(part, Tensor):
            places.append(({"": part}, ""))
            continue
        for module in part.modules():
            places += [(module._parameters, name) for name in module._parameters]
            constant = module._non_persistent_buffers_set
            places += [(module._buffers, name) for name in module._buffers if name not in constant]
    seen = {id(example) for example in examples}
    kept = []
    for owner, name in places:
        tensor = owner[name]
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            kept.append((owner, name))
    return kept


def _read(places: list[_Place]) -> list[Any]:
    return [owner[name] for owner, name in places]


class _Reading:
    """A program that reads the state at each call, recorded again where that no longer is what was recorded."""

    def __init__(self, record: Callable[[], "_Program"], program: "_Program", executor: str) -> None:
        self._record = record
        self._executor = executor
        self._take(program)

    def _take(self, program: "_Program") -> None:
        self._places = program.places
        self._kinds = _kinds(_read(self._places))
        self._decisive = [(place, tensor.detach().clone()) for place, tensor in program.decisive]
        self._run = _run_by(self._executor, program)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        state = _read(self._places)
        if _kinds(state) != self._kinds or not all(torch.equal(o[n], value) for (o, n), value in self._decisive):
            self._take(self._record())
            state = _read(self._places)
        return self._run(*inputs, *state)


def _kinds(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


class _Program:
    """The recorded operations that a run repeats, and what they read: inputs, tensors of the state, and constants.

    Args:
        function: is recorded.
        examples: of what it is given.
        places: of the tensors that it may read besides.

    Attributes:
        places: those that the program reads, after what it is given.
        decisive: those whose values decided what was recorded, with these values.
        num_outputs: how many outputs are the function's; what else the program returns are draws.
    """

    def __init__(self, function: Function, examples: Sequence[Tensor], places: list[_Place]) -> None:
        state = _read(places)
        with Recorder(examples, state) as recorder:
            outputs = list(function(*examples))
        self._keep = recorder  # whose tensors keep their identity only as long as they live
        self._aliases = {
            id(op.output): op.args[0]
            for op in recorder.operations
            if op.function in _ALIASES and op.output is not op.args[0]
        }
        operations = [op for op in recorder.varying() if op.function not in _ALIASES]
        # Draws that nothing came of are made all the same: those after them are the function's own at equal seeds.
        draws = [output for op in operations if op.is_draw for output in op.outputs]
        self.num_outputs = len(outputs)
        self._outputs = [self._source(output) for output in outputs] + draws
        self._operations = self._without_repetitions(self._needed(operations))

        read = {id(self._source(tensor)) for op in self._operations for tensor in op.inputs}
        decisive = {id(tensor) for tensor in recorder.decisive}
        read |= decisive | {id(output) for output in self._outputs}
        kept = [(place, tensor) for place, tensor in zip(places, state, strict=True) if id(tensor) in read]
        self.places = [place for place, _ in kept]
        self.decisive = [(place, tensor) for place, tensor in kept if id(tensor) in decisive]
        self._inputs = [*examples, *(tensor for _, tensor in kept)]
        self._constants = {id(tensor): tensor.detach() for tensor in self._not_computed()}
        if any(recorder.varies(tensor) for tensor in self._constants.values()):
            raise UntraceableError(
                "the function reads what varies through a tensor that shares its memory unseen: a view made outside of "
                "the function, or a module made inside"
            )

    def _source(self, tensor: Tensor) -> Tensor:
        """The tensor that stands for this one."""
        while id(tensor) in self._aliases:
            tensor = self._aliases[id(tensor)]
        return tensor

    def _needed(self, operations: list[Operation]) -> list[Operation]:
        """Those that the outputs depend on, and those that write into a tensor."""
        wanted = {id(output) for output in self._outputs}
        kept = []
        for op in reversed(operations):
            if op.function._schema.is_mutable or any(id(out) in wanted for out in op.outputs):
                kept.append(op)
                wanted.update(id(self._source(tensor)) for tensor in op.inputs)
        return kept[::-1]

    def _without_repetitions(self, operations: list[Operation]) -> list[Operation]:
        """Those that compute something new: forward and score, say, both evaluate the density of the base."""
        # What is written to, here or by whom the outputs are given to, is not shared; draws are among the outputs.
        own = memories([*self._outputs, *(tensor for op in operations for tensor in op.written)])
        first: dict[Any, Operation] = {}
        kept = []
        for op in operations:
            is_shareable = own.isdisjoint(memories([*op.inputs, *op.outputs]))
            earlier = first.setdefault((op.function, self._key([op.args, op.kwargs])), op) if is_shareable else op
            if earlier is op:
                kept.append(op)
            else:
                self._aliases |= {id(a): b for a, b in zip(op.outputs, earlier.outputs, strict=True)}
        return kept

    def _key(self, tree: Any) -> Any:
        """Equal for equal arguments."""
        if isinstance(tree, Tensor):
            return id(self._source(tree))
        if isinstance(tree, dict):
            return tuple((name, self._key(value)) for name, value in tree.items())
        return tuple(self._key(part) for part in tree) if isinstance(tree, list | tuple) else repr(tree)

    def _not_computed(self) -> list[Tensor]:
        """What the operations read before any of them gave it."""
        known = {id(tensor) for tensor in self._inputs}
        found = []
        for op in self._operations:
            found += [t for tensor in op.inputs if id(t := self._source(tensor)) not in known]
            known.update(id(tensor) for tensor in op.outputs)
        return found + [output for output in self._outputs if id(output) not in known]

    def _repeat(
        self, inputs: Sequence[Any], constants: dict[int, Any], call: Callable[..., Sequence[Any]]
    ) -> list[Any]:
        """Call all operations on what stands for the tensors; gives what stands for the outputs."""
        values = constants | {id(tensor): value for tensor, value in zip(self._inputs, inputs, strict=True)}

        def value(tensor: Tensor) -> Any:
            return values[id(self._source(tensor))]

        for op in self._operations:
            kwargs = {name: _mapped(value, argument) for name, argument in op.kwargs.items()}
            outputs = [op.output] if isinstance(op.output, Tensor) else op.output or []
            results = call(op.function, _mapped(value, op.args), kwargs, len(outputs))
            values |= {id(output): result for output, result in zip(outputs, results, strict=True)}
        # What a run returns is the caller's, and constants are the program's.
        return [
            call(_aten.clone.default, (value(output),), {}, 1)[0] if id(output) in constants else value(output)
            for output in self._outputs
        ]

    def interpreted(self) -> Function:
        """For TorchScript's interpreter."""
        graph = Graph(len(self._inputs))
        constants = {key: graph.constant(tensor) for key, tensor in self._constants.items()}
        return graph.function(self._repeat(graph.inputs, constants, graph.call))

    def graph_module(self) -> fx.GraphModule:
        root, graph = torch.nn.Module(), fx.Graph()
        inputs = [graph.placeholder(f"input_{i}") for i in range(len(self._inputs))]
        constants = {}
        for i, (key, tensor) in enumerate(self._constants.items()):
            root.register_buffer(f"constant_{i}", tensor)
            constants[key] = graph.get_attr(f"constant_{i}")

        def call(function: Any, args: Any, kwargs: Any, num_outputs: int) -> Sequence[Any]:
            result = graph.call_function(function, args, kwargs)
            returns = function._schema.returns
            if len(returns) == 1 and not isinstance(returns[0].type, torch.ListType):
                return [result]
            return [graph.call_function(operator.getitem, (result, i)) for i in range(num_outputs)]

        graph.output(tuple(self._repeat(inputs, constants, call)))
        return fx.GraphModule(root, graph)


def _run_by(executor: str, program: _Program) -> Function:
    if executor == "inductor":
        # Inductor's own generator draws other numbers than torch's at the same seed.
        run = torch.compile(program.graph_module(), dynamic=False, options={"fallback_random": True})
    else:
        run = program.interpreted()
    num_outputs = program.num_outputs
    return run if num_outputs == len(program._outputs) else lambda *inputs: run(*inputs)[:num_outputs]


def _mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    return type(tree)(_mapped(function, part) for part in tree) if isinstance(tree, list | tuple) else tree

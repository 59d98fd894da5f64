"""Turn a recorded function into a program, which runs without Python and autograd in between."""

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
# A module's dictionary of parameters or buffers, and the name of a tensor in it.
_Place: TypeAlias = tuple[dict[str, Any], str]

_aten = torch.ops.aten
# These operators return their input under another name.
_ALIASES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}


def compiled(function: Function, examples: Sequence[Tensor], executor: str = "trace", state: State = ()) -> Function:
    """Turn a function into one program, for inputs that have the shapes and dtypes of the examples.

    The program reads the tensors of the state anew at each call. The function is recorded again if one of them has
    another shape or dtype by then, or another value and the function has branched on that value. Where a matrix has no
    Cholesky factor, the program returns NaN instead of raising an error, so that the other rows of a batch go on.

    Args:
        function: a function that maps tensors to a sequence of tensors without gradients. Tensors that it reads
            without being given them are inputs if they are among the examples or in the state; all others are
            constants.
        examples: the inputs that the function is recorded with.
        executor: "trace" runs the program in the interpreter of TorchScript, and costs little more than a few runs;
            "inductor" generates machine code, which takes tens of seconds and pays after tens of thousands of runs;
            "none" returns the function itself.
        state: modules, of which the function may read parameters and buffers, and further tensors that it may read.
            Buffers that are not persistent are constants: they follow from the arguments that a module was made with.

    Returns:
        A function of inputs like the examples, which returns tensors without gradients.

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
    """Find the place of each tensor of the state, once, and leave out the tensors that are given at each call."""
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
    """This function reads the state at each call, and records its program again where the state no longer fits it."""

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
    """A program holds the operations that each run repeats, and the tensors that they read.

    Those tensors are the inputs, tensors of the state, and constants.

    Args:
        function: the function to record.
        examples: the inputs that it is recorded with.
        places: the places of the tensors of the state, which it may read besides.

    Attributes:
        places: the places that the program reads; their tensors are its inputs after the function's own.
        decisive: the places whose values decided what was recorded, with the tensors that stood there.
        num_outputs: number of outputs of the function; all that the program returns after them are draws.
    """

    def __init__(self, function: Function, examples: Sequence[Tensor], places: list[_Place]) -> None:
        state = _read(places)
        with Recorder(examples, state) as recorder:
            outputs = list(function(*examples))
        self._keep = recorder  # an id identifies a tensor only as long as the tensor lives
        self._aliases = {
            id(op.output): op.args[0]
            for op in recorder.operations
            if op.function in _ALIASES and op.output is not op.args[0]
        }
        operations = [op for op in recorder.varying() if op.function not in _ALIASES]
        # Draws that no output depends on are repeated too, so that later draws equal the function's at the same seed.
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
                "the function reads varying values through another tensor that shares their memory, such as a view "
                "made outside of the function or a module made inside; make views inside and modules outside"
            )

    def _source(self, tensor: Tensor) -> Tensor:
        """Return the tensor that a program uses in the place of this one."""
        while id(tensor) in self._aliases:
            tensor = self._aliases[id(tensor)]
        return tensor

    def _needed(self, operations: list[Operation]) -> list[Operation]:
        """Keep the operations that the outputs depend on, and those that write into a tensor."""
        wanted = {id(output) for output in self._outputs}
        kept = []
        for op in reversed(operations):
            if op.function._schema.is_mutable or any(id(out) in wanted for out in op.outputs):
                kept.append(op)
                wanted.update(id(self._source(tensor)) for tensor in op.inputs)
        return kept[::-1]

    def _without_repetitions(self, operations: list[Operation]) -> list[Operation]:
        """Keep the first of operations that compute the same, as forward pass and score do with the base's density."""
        # Memory that an operation or the caller may write into is not shared; draws are among the outputs.
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
        """Return a key that is equal for equal arguments."""
        if isinstance(tree, Tensor):
            return id(self._source(tree))
        if isinstance(tree, dict):
            return tuple((name, self._key(value)) for name, value in tree.items())
        return tuple(self._key(part) for part in tree) if isinstance(tree, list | tuple) else repr(tree)

    def _not_computed(self) -> list[Tensor]:
        """Return the tensors that operations read although no operation before them computed them."""
        known = {id(tensor) for tensor in self._inputs}
        found = []
        for op in self._operations:
            found += [t for tensor in op.inputs if id(t := self._source(tensor)) not in known]
            known.update(id(tensor) for tensor in op.outputs)
        return found + [output for output in self._outputs if id(output) not in known]

    def _repeat(
        self, inputs: Sequence[Any], constants: dict[int, Any], call: Callable[..., Sequence[Any]]
    ) -> list[Any]:
        """Call all operations with the values that stand for tensors, and return those that stand for the outputs."""
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
        """Return the program as a function that TorchScript's interpreter runs."""
        graph = Graph(len(self._inputs))
        constants = {key: graph.constant(tensor) for key, tensor in self._constants.items()}
        return graph.function(self._repeat(graph.inputs, constants, graph.call))

    def graph_module(self) -> fx.GraphModule:
        """Return the program as a graph of torch.fx, which torch.compile takes."""
        root, graph = torch.nn.Module(), fx.Graph()
        inputs = [graph.placeholder(f"input_{i}") for i in range(len(self._inputs))]
        constants = {}
        for i, (key, tensor) in enumerate(self._constants.items()):
            root.register_buffer(f"constant_{i}", tensor)
            constants[key] = graph.get_attr(f"constant_{i}")

        def call(function: Any, args: Any, kwargs: Any, num_outputs: int) -> Sequence[Any]:
            if function._schema.name == "mkldnn::_linear_pointwise":
                # Inductor takes oneDNN's linear layer with constant weights only; it may choose it here by itself.
                function, args = _aten.linear.default, args[:3]
            result = graph.call_function(function, args, kwargs)
            returns = function._schema.returns
            if len(returns) == 1 and not isinstance(returns[0].type, torch.ListType):
                return [result]
            return [graph.call_function(operator.getitem, (result, i)) for i in range(num_outputs)]

        graph.output(tuple(self._repeat(inputs, constants, call)))
        return fx.GraphModule(root, graph)


def _run_by(executor: str, program: _Program) -> Function:
    if executor == "inductor":
        # Without this option Inductor draws other numbers than torch does at the same seed.
        run = torch.compile(program.graph_module(), dynamic=False, options={"fallback_random": True})
    else:
        run = program.interpreted()
    num_outputs = program.num_outputs
    return run if num_outputs == len(program._outputs) else lambda *inputs: run(*inputs)[:num_outputs]


def _mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    return type(tree)(_mapped(function, part) for part in tree) if isinstance(tree, list | tuple) else tree

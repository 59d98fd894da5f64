"""Run one step of training, a compiled pure function of the parameters and the tensors that the step draws."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.check import Compiler
from pyroflows.compiling.singular import is_singular
from pyroflows.errors import OptionError, UntraceableError
from pyroflows.training.objective import Figures, Objective
from pyroflows.transforms.continuous.counting import Evaluations, Penalties
from pyroflows.transforms.tables import TableReads

# The compiled step is compared with the original at parameters with noise of this standard deviation.
PARAMETER_NOISE = 0.03
# Draws of further shapes, such as batches of other sizes, run without a program.
MAX_PROGRAMS = 4
# Names of figures that the trainer records.
RESERVED = ("loss", "grad_norm", "learning_rate", "evaluations")


class Step:
    """A step computes the gradients of an objective's parameters, and returns the figures to record.

    Args:
        objective: the objective to minimise.
        compiler: the compiler that makes programs of the step, one for each of the first four shapes of its draws.
        tables: parameters of the objective of which a step reads a few rows, by
            :func:`pyroflows.transforms.tables.rows_at` alone; their gradients are sparse.

    Attributes:
        parameters: the tensors for the optimiser. This is one flat tensor, so that a step of the optimiser is one
            operation, or the objective's parameters if their dtypes or devices differ; then the tables.

    Raises:
        OptionError: if the objective has no parameters, or one of them does not require gradients.
        UntraceableError: if the step cannot be compiled, or a layer reads values of tensors, and the compiler's mode
            is not "auto".
    """

    def __init__(self, objective: Objective, compiler: Compiler, tables: Sequence[Tensor] = ()) -> None:
        self._objective = objective
        self._tables = list(tables)
        is_table = set(map(id, tables))
        self._trained = [p for p in objective.parameters if id(p) not in is_table]
        if not self._trained:
            raise OptionError("there are no parameters to train")
        if not all(parameter.requires_grad for parameter in self._trained):
            raise OptionError("a trained tensor does not require gradients: make it with requires_grad=True")
        # The parameters get the layout that they will have in the flat tensor, since a recorded step relies on it.
        for parameter in (*self._trained, *self._tables):
            parameter.data = parameter.detach().contiguous()
        self._is_flat = len({(p.dtype, p.device) for p in self._trained}) == 1
        self._dense = [_flat(self._trained)] if self._is_flat else self._trained
        self.parameters = [*self._dense, *self._tables]
        self._views = self._views_now()
        self._gradient = _Gradient(objective, self._trained, self._tables)
        self._compiler = compiler
        self._programs: dict[Any, Callable[..., Sequence[Tensor]]] = {}
        # The first draws of their shapes, at which a program of later ones is checked.
        self._seen: dict[Any, Sequence[Tensor]] = {}
        self._can_record = _can_record(objective, compiler.mode)
        if self._can_record:
            self._record_first()

    def __call__(self) -> dict[str, float]:
        """Draw, fill the gradients of the parameters, and return the figures by name."""
        try:
            drawn = self._objective.draw()
            gradient, figures, *of_rows = self._function(drawn)(*self._views, *drawn)
        except RuntimeError as error:
            if not is_singular(error):
                raise
            return self._left_out()
        parts = gradient.split([p.numel() for p in self._dense])
        for parameter, part in zip(self._dense, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter)
        for table, ids, rows in zip(self._tables, of_rows[::2], of_rows[1::2], strict=True):
            table.grad = torch.sparse_coo_tensor(ids[None], rows, table.shape, check_invariants=False).coalesce()
        return dict(zip(self._gradient.names, figures.tolist(), strict=True))

    @contextmanager
    def flattened(self) -> Iterator[None]:
        """Make the objective's parameters views of the flat tensor, so that both change together.

        When the context manager exits, each parameter has memory of its own again.
        """
        try:
            if self._is_flat:
                self._share(self._dense[0].detach().split([p.numel() for p in self._trained]))
            yield
        finally:
            if self._is_flat:
                self._share([torch.empty_like(p) for p in self._trained])
            for parameter in self.parameters:
                parameter.grad = None

    def _share(self, memory: Sequence[Tensor]) -> None:
        """Move the parameters into the given memory, one tensor of as many elements for each."""
        for parameter, part in zip(self._trained, memory, strict=True):
            view = part.view_as(parameter)
            parameter.data = view.copy_(parameter.detach())
        self._views = self._views_now()

    def _views_now(self) -> list[Tensor]:
        return [p.detach() for p in (*self._trained, *self._tables)]

    def _record_first(self) -> None:
        """Make the program of the first draws."""
        # Recording must change neither the place in the data nor the random numbers of the fit.
        place = self._objective.state_dict()
        with torch.random.fork_rng():
            drawn, others = self._objective.draw(), self._objective.draw()
            self._seen[_shapes(others)] = others
            if _shapes(others) == _shapes(drawn):
                self._record(drawn)
        self._objective.load_state_dict(place)

    def _function(self, drawn: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """The program for draws of these shapes; a program is made when they come for the second time."""
        shapes = _shapes(drawn)
        if self._can_record and shapes not in self._programs and len(self._programs) < MAX_PROGRAMS:
            if shapes in self._seen:
                with torch.random.fork_rng():
                    self._record(drawn)
            elif len(self._seen) < MAX_PROGRAMS:
                self._seen[shapes] = drawn
        return self._programs.get(shapes, self._gradient)

    def _record(self, drawn: Sequence[Tensor]) -> None:
        shapes = _shapes(drawn)
        noisy = [p + PARAMETER_NOISE * torch.randn_like(p) for p in self._views]
        state = [self._objective.flow, *self._objective.state]
        # The check writes into the examples, which may be the data of the user.
        examples = [*self._trained, *self._tables, *(tensor.clone() for tensor in drawn)]
        others = [*noisy, *self._seen.pop(shapes)]
        self._programs[shapes] = self._compiler(self._gradient, examples, others, state)

    def _left_out(self) -> dict[str, float]:
        """Fill gradients and figures with NaN, so that the guard leaves out this step."""
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, math.nan)
        return dict.fromkeys(self._gradient.names or [self._objective.monitor], math.nan)


class _Gradient:
    """This function of parameters and draws returns the flat gradient and the figures of an objective, one number each.

    A compiled step keeps it to be recorded again. It holds no :class:`Step`, so that a step with its program is freed
    at once where it is no longer used, and not only when Python next looks for cycles of references.

    Args:
        objective: the objective.
        trained: the parameters, which are also the first inputs.
        tables: the tables, which are the next inputs.

    Attributes:
        names: the names of the figures of the last call.
    """

    def __init__(self, objective: Objective, trained: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
        self.names: list[str] = []
        self._objective = objective
        self._trained, self._tables = trained, tables

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        drawn = inputs[len(self._trained) + len(self._tables) :]
        with torch.enable_grad():
            with Penalties() as penalties, Evaluations() as evaluations, TableReads(self._tables) as reads:
                loss, figures = self._checked(self._objective.loss(*drawn))
            loss = loss + penalties.total if penalties.found else loss
            leaves = [*self._trained, *reads.rows]
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        if self._objective.monitor == "loss":
            figures = {"loss": loss, **figures}
        if evaluations.total:  # of the networks of continuous layers
            figures = {**figures, "evaluations": loss.new_tensor(float(evaluations.total))}
        self.names = list(figures)
        of_trained, of_rows = gradients[: len(self._trained)], gradients[len(self._trained) :]
        return (
            torch.cat([g.reshape(-1) for g in of_trained]),
            torch.stack([f.detach() for f in figures.values()]),
            *self._by_table(reads, of_rows),
        )

    def _by_table(self, reads: TableReads, gradients: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the indices of the rows of each table that were read, and the gradients of these."""
        for place, table in enumerate(self._tables):
            found = [i for i, other in enumerate(reads.places) if other == place]
            yield torch.cat([reads.ids[i] for i in found] or [table.new_empty(0, dtype=torch.long)])
            yield torch.cat([gradients[i] for i in found] or [table.new_empty(0, *table.shape[1:])])

    def _checked(self, result: Any) -> tuple[Tensor, Figures]:
        """Return what the objective's loss gave, if it is a loss that can be minimised, and figures to record."""
        name = type(self._objective).__name__
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise OptionError(f"{name}.loss must return a pair, the loss and a dictionary of figures, got {result!r}")
        loss, figures = result
        if not isinstance(loss, Tensor) or loss.shape or not loss.requires_grad:
            raise OptionError(
                f"the loss of {name} must be a scalar tensor that depends on the trained parameters, got {loss!r}"
            )
        for key, figure in figures.items():
            if not isinstance(figure, Tensor) or figure.shape:
                raise OptionError(f"the figure {key!r} of {name} must be a scalar tensor, got {figure!r}")
            if key in RESERVED:
                raise OptionError(f"{name} must give its figure {key!r} another name: the trainer records one itself")
        return loss, figures


def _can_record(objective: Objective, mode: str) -> bool:
    """Tell whether steps can be recorded; raise if they cannot, and the user asked for it."""
    if mode == "none" or not objective.reads_values:
        return mode != "none"
    if mode == "auto":
        return False
    readers = [type(part).__name__ for part in objective.flow.modules() if getattr(part, "reads_values", False)]
    # What contains a layer comes before it.
    of = f"the layer {readers[-1]} of this flow" if readers else "a flow that the loss calls"
    raise UntraceableError(
        f"compile={mode!r} cannot record {of}, whose adaptive steps follow the values of tensors: give it a fixed "
        "number of steps, by num_steps= of pf.flows.CNF or solver=FixedSteps(...) of the layer, or use compile='auto', "
        "which runs it without a recording"
    )


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[torch.Size, torch.dtype], ...]:
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).requires_grad_()

"""Check that a student and its teacher fit each other, and give their laws at the same contexts."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints

from pyroflows.arrays import ArrayLike
from pyroflows.errors import DataError, InversionError, OptionError, ShapeError, warn
from pyroflows.flows import Flow, FlowDistribution, Mixture
from pyroflows.flows.discrete.refusal import require_real
from pyroflows.flows.without_data import require_no_statistics
from pyroflows.options import kind
from pyroflows.shapes import described
from pyroflows.training.data import context_rows
from pyroflows.training.objective import trained_parameters
from pyroflows.transforms import Autoregressive, Continuous, Inverse
from pyroflows.transforms.continuous.equal_steps import enough_steps

# Log-densities by equal steps differ from exact ones by less, in nats, at so many draws of the teacher.
TOLERANCE, NUM_CHECKED = 0.01, 256


class StudentAndTeacher:
    """This pair holds a student and a teacher, and the contexts at which they are compared.

    Args:
        student: the flow to train.
        teacher: the flow or distribution that it should imitate.
        context: rows ``(n, *context_shape)``, if both take a context.

    Attributes:
        contexts: the rows, in the student's dtype, or None.
        num_rows: 1 where there are contexts, else 0.
        num_steps: the number of equal steps that are enough in training to score with a teacher that solves
            differential equations; None for other teachers.

    Raises:
        OptionError: if the student cannot be trained through its draws, or keeps running statistics of data, or the
            teacher is neither a flow nor a distribution.
        ShapeError: if event or context shapes differ, or the context does not fit.
        DataError: if the context holds values that cannot be used.
    """

    def __init__(self, student: Flow, teacher: Flow | Distribution, context: ArrayLike | None) -> None:
        _check_student(student)
        _warn_if_slow(student)
        self.student = student
        self.teacher = teacher
        self.contexts = _contexts(student, teacher, context)
        is_flow = isinstance(teacher, Flow) and not isinstance(teacher, Mixture) and bool(trained_parameters(teacher))
        if is_flow and self._is_new(teacher) and not self._is_new(student):
            raise OptionError(
                "the teacher is an untrained flow, the identity, and the student is not: they are swapped, since the "
                "call is distill(student, teacher) and trains the student. To train it towards this teacher after all, "
                "give the teacher's law: distill(student, teacher())"
            )
        self.num_rows = 0 if self.contexts is None else 1
        self.num_steps = self._enough_steps(NUM_CHECKED)

    def draw_rows(self, count: int) -> list[Tensor]:
        """Draw indices ``(count,)`` of rows of the contexts, as a list of one tensor, or of none without contexts."""
        contexts = self.contexts
        return [] if contexts is None else [torch.randint(len(contexts), (count,), device=contexts.device)]

    @torch.no_grad()
    def _is_new(self, flow: Any) -> bool:
        """Tell whether a flow maps base values to themselves, up to their order, as one that was never trained does.

        On a bounded support these are the values before the map onto the support.
        """
        z = torch.linspace(-2, 2, 4 * flow.dim).to(next(flow.parameters(), torch.zeros(())))
        z = z.reshape(4, *flow.base_shape)
        context = None if self.contexts is None else self.contexts[:1].expand(4, *flow.context_shape)
        x, _ = flow.transform.forward_and_ladj(z, context)
        with suppress(NotImplementedError):  # some supports have no bijection from the reals
            x = biject_to(flow.support).inv(x)
        return torch.allclose(x.flatten(1).sort()[0], z.flatten(1), atol=1e-3)

    def at(self, *rows: Tensor) -> tuple[FlowDistribution, Any]:
        """Return the laws of student and teacher, at these rows of the contexts if there are any."""
        context = [] if self.contexts is None else [self.contexts[rows[0]]]
        return self.student(*context), self.teacher(*context) if isinstance(self.teacher, Flow) else self.teacher

    def estimated_at(self, *rows: Tensor) -> tuple[FlowDistribution, Any]:
        """Return both laws with the layers' own log-determinants, which may be estimates, for training.

        A teacher that solves differential equations keeps its exact ones, for which ``num_steps`` equal steps are
        enough.
        """
        q, p = self.at(*rows)
        return q.estimated(), p.estimated() if isinstance(self.teacher, Flow) and self.num_steps is None else p

    @property
    def reads_values(self) -> bool:
        """Whether a law of :meth:`estimated_at` decides by values of tensors; with equal steps none does."""
        teacher_reads = isinstance(self.teacher, Flow) and self.teacher.reads_values
        return self.num_steps is None and (self.student.reads_values or teacher_reads)

    @torch.no_grad()
    def _enough_steps(self, count: int) -> int | None:
        """Return how many equal steps give the log-densities of a teacher that solves differential equations.

        It is None for other teachers, for those whose exact trace is dear, and where no number of steps is enough.
        """
        teacher = self.teacher
        if not isinstance(teacher, Flow):
            return None
        layers = [layer for layer in teacher.modules() if isinstance(layer, Continuous)]
        if not layers or any(layer.trace != "exact" for layer in layers):
            return None
        _, p = self.at(*self.draw_rows(count))
        x = p.sample(() if self.contexts is not None else (count,))
        return enough_steps(lambda: [p.log_prob(x)], TOLERANCE)

    def check_scores(self, count: int) -> None:
        """Check that the teacher scores draws of the student, with gradients that tell how to move them.

        Args:
            count: number of draws to check.

        Raises:
            OptionError: if the teacher cannot score, its density carries no gradient, or dtypes or devices
                differ.
            DataError: if draws are outside the teacher's support.
        """
        if isinstance(self.teacher, Flow):
            kinds = [{(t.dtype, t.device) for t in flow.parameters()} for flow in (self.student, self.teacher)]
            if all(kinds) and kinds[0] != kinds[1]:
                raise OptionError(
                    f"student and teacher must have one dtype and device, but have {kinds[0]} and {kinds[1]}"
                )
        q, p = self.at(*self.draw_rows(count))
        with torch.no_grad():
            x = q.transport(self.student.base().sample((count,)))[0]
        x.requires_grad_()
        try:
            log_p = p.log_prob(x)
        except (NotImplementedError, KeyError, InversionError) as error:
            raise OptionError(
                f"the teacher cannot score the student's draws ({type(error).__name__}: {error}): give one whose "
                "log_prob takes any value"
            ) from error
        num_outside = count - int((_is_inside(p, x.detach()) & log_p.isfinite()).sum())
        if num_outside:
            raise DataError(
                f"{num_outside} of {count} draws of the student are outside the support of the teacher, {_support(p)}, "
                "or have no finite density there: give the student that support, or a start nearer to the teacher"
            )
        if log_p.dtype != x.dtype:
            raise OptionError(f"student and teacher must have one dtype, but have {x.dtype} and {log_p.dtype}")
        # The density of a uniform law has no gradient, and needs none.
        if not log_p.requires_grad and log_p.std() > 0:
            raise OptionError("the teacher's log_prob carries no gradient to the values that it scores")

    def check_draws(self, x: Tensor) -> None:
        """Check that draws of the teacher are inside the support of the student, which could not reach others.

        Args:
            x: draws ``(n, *event_shape)`` of the teacher.

        Raises:
            DataError: if a draw is outside.
        """
        num_outside = len(x) - int(_is_inside(self.student, x).sum())
        if num_outside:
            raise DataError(
                f"{num_outside} of {len(x)} draws of the teacher are outside the support of the student, "
                f"{self.student.support}: give the student the teacher's support"
            )


def _support(law: Any) -> constraints.Constraint:
    try:
        return law.support
    except NotImplementedError:  # the law does not declare its support
        return constraints.real_vector


def _is_inside(law: Any, x: Tensor) -> Tensor:
    # Some constraints give one answer per event and some one per element; this gives one per event.
    return _support(law).check(x).reshape(len(x), -1).all(-1)


def _check_student(student: Flow) -> None:
    if not isinstance(student, Flow):
        raise OptionError(f"the student must be a pyroflows.Flow, got {kind(student)}")
    if not trained_parameters(student):
        raise OptionError("this student has no parameters to train")
    require_no_statistics(student, "a student")
    require_real(student, "a student", "fit it to draws of the teacher by pf.fit_density")
    if isinstance(student, Mixture) or not student.base().has_rsample:
        raise OptionError(
            "draws of this student carry no gradients, so that it cannot be trained by them: give it a base that has "
            "rsample, such as a normal; a mixture of flows has none"
        )


def _warn_if_slow(student: Flow) -> None:
    if any(isinstance(layer, Inverse) and isinstance(layer.inv, Autoregressive) for layer in student.transform.layers):
        warn(
            "this student draws dimension by dimension, so that nothing is gained: are student and teacher swapped? An "
            "IAF or couplings draw in one pass",
        )


def _contexts(student: Flow, teacher: Flow | Distribution, context: ArrayLike | None) -> Tensor | None:
    """Return the contexts as a tensor, or None; raise if student, teacher and contexts do not fit each other."""
    if not isinstance(teacher, Flow | Distribution):
        raise OptionError(f"the teacher must be a flow or a distribution, got {kind(teacher)}")
    require_real(teacher, "a teacher", "fit another flow of categories to its draws by pf.fit_density")
    if isinstance(teacher, Distribution) and teacher.batch_shape:
        raise ShapeError(
            f"the teacher must be a single distribution, but has batch shape {tuple(teacher.batch_shape)}: give a flow "
            "with its contexts, or use .to_event()"
        )
    if student.event_shape != teacher.event_shape:
        raise ShapeError(
            f"student and teacher must have one event shape, but have {tuple(student.event_shape)} and "
            f"{tuple(teacher.event_shape)}"
        )
    taken = student.context_shape, teacher.context_shape if isinstance(teacher, Flow) else torch.Size()
    if taken[0] != taken[1]:
        raise ShapeError(
            f"student and teacher must take one context, but the student has context {described(taken[0])} and the "
            f"teacher context {described(taken[1])}: give teacher(context) to distill a teacher at one context"
        )
    if context is None and not taken[0]:
        return None
    if context is None:
        raise ShapeError(
            f"student and teacher take a context of {described(taken[0])}: give rows of it, as context, at which they "
            "are to agree"
        )
    if not taken[0]:
        raise ShapeError("student and teacher take no context, but got one")
    rows = context_rows(context, student)
    if not len(rows):
        raise DataError("the context has no rows: give those at which student and teacher are to agree")
    return rows

"""Distillation: a student that is quick to sample, fitted to a teacher that is quick to score."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflows.compilation import Compiler
from pyroflows.errors import DataError, InversionError, OptionError, ShapeError
from pyroflows.fitting.closed_form import gaussian_kl, has_closed_form
from pyroflows.fitting.data import context_rows
from pyroflows.fitting.estimators import ESTIMATORS
from pyroflows.fitting.step import Objective, Record, Step
from pyroflows.flows import Flow, FlowDistribution
from pyroflows.plots import plot_distillation
from pyroflows.randomness import seeded
from pyroflows.schedules import Plateau
from pyroflows.shapes import described
from pyroflows.training import History, OptimizerLike, train

LEARNING_RATE = 2e-3
# Batches of the teacher's pairs that the warm start goes round, and of fresh draws behind the KL divergence at the end.
NUM_PAIR_BATCHES = 64
NUM_FINAL_BATCHES = 40
# In which the pairs are drawn.
NUM_PARTS = 4

Laws: TypeAlias = tuple[FlowDistribution, Any]
# The laws of student and teacher, and base draws z -> draws x, a loss, and log weights without gradients.
Loss: TypeAlias = Callable[..., tuple[Tensor, Tensor, Tensor]]
# Draws (B, *event shape) of the student, and the rows (B,) of the contexts at which they were drawn, or None -> a
# scalar that is added to the loss.
Penalty: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Distillation:
    """What :func:`distill` returns; the student itself was trained in place.

    Args:
        student: the flow.
        history: a number a step: ``kl`` in nats and its standard error ``kl_se``, of the draws of the step; ``loss``,
            which holds penalties besides; ``grad_norm`` and ``learning_rate``.
        kl: KL(student || teacher) in nats, from fresh draws after training.
        kl_se: its standard error.
    """

    student: Flow
    history: History
    kl: float
    kl_se: float

    def plot(self) -> Any:
        """The KL divergence over the steps, and after them; a matplotlib figure."""
        return plot_distillation(self.history, self.kl)

    def __repr__(self) -> str:
        dim = self.student.dim
        return (
            f"Distillation({self.history.num_steps} steps; KL(student || teacher) = {self.kl:.3g} +- {self.kl_se:.1g} "
            f"nats, {self.kl / dim:.2g} for each of {dim} dimensions)"
        )


def distill(
    student: Flow,
    teacher: Flow | Distribution,
    context: Tensor | None = None,
    num_steps: int | None = None,
    batch_size: int = 256,
    estimator: str = "auto",
    regularization: float = 0.0,
    warm_start: int = 1000,
    penalty: Penalty | None = None,
    optimizer: OptimizerLike | None = None,
    compile: str = "auto",
    seed: int | None = None,
    progress_bar: bool = True,
) -> Distillation:
    r"""Fit a student to a teacher by reverse KL, :math:`E_{x \sim q}[\log q(x) - \log p(x)]`, q being the student.

    The student draws and scores its draw in one pass, the teacher scores it in one pass: with an IAF as student and a
    MAF as teacher neither goes dimension by dimension (probability density distillation, van den Oord et al. 2018,
    arXiv:1711.10433). No data are needed. The student is trained in place.

    Reverse KL leaves out modes of the teacher rather than covers them, and is slow where the student starts far away.
    So the student first takes the teacher's location and scale, and learns by regression to map each z to the x that
    the teacher makes of the same z. This warm start needs a teacher that is a flow with the student's base, and draws
    :math:`64 \times` ``batch_size`` times from it.

    Args:
        student: what is trained; quick in its forward direction, as :class:`pyroflows.flows.IAF` or couplings are.
        teacher: a flow that scores quickly, as :class:`pyroflows.flows.MAF` does; or any distribution with a
            differentiable density of the student's event shape.
        context: rows ``(n, *context shape)`` at which both are conditioned, drawn at random for each step, where
            student and teacher take a context.
        num_steps: number of training steps after the warm start; None for as many as it takes.
        batch_size: draws a step.
        estimator: of the gradient: "total" or "path" of :mod:`pyroflows.fitting.estimators`; "closed_form", see
            :func:`pyroflows.fitting.closed_form.gaussian_kl`, for two affine autoregressive flows of one order; "auto"
            is the latter where it can be had, and else "path".
        regularization: :math:`\lambda` of ClariNet's regularised KL (Ping et al. 2019, arXiv:1807.07281, eq. 7), for a
            teacher whose conditionals are so narrow that the plain KL explodes; needs the closed form. They use 4.
        warm_start: steps of regression before; 0 for none, and none is made where the bases differ.
        penalty: a function of draws ``(batch_size, *event shape)`` and the rows of ``context`` at which they were made,
            None without context; its scalar is added to the loss.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam at 0.002.
        compile: as for :class:`pyroflows.FlowVI`.
        seed: makes the fit reproducible and leaves the global generator as it was; None to draw from the global one.
        progress_bar: whether to show one.

    Raises:
        OptionError: for an option outside its range, or a teacher that cannot score, or a student that cannot be
            trained through its draws.
        ShapeError: if the event or context shapes of student and teacher differ, or the context does not fit.
        DataError: if the context holds NaN, or draws of the student are outside the teacher's support.
        DivergedError: if the loss stays non-finite; the student is in the last good state then.

    Example:
        >>> teacher = pf.flows.MAF(2, num_layers=2, hidden_dims=(16,))
        >>> student = pf.flows.IAF(2, num_layers=2, hidden_dims=(16,))
        >>> fit = pf.distill(student, teacher, num_steps=20, warm_start=20, seed=0, progress_bar=False)
        >>> sorted(fit.history)
        ['grad_norm', 'kl', 'kl_se', 'learning_rate', 'loss']
        >>> student().sample((5,)).shape
        torch.Size([5, 2])
    """
    at_least = {"num_steps": (num_steps, 1), "batch_size": (batch_size, 2), "warm_start": (warm_start, 0)}
    for name, (value, least) in at_least.items():
        if value is not None and (not isinstance(value, int) or value < least):
            raise OptionError(f"{name} must be an integer of at least {least}, got {value!r}")
    # The guard sees what is not finite; torch's own checks would raise there, and cost time at each step.
    with seeded(seed), pyro.validation_enabled(False):
        _check_student(student)
        pair = _Pair(student, teacher, _contexts(student, teacher, context))
        name = _chosen(pair, estimator, regularization)
        loss_of = partial(gaussian_kl, regularization=regularization) if name == "closed_form" else _by_draws(name)
        _check_teacher(pair, batch_size)
        fit = partial(
            _fit, student, batch_size=batch_size, compiler=Compiler(compile), optimizer=optimizer, bar=progress_bar
        )
        if warm_start:
            _start_at_teacher(pair, batch_size, partial(fit, num_steps=warm_start))

        def objective(z: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
            x, loss, log_weights = loss_of(*pair.at(*rows), z)
            return loss if penalty is None else loss + penalty(x, *(rows or (None,))), log_weights

        history = fit(objective, _record, partial(pair.draw_rows, batch_size), num_steps=num_steps)
        # Not along the path: the score would cost more than the rest, and the value is the same.
        score_free = _by_draws("total") if name == "path" else loss_of
        log_weights = torch.cat([pair.log_weights(score_free, batch_size) for _ in range(NUM_FINAL_BATCHES)]).double()
    kl_se = log_weights.std().item() / math.sqrt(len(log_weights))
    return Distillation(student, history, -log_weights.mean().item(), kl_se)


@dataclass(frozen=True)
class _Pair:
    """Student and teacher, and the contexts ``(n, *context_shape)`` at which they are compared, or None."""

    student: Flow
    teacher: Flow | Distribution
    contexts: Tensor | None

    def draw_rows(self, count: int) -> list[Tensor]:
        """Random rows of the contexts, ``(count,)``, if there are any."""
        contexts = self.contexts
        return [] if contexts is None else [torch.randint(len(contexts), (count,), device=contexts.device)]

    def at(self, *rows: Tensor) -> Laws:
        """The laws of student and teacher."""
        context = [] if self.contexts is None else [self.contexts[rows[0]]]
        return self.student(*context), self.teacher(*context) if isinstance(self.teacher, Flow) else self.teacher

    @torch.no_grad()
    def log_weights(self, loss_of: Loss, count: int) -> Tensor:
        """Of fresh draws of the student, ``(count,)``."""
        return loss_of(*self.at(*self.draw_rows(count)), self.student.base().sample((count,)))[2]


def _chosen(pair: _Pair, estimator: str, regularization: float) -> str:
    """The name of the estimator, if it and the regularization can be had."""
    can_close = has_closed_form(pair.student, pair.teacher)
    name = ("closed_form" if can_close else "path") if estimator == "auto" else estimator
    if name not in ("total", "path", "closed_form"):
        raise OptionError(f'estimator must be "auto", "total", "path" or "closed_form", got {estimator!r}')
    if name == "closed_form" and not can_close:
        raise OptionError(
            "there is no closed form for this student and teacher: both must be stacks of affine autoregressive and "
            "elementwise layers, all in one order, on a normal base; use estimator='path'"
        )
    if not 0 <= regularization < math.inf or (regularization and name != "closed_form"):
        raise OptionError(
            f"regularization must be zero or positive, and positive only with the closed form, got {regularization} "
            f"with estimator {name!r}"
        )
    return name


def _by_draws(name: str) -> Loss:
    """An estimator that knows nothing of student and teacher but their densities."""

    def loss(q: FlowDistribution, p: Distribution, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drawn = []

        def log_prob(x: Tensor) -> Tensor:
            drawn.append(x)
            return p.log_prob(x)

        value, log_weights = ESTIMATORS[name](q, log_prob, z)
        return drawn[0], value, log_weights

    return loss


def _fit(
    student: Flow,
    objective: Objective,
    record: Record,
    draw: Callable[[], Sequence[Tensor]],
    num_steps: int | None,
    batch_size: int,
    compiler: Compiler,
    optimizer: OptimizerLike | None,
    bar: bool,
) -> History:
    step = Step(student, objective, record, batch_size, compiler, draw)
    adam = partial(torch.optim.Adam, lr=LEARNING_RATE, fused=True)
    schedule = Plateau("loss", num_steps, falls=True)
    try:
        return train(step, step.parameters, schedule, optimizer=optimizer or adam, progress_bar=bar)
    finally:
        step.release()


def _record(loss: Tensor, log_weights: Tensor) -> Mapping[str, Tensor]:
    return {"loss": loss, "kl": -log_weights.mean(), "kl_se": log_weights.std() / math.sqrt(len(log_weights))}


def _start_at_teacher(pair: _Pair, batch_size: int, fit: Callable[..., History]) -> None:
    """Location and scale of the teacher's draws x, and, where z means the same to both, the regression of x on z."""
    student, teacher = pair.student, pair.teacher
    rows = pair.draw_rows(NUM_PAIR_BATCHES * batch_size)
    z, x = _teacher_draws(pair, NUM_PAIR_BATCHES * batch_size, rows)
    if not student.is_standardized:
        student.standardize(x)
    if not (isinstance(teacher, Flow) and _same_draws(student.base(), teacher.base())):
        return
    scale = x.std(0)

    def objective(_: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        q, _ = pair.at(*(r[index] for r in rows))
        errors = (((q.transport(z[index])[0] - x[index]) / scale) ** 2).flatten(1).mean(-1)
        return errors.mean(), -errors.detach()

    fit(objective, lambda loss, _: {"loss": loss}, lambda: [torch.randint(len(x), (batch_size,), device=x.device)])


@torch.no_grad()
def _teacher_draws(pair: _Pair, count: int, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Base draws of the teacher, and what it makes of them; for a teacher that is no flow, its draws twice."""
    if not isinstance(pair.teacher, Flow):
        try:
            x = pair.teacher.sample((count,))
        except NotImplementedError:
            raise OptionError(
                f"the warm start needs draws of the teacher, and {type(pair.teacher).__name__} has "
                "none: give warm_start=0"
            ) from None
        return x, x
    z = pair.teacher.base().sample((count,))
    # In parts, since layers that go dimension by dimension remember what they have computed.
    parts = zip(*(tensor.tensor_split(NUM_PARTS) for tensor in (z, *rows)), strict=True)
    return z, torch.cat([pair.at(*r)[1].transport(part)[0] for part, *r in parts])


def _same_draws(a: Distribution, b: Distribution) -> bool:
    """Whether two laws are one, as far as draws of the same seed tell."""
    draws = []
    for law in (a, b):
        with seeded(0):
            draws.append(law.sample((3,)))
    return torch.equal(*draws)


def _check_student(student: Flow) -> None:
    if not isinstance(student, Flow):
        raise OptionError(f"the student must be a pyroflows.Flow, got {type(student).__name__}")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise OptionError("this student has no parameters to train")
    if not student.base().has_rsample:
        raise OptionError(
            "draws of this student carry no gradients, so that it cannot be trained by them: give it a base that has "
            "rsample, such as a normal; a mixture of flows has none"
        )


def _contexts(student: Flow, teacher: Flow | Distribution, context: Tensor | None) -> Tensor | None:
    """The contexts, if they and the two fit each other."""
    if not isinstance(teacher, Flow | Distribution):
        raise OptionError(f"the teacher must be a flow or a distribution, got {type(teacher).__name__}")
    if student.event_shape != teacher.event_shape:
        raise ShapeError(
            f"student and teacher must have one event shape, but have {tuple(student.event_shape)} and "
            f"{tuple(teacher.event_shape)}"
        )
    if isinstance(teacher, Distribution) and teacher.batch_shape:
        raise ShapeError(
            f"the teacher must be a single distribution, but has batch shape {tuple(teacher.batch_shape)}: give a flow "
            "with its contexts, or use .to_event()"
        )
    taken = student.context_shape, teacher.context_shape if isinstance(teacher, Flow) else torch.Size()
    if taken[0] != taken[1]:
        raise ShapeError(
            f"student and teacher must take one context, but the student has context {described(taken[0])} and the "
            f"teacher context {described(taken[1])}: a teacher at one context is teacher(context)"
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
    return context_rows(context, student)


@torch.no_grad()
def _check_teacher(pair: _Pair, count: int) -> None:
    """Raise if the teacher does not score draws of the student."""
    if isinstance(pair.teacher, Flow):
        kinds = [{(t.dtype, t.device) for t in flow.parameters()} for flow in (pair.student, pair.teacher)]
        if all(kinds) and kinds[0] != kinds[1]:
            raise OptionError(f"student and teacher must have one dtype and device, but have {kinds[0]} and {kinds[1]}")
    try:
        log_weights = pair.log_weights(_by_draws("total"), count)
    except (NotImplementedError, KeyError, InversionError) as error:
        raise OptionError(
            f"the teacher cannot score the student's draws ({type(error).__name__}: {error}): give one whose log_prob "
            "takes any value"
        ) from error
    if not log_weights.isfinite().all():
        support = pair.at(*pair.draw_rows(count))[1].support
        raise DataError(
            f"the teacher has no finite density at {int((~log_weights.isfinite()).sum())} of {count} draws of the "
            f"student: give the student the teacher's support, {support}, or a start nearer to it"
        )

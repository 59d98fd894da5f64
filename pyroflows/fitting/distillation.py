"""Distill flows: fit a student that is quick to sample to a teacher that is quick to score."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflows.arrays import ArrayLike
from pyroflows.compiling.check import Compiler
from pyroflows.errors import OptionError
from pyroflows.fitting.closed_form import gaussian_kl, has_closed_form
from pyroflows.fitting.estimators import ESTIMATORS
from pyroflows.fitting.regression import Regression, draw_stages, same_law
from pyroflows.fitting.student_teacher import StudentAndTeacher
from pyroflows.flows import Flow, FlowDistribution, Mixture
from pyroflows.grad_mode import isolated, require_trainable
from pyroflows.interruption import keeping
from pyroflows.options import checked_int
from pyroflows.plots import plot_distillation
from pyroflows.randomness import seeded
from pyroflows.training.history import History
from pyroflows.training.loop import OptimizerLike, train
from pyroflows.training.objective import Figures, Objective
from pyroflows.transforms.continuous.equal_steps import equal_steps

LEARNING_RATE = 5e-3
# The student follows this many batches of the teacher's draws, and the final KL divergence is from this many batches.
NUM_TEACHER_BATCHES = 64
NUM_FINAL_BATCHES = 40

# A penalty maps draws (B, *event_shape) of the student, and the rows (B,) of the contexts at which they were drawn or
# None, to a scalar that is added to the loss.
Penalty: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
# A divergence maps the laws of student and teacher and base draws z to draws x, a loss, and log weights without
# gradients.
Divergence: TypeAlias = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Distillation:
    """A distillation is what :func:`distill` returns; the student itself was trained in place.

    Args:
        student: the trained flow.
        history: one number for each step of ``kl``, the KL divergence in nats by the draws of the step, of its standard
            error ``kl_se``, of ``loss``, which adds regression and penalty, of ``grad_norm`` and of ``learning_rate``.
        kl: KL(student || teacher) in nats, from fresh draws after training.
        kl_se: the standard error of ``kl``, in nats.

    Example:
        >>> teacher = torch.distributions.Independent(torch.distributions.Normal(torch.ones(2), 1.0), 1)
        >>> fit = pf.distill(pf.flows.IAF(2), teacher, num_steps=20, warm_start=0, progress_bar=False)
        >>> fit
        Distillation(20 steps; KL(student || teacher) = ... +- ... nats, ... for each of 2 dimensions)
    """

    student: Flow
    history: History
    kl: float
    kl_se: float

    def plot(self) -> Any:
        """Plot the KL divergence over the steps and its final value, and return the matplotlib figure.

        Raises:
            PlotError: if matplotlib is not installed.
        """
        return plot_distillation(self.history, self.kl)

    def __repr__(self) -> str:
        dim = self.student.dim
        return (
            f"Distillation({self.history.num_steps} steps; KL(student || teacher) = {self.kl:.3g} +- {self.kl_se:.1g} "
            f"nats, {self.kl / dim:.2g} for each of {dim} dimensions)"
        )


@isolated
def distill(
    student: Flow,
    teacher: Flow | Distribution,
    context: ArrayLike | None = None,
    num_steps: int | None = None,
    batch_size: int = 256,
    estimator: str = "auto",
    regularization: float = 0.0,
    warm_start: int = 2000,
    regression: float = 2.0,
    penalty: Penalty | None = None,
    optimizer: OptimizerLike | None = None,
    compile: str = "auto",
    seed: int | None = None,
    progress_bar: bool = True,
) -> Distillation:
    r"""Fit a student to a teacher by reverse KL, :math:`E_{x \sim q}[\log q(x) - \log p(x)]`, q being the student.

    The student draws and scores its draws in one pass, and the teacher scores them in one pass: with an IAF as student
    and a MAF as teacher neither goes dimension by dimension (probability density distillation, van den Oord et al.
    2018, arXiv:1711.10433). No data are needed. The student is trained in place.

    Reverse KL alone underestimates the teacher's variance, misses modes, and is slow from a distant start. Therefore,
    if the teacher is a flow with the student's base, the student also regresses on the teacher's draws: both map the
    same base draw z, and the student's x should be the teacher's. In the warm start, which comes first, the student
    takes location and scale from the teacher or from its draws. It then regresses layer by layer if its layers order
    the dimensions as the teacher's do, and otherwise end to end. After the warm start the loss is

    .. math:: E_q[\log q(x) - \log p(x)] + w\, E_z \sum_j h\Big(\frac{x^p_j(z) - x^q_j(z)}{s_j}\Big),

    with h and s as in :class:`pyroflows.fitting.regression.Regression`; both parts vanish where q = p. The regression
    needs :math:`64 \times` ``batch_size`` draws of the teacher, once.

    Args:
        student: the flow to train; quick in its forward direction, as :class:`pyroflows.flows.IAF` or couplings are.
        teacher: a flow that scores quickly, as :class:`pyroflows.flows.MAF` does; or any distribution with a
            differentiable density of the student's event shape.
        context: rows ``(n, *context_shape)`` on which both are conditioned, if they take a context; each step draws
            rows at random.
        num_steps: number of training steps after the warm start, positive; None for as many as it takes.
        batch_size: number of draws in a step, at least 2.
        estimator: the estimator of the gradient: "total" or "path" of :mod:`pyroflows.fitting.estimators`, or
            "closed_form" of :func:`pyroflows.fitting.closed_form.gaussian_kl`, for two affine autoregressive flows of
            one order; "auto" is the closed form where there is one, and otherwise "path".
        regularization: :math:`\lambda` of ClariNet's regularised KL (Ping et al. 2019, arXiv:1807.07281, eq. 7), zero
            or positive, for a teacher whose conditionals are so narrow that the plain KL explodes. It needs the closed
            form; Ping et al. use 4.
        warm_start: number of regression steps before training; 0 to start from the student as it is.
        regression: the weight w, zero or positive; 0 for the KL divergence alone.
        penalty: a function that maps draws ``(batch_size, *event_shape)`` of the student, and the indices
            ``(batch_size,)`` of their rows in ``context`` or None, to a scalar that is added to the loss. It is traced
            with the step: Python code in it that should run at each step, such as a counter, needs ``compile="none"``.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam at 0.005.
        compile: as for :class:`pyroflows.FlowVI`.
        seed: makes the fit reproducible and leaves the global generator as it was; None to draw from the global one.
        progress_bar: whether to show a progress bar.

    Raises:
        OptionError: if an option is outside its range, the teacher cannot score, or the student cannot be trained
            through its draws.
        ShapeError: if the event or context shapes of student and teacher differ, or the context does not fit.
        DataError: if the context holds NaN, or draws of one are outside the support of the other.
        UntraceableError: if a step cannot be compiled, and ``compile`` is not "auto".
        DivergedError: if the loss stays non-finite; the student is then in the last good state, and the exception's
            ``result`` is the distillation so far.
        FitInterrupted: if the fit is interrupted, such as by Ctrl-C; the student is then in its present state or in the
            last good one, if that is better, and the exception's ``result`` is the distillation so far.

    Example:
        >>> teacher = pf.flows.MAF(2, num_layers=2, hidden_dims=(16,))
        >>> student = pf.flows.IAF(2, num_layers=2, hidden_dims=(16,))
        >>> fit = pf.distill(student, teacher, num_steps=20, warm_start=20, seed=0, progress_bar=False)
        >>> sorted(fit.history)
        ['grad_norm', 'kl', 'kl_se', 'learning_rate', 'loss']
        >>> student().sample((5,)).shape
        torch.Size([5, 2])
    """
    _check_options(num_steps, batch_size, warm_start, regression)
    # The guard handles values that are not finite; torch's validation would raise at them.
    with seeded(seed), pyro.validation_enabled(False):
        pair = StudentAndTeacher(student, teacher, context)
        require_trainable(student)
        name = _chosen(pair, estimator, regularization)
        pair.check_scores(batch_size)
        if penalty is not None:
            _check_penalty(penalty, pair, batch_size)
        optimizer = optimizer or partial(torch.optim.Adam, lr=LEARNING_RATE, fused=True)
        fit = partial(train, optimizer=optimizer, compile=Compiler(compile), progress_bar=progress_bar)
        followed = _followed(pair, batch_size, warm_start > 0) if warm_start or regression else None
        divergence = _divergence(name, regularization)
        objective = Imitation(pair, divergence, batch_size, followed if regression else None, regression, penalty)
        history = History()

        def found(interrupted: History | None = None) -> Distillation:
            # The history of the warm start has no KL divergence.
            steps = interrupted if interrupted is not None and "kl" in interrupted else history
            parts = [_log_weights(pair, name, batch_size) for _ in range(NUM_FINAL_BATCHES)]
            log_weights = torch.cat(parts).double()
            kl_se = log_weights.std().item() / math.sqrt(len(log_weights))
            return Distillation(student, steps, -log_weights.mean().item(), kl_se)

        with keeping("the fit", found):
            if followed is not None and warm_start:
                fit(followed, warm_start)
            history = fit(objective, num_steps)
            return found()


class Imitation(Objective):
    r"""This objective of distillation is the reverse KL divergence from a student q to a teacher p, with two additions.

    The loss is :math:`\mathrm{KL}(q \,\|\, p) + w R + P`, with a regression R and a penalty P where they are given. A
    step records ``loss``, and ``kl`` with its standard error ``kl_se``, in nats.

    Args:
        pair: student and teacher.
        divergence: an estimator of the KL divergence: a function of the laws of student and teacher and of base draws
            that returns draws, a loss, and log weights without gradients.
        batch_size: number of draws in a step, at least 2.
        followed: the regression R of the student on draws of the teacher, or None.
        weight: the weight w of the regression, zero or positive.
        penalty: a function that maps the student's draws, and the rows of their contexts or None, to the scalar P; or
            None.

    Example:
        >>> pair = StudentAndTeacher(pf.flows.IAF(2, num_layers=1), pf.flows.MAF(2, num_layers=1), None)
        >>> pf.train(Imitation(pair, gaussian_kl, batch_size=64), num_steps=20, progress_bar=False)
        History(20 steps: loss, kl, kl_se, grad_norm, learning_rate)
    """

    def __init__(
        self,
        pair: StudentAndTeacher,
        divergence: Divergence,
        batch_size: int,
        followed: Regression | None = None,
        weight: float = 0.0,
        penalty: Penalty | None = None,
    ) -> None:
        super().__init__(pair.student)
        self._pair = pair
        self._divergence = divergence
        self._batch_size = batch_size
        self._followed = followed
        self._weight = weight
        self._penalty = penalty

    @property
    def reads_values(self) -> bool:
        """Return whether student or teacher decides by values of tensors."""
        return self._pair.reads_values

    def draw(self) -> list[Tensor]:
        """Draw base draws, rows of the contexts if there are any, and an index of the teacher's draws to follow."""
        followed = [] if self._followed is None else self._followed.draw()
        return [self.noise(self._batch_size), *self._pair.draw_rows(self._batch_size), *followed]

    def loss(self, noise: Tensor, *drawn: Tensor) -> tuple[Tensor, Figures]:
        """Compute the divergence with regression and penalty, and the figures of the divergence alone."""
        rows, index = drawn[: self._pair.num_rows], drawn[self._pair.num_rows :]
        q, p = self._pair.estimated_at(*rows)
        with equal_steps(self._pair.num_steps):
            x, loss, log_weights = self._divergence(q, p, self.base_draws(noise))
        if self._followed is not None:
            loss = loss + self._weight * self._followed.end_to_end(*index).mean()
        if self._penalty is not None:
            loss = loss + self._penalty(x, *(rows or (None,)))
        return loss, {"kl": -log_weights.mean(), "kl_se": log_weights.std() / math.sqrt(len(log_weights))}


def _chosen(pair: StudentAndTeacher, estimator: str, regularization: float) -> str:
    """Return the name of the estimator; raise if it, or the regularization, does not fit the pair."""
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


def _divergence(name: str, regularization: float = 0.0) -> Divergence:
    """Return the divergence of a name: the closed form, or an estimator that uses only the densities of both."""
    if name == "closed_form":
        return partial(gaussian_kl, regularization=regularization)

    def by_draws(q: FlowDistribution, p: Distribution, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drawn = []

        def log_prob(x: Tensor) -> Tensor:
            drawn.append(x)
            return p.log_prob(x)

        value, log_weights = ESTIMATORS[name](q, log_prob, z)
        return drawn[0], value, log_weights

    return by_draws


@torch.no_grad()
def _log_weights(pair: StudentAndTeacher, name: str, count: int) -> Tensor:
    """Return exact log weights ``(count,)`` of fresh draws, whose mean estimates minus the KL divergence.

    In closed form their mean has a smaller error.
    """
    q, p = pair.at(*pair.draw_rows(count))
    # Without gradients all other estimators give the same, and "total" computes no score.
    divergence = _divergence("closed_form" if name == "closed_form" else "total")
    return divergence(q, p, pair.student.base().sample((count,)))[2]


def _followed(pair: StudentAndTeacher, batch_size: int, standardizes: bool) -> Regression | None:
    """Return the regression on draws of the teacher, or None if the two do not share the law of z.

    A student that standardizes takes location and scale of the teacher here.
    """
    student, teacher = pair.student, pair.teacher
    count = NUM_TEACHER_BATCHES * batch_size
    contexts = None if pair.contexts is None else pair.contexts[pair.draw_rows(count)[0]]
    stack = None if isinstance(teacher, Mixture) or not isinstance(teacher, Flow) else teacher
    stages = [_draws(teacher, count, contexts)] if stack is None else draw_stages(stack, count, contexts)
    pair.check_draws(stages[-1])
    if standardizes and not student.is_adapted:
        _adapt_like(student, teacher, stages[-1], contexts)
    if stack is not None and same_law(student.base(), stack.base()):
        return Regression(student, stack, stages, contexts, batch_size)
    return None


def _adapt_like(student: Flow, teacher: Flow | Distribution, draws: Tensor, contexts: Tensor | None) -> None:
    """Let the student learn location and scale from draws, or copy the teacher's where both have such a layer."""
    student.adapt(draws, contexts if student.context_dim else None)
    if not isinstance(teacher, Flow):
        return
    for own, others in (
        # Some draws of a teacher that was fitted to few rows lie far out, and would widen the scale.
        (student.standardization, teacher.standardization),
        (student.transform.context_scale, teacher.transform.context_scale),
    ):
        if own is not None and others is not None and own.loc.shape == others.loc.shape and others.is_adapted:
            own.load_state_dict(others.state_dict())


def _draws(teacher: Flow | Distribution, count: int, contexts: Tensor | None) -> Tensor:
    if isinstance(teacher, Flow):
        return teacher(contexts).sample(() if teacher.context_dim else (count,))
    try:
        return teacher.sample((count,))
    except NotImplementedError:
        raise OptionError(
            f"the warm start needs draws of the teacher, and {type(teacher).__name__} has none: give warm_start=0 and "
            "regression=0"
        ) from None


@torch.no_grad()
def _check_penalty(penalty: Penalty, pair: StudentAndTeacher, count: int) -> None:
    rows = pair.draw_rows(count)
    x, _ = pair.at(*rows)[0].transport(pair.student.base().sample((count,)))
    value = penalty(x, *(rows or (None,)))
    if not isinstance(value, Tensor) or value.shape or not value.isfinite():
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.shape else repr(value)
        raise OptionError(
            f"penalty must map draws {tuple(x.shape)} and indices of rows of the context to a finite scalar tensor, "
            f"got {what}"
        )


def _check_options(num_steps: int | None, batch_size: int, warm_start: int, regression: float) -> None:
    at_least = {"num_steps": (num_steps, 1), "batch_size": (batch_size, 2), "warm_start": (warm_start, 0)}
    for name, (value, least) in at_least.items():
        if value is not None:
            checked_int(name, value, least)
    if not 0 <= regression < math.inf:
        raise OptionError(f"regression must be a weight, zero or positive, got {regression}")

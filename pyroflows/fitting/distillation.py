"""Distillation: a student that is quick to sample, fitted to a teacher that is quick to score."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflows.compiling.check import Compiler
from pyroflows.errors import OptionError
from pyroflows.fitting.closed_form import gaussian_kl, has_closed_form
from pyroflows.fitting.estimators import ESTIMATORS
from pyroflows.fitting.regression import Regression, draw_stages, same_law
from pyroflows.fitting.student_teacher import StudentAndTeacher
from pyroflows.flows import Flow, FlowDistribution
from pyroflows.plots import plot_distillation
from pyroflows.randomness import seeded
from pyroflows.training.history import History
from pyroflows.training.loop import OptimizerLike, train
from pyroflows.training.objective import Figures, Objective

LEARNING_RATE = 5e-3
# Batches of the teacher's draws that are followed, and of fresh draws behind the KL divergence at the end.
NUM_TEACHER_BATCHES = 64
NUM_FINAL_BATCHES = 40

# Draws (B, *event_shape) of the student, and the rows (B,) of the contexts at which they were drawn, or None -> a
# scalar that is added to the loss.
Penalty: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
# The laws of student and teacher, and base draws z -> draws x, a loss, and log weights without gradients.
Divergence: TypeAlias = Callable[..., tuple[Tensor, Tensor, Tensor]]


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
    warm_start: int = 2000,
    regression: float = 2.0,
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

    Reverse KL alone leaves out variance and modes of the teacher, and is slow from far away. So, where the teacher is a
    flow with the student's base, the student also follows its draws: the regression of x on z, what the teacher makes
    of a base draw being what the student is to make of it. First, in the warm start, the student takes location and
    scale of the teacher, or of its draws, and follows these layer by layer, if its layers see the dimensions in the
    orders of the teacher's, and otherwise end to end; then the loss is

    .. math:: E_q[\log q(x) - \log p(x)] + w\, E_z \sum_j h\Big(\frac{x^p_j(z) - x^q_j(z)}{s_j}\Big),

    both parts of which vanish where q = p, with h of :class:`pyroflows.fitting.regression.Regression`. It needs
    :math:`64 \times` ``batch_size`` draws of the teacher, once.

    Args:
        student: what is trained; quick in its forward direction, as :class:`pyroflows.flows.IAF` or couplings are.
        teacher: a flow that scores quickly, as :class:`pyroflows.flows.MAF` does; or any distribution with a
            differentiable density of the student's event shape.
        context: rows ``(n, *context_shape)`` at which both are conditioned, drawn at random for each step, where
            student and teacher take a context.
        num_steps: number of training steps after the warm start; None for as many as it takes.
        batch_size: draws a step.
        estimator: of the gradient: "total" or "path" of :mod:`pyroflows.fitting.estimators`; "closed_form", see
            :func:`pyroflows.fitting.closed_form.gaussian_kl`, for two affine autoregressive flows of one order; "auto"
            is the latter where it can be had, and else "path".
        regularization: :math:`\lambda` of ClariNet's regularised KL (Ping et al. 2019, arXiv:1807.07281, eq. 7), for a
            teacher whose conditionals are so narrow that the plain KL explodes; needs the closed form. They use 4.
        warm_start: steps of regression before; 0 for none, from where the student stands.
        regression: the weight w; 0 for the KL divergence alone.
        penalty: a function of draws ``(batch_size, *event_shape)`` and the indices of their rows in ``context``, None
            without; its scalar is added to the loss. It is traced with the step: Python in it that should run at each
            step, such as a counter, needs ``compile="none"``.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam at 0.005.
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
    _check_options(num_steps, batch_size, warm_start, regression)
    # The guard sees what is not finite; torch's own checks would raise there.
    with seeded(seed), pyro.validation_enabled(False):
        pair = StudentAndTeacher(student, teacher, context)
        name = _chosen(pair, estimator, regularization)
        pair.check_scores(batch_size)
        if penalty is not None:
            _check_penalty(penalty, pair, batch_size)
        optimizer = optimizer or partial(torch.optim.Adam, lr=LEARNING_RATE, fused=True)
        fit = partial(train, optimizer=optimizer, compile=Compiler(compile), progress_bar=progress_bar)
        followed = _followed(pair, batch_size, warm_start > 0) if warm_start or regression else None
        if followed is not None and warm_start:
            fit(followed, warm_start)
        divergence = _divergence(name, regularization)
        objective = Imitation(pair, divergence, batch_size, followed if regression else None, regression, penalty)
        history = fit(objective, num_steps)
        log_weights = torch.cat([_log_weights(pair, name, batch_size) for _ in range(NUM_FINAL_BATCHES)]).double()
    kl_se = log_weights.std().item() / math.sqrt(len(log_weights))
    return Distillation(student, history, -log_weights.mean().item(), kl_se)


class Imitation(Objective):
    """The reverse KL divergence from a student to a teacher, with a regression and a penalty where they are given.

    It records ``loss``, and ``kl`` with its standard error ``kl_se`` in nats.

    Args:
        pair: student and teacher.
        divergence: an estimator of the KL divergence.
        batch_size: draws a step.
        followed: the regression of the student on draws of the teacher, or None.
        weight: that of the regression.
        penalty: of the student's draws, or None.
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

    def draw(self) -> list[Tensor]:
        """Base draws, rows of the contexts, and an index of the draws that are followed."""
        followed = [] if self._followed is None else self._followed.draw()
        return [self.noise(self._batch_size), *self._pair.draw_rows(self._batch_size), *followed]

    def loss(self, noise: Tensor, *drawn: Tensor) -> tuple[Tensor, Figures]:
        """The divergence with what is added to it."""
        rows, index = drawn[: self._pair.num_rows], drawn[self._pair.num_rows :]
        q, p = self._pair.estimated_at(*rows)
        x, loss, log_weights = self._divergence(q, p, self.base_draws(noise))
        if self._followed is not None:
            loss = loss + self._weight * self._followed.end_to_end(*index).mean()
        if self._penalty is not None:
            loss = loss + self._penalty(x, *(rows or (None,)))
        return loss, {"kl": -log_weights.mean(), "kl_se": log_weights.std() / math.sqrt(len(log_weights))}


def _chosen(pair: StudentAndTeacher, estimator: str, regularization: float) -> str:
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


def _divergence(name: str, regularization: float = 0.0) -> Divergence:
    """The estimator of a name: the closed form, or one that knows only the densities of student and teacher."""
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
    """Exact log weights of fresh draws; their mean is minus the KL divergence, with less error in closed form."""
    q, p = pair.at(*pair.draw_rows(count))
    # Without gradients all others are one, and "total" computes no score.
    divergence = _divergence("closed_form" if name == "closed_form" else "total")
    return divergence(q, p, pair.student.base().sample((count,)))[2]


def _followed(pair: StudentAndTeacher, batch_size: int, standardizes: bool) -> Regression | None:
    """The regression on draws of the teacher, where z means the same to both; may take their location and scale."""
    student, teacher = pair.student, pair.teacher
    count = NUM_TEACHER_BATCHES * batch_size
    contexts = None if pair.contexts is None else pair.contexts[pair.draw_rows(count)[0]]
    stages = draw_stages(teacher, count, contexts) if isinstance(teacher, Flow) else [_draws(teacher, count)]
    pair.check_draws(stages[-1])
    if standardizes and not student.is_adapted:
        _adapt_like(student, teacher, stages[-1], contexts)
    if isinstance(teacher, Flow) and same_law(student.base(), teacher.base()):
        return Regression(student, teacher, stages, contexts, batch_size)
    return None


def _adapt_like(student: Flow, teacher: Flow | Distribution, draws: Tensor, contexts: Tensor | None) -> None:
    """Let the student learn location and scale, from the teacher's own where both have such a layer."""
    student.adapt(draws, contexts if student.context_dim else None)
    own, others = student.standardization, teacher.standardization if isinstance(teacher, Flow) else None
    if own is not None and others is not None and others.is_adapted:
        # A teacher that was fitted to few rows throws one draw in a thousand far out.
        own.load_state_dict(others.state_dict())


def _draws(teacher: Distribution, count: int) -> Tensor:
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
        if value is not None and (not isinstance(value, int) or value < least):
            raise OptionError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not 0 <= regression < math.inf:
        raise OptionError(f"regression must be a weight, zero or positive, got {regression}")

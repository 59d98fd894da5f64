"""The training loop and its schedules, on objectives that need no model."""

import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch

from pyroflows import DivergedError, FlowError, OptionError
from pyroflows.flows import Flow
from pyroflows.training import Objective, Trainer
from pyroflows.training.history import History
from pyroflows.training.loop import LEARNING_RATE, MAX_BAD_STEPS, MAX_NORM, WARM_UP
from pyroflows.training.schedules import WINDOW, EarlyStopping, Plateau
from pyroflows.transforms import Permutation

TARGET = torch.tensor([1.0, -2.0, 3.0])


class Plain(Objective):
    """An objective of one parameter, without a flow that counts."""

    monitor, falls = "objective", False

    def __init__(self, parameter):
        super().__init__(Flow([Permutation([1, 0])]), [parameter])
        self.parameter = parameter
        self.num_steps = 0

    def before_step(self):
        self.num_steps += 1


class Parabola(Plain):
    """Towards ``TARGET``; the objective is at most 0."""

    noise_scale = 0.0

    def draw(self):
        return [self.noise_scale * torch.randn(())]

    def loss(self, noise):
        loss = ((self.parameter - TARGET) ** 2).sum()
        return loss, {"objective": noise - loss}


class Scripted(Plain):
    """Steps with given objectives and gradients, 1 where none is given; the last ones are repeated.

    Either may be a function of the parameter.
    """

    def __init__(self, parameter, objectives, gradients=(1.0,)):
        super().__init__(parameter)
        self.objectives, self.gradients = objectives, gradients

    def draw(self):
        return [self.at_step(self.objectives), self.at_step(self.gradients)]

    def at_step(self, script):
        value = script(self) if callable(script) else script[min(self.num_steps, len(script)) - 1]
        return torch.as_tensor(value, dtype=torch.float32)

    def loss(self, objective, gradient):
        return (gradient * self.parameter).sum(), {"objective": objective}


def quiet_train(objective, optimizer=None, **options):
    schedule = Plateau("objective", **{"falls": False, **options})
    return Trainer(objective, schedule, optimizer, compile="none", progress_bar=False).run()


def zeros(size=3):
    return torch.zeros(size, requires_grad=True)


def sgd(rate=0.1):
    return partial(torch.optim.SGD, lr=rate)


# What is learned


def test_reaches_the_optimum():
    parameter = zeros()
    quiet_train(Parabola(parameter), num_steps=1500)
    # Adam's last steps, of a rate that falls to zero, leave less than the smallest full step.
    assert (parameter - TARGET).abs().max() < 1e-3


def test_without_num_steps_reaches_the_optimum_and_stops():
    """The objective is noisy, as every ELBO is; without noise each window is progress."""
    objective = Parabola(zeros())
    objective.noise_scale = 0.1
    history = quiet_train(objective)
    assert (objective.parameter - TARGET).abs().max() < 1e-3
    assert history.num_steps < 3000


# The schedule


@pytest.mark.parametrize("num_steps", [1, 2, 3, 49, 50, 51, 400])
def test_num_steps_is_exact(num_steps):
    parameter = zeros()
    history = quiet_train(Parabola(parameter), num_steps=num_steps)
    assert history.num_steps == num_steps
    assert {len(values) for values in history.values()} == {num_steps}


def test_learning_rate_warms_up_stays_and_decays_to_zero():
    parameter = zeros()
    rates = quiet_train(Parabola(parameter), num_steps=400)["learning_rate"]
    assert rates[:WARM_UP] == pytest.approx(LEARNING_RATE * np.arange(1, WARM_UP + 1) / WARM_UP)
    assert rates[WARM_UP:200] == pytest.approx(LEARNING_RATE)
    # The cosine from 1 at the middle to 0 one step after the last.
    expected = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(1, 201) / 201))
    assert rates[200:] == pytest.approx(expected, abs=LEARNING_RATE * 1e-12)
    assert 0 < rates[-1] < 1e-4 * LEARNING_RATE


def test_the_optimizer_uses_the_learning_rate_that_is_recorded():
    parameter = zeros(1)
    history = quiet_train(Scripted(parameter, [0.0]), num_steps=60, optimizer=sgd(0.3))
    assert history["learning_rate"].max() == pytest.approx(0.3)
    assert parameter.item() == pytest.approx(-history["learning_rate"].sum(), rel=1e-5)


def test_groups_keep_the_ratio_of_their_learning_rates():
    slow, fast = zeros(1), zeros(1).double().detach().requires_grad_()

    class Both(Plain):
        def loss(self):
            return slow.sum() + fast.sum(), {"objective": torch.tensor(0.0)}

    def optimizer(parameters):
        first, second = parameters  # of two dtypes, and so not one flat tensor
        return torch.optim.SGD([{"params": [first], "lr": 0.01}, {"params": [second], "lr": 0.05}])

    objective = Both(slow)
    objective.own_parameters.append(fast)
    quiet_train(objective, num_steps=40, optimizer=optimizer)
    assert fast.item() / slow.item() == pytest.approx(5.0, rel=1e-5)
    assert slow.grad is None and fast.grad is None


def num_constant(history):
    """The step at which the decay begins."""
    rates = history["learning_rate"]
    return int(np.flatnonzero(rates == rates.max())[-1]) + 1


@pytest.mark.parametrize(("start", "num_decay"), [(100, 200), (600, 300)])
def test_decay_begins_where_settled_says_so(start, num_decay):
    """It takes half the steps so far, at least 200."""
    parameter = zeros()
    history = quiet_train(Parabola(parameter), settled=lambda history: history.num_steps >= start, optimizer=sgd(1e-6))
    assert num_constant(history) == start
    assert history.num_steps == start + num_decay
    assert history["learning_rate"][-1] < 1e-4 * history["learning_rate"].max()


@pytest.mark.parametrize(("start", "num_decay"), [(100, 250), (600, 300)])
def test_a_decay_has_as_many_steps_as_it_was_told(start, num_decay):
    options = {"settled": lambda history: history.num_steps >= start, "min_decay": 250}
    history = quiet_train(Parabola(zeros()), optimizer=sgd(1e-6), **options)
    assert history.num_steps == start + num_decay


def test_decay_begins_at_a_plateau():
    """Best in the first window, then six windows without progress."""
    parameter = zeros(1)
    noise = torch.randn(10_000).tolist()
    history = quiet_train(Scripted(parameter, [-100.0] * WINDOW + noise))
    # Noise may pass for progress once or twice: two standard errors.
    assert 8 * WINDOW <= num_constant(history) <= 30 * WINDOW


def test_no_decay_while_the_objective_grows():
    parameter = zeros(1)
    climb = [0.01 * i for i in range(2000)] + [20.0] * 8000
    history = quiet_train(Scripted(parameter, climb))
    assert 2000 + 5 * WINDOW <= num_constant(history) <= 2000 + 7 * WINDOW


def test_no_decay_while_a_number_that_should_fall_does():
    parameter = zeros(1)
    fall = [-0.01 * i for i in range(2000)] + [-20.0] * 8000
    history = quiet_train(Scripted(parameter, fall), falls=True)
    assert 2000 + 5 * WINDOW <= num_constant(history) <= 2000 + 7 * WINDOW


def test_settled_is_not_asked_when_the_number_of_steps_is_given():
    parameter = zeros()
    history = quiet_train(Parabola(parameter), num_steps=300, settled=lambda history: True)
    assert num_constant(history) == 150


@pytest.mark.parametrize(("hold", "begin"), [(0, 100), (100, 150), (420, 450), (425, 450), (450, 500)])
def test_no_decay_is_begun_while_it_is_held(hold, begin):
    """Looks are taken every 50 steps, and count only after the hold."""
    parameter = zeros()
    settled = {"settled": lambda history: history.num_steps >= 100}
    history = quiet_train(Parabola(parameter), hold=hold, optimizer=sgd(1e-6), **settled)
    assert num_constant(history) == begin


def test_what_is_seen_during_the_hold_is_no_best():
    """An objective that falls while it is held, as under a rising temperature, has not stalled."""
    parameter = zeros(1)
    fall = [-0.1 * i for i in range(500)] + [-100.0 + 0.01 * i for i in range(1500)] + [-85.0] * 2000
    history = quiet_train(Scripted(parameter, fall), hold=500)
    assert 2000 < num_constant(history) <= 2000 + 7 * WINDOW


# Early stopping


class Counting(Plain):
    """Adds 1 to a tensor at each step, and keeps the values that it had before."""

    def __init__(self, tensor):
        super().__init__(zeros(1))
        self.tensor, self.counts = tensor, []

    def loss(self):
        self.counts.append(int(self.tensor[0]))
        self.tensor.add_(1)
        return self.parameter.sum() * 0, {"objective": torch.tensor(float(len(self.counts)))}


def counting_fit(scores, max_epochs, patience, steps_per_epoch=1):
    """Training that adds 1 to a tensor at each step, under given scores, the first before training.

    Returns the schedule, the history of steps, and the tensor's value before each step and at the end.
    """
    objective, remaining = Counting(torch.zeros(1)), iter(scores)
    tensors = [objective.tensor]
    schedule = EarlyStopping("objective", lambda: next(remaining), tensors, steps_per_epoch, max_epochs, patience)
    history = Trainer(objective, schedule, compile="none", progress_bar=False).run()
    return schedule, history, [*objective.counts, int(objective.tensor)]


def test_a_growing_score_is_followed_to_the_last_epoch():
    schedule, history, _ = counting_fit(range(100), max_epochs=60, patience=1, steps_per_epoch=2)
    assert (schedule.epochs.num_steps, schedule.best, schedule.best_epoch) == (60, 60, 60)
    assert history.num_steps == 120
    rates = history["learning_rate"]
    assert rates[WARM_UP:80] == pytest.approx(LEARNING_RATE)
    expected = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * np.arange(1, 41) / 41))
    assert rates[80:] == pytest.approx(expected, abs=LEARNING_RATE * 1e-12)


def test_the_decay_begins_at_the_best_state_where_the_score_stalls():
    """Best after epoch 40, stalled for 5: the decay takes half of 45 epochs, if it helps."""
    scores = [*range(41), *[0] * 5, *range(41, 100)]
    schedule, history, counts = counting_fit(scores, max_epochs=1000, patience=5)
    assert counts[:46] == [*range(45), 40]
    assert schedule.epochs.num_steps == history.num_steps == 45 + 22
    rates = history["learning_rate"]
    assert rates[WARM_UP:45] == pytest.approx(LEARNING_RATE)
    assert (np.diff(rates[45:]) < 0).all()
    assert 0 < rates[-1] < 0.01 * LEARNING_RATE


def test_a_decay_that_does_not_help_stops_early():
    scores = [*range(41), *[0] * 100]
    schedule, history, counts = counting_fit(scores, max_epochs=1000, patience=5)
    assert history.num_steps == 45 + 5
    assert counts[-1] == 45
    assert (schedule.best, schedule.best_epoch) == (40, 40)


@pytest.mark.parametrize(
    ("scores", "patience", "still_growing"),
    [(range(100), 1, True), ([*range(10), *[0] * 100], 5, False), ([*range(10), *[0] * 100], 100, False)],
    ids=["grows", "stalled", "grew at first, with more patience than epochs"],
)
def test_a_schedule_knows_whether_the_score_still_grew_where_the_epochs_ran_out(scores, patience, still_growing):
    assert counting_fit(scores, max_epochs=60, patience=patience)[0].still_growing is still_growing


def test_the_best_state_can_be_put_back():
    buffer = torch.zeros(2, dtype=torch.long)
    objective = Counting(buffer)
    objective.loss = lambda: (-objective.parameter.sum(), {"objective": buffer.add_(1)[0]})
    remaining = iter([0.0, 2.0, *[1.0] * 5])
    schedule = EarlyStopping("objective", lambda: next(remaining), [objective.parameter, buffer], 3, 6, 9)
    rates = Trainer(objective, schedule, sgd(1.0), compile="none", progress_bar=False).run()["learning_rate"]
    assert buffer.tolist() == [9, 9]  # the decay began at the best state, after epoch 4
    schedule.restore_best()
    assert buffer.tolist() == [3, 3]
    assert objective.parameter.item() == pytest.approx(rates[:3].sum())


def test_training_that_only_harms_ends_where_it_began():
    schedule, _, _ = counting_fit(range(0, -100, -1), max_epochs=100, patience=4)
    assert (schedule.best, schedule.best_epoch) == (0, 0)
    assert schedule.epochs.num_steps == 4 + 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_never_the_best(bad):
    schedule, _, _ = counting_fit([bad, bad, -3.0, bad, -2.0, bad], max_epochs=5, patience=5)
    assert (schedule.best, schedule.best_epoch) == (-2.0, 4)
    schedule, _, _ = counting_fit([bad] * 10, max_epochs=5, patience=5)
    assert (schedule.best, schedule.best_epoch) == (-math.inf, 0)


@pytest.mark.parametrize("max_epochs", [1, 2, 3, 4])
@pytest.mark.parametrize("patience", [1, 10])
def test_few_epochs(max_epochs, patience):
    """However early the score stalls, no more than ``max_epochs``."""
    for scores in (range(100), range(0, -100, -1)):
        schedule, _, _ = counting_fit(scores, max_epochs, patience)
        assert 1 <= schedule.epochs.num_steps <= max_epochs


@pytest.mark.parametrize("patience", range(1, 12))
def test_a_stall_at_any_time_ends_in_time(patience):
    for max_epochs in (5, 6, 7, 20):
        growing_again = [0, *[-1] * patience, *range(1, 100)]
        assert counting_fit(growing_again, max_epochs, patience)[0].epochs.num_steps <= max_epochs


def test_epochs_have_means_of_their_steps():
    schedule, _, _ = counting_fit([-1.0, -2.0, -3.0, -4.0], max_epochs=3, patience=9, steps_per_epoch=4)
    epochs = schedule.epochs
    assert set(epochs) == {"objective", "validation_objective", "learning_rate", "grad_norm"}
    assert epochs["objective"].tolist() == [2.5, 6.5, 10.5]
    assert epochs["validation_objective"].tolist() == [-2.0, -3.0, -4.0]
    assert repr(epochs).startswith("History(3 epochs: ")


def test_progress_bar_shows_both_curves(capfd):
    parameter = zeros(1)
    schedule = EarlyStopping("objective", lambda: -2.5, [parameter], steps_per_epoch=2, max_epochs=4, patience=9)
    Trainer(Scripted(parameter, [-1.25]), schedule, compile="none").run()
    shown = capfd.readouterr().err
    assert "epoch=4, objective=-1.250, validation_objective=-2.500" in shown


# Gradient clipping


def test_large_gradients_are_clipped_to_a_norm():
    parameter = zeros(4)
    history = quiet_train(Scripted(parameter, [0.0], gradients=[1e6]), num_steps=1, optimizer=sgd(1.0))
    step = -parameter.detach() / history["learning_rate"][0]
    assert step.norm().item() == pytest.approx(MAX_NORM, rel=1e-4)
    assert history["grad_norm"] == pytest.approx([2e6])  # as it was


@pytest.mark.parametrize(("max_norm", "expected"), [(3.0, 3.0), (math.inf, 2e6)])
def test_gradients_are_clipped_to_the_norm_that_was_given(max_norm, expected):
    parameter = zeros(4)
    objective, schedule = Scripted(parameter, [0.0], gradients=[1e6]), Plateau("objective", 1, falls=False)
    options = {"max_norm": max_norm, "compile": "none", "progress_bar": False}
    history = Trainer(objective, schedule, sgd(1.0), **options).run()
    assert parameter.norm().item() == pytest.approx(expected * history["learning_rate"][0], rel=1e-4)


def test_small_gradients_are_left_alone():
    parameter = zeros(4)
    history = quiet_train(Scripted(parameter, [0.0], gradients=[0.5]), num_steps=1, optimizer=sgd(1.0))
    assert (-parameter.detach() / history["learning_rate"][0]).tolist() == pytest.approx([0.5] * 4)


# The guard


@pytest.mark.parametrize("where", ["objective", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_isolated_bad_step_changes_nothing_and_training_goes_on(where, value):
    seen = []
    objectives, gradients = [0.0] * 100, [1.0] * 100
    (objectives if where == "objective" else gradients)[30] = value

    class Seen(Scripted):
        def before_step(self):
            super().before_step()
            seen.append(self.parameter.item())

    objective = Seen(zeros(1), objectives, gradients)
    history = quiet_train(objective, num_steps=100, optimizer=sgd())
    seen.append(objective.parameter.item())
    assert np.flatnonzero(np.diff(seen) == 0).tolist() == [30]
    assert history.num_steps == 100


def test_bad_steps_do_not_enter_the_optimizer_state():
    """With Adam one NaN would stay in the moments for ever."""

    class Spoiled(Parabola):
        def draw(self):
            return [torch.tensor(math.nan if self.num_steps % 7 == 3 else 0.0)]

        def loss(self, noise):
            loss, figures = super().loss(noise)
            return loss + noise * self.parameter.sum(), figures

    objective = Spoiled(zeros())
    history = quiet_train(objective, num_steps=2000)
    assert (objective.parameter - TARGET).abs().max() < 1e-3
    assert np.isnan(history["grad_norm"]).sum() == 286


def test_bad_steps_that_are_not_in_a_row_never_diverge():
    parameter = zeros(1)
    runs = ([math.nan] * (MAX_BAD_STEPS - 1) + [0.0]) * 20
    history = quiet_train(Scripted(parameter, runs), num_steps=len(runs), optimizer=sgd())
    assert history.num_steps == len(runs)


def test_without_num_steps_bad_steps_do_not_break_the_search_for_a_plateau():
    parameter = zeros(1)
    objectives = [math.nan if i % 3 else 0.0 for i in range(3000)]
    history = quiet_train(Scripted(parameter, objectives), optimizer=sgd(1e-3))
    assert history.num_steps < 3000


@pytest.mark.parametrize("where", ["objective", "gradient"])
def test_too_many_bad_steps_raise(where):
    parameter = zeros(1)
    good, bad = [0.0] * 70, [math.nan] * 100
    options = {"objectives": good + bad} if where == "objective" else {"objectives": [0.0], "gradients": [1.0, *bad]}
    with pytest.raises(DivergedError, match=rf"{MAX_BAD_STEPS} steps in a row") as caught:
        quiet_train(Scripted(parameter, **options), num_steps=500)
    assert isinstance(caught.value, FlowError)
    assert isinstance(caught.value, RuntimeError)
    assert f"up to step {(70 if where == 'objective' else 1) + MAX_BAD_STEPS}" in str(caught.value)


def test_after_divergence_parameters_are_finite():
    """Here the parameters themselves are driven off: the good state is from before."""
    parameter = zeros(1)
    objective = Scripted(parameter, lambda self: self.parameter.item() if self.parameter < 60.0 else math.nan, [-1.0])
    with pytest.raises(DivergedError):
        quiet_train(objective, num_steps=1000, optimizer=sgd(1.0))
    assert 0 < parameter.item() < 60.0


def test_after_divergence_at_the_start_parameters_are_as_they_were():
    parameter = torch.tensor([1.5], requires_grad=True)
    with pytest.raises(DivergedError):
        quiet_train(Scripted(parameter, [math.nan]))
    assert parameter.item() == 1.5


@pytest.mark.parametrize("last_good", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
def test_the_restored_state_has_a_finite_objective(last_good):
    """Whichever step throws the parameters off, also the one at which a state is kept."""
    parameter = zeros(1)
    gradients = [*[-1e-3] * (last_good - 1), -10.0, -1e-3]
    objective = Scripted(parameter, lambda self: 0.0 if self.parameter < 5.0 else math.nan, gradients)
    with pytest.raises(DivergedError):
        quiet_train(objective, num_steps=1000, optimizer=sgd(1.0))
    assert 0 <= parameter.item() < 5.0


def test_after_divergence_buffers_are_those_of_the_good_state():
    """A layer's state, such as that of a power iteration, follows its parameters."""

    class Drifting(Scripted):
        def before_step(self):
            super().before_step()
            self.flow.drift += 1.0

    objective = Drifting(zeros(1), [*[0.0] * 60, math.nan])
    objective.flow.register_buffer("drift", torch.zeros(()))
    with pytest.raises(DivergedError):
        quiet_train(objective, num_steps=1000)
    assert objective.flow.drift == WINDOW


# Optimizers


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        partial(torch.optim.SGD, lr=0.1),
        lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
        pyro.optim.Adam({"lr": 0.01}),
        pyro.optim.SGD({"lr": 0.1, "momentum": 0.5}),
        pyro.optim.ClippedAdam({"lr": 0.01}),
    ],
    ids=["default", "partial", "function", "pyro adam", "pyro sgd", "pyro clipped adam"],
)
def test_optimizers_reach_the_optimum(optimizer):
    parameter = zeros()
    quiet_train(Parabola(parameter), num_steps=1500, optimizer=optimizer)
    assert (parameter - TARGET).abs().max() < 2e-3


def test_a_pyro_optimizer_keeps_its_options():
    """Two steps with momentum: the second one is 1.5 times as long, for equal rates."""
    parameter = zeros(1)
    optimizer = pyro.optim.SGD({"lr": 0.1, "momentum": 0.5})
    rates = quiet_train(Scripted(parameter, [0.0]), num_steps=2, optimizer=optimizer)["learning_rate"]
    assert -parameter.item() == pytest.approx(rates[0] + 1.5 * rates[1], rel=1e-5)


def test_an_optimizer_is_not_changed_by_its_use():
    """One function or Pyro optimizer can serve several fits."""
    optimizer = pyro.optim.Adam({"lr": 0.02})
    rates = [
        quiet_train(Parabola(parameter), num_steps=50, optimizer=optimizer)["learning_rate"]
        for parameter in (zeros(), zeros())
    ]
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0].max() == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda parameters: None, "returned NoneType"),
        (lambda parameters: list(parameters), "returned list"),
        (pyro.optim.Adam(lambda name: {"lr": 0.01}), "options by parameter"),
    ],
    ids=["none", "list", "options by parameter"],
)
def test_wrong_optimizers_raise(optimizer, message):
    parameter = zeros()
    with pytest.raises(OptionError, match=message):
        quiet_train(Parabola(parameter), num_steps=5, optimizer=optimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameter: torch.optim.SGD([parameter], lr=0.1),
        lambda parameter: "adam",
        lambda parameter: 0.01,
    ],
    ids=["an optimizer itself", "a name", "a number"],
)
def test_what_is_no_function_is_no_optimizer(make):
    parameter = zeros()
    with pytest.raises(OptionError, match="optimizer must"):
        quiet_train(Parabola(parameter), num_steps=5, optimizer=make(parameter))


@pytest.mark.parametrize(
    "optimizer",
    [
        pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.1}),
        pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1e-3}),
    ],
    ids=["schedule", "clipping"],
)
def test_what_a_pyro_optimizer_does_besides_is_refused(optimizer):
    """A schedule or clipping of the user's that would be left out without a word."""
    parameter = zeros()
    with pytest.raises(OptionError, match="schedule|clip"):
        quiet_train(Parabola(parameter), num_steps=5, optimizer=optimizer)


@pytest.mark.parametrize("num_steps", [0, -3])
def test_num_steps_must_be_positive(num_steps):
    with pytest.raises(OptionError, match=f"num_steps must be positive, got {num_steps}"):
        quiet_train(Parabola(zeros()), num_steps=num_steps)


# Interruption


@pytest.mark.parametrize("when", ["before the gradient", "after the gradient"])
def test_keyboard_interrupt_leaves_finite_parameters(when):
    class Interrupted(Parabola):
        def loss(self, noise):
            if self.num_steps == 120 and when == "before the gradient":
                raise KeyboardInterrupt
            return super().loss(noise)

    def interrupt(gradients):
        if objective.num_steps == 120:
            raise KeyboardInterrupt

    objective = Interrupted(zeros())
    schedule = Plateau("objective", 1000)
    combine = interrupt if when == "after the gradient" else None
    with pytest.raises(KeyboardInterrupt):
        Trainer(objective, schedule, compile="none", combine_gradients=combine, progress_bar=False).run()
    assert torch.isfinite(objective.parameter).all()
    assert (objective.parameter - TARGET).norm() < TARGET.norm()  # what was learned is kept


@pytest.mark.parametrize("late", [-5.0, -1.01])
def test_keyboard_interrupt_after_a_decline_leaves_the_better_state(late):
    """A window that is worse beyond its noise is left; noise alone, here of 0.1 / sqrt(50), is not."""

    class Declining(Scripted):
        def before_step(self):
            super().before_step()
            if self.num_steps == 3 * WINDOW:
                raise KeyboardInterrupt

    parameter = torch.zeros((), requires_grad=True)
    noise = [0.1 * (-1) ** i for i in range(WINDOW)]
    objectives = [*(value - 1.0 for value in noise), *(value + late for value in noise)]
    objectives += objectives[WINDOW:]
    schedule = Plateau("objective", 10 * WINDOW, falls=False)
    trainer = Trainer(
        Declining(parameter, objectives, (-1e-3,)), schedule, sgd(1.0), compile="none", progress_bar=False
    )
    at_window = []
    take = trainer._good.take
    trainer._good.take = lambda: (take(), at_window.append(parameter.item()))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    is_kept = late < -2
    assert (parameter.item() == at_window[0]) == is_kept and len(at_window) == (1 if is_kept else 2)


def test_keyboard_interrupt_among_bad_steps_leaves_a_good_state():
    class Interrupted(Scripted):
        def before_step(self):
            super().before_step()
            if self.num_steps == 66:
                raise KeyboardInterrupt

    parameter = zeros(1)
    objective = Interrupted(parameter, lambda self: 0.0 if self.parameter < 40.0 else math.nan, [-1.0])
    with pytest.raises(KeyboardInterrupt):
        quiet_train(objective, num_steps=1000, optimizer=sgd(1.0))
    assert 0 < parameter.item() < 40.0


# History


def test_history_has_what_the_step_recorded():
    class Two(Scripted):
        def loss(self, objective, gradient):
            loss, figures = super().loss(objective, gradient)
            return loss, {**figures, "other": 2 * objective}

    history = quiet_train(Two(zeros(1), range(10), [3.0]), num_steps=10)
    assert set(history) == {"objective", "other", "grad_norm", "learning_rate"}
    assert history["objective"].tolist() == list(range(10))
    assert history["other"].tolist() == list(range(0, 20, 2))
    assert history["grad_norm"].tolist() == [3.0] * 10
    assert all(values.dtype == np.float64 for values in history.values())
    assert repr(history) == "History(10 steps: objective, other, grad_norm, learning_rate)"


def test_a_figure_that_comes_late_was_nan_before():
    history = History({"a": [1.0, 2.0]})
    history.append(a=3.0, b=4.0)
    assert history["a"].tolist() == [1.0, 2.0, 3.0]
    assert history["b"][:2].tolist() == pytest.approx([math.nan, math.nan], nan_ok=True) and history.last("b") == 4.0


def test_history_counts_steps_and_gives_recent_finite_figures():
    history = History({"a": [1.0, math.nan, 3.0]})
    assert history.num_steps == 3
    assert history.recent("a", 2).tolist() == [3.0]
    assert History().num_steps == 0


# Progress


def test_no_progress_bar_prints_nothing(capfd):
    quiet_train(Parabola(zeros()), num_steps=20)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_progress_bar_shows_the_monitored_value(capfd):
    Trainer(Scripted(zeros(1), [-12.34]), Plateau("objective", 20), compile="none").run()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "objective=-12.34" in captured.err
    assert "20/20" in captured.err


def test_progress_bar_is_closed_by_an_error(capfd):
    """An open bar would go on printing over what comes next."""

    class Broken(Plain):
        def loss(self):
            raise RuntimeError("of the model")

    with pytest.raises(RuntimeError, match="of the model"):
        Trainer(Broken(zeros()), Plateau("objective", 20), compile="none").run()
    from tqdm.auto import tqdm

    assert not tqdm._instances


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, pyro.optim.PyroOptim(torch.optim.LBFGS, {})])
def test_an_optimizer_that_evaluates_the_loss_itself_is_refused(optimizer):
    with pytest.raises(OptionError, match="LBFGS evaluates the loss several times"):
        Trainer(Parabola(zeros()), Plateau("objective", 1), optimizer)

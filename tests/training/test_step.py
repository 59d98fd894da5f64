"""One step: what it trains, what it reads anew, and what compilation leaves as it was."""

import copy
import math
from functools import partial

import pytest
import torch

from pyroflows import OptionError, ShapeError, Trainer, train
from pyroflows.compiling.check import Compiler
from pyroflows.fitting import ReverseKL
from pyroflows.flows import IAF, Flow
from pyroflows.training import Objective
from pyroflows.training.objective import trained_parameters
from pyroflows.training.schedules import Plateau
from pyroflows.training.step import Step
from pyroflows.transforms import Permutation

both = pytest.mark.parametrize("mode", ["trace", "none"])
small_iaf = partial(IAF, num_layers=2, hidden_dims=(8,))


def log_density(x):
    return -((x - 1) ** 2).sum(-1)


def objective(flow=None, **options):
    return ReverseKL(flow or small_iaf(2), log_density, num_particles=16, **options)


# The flat tensor


def test_parameters_are_views_of_one_tensor_while_they_are_trained():
    kl = objective(own_parameters=[torch.ones(3, requires_grad=True)])
    step = Step(kl, Compiler("none"))
    (flat,) = step.parameters
    before = [p.detach().clone() for p in kl.parameters]
    with step.flattened():
        assert all(map(torch.equal, kl.parameters, before))
        assert {p.untyped_storage().data_ptr() for p in kl.parameters} == {flat.untyped_storage().data_ptr()}
        with torch.no_grad():
            flat.copy_(torch.arange(flat.numel()))
        assert torch.equal(torch.cat([p.detach().reshape(-1) for p in kl.parameters]), flat)
        kept = kl.flow.state_dict()
    storages = [p.untyped_storage() for p in kl.parameters]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert all(s.nbytes() == p.numel() * 4 for s, p in zip(storages, kl.parameters, strict=True))
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in kl.parameters]), torch.arange(flat.numel()).float())
    assert all(torch.equal(value, kept[name]) for name, value in kl.flow.state_dict().items())


def test_memory_is_given_back_where_a_fit_fails():
    kl = objective()
    with pytest.raises(KeyboardInterrupt), Step(kl, Compiler("none")).flattened():
        raise KeyboardInterrupt
    assert len({p.untyped_storage().data_ptr() for p in kl.parameters}) == len(kl.parameters)


@both
def test_values_that_are_set_before_a_run_count(mode):
    kl = objective()
    trainer = Trainer(kl, Plateau("elbo", 1), partial(torch.optim.SGD, lr=0.0), compile=mode, progress_bar=False)
    with torch.no_grad():
        for parameter in kl.parameters:
            parameter.fill_(0.3)
    trainer.run()
    assert all((parameter == 0.3).all() for parameter in kl.parameters)


@both
def test_frozen_parameters_stay(mode):
    flow = small_iaf(2)
    frozen = next(flow.parameters()).requires_grad_(False)
    before = frozen.clone()
    step = Step(objective(flow), Compiler(mode))
    assert step.parameters[0].numel() == sum(p.numel() for p in trained_parameters(flow))
    step()
    assert frozen.grad is None and torch.equal(frozen, before)


@both
def test_gradients_have_the_dtypes_of_their_parameters(mode):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    flow = small_iaf(2)
    kl = ReverseKL(flow, lambda x: -scale.float() * (x**2).sum(-1), own_parameters=[scale])
    step = Step(kl, Compiler(mode))
    assert step.parameters == kl.parameters  # which share no memory, as they cannot
    step()
    assert [p.grad.dtype for p in step.parameters] == [p.dtype for p in step.parameters]
    assert scale.grad.item() != 0.0


@both
def test_a_parameter_that_is_named_twice_is_trained_once(mode):
    flow = small_iaf(2)
    twice = objective(flow, own_parameters=[*flow.parameters()])
    assert len(twice.parameters) == len(list(flow.parameters()))
    (flat,) = Step(twice, Compiler(mode)).parameters
    assert flat.numel() == sum(p.numel() for p in flow.parameters())


class ByViews(Objective):
    """Its loss views a parameter of which the memory goes column by column."""

    def __init__(self):
        super().__init__(Flow(Permutation([1, 0])), [torch.ones(3, 2).t().requires_grad_()])

    def loss(self):
        return (self.own_parameters[0].t().reshape(-1) * torch.arange(6.0)).sum() ** 2, {}


@both
def test_a_parameter_in_column_major_memory(mode):
    """The flat tensor holds it row by row."""
    by_views = ByViews()
    step = Step(by_views, Compiler(mode))
    with step.flattened():
        assert step()["loss"] == 225.0
        expected = 2 * 15.0 * torch.arange(6.0).reshape(3, 2).t()
        torch.testing.assert_close(step.parameters[0].grad.reshape(2, 3), expected)


def test_an_objective_without_parameters():
    with pytest.raises(OptionError, match="no parameters to train"):
        Step(objective(Flow([Permutation([1, 0])])), Compiler("none"))


# Base draws


def test_noise_of_a_base_that_is_not_trained_is_drawn_outside():
    kl = objective()
    noise = kl.noise(16)
    assert noise.shape == (16, 2) and kl.base_draws(noise) is noise


def test_noise_of_a_base_that_is_trained_is_drawn_in_the_loss():
    kl = objective(small_iaf(2, base="student_t"))
    noise = kl.noise(16)
    assert noise.shape == (16, 0)
    draws = kl.base_draws(noise)
    assert draws.shape == (16, 2) and draws.requires_grad
    kl.flow.base.requires_grad_(False)
    assert objective(kl.flow).noise(16).shape == (16, 2)


def test_own_parameters_without_gradients():
    with pytest.raises(OptionError, match="does not require gradients"):
        Step(objective(own_parameters=[torch.zeros(2)]), Compiler("none"))


# Compiled


class Counted(Objective):
    """Draws an index that counts up, and reads a buffer, a tensor of its own, and a figure of the step before."""

    def __init__(self):
        super().__init__(small_iaf(2))
        self.flow.register_buffer("shift", torch.tensor(0.0))
        self.scale = torch.tensor(1.0)
        self.count = 0

    @property
    def state(self):
        return [self.scale]

    def draw(self):
        self.count += 1
        return [self.noise(4), torch.tensor(float(self.count))]

    def loss(self, noise, count):
        x, _ = self.flow().transport(self.base_draws(noise))
        return (x**2).mean(), {"count": count, "shift": 1 * self.flow.shift, "scale": 1 * self.scale}

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


@both
def test_the_place_and_the_random_numbers_of_a_fit_do_not_depend_on_compilation(mode):
    torch.manual_seed(3)
    counted = Counted()
    expected = torch.get_rng_state()
    step = Step(counted, Compiler(mode))
    assert torch.equal(torch.get_rng_state(), expected)
    assert [step()["count"] for _ in range(3)] == [1.0, 2.0, 3.0]


@both
def test_buffers_and_declared_state_are_read_anew(mode):
    counted = Counted()
    step = Step(counted, Compiler(mode))
    for value in (1.0, 2.0):
        counted.flow.shift.fill_(value)
        counted.scale.fill_(10 * value)
        assert (step()["shift"], step()["scale"]) == (value, 10 * value)


@both
def test_steps_with_draws_of_another_shape(mode):
    class Shrinking(Counted):
        def draw(self):
            noise, count = super().draw()
            return [noise[: 4 if count < 3 else 2], count]

        def loss(self, noise, count):
            rows = self.flow().transport(noise)[0] + torch.zeros(len(noise), 2)
            return (rows**2).mean(), {"num_rows": torch.tensor(float(len(noise)))}

    step = Step(Shrinking(), Compiler(mode))
    assert [step()["num_rows"] for _ in range(3)] == [4.0, 4.0, 2.0]


@both
def test_the_hook_before_a_step_runs_each_time(mode):
    class Hooked(Counted):
        def before_step(self):
            self.flow.shift += 1

    history = Trainer(Hooked(), Plateau("loss", 5), compile=mode, progress_bar=False).run()
    assert history["shift"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_the_hook_of_the_flow_is_run_by_default():
    calls = []
    kl = objective()
    kl.flow.before_step = lambda: calls.append(1)
    Trainer(kl, Plateau("elbo", 5), compile="none", progress_bar=False).run()
    assert len(calls) == 5


@both
def test_the_loss_is_recorded_where_it_is_watched(mode):
    torch.manual_seed(0)
    figures = Step(Counted(), Compiler(mode))()
    assert list(figures) == ["loss", "count", "shift", "scale"] and math.isfinite(figures["loss"])
    assert list(Step(objective(), Compiler(mode))()) == ["elbo", "log_weight_variance"]


def test_traced_and_eager_steps_have_the_same_gradients():
    kl = objective()
    with torch.no_grad():
        for parameter in kl.parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))
    gradients = []
    for mode in ("none", "trace"):
        step = Step(copy.deepcopy(kl), Compiler(mode))
        torch.manual_seed(1)
        step()
        gradients.append(step.parameters[0].grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


# What an objective may give


class Given(Objective):
    """An objective whose loss is what a function of its draws gives."""

    def __init__(self, result):
        super().__init__(IAF(2, num_layers=1, hidden_dims=(4,)))
        self.result = result

    def draw(self):
        return [self.noise(5)]

    def loss(self, noise):
        _, log_q = self.flow().transport(noise)
        return self.result(log_q)


@pytest.mark.parametrize("mode", ["auto", "trace", "none"])
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda log_q: log_q.mean(), r"Given.loss must return a pair"),
        (lambda log_q: (log_q, {}), r"the loss of Given must be a scalar tensor"),
        (lambda log_q: (log_q.mean().detach(), {}), r"must be a scalar tensor that depends on the trained parameters"),
        (lambda log_q: (log_q.mean(), {"kl": 1.0}), r"the figure 'kl' of Given must be a scalar tensor, got 1.0"),
        (lambda log_q: (log_q.mean(), {"kl": log_q}), r"the figure 'kl' of Given must be a scalar tensor"),
        (lambda log_q: (log_q.mean(), {"loss": log_q.mean()}), r"must give its figure 'loss' another name"),
        (lambda log_q: (log_q.mean(), {"grad_norm": log_q.mean()}), r"must give its figure 'grad_norm' another name"),
    ],
    ids=["no pair", "vector", "constant", "number", "vector figure", "loss", "grad_norm"],
)
def test_what_is_no_loss_is_refused_in_one_sentence(result, message, mode):
    with pytest.raises(OptionError, match=message):
        train(Given(result), num_steps=2, compile=mode, progress_bar=False)


@pytest.mark.parametrize("log_density", [lambda x: -x.square().sum(), lambda x: -x.square()], ids=["scalar", "matrix"])
def test_a_log_density_of_another_shape_is_refused(log_density):
    with pytest.raises(ShapeError, match="one number for each of 128 draws"):
        train(ReverseKL(IAF(3, num_layers=1, hidden_dims=(4,)), log_density), num_steps=2, progress_bar=False)

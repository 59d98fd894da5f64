"""A trainer's state is complete: another trainer that loads it goes on to bit-equal parameters."""

from functools import partial

import numpy as np
import pytest
import torch

import pyroflows as pf
from pyroflows.errors import DivergedError
from pyroflows.fitting import ReverseKL
from pyroflows.fitting.maximum_likelihood import MaximumLikelihood
from pyroflows.training.data import load
from pyroflows.training.schedules import EarlyStopping, Plateau
from pyroflows.transforms import Permutation

STEP, NUM_STEPS = 13, 40
X = torch.randn(40, 2, generator=torch.Generator().manual_seed(1)) ** 2
WEIGHTS = torch.linspace(0.5, 1.5, 40)


def flow_of(seed):
    torch.manual_seed(seed)
    return pf.flows.MAF(2, num_layers=2, hidden_dims=(8,))


def maximum_likelihood(seed):
    """Eight steps an epoch, so that the state is taken in the middle of the second one."""
    flow = flow_of(seed)
    flow.adapt(X)
    objective = MaximumLikelihood(flow, load(flow, X, weights=WEIGHTS), torch.arange(40), 5)

    @torch.no_grad()
    def score():
        return flow().log_prob(X).mean().item()

    return objective, EarlyStopping("log_prob", score, [*flow.parameters(), *flow.buffers()], 8, 5, 2)


def reverse_kl(seed):
    flow = pf.flows.RealNVP(2, num_layers=2, hidden_dims=(8,), base="student_t")
    own = torch.full((), float(seed), requires_grad=True)
    objective = ReverseKL(flow, lambda x: -(x**2).sum(-1) - (own - 3.0) ** 2, own_parameters=[own], num_particles=16)
    return objective, Plateau("elbo", NUM_STEPS)


class Cycling(pf.Objective):
    """A user's: towards points that come in turn, the place among which is its state."""

    points = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])

    def __init__(self, flow):
        super().__init__(flow)
        self.place = 0

    def draw(self):
        self.place = (self.place + 1) % 3
        return [self.noise(8), self.points[self.place]]

    def loss(self, noise, point):
        x, _ = self.flow().estimated().transport(self.base_draws(noise))
        return ((x - point) ** 2).mean(), {"x": x.mean()}

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def users(seed):
    torch.manual_seed(seed)
    return Cycling(pf.flows.IAF(2, num_layers=1, hidden_dims=(8,))), Plateau("loss", NUM_STEPS)


def trainer_of(make, seed, **options):
    objective, schedule = make(seed)
    return objective, pf.Trainer(objective, schedule, progress_bar=False, **options)


def states_of(objective, trainer, *steps):
    """The trainer's states before these steps, of a run to the end."""
    states = []

    def before_step():
        if trainer.history.num_steps in steps:
            states.append(trainer.state_dict())

    objective.before_step = before_step
    trainer.run()
    return states


OPTIMIZERS = {
    "adam": None,
    "sgd": partial(torch.optim.SGD, lr=0.001, momentum=0.9),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.001),
}


@pytest.mark.parametrize("compile", ["trace", "none"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("make", [maximum_likelihood, reverse_kl, users], ids=lambda make: make.__name__)
def test_a_second_trainer_goes_on_to_bit_equal_parameters(make, optimizer, compile):
    options = {"optimizer": optimizer, "compile": compile}
    objective, trainer = trainer_of(make, 1, **options)
    (state,) = states_of(objective, trainer, STEP)
    after = torch.rand(3)
    assert trainer.history.num_steps == NUM_STEPS
    for seed in (2, 3):  # the state can be loaded more than once
        other, second = trainer_of(make, seed, **options)
        assert not all(map(torch.equal, other.parameters, objective.parameters))
        second.load_state_dict(state)
        second.run()
        assert all(map(torch.equal, other.parameters, objective.parameters))
        assert all(map(torch.equal, other.flow.buffers(), objective.flow.buffers()))
        assert torch.equal(torch.rand(3), after)
        assert list(second.history) == list(trainer.history)
        assert all(np.array_equal(values, trainer.history[name]) for name, values in second.history.items())


def test_the_state_of_early_stopping_goes_on():
    """Also that after which the decay has begun, at the best state."""
    objective, schedule = maximum_likelihood(1)
    states = states_of(objective, pf.Trainer(objective, schedule, progress_bar=False), STEP, 35)
    for state in states:
        other, second = maximum_likelihood(2)
        trainer = pf.Trainer(other, second, progress_bar=False)
        trainer.load_state_dict(state)
        trainer.run()
        assert (second.best, second.best_epoch) == (schedule.best, schedule.best_epoch)
        assert second.epochs["validation_log_prob"].tolist() == schedule.epochs["validation_log_prob"].tolist()
        for each in (schedule, second):
            each.restore_best()
        assert all(map(torch.equal, other.parameters, objective.parameters))


def test_a_plateau_that_was_found_is_kept():
    """The decay had begun; its end is known."""

    def settled(seed):
        objective, _ = users(seed)
        return objective, Plateau("loss", settled=lambda history: True)

    objective, trainer = trainer_of(settled, 1)
    (state,) = states_of(objective, trainer, 120)
    other, second = trainer_of(settled, 2)
    second.load_state_dict(state)
    assert second.run().num_steps == trainer.history.num_steps == 250
    assert all(map(torch.equal, other.parameters, objective.parameters))


class Hopeless(pf.Objective):
    """Its loss is never finite."""

    def __init__(self, start):
        super().__init__(pf.Flow([Permutation([1, 0])]), [torch.tensor(start, requires_grad=True)])

    def loss(self):
        return self.own_parameters[0] * torch.nan, {}


def test_the_guard_goes_on_counting_and_knows_the_last_good_state():
    first = Hopeless(1.5)
    trainer = pf.Trainer(first, Plateau("loss", NUM_STEPS), compile="none", progress_bar=False)
    states = []
    first.before_step = lambda: states.append(trainer.state_dict())
    with pytest.raises(DivergedError, match="up to step 25"):
        trainer.run()
    second = Hopeless(7.0)
    trainer = pf.Trainer(second, Plateau("loss", NUM_STEPS), compile="none", progress_bar=False)
    trainer.load_state_dict(states[STEP])
    with pytest.raises(DivergedError, match="up to step 25"):
        trainer.run()
    assert second.own_parameters[0].item() == 1.5


# Several processes


@pytest.mark.parametrize("compile", ["trace", "none"])
def test_averaging_gradients_of_two_half_batches_is_the_full_batch(compile):
    """Before the clipping, which the first steps need."""

    class Points(pf.Objective):
        def __init__(self, flow, rows):
            super().__init__(flow)
            self.rows = rows

        def draw(self):
            return [100 * X[self.rows].double()]

        def loss(self, x):
            return -self.flow().estimated().log_prob(x).mean(), {}

    def trained(rows, combine=None):
        objective = Points(flow_of(1).double(), rows)
        trainer = pf.Trainer(
            objective,
            Plateau("loss", NUM_STEPS),
            partial(torch.optim.SGD, lr=0.01),
            compile=compile,
            combine_gradients=combine and partial(combine, objective),
            progress_bar=False,
        )
        norms = trainer.run()["grad_norm"]
        return torch.cat([p.detach().reshape(-1) for p in objective.parameters]), norms

    def average(objective, gradients):
        """With those of the other half, as another process would have them."""
        other = -objective.flow().log_prob(100 * X[20:].double()).mean()
        theirs = torch.cat([g.reshape(-1) for g in torch.autograd.grad(other, objective.parameters)])
        gradients[0].add_(theirs).div_(2)

    full, norms = trained(slice(0, 40))
    halves, norms_of_halves = trained(slice(0, 20), average)
    alone, _ = trained(slice(0, 20))
    assert norms[0] > 10
    assert norms_of_halves == pytest.approx(norms)
    torch.testing.assert_close(halves, full)
    assert (alone - full).abs().max() > 1e-3


def test_a_layer_with_extra_state():
    """Which is whatever the layer makes it."""

    class Counting(Permutation):
        def __init__(self, permutation):
            super().__init__(permutation)
            self.count = [0]

        def get_extra_state(self):
            return self.count

        def set_extra_state(self, state):
            self.count = state

    flow = pf.Flow([Counting([1, 0]), pf.transforms.Planar(2)])
    trainer = pf.Trainer(ReverseKL(flow, lambda x: -(x**2).sum(-1)), Plateau("elbo", 5), progress_bar=False)
    state = trainer.state_dict()
    flow.transform.layers[0].count[0] = 1
    trainer.load_state_dict(state)
    assert flow.transform.layers[0].count == [0]

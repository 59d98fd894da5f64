"""An objective of a user's own, by public names alone."""

import pytest
import torch

import pyroflows as pf
from pyroflows.errors import OptionError


class EnergyDistance(pf.Objective):
    r"""The energy distance of draws of a flow and rows of data, :math:`2 E|x - y| - E|x - x'| - E|y - y'|`."""

    def __init__(self, flow, rows, batch_size=64):
        super().__init__(flow)
        self.rows = rows
        self.batch_size = batch_size

    def draw(self):
        index = torch.randint(len(self.rows), (self.batch_size,))
        return [self.noise(self.batch_size), self.rows[index]]

    def loss(self, noise, y):
        x, _ = self.flow().estimated().transport(self.base_draws(noise))
        pairs = self.batch_size * (self.batch_size - 1)
        # Away from zero, where the distance of a point to itself has no gradient.
        within = [torch.sqrt((a[:, None] - a).square().sum(-1) + 1e-12).sum() / pairs for a in (x, y)]
        return 2 * torch.cdist(x, y).mean() - sum(within), {"mean": x.mean()}


@pytest.mark.parametrize("base", [None, "student_t"])
@pytest.mark.parametrize("compile", ["auto", "none"])
def test_an_objective_of_a_user_s_own_trains_a_flow(compile, base):
    rows = torch.tensor([1.0, -2.0]) + torch.randn(1000, 2) * torch.tensor([0.5, 2.0])
    flow = pf.flows.IAF(2, num_layers=1, hidden_dims=(8,), base=base)
    history = pf.train(EnergyDistance(flow, rows), num_steps=600, compile=compile, seed=0, progress_bar=False)
    assert history.num_steps == 600 and set(history) == {"loss", "mean", "grad_norm", "learning_rate"}
    draws = flow().sample((4000,))
    torch.testing.assert_close(draws.quantile(0.5, 0), torch.tensor([1.0, -2.0]), rtol=0, atol=0.2)
    spread = draws.quantile(0.84, 0) - draws.quantile(0.16, 0)
    torch.testing.assert_close(spread, torch.tensor([1.0, 4.0]), rtol=0.2, atol=0)


def test_without_a_number_of_steps_it_ends_where_the_loss_has_stopped_falling():
    rows = torch.randn(1000, 2)
    history = pf.train(EnergyDistance(pf.flows.Gaussian(2), rows), seed=0, progress_bar=False)
    assert 500 < history.num_steps < 3000
    assert history["learning_rate"][-1] < 1e-4


def test_a_seed_makes_it_reproducible_and_leaves_the_global_generator_alone():
    rows, ends = torch.randn(100, 2), []
    before = torch.get_rng_state()
    for seed in (1, 1, 2):
        flow = pf.flows.Gaussian(2)
        pf.train(EnergyDistance(flow, rows), num_steps=20, seed=seed, progress_bar=False)
        ends.append(torch.cat([p.detach().reshape(-1) for p in flow.parameters()]))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    assert torch.equal(torch.get_rng_state(), before)


class Unrecorded(EnergyDistance):
    monitor = "kl"


class Unwritten(pf.Objective):
    pass


@pytest.mark.parametrize(
    ("objective", "options", "error", "message"),
    [
        (EnergyDistance, {"num_steps": 0}, OptionError, "num_steps must be positive, got 0"),
        (EnergyDistance, {"compile": "fast"}, OptionError, "compile must be one of"),
        (EnergyDistance, {"optimizer": "adam"}, OptionError, "optimizer must be a function"),
        (Unrecorded, {"num_steps": 5}, OptionError, r"Unrecorded monitors 'kl', but its loss records \['mean'\]"),
        (lambda flow, rows: flow, {}, OptionError, "train needs a pyroflows.Objective, got Gaussian"),
        (lambda flow, rows: Unwritten(flow), {"compile": "none"}, NotImplementedError, "Unwritten must define loss"),
    ],
)
def test_what_cannot_be_trained_is_refused(objective, options, error, message):
    with pytest.raises(error, match=message):
        pf.train(objective(pf.flows.Gaussian(2), torch.randn(10, 2)), progress_bar=False, **options)

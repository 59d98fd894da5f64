"""Maximum likelihood: what a fit reaches, what it keeps, and what it leaves alone."""

import copy
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.utils.data import Dataset, TensorDataset

import pyroflows as pf
from pyroflows.errors import DataError, DivergedError, OptionError
from pyroflows.fitting import density, maximum_likelihood
from pyroflows.randomness import seeded
from pyroflows.training.data import load
from pyroflows.training.shuffling import split
from pyroflows.transforms import Elementwise
from tests.transforms.registry import perturb

MAF = partial(pf.flows.MAF, num_layers=2, hidden_dims=(16,))
fit_quietly = partial(pf.fit_density, seed=0, progress_bar=False)
fit_briefly = partial(fit_quietly, max_epochs=3, batch_size=64)


def banana(n=1000, dtype=torch.float32):
    """Two columns of quite different units, the second bent by the first."""
    first, second = torch.randn(2, n, dtype=dtype)
    return torch.stack([1000 + 100 * first, 0.01 * (second + 1.5 * first**2)], -1)


def banana_log_prob(x):
    first = (x[:, 0] - 1000) / 100
    return dist.Normal(1000.0, 100.0).log_prob(x[:, 0]) + dist.Normal(0.01 * 1.5 * first**2, 0.01).log_prob(x[:, 1])


def adam(rate):
    return partial(torch.optim.Adam, lr=rate)


def held_out_log_prob(flow, x, context=None, seed=0):
    """Mean log-density of the rows that a fit with this seed set aside."""
    with seeded(seed), torch.no_grad():
        rows = load(flow, x, context).rows
        rows = rows[split(rows, 0.1)[1]]
        return flow(rows.context).log_prob(rows.x).mean().item()


def excess(flow, x, log_prob):
    """Mean of true minus fitted log-density over fresh rows: the Kullback-Leibler divergence."""
    with torch.no_grad():
        return (log_prob(x) - flow().log_prob(x)).mean().item()


def assert_same_state(flow, state):
    assert flow.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())


# What is learned


def test_gaussian_is_learned_to_its_entropy():
    """A fit of k parameters to n rows costs about k / 2n nats."""
    law = dist.MultivariateNormal(torch.tensor([100.0, -5.0]), torch.tensor([[400.0, 18.0], [18.0, 1.0]]))
    flow, x = pf.Flow([pf.transforms.Autoregressive(2, hidden_dims=(32,)).inv]), law.sample((4000,))
    fit = fit_quietly(flow, x, max_epochs=30, optimizer=adam(0.01))
    entropy = -law.entropy().item()
    # The log-density of a row has variance dim / 2 = 1.
    assert abs(fit.best_log_prob - entropy) < 4 / math.sqrt(400)
    assert 0 <= excess(flow, law.sample((4000,)), law.log_prob) < 0.01


def test_bent_data_are_learned():
    flow = MAF(2)
    before = banana(4000)
    fit_quietly(flow, before, max_epochs=25, optimizer=adam(0.01))
    assert -0.01 < excess(flow, banana(4000), banana_log_prob) < 0.05


def conditional_data(n):
    context = torch.randn(n, 2)
    scale = (0.3 * context[:, 1]).exp()
    return (2 * context[:, 0] + scale * torch.randn(n))[:, None], context


def test_context_is_used():
    flow = pf.flows.MAF(1, num_layers=1, hidden_dims=(32,), context_dim=2)
    fit_quietly(flow, *conditional_data(4000), max_epochs=40, optimizer=adam(0.01))
    x, context = conditional_data(4000)
    truth = dist.Normal(2 * context[:, 0], (0.3 * context[:, 1]).exp()).log_prob(x[:, 0])
    with torch.no_grad():
        assert -0.01 < (truth - flow(context).log_prob(x)).mean() < 0.03


def test_weights_count_as_repeated_rows():
    """Of a mixture that the weights tilt; the layer alone must learn it, location and scale being set before."""
    x = torch.cat([torch.randn(2000, 1) - 1, torch.randn(2000, 1) + 2])
    weights = torch.cat([torch.full((2000,), 9.0), torch.full((2000,), 1.0)])
    means = []
    for options in ({"weights": weights}, {"x": x.repeat_interleave(weights.long(), 0)}):
        flow = pf.Flow([Elementwise(1)])
        flow.adapt(x)
        with nullcontext() if "weights" in options else pytest.warns(UserWarning, match="rows repeat others"):
            fit_quietly(flow, **{"x": x, **options}, max_epochs=10, optimizer=adam(0.02))
        means.append(flow.transform(torch.zeros(1)).item())
    expected = (weights * x[:, 0]).sum() / weights.sum()  # about -0.7, and 0.5 without weights
    assert means == pytest.approx([expected.item()] * 2, abs=0.1)


def test_location_and_scale_are_those_of_the_weighted_training_rows():
    x, weights, flow = banana(300), torch.rand(300) ** 4, MAF(2)
    fit_briefly(flow, x, weights=weights)
    with seeded(0):
        rows = load(flow, x, weights=weights).rows
        rows = rows[split(rows, 0.1)[0]]
    expected = MAF(2)
    expected.adapt(rows.x, weights=rows.weights)
    assert_same_state(flow.transform.layers[-1], expected.transform.layers[-1].state_dict())


def test_only_ratios_of_weights_count():
    x, weights, flow = banana(300), torch.rand(300), MAF(2).double()
    scores = [fit_briefly(copy.deepcopy(flow), x, weights=scale * weights).best_log_prob for scale in (1.0, 1e4)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_the_score_is_the_weighted_mean_over_the_rows_held_out(monkeypatch):
    """In parts of few rows, as it is in parts of many."""
    monkeypatch.setattr(maximum_likelihood, "MAX_SCORED", 7)
    x, weights, flow = banana(300), torch.rand(300) ** 4, MAF(2)
    fit = fit_briefly(flow, x, weights=weights)
    with seeded(0), torch.no_grad():
        rows = load(flow, x, weights=weights).rows
        rows = rows[split(rows, 0.1)[1]]
        expected = (rows.weights * flow().log_prob(rows.x)).sum() / rows.weights.sum()
    assert fit.best_log_prob == pytest.approx(expected.item(), rel=1e-5)


def test_fewer_large_events_are_scored_at_once(monkeypatch):
    counts = []
    monkeypatch.setattr(maximum_likelihood, "MAX_SCORED_ELEMENTS", 64)
    flow = pf.Flow([Elementwise((2, 3, 4))])
    law = type(flow())
    log_prob = law.log_prob
    monkeypatch.setattr(law, "log_prob", lambda self, x: counts.append(len(x)) or log_prob(self, x))
    rows = load(flow, torch.randn(5, 2, 3, 4)).rows
    assert torch.allclose(maximum_likelihood.log_probs(flow, rows), log_prob(flow(), rows.x))
    assert counts == [2, 2, 1]


def test_rows_without_weight_are_as_if_they_were_not_there():
    x = banana(300)
    flow, other = MAF(2), MAF(2)
    other.load_state_dict(flow.state_dict())
    fit_briefly(flow, x)
    outliers = torch.full((50, 2), 1e12)
    fit_briefly(other, torch.cat([x, outliers]), weights=torch.cat([torch.ones(300), torch.zeros(50)]))
    assert_same_state(flow, other.state_dict())


# Units and supports


def test_units_change_the_density_and_nothing_else():
    x = banana(500, torch.float64)
    loc, scale = torch.tensor([[3.0, -1e3], [1e5, 1e-3]], dtype=torch.float64)
    flow = perturb(MAF(2).double(), 0.1)
    other = copy.deepcopy(flow)
    fits = fit_briefly(flow, x), fit_briefly(other, loc + scale * x)
    assert fits[0].best_log_prob == pytest.approx(fits[1].best_log_prob + scale.log().sum().item(), abs=1e-6)
    torch.testing.assert_close(flow().log_prob(x), other().log_prob(loc + scale * x) + scale.log().sum())


def test_fitted_density_of_raw_data_integrates_to_one():
    flow = MAF(2).double()
    x = banana(500, torch.float64)
    fit_briefly(flow, x)
    low, high = torch.tensor([0.0, -0.15]), torch.tensor([2000.0, 0.25])
    n = 400
    centers = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    grid = low + torch.stack(torch.meshgrid(centers, centers, indexing="ij"), -1) * (high - low)
    mass = flow().log_prob(grid).exp().mean() * (high - low).prod()
    assert mass.item() == pytest.approx(1.0, abs=1e-3)


def test_fit_with_a_support():
    """A log-normal and a logit-normal column, of which the fit knows the supports only."""
    support = constraints.cat([constraints.positive, constraints.interval(0.0, 10.0)], dim=-1)
    z = torch.randn(3000, 2) * torch.tensor([0.5, 2.0]) + torch.tensor([3.0, 1.0])
    x = torch.stack([z[:, 0].exp(), 10 * z[:, 1].sigmoid()], -1)
    flow = pf.Flow([Elementwise(2)], support=support)
    fit_quietly(flow, x, max_epochs=20)
    law = dist.TransformedDistribution(
        dist.Normal(torch.tensor([3.0, 1.0]), torch.tensor([0.5, 2.0])), [torch.distributions.biject_to(support)]
    )
    assert -0.001 < excess(flow, x, lambda x: law.log_prob(x).sum(-1)) < 0.005
    assert flow().support.check(flow().sample((1000,))).all()
    with pytest.raises(ValueError, match="support"):
        flow().log_prob(torch.tensor([-1.0, 5.0]))


class LearnedPoisson(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log_rate = torch.nn.Parameter(torch.zeros(2))

    def forward(self):
        return dist.Poisson(self.log_rate.exp()).to_event(1)


def test_counts_are_taken_as_they_are():
    """Location and scale of integers would make them another thing."""
    swap = pf.transforms.Permutation([1, 0])
    swap.codomain = constraints.independent(constraints.nonnegative_integer, 1)
    flow = pf.Flow([swap], base=LearnedPoisson())
    rates = torch.tensor([0.7, 4.0])
    x = torch.poisson(rates.expand(2000, 2))
    fit_quietly(flow, x, max_epochs=30, optimizer=adam(0.02))
    assert flow.standardization is None and not flow.adapts
    torch.testing.assert_close(flow.base.log_rate.exp().flip(0), x.mean(0), rtol=0.03, atol=0)
    assert flow().log_prob(torch.zeros(2)).item() == pytest.approx(-x.mean(0).sum().item(), rel=0.03)


def test_latent_codes_are_draws_of_the_base():
    flow = pf.Flow([Elementwise(2)], support=constraints.positive)
    x = torch.exp(torch.tensor([5.0, -2.0]) + torch.randn(4000, 2) * torch.tensor([0.1, 3.0]))
    fit_quietly(flow, x, max_epochs=20)
    z = flow().latent(x).detach()
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=0.1)
    torch.testing.assert_close(z.std(0), torch.ones(2), rtol=0, atol=0.1)
    torch.testing.assert_close(flow.transform(z), x, rtol=1e-4, atol=0)


def test_values_outside_the_support_are_refused():
    flow = pf.Flow([Elementwise(2)], support=constraints.positive)
    with pytest.raises(DataError, match=r"outside the support GreaterThan.* in row 7, column 1"):
        fit_briefly(flow, torch.ones(20, 2).index_put_((torch.tensor(7), torch.tensor(1)), torch.tensor(-1.0)))


# What is kept


def test_the_best_state_is_kept_and_not_the_last():
    """A large flow on few rows soon learns them by heart."""
    x = banana(100)
    flow = MAF(2, hidden_dims=(128, 128))
    fit = fit_quietly(flow, x, max_epochs=100, patience=50, optimizer=adam(0.01))
    curve = fit.history["validation_log_prob"]
    assert curve[fit.best_epoch :].min() < fit.best_log_prob - 0.05
    assert curve[-1] < fit.best_log_prob - 1e-3
    assert fit.best_log_prob == pytest.approx(curve.max())
    assert fit.best_epoch == 1 + curve.argmax() < fit.history.num_steps
    assert held_out_log_prob(flow, x) == pytest.approx(fit.best_log_prob, abs=1e-4)


@pytest.fixture
def kept(monkeypatch):
    """The state at each validation, by its score."""
    states = {}

    def scored(objective, rows):
        score = score_of(objective, rows)
        states[score] = copy.deepcopy(objective.flow.state_dict())
        return score

    score_of = density._mean_log_prob
    monkeypatch.setattr(density, "_mean_log_prob", scored)
    return states


class Broken(torch.optim.SGD):
    """Runs up to a step, where it does something else."""

    def __init__(self, parameters, act, at=20):
        super().__init__(parameters, lr=0.01)
        self.act, self.countdown = act, at

    def step(self):
        super().step()
        self.countdown -= 1
        if self.countdown <= 0:
            self.act(self.param_groups[0]["params"])


@torch.no_grad()
def _spoil(parameters):
    for parameter in parameters:
        parameter.fill_(math.nan)


def _interrupt(parameters):
    _spoil(parameters)
    raise KeyboardInterrupt


@pytest.mark.parametrize(("act", "error"), [(_spoil, DivergedError), (_interrupt, KeyboardInterrupt)])
def test_a_fit_that_fails_keeps_the_best_state(kept, act, error):
    flow = MAF(2)
    with pytest.raises(error):
        fit_quietly(flow, banana(500), batch_size=64, optimizer=partial(Broken, act=act))
    scores = [score for score in kept if math.isfinite(score)]
    assert len(scores) > 2
    assert max(scores) > scores[0]
    assert_same_state(flow, kept[max(scores)])


def test_a_density_that_is_never_finite_is_no_fit():
    base = dist.Uniform(torch.full((2,), -0.1), torch.full((2,), 0.1), validate_args=False).to_event(1)
    with pytest.raises(DivergedError, match="never had a finite mean log-density|non-finite"):
        fit_quietly(MAF(2, base=base), banana(100))


def test_a_second_fit_goes_on_from_the_first():
    x, flow = banana(), MAF(2)
    first = fit_quietly(flow, x, max_epochs=3)
    standardize = copy.deepcopy(flow.transform.layers[-1].state_dict())
    second = fit_quietly(flow, x + torch.tensor([300.0, 0.1]), max_epochs=1, optimizer=adam(1e-9))
    assert_same_state(flow.transform.layers[-1], standardize)
    third = fit_quietly(flow, x, max_epochs=3)
    # The same rows are held out, and the state before training counts.
    assert third.best_log_prob >= first.best_log_prob > second.best_log_prob


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        (lambda x: x + torch.tensor([2000.0, 0.0]), r"\[0\]"),
        (lambda x: x / 1000, r"\[0, 1\]"),
        (lambda x: torch.stack([x[:, 0], 1000 * x[:, 1]], 1), r"\[1\]"),
    ],
    ids=["location", "scale", "one column"],
)
@pytest.mark.parametrize("kind", ["flow", "mixture"])
def test_a_further_fit_to_data_of_another_scale_warns(kind, change, columns):
    flow = MAF(2) if kind == "flow" else pf.flows.Mixture([MAF(2), MAF(2)])
    x = banana(300)
    fit_briefly(flow, x)
    with pytest.warns(UserWarning, match=rf"columns {columns} of x are far from .*: call flow.adapt\(x\) before it"):
        fit_briefly(flow, change(x))
    flow.adapt(change(x))
    fit_briefly(flow, change(x))


def test_the_scale_of_bounded_data_is_that_before_the_map_onto_the_support():
    flow, x = MAF(2, support=constraints.positive), torch.randn(300, 2).exp()
    fit_briefly(flow, x)
    fit_briefly(flow, 100 * x)  # a shift of 4.6 standard deviations of the logarithm
    with pytest.warns(UserWarning, match=r"columns \[0, 1\] of x are far"):
        fit_briefly(flow, 1e6 * x)


def test_a_further_fit_with_contexts_of_another_scale_warns():
    flow = pf.flows.MAF(1, num_layers=1, hidden_dims=(8,), context_dim=2)
    x, context = conditional_data(300)
    fit_briefly(flow, x, context)
    with pytest.warns(UserWarning, match=r"columns \[1\] of context are far from .*: call flow.adapt\(x, context\)"):
        fit_briefly(flow, x, context * torch.tensor([1.0, 100.0]))
    fit_briefly(flow, x, context * torch.tensor([1.0, 0.0]))  # that of one group


def test_angles_have_no_scale_to_warn_of():
    support = constraints.cat([pf.constraints.circular, constraints.real], dim=-1)
    flow = pf.flows.CircularNSF(2, num_layers=1, hidden_dims=(8,), support=support)
    fit_briefly(flow, torch.randn(200, 2).clamp(-3, 3))
    fit_briefly(flow, torch.stack([0.001 * torch.randn(200), torch.randn(200)], 1))


def test_a_fitted_flow_loads_into_a_fresh_one():
    flow, fresh = MAF(2), MAF(2)
    x = banana(200)
    fit_briefly(flow, x)
    fresh.load_state_dict(flow.state_dict())
    torch.testing.assert_close(fresh().log_prob(x), flow().log_prob(x), rtol=0, atol=0)


def test_frozen_parameters_stay():
    flow = MAF(2)
    frozen = next(flow.parameters()).requires_grad_(False)
    before = frozen.clone()
    fit_briefly(flow, banana(200))
    assert torch.equal(frozen, before)


# Forms of data


class Items(Dataset):
    def __init__(self, x, context):
        self.x, self.context = x, context

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.context[i]


def test_one_seed_gives_one_fit_in_whatever_form_the_data_are():
    x, context = conditional_data(200)
    forms = [
        (x, context),
        (x.numpy(), context.double().numpy()),
        (TensorDataset(x, context),),
        (Items(x, context),),
    ]
    flow = pf.flows.MAF(1, num_layers=1, hidden_dims=(8,), context_dim=2)
    start, scores, states = copy.deepcopy(flow.state_dict()), [], []
    for form in forms:
        flow.load_state_dict(start)
        scores.append(fit_briefly(flow, *form).best_log_prob)
        states.append(copy.deepcopy(flow.state_dict()))
    assert len(set(scores)) == 1
    for state in states:
        assert_same_state(flow, state)


class Dequantised(Dataset):
    """Noise drawn afresh at each access."""

    num_reads = 0

    def __len__(self):
        return 200

    def __getitem__(self, i):
        self.num_reads += 1
        return torch.tensor([float(i % 3), float(i % 5)]) + torch.rand(2)


def test_a_dataset_that_draws_noise_is_reproducible():
    flow, other = MAF(2), MAF(2)
    other.load_state_dict(flow.state_dict())
    dataset = Dequantised()
    first, second = fit_briefly(flow, dataset), fit_briefly(other, Dequantised())
    assert first.best_log_prob == second.best_log_prob
    assert_same_state(flow, other.state_dict())
    # All once, then batches: of 180 training rows two of 64 an epoch.
    assert dataset.num_reads == 200 + 3 * 2 * 64


def test_float64():
    flow = MAF(2).double()
    fit_briefly(flow, banana(200).numpy())
    assert {value.dtype for value in flow.state_dict().values() if value.is_floating_point()} == {torch.float64}
    assert flow().log_prob(banana(5, torch.float64)).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:all layers of this MAF are affine maps of one variable")
@pytest.mark.parametrize("dim", [1, 5])
def test_other_sizes(dim):
    fit = fit_briefly(MAF(dim), torch.randn(100, dim))
    assert fit.history.num_steps == 3


@pytest.mark.parametrize("base", ["student_t", dist.Laplace(torch.zeros(2), torch.ones(2)).to_event(1)], ids=str)
def test_other_bases(base):
    flow = MAF(2, base=base)
    fit = fit_briefly(flow, banana(200))
    assert held_out_log_prob(flow, banana(200)) != fit.best_log_prob  # other rows
    assert math.isfinite(fit.best_log_prob)


# Randomness


def run(seed):
    """A brief fit of a fixed start; the state it ends in."""
    torch.manual_seed(5)
    flow, x = MAF(2), banana(200)
    torch.manual_seed(7)
    pf.fit_density(flow, x, max_epochs=2, seed=seed, progress_bar=False)
    return flow


def test_a_seed_makes_a_fit_reproducible_and_leaves_the_global_generator_alone():
    flow = run(seed=1)
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))
    assert_same_state(run(seed=1), flow.state_dict())
    with pytest.raises(AssertionError):
        assert_same_state(run(seed=2), flow.state_dict())


def test_pyro_set_rng_seed_and_a_seed_make_flow_and_fit_reproducible():
    """As docs/density.md says: the one before the flow is made, the other in the fit."""
    x, states = banana(200), []
    for noise in (1, 2):
        torch.rand(noise)
        pyro.set_rng_seed(3)
        flow = MAF(2, mixing="lu", base="student_t")
        torch.rand(noise)
        fit = fit_briefly(flow, x, seed=0)
        states.append((flow, fit.best_log_prob))
    assert_same_state(states[0][0], states[1][0].state_dict())
    assert states[0][1] == states[1][1]


def test_without_a_seed_the_global_generator_counts():
    flow = run(seed=None)
    after = torch.rand(3)
    assert_same_state(run(seed=None), flow.state_dict())
    torch.manual_seed(7)
    assert not torch.equal(after, torch.rand(3))


def test_argument_validation_is_as_before():
    fit_briefly(MAF(2), banana(200))
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -1.0)


# The result


@pytest.fixture(scope="module")
def fit():
    torch.manual_seed(0)
    return fit_quietly(MAF(2), banana(500), max_epochs=12, batch_size=64)


def test_history_has_a_number_an_epoch(fit):
    assert set(fit.history) == {"log_prob", "validation_log_prob", "grad_norm", "learning_rate"}
    assert {len(values) for values in fit.history.values()} == {12}
    assert all(np.isfinite(values).all() for values in fit.history.values())
    assert fit.history["learning_rate"].max() == pytest.approx(density.LEARNING_RATE)
    assert fit.history["learning_rate"][-1] < 0.2 * density.LEARNING_RATE
    assert fit.history["log_prob"][-1] > fit.history["log_prob"][0]


def test_repr(fit):
    assert repr(fit).splitlines()[:2] == [
        f"DensityFit(12 epochs, all of max_epochs; best validation log-density {fit.best_log_prob:.4g} nats a row, "
        f"after epoch {fit.best_epoch};",
        f"a Gaussian has {fit.gaussian_log_prob:.4g})",
    ]
    short = fit_quietly(MAF(2), torch.randn(300, 2), max_epochs=1)
    assert repr(short).startswith("DensityFit(1 epoch, all of") and repr(short.history).startswith("History(1 epoch:")
    stopped = fit_quietly(MAF(2), torch.randn(300, 2), patience=1)
    assert stopped.stopped_early
    assert repr(stopped).startswith(f"DensityFit({stopped.history.num_steps} epochs, stopped early; best")


def test_a_fit_says_that_max_epochs_ended_it_while_it_improved_and_can_go_on():
    flow, x = MAF(2), banana(500)
    fit = fit_quietly(flow, x, max_epochs=6, batch_size=64)
    assert fit.still_improving and not fit.stopped_early
    assert " ".join(repr(fit).split()).endswith("call fit_density again with the same seed to go on from here.")
    further = fit_quietly(flow, x, max_epochs=6, batch_size=64)
    # Both have validated with the rows that the seed sets aside.
    assert held_out_log_prob(flow, x) == pytest.approx(further.best_log_prob, abs=1e-5)
    assert further.best_log_prob > fit.best_log_prob
    long = fit_quietly(MAF(2), torch.randn(300, 2), max_epochs=60, patience=60)
    assert not (long.still_improving or long.stopped_early)
    assert "still growing" not in repr(long)


def test_progress_bar_shows_both_curves(capfd):
    pf.fit_density(MAF(2), banana(200), max_epochs=2, seed=0)
    shown = capfd.readouterr().err
    assert "epoch=2, log_prob=-" in shown
    assert ", validation_log_prob=-" in shown
    fit_briefly(MAF(2), banana(200))
    assert capfd.readouterr() == ("", "")


def test_plot(fit):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = fit.plot()
    assert len(figure.axes[0].get_lines()[0].get_xdata()) == 12


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.0}, "validation must be a fraction of the rows, between 0 and 1, got 0.0"),
        ({"validation": 1.0}, "between 0 and 1, got 1.0"),
        ({"validation": 50}, "between 0 and 1, got 50"),
        ({"validation": math.nan}, "between 0 and 1, got nan"),
        ({"validation": None}, "between 0 and 1, got None"),
        ({"validation": "0.1"}, "between 0 and 1, got str"),
        ({"validation": torch.zeros(5, 2)}, "between 0 and 1, got Tensor"),
        ({"seed": "a"}, "seed must be None or an integer that fits into 64 bits, got 'a'"),
        ({"seed": 1.5}, "seed must be None or an integer that fits into 64 bits, got 1.5"),
        ({"seed": 2**64}, "seed must be None or an integer that fits into 64 bits"),
        ({"seed": torch.zeros(5)}, "64 bits, got Tensor"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_epochs": 0}, "max_epochs must be at least 1, got 0"),
        ({"patience": -1}, "patience must be at least 1, got -1"),
        ({"optimizer": "adam"}, "optimizer must be a function"),
        ({"compile": True}, "compile must be one of .*'none'.*, got True"),
        ({"flow": None}, "fits a pyroflows.Flow, got NoneType"),
        ({"flow": Elementwise(2)}, "fits a pyroflows.Flow, got Elementwise"),
        ({"flow": pf.Flow([pf.transforms.Permutation([1, 0])])}, "no parameters to train"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        fit_quietly(**{"flow": MAF(2), "x": banana(100), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": torch.zeros(50, 3)}, "x has 3 columns"),
        ({"x": torch.full((50, 2), math.nan)}, "x has NaN"),
        ({"context": torch.zeros(50, 3)}, "takes no context"),
        ({"weights": torch.zeros(50)}, "of 0 rows with a weight"),
        ({"x": torch.zeros(50, 2)}, r"columns \[0, 1\] of x are constant"),
        ({"x": torch.zeros(1, 2)}, "x has 1 row"),
        ({"x": torch.randn(5, 2)}, "leaves 5 to train on and 0 to validate with"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_data_that_cannot_be_used_leave_the_flow_alone(options, message):
    flow = MAF(2)
    before = copy.deepcopy(flow.state_dict())
    with pytest.raises((pf.DataError, pf.ShapeError), match=message):
        fit_quietly(flow, **{"x": banana(50), **options})
    assert_same_state(flow, before)


@pytest.mark.parametrize(("num_rows", "size"), [(20, 18), (100, 32), (500, 56), (3000, 256)])
def test_batches_of_small_data_are_small(monkeypatch, num_rows, size):
    sizes = []

    class Recorded(density.MaximumLikelihood):
        def __init__(self, flow, data, index, batch_size):
            super().__init__(flow, data, index, batch_size)
            sizes.append(batch_size)

    monkeypatch.setattr(density, "MaximumLikelihood", Recorded)
    fit_quietly(MAF(2), banana(num_rows), max_epochs=1)
    assert sizes == [size]


def test_the_default_optimizer_has_a_prior_that_fades_as_rows_are_added(monkeypatch):
    decays = []

    def recorded(parameters, **options):
        decays.append(options["weight_decay"])
        return torch.optim.SGD(parameters, lr=0.0)

    monkeypatch.setattr(torch.optim, "Adam", recorded)
    for num_rows in (100, 1000):
        fit_quietly(MAF(2), banana(num_rows), max_epochs=1)
    assert decays == pytest.approx([3 / 90, 3 / 900])


def test_the_prior_costs_a_gaussian_less_than_its_sampling_error():
    """The maximum of the likelihood over n rows is above the expected one by about k / 2n nats, for k parameters."""
    x = torch.randn(200, 3) @ torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.3, 1.0], [0.0, 0.0, 0.2]])
    flow = pf.flows.Gaussian(3)
    fit_quietly(flow, x, patience=100)
    with seeded(0):
        training = split(load(flow, x).rows, 0.1)[0]
    law = dist.MultivariateNormal(x[training].mean(0), x[training].T.cov(correction=0))
    with torch.no_grad():
        assert (law.log_prob(x) - flow().log_prob(x)).mean() < 9 / (2 * 180)


def test_compilation_that_does_not_pay_is_said():
    x = banana(100)
    with pytest.warns(UserWarning, match=r"compile='trace' pays from about 200 steps on, but this fit has at most 3:"):
        fit_briefly(MAF(2), x, compile="trace")


def test_batches_larger_than_the_data_are_all_of_it():
    assert fit_quietly(MAF(2), banana(40), batch_size=10_000, max_epochs=2).history.num_steps == 2


# Compiled


@pytest.mark.parametrize(
    "mode",
    [
        "auto",
        "trace",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
            ],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:compile=.* pays from about")
@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_compiled_fit_is_that_of_eager_execution(mode, context_dim):
    """It sees the same batches, also where their contexts and weights differ from row to row."""
    x, weights, context = banana(300), torch.rand(300), torch.randn(300, 2) if context_dim else None
    flow = pf.flows.MAF(2, num_layers=1, hidden_dims=(8,), context_dim=context_dim, base="student_t")
    start = copy.deepcopy(flow.state_dict())
    histories = []
    for compile in ("none", mode):
        flow.load_state_dict(start)
        histories.append(fit_briefly(flow, x, context, weights, compile=compile).history)
    for name, values in histories[0].items():
        assert histories[1][name] == pytest.approx(values, rel=1e-3), name


class NotANumber:
    """A univariate map whose log-derivative is NaN."""

    num_params = 1

    def forward_and_ladj(self, z, theta):
        return z, (theta[..., 0] * math.nan).expand_as(z)

    inverse_and_ladj = forward_and_ladj


def test_a_fit_that_diverges_says_what_helps_a_density():
    flow = pf.Flow([Elementwise(2, NotANumber())])
    with pytest.raises(DivergedError, match="Try a smaller learning rate or float64, and look for outliers in x"):
        pf.fit_density(flow, torch.randn(300, 2), max_epochs=50, seed=0, progress_bar=False)

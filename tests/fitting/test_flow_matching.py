"""Flow matching: what the regression learns, how draws and rows are paired, and what a fit keeps and refuses."""

import copy
import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.utils.data import Dataset

import pyroflows as pf
from pyroflows.errors import DivergedError, OptionError
from pyroflows.fitting import flow_matching, velocity_regression
from pyroflows.fitting.coupling import independent, optimal_transport
from pyroflows.fitting.velocity_regression import VelocityRegression, stratified_times
from pyroflows.randomness import seeded
from pyroflows.training.averaging import MovingAverage
from pyroflows.training.data import load
from pyroflows.training.shuffling import resampled, split
from pyroflows.transforms import Continuous, Elementwise, Planar

CNF = partial(pf.flows.CNF, hidden_dims=(32, 32))
fit_quietly = partial(pf.fit_flow_matching, seed=0, progress_bar=False, batch_size=128)
fit_briefly = partial(fit_quietly, max_epochs=3)


def banana(n=1000, dtype=torch.float32):
    """Two columns of quite different units, the second bent by the first."""
    first, second = torch.randn(2, n, dtype=dtype)
    return torch.stack([1000 + 100 * first, 0.01 * (second + 1.5 * first**2)], -1)


def banana_log_prob(x):
    first = (x[:, 0] - 1000) / 100
    return dist.Normal(1000.0, 100.0).log_prob(x[:, 0]) + dist.Normal(0.01 * 1.5 * first**2, 0.01).log_prob(x[:, 1])


def assert_same_state(flow, other):
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in flow.state_dict().items())


# What is learned


def test_the_velocity_of_gaussians_has_its_closed_form():
    """Of z0 ~ N(0, 1) and z1 ~ N(m, s^2), E[z1 - z0 | z_t] is linear in z_t, by the covariance of the two."""
    loc, scale = 1.0, 0.5
    flow = pf.Flow([Continuous(1, (32, 32))], standardize=False)
    fit_quietly(flow, loc + scale * torch.randn(10_000, 1), max_epochs=10)
    t, z = (
        axis.flatten() for axis in torch.meshgrid(torch.linspace(0, 1, 11), torch.linspace(-1, 1, 9), indexing="ij")
    )
    spread = ((1 - t) ** 2 + (t * scale) ** 2).sqrt()
    z = t * loc + 1.5 * spread * z
    expected = loc + (t * scale**2 - (1 - t)) / spread**2 * (z - t * loc)
    with torch.no_grad():
        found = flow.transform.layers[0].net.at(None)(t, z[:, None])[:, 0]
    assert (found - expected).square().mean().sqrt() < 0.1


def test_bent_data_are_learned():
    flow, x = CNF(2), banana(4000)
    fit = fit_quietly(flow, banana(4000), max_epochs=25)
    with torch.no_grad():
        assert -0.02 < (banana_log_prob(x) - flow().log_prob(x)).mean() < 0.08
    assert fit.best_log_prob > fit.gaussian_log_prob


def test_context_is_used():
    def draw(n):
        context = torch.randn(n, 2) * torch.tensor([1.0, 50.0])
        scale = (0.006 * context[:, 1]).exp()
        return (2 * context[:, 0] + scale * torch.randn(n))[:, None], context, scale

    flow = CNF(1, context_dim=2)
    fit_quietly(flow, *draw(4000)[:2], max_epochs=25)
    x, context, scale = draw(4000)
    with torch.no_grad():
        truth = dist.Normal(2 * context[:, 0], scale).log_prob(x[:, 0])
        assert -0.02 < (truth - flow(context).log_prob(x)).mean() < 0.08


def test_the_fitted_flow_is_a_flow_like_others():
    flow, x = CNF(2), banana(500, torch.float32)
    fit_briefly(flow, x)
    x = x[:5].requires_grad_()
    log_prob = flow().log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x, retain_graph=True)
    assert gradient.isfinite().all()
    assert all(p.grad is None for p in flow.parameters())
    drawn, log_q = flow().rsample_and_log_prob((7,))
    torch.testing.assert_close(flow().log_prob(drawn), log_q, atol=1e-3, rtol=1e-3)
    assert flow().latent(x).shape == (5, 2)


def test_weights_count_as_repeated_rows():
    x = torch.cat([torch.randn(2000, 1) - 1, torch.randn(2000, 1) + 2])
    weights = torch.cat([torch.full((2000,), 9.0), torch.full((2000,), 1.0)])
    flow = CNF(1)
    flow.adapt(x)  # location and scale without the weights, which the layer alone must learn
    fit_quietly(flow, x, weights=weights, max_epochs=10)
    expected = (weights * x[:, 0]).sum() / weights.sum()  # about -0.7, and 0.5 without weights
    assert flow().sample((4000,)).mean() == pytest.approx(expected.item(), abs=0.15)


def test_rows_without_weight_are_as_if_they_were_not_there():
    x = banana(300)
    flow, other = CNF(2), CNF(2)
    other.load_state_dict(flow.state_dict())
    fit_briefly(flow, x)
    fit_briefly(other, torch.cat([x, torch.full((50, 2), 1e12)]), weights=torch.tensor([1.0] * 300 + [0.0] * 50))
    assert_same_state(flow, other)


def test_bounded_data_and_units():
    support = constraints.cat([constraints.positive, constraints.interval(0.0, 10.0)], dim=-1)
    z = torch.randn(3000, 2) * torch.tensor([0.5, 2.0]) + torch.tensor([3.0, 1.0])
    x = torch.stack([z[:, 0].exp(), 10 * z[:, 1].sigmoid()], -1)
    flow = CNF(2, support=support)
    fit_quietly(flow, x, max_epochs=15)
    law = dist.TransformedDistribution(
        dist.Normal(torch.tensor([3.0, 1.0]), torch.tensor([0.5, 2.0])), [torch.distributions.biject_to(support)]
    )
    with torch.no_grad():
        assert -0.01 < (law.log_prob(x).sum(-1) - flow().log_prob(x)).mean() < 0.04
    assert support.check(flow().sample((100,))).all()


def test_other_bases_and_layers_without_parameters():
    """Draws come from the base that the flow has, and pass through the layers before the continuous one."""
    base = dist.Uniform(torch.zeros(2), torch.tensor([1.0, 10.0])).to_event(1)
    flow = pf.Flow([pf.transforms.Permutation([1, 0]), Continuous(2)], base=base)
    x = torch.randn(200, 2)
    objective = VelocityRegression(flow, load(flow, x), torch.arange(200), 200)
    z0, z1, t = objective.draw()
    assert z0[:, 0].max() > 5
    assert z0[:, 1].max() <= 1
    assert t.shape == (200,)
    assert torch.equal(z1.sort(0)[0], x.sort(0)[0])


def test_integers_with_uniform_noise():
    flow = CNF(2, support=constraints.interval(0.0, 8.0))
    x = torch.randint(8, (400, 2))
    fit = fit_briefly(flow, x, dequantization="uniform")
    assert fit.best_log_prob == pytest.approx(-2 * math.log(8), abs=0.5)


def test_images_and_networks_of_your_own():
    flow = pf.Flow([Continuous((1, 4, 4), (8, 8), context_dim=2)])
    fit = fit_briefly(flow, torch.randn(200, 1, 4, 4), torch.randn(200, 2), max_epochs=1)
    assert math.isfinite(fit.best_log_prob)
    assert flow(torch.zeros(2)).sample((3,)).shape == (3, 1, 4, 4)

    class Own(torch.nn.Module):
        def __init__(self, dim, hidden_dims, context_dim):
            super().__init__()
            self.linear = torch.nn.Linear(dim + 1, dim)

        def forward(self, t, z, context):
            return self.linear(torch.cat([t[:, None], z], -1))

    fit = fit_quietly(pf.Flow([Continuous(2, net=Own)]), banana(1000), max_epochs=10)
    assert fit.best_log_prob == pytest.approx(fit.gaussian_log_prob, abs=0.6)


class Noisy(Dataset):
    def __len__(self):
        return 200

    def __getitem__(self, i):
        return torch.randn(2) + i / 100


def test_items_of_a_dataset_are_read_anew():
    flow = CNF(2)
    data = load(flow, Noisy())
    objective = VelocityRegression(flow, data, torch.arange(200), 200)
    assert not torch.isin(objective.draw()[1], data.rows.x).any()


# Pairs and times


def test_optimal_transport_has_the_least_cost():
    z0, z1 = torch.randn(64, 3), 2 * torch.randn(64, 3) + 1
    paired = optimal_transport(z0, z1)
    assert torch.equal(paired.sort(0)[0], z0.sort(0)[0])  # the same draws
    assert torch.equal(independent(z0, z1), z0)

    def cost(z0):
        return (z0 - z1).square().sum()

    assert cost(paired) < 0.8 * cost(z0)
    for _ in range(200):  # no exchange of two draws makes it less
        exchanged = torch.arange(64)
        i, j = torch.randperm(64)[:2].tolist()
        exchanged[i], exchanged[j] = j, i
        other = paired[exchanged]
        assert cost(other) >= cost(paired) - 1e-4


def test_in_one_dimension_optimal_pairs_are_sorted():
    z0, z1 = torch.randn(2, 50, 1)
    paired = optimal_transport(z0, z1)
    assert torch.equal(paired[z1[:, 0].argsort()], z0.sort(0)[0])


def test_optimal_pairs_keep_their_contexts():
    z0, z1 = torch.randn(2, 60, 1)
    context = torch.arange(60)[:, None] % 3
    paired = optimal_transport(z0, z1, context.float())
    for c in range(3):
        rows = context[:, 0] == c
        assert torch.equal(paired[rows], optimal_transport(z0[rows], z1[rows]))
    continuous = torch.randn(60, 2)
    assert torch.equal(optimal_transport(z0, z1, continuous), z0)


def test_pairs_of_optimal_transport_have_a_smaller_loss():
    """Of one Gaussian to another, the velocity is then nearly known from the place."""
    fits = [
        fit_quietly(CNF(1), torch.randn(1000, 1), max_epochs=8, coupling=c)
        for c in ("independent", "optimal_transport")
    ]
    assert fits[1].best_loss < 0.2 * fits[0].best_loss


@pytest.mark.parametrize("power", [0.0, 1.0, -0.5])
def test_times_follow_the_power_law(power):
    t = stratified_times(1000, power)
    place = 1000 * t.double().sort()[0] ** (1 + power) - torch.arange(1000)  # uniform, and one in each thousandth
    assert place.min() > -0.01
    assert place.max() < 1.01
    assert t.mean() == pytest.approx((1 + power) / (2 + power), abs=2e-3)
    assert not torch.equal(t, t.sort()[0])


def test_resampled_rows_come_as_often_as_their_weights_say():
    index = torch.arange(10) + 5
    weights = torch.tensor([0.0, 1, 2, 3, 4, 0, 0, 0, 0, 0])
    counts = resampled(index, weights).bincount(minlength=15)[5:]
    assert counts.tolist() == weights.tolist()
    assert torch.equal(resampled(index, torch.full((10,), 0.1)), index)


# What a fit keeps


def test_the_average_over_steps():
    x = torch.zeros(3)
    average = MovingAverage([x], 0.8)
    expected = 0.0
    for k in range(1, 50):  # the decay is 0.8 from the 36th step on
        x.fill_(float(k))
        average.update()
        decay = min(0.8, k / (k + 9))
        expected = decay * expected + (1 - decay) * k
        torch.testing.assert_close(average.values[0], torch.full((3,), expected))
    state = copy.deepcopy(average.state_dict())
    other = MovingAverage([x], 0.8)
    other.load_state_dict(state)
    x += 1
    average.update()
    other.update()
    assert torch.equal(average.values[0], other.values[0])


def test_the_flow_holds_the_average():
    """With a decay near 1, the parameters are those of a short past instead of the last step's."""
    flows = [CNF(2) for _ in range(2)]
    flows[1].load_state_dict(flows[0].state_dict())
    for flow, average in zip(flows, (0.0, 0.999), strict=True):
        fit_briefly(flow, banana(300), average=average)
    assert not torch.equal(*(flow.transform.layers[0].net.linear[0].weight for flow in flows))


def test_the_best_loss_is_that_of_the_flow():
    flow, x, seed = CNF(2), banana(500), 3
    fit = fit_briefly(flow, x, seed=seed)
    assert fit.best_loss == pytest.approx(fit.history["validation_loss"].min())
    with seeded(seed), torch.no_grad():
        rows = load(flow, x).rows
        rows = rows[split(rows, 0.1)[1]]
        assert fit.best_log_prob == pytest.approx(flow().log_prob(rows.x).mean().item(), abs=1e-4)


def test_the_validation_loss_weighs_rows():
    flow = CNF(1)
    x, weights = torch.randn(200, 1), torch.rand(200)
    data = load(flow, x, weights=weights)
    score = VelocityRegression(flow, data, torch.arange(100), 10).score(data.rows[100:])
    # An untrained velocity is zero, so that the loss is the mean of |z1 - z0|^2.
    errors = torch.cat([(z1 - z0).square()[:, 0] for z0, z1, _ in score._parts])
    weights = weights[100:].repeat(len(errors) // 100)
    assert score() == pytest.approx((weights * errors).sum().item() / weights.sum().item(), rel=1e-4)


class Broken(torch.optim.SGD):
    """After 40 steps that train, an optimizer that acts."""

    def __init__(self, parameters, act):
        super().__init__(parameters, lr=0.05)
        self.act, self.count = act, 0

    def step(self, closure=None):
        self.count += 1
        if self.count > 40:
            self.act(self.param_groups[0]["params"])
        return super().step()


def _spoil(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(math.nan)


def _interrupt(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(7.0)
    raise KeyboardInterrupt


@pytest.mark.parametrize(("act", "error"), [(_spoil, DivergedError), (_interrupt, KeyboardInterrupt)])
def test_a_fit_that_fails_keeps_the_best_state(monkeypatch, act, error):
    kept, score = {}, velocity_regression.HeldOut.__call__

    def noted(self):
        value = score(self)
        kept[value] = [average.clone() for average in self._objective.average.values]
        return value

    monkeypatch.setattr(velocity_regression.HeldOut, "__call__", noted)
    flow = CNF(2)
    with pytest.raises(error):
        fit_quietly(flow, banana(500), optimizer=partial(Broken, act=act))
    best = min(value for value in kept if math.isfinite(value))
    for parameter, value in zip(flow.transform.layers[0].parameters(), kept[best], strict=True):
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("compile", ["none", "trace"])
def test_a_seed_makes_the_fit_reproducible(compile):
    flow, other = CNF(2), CNF(2)
    other.load_state_dict(flow.state_dict())
    x = banana(300)
    state = torch.get_rng_state()
    options = {"max_epochs": 26, "compile": compile, "coupling": "optimal_transport"}
    fits = [fit_quietly(f, x, **options) for f in (flow, other)]
    assert torch.equal(torch.get_rng_state(), state)
    assert fits[0].best_loss == fits[1].best_loss
    assert_same_state(flow, other)


def test_a_recorded_fit_is_that_of_eager_steps():
    flow, other = CNF(2, context_dim=1).double(), CNF(2, context_dim=1).double()
    other.load_state_dict(flow.state_dict())
    x, context = banana(300, torch.float64), torch.randn(300, 1)
    losses = [
        fit_quietly(f, x, context, max_epochs=26, compile=compile).best_loss
        for f, compile in ((flow, "none"), (other, "trace"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_frozen_parts_and_the_base_stay_as_they_are():
    flow = pf.Flow([Continuous(2, (8, 8)), Elementwise(2)], base="student_t")
    flow.transform.layers[1].requires_grad_(False)
    before = copy.deepcopy(flow)
    fit_briefly(flow, banana(300))
    assert_same_state(flow.base, before.base)
    for name, value in flow.transform.layers[1].state_dict().items():
        assert torch.equal(value, before.transform.layers[1].state_dict()[name])


def test_what_is_returned_prints_itself_and_plots():
    pytest.importorskip("matplotlib")
    fit = fit_briefly(CNF(2), banana(300))
    assert "MatchingFit(3 epochs, all of max_epochs; best validation loss" in repr(fit)
    assert "still falling" in repr(fit)
    (axis,) = fit.plot().axes
    assert axis.get_ylabel() == "mean squared error of the velocity"


# What is refused


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        (lambda: pf.flows.MAF(2), "has none"),
        (lambda: pf.Flow([Continuous(2), Continuous(2)]), "has several"),
        (lambda: pf.Flow([Continuous(2), Planar(2)]), "Planar .transform.layers.1 of this flow"),
        (lambda: pf.flows.Mixture([pf.flows.CNF(2), pf.flows.CNF(2)]), "not a mixture"),
        (lambda: dist.Normal(0.0, 1.0), "fits a pyroflows.Flow, got"),
    ],
)
def test_flows_that_are_refused(flow, message):
    with pytest.raises(OptionError, match=message):
        fit_briefly(flow(), banana(100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "ot"}, "coupling must be one of"),
        ({"time_power": -1.0}, "time_power must be a number above -1"),
        ({"average": 1.0}, "average must be a number above 0 and below 1"),
        ({"dequantization": pf.flows.Dequantizer(2)}, "no likelihood by which noise could be learned"),
        ({"validation": 0.0}, "validation must be"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        fit_quietly(CNF(2), banana(100), **options)


def test_a_frozen_layer_is_refused():
    with pytest.raises(OptionError, match="has no parameters to train"):
        pf.fit_flow_matching(pf.flows.CNF(2).requires_grad_(False), torch.randn(50, 2), progress_bar=False)


def test_few_rows_are_scored_where_the_trace_is_dear(monkeypatch):
    monkeypatch.setattr(flow_matching, "MAX_PRODUCTS", 2 * 9**2)
    x = torch.randn(60, 1, 3, 3)
    scored = []
    monkeypatch.setattr(
        flow_matching, "log_probs", lambda flow, rows: scored.append(len(rows)) or torch.zeros(len(rows))
    )
    options = {"max_epochs": 1, "validation": 0.2, "seed": 0, "progress_bar": False}
    pf.fit_flow_matching(pf.flows.CNF((1, 3, 3), (4,)), x, **options)
    assert scored == [2]
    monkeypatch.setattr(flow_matching, "MAX_PRODUCTS", 1)
    fit = pf.fit_flow_matching(pf.flows.CNF((1, 3, 3), (4,)), x, **options)
    assert "validation log-density not computed" in repr(fit)

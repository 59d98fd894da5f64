"""Densities of integers: the bound that fits maximise, what tightens it, and that nothing else changes."""

import copy
import math
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch.distributions import Normal, constraints

import pyroflows as pf
from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.fitting import density
from pyroflows.fitting.dequantization import VariationalDequantization, adapt_noise, log_weights
from pyroflows.randomness import seeded
from pyroflows.training.data import load
from pyroflows.training.shuffling import split
from pyroflows.transforms import Coupling, Elementwise, Standardize, masks
from tests.transforms.registry import perturb

NSF = partial(pf.flows.NSF, num_layers=2, hidden_dims=(16,))
Noise = partial(pf.flows.Dequantizer, num_layers=2, hidden_dims=(16,))
SUPPORTED = partial(pf.Flow, support=constraints.unit_interval)
fit_quietly = partial(pf.fit_density, seed=0, progress_bar=False)
fit_briefly = partial(fit_quietly, max_epochs=3, batch_size=64)


def counts(n=1000, seed=0):
    """Two columns of counts, the second of which grows with the first."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.poisson(torch.full((n,), 4.0), generator=generator)
    return torch.stack([first, torch.poisson(1.0 + first, generator=generator)], 1).long()


def entropy_of_counts():
    """In nats a row."""
    k = torch.arange(60.0, dtype=torch.float64)
    law = torch.distributions.Poisson(torch.tensor(4.0, dtype=torch.float64)).log_prob(k)
    given = torch.distributions.Poisson(1.0 + k[:, None]).log_prob(k)
    joint = law[:, None] + given
    return -(joint.exp() * joint).sum().item()


def image_flow(shape, context_dim=0, num_layers=4):
    board = masks.checkerboard(*shape[1:])
    layers = [
        Coupling(shape, mask=mask, conditioner="conv", hidden_dims=(16, 16), context_dim=context_dim)
        for mask in [board, ~board] * (num_layers // 2)
    ]
    return pf.Flow(layers)


# The bound


@pytest.mark.parametrize("is_learned", [False, True])
def test_weights_are_unbiased_estimates_of_the_probability(is_learned):
    """A normal law has P(x) = F(x + 1) - F(x)."""
    loc, scale = torch.tensor([3.0, 2.0]).double(), torch.tensor([0.6, 2.0]).double()
    flow, x = (
        pf.Flow([Standardize(2, loc, scale)]).double(),
        torch.tensor([[3.0, 2.0], [2.0, 0.0], [4.0, 5.0]]).double(),
    )
    torch.manual_seed(0)
    noise = perturb(Noise(2).double(), 0.2) if is_learned else None
    weights = log_weights(flow, noise, x, None, num_samples=40_000).detach().exp()
    law = Normal(loc, scale)
    exact = (law.cdf(x + 1) - law.cdf(x)).prod(1)
    assert ((weights.mean(0) - exact).abs() < 4 * weights.std(0) / 200).all()


def test_learned_noise_closes_the_gap_of_uniform_noise():
    """The density is known and stays as it is, so that the gap between the bound and log P(x) is known too."""
    loc, scale = torch.tensor([4.3, 2.6]), torch.tensor([0.35, 0.35])
    flow = pf.Flow([Standardize(2, loc, scale)]).requires_grad_(False)
    law = Normal(loc, scale)
    x = law.sample((600,)).floor()
    exact = (law.cdf(x + 1) - law.cdf(x)).log().sum(1).mean().item()
    data, noise = load(flow, x, are_integers=True), pf.flows.Dequantizer(2)
    adapt_noise(noise, data.rows)
    objective = VariationalDequantization(flow, noise, data, torch.arange(600), batch_size=200)
    before = objective.log_prob(data.rows).mean().item()
    pf.train(objective, num_steps=300, seed=0, progress_bar=False)
    after = objective.log_prob(data.rows).mean().item()
    assert before < exact - 0.6  # near that of uniform noise
    assert exact - 0.05 < after < exact + 0.02


def test_uniform_noise_needs_no_learning_where_the_density_is_flat():
    flow = pf.Flow([Standardize(2, torch.zeros(2), torch.full((2,), 300.0))]).requires_grad_(False)
    data, noise = load(flow, torch.randint(-50, 50, (300, 2)), are_integers=True), Noise(2)
    adapt_noise(noise, data.rows)
    objective = VariationalDequantization(flow, noise, data, torch.arange(300), batch_size=100)
    with torch.no_grad():
        uniform = log_weights(flow, None, data.rows.x.floor(), None, num_samples=1).mean().item()
    pf.train(objective, num_steps=100, seed=0, progress_bar=False)
    assert objective.log_prob(data.rows).mean().item() == pytest.approx(uniform, abs=0.03)


# Fits


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("support", [None, constraints.positive])
def test_counts_are_learned_to_their_entropy(support):
    x, entropy = counts(2000), entropy_of_counts()
    flow = NSF(2, support=support)
    fit = fit_quietly(flow, x, dequantization="uniform", max_epochs=40)
    fresh = counts(4000, seed=1)
    bits = pf.bits_per_dim(flow, fresh, levels=60, num_samples=16, seed=0).item()
    # The standard deviation of the log-probability of a row is about one nat.
    excess = bits * 2 * math.log(2) - entropy
    assert -4 / math.sqrt(4000) < excess < 0.12
    assert abs(-fit.best_log_prob - entropy) < 0.3
    draws = flow().sample((4000,)).floor()
    assert abs(draws[:, 0].mean() - 4.0) < 0.3


def test_learned_noise_fits_narrow_counts_better_than_uniform_noise():
    """Columns that are almost always one of two values have a density of spikes under uniform noise's box."""
    x = torch.randint(2, (1500, 4), generator=torch.Generator().manual_seed(0))
    x[:, 2:] = x[:, :2]
    bits = {}
    for name, noise in (("uniform", "uniform"), ("learned", pf.flows.Dequantizer(4, num_layers=4))):
        torch.manual_seed(0)
        flow = pf.flows.RealNVP(4, num_layers=4, hidden_dims=(32,))
        fit = fit_quietly(flow, x, dequantization=noise, max_epochs=40)
        bits[name] = pf.bits_per_dim(flow, x, levels=2, noise=fit.noise, num_samples=1, seed=0).item()
    assert 0.5 - 0.01 < bits["learned"] < bits["uniform"] - 0.04


@pytest.mark.parametrize("noise", ["uniform", "learned"])
@pytest.mark.parametrize("has_classes", [False, True])
@pytest.mark.filterwarnings("error")
def test_digits_with_their_constant_pixels_are_fitted_without_a_warning(noise, has_classes):
    pixels, classes = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    x = pixels[:500].reshape(-1, 1, 8, 8).to(torch.uint8)
    context = torch.nn.functional.one_hot(classes[:500]) if has_classes else None
    assert (x == x[0]).all(0).any()
    flow = image_flow((1, 8, 8), context_dim=10 if has_classes else 0)
    dequantization = noise if noise == "uniform" else Noise((1, 8, 8))
    fit = fit_briefly(flow, x, context, dequantization=dequantization)
    bits = pf.bits_per_dim(flow, x, 17, context, fit.noise, num_samples=2)
    assert 1.0 < bits < 4.2
    law = flow() if context is None else flow(context[:3].float())
    assert law.sample().isfinite().all()


@pytest.mark.filterwarnings("error")
def test_patches_of_photographs_are_fitted():
    photo = load_sample_images().images[0]
    patches = np.stack([photo[i : i + 6, j : j + 4] for i in range(0, 400, 16) for j in range(0, 600, 20)])
    x = patches.transpose(0, 3, 1, 2)
    assert x.dtype == np.uint8
    flow = image_flow((3, 6, 4))
    fit = fit_briefly(flow, x, dequantization=Noise((3, 6, 4)), max_epochs=5)
    assert fit.history["validation_log_prob"][-1] > fit.history["validation_log_prob"][0]
    assert pf.bits_per_dim(flow, x, 256, noise=fit.noise) < 8


def test_integers_of_any_sign_and_form_give_the_same_fit():
    x = counts(300) - 5
    forms = [x, x.numpy(), x.double(), pd.DataFrame(x.numpy(), columns=["a", "b"])]
    flow = NSF(2)
    fits = [fit_briefly(copy.deepcopy(flow), form, dequantization="uniform") for form in forms]
    assert len({fit.best_log_prob for fit in fits}) == 1
    assert np.isfinite(fits[0].best_log_prob)


def test_rare_values_of_a_nearly_constant_column_do_not_ruin_the_fit():
    x = torch.randint(256, (1000, 3), generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0
    x[:5, 1] = 200
    flow = NSF(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_briefly(flow, x, dequantization="uniform")
        fit_briefly(flow, x, dequantization="uniform", max_epochs=1)  # it has no other location and scale
    assert 10 < flow.standardization.scale[1] < 20
    assert pf.bits_per_dim(flow, x, 256) < 8


@pytest.mark.filterwarnings("error")
def test_images_may_have_one_location_and_scale_for_each_channel():
    x = torch.randint(256, (400, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = 0
    x[:3, 0, 0] = 255
    layers = [*image_flow((2, 4, 4)).layers[:4], Standardize((2, 4, 4), by_channel=True)]
    flow = pf.Flow(layers)
    fit_briefly(flow, x, dequantization="uniform")
    fit_briefly(flow, x, dequantization="uniform", max_epochs=1)
    mean = x.double().mean((0, 2, 3)) + 0.5
    assert torch.allclose(flow.standardization.loc.flatten().double(), mean, atol=5.0)


def test_location_and_scale_are_in_the_flow():
    x = counts(2000)
    flow = NSF(2)
    fit_briefly(flow, x, dequantization="uniform")
    mean, deviation = x.double().mean(0) + 0.5, (x.double().var(0) + 1 / 12).sqrt()
    assert torch.allclose(flow.standardization.loc.double(), mean, atol=0.1)
    assert torch.allclose(flow.standardization.scale.double(), deviation, atol=0.1)


@pytest.mark.filterwarnings("ignore:.* bits per dimension are many more")
@pytest.mark.parametrize("dequantization", ["uniform", Noise(2)], ids=["uniform", "learned"])
def test_weights_of_rows_count(dequantization):
    """Half of the rows come from another law, and have no weight, or nearly all."""
    x, others = counts(500), counts(500) + 30
    rows = torch.cat([x, others])
    is_first = torch.arange(1000) < 500
    for used, left_out, weights in ((x, others, is_first.float()), (others, x, 99.0 * ~is_first + 1.0)):
        flow = NSF(2)
        fit = fit_briefly(flow, rows, weights=weights, dequantization=copy.deepcopy(dequantization), max_epochs=8)
        assert pf.bits_per_dim(flow, used, 90, noise=fit.noise) < 4.0
        assert pf.bits_per_dim(flow, left_out, 90, noise=fit.noise) > 6.0


# What a fit keeps, draws and reports


def test_validation_rows_have_one_fixed_draw_of_uniform_noise():
    x, flow = counts(400), NSF(2)
    fit = fit_briefly(flow, x, dequantization="uniform")
    with seeded(0), torch.no_grad():
        rows = load(flow, x, are_integers=True).rows
        rows = rows[split(rows, 0.1)[1]]
        assert flow().log_prob(rows.x).mean().item() == pytest.approx(fit.best_log_prob, abs=1e-5)
    assert fit.noise is None


def test_validation_rows_have_one_fixed_draw_of_learned_noise():
    flow, noise = NSF(2), perturb(Noise(2), 0.1)
    data = load(flow, counts(100), are_integers=True)
    objective = VariationalDequantization(flow, noise, data, torch.arange(100), batch_size=10)
    first = objective.log_prob(data.rows)
    torch.rand(5)
    assert torch.equal(objective.log_prob(data.rows), first)


def test_both_flows_are_left_in_their_best_state(monkeypatch):
    states = {}

    def scored(objective, rows):
        score = score_of(objective, rows)
        states[score] = copy.deepcopy((flow.state_dict(), noise.state_dict()))
        return score

    score_of = density._mean_log_prob
    monkeypatch.setattr(density, "_mean_log_prob", scored)
    flow, noise = NSF(2), Noise(2)
    optimizer = partial(torch.optim.Adam, lr=0.05)  # so fast that the last state is not the best
    fit = fit_quietly(flow, counts(300), dequantization=noise, max_epochs=12, optimizer=optimizer)
    assert fit.noise is noise and fit.flow is flow
    assert fit.best_log_prob == max(states)
    for module, state in zip((flow, noise), states[max(states)], strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_a_seed_makes_both_flows_reproducible():
    flow, noise, x = NSF(2), Noise(2), counts(300)
    pairs = [(copy.deepcopy(flow), copy.deepcopy(noise)) for _ in range(2)]
    fits = [fit_briefly(f, x, dequantization=n) for f, n in pairs]
    assert fits[0].best_log_prob == fits[1].best_log_prob
    for mine, other in zip(*pairs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:compile")
@pytest.mark.parametrize("flow", [NSF(2), NSF(2, context_dim=1)], ids=["plain", "context"])
def test_a_traced_step_is_the_same_step(flow):
    x, noise = counts(200), Noise(2)
    context = None if not flow.context_dim else torch.randn(200, 1)
    fits = [
        fit_briefly(copy.deepcopy(flow), x, context, dequantization=copy.deepcopy(noise), compile=mode)
        for mode in ("none", "trace")
    ]
    assert fits[0].best_log_prob == pytest.approx(fits[1].best_log_prob, abs=1e-3)


class Drifting(pf.transforms.FlowTransform):
    """x = z + (s - 6) / 2, where s is the number of steps so far."""

    def __init__(self):
        super().__init__(2, context_dim=2)
        self.register_buffer("num_steps", torch.zeros(()))

    def before_step(self):
        self.num_steps += 1

    def _forward_and_ladj(self, z, context):
        return z + (self.num_steps - 6) / 2, z.new_zeros(z.shape[:-1])

    def _inverse_and_ladj(self, x, context):
        return x - (self.num_steps - 6) / 2, x.new_zeros(x.shape[:-1])


@pytest.mark.filterwarnings("ignore:compile")
def test_the_noise_keeps_up_its_state_in_plain_and_traced_steps():
    flow, noise = NSF(2, num_layers=1), SUPPORTED([Drifting(), Elementwise(2, context_dim=2)])
    log_probs = []
    for mode in ("none", "trace"):
        own = copy.deepcopy(noise)
        fit = fit_briefly(copy.deepcopy(flow), counts(200), dequantization=own, compile=mode)
        assert own.transform.layers[0].num_steps == 2 * fit.best_epoch > 0  # two batches of 64 of 180 rows
        log_probs.append(fit.history["log_prob"])
    assert log_probs[0] == pytest.approx(log_probs[1], abs=1e-3)


def test_noise_with_a_trained_base_is_trained_too():
    noise = pf.Flow([Elementwise(2, context_dim=2)], base="student_t", support=constraints.unit_interval)
    before = [p.detach().clone() for p in noise.base.parameters()]
    fit_briefly(NSF(2), counts(200), dequantization=noise)
    assert all((a != b).any() for a, b in zip(before, noise.base.parameters(), strict=True))


def test_a_mixture_has_dequantised_data():
    x = torch.cat([counts(300), counts(300) + 40])
    mixture = pf.flows.Mixture([NSF(2), NSF(2)])
    fit_briefly(mixture, x, dequantization="uniform")
    assert pf.bits_per_dim(mixture, x, 80) < math.log2(80)


def test_comparisons_give_all_flows_the_same_noise():
    flows = {"NSF": NSF(2), "Gaussian": pf.flows.Gaussian(2)}
    options = {"dequantization": "uniform", "max_epochs": 3, "seed": 0, "progress_bar": False}
    found = pf.compare_densities(flows, counts(500), **options)
    again = pf.compare_densities({"Gaussian": pf.flows.Gaussian(2)}, counts(500), **options)
    assert np.array_equal(found.log_probs["Gaussian"], again.log_probs["Gaussian"])
    with pytest.raises(OptionError, match="under the same noise"):
        pf.compare_densities({"NSF": NSF(2)}, counts(500), dequantization=Noise(2))


# What is refused


@pytest.mark.parametrize(
    ("dequantization", "error", "message"),
    [
        ("normal", OptionError, "must be None, \"uniform\" or a flow such as pf.flows.Dequantizer, got 'normal'"),
        (True, OptionError, "got bool"),
        (pf.flows.Dequantizer, OptionError, r"the class Dequantizer: make an instance first"),
        (Noise(3), ShapeError, r"events of size 3 and contexts of size 3: use pf.flows.Dequantizer\(2\)"),
        (SUPPORTED([Elementwise(2)]), ShapeError, "events of size 2 and no context"),
        (pf.Flow([Elementwise(2, context_dim=2)]), OptionError, "the noise lies between 0 and 1, but this flow has"),
        (Noise(2).double(), OptionError, "must have one dtype and device.*use noise.to"),
        (
            pf.Flow([Elementwise(2, context_dim=2)], support=constraints.interval(0.0, 2.0)),
            OptionError,
            "the noise lies between 0 and 1",
        ),
        (
            SUPPORTED([pf.transforms.BatchNorm(2), Elementwise(2, context_dim=2)]),
            OptionError,
            "BatchNorm .* but the noise of integers is trained on draws",
        ),
        (pf.flows.Mixture([Noise(2), Noise(2)]), OptionError, "draws of the noise must carry gradients"),
    ],
)
def test_what_cannot_be_the_noise_is_refused(dequantization, error, message):
    with pytest.raises(error, match=message):
        fit_briefly(NSF(2), counts(100), dequantization=dequantization)


def test_noise_may_have_bounds_that_are_tensors():
    support = constraints.interval(torch.zeros(2), torch.ones(2))
    noise = pf.Flow([Elementwise(2, context_dim=2)], support=support)
    fit_briefly(NSF(2), counts(100), dequantization=noise, max_epochs=1)


def test_the_flow_itself_is_no_noise():
    flow = SUPPORTED([Elementwise(2, context_dim=2)])
    with pytest.raises(OptionError, match="parameters in common"):
        fit_briefly(flow, torch.zeros(100, 2), torch.zeros(100, 2), dequantization=flow)


def test_continuous_data_are_refused():
    with pytest.raises(DataError, match="values that are no integers .* or leave dequantization out"):
        fit_briefly(NSF(2), torch.randn(100, 2), dequantization="uniform")


class Counting(pf.transforms.FlowTransform):
    """The identity on counts, a layer of discrete events."""

    domain = codomain = constraints.independent(constraints.nonnegative_integer, 1)

    def _forward_and_ladj(self, z, context):
        return z, z.new_zeros(z.shape[:-1])

    _inverse_and_ladj = _forward_and_ladj


def test_a_law_of_integers_needs_no_noise():
    flow = pf.Flow([Counting(2)], base=dist.Poisson(torch.ones(2)).to_event(1))
    flow.register_parameter("unused", torch.nn.Parameter(torch.zeros(())))
    with pytest.raises(OptionError, match="a law of integers itself: leave dequantization out"):
        fit_briefly(flow, counts(100), dequantization="uniform")
    bits = -flow().log_prob(counts(100)).mean() / (2 * math.log(2))
    torch.testing.assert_close(pf.bits_per_dim(flow, counts(100), 30), bits)

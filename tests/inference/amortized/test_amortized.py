"""Amortised fits: posteriors with known answers, corrections, sizes, embeddings, flows of every kind."""

import copy
import functools
import math

import matplotlib
import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

import pyroflows as pf
from pyroflows.fitting import adaptation, density
from pyroflows.training.shuffling import split

matplotlib.use("Agg")

NUM_OBSERVATIONS = 4
QUICK = {"num_simulations": 400, "max_epochs": 2, "seed": 0, "progress_bar": False}


def conjugate(y=None):
    """Given y the mean is normal with mean sum(y) / 5 and variance 1 / 5."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("N", NUM_OBSERVATIONS):
        return pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def scaled(y=None):
    """A site with a bounded support, and a deterministic one."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.deterministic("precision", scale**-2)
    with pyro.plate("N", 8):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def affine(dim, context_dim):
    return pf.flows.MAF(dim, num_layers=1, hidden_dims=(32, 32), context_dim=context_dim)


def log_evidence(y):
    n = len(y)
    return dist.MultivariateNormal(torch.zeros(n), torch.eye(n) + 1.0).log_prob(y).item()


@pytest.fixture(scope="module")
def amortized():
    return pf.fit_amortized(conjugate, num_simulations=4000, flow=affine, max_epochs=20, seed=0, progress_bar=False)


@pytest.fixture(scope="module")
def quick():
    torch.manual_seed(0)
    return pf.fit_amortized(scaled, **QUICK)


DATA = [torch.tensor([0.5, 1.0, 1.5, 0.0]), torch.tensor([-2.0, -1.0, -1.5, -1.0]), torch.zeros(4)]


@pytest.mark.parametrize("y", DATA)
def test_a_conjugate_posterior_has_the_right_moments(amortized, y):
    draws = amortized.posterior(y).sample(20_000)["mu"]
    sd = (1 + NUM_OBSERVATIONS) ** -0.5
    assert abs(draws.mean() - y.sum() / 5) < 0.15 * sd
    assert abs(draws.std() / sd - 1) < 0.15


@pytest.mark.parametrize("y", DATA)
def test_weights_correct_a_conjugate_posterior(amortized, y):
    posterior = amortized.posterior(y)
    weighted = posterior.importance_sample(10_000)
    assert weighted.khat < 0.7
    assert abs(posterior.log_evidence - log_evidence(y)) < 4 * posterior.log_evidence_se + 1e-3
    draws = weighted.resample(20_000)["mu"]
    sd = (1 + NUM_OBSERVATIONS) ** -0.5
    assert abs(draws.mean() - y.sum() / 5) < 0.03
    assert abs(draws.std() / sd - 1) < 0.03


def test_chains_and_bridge_are_those_of_any_posterior(amortized):
    posterior = amortized.posterior(DATA[0])
    chains = posterior.mcmc(100, num_chains=16, num_warmup=100, seed=0, progress_bar=False)
    assert abs(chains.draws["mu"].mean() - 0.6) < 0.1
    evidence = posterior.bridge_sample(1000, num_warmup=100, seed=0, progress_bar=False)
    assert abs(evidence.log_evidence - log_evidence(DATA[0])) < 0.05


def test_the_print_has_a_table_and_a_verdict(amortized):
    text = str(amortized.posterior(DATA[0]))
    assert "mu" in text and "verdict: " in text and "no search for modes was made" in text


def test_the_fit_says_how_it_went(amortized):
    text = repr(amortized)
    assert "mu given y: 4000 simulations" in text and "validation log-density" in text
    # The best that any flow can have is minus the entropy of the posterior.
    assert amortized.fits[0].best_log_prob < 0.5 * math.log(5 / (2 * math.pi * math.e)) + 0.15
    assert amortized.plot() is not None


def test_simulation_based_calibration_takes_the_fit(amortized):
    options = {"observed": "y", "num_datasets": 50, "num_samples": 500, "seed": 0, "progress_bar": False}
    assert pf.sbc(conjugate, amortized, **options).is_calibrated

    class Narrow:
        def posterior(self, y):
            mu = amortized.posterior(y).sample(500)["mu"]
            return {"mu": mu.mean() + 0.5 * (mu - mu.mean())}

    assert "'mu' is too narrow" in pf.sbc(conjugate, Narrow(), **options).verdict


@pytest.mark.parametrize("observed", ["y", ["y"]])
def test_one_site_named_in_a_list_is_given_by_its_value_or_by_name(observed):
    fitted = pf.fit_amortized(conjugate, observed, **QUICK)
    for data in (DATA[0], {"y": DATA[0]}):
        assert fitted.posterior(data).sample(3)["mu"].shape == (3,)
    options = {"observed": observed, "num_datasets": 10, "num_samples": 50, "progress_bar": False}
    assert not pf.sbc(conjugate, fitted, **options).failures


def test_many_data_sets_at_once_get_the_draws_of_each(amortized):
    y = torch.stack(DATA)
    draws = amortized.sample(y, 4000)["mu"]
    assert draws.shape == (3, 4000)
    assert (draws.mean(1) - y.sum(1) / 5).abs().max() < 0.1


def test_the_advice_is_that_of_an_amortised_fit(amortized):
    with pytest.warns(UserWarning, match="far outside"):
        diagnosis = amortized.posterior(torch.full((4,), 30.0)).diagnose()
    assert diagnosis.verdict == "do not use"
    assert any("fit these data by pf.FlowVI" in reason for reason in diagnosis.reasons)
    assert not any("more steps" in reason for reason in diagnosis.reasons)


def test_a_posterior_keeps_its_data(quick):
    with pytest.raises(pf.OptionError, match=r"give other data to amortized.posterior\(y\)"):
        quick.posterior(torch.zeros(8)).with_data(y=torch.ones(8))


def test_a_batch_and_a_single_data_set_are_told_apart(quick):
    with pytest.raises(pf.ShapeError, match="many data sets are made by amortized.sample"):
        quick.posterior(torch.zeros(2, 8))
    with pytest.raises(pf.ShapeError, match=r"given as y\[None\]"):
        quick.sample(torch.zeros(8))
    assert quick.sample(torch.zeros(2, 8))["mu"].shape == (2, 1000)


def test_data_far_outside_of_the_simulations_are_named(amortized):
    with pytest.warns(UserWarning, match="far outside of the 4000 simulations, at site 'y' \\(4 of 4 values\\)"):
        posterior = amortized.posterior(torch.full((4,), 30.0))
    diagnosis = posterior.diagnose()
    assert diagnosis.verdict == "do not use" and "far outside" in diagnosis.reasons[0]
    with pytest.warns(UserWarning, match=r"data sets \[1\] are far outside"):
        amortized.sample(torch.stack([DATA[0], DATA[0] + 30]), 5)


def test_a_joint_pattern_that_was_not_simulated_is_named():
    def line(y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * torch.arange(1.0, 4.0), 0.1).to_event(1), obs=y)

    fitted = pf.fit_amortized(line, **QUICK)
    with pytest.warns(UserWarning, match="in their joint pattern"):
        fitted.posterior([1.0, -1.0, 1.0])
    fitted.posterior([0.9, 2.1, 3.0])


def test_numbers_of_any_kind_are_data(amortized):
    expected = amortized.posterior(DATA[0])._center
    for y in (DATA[0].tolist(), DATA[0].numpy(), DATA[0].double(), {"y": DATA[0].numpy()}):
        torch.testing.assert_close(amortized.posterior(y)._center, expected)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            torch.zeros(3),
            pf.ShapeError,
            r"site 'y' has shape \(4,\) in the simulations, but its value has shape \(3,\)",
        ),
        (torch.zeros(2, 4), pf.ShapeError, r"has shape \(2, 4\)"),
        (torch.tensor([0.0, torch.nan, 0.0, 0.0]), pf.DataError, "site 'y' has 1 NaN or infinite"),
        ({"x": torch.zeros(4)}, pf.OptionError, r"must have values of the sites \['y'\], got \['x'\]"),
        ("data", pf.DataError, "site 'y' is no array of numbers"),
    ],
)
def test_data_that_do_not_fit_are_refused(amortized, data, error, message):
    with pytest.raises(error, match=message):
        amortized.posterior(data)


def test_constrained_and_deterministic_sites(quick):
    posterior = quick.posterior(torch.randn(8))
    draws = posterior.sample(50)
    assert (draws["scale"] > 0).all()
    torch.testing.assert_close(draws["precision"], draws["scale"] ** -2)
    assert posterior.log_prob(draws).shape == (50,)
    assert posterior.predictive(7)["y"].shape == (7, 8)
    assert quick.sample(torch.randn(3, 8), 5)["scale"].shape == (3, 5)


def test_log_prob_is_that_of_the_flow_at_the_data(quick):
    y = torch.randn(8)
    draws = {"mu": torch.tensor([0.3]), "scale": torch.tensor([2.0])}
    expected = quick.flow(y).log_prob(torch.tensor([0.3, math.log(2.0)])) - math.log(2.0)
    torch.testing.assert_close(quick.posterior(y).log_prob(draws)[0], expected)


def test_what_any_posterior_does(quick, tmp_path):
    posterior = quick.posterior(torch.randn(8))
    posterior.num_diagnostic_samples = 500
    assert posterior.to_arviz(20, posterior_predictive=False, prior=False)["log_likelihood"]["y"].shape == (1, 20, 8)
    options = {"seed": 0, "progress_bar": False}
    distilled = posterior.distill(
        lambda dim: pf.flows.IAF(dim, 1), num_steps=5, warm_start=1, compile="none", **options
    )
    distilled.save(tmp_path / "posterior")
    refitted = posterior.fit_proposal(num_samples=500, max_epochs=1, compile="none", **options)
    assert refitted.refitted is not None
    with pytest.raises(pf.OptionError, match=r"save that fit by amortized\.save"):
        posterior.save(tmp_path / "other")


def test_the_flow_can_be_saved(quick, tmp_path):
    quick.flow.save(tmp_path / "flow")
    loaded, y, x = pf.load_flow(tmp_path / "flow"), torch.randn(8), torch.randn(5, 2)
    torch.testing.assert_close(loaded(y).log_prob(x), quick.flow(y).log_prob(x))


def test_a_seed_makes_the_fit_reproducible_and_leaves_the_generator(quick):
    state = torch.get_rng_state()
    again = pf.fit_amortized(scaled, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.fits[0].best_log_prob == quick.fits[0].best_log_prob


def test_the_fit_has_the_dtype_of_the_latents():
    def double(y=None):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fitted = pf.fit_amortized(double, embedding=nn.Sequential(nn.Unflatten(0, (-1, 1))), **QUICK)
    assert fitted.posterior(1.0).sample(3)["mu"].dtype == torch.float64


# Embeddings


class MeanOfSet(nn.Module):
    """A network for each element, and the mean over elements."""

    def __init__(self, key=None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 3))
        self.key = key

    def forward(self, y):
        y = y if self.key is None else y[self.key]
        return self.net(y[..., None]).mean(1)


def test_an_embedding_is_trained_kept_and_invariant():
    net = MeanOfSet()
    before = copy.deepcopy(net.state_dict())
    options = {**QUICK, "num_simulations": 2000, "max_epochs": 30}
    fitted = pf.fit_amortized(conjugate, flow=affine, embedding=net, **options)
    assert all(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert any(parameter is net.net[0].weight for parameter in fitted.flow.parameters())
    y = DATA[0]
    x = torch.randn(5, 1)
    torch.testing.assert_close(fitted.flow(y).log_prob(x), fitted.flow(y.flip(0)).log_prob(x))
    torch.testing.assert_close(fitted.posterior(y)._flow().log_prob(x), fitted.flow(y).log_prob(x))
    posterior = fitted.posterior(y)
    assert abs(posterior.sample(4000)["mu"].mean() - 0.6) < 0.2
    assert abs(posterior.log_evidence - log_evidence(y)) < 0.05


def test_an_embedding_of_several_sites_takes_a_dictionary():
    fitted = pf.fit_amortized(conjugate, ["y"], embedding=MeanOfSet("y"), **QUICK)
    assert fitted.posterior({"y": DATA[0]}).sample(3)["mu"].shape == (3,)


def test_an_embedding_moves_with_the_flow():
    fitted = pf.fit_amortized(conjugate, embedding=MeanOfSet(), **QUICK)
    flow = copy.deepcopy(fitted.flow).double()
    assert flow(DATA[0]).sample().dtype == torch.float64


@pytest.mark.parametrize(
    ("embedding", "error", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.1)),
            pf.OptionError,
            "Dropout.* density of the same data would differ",
        ),
        (nn.Linear, pf.OptionError, "got the class Linear: make an instance first"),
        (nn.Linear(5, 2), pf.OptionError, r"the embedding does not run with 2 data sets.* gets a tensor \(n, \*site"),
        (nn.Unflatten(1, (2, 2)), pf.ShapeError, r"gave shape \(2, 2, 2\)"),
        (lambda y: y, pf.OptionError, "an embedding must be a torch.nn.Module, got function"),
    ],
)
def test_embeddings_that_cannot_serve_are_refused(embedding, error, message):
    with pytest.raises(error, match=message):
        pf.fit_amortized(conjugate, embedding=embedding, **QUICK)


# Flows


@pytest.mark.parametrize(
    "flow",
    [
        lambda dim, context: pf.flows.MAF(dim, num_layers=2, context_dim=context),
        lambda dim, context: pf.flows.Mixture([pf.flows.NSF(dim, 1, context_dim=context) for _ in range(2)]),
        lambda dim, context: pf.flows.Mixture([pf.flows.Gaussian(dim), pf.flows.Gaussian(dim)], context_dim=context),
        pf.flows.Recipe("MAF", num_layers=2),
    ],
    ids=["MAF", "mixture", "mixture by context", "recipe"],
)
def test_any_conditional_flow_serves(flow):
    fitted = pf.fit_amortized(scaled, flow=flow, **QUICK)
    y, x = torch.randn(8), torch.randn(5, 2)
    posterior = fitted.posterior(y)
    torch.testing.assert_close(posterior._flow().log_prob(x), fitted.flow(y).log_prob(x))
    assert posterior.sample(10)["scale"].shape == (10,)


def test_a_flow_of_the_users_is_trained_in_place():
    flow = pf.flows.MAF(2, num_layers=1, context_dim=8)
    assert pf.fit_amortized(scaled, flow=flow, **QUICK).flow is flow and flow.is_adapted


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"flow": pf.flows.MAF(2)}, pf.ShapeError, "events of size 2, .* context size 8"),
        ({"flow": pf.flows.MAF}, pf.OptionError, "got the class MAF"),
        ({"flow": lambda dim: pf.flows.CNF(dim)}, pf.OptionError, "a function of two arguments"),
        ({"flow": lambda dim, context: [1]}, pf.OptionError, "must give a pyroflows.Flow, got list"),
        ({"method": "magic"}, pf.OptionError, "method must be one of"),
        ({"epochs": 3}, pf.OptionError, "fit_density has no option 'epochs'"),
        ({"num_simulations": 3}, pf.OptionError, "num_simulations must be at least 20"),
        ({"num_flows": 0}, pf.OptionError, "num_flows must be at least 1"),
        ({"num_flows": 2, "flow": pf.flows.MAF(2, context_dim=8)}, pf.OptionError, "num_flows is 2, but flow is one"),
    ],
)
def test_options_that_cannot_serve_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        pf.fit_amortized(scaled, **{**QUICK, **options})


# Ensembles


def coarse(dim, context_dim):
    return pf.flows.NSF(dim, num_layers=1, hidden_dims=(8,), bins=4, context_dim=context_dim)


def test_an_ensemble_is_the_mixture_in_equal_parts_of_flows_trained_apart(tmp_path):
    fitted = pf.fit_amortized(scaled, flow=coarse, num_flows=2, **QUICK)
    y, x = torch.randn(8), torch.randn(5, 2)
    first, second = (fit.flow(y).log_prob(x) for fit in fitted.fits)
    assert not torch.allclose(first, second)
    expected = torch.logaddexp(first, second) - math.log(2)
    torch.testing.assert_close(fitted.flow(y).log_prob(x), expected)
    torch.testing.assert_close(fitted.posterior(y)._flow().log_prob(x), expected)
    assert fitted.sample(torch.randn(3, 8), 5)["scale"].shape == (3, 5)
    fitted.flow.save(tmp_path / "flow")
    torch.testing.assert_close(pf.load_flow(tmp_path / "flow")(y).log_prob(x), expected)


def test_the_flows_of_an_ensemble_have_validation_rows_of_their_own(monkeypatch):
    held_out = []

    def recorded(*args, **options):
        divided = split(*args, **options)
        held_out.append(divided[1])
        return divided

    monkeypatch.setattr(adaptation, "split", recorded)
    pf.fit_amortized(scaled, flow=coarse, num_flows=2, **QUICK)
    assert len(held_out) == 2 and not torch.equal(held_out[0].sort().values, held_out[1].sort().values)


def test_an_ensemble_is_the_default_and_one_flow_that_of_a_flow_of_the_users(quick):
    assert len(quick.fits) == 3 and isinstance(quick.flow, pf.flows.Mixture)
    assert repr(quick).count("DensityFit(") == 3
    alone = pf.fit_amortized(scaled, num_flows=1, **QUICK)
    assert len(alone.fits) == 1 and alone.flow is alone.fits[0].flow


@pytest.mark.parametrize("optimizer", [None, functools.partial(torch.optim.Adam, lr=1e-3)])
def test_the_prior_on_the_parameters_is_stronger_than_in_fit_density_unless_there_is_an_optimizer(
    monkeypatch, optimizer
):
    seen = []
    monkeypatch.setattr(density.Trainer, "__init__", lambda *args, **kwargs: seen.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pf.fit_amortized(scaled, flow=coarse, optimizer=optimizer, **QUICK)
    given = seen[0][3]
    assert given is optimizer if optimizer else given.keywords["weight_decay"] == 10 / 400


def test_each_flow_of_an_ensemble_has_an_embedding_of_its_own():
    net = MeanOfSet()
    fitted = pf.fit_amortized(conjugate, flow=coarse, embedding=net, num_flows=2, **QUICK)
    first, second = (
        next(part for part in fit.flow.modules() if isinstance(part, MeanOfSet)).net[0].weight for fit in fitted.fits
    )
    assert first is net.net[0].weight and not torch.equal(first, second)
    y, x = DATA[0], torch.randn(5, 1)
    torch.testing.assert_close(fitted.posterior(y)._flow().log_prob(x), fitted.flow(y).log_prob(x))


def test_an_ensemble_errs_less_than_its_flows():
    options = {**QUICK, "num_simulations": 500, "max_epochs": 40}
    fitted = pf.fit_amortized(conjugate, flow=coarse, num_flows=3, **options)
    mu = torch.randn(5000, 1)
    y = mu + torch.randn(5000, NUM_OBSERVATIONS)
    alone = [fit.flow(y).log_prob(mu).mean().item() for fit in fitted.fits]
    # The logarithm is concave, so that the mixture is better than the flows on average; here than each of them.
    assert fitted.flow(y).log_prob(mu).mean() > max(alone)


# Flow matching


def continuous(dim, context_dim):
    return pf.flows.CNF(dim, hidden_dims=(32, 32), context_dim=context_dim)


@pytest.mark.parametrize(
    "embedding",
    [pytest.param(None, marks=pytest.mark.slow), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))],
)
def test_continuous_flows_are_matched_together_with_their_embedding(embedding):
    before = copy.deepcopy(embedding.state_dict()) if embedding is not None else {}
    options = {**QUICK, "num_simulations": 2000, "max_epochs": 40}
    fitted = pf.fit_amortized(conjugate, flow=continuous, embedding=embedding, **options)
    assert isinstance(fitted.fits[0], pf.MatchingFit) and "validation loss" in repr(fitted)
    assert all(not torch.equal(embedding.state_dict()[name], value) for name, value in before.items())
    posterior = fitted.posterior(DATA[0])
    draws = posterior.sample(2000)["mu"]
    assert abs(draws.mean() - 0.6) < 0.15 and abs(draws.std() / 5**-0.5 - 1) < 0.25
    posterior.num_diagnostic_samples = 1000
    assert abs(posterior.log_evidence - log_evidence(DATA[0])) < 0.05


def test_a_proposal_is_matched(amortized):
    posterior = amortized.posterior(DATA[0])
    flow_fn = lambda dim: pf.flows.CNF(dim, hidden_dims=(16, 16))  # noqa: E731
    proposal = posterior.fit_proposal(flow_fn, num_samples=2000, max_epochs=20, seed=0, progress_bar=False)
    assert isinstance(proposal.refitted, pf.MatchingFit)
    assert abs(proposal.sample(2000)["mu"].mean() - 0.6) < 0.1
    assert all(parameter.requires_grad for parameter in proposal.guide.flow.layers[-1].parameters())

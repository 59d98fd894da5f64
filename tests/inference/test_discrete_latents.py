"""Fits of models with discrete latents, which are summed out: draws of them, predictions, tables, ArviZ data."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate

import pyroflows as pf
from pyroflows.errors import ModelError
from pyroflows.guides import AutoFlow
from tests.models.test_enumeration import BY_HAND

Y = torch.tensor([-2.5, -1.9, 0.1, 1.8, 2.2, 3.0])


def mixture(y=None, num_rows=None):
    w = pyro.sample("w", dist.Beta(2.0, 2.0))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 0.5).to_event(1))
    with pyro.plate("rows", num_rows or len(y)):
        z = pyro.sample("z", dist.Bernoulli(w))
        loc = pyro.deterministic("loc", torch.where(z == 1, mu[..., 1:], mu[..., :1]))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def mixture_by_hand(y):
    w = pyro.sample("w", dist.Beta(2.0, 2.0))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 0.5).to_event(1))
    with pyro.plate("rows", len(y)):
        law = dist.Categorical(torch.stack([1 - w, w], -1))
        pyro.sample("y", dist.MixtureSameFamily(law, dist.Normal(mu, 1.0)), obs=y)


def choice(y, num_rows=None):
    """One choice for all rows."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    with pyro.plate("rows", num_rows or len(y)):
        pyro.sample("y", dist.Normal(mu + k, 1.0), obs=y)


def chain(y, num_steps=None):
    stay = pyro.sample("stay", dist.Beta(4.0, 1.0))
    z = torch.tensor(0.0)
    for t in pyro.markov(range(num_steps or len(y))):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(torch.where(z == 1, stay, 1 - stay)))
        pyro.sample(f"y_{t}", dist.Normal(3 * z, 1.0), obs=y[t] if t < len(y) else None)


def fit(model, *args, **options):
    return pf.FlowVI(model, num_steps=20, num_starts=1, seed=0, progress_bar=False, **options).run(*args)


@pytest.fixture(scope="module")
def of_mixture():
    return fit(mixture, Y)


@pytest.fixture(scope="module")
def of_choice():
    return fit(choice, Y)


def assert_same_share(draws, probabilities):
    """Draws of 0 and 1 have these probabilities, within four standard errors."""
    se = (probabilities * (1 - probabilities)).sum(0).sqrt() / len(draws)
    assert ((draws.double() - probabilities).mean(0).abs() < 4 * se + 1e-9).all()


def test_draws_of_local_sites_have_their_exact_conditional_probabilities(of_mixture):
    draws = of_mixture.sample(4000, seed=1)
    w, mu = draws["w"].double()[:, None], draws["mu"].double()
    odds = w.logit() + dist.Normal(mu[:, 1:], 1.0).log_prob(Y) - dist.Normal(mu[:, :1], 1.0).log_prob(Y)
    assert draws["z"].shape == (4000, 6)
    assert_same_share(draws["z"], odds.sigmoid())
    expected = torch.where(draws["z"] == 1, draws["mu"][:, 1:], draws["mu"][:, :1])
    torch.testing.assert_close(draws["loc"], expected)


def test_draws_of_a_global_site_have_their_exact_conditional_probabilities(of_choice):
    draws = of_choice.sample(4000, seed=1)
    means = draws["mu"].double()[:, None] + torch.arange(3.0)
    logits = torch.tensor([0.5, 0.3, 0.2]).log() + dist.Normal(means[..., None], 1.0).log_prob(Y).sum(-1)
    for k in range(3):
        assert_same_share(draws["k"] == k, logits.softmax(-1)[:, k])


def test_draws_of_a_chain_have_their_exact_joint_conditional():
    """Of three steps, by all eight paths."""
    y = torch.tensor([0.5, 1.8, 1.0])
    draws = fit(chain, y).sample(4000, seed=1)
    stay = draws["stay"].double()
    logits = []
    for path in range(8):
        states = [path >> t & 1 for t in range(3)]
        log_prob = sum(
            torch.where(torch.tensor(a == b), stay, 1 - stay).log() for a, b in zip([0, *states], states, strict=False)
        )
        logits.append(log_prob + dist.Normal(3 * torch.tensor(states), 1.0).log_prob(y).sum())
    found = sum(draws[f"z_{t}"].long() << t for t in range(3))
    probabilities = torch.stack(logits, -1).softmax(-1)
    for path in range(8):
        assert_same_share(found == path, probabilities[:, path])


def test_predictions_at_the_rows_of_the_fit_are_given_their_sites(of_mixture):
    """A row far on one side has a prediction there, since its site is drawn given the data."""
    predicted = of_mixture.predictive(2000, seed=1)
    assert predicted.keys() == {"loc", "y"}
    assert predicted["y"][:, 0].mean() < -1.5 and predicted["y"][:, 5].mean() > 1.5


def test_predictions_at_new_rows_draw_local_sites_from_their_prior(of_mixture):
    predicted = of_mixture.predictive(4000, num_rows=3, seed=1)
    assert predicted["z"].shape == predicted["y"].shape == (4000, 3)
    assert_same_share(predicted["z"], of_mixture.sample(4000, seed=1)["w"].double()[:, None].expand(-1, 3))


def test_predictions_with_new_data_draw_local_sites_given_these(of_mixture):
    predicted = of_mixture.predictive(2000, torch.tensor([-4.0, 4.0]), seed=1)
    assert predicted["z"].mean(0)[0] < 0.01 and predicted["z"].mean(0)[1] > 0.99
    assert predicted["y"].shape == (2000, 2)


def test_predictions_keep_global_sites(of_choice):
    draws = of_choice.sample(4000, seed=1)
    predicted = of_choice.predictive(4000, None, num_rows=2, seed=1)["y"]
    expected = (draws["mu"] + draws["k"]).double()
    assert (predicted.double().mean() - expected.mean()).abs() < 4 * (1 / 8000 + expected.var() / 4000) ** 0.5


def test_a_chain_is_predicted_on_from_its_data():
    """The first step after the data follows the last state, which the data tell for sure."""
    y = torch.tensor([0.0, 3.0, 3.2, 3.1])
    posterior = fit(chain, y)
    predicted = posterior.predictive(4000, y, num_steps=5, seed=1)
    stay = posterior.sample(4000, seed=1)["stay"].double()
    assert_same_share(predicted["z_4"], stay)
    assert predicted["y_4"].shape == (4000,)


def test_weights_and_chains_draw_discrete_sites_too(of_mixture):
    weighted = of_mixture.importance_sample(50, seed=0)
    assert weighted.draws["z"].shape == weighted.draws["loc"].shape == (50, 6)
    chains = of_mixture.mcmc(8, num_chains=3, num_warmup=5, seed=0, progress_bar=False)
    assert chains.draws["z"].shape == (3, 8, 6)
    weighted = pf.importance_sample(mixture, of_mixture, Y, num_samples=50, seed=0, progress_bar=False)
    assert weighted.draws["z"].shape == weighted.draws["loc"].shape == (50, 6)


def test_log_prob_is_that_of_the_continuous_sites(of_mixture):
    draws = of_mixture.sample(5)
    expected = of_mixture.log_prob({name: draws[name] for name in ("w", "mu")})
    torch.testing.assert_close(of_mixture.log_prob(draws), expected)


def test_a_global_site_is_tabulated_by_its_probabilities(of_choice, of_mixture):
    table = of_choice.summary()
    rows = ["k = 0", "k = 1", "k = 2"]
    assert list(table.index) == ["mu", *rows]
    assert table["mean"][rows].sum() == pytest.approx(1.0)
    assert (of_choice.sample(4000, seed=1)["k"] == 1).double().mean() == pytest.approx(table["mean"]["k = 1"], abs=0.05)
    assert list(of_mixture.summary().index) == ["w", "mu[0]", "mu[1]"]


def test_arviz_data(of_mixture, of_choice):
    data = of_mixture.to_arviz(num_samples=20, seed=0)
    assert data["posterior"]["z"].dims == ("chain", "draw", "rows")
    assert data["prior"]["z"].shape == data["posterior_predictive"]["y"].shape == (1, 20, 6)
    draws = {name: torch.tensor(data["posterior"][name].values[0]) for name in ("w", "mu")}
    w, mu = draws["w"][:, None], draws["mu"]
    parts = [w.log() + dist.Normal(mu[:, 1:], 1.0).log_prob(Y), (1 - w).log() + dist.Normal(mu[:, :1], 1.0).log_prob(Y)]
    found = torch.tensor(data["log_likelihood"]["y"].values[0])
    torch.testing.assert_close(found, torch.logaddexp(*parts).double(), rtol=1e-4, atol=1e-4)
    # One term for all rows that share a discrete site.
    assert of_choice.to_arviz(num_samples=20, seed=0)["log_likelihood"]["y"].shape == (1, 20)


def test_the_gradient_of_subsampled_rows_is_unbiased():
    def model(y, size):
        w = pyro.sample("w", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", len(y), subsample_size=size) as rows:
            z = pyro.sample("z", dist.Bernoulli(w))
            pyro.sample("y", dist.Normal(4 * z - 2, 1.0), obs=y[rows])

    posterior = fit(model, Y, 2)
    vectors = torch.zeros(1, 1)
    log_joint = posterior.log_joint
    parts = [log_joint(vectors, {"rows": torch.tensor([i, i + 1])}) for i in (0, 2, 4)]
    whole = fit(model, Y, 6).log_joint(vectors)
    torch.testing.assert_close(torch.stack(parts).mean(0), whole)
    assert posterior.sample(3).keys() == {"w"}


@pytest.mark.parametrize("Elbo", [TraceEnum_ELBO, Trace_ELBO])
def test_guide_under_pyros_svi(Elbo):
    model = config_enumerate(mixture)
    guide = AutoFlow(model)
    options = {"max_plate_nesting": 1} if Elbo is TraceEnum_ELBO else {}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Elbo(**options))
    if Elbo is Trace_ELBO:
        with pytest.raises(ModelError, match=r"'z' is discrete .*Trace_ELBO would draw it.*TraceEnum_ELBO"):
            svi.step(Y)
    else:
        svi.step(Y)
        pyro.set_rng_seed(1)
        found = svi.evaluate_loss(Y)
        pyro.set_rng_seed(1)
        by_hand = Elbo(strict_enumeration_warning=False, **options).loss(mixture_by_hand, guide, Y)
        assert found == pytest.approx(by_hand, rel=1e-5)
        assert set(guide(Y)) == {"w", "mu"}


def branching(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(mu, 1.0 if k else 2.0).expand([6]).to_event(1), obs=y)


def sum_of_many(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    total = sum(pyro.sample(f"k_{i}", dist.Bernoulli(0.5)) for i in range(40))
    pyro.sample("y", dist.Normal(mu + total, 1.0), obs=y[0])


def many_alone(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in range(60):
        k = pyro.sample(f"k_{i}", dist.Bernoulli(0.5))
        pyro.sample(f"y_{i}", dist.Normal(mu + k, 1.0), obs=y[0])


def across_plates(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    a, b = pyro.plate("a", 3, dim=-1), pyro.plate("b", 2, dim=-2)
    with a:
        u = pyro.sample("u", dist.Bernoulli(0.5))
    with b:
        v = pyro.sample("v", dist.Bernoulli(0.5))
    with a, b:
        pyro.sample("y", dist.Normal(mu + u + v, 1.0), obs=y.reshape(2, 3))


def undeclared(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(mu + k, torch.ones(6)), obs=y)


def two_scales(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5))
    with pyro.plate("rows", 6, subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(mu + k, 1.0), obs=y[rows])


def support_from_a_choice(y):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    mu = pyro.sample("mu", dist.Uniform(0.0, 1.0 + k))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y[0])


def discrete_alone(y):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(1.0 * k, 1.0), obs=y[0])


def several_entries(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(torch.full((6,), 0.5)).to_event(1))
    pyro.sample("y", dist.Normal(mu + k, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (branching, r"all values of the discrete site 'k' at once.*torch.where"),
        (sum_of_many, r"'k_0', 'k_1', ..., 'k_39' needs a tensor of [\d,]+ numbers.*pyro.markov"),
        (many_alone, r"too many discrete sites.*pyro.plate"),
        (across_plates, r"across these plates.*exponential"),
        (undeclared, r"site 'y' has batch dimension -1 of size 6, which no plate declares"),
        (two_scales, r"'k' and 'y' have the scales 1 and 3"),
        (support_from_a_choice, r"support of latent site 'mu' \(Uniform\) depends on other latents"),
        (discrete_alone, r"all latents are discrete, such as site 'k'.*infer_discrete"),
        (several_entries, r"'k' is discrete \(Independent\).*pyro.plate\(...\)' in place of .to_event"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_whose_discrete_sites_cannot_be_summed_out(model, message):
    with pytest.raises(ModelError, match=message):
        fit(model, Y)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixture", "zero-inflated", "hmm"])
def test_fit_is_that_of_the_form_that_is_summed_by_hand(name):
    """Means and evidence under the weights agree within four standard errors."""
    found, expected = (
        pf.FlowVI(model, seed=0, progress_bar=False).run(BY_HAND[name][2]).importance_sample(10_000, seed=1)
        for model in BY_HAND[name][:2]
    )
    se = (found.log_evidence_se**2 + expected.log_evidence_se**2) ** 0.5
    assert abs(found.log_evidence - expected.log_evidence) < 4 * se + 1e-4
    for site in expected.draws:
        means, variances = [], []
        for weighted in (found, expected):
            w, x = (
                weighted.weights.normalized,
                weighted.draws[site].double().flatten(1).T
                if weighted.draws[site].dim() > 1
                else weighted.draws[site].double()[None],
            )
            means.append((w * x).sum(-1))
            variances.append((w**2 * (x - means[-1][:, None]) ** 2).sum(-1))
        assert ((means[0] - means[1]).abs() < 4 * sum(variances).sqrt()).all()

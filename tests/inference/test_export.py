"""ArviZ data of models whose groups cannot all be drawn or scored, whose data have unusual shapes, or unusual names."""

import warnings

import arviz as az
import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.inference import arviz
from pyroflows.inference.weights import Weights
from pyroflows.models.structure import describe

QUIET = {"num_steps": 50, "seed": 0, "progress_bar": False}
NUM_DRAWS = 100
ALL_GROUPS = {"posterior", "log_likelihood", "posterior_predictive", "prior", "prior_predictive", "observed_data"}
Y = torch.tensor([0.5, 1.0, 2.0, 1.5])


class DensityOnly(dist.TorchDistribution):
    """An exponential distribution without a sampler."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.positive

    def __init__(self, rate):
        self.rate = rate
        super().__init__(rate.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return DensityOnly(self.rate.expand(batch_shape))

    def log_prob(self, value):
        return self.rate.log() - self.rate * value


class SamplerOnly(DensityOnly):
    """An exponential distribution without a density."""

    def expand(self, batch_shape, _instance=None):
        return SamplerOnly(self.rate.expand(batch_shape))

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return torch.rand(torch.Size(sample_shape) + self.rate.shape).log().neg() / self.rate

    def log_prob(self, value):
        raise NotImplementedError


def contents(data) -> dict[str, set[str]]:
    names = data.groups() if callable(data.groups) else [name.strip("/") for name in data.groups if name != "/"]
    return {name: set(data[name].data_vars) for name in names}


def export(model, *args, num_draws=NUM_DRAWS, seed=0, **options):
    """ArviZ data of draws around the middle of the latents' supports, which stand for a posterior."""
    torch.manual_seed(seed)
    draws = {
        site.name: site.bijection.transform(0.1 * torch.randn(num_draws, *site.unconstrained_shape))
        for site in describe(model, args, {}).latents
    }
    return pf.to_arviz(draws, model, args, **options)


def warned(model, *args, **options):
    """The contents of ArviZ data, and the one warning."""
    with pytest.warns(UserWarning, match="the ArviZ data are without") as caught:
        data = export(model, *args, **options)
    (text,) = [str(w.message) for w in caught if "ArviZ" in str(w.message)]
    return contents(data), text


# What cannot be drawn or scored


def with_unsampleable_data(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", DensityOnly(rate), obs=y)


def test_data_without_a_sampler():
    found, text = warned(with_unsampleable_data, Y)
    assert found == {"posterior": {"rate"}, "log_likelihood": {"y"}, "prior": {"rate"}, "observed_data": {"y"}}
    assert "posterior_predictive of 'y' and prior_predictive of 'y', since its distribution DensityOnly" in text
    assert "give the class a method sample" in text
    assert "posterior_predictive=False, prior=False" in text


def test_of_posteriors_and_chains():
    posterior = pf.FlowVI(with_unsampleable_data, **QUIET).run(Y)
    chains = posterior.mcmc(10, num_chains=2, num_warmup=10, seed=0, progress_bar=False)
    for result in (posterior, chains):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = result.to_arviz()
        # Chains do not repeat what was said of their posterior.
        assert [("posterior_predictive of 'y'" in str(w.message), "no sampler" in str(w.message)) for w in caught] == [
            (True, True)
        ] * (result is posterior)
        assert set(contents(data)) == ALL_GROUPS - {"posterior_predictive", "prior_predictive"} | {"sample_stats"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result.to_arviz(posterior_predictive=False, prior=False)
    with pytest.raises(pf.ModelError, match="site 'y' cannot be drawn, since its distribution DensityOnly has no"):
        posterior.predictive(5)


def test_of_weighted_draws():
    """ArviZ knows no weights, so that the draws are resampled by them; coordinates and groups are the posterior's."""

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    posterior = pf.FlowVI(model, coords={"n": "abcd"}, **QUIET).run(Y)
    for weighted in (
        posterior.importance_sample(3000, seed=0, progress_bar=False),
        pf.importance_sample(model, posterior, Y, num_samples=3000, seed=0, progress_bar=False),
    ):
        data = weighted.to_arviz(2000, seed=1)
        assert set(contents(data)) == ALL_GROUPS
        assert list(data["observed_data"]["y"].coords["n"].values) == list("abcd")
        rate = data["posterior"]["rate"].values
        assert rate.shape == (1, 2000) and data["log_likelihood"]["y"].shape == (1, 2000, 4)
        exact = dist.Gamma(2.0 + len(Y), 2.0 + Y.sum())
        assert abs(rate.mean() - exact.mean) < 5 * exact.stddev / 1000**0.5
        again = weighted.to_arviz(2000, log_likelihood=False, posterior_predictive=False, prior=False, seed=1)
        assert (again["posterior"]["rate"].values == rate).all()
        assert set(contents(again)) == {"posterior", "observed_data"}
        with pytest.raises(pf.OptionError, match="labels of the dimension 'm'"):
            weighted.to_arviz(10, coords={"m": [1]})


def test_weights_count_in_arviz_data():
    weights = Weights.smoothed(torch.tensor([0.0, 3.0]).log())
    weighted = pf.inference.WeightedDraws({"x": torch.tensor([[1.0, 2.0], [5.0, 6.0]])}, weights)
    data = weighted.to_arviz(20, coords={"side": ["a", "b"]}, dims={"x": ["side"]})
    assert set(contents(data)) == {"posterior"} and (data["posterior"]["x"].sel(side="b").values == 6.0).all()


def test_other_sites_stay():
    """Those that follow from a site without a sampler do not, whatever a sampler makes of NaN."""

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("n", len(y)):
            u = pyro.sample("u", DensityOnly(rate), obs=y)
            pyro.sample("free", dist.Poisson(rate), obs=y.round())
            pyro.sample("normal", dist.Normal(u, 1.0), obs=y)
            pyro.sample("gamma", dist.Gamma(u, 1.0), obs=y)
            pyro.sample("poisson", dist.Poisson(u), obs=y.round())

    found, text = warned(model, Y)
    assert found["posterior_predictive"] == found["prior_predictive"] == {"free"}
    assert found["log_likelihood"] == {"u", "free", "normal", "gamma", "poisson"}
    assert text.count("since") == 2
    for name in ("normal", "gamma", "poisson"):
        assert f"'{name}'" in text.partition("no sampler")[2]
    assert "since it follows from 'u'" in text


def test_a_prior_without_a_sampler():
    def model(y):
        rate = pyro.sample("rate", DensityOnly(torch.tensor(1.0)))
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.deterministic("both", rate * mean)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mean, rate), obs=y)
            pyro.sample("z", dist.Normal(mean, 1.0), obs=y)

    found, text = warned(model, Y)
    assert found["prior"] == {"mean"}
    assert found["prior_predictive"] == {"z"}
    assert found["posterior_predictive"] == {"y", "z"}
    assert "prior of 'rate', since its distribution DensityOnly has no sampler" in text
    assert "prior of 'both' and prior_predictive of 'y', since it follows from 'rate'" in text


def test_a_flat_prior_beside_a_proper_one():
    def model(y):
        mean = pyro.sample("mean", dist.ImproperUniform(constraints.real, (), ()))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    found, text = warned(model, Y)
    assert found["prior"] == {"scale"}
    assert "prior_predictive" not in found
    assert "prior of 'mean', since its prior is flat" in text


def correlated(y):
    """A correlation that is larger than one at some draws of its prior, 2 % of them."""
    r = pyro.sample("r", dist.Normal(0.0, 0.43))
    one = torch.ones_like(r)
    covariance = torch.stack([torch.stack([one, r], -1), torch.stack([r, one], -1)], -1)
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=y)


def test_a_covariance_that_is_not_positive_definite_at_some_draws():
    found, text = warned(correlated, torch.randn(3, 2), num_draws=1000)
    assert set(found) == ALL_GROUPS - {"prior_predictive"}
    assert found["prior"] == {"r"}
    count = int(text.partition("prior_predictive of 'y', since ")[2].split()[0])
    # P(|r| > 1) = 0.020
    assert abs(count - 20) < 4.5 * 20**0.5


def test_data_that_cannot_be_drawn_at_the_first_draws_of_the_prior():
    """Two thirds of the scales are zero or infinite, and validation refuses them."""

    def model(y):
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 200.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(0.0, log_scale.exp()), obs=y)

    for seed in range(4):
        found, text = warned(model, Y, seed=seed)
        assert found["prior"] == {"log_scale"}
        assert "prior_predictive of 'y'" in text


@pytest.mark.filterwarnings("ignore:the model runs draw by draw")
def test_hidden_markov_models_without_a_duration():
    one = torch.eye(1)

    def discrete(y):
        rates = pyro.sample("rates", dist.Gamma(torch.tensor([2.0, 8.0]), 1.0).to_event(1))
        pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), torch.eye(2), dist.Poisson(rates)), obs=y)

    def gaussian(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        step = dist.MultivariateNormal(torch.zeros(1), one * scale)
        unit = dist.MultivariateNormal(torch.zeros(1), one)
        pyro.sample("y", dist.GaussianHMM(unit, one, step, one, unit), obs=y)

    for model, y in ((discrete, torch.tensor([1.0, 4.0, 2.0])), (gaussian, torch.randn(3, 1))):
        found, text = warned(model, y, num_draws=20)
        assert set(found) == ALL_GROUPS - {"posterior_predictive", "prior_predictive"}
        assert "HMM has no duration (give it duration=" in text


def test_improper_data():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("any", dist.ImproperUniform(constraints.real, (4,), ()), obs=y)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    found, text = warned(model, Y)
    assert found["log_likelihood"] == found["posterior_predictive"] == found["prior_predictive"] == {"y"}
    assert "log_likelihood of 'any', since its distribution ImproperUniform has no density of its own" in text


def test_a_factor_has_nothing_to_predict():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.factor("likelihood", dist.Normal(mean, 1.0).log_prob(y).sum(-1))

    found, text = warned(model, Y)
    assert found == {"posterior": {"mean"}, "prior": {"mean"}}
    assert (
        "log_likelihood of 'likelihood' and posterior_predictive of 'likelihood', since a factor has no values" in text
    )


def test_data_without_a_density():
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", SamplerOnly(rate), obs=y)

    found, text = warned(model, Y)
    assert set(found) == ALL_GROUPS - {"log_likelihood"}
    assert "log_likelihood of 'y', since its distribution SamplerOnly has no log-density" in text


def test_likelihoods_that_are_no_numbers():
    def model(y):
        scale = pyro.sample("scale", dist.Normal(1.0, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)
            pyro.sample("z", dist.Normal(scale, 1.0), obs=y)

    draws = {"scale": torch.tensor([1.0, 2.0, -1.0, 1.0])}
    with pytest.warns(UserWarning, match="log_likelihood of 'y', since it is NaN at 1 of 4 draws"):
        data = pf.to_arviz(draws, model, (Y,), posterior_predictive=False, prior=False)
    assert contents(data)["log_likelihood"] == {"z"}


def test_amortised_fits_without_a_likelihood():
    def model(y=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("n", 4):
            pyro.sample("y", SamplerOnly(rate.expand(4)), obs=y)

    fitted = pf.fit_amortized(model, num_simulations=200, max_epochs=2, seed=0, progress_bar=False)
    posterior = fitted.posterior(Y)
    with pytest.warns(UserWarning, match="log_likelihood of 'y', since the distribution of site 'y'") as caught:
        data = posterior.to_arviz(NUM_DRAWS)
    assert len(caught) == 1
    assert set(contents(data)) == ALL_GROUPS - {"log_likelihood"} | {"sample_stats"}
    assert contents(data)["prior"] == contents(data)["posterior"] == {"rate"}
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "n")
    np.testing.assert_array_equal(data["observed_data"]["y"], Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.to_arviz(NUM_DRAWS, log_likelihood=False, prior=False, posterior_predictive=False)


# Shapes of replicates


def normal_without_plate(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def binomial_without_plate(y):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    pyro.sample("y", dist.Binomial(10, p), obs=y)


def multinomial_without_plate(y):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    pyro.sample("y", dist.Multinomial(6, p), obs=y)


def vectors_without_plate(y):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    pyro.sample("y", dist.MultivariateNormal(mean, torch.eye(2)), obs=y)


def rows_of_a_vector(y):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def plate_without_size(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("rows"):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def columns_in_a_plate(y):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("columns", 2):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def one_value_for_a_plate(y):
    with pyro.plate("rows", 4):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


SHAPES = [
    (normal_without_plate, torch.zeros(30), (30,), (30,)),
    (normal_without_plate, torch.zeros(3, 2), (3, 2), (3, 2)),
    (binomial_without_plate, torch.full((7,), 4.0), (7,), (7,)),
    (multinomial_without_plate, torch.full((7, 3), 2.0), (7, 3), (7,)),
    (vectors_without_plate, torch.zeros(30, 2), (30, 2), (30,)),
    (vectors_without_plate, torch.zeros(5, 2), (5, 2), (5,)),  # as many rows as examples of a batch
    (rows_of_a_vector, torch.zeros(30, 2), (30, 2), (30, 2)),
    (plate_without_size, torch.zeros(30), (30,), (30,)),
    (columns_in_a_plate, torch.zeros(30, 2), (30, 2), (30, 2)),
    (one_value_for_a_plate, torch.zeros(()), (4,), (4,)),
]


@pytest.mark.parametrize(("model", "y", "shape", "rows"), SHAPES)
def test_replicates_have_the_shape_of_the_data(model, y, shape, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = export(model, y)
    assert data["observed_data"]["y"].shape == shape
    for group in ("posterior_predictive", "prior_predictive"):
        assert data[group]["y"].shape == (1, NUM_DRAWS, *shape)
        assert data[group]["y"].dims[2:] == data["observed_data"]["y"].dims
        # Each entry has noise of its own.
        assert np.unique(data[group]["y"].values[0, :5].reshape(5, -1), axis=0).shape[0] == 5
    assert data["log_likelihood"]["y"].shape == (1, NUM_DRAWS, *rows)


def test_replicates_without_a_plate_have_the_right_law():
    """Their mean and sd given the latent; all entries of a draw share the latent, and no more."""
    y = torch.zeros(40)
    data = export(normal_without_plate, y, num_draws=1000)
    noise = data["posterior_predictive"]["y"].values[0] - data["posterior"]["mean"].values[0][:, None]
    assert abs(noise.mean()) < 4.5 / 40_000**0.5
    assert abs(noise.std() - 1) < 4.5 / 80_000**0.5
    correlation = np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]
    assert abs(correlation) < 4.5 / 1000**0.5


def test_prediction_and_chains_have_the_shape_of_the_data():
    posterior = pf.FlowVI(vectors_without_plate, **QUIET).run(torch.randn(30, 2))
    assert posterior.predictive(50)["y"].shape == (50, 30, 2)
    chains = posterior.mcmc(10, num_chains=4, num_warmup=10, seed=0, progress_bar=False)
    assert chains.to_arviz()["posterior_predictive"]["y"].shape == (4, 10, 30, 2)


def test_prediction_at_new_inputs_beside_old_data():
    """The plate says how many rows there are."""

    def line(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    x = torch.arange(4.0)
    posterior = pf.FlowVI(line, **QUIET).run(x, x)
    for num_rows in (1, 3, 7):
        assert posterior.predictive(5, torch.zeros(num_rows), x)["y"].shape == (5, num_rows)


def test_lengths_of_a_plate_without_a_size():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows"):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
            pyro.sample("z", dist.Normal(mean, 1.0), obs=y[:3])

    data = export(model, Y)
    assert export(plate_without_size, Y)["log_likelihood"]["y"].dims == ("chain", "draw", "rows")
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "y_rows")
    assert data["posterior_predictive"]["z"].dims == ("chain", "draw", "z_rows")
    with pytest.raises(pf.OptionError, match="'row' of site 'y'.* several lengths .4 at 'y', 3 at 'z'."):
        export(model, Y, dims={"y": "row", "z": "row"})


def test_counts_are_integers():
    data = export(binomial_without_plate, torch.full((7,), 4.0))
    for group in ("observed_data", "posterior_predictive", "prior_predictive"):
        assert data[group]["y"].dtype == np.int64


# Names


def with_names(y, latent="a", plate="rows", data="y"):
    with pyro.plate(plate, len(y)):
        a = pyro.sample(latent, dist.Normal(0.0, 1.0))
        pyro.sample(data, dist.Normal(a, 1.0), obs=y)


@pytest.mark.parametrize("name", ["chain", "draw"])
def test_names_of_arvizs_own(name):
    with pytest.warns(UserWarning, match=f"plate '{name}' is '{name}_plate'") as caught:
        data = export(with_names, Y, "a", name, coords={name: list("pqrs")})
    assert len(caught) == 1
    assert data["posterior"]["a"].dims == ("chain", "draw", f"{name}_plate")
    assert data["log_likelihood"][f"{name}_plate"].values.tolist() == list("pqrs")
    with pytest.warns(UserWarning, match=f"site '{name}' is '{name}_site'"):
        data = export(with_names, Y, name, dims={name: ["row"]})
    assert data["posterior"][f"{name}_site"].dims == ("chain", "draw", "row")
    assert data["prior"][f"{name}_site"].shape == (1, NUM_DRAWS, 4)


def test_slashes_stay_under_arviz_0():
    data = export(with_names, Y, "scope/a")
    assert contents(data)["posterior"] == {"scope/a"}


@pytest.fixture
def arviz_1(monkeypatch):
    pytest.importorskip("arviz_base")
    pytest.importorskip("arviz_stats")
    chosen = arviz.generations.arviz_1()
    monkeypatch.setattr(arviz.generations, "installed", lambda: chosen)


def test_slashes_under_arviz_1(arviz_1):
    with pytest.warns(UserWarning, match=r"site 'scope/a' is 'scope.a'.* plate 'scope/n' is 'scope.n'"):
        data = export(with_names, Y, "scope/a", "scope/n", "scope/y", coords={"scope/n": list("pqrs")})
    assert contents(data)["posterior"] == {"scope.a"}
    assert data["log_likelihood"]["scope.y"].dims == ("chain", "draw", "scope.n")
    assert data["observed_data"]["scope.n"].values.tolist() == list("pqrs")
    with pytest.raises(pf.OptionError, match="slash"):
        export(with_names, Y, dims={"a": ["group/row"]})


def test_what_is_left_out_under_arviz_1(arviz_1):
    found, _ = warned(with_unsampleable_data, Y)
    assert found == {"posterior": {"rate"}, "log_likelihood": {"y"}, "prior": {"rate"}, "observed_data": {"y"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coords": {"row": list("pqrs")}}, r"a dimension 'row', but the dimensions are \['rows'\]"),
        ({"coords": {"rows": list("pqr")}}, "3 labels of dimension 'rows', which has length 4"),
        ({"dims": {"x": ["row"]}}, r"a site 'x', but the sites are \['a', 'y'\]"),
        ({"dims": {"a": ["row", "column"]}}, r"2 dimensions \['row', 'column'\] of site 'a', which has shape \(4,\)"),
        ({"dims": {"a": ["y"]}}, "dimension of site 'a' 'y', which is the name of a site"),
        ({"dims": {"a": ["chain"]}}, "dimension of site 'a' 'chain', which is the name of a site, or ArviZ's own"),
    ],
)
def test_unknown_names_are_errors(options, message):
    with pytest.raises(pf.OptionError, match=message):
        export(with_names, Y, **options)


def test_labels_of_numbered_dimensions():
    data = export(vectors_without_plate, torch.zeros(3, 2), coords={"mean_dim_0": ["u", "v"], "y_dim_0": [5, 6, 7]})
    assert data["posterior"]["mean_dim_0"].values.tolist() == ["u", "v"]
    assert data["log_likelihood"]["y_dim_0"].values.tolist() == [5, 6, 7]


@pytest.mark.parametrize("num_chains", [0, 3])
def test_numbers_of_chains(num_chains):
    with pytest.raises(pf.OptionError, match=f"num_chains={num_chains} divides"):
        pf.to_arviz({"a": torch.zeros(10)}, num_chains=num_chains)


# What ArviZ does with the data


def hierarchy(y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", 4):
        a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("repeats", 3):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def masked(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("n", len(y)), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y.nan_to_num())


def regression(y, x=torch.linspace(-1, 1, 12)[:, None] ** torch.arange(3)):  # noqa: B008
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0).to_event(1), obs=y)


def several(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(rate, 1.0), obs=y)
        pyro.sample("count", dist.Poisson(rate), obs=y.abs().round())


FITS = {
    "hierarchy": (hierarchy, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), 12),
    "reparametrised": (
        poutine.reparam(hierarchy, {"a": LocScaleReparam(0.0)}),
        torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        12,
    ),
    "masked": (masked, torch.tensor([0.5, torch.nan, 1.0, -1.0, torch.nan]), 3),
    "regression": (regression, torch.randn(12, 2, generator=torch.Generator().manual_seed(0)), 12),
    "several": (several, Y, 4),
}


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.filterwarnings("ignore")  # ArviZ's, of k-hat and of variances
def test_loo_waic_and_ppc(kind):
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    model, y, num_rows = FITS[kind]
    data = pf.FlowVI(model, **QUIET).run(y).to_arviz(num_samples=200)
    name = "y" if kind == "several" else None
    assert az.loo(data, var_name=name, pointwise=True).n_data_points == num_rows
    assert np.isfinite(az.loo(data, var_name=name).elpd_loo)
    assert az.waic(data, var_name=name).n_data_points == num_rows
    for group in ("posterior", "prior"):
        az.plot_ppc(data, group=group, num_pp_samples=5)
    plt.close("all")


@pytest.mark.filterwarnings("ignore")
def test_fits_are_compared():
    """A model of the mean against one that has it at zero, at data far from zero."""

    def at_zero(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)
            pyro.sample("count", dist.Poisson(scale), obs=y.abs().round())

    y = 5 + torch.randn(10, generator=torch.Generator().manual_seed(0))
    data = {model.__name__: pf.FlowVI(model, **QUIET).run(y).to_arviz(500, prior=False) for model in (several, at_zero)}
    for name in ("y", "count"):
        assert az.compare(data, var_name=name).index[0] == "several"
    only = {name: d.copy() for name, d in data.items()}
    for d in only.values():
        d.log_likelihood = d.log_likelihood.drop_vars("count")
    assert az.compare(only).index[0] == "several"

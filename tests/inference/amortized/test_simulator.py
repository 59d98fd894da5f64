"""Models of every kind as simulators: arguments, several sites, no likelihood, and what cannot be simulated."""

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine

import pyroflows as pf
from pyroflows.inference.amortized.simulator import Simulator
from pyroflows.progress import Progress

matplotlib.use("Agg")

QUICK = {"num_simulations": 400, "max_epochs": 2, "seed": 0, "progress_bar": False}
RNG = np.random.default_rng(0)
X = torch.linspace(-1.0, 1.0, 6)


def small(dim, context_dim):
    return pf.flows.NSF(dim, num_layers=2, hidden_dims=(32,), autoregressive=True, context_dim=context_dim)


def regression(x, y=None, total=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        y = pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)
    pyro.sample("count", dist.Poisson(slope.exp()), obs=total)


def of_data(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_covariates_are_arguments_that_stay():
    fitted = pf.fit_amortized(regression, ["y", "count"], args=(X,), **QUICK)
    posterior = fitted.posterior({"y": X, "count": 2})
    assert sorted(posterior.sample(3)) == ["slope"]
    assert posterior.predictive(3)["y"].shape == (3, 6)
    # New inputs are arguments, as for any posterior.
    assert posterior.predictive(3, torch.zeros(9))["count"].shape == (3,)
    assert posterior.khat < 1


def test_several_sites_are_concatenated_in_the_order_of_their_names():
    data = Simulator.of(regression, ["count", "y"], None, (X,), {}).data
    rows = data.rows(data.read({"y": X, "count": 7}))
    assert rows.tolist() == [7.0, *X.tolist()]
    values = data.by_site(rows[None])
    assert values["count"].shape == (1,) and values["y"].shape == (1, 6)


def test_simulations_follow_the_prior_predictive():
    simulator = Simulator.of(regression, ["y", "count"], None, (X,), {})
    slope, rows, _ = simulator.draws(4000, Progress(False))
    assert abs(slope.mean()) < 4.5 / 4000**0.5
    # Var y_j = x_j^2 + 0.25, and given the slope the noise is independent of it.
    noise = rows[:, :6] - slope * X
    torch.testing.assert_close(noise.std(0), torch.full((6,), 0.5), rtol=0, atol=0.5 * 4.5 / 8000**0.5)
    assert abs((noise * slope).mean()) < 4.5 * 0.5 / 24000**0.5


def test_a_model_that_needs_its_data_takes_a_placeholder():
    fitted = pf.fit_amortized(of_data, args=(torch.full((5,), 100.0),), **QUICK)
    posterior = fitted.posterior(torch.ones(5))
    mu = torch.tensor([[0.3], [-2.0]])
    expected = dist.Normal(0.0, 1.0).log_prob(mu[:, 0]) + 5 * dist.Normal(mu[:, 0], 1.0).log_prob(torch.tensor(1.0))
    torch.testing.assert_close(posterior.log_joint(mu), expected)


def test_a_missing_argument_is_named():
    with pytest.raises(pf.OptionError, match="needs a value of 'x'"):
        pf.fit_amortized(regression, ["y", "count"], **QUICK)
    with pytest.raises(pf.OptionError, match="takes its data as an argument needs a value of their shape"):
        pf.fit_amortized(of_data, **QUICK)


def test_arrays_are_arguments():
    simulator = Simulator.of(regression, ["y", "count"], None, (X.double().numpy(),), {})
    assert simulator.draws(30, Progress(False))[1].shape == (30, 7)


def test_the_data_of_a_series_are_many_sites():
    def series(steps):
        state, rate = torch.zeros(()), pyro.sample("rate", dist.Uniform(-1.0, 1.0))
        for t in range(steps):
            state = pyro.sample(f"y{t}", dist.Normal(rate * state, 1.0))

    names = [f"y{t}" for t in range(3)]
    fitted = pf.fit_amortized(series, names, args=(3,), **QUICK)
    posterior = fitted.posterior({"y0": 1.0, "y1": 2.0, "y2": 3.0})
    u = torch.tensor([[0.3]])
    (values, ladj), law = posterior.layout.constrain(u), dist.Normal(0.0, 1.0)
    rate = values["rate"]
    expected = ladj - torch.tensor(2.0).log() + law.log_prob(torch.tensor(1.0))
    expected = expected + law.log_prob(2.0 - rate) + law.log_prob(3.0 - 2.0 * rate)
    torch.testing.assert_close(posterior.log_joint(u), expected)


def test_masked_data_do_not_count():
    def masked(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("N", 3), poutine.mask(mask=torch.tensor([True, True, False])):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fitted = pf.fit_amortized(masked, **QUICK)
    first, second = (fitted.posterior([1.0, 0.0, last]) for last in (torch.nan, 3.0))
    torch.testing.assert_close(first._center, second._center)
    u = torch.randn(3, 1)
    torch.testing.assert_close(first.log_joint(u), second.log_joint(u))


# No likelihood


class Shift(dist.TorchDistribution):
    """A law that can be drawn from and has no density."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, loc, by_numpy=False):
        self.loc, self.by_numpy = loc, by_numpy
        super().__init__(loc.shape[:-1], loc.shape[-1:])

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        shape = (*sample_shape, *self.loc.shape)
        noise = torch.from_numpy(np.random.normal(size=shape)).float() if self.by_numpy else torch.randn(shape)  # noqa: NPY002
        return self.loc + 0.5 * noise


def implicit(y=None, by_numpy=False):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("twice", 2 * theta)
    # Indices from the left are wrong under an outer plate, and nothing shows it.
    shift = torch.stack([theta[0], theta[0] + theta[1]])
    pyro.sample("y", Shift(shift, by_numpy), obs=y)


@pytest.mark.parametrize("by_numpy", [False, True])
def test_simulations_without_a_density_are_right(by_numpy):
    simulator = Simulator.of(implicit, "y", None, (), {"by_numpy": by_numpy})
    theta, rows, _ = simulator.draws(1000, Progress(False))
    noise = rows - torch.stack([theta[:, 0], theta.sum(1)], 1)
    torch.testing.assert_close(noise.std(0), torch.full((2,), 0.5), rtol=0, atol=0.5 * 4.5 / 2000**0.5)
    assert noise.unique(dim=0).shape == noise.shape


def test_a_posterior_without_a_likelihood_says_so():
    fitted = pf.fit_amortized(implicit, flow=small, **{**QUICK, "num_simulations": 2000, "max_epochs": 20})
    assert "posteriors have no verdict: the distribution of site 'y' (Shift) has no log_prob" in repr(fitted)
    posterior = fitted.posterior([1.0, 0.0])
    assert isinstance(posterior, pf.Posterior)
    assert "no verdict: the likelihood cannot be evaluated, since the distribution of site 'y' (Shift)" in str(
        posterior
    )
    draws = posterior.sample(4000)
    # theta_0 and theta_0 + theta_1 are seen with noise of 0.5.
    precision = torch.eye(2) + 4 * torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    expected = torch.linalg.solve(precision, 4 * torch.tensor([1.0, 0.0]))
    assert (draws["theta"].mean(0) - expected).abs().max() < 0.2
    assert list(posterior.summary().index) == ["theta[0]", "theta[1]"]
    assert posterior.log_prob(draws).shape == (4000,)
    predicted = posterior.predictive(5)
    assert predicted["y"].shape == (5, 2) and predicted["twice"].shape == (5, 2)
    for ask in (
        lambda: posterior.khat,
        lambda: posterior.log_evidence,
        posterior.diagnose,
        posterior.mcmc,
        posterior.distill,
        posterior.fit_proposal,
        posterior.bridge_sample,
        lambda: posterior.importance_sample(10),
    ):
        with pytest.raises(pf.ModelError, match="the likelihood cannot be evaluated, since"):
            ask()


def test_pairs_are_plotted_without_a_likelihood():
    posterior = pf.fit_amortized(implicit, **QUICK).posterior([1.0, 0.0])
    figure = posterior.plot_pairs(num_samples=50)
    labels = {axis.get_xlabel() for axis in figure.axes} | {axis.get_ylabel() for axis in figure.axes}
    assert labels >= {"theta[0]", "theta[1]"}


def nuisance(y=None):
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    label = pyro.sample("label", dist.Bernoulli(0.5))
    noise = pyro.sample("noise", dist.Normal(0.0, 0.1))
    pyro.deterministic("sum", theta + noise)
    pyro.sample("y", dist.Normal(theta + 4.0 * label, 0.5), obs=y)


def test_latents_that_are_not_inferred_belong_to_the_simulator():
    options = {**QUICK, "num_simulations": 2000, "max_epochs": 20}
    posterior = pf.fit_amortized(nuisance, flow=small, latents=["theta"], **options).posterior(4.5)
    # The law is a mixture, and nearly all of it comes with the label.
    assert abs(posterior.sample(4000)["theta"].mean() - 0.4) < 0.15
    assert sorted(posterior.predictive(5)) == ["label", "noise", "sum", "y"]
    with pytest.raises(pf.ModelError, match="'label' is not inferred"):
        posterior.diagnose()


def test_a_deterministic_site_can_be_observed():
    fitted = pf.fit_amortized(nuisance, "sum", latents=["theta"], **QUICK)
    assert fitted.posterior(0.5).sample(3)["theta"].shape == (3,)

    def pushed(y=None):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Delta(theta.square().sum()), obs=y)

    posterior = pf.fit_amortized(pushed, **QUICK).posterior(0.5)
    assert "site 'y' follows from other sites without noise of its own" in str(posterior)


def test_a_simulator_may_have_other_sites_in_each_run():
    def dynamic(y=None):
        theta, total = pyro.sample("theta", dist.Normal(0.0, 1.0)), 0.0
        for i in range(3):
            total = total + pyro.sample(f"step{i}", dist.Normal(0.0, 1.0))
            if total > 0:
                break
        pyro.sample("y", dist.Normal(theta + total, 0.5), obs=y)

    fitted = pf.fit_amortized(dynamic, latents=["theta"], **QUICK)
    assert fitted.posterior(1.0).sample(3)["theta"].shape == (3,)


# What cannot be simulated


def test_simulations_that_are_not_finite_are_left_out():
    def rooted(y=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal((theta + 1).sqrt(), 0.1), obs=y)

    with pytest.warns(UserWarning, match=r"6\d of 400 simulations failed, or are not finite, and are left out"):
        fitted = pf.fit_amortized(rooted, **QUICK)
    assert fitted.num_simulations + fitted.num_left_out == 400 and f"{fitted.num_left_out} more left out" in repr(
        fitted
    )

    def hopeless(y=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal((theta - 1).sqrt(), 0.1), obs=y)

    with pytest.raises(pf.DataError, match="a posterior cannot be learned from the rest"):
        pf.fit_amortized(hopeless, **QUICK)


def test_runs_that_fail_are_left_out():
    def failing(y=None):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        if theta.item() < -1:
            raise ValueError("no solution")
        pyro.sample("y", dist.Normal(theta, 0.1), obs=y)

    with pytest.warns(UserWarning, match="simulations failed"):
        fitted = pf.fit_amortized(failing, **QUICK)
    assert fitted.num_left_out > 30


def factor():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -(x**2))
    pyro.sample("y", dist.Normal(x, 1.0))


def flat():
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(x, 1.0))


def without_prior():
    with pyro.plate("rows", 2), poutine.mask(mask=torch.tensor([True, False])):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x.sum(), 1.0))


def subsampled():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 10, subsample_size=5):
        pyro.sample("y", dist.Normal(x, 1.0))


def powered():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.5):
        pyro.sample("y", dist.Normal(x, 1.0))


def twice_observed():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(x, 1.0), obs=torch.tensor(1.0))
    pyro.sample("y", dist.Normal(x, 1.0))


def growing():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0).expand([1 + int(x > 0)]).to_event(1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (factor, "the factor 'penalty' changes the law of the latents"),
        (flat, "the prior of site 'x' is flat"),
        (without_prior, "the prior of site 'x' is flat"),
        (subsampled, "plate 'rows' is subsampled"),
        (powered, "site 'y' has a scale"),
        (twice_observed, "site 'z' is observed too, but not named"),
        (nuisance, r"'label' is discrete .*name the ones to infer by latents=\[\.\.\.\]"),
        (growing, "in one simulation and .* in another"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_models_that_cannot_be_simulated_are_refused(model, message):
    with pytest.raises(pf.ModelError, match=message):
        pf.fit_amortized(model, **QUICK)


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(pf.ModelError, match=r"no site 'z' to observe: its sites are \['mu', 'y'\]"):
        pf.fit_amortized(of_data, "z", args=(torch.zeros(2),), **QUICK)
    with pytest.raises(pf.OptionError, match=r"latents names 'y', but the latents of the model are \['mu'\]"):
        pf.fit_amortized(of_data, latents=["y"], args=(torch.zeros(2),), **QUICK)
    with pytest.raises(pf.OptionError, match="observed must be the name of a site"):
        pf.fit_amortized(of_data, 3, args=(torch.zeros(2),), **QUICK)


def test_data_outside_of_the_support_are_refused():
    def counts(y=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Poisson(rate).expand([3]).to_event(1), obs=y)

    fitted = pf.fit_amortized(counts, **QUICK)
    with pytest.raises(pf.DataError, match="the value of site 'y' is not in the support"):
        fitted.posterior([1.0, 2.0, -1.0])

    def bounded(y=None):
        top = pyro.sample("top", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Uniform(0.0, top).expand([10]).to_event(1), obs=y)

    # Most draws of a poor flow have density zero, which is no fault of the data.
    fitted = pf.fit_amortized(bounded, **QUICK)
    assert fitted.posterior(torch.linspace(0.1, 1.5, 10)).diagnose().num_non_finite > 5000
    with (
        pytest.raises(pf.DataError, match="the model refuses these data"),
        pytest.warns(UserWarning, match="far outside"),
    ):
        fitted.posterior(torch.full((10,), -1.0)).khat  # noqa: B018


def whole_mask(y=None):
    with poutine.mask(mask=False):
        mu = pyro.sample("mu", dist.Normal(3.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def partial_mask(y=None):
    with pyro.plate("N", 3):
        with poutine.mask(mask=torch.tensor([True, False, True])):
            mu = pyro.sample("mu", dist.Normal(3.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def mask_of_a_latent(y=None):
    with pyro.plate("N", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=w > 0):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (whole_mask, "the prior of site 'mu' is flat where it is masked"),
        (partial_mask, "the prior of site 'mu' is flat where it is masked"),
        (mask_of_a_latent, "the mask of site 'y' differs"),
    ],
)
def test_masks_that_simulations_do_not_follow_are_refused(model, words):
    with pytest.raises(pf.ModelError, match=words):
        Simulator.of(model, "y", None, (), {})


def test_masked_latents_without_a_posterior_are_padding():
    def padded(y=None):
        mask = torch.tensor([True, False, True])
        with pyro.plate("N", 3), poutine.mask(mask=mask):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    assert Simulator.of(padded, "y", None, (), {}).no_likelihood is None


@pytest.mark.parametrize("noise", [lambda: torch.randn(3), lambda: torch.tensor(RNG.standard_normal(3)).float()])
def test_noise_outside_of_sites_leaves_no_likelihood(noise):
    def noisy(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("N", 3):
            pyro.sample("y", dist.Normal(mu + noise(), 1.0), obs=y)

    fitted = pf.fit_amortized(noisy, flow=small, **QUICK)
    assert "posteriors have no verdict: site 'y' has another log-density in each run" in repr(fitted)
    assert "no verdict" in repr(fitted.posterior([1.0, 2.0, 3.0]))


def test_arguments_must_be_a_tuple():
    with pytest.raises(pf.OptionError, match="args must be a tuple of arguments, as in args=\\(x,\\), got"):
        pf.fit_amortized(regression, ["y", "count"], args=X, **QUICK)


def test_a_missing_site_can_be_recorded():
    with pytest.raises(pf.ModelError, match="becomes a site by pyro.deterministic\\('z', value\\)"):
        pf.fit_amortized(regression, "z", args=(X,), **QUICK)

"""Calibration of exact conjugate posteriors, of the same with planted errors, and of fits of every kind."""

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from scipy import stats

import pyroflows as pf
from pyroflows.inference.calibration import uniformity
from pyroflows.inference.calibration.fits import Draws
from pyroflows.inference.calibration.quantities import Quantities
from pyroflows.inference.calibration.simulation import simulate
from pyroflows.inference.weights import Weights

matplotlib.use("Agg")
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
COVARIANCE = torch.linalg.inv(X.T @ X + torch.eye(3))
FACTOR = torch.linalg.cholesky(COVARIANCE)


def regression(x, y=None):
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal((x * slopes[..., None, :]).sum(-1), 1.0), obs=y)


def posterior_of(y, num_samples=1000, scale=1.0, shift=0.0, columns=slice(None)):
    centered = torch.randn(num_samples, 3) @ FACTOR.T
    centered[:, columns] = scale * centered[:, columns] + shift * COVARIANCE.diag().sqrt()[columns]
    return {"slopes": COVARIANCE @ X.T @ y + centered}


def calibrate(fit, seed=0, **options):
    return pf.sbc(regression, fit, X, seed=seed, progress_bar=False, **options)


def exact(model):
    return posterior_of(model.data["y"])


def with_error(**error):
    return lambda model: posterior_of(model.data["y"], **error)


def scalar(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def scalar_posterior(model, num_samples=500):
    y = model.data["y"]
    return {"mu": y.sum() / (len(y) + 1) + torch.randn(num_samples) / (len(y) + 1) ** 0.5}


def test_an_exact_fit_is_calibrated_and_its_ranks_are_uniform():
    calibration = calibrate(lambda model: posterior_of(model.data["y"], 99), num_datasets=400)
    assert "(400 data sets, 99 draws each;" in str(calibration)
    assert calibration.is_calibrated and calibration.verdict == "calibrated"
    ranks = calibration.ranks["slopes"]
    assert ranks.shape == (400, 3) and ranks.min() >= 0 and ranks.max() <= 99
    # The mean of uniform ranks has standard error sqrt((100^2 - 1) / 12 / 400).
    assert np.abs(ranks.mean(0) - 49.5).max() < 4 * (9999 / 12 / 400) ** 0.5


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_stated():
    rejected = [not calibrate(exact, seed, num_datasets=20, num_samples=50).is_calibrated for seed in range(40)]
    assert sum(rejected) <= stats.binom.ppf(0.999, 40, 0.05)


def test_p_values_are_adjusted_by_weighted_holm():
    pairs = [(0.02, 2.0), (0.001, 1.0), (0.03, 1.0)]
    tests = [uniformity.Test("x", "shift", p_value, weight) for p_value, weight in pairs]
    # Ratios 0.01, 0.001 and 0.03 times the weights that are left: 0.001 * 4, 0.01 * 3, 0.03 * 1.
    np.testing.assert_allclose(uniformity.adjusted(tests), [0.03, 0.004, 0.03])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ({"scale": 1.3}, "together are too wide"),
        ({"scale": 1 / 1.3}, "together are too narrow"),
        ({"shift": 0.45}, "together are shifted up"),
        ({"shift": -0.45}, "together are shifted down"),
        ({"scale": 1.5, "columns": [1]}, "'slopes[1]' is too wide (its sd is"),
        ({"shift": -0.6, "columns": [2]}, "'slopes[2]' is shifted down by"),
    ],
)
def test_a_planted_error_is_named(error, words):
    calibration = calibrate(with_error(**error))
    assert not calibration.is_calibrated
    assert calibration.verdict.startswith("not calibrated: ") and words in calibration.verdict
    table = calibration.table()
    # A mean of 100 normal scores has standard error 0.1, the logarithm of their sd has 1 / sqrt(200).
    for i, row in enumerate(table.to_dict("records")[:3]):
        is_off = i in error.get("columns", range(3))
        right_shift, right_ratio = is_off * error.get("shift", 0.0), error.get("scale", 1.0) if is_off else 1.0
        assert abs(row["shift"] - right_shift) < 4 * 0.1 * max(1.0, right_ratio)
        assert abs(np.log(row["sd ratio"] / right_ratio)) < 4 / 200**0.5


def test_a_fit_that_ignores_the_data_is_seen_by_the_log_likelihood_alone():
    calibration = calibrate(lambda model: {"slopes": torch.randn(1000, 3)})
    assert calibration.verdict == (
        "not calibrated: the log-likelihood of the true values is higher than that of the draws (the fit makes too "
        "little of the data, or is too wide)"
    )


def test_a_skewed_fit_is_seen_by_its_shape():
    def skewed(model):
        mean = COVARIANCE @ X.T @ model.data["y"]
        noise = (torch.rand(1000, 3) < 0.1) * torch.randn(1000, 3).abs() * 12 - 0.2
        return {"slopes": mean + noise * COVARIANCE.diag().sqrt()}

    assert not calibrate(skewed).is_calibrated


def test_data_of_the_arguments_are_replaced():
    y = torch.full((5,), 1e3)
    calibration = pf.sbc(scalar, scalar_posterior, y, seed=0, progress_bar=False)
    assert calibration.is_calibrated and torch.equal(y, torch.full((5,), 1e3))
    assert pf.sbc(scalar, scalar_posterior, np.zeros(5), seed=0, progress_bar=False).is_calibrated


def test_objects_with_a_posterior_get_one_value_or_a_dictionary():
    class Amortized:
        def posterior(self, y):
            return posterior_of(y)

    assert calibrate(Amortized()).is_calibrated

    def two(num, y=None, w=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", num):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            pyro.sample("w", dist.Normal(mu, 1.0), obs=w)

    class AmortizedOfTwo:
        def posterior(self, data):
            return {"mu": (data["y"] + data["w"]).sum() / 9 + torch.randn(500) / 3}

    calibration = pf.sbc(two, AmortizedOfTwo(), 4, observed=["y", "w"], seed=1, progress_bar=False)
    assert calibration.is_calibrated


def test_weighted_draws_and_chains_count_by_their_effective_number():
    def weighted(model):
        wide = posterior_of(model.data["y"], 4000, scale=1.5)
        u = torch.linalg.solve_triangular(FACTOR, (wide["slopes"] - posterior_mean(model)).T, upper=False)
        log_weights = -0.5 * u.square().sum(0) + 0.5 * u.square().sum(0) / 1.5**2
        return pf.inference.WeightedDraws(wide, Weights.smoothed(log_weights))

    def posterior_mean(model):
        return COVARIANCE @ X.T @ model.data["y"]

    calibration = calibrate(weighted)
    assert calibration.is_calibrated and calibration.ranks["slopes"].max() <= 4000

    def chains(model):
        # Autoregressive chains of order one with coefficient 0.9 around the exact mean.
        noise = torch.randn(2, 400, 3)
        states = [torch.randn(2, 3)]
        for step in range(399):
            states.append(0.9 * states[-1] + (1 - 0.81) ** 0.5 * noise[:, step])
        draws = posterior_mean(model) + torch.stack(states, 1) @ FACTOR.T
        return pf.inference.Chains({"slopes": draws}, {}, "hmc", None, None)

    assert calibrate(chains, num_datasets=60).is_calibrated


def test_angles_are_ranked_from_their_mean_direction():
    def model(y=None):
        angle = pyro.sample("angle", dist.VonMises(3.0, 2.0))
        pyro.sample("y", dist.VonMises(angle, 3.0), obs=y)

    def fit(scale, shift=0.0):
        def posterior(model):
            y = model.data["y"]
            real, imaginary = 2 * np.cos(3.0) + 3 * y.cos(), 2 * np.sin(3.0) + 3 * y.sin()
            mean, concentration = torch.atan2(imaginary, real), torch.hypot(real, imaginary)
            turn = dist.VonMises(torch.zeros(()), concentration).sample((500,))
            return {"angle": torch.remainder(mean + shift + scale * turn + torch.pi, 2 * torch.pi) - torch.pi}

        return posterior

    assert pf.sbc(model, fit(1.0), observed="y", seed=0, progress_bar=False).is_calibrated
    # The mean direction lies where angles jump from pi to -pi.
    assert "'angle' is shifted up" in pf.sbc(model, fit(1.0, 0.4), observed="y", seed=0, progress_bar=False).verdict
    assert "'angle' is too narrow" in pf.sbc(model, fit(0.6), observed="y", seed=0, progress_bar=False).verdict


def test_levels_of_coverage_count_draws_that_are_nearer_to_a_draw_from_the_prior():
    simulations = simulate(scalar, (torch.zeros(5),), {}, (), None, 30)
    prior = torch.cat([simulations.latents["mu"], simulations.references["mu"]]).double()
    low, median, high = prior.quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    draws = torch.linspace(-2, 2, 100)

    def place(mu):
        return ((mu - median) / (high - low)).asinh()

    quantities = Quantities(simulations, None, np.random.default_rng(0))
    for number in range(30):
        found = quantities.levels(number, Draws({"mu": draws}, np.full(100, 0.01), 100.0))[-1]
        reference = place(simulations.references["mu"][number])
        distance = (place(simulations.latents["mu"][number]) - reference).abs()
        nearer = ((place(draws) - reference).abs() < distance).sum().item()
        assert nearer / 101 - 1e-9 <= found <= (nearer + 1) / 101 + 1e-9


def test_simulators_without_a_likelihood_are_calibrated_without_it():
    class Simulator(dist.TorchDistribution):
        arg_constraints: dict = {}  # noqa: RUF012
        support = torch.distributions.constraints.real

        def __init__(self, loc):
            self.loc = loc
            super().__init__(loc.shape, validate_args=False)

        def sample(self, sample_shape=()):
            return self.loc + torch.randn((*sample_shape, *self.batch_shape))

    def model(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", Simulator(mu), obs=y)

    def of_delta(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Delta(mu + pyro.sample("noise", dist.Normal(0.0, 1.0))), obs=y)

    def fit(model):
        mu = model.data["y"] / 2 + torch.randn(500) / 2**0.5
        return {"mu": mu, "noise": model.data["y"] - mu}

    for simulator in (model, of_delta):
        calibration = pf.sbc(simulator, fit, observed="y", seed=0, progress_bar=False)
        assert calibration.is_calibrated and calibration.others == ["coverage (TARP)"]
        assert "the log-likelihood has no ranks" in str(calibration)


def test_constant_components_are_left_out():
    def model(y=None):
        factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=y)

    calibration = pf.sbc(
        model,
        lambda model: {"factor": dist.LKJCholesky(2, 1.0).sample((50,))},
        observed="y",
        progress_bar=False,
        seed=0,
    )
    assert calibration.labels[:2] == ["factor[1, 0]", "factor[1, 1]"]
    assert calibration.ranks["factor"].shape == (100, 2, 2)


def test_failed_fits_are_counted_and_named():
    def failing(every):
        count = iter(range(1000))

        def fit(model):
            if next(count) % every == every - 1:
                raise RuntimeError("no convergence")
            return exact(model)

        return fit

    few = calibrate(failing(40))
    assert few.is_calibrated and list(few.failures) == [39, 79]
    assert few.ranks["slopes"].shape == (98, 3) and few.num_datasets == 100
    assert "2 fits failed and are left out: the first at data set 39 with RuntimeError: no convergence" in str(few)
    many = calibrate(failing(10))
    assert many.verdict.startswith("not calibrated: 10 of 100 fits failed (the first at data set 9 with RuntimeError")
    with pytest.raises(pf.ModelError, match="first 3 data sets all failed, the last with RuntimeError: no conv"):
        calibrate(failing(1))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (3, "a fit must return a posterior, weighted draws, chains, or a dictionary of draws by site, got int"),
        ({"other": torch.zeros(5)}, r"no draws of latent site 'slopes', only of \['other'\]"),
        ({"slopes": torch.zeros(5, 2)}, r"site 'slopes' have shape \(5, 2\), not \(number of draws, \*\(3,\)\)"),
        ({"slopes": torch.full((5, 3), torch.nan)}, "draws of site 'slopes' are not all finite"),
    ],
)
def test_unusable_results_are_named(result, words):
    with pytest.raises(pf.ModelError, match=words):
        calibrate(lambda model: result)


def test_what_cannot_be_simulated_is_refused():
    y = torch.zeros(4)

    def factor(y):
        scalar(y)
        pyro.factor("penalty", torch.tensor(-1.0))

    def flat(y):
        pyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
        scalar(y)

    def subsampled(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    def parametrised(y):
        pyro.param("bias", torch.zeros(()))
        scalar(y)

    def discrete(y):
        pyro.sample("k", dist.Poisson(3.0))
        scalar(y)

    def infinite(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.LogNormal(mu, 1.0), obs=y)

    refused = {
        factor: "the factor 'penalty' changes the law of the latents",
        flat: "prior of site 'scale' is flat",
        subsampled: "plate 'rows' is subsampled",
        parametrised: r"parameters of its own \['bias'\]",
        discrete: r"latent site 'k' is discrete.* by latents=\[...\]",
        infinite: "draws of site 'y' from the model's prior hold values that are not finite",
        poutine.scale(scalar, 0.5): "has a scale, which simulations do not follow",
    }
    for model, words in refused.items():
        with pytest.raises(pf.FlowError, match=words):
            pf.sbc(model, scalar_posterior, y, progress_bar=False)


def test_a_model_without_data_is_told_what_would_be_data():
    def by_factor(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("likelihood", dist.Normal(mu, 1.0).log_prob(y))

    def by_site(values):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(mu, 1.0), obs=values)

    with pytest.raises(pf.ModelError, match=r"pyro.factor\('likelihood', ...\) has no law to draw data from.*obs="):
        pf.sbc(by_factor, scalar_posterior, torch.tensor(1.0), progress_bar=False)
    with pytest.raises(pf.OptionError, match=r"\['mu', 'z'\] are latent: .* as in observed=\"z\""):
        pf.sbc(by_site, scalar_posterior, None, progress_bar=False)


def test_sites_are_data_by_convention_or_by_name():
    def model(z, w=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(mu, 1.0), obs=z)
        pyro.sample("w", dist.Normal(mu, 1.0), obs=w)

    seen = []

    def fit(model):
        seen.append(sorted(model.data))
        return {"mu": torch.randn(50), "w": torch.randn(50)}

    options = {"num_datasets": 10, "progress_bar": False}
    pf.sbc(model, fit, **options)  # neither argument is given
    pf.sbc(model, fit, torch.zeros(()), **options)
    pf.sbc(model, fit, observed="w", latents=["mu"], **options)
    assert [seen[0], seen[10], seen[20]] == [["w", "z"], ["z"], ["w"]]


def test_some_of_the_latents_can_be_part_of_the_simulator():
    def model(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        count = pyro.sample("count", dist.Bernoulli(0.5))  # discrete, and without effect
        pyro.deterministic("y", mu + pyro.sample("noise", dist.Normal(0.0, 1.0)) + 0 * count)

    def fit(model):
        return {"mu": model.data["y"] / 2 + torch.randn(500) / 2**0.5}

    calibration = pf.sbc(model, fit, observed="y", latents="mu", seed=0, progress_bar=False)
    assert calibration.is_calibrated and calibration.labels == ["mu", "coverage (TARP)"]
    assert "it is an integral over 'count'" in str(calibration)


def test_options_are_checked():
    def unnamed(data=None):
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=data)

    with pytest.raises(pf.OptionError, match="the model observes nothing with these arguments"):
        pf.sbc(unnamed, exact, progress_bar=False)
    with pytest.raises(pf.OptionError, match=r"does not run without a value of \['y'\]"):
        pf.sbc(scalar, exact, progress_bar=False)
    with pytest.raises(pf.OptionError, match=r"does not run without a value of \['x'\]"):
        pf.sbc(regression, exact, progress_bar=False)
    with pytest.raises(pf.OptionError, match="the FlowVI has another model"):
        calibrate(pf.FlowVI(lambda x, y=None: regression(x, y)))
    with pytest.raises(pf.OptionError, match=r"it has no \['z'\]"):
        calibrate(exact, observed="z")
    with pytest.raises(pf.OptionError, match=r"but \['z'\] are none"):
        calibrate(exact, latents=["z"])
    with pytest.raises(pf.OptionError, match="num_datasets must be at least 10"):
        calibrate(exact, num_datasets=5)
    with pytest.raises(pf.OptionError, match="fit must be a FlowVI, an object with posterior"):
        calibrate(3)
    with pytest.raises(pf.OptionError, match="guide of this FlowVI is made of a model"):
        calibrate(pf.FlowVI(regression, pf.guides.AutoIAF(regression)))


def test_a_seed_reproduces_and_leaves_global_state_alone():
    state = torch.get_rng_state()
    pyro.get_param_store()["kept"] = torch.ones(2)

    def fit(model):
        pyro.param("of the fit", torch.zeros(3))
        assert "kept" not in pyro.get_param_store()
        return exact(model)

    first, second = (calibrate(fit, num_datasets=20).levels for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, calibrate(fit, 1, num_datasets=20).levels)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store().keys()) == ["kept"]


def test_the_table_and_the_pictures_show_every_quantity():
    calibration = calibrate(with_error(shift=1.0, columns=[1]))
    labels = ["slopes[0]", "slopes[1]", "slopes[2]", "log-likelihood", "coverage (TARP)"]
    table = calibration.table()
    assert list(table.index) == labels
    assert table.loc["slopes[1]", "adjusted p"] < 0.001 < table.loc["slopes[0]", "p KS"]
    text = str(calibration)
    assert all(label in text for label in labels) and text.endswith(calibration.verdict)
    figure = calibration.plot()
    assert figure.get_suptitle().startswith("not calibrated: 'slopes[1]' is shifted up")
    axes = figure.axes
    assert [axis.get_title() for axis in axes] == ["slopes (3 components)", "log-likelihood", "coverage (TARP)"]
    (entry,) = axes[0].get_legend().get_texts()
    assert entry.get_text() == f"slopes[1]: shift {table.loc['slopes[1]', 'shift']:+.2f} sd"
    colors = [line.get_color() for line in axes[0].lines if len(line.get_xdata()) > 2]
    assert colors == ["0.35", "C1", "0.35"]
    covered = calibration.plot_coverage().axes[0].lines[1].get_ydata()
    assert covered[0] == 0 and covered[-1] == 1


def test_many_components_are_cut_in_print_alone():
    def model(y=None):
        with pyro.plate("rows", 50):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def fit(model):
        return {"mu": model.data["y"] / 2 + torch.randn(200, 50) / 2**0.5}

    calibration = pf.sbc(model, fit, observed="y", seed=0, progress_bar=False)
    assert calibration.is_calibrated and len(calibration.table()) == 52
    assert "(22 more rows with larger p-values are in .table())" in str(calibration)


def test_flow_vi_is_calibrated():
    def model(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    vi = pf.FlowVI(model, lambda dim: pf.flows.Gaussian(dim), num_steps=150, num_starts=1, progress_bar=False)
    calibration = pf.sbc(model, vi, observed="y", num_datasets=10, seed=0, progress_bar=False)
    assert calibration.is_calibrated and not calibration.failures
    assert vi.model is model and vi.seed is None


def test_a_posterior_is_no_way_of_fitting():
    def model(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    posterior = pf.FlowVI(model, num_starts=1, progress_bar=False).run(torch.tensor(1.0))
    with pytest.raises(pf.OptionError, match="give what makes it, such as the FlowVI itself"):
        pf.sbc(model, posterior, progress_bar=False)


def test_an_amortized_fit_says_what_is_data_and_what_is_inferred():
    def model(x, y=None):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("values", dist.Normal(slope * x, scale), obs=y)

    def affine(dim, context_dim):
        return pf.flows.MAF(dim, num_layers=1, hidden_dims=(8,), context_dim=context_dim)

    options = {"num_simulations": 200, "max_epochs": 1, "seed": 0, "progress_bar": False}
    args = (torch.ones(3),)
    fitted = pf.fit_amortized(model, ["values"], flow=affine, latents=["slope"], args=args, **options)
    calibration = pf.sbc(model, fitted, num_datasets=10, num_samples=50, seed=0, progress_bar=False)
    assert list(calibration.ranks) == ["slope"] and not calibration.failures


def test_ranks_of_angles_are_uniform_with_few_draws():
    def model(y=None):
        mu = pyro.sample("mu", dist.VonMises(0.0, 0.01))
        pyro.sample("y", dist.Normal(0.0 * mu, 1.0), obs=y)

    def fit(model):
        return {"mu": dist.VonMises(0.0, 0.01).sample((10,))}

    # If the circle were cut opposite to the mean of the draws alone, this would be called too narrow.
    assert pf.sbc(model, fit, num_datasets=500, num_samples=10, seed=0, progress_bar=False).is_calibrated


def test_a_function_that_gives_the_same_flow_does_not_go_on_from_fit_to_fit():
    def model(y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    flow = pf.flows.NSF(1, num_layers=1, hidden_dims=(4,))
    before = [p.detach().clone() for p in flow.parameters()]
    vi = pf.FlowVI(model, lambda dim: flow, num_steps=2, num_starts=1)
    pf.sbc(model, vi, num_datasets=10, num_samples=10, seed=0, progress_bar=False)
    assert all(map(torch.equal, before, flow.parameters()))

"""Fits of models whose posterior is known exactly."""

import math
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule, PyroSample
from torch.distributions import constraints

from pyroflows import FlowVI, ModelError
from pyroflows.flows import IAF, MAF, Planar, Radial
from pyroflows.guides import AutoCNF, AutoFlow, AutoIAF, AutoPlanar, AutoRadial, AutoResidual, AutoSylvester

NUM_DRAWS = 20_000
SLOW = pytest.mark.slow


def fit(model, *args, num_steps=700, **options):
    options = {"seed": 0, "progress_bar": False, **options}
    return FlowVI(model, num_steps=num_steps, **options).run(*args)


def draws_of(posterior, num_draws=NUM_DRAWS):
    torch.manual_seed(1)
    return posterior.sample(num_draws)


def assert_moments(draws, mean, covariance, by_mean=0.05, by_covariance=0.06):
    """Mean and covariance of ``(S, D)`` in units of standard deviations, up to a bias and 4 standard errors."""
    draws, mean, covariance = draws.double(), mean.double(), covariance.double()
    sd = covariance.diagonal().sqrt()
    error = (draws.mean(0) - mean) / sd
    assert error.abs().max() < by_mean + 4 / math.sqrt(len(draws)), error
    error = (torch.cov(draws.T).reshape(covariance.shape) - covariance) / (sd * sd[:, None])
    products = (draws - draws.mean(0))[:, :, None] * (draws - draws.mean(0))[:, None, :] / (sd * sd[:, None])
    assert (error.abs() < by_covariance + 4 * products.std(0) / math.sqrt(len(draws))).all(), error


def assert_evidence(posterior, log_evidence, gap=0.02):
    """The importance estimate, and the ELBO, which lies below by no more than ``gap``."""
    log_evidence = float(log_evidence)
    assert abs(posterior.log_evidence - log_evidence) < 0.02 + 3 * posterior.log_evidence_se
    rounding = 1e-4  # where the flow is exact, and the standard error next to nothing
    assert posterior.elbo < log_evidence + 3 * posterior.elbo_se + rounding
    assert posterior.elbo > log_evidence - gap - 3 * posterior.elbo_se - rounding


# Linear regression


def regression(x, y):
    b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.Normal((b * x).sum(-1), 0.5), obs=y)


@dataclass(frozen=True)
class Gaussian:
    """Data with a Gaussian posterior, of correlation -0.7."""

    x: torch.Tensor
    y: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor
    log_evidence: torch.Tensor


def gaussian_posterior(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    x[:, 1] += x[:, 0]
    y = x @ torch.tensor([1.0, -2.0]).double() + 0.5 * torch.randn(20, generator=generator, dtype=torch.float64)
    covariance = torch.linalg.inv(torch.eye(2) + x.T @ x / 0.25)
    mean = covariance @ x.T @ y / 0.25
    marginal = dist.MultivariateNormal(torch.zeros(20).double(), 0.25 * torch.eye(20) + x @ x.T)
    return Gaussian(x.to(dtype), y.to(dtype), mean, covariance, marginal.log_prob(y))


# What can be a Gaussian comes closer to it than what cannot.
EXACT, CLOSE = 0.06, 0.15
GUIDES = {
    "default": (None, EXACT),
    "planar": (partial(AutoPlanar, regression, num_layers=8), CLOSE),
    "radial": (partial(AutoRadial, regression, num_layers=8), CLOSE),
    "sylvester": (partial(AutoSylvester, regression, num_layers=3), CLOSE),
    "cnf": (partial(AutoCNF, regression, hidden_dims=(16, 16), num_steps=4), CLOSE),
    "residual": (partial(AutoResidual, regression, num_blocks=2), CLOSE),
    "flow_fn": (lambda: partial(IAF, num_layers=2, hidden_dims=(32,)), EXACT),
}


@SLOW
def test_linear_regression_by_a_guide_that_draws_by_iteration():
    exact = gaussian_posterior()
    posterior = fit(regression, exact.x, exact.y, guide=AutoResidual(regression, num_blocks=2, parallel="scoring"))
    assert_moments(draws_of(posterior)["b"], exact.mean, exact.covariance, by_covariance=CLOSE)
    assert_evidence(posterior, exact.log_evidence, gap=0.1)


@pytest.mark.parametrize(
    ("make", "by_covariance"),
    [
        pytest.param(*case, marks=[SLOW] * (name in ("radial", "sylvester", "cnf")), id=name)
        for name, case in GUIDES.items()
    ],
)
def test_linear_regression(make, by_covariance):
    exact = gaussian_posterior()
    posterior = fit(regression, exact.x, exact.y, guide=make and make())
    assert_moments(draws_of(posterior)["b"], exact.mean, exact.covariance, by_covariance=by_covariance)
    assert_evidence(posterior, exact.log_evidence, gap=0.02 if by_covariance == EXACT else 0.1)


@SLOW
@pytest.mark.parametrize("estimator", ["total", "path"])
@pytest.mark.parametrize("flow_fn", [partial(IAF, num_layers=2, hidden_dims=(32,)), partial(Radial, num_layers=6)])
def test_estimators(estimator, flow_fn):
    exact = gaussian_posterior()
    posterior = fit(regression, exact.x, exact.y, guide=flow_fn, estimator=estimator)
    by_covariance, gap = (EXACT, 0.02) if flow_fn.func is IAF else (CLOSE, 0.1)
    assert_moments(draws_of(posterior)["b"], exact.mean, exact.covariance, by_covariance=by_covariance)
    assert_evidence(posterior, exact.log_evidence, gap=gap)


def test_the_path_gradient_comes_closer():
    """Where the flow can be exact, its noise vanishes."""
    exact = gaussian_posterior()
    flow_fn = partial(IAF, num_layers=2, hidden_dims=(32,))
    histories = [
        fit(regression, exact.x, exact.y, guide=flow_fn, estimator=estimator).history for estimator in ("total", "path")
    ]
    total, path = (history["log_weight_variance"][-50:].mean() for history in histories)
    assert path < total / 2


@SLOW
def test_without_num_steps():
    exact = gaussian_posterior()
    posterior = fit(regression, exact.x, exact.y, num_steps=None, gate=False)
    assert_moments(draws_of(posterior)["b"], exact.mean, exact.covariance)
    assert_evidence(posterior, exact.log_evidence)
    assert posterior.history["learning_rate"][-1] < 1e-3 * posterior.history["learning_rate"].max()


def test_float64_data():
    exact = gaussian_posterior(torch.float64)
    posterior = fit(regression, exact.x, exact.y)
    draws = draws_of(posterior)["b"]
    assert draws.dtype == torch.float64
    assert_moments(draws, exact.mean, exact.covariance)
    assert_evidence(posterior, exact.log_evidence)


def test_dtype_of_the_fit():
    exact = gaussian_posterior()
    posterior = fit(regression, exact.x, exact.y, dtype=torch.float64)
    draws = draws_of(posterior)["b"]
    assert draws.dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in posterior.guide.flow.parameters())
    assert_moments(draws, exact.mean, exact.covariance)
    assert_evidence(posterior, exact.log_evidence)


@pytest.mark.slow
def test_one_particle_a_step():
    """The path gradient has no noise where the flow is exact, so that one draw a step suffices."""
    exact = gaussian_posterior()
    flow_fn = partial(IAF, num_layers=2, hidden_dims=(32,))
    posterior = fit(regression, exact.x, exact.y, guide=flow_fn, num_particles=1, num_steps=2000, estimator="path")
    assert_moments(draws_of(posterior)["b"], exact.mean, exact.covariance)
    assert_evidence(posterior, exact.log_evidence)


@pytest.mark.slow
def test_one_latent():
    """One dimension, where many flow libraries fail."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("N", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 4.0])
    posterior = fit(model, y)
    variance = 1 / (3 + 0.01)
    assert_moments(draws_of(posterior)["mean"][:, None], torch.tensor([7 * variance]), torch.tensor([[variance]]))
    marginal = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 100.0)
    assert_evidence(posterior, marginal.log_prob(y))


# Shapes that are no Gaussian


def banana():
    x1 = pyro.sample("x1", dist.Normal(0.0, 1.0))
    pyro.sample("x2", dist.Normal(x1**2, 0.5))


@pytest.mark.slow
def test_banana():
    posterior = fit(banana, num_steps=2000)
    draws = draws_of(posterior)
    x = torch.stack([draws["x1"], draws["x2"]], -1)
    assert_moments(x, torch.tensor([0.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 2.25]]), by_covariance=0.15)
    # The bend itself: x2 - x1^2 is Normal(0, 0.5) whatever x1.
    rest = x[:, 1] - x[:, 0] ** 2
    assert abs(rest.mean()) < 0.05
    assert rest.std() == pytest.approx(0.5, rel=0.1)
    assert_evidence(posterior, 0.0)


def potential(z):
    """Two modes on a ring (Rezende and Mohamed 2015, table 1, the first)."""
    ring = 0.5 * ((z.norm(dim=-1) - 2) / 0.4) ** 2
    return ring - torch.logaddexp(-0.5 * ((z[..., 0] - 2) / 0.6) ** 2, -0.5 * ((z[..., 0] + 2) / 0.6) ** 2)


def two_modes():
    z = pyro.sample("z", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    pyro.factor("potential", -potential(z))


def log_density_of_two_modes(z):
    return dist.Normal(0.0, 3.0).log_prob(z).sum(-1) - potential(z)


def best_gaussian_elbo(log_density, start):
    """By quadrature over the base, and descent from a given mean."""
    axis = torch.linspace(-5, 5, 81, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    weights = dist.Normal(0.0, 1.0).log_prob(z).sum(-1).softmax(0)
    mean = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    raw = torch.tensor([-1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([mean, raw], max_iter=300, line_search_fn="strong_wolfe")

    def elbo():
        tril = torch.stack([raw[0].exp(), raw[0] * 0, raw[1], raw[2].exp()]).reshape(2, 2)
        x = mean + z @ tril.T
        entropy = raw[0] + raw[2] + 1 + math.log(2 * math.pi)
        return (weights * log_density(x)).sum() + entropy

    def closure():
        optimizer.zero_grad()
        loss = -elbo()
        loss.backward()
        return loss

    optimizer.step(closure)
    return elbo().item()


@SLOW
def test_planar_flows_find_both_modes():
    axis = torch.linspace(-6, 6, 601, dtype=torch.float64)
    log_evidence = log_density_of_two_modes(torch.cartesian_prod(axis, axis)).logsumexp(0) + 2 * math.log(0.02)
    guide = AutoPlanar(two_modes, num_layers=16, init_scale=1.0)
    # Reverse KL is content with one mode; from this seed it finds both.
    posterior = fit(two_modes, guide=guide, num_steps=1500, seed=3)
    z = draws_of(posterior)["z"]
    right = (z[:, 0] > 0).double().mean()
    assert 0.4 < right < 0.6
    for side in (z[z[:, 0] > 0], z[z[:, 0] < 0]):
        assert side.norm(dim=-1).mean() == pytest.approx(2.0, abs=0.15)
        assert side[:, 1].mean() == pytest.approx(0.0, abs=0.15)
    assert_evidence(posterior, log_evidence, gap=0.1)
    gaussian = max(best_gaussian_elbo(log_density_of_two_modes, start) for start in ([2.0, 0.1], [0.0, 0.1]))
    assert gaussian < log_evidence - math.log(2)  # one mode of two, and that one is bent
    assert posterior.elbo > gaussian + 0.5


# Constrained latents


def gamma_poisson(y):
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def test_gamma_poisson():
    y = torch.tensor([0.0, 2.0, 1.0, 3.0])
    posterior = fit(gamma_poisson, y)
    shape, rate = 3.0 + y.sum(), 2.0 + len(y)
    rates = draws_of(posterior)["rate"]
    assert (rates > 0).all()
    assert_moments(rates[:, None], (shape / rate)[None], (shape / rate**2)[None, None])
    log_evidence = (
        3 * math.log(2.0) - math.lgamma(3.0) + torch.lgamma(shape) - shape * math.log(rate) - torch.lgamma(y + 1).sum()
    )
    assert_evidence(posterior, log_evidence)


def dirichlet_multinomial(counts):
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), p), obs=counts)


@SLOW
def test_dirichlet_multinomial():
    counts = torch.tensor([5.0, 0.0, 3.0])
    posterior = fit(dirichlet_multinomial, counts, num_steps=1200)
    concentration = torch.tensor([1.0, 2.0, 3.0]) + counts
    exact = dist.Dirichlet(concentration)
    p = draws_of(posterior)["p"]
    assert p.sum(-1).tolist() == pytest.approx([1.0] * NUM_DRAWS, abs=1e-5)
    total = concentration.sum()
    covariance = (torch.diag(exact.mean) - exact.mean[:, None] * exact.mean) / (total + 1)
    assert_moments(p, exact.mean, covariance, by_covariance=0.08)
    marginal = dist.DirichletMultinomial(torch.tensor([1.0, 2.0, 3.0]), 8)
    assert_evidence(posterior, marginal.log_prob(counts))


@pytest.mark.slow
def test_half_bounded_uniform():
    """A posterior that ends at a bound: the larger of the data."""

    def model(y):
        top = pyro.sample("top", dist.Pareto(y.max(), 1.0))
        with pyro.plate("N", len(y)):
            pyro.sample("y", dist.Uniform(0.0, top, validate_args=False), obs=y)

    y = torch.tensor([1.0, 2.0, 0.5, 1.5, 0.3])
    # One dimension of an affine autoregressive flow is Gaussian; planar layers bend it.
    posterior = fit(model, y, guide=partial(Planar, num_layers=8), num_steps=1200)
    top = draws_of(posterior)["top"]
    assert (top >= 2.0).all()
    # Pareto(2, 6): its logarithm over 2 is exponential.
    logs = (top / 2).log().double()
    assert_moments(logs[:, None], torch.tensor([1 / 6]), torch.tensor([[1 / 36]]), by_covariance=0.15)
    assert_evidence(posterior, math.log(1 / 6) - 5 * math.log(2.0))


# Parts of the data


def normal_mean(y, subsample_size=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("N", len(y), subsample_size=subsample_size) as index:
        pyro.deterministic("shift", mean + 1)
        pyro.deterministic("residual", y[index] - mean)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])


@pytest.fixture(scope="module")
def subsampled():
    torch.manual_seed(3)
    y = 2.0 + torch.randn(40)
    return y, fit(normal_mean, y, 20, num_steps=1500)


@pytest.mark.slow
def test_training_on_parts_finds_the_whole(subsampled):
    y, posterior = subsampled
    variance = 1 / (40 + 0.01)
    # The mean of 20 rows differs from that of 40 by one posterior standard deviation; the decay averages it.
    draws = draws_of(posterior)["mean"][:, None]
    assert_moments(draws, y.sum()[None] * variance, torch.tensor([[variance]]), by_mean=0.3, by_covariance=0.15)


@pytest.mark.parametrize(
    "ask",
    [
        *(attrgetter(name) for name in ("elbo", "elbo_se", "khat", "ess", "log_evidence", "log_evidence_se")),
        lambda p: p.importance_sample(100),
        lambda p: p.to_arviz(),
        lambda p: p.diagnose(),
    ],
)
def test_parts_have_no_evidence(subsampled, ask):
    _, posterior = subsampled
    with pytest.raises(ModelError, match=r"plate 'N' is subsampled \(20 of 40 rows\).*with_data"):
        ask(posterior)


def test_parts_have_draws_and_a_summary(subsampled):
    _, posterior = subsampled
    draws = posterior.sample(50)
    # In each run "residual" stands for other rows, so that these are draws of nothing.
    assert draws.keys() == {"mean", "shift"}
    assert torch.equal(draws["shift"], draws["mean"] + 1)
    assert list(posterior.summary().index) == ["mean", "shift"]
    assert "plate N is subsampled" in repr(posterior)
    assert posterior.log_prob(draws).shape == (50,)


def test_with_data_gives_the_whole(subsampled):
    y, posterior = subsampled
    whole = posterior.with_data(y)
    marginal = dist.MultivariateNormal(torch.zeros(40), torch.eye(40) + 100.0)
    assert abs(whole.log_evidence - marginal.log_prob(y)) < 0.02 + 3 * whole.log_evidence_se
    assert whole.elbo < whole.log_evidence
    assert whole.importance_sample(500).ess > 100
    assert whole.diagnose().num_samples == posterior.num_diagnostic_samples
    assert whole.to_arviz(num_samples=100)["log_likelihood"]["y"].shape == (1, 100, 40)
    assert whole.sample(10)["residual"].shape == (10, 40)
    assert "verdict" in repr(whole)


# Parameters of the model


def empirical_bayes(y):
    """theta_i ~ Normal(location, scale), y_i ~ Normal(theta_i, 1): marginally y_i ~ Normal(location, scale^2 + 1)."""
    location = pyro.param("location", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("N", len(y)):
        theta = pyro.sample("theta", dist.Normal(location, scale))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


EMPIRICAL_Y = torch.tensor([-3.0, 0.0, 2.0, 5.0])


@SLOW
@pytest.mark.parametrize("estimator", ["total", "path"])
def test_parameters_of_the_model_are_trained(estimator):
    y = EMPIRICAL_Y
    flow_fn = partial(IAF, num_layers=2, hidden_dims=(16,))
    posterior = fit(empirical_bayes, y, guide=flow_fn, num_steps=1500, estimator=estimator)
    location, variance = y.mean(), y.var(correction=0) - 1
    assert pyro.param("location").item() == pytest.approx(location.item(), abs=0.05)
    assert pyro.param("scale").item() == pytest.approx(variance.sqrt().item(), rel=0.03)
    shrink = variance / (1 + variance)
    exact = location + shrink * (y - location)
    covariance = shrink * torch.eye(4)
    assert_moments(draws_of(posterior)["theta"], exact, covariance, by_mean=0.1, by_covariance=0.1)
    assert_evidence(posterior, dist.Normal(location, (1 + variance).sqrt()).log_prob(y).sum(), gap=0.05)


class Network(PyroModule):
    """A neural network in the model."""

    def __init__(self):
        super().__init__()
        self.net = PyroModule[torch.nn.Linear](1, 1)
        self.offset = PyroSample(dist.Normal(0.0, 0.1))

    def forward(self, x, y):
        mean = self.net(x).squeeze(-1) + self.offset[..., None]
        pyro.sample("y", dist.Normal(mean, 0.1).to_event(1), obs=y)


@pytest.mark.parametrize("local", [False, True], ids=["store", "module_local_params"])
def test_parameters_of_a_pyro_module_are_trained(local):
    """Whether Pyro's store has them or the module alone."""
    x = torch.linspace(-1, 1, 10)[:, None]
    with pyro.settings.context(module_local_params=local):
        model = Network()
        fit(model, x, 2 * x[:, 0] - 1, guide=partial(IAF, num_layers=1, hidden_dims=(8,)), num_steps=1000)
    assert model.net.weight.item() == pytest.approx(2.0, abs=0.02)
    assert model.net.bias.item() == pytest.approx(-1.0, abs=0.05)


# Other things that FlowVI takes


def test_a_guide_goes_on_from_where_it_was():
    """A second run of the same guide starts at what the first found."""
    exact = gaussian_posterior()
    guide = AutoIAF(regression, num_layers=2, hidden_dims=(32,))
    fit(regression, exact.x, exact.y, guide=guide, num_steps=400)
    second = fit(regression, exact.x, exact.y, guide=guide, num_steps=30)
    assert second.history["elbo"][:5].mean() > exact.log_evidence - 1.0


def test_initial_values_of_the_guide():
    guide = AutoFlow(banana, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"x1": torch.tensor(3.0)}))
    posterior = fit(banana, guide=guide, num_steps=1, optimizer=partial(torch.optim.SGD, lr=1e-9))
    assert posterior.sample(500)["x1"].mean() == pytest.approx(3.0, abs=4 * 0.1 / math.sqrt(500))


@pytest.mark.parametrize(
    "optimizer",
    [partial(torch.optim.AdamW, lr=0.02, weight_decay=0.0), pyro.optim.Adam({"lr": 0.02})],
    ids=["torch", "pyro"],
)
def test_optimizers(optimizer):
    exact = gaussian_posterior()
    posterior = fit(regression, exact.x, exact.y, optimizer=optimizer)
    assert posterior.history["learning_rate"].max() == pytest.approx(0.02)
    assert_moments(draws_of(posterior)["b"], exact.mean, exact.covariance)


@SLOW
def test_a_student_base():
    """Heavy tails of the posterior from heavy tails of the base, whose degrees of freedom are learned."""

    def model():
        pyro.sample("x", dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1))

    flow_fn = partial(MAF, num_layers=2, hidden_dims=(16,), base="student_t")
    posterior = fit(model, guide=flow_fn, num_steps=1500, optimizer=partial(torch.optim.Adam, lr=0.03))
    df = posterior.guide.flow.base().base_dist.df
    assert df.tolist() == pytest.approx([3.0, 3.0], rel=0.15)
    assert_evidence(posterior, 0.0)
    far = (draws_of(posterior)["x"].abs() > 4.0).double().mean().item()
    assert far == pytest.approx(0.0280, rel=0.15)  # P(|t_3| > 4)

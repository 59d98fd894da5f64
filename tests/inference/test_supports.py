"""Posteriors of angles, of mass at the edge of a support, and of supports behind transforms, against exact values."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TransformedDistribution as Transformed
from torch.distributions import AffineTransform

import pyroflows as pf
from pyroflows.constraints import wrapped
from pyroflows.errors import DivergedError, ModelError
from pyroflows.inference.search.circles import find_centers
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe

NUM_ANGLES = 20_000


def _fit(model, *args, **options):
    pyro.clear_param_store()
    return pf.FlowVI(model, seed=0, progress_bar=False, **options).run(*args)


def _check_evidence(posterior, exact):
    """The standard error of a good fit is below the error of an approximation to be noticed, 0.02 nats."""
    assert posterior.log_evidence == pytest.approx(exact, abs=5 * posterior.log_evidence_se + 0.003)
    assert posterior.log_evidence_se < 0.02


def _log_mass_on_circle(log_prob):
    angles = torch.linspace(-math.pi, math.pi, NUM_ANGLES + 1, dtype=torch.float64)[:-1]
    return (log_prob(angles).logsumexp(0) + math.log(2 * math.pi / NUM_ANGLES)).item()


def from_cosines(y):
    phi = pyro.sample("phi", dist.VonMises(torch.tensor(3.0), torch.tensor(1.0)))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(torch.cos(phi), 0.5), obs=y)


COSINES = torch.tensor([-0.7, -0.4, -0.9, -0.2])


@pytest.fixture(scope="module")
def of_cosines():
    return _fit(from_cosines, COSINES)


def test_angle_has_one_period(of_cosines):
    """f1: the posterior has two modes on the circle, and has been counted in every period of the line."""
    _check_evidence(of_cosines, -2.409)
    phi = of_cosines.sample(20_000)["phi"]
    assert phi.abs().max() <= math.pi
    assert of_cosines.diagnose().verdict == "good"


def test_chains_of_an_angle_mix(of_cosines):
    chains = of_cosines.mcmc(100, num_chains=16, num_warmup=100, seed=0, progress_bar=False)
    assert chains.rhat["phi"] < 1.05
    assert chains.draws["phi"].abs().max() <= math.pi
    exact = of_cosines.importance_sample(20_000).resample(20_000)["phi"].cos()
    draws = chains.draws["phi"].cos()
    assert draws.mean().item() == pytest.approx(exact.mean().item(), abs=0.05)


def test_center_is_saved(of_cosines, tmp_path):
    path = tmp_path / "posterior.safetensors"
    of_cosines.save(path)
    loaded = pf.load_posterior(path, from_cosines, COSINES)
    torch.testing.assert_close(loaded.layout.centers, of_cosines.layout.centers)
    assert loaded.elbo == pytest.approx(of_cosines.elbo, abs=1e-5)
    again = of_cosines.with_data(COSINES)
    assert again.elbo == pytest.approx(of_cosines.elbo, abs=1e-5)
    weighted = pf.importance_sample(from_cosines, of_cosines, COSINES, num_samples=4000, progress_bar=False)
    assert weighted.log_evidence == pytest.approx(of_cosines.log_evidence, abs=5 * weighted.log_evidence_se)
    assert weighted.ess > 3500


@pytest.mark.slow
def test_distilled_flow_has_the_same_center(of_cosines):
    distilled = of_cosines.distill(num_steps=1, warm_start=1, seed=0, progress_bar=False)
    torch.testing.assert_close(distilled.layout.centers, of_cosines.layout.centers)
    torch.testing.assert_close(distilled.guide.layout.centers, of_cosines.layout.centers)


def test_densities_of_draws_are_those_on_the_circle(of_cosines):
    draws = of_cosines.sample(1000)
    grid = torch.linspace(-math.pi, math.pi, 4001)[1:]
    mass = of_cosines.log_prob({"phi": grid}).exp().mean() * 2 * math.pi
    assert mass.item() == pytest.approx(1.0, abs=0.01)
    assert of_cosines.log_prob(draws).isfinite().all()


def test_arviz_data_has_angles(of_cosines):
    data = of_cosines.to_arviz(100)
    assert abs(data["posterior"]["phi"].values).max() <= math.pi


def mean_direction(y):
    mean = pyro.sample("mean", dist.VonMises(torch.tensor(0.0), torch.tensor(0.01)))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.VonMises(mean, 2.0), obs=y)


def test_mean_direction_opposite_to_the_prior():
    """The posterior lies at the cut of the first layout, and is a Gaussian after another cut."""
    torch.manual_seed(0)
    y = dist.VonMises(torch.tensor(3.1), 2.0).sample((30,))

    def log_prob(angles):
        prior = dist.VonMises(torch.tensor(0.0).double(), torch.tensor(0.01).double()).log_prob(angles)
        return prior + dist.VonMises(angles[:, None], torch.tensor(2.0).double()).log_prob(y.double()).sum(1)

    posterior = _fit(mean_direction, y)
    _check_evidence(posterior, _log_mass_on_circle(log_prob))
    assert len(posterior.starts.modes) == 1
    assert (posterior.layout.centers["mean"] - 3.1).cos() > 0.8


def alone_on_a_circle():
    pyro.sample("phi", dist.VonMises(torch.tensor(0.0), torch.tensor(0.5)))


def alone_on_a_torus():
    pyro.sample("phi", dist.SineBivariateVonMises(1.0, -2.0, 2.0, 3.0, 1.0))


def skewed():
    base = dist.VonMises(torch.tensor([3.0]), torch.tensor([1.0])).to_event(1)
    pyro.sample("phi", dist.SineSkewed(base, torch.tensor([0.7])))


def flat_circle():
    pyro.sample("phi", dist.VonMises(torch.tensor(0.0), torch.tensor(0.5)).mask(False))


@pytest.mark.parametrize(
    ("model", "exact"),
    [
        (alone_on_a_circle, 0.0),
        (flat_circle, math.log(2 * math.pi)),
        pytest.param(alone_on_a_torus, 0.0, marks=pytest.mark.slow),
        pytest.param(skewed, 0.0, marks=pytest.mark.slow),
    ],
)
def test_prior_on_circles_has_its_mass(model, exact):
    _check_evidence(_fit(model), exact)


def binomial(k):
    p = pyro.sample("p", dist.Beta(0.1, 0.1))
    pyro.sample("k", dist.Binomial(20, p), obs=k)


@pytest.mark.slow
@pytest.mark.parametrize("k", [20.0, 0.0])
def test_mass_at_the_edge(k):
    """f2: half of the mass lies where float32 has no number but the edge; both edges are mirror images."""
    posterior = _fit(binomial, torch.tensor(k), num_steps=600)
    assert posterior.log_evidence == pytest.approx(-1.026, abs=0.05)
    p = posterior.importance_sample(20_000).resample(20_000)["p"]
    error = 1 - p if k else p
    assert (error < 1e-4).float().mean().item() == pytest.approx(0.564, abs=0.03)


def beta_alone():
    pyro.sample("p", dist.Beta(0.05, 0.05))


def gamma_alone():
    pyro.sample("p", dist.Gamma(0.1, 0.1))


def simplex_alone():
    pyro.sample("p", dist.Dirichlet(0.05 * torch.ones(3)))


def categories(counts):
    p = pyro.sample("p", dist.Dirichlet(0.1 * torch.ones(3)))
    pyro.sample("n", dist.Multinomial(10, probs=p), obs=counts)


def depends_on_another():
    """The concentration of the prior is a latent itself."""
    a = pyro.sample("a", dist.LogNormal(-2.0, 0.3))
    with pyro.plate("n", 2):
        pyro.sample("p", dist.Beta(a, a))


@pytest.mark.parametrize("model", [beta_alone, depends_on_another, gamma_alone, simplex_alone])
def test_unconstrained_prior_has_its_mass(model):
    """The mean of p / q over draws from a wide q, in which no edge can hide, is one."""
    layout = Layout(describe(model, (), {}))
    torch.manual_seed(0)
    loc, scale = torch.zeros(layout.dim), torch.full((layout.dim,), 20.0)
    if model is depends_on_another:
        loc[layout.slices["a"]], scale[layout.slices["a"]] = -2.0, 0.5
    q = dist.StudentT(3.0, loc, scale).to_event(1)
    log_joint = LogJoint(model, (), {}, layout, torch.zeros(5, layout.dim))
    u = q.sample((40_000,))
    weights = (log_joint.in_chunks(u) - q.log_prob(u)).double().exp()
    assert weights.mean().item() == pytest.approx(1.0, abs=5 * weights.std().item() / 200)
    assert weights.std() < 10


@pytest.mark.parametrize("mode", ["plate", "vmap", "loop"])
def test_logs_reach_the_model_however_it_runs(mode):
    def model():
        a = pyro.sample("a", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("n", 3):
            pyro.sample("p", dist.Beta(a[..., :1], a[..., 1:]).to_event(1))
            pyro.sample("r", dist.Dirichlet(a))

    layout = Layout(describe(model, (), {}))
    log_joint = LogJoint(model, (), {}, layout, torch.zeros(5, layout.dim))
    u = 50 * torch.randn(4, layout.dim)
    u[:, layout.slices["a"]] = torch.randn(4, 2)
    expected = log_joint(u)
    log_joint.batched.mode = mode
    torch.testing.assert_close(log_joint(u), expected)
    torch.testing.assert_close(log_joint(u.double()).float(), expected)
    torch.testing.assert_close(log_joint.in_chunks(u), expected)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(10.0, 0.0, 0.0), (0.0, 0.0, 10.0), (5.0, 5.0, 0.0)])
def test_counts_of_categories(counts):
    exact = dist.DirichletMultinomial(0.1 * torch.ones(3), 10).log_prob(torch.tensor(counts)).item()
    _check_evidence(_fit(categories, torch.tensor(counts)), exact)


@pytest.mark.slow
@pytest.mark.parametrize("model", [beta_alone, simplex_alone])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prior_at_the_edges_has_its_mass(model, dtype):
    _check_evidence(_fit(model, dtype=dtype), 0.0)


@pytest.mark.parametrize(
    "base",
    [
        dist.Beta(2.0, 3.0),
        dist.HalfNormal(1.0),
        pytest.param(dist.Exponential(1.0), marks=pytest.mark.slow),
        pytest.param(dist.Gamma(2.0, 1.0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_support_behind_a_static_transform(base):
    """A balance of one minus a debt has no density above one."""
    y = torch.tensor([-0.3, -0.6])

    def model():
        balance = pyro.sample("balance", Transformed(base, [AffineTransform(1.0, -1.0)]))
        with pyro.plate("n", 2):
            pyro.sample("y", dist.Normal(balance - 1.0, 0.5), obs=y)

    step, end = 1e-5, 1.0 if isinstance(base, dist.Beta) else 30.0
    debt = torch.arange(step / 2, end, step, dtype=torch.float64)
    log_p = base.log_prob(debt) + sum(dist.Normal(-debt, 0.5).log_prob(value.double()) for value in y)
    posterior = _fit(model)
    _check_evidence(posterior, (log_p.logsumexp(0) + math.log(step)).item())
    assert (posterior.sample(1000)["balance"] <= 1).all()


def test_centers_lie_opposite_to_the_lowest_density():
    def model(y):
        m = pyro.sample("m", dist.VonMises(torch.zeros(2), 0.01).to_event(1))
        pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.VonMises(m, 5.0).to_event(1), obs=y)

    y = torch.tensor([[3.0, -1.0], [-3.1, -1.2], [3.1, -0.8]])
    layout = Layout(describe(model, (y,), {}))
    log_joint = LogJoint(model, (y,), {}, layout, torch.zeros(5, layout.dim))
    centers = find_centers(log_joint, torch.zeros(layout.dim))
    assert ((centers["m"] - torch.tensor([3.08, -1.0])).cos() > 0.97).all()
    other = log_joint.in_layout(layout.at_centers(centers))
    values, ladj = other.layout.constrain(torch.zeros(1, layout.dim))
    again = layout.unconstrain(values)
    _, other_ladj = layout.constrain(again)
    torch.testing.assert_close(
        other(torch.zeros(1, layout.dim)) - ladj, log_joint(again) - other_ladj, rtol=1e-4, atol=1e-4
    )


def unwrapped(y):
    """What NumPyro's CircularReparam makes of an angle: flat on the line, with a periodic density."""
    real = torch.distributions.constraints.independent(torch.distributions.constraints.real, 1)
    angle = pyro.sample("angle", dist.ImproperUniform(real, (), (2,)))
    pyro.factor("prior", dist.VonMises(0.0, 1.0).log_prob(angle).sum(-1))
    pyro.sample("y", dist.VonMises(angle, 2.0).to_event(1), obs=y)


def test_angle_with_a_flat_prior_on_the_line_raises():
    with pytest.raises(ModelError, match=r"'angle' has a flat prior on the real line.*\.mask\(False\)"):
        _fit(unwrapped, torch.tensor([1.0, 2.0]))


def test_number_with_a_flat_prior_is_fitted():
    def model(y):
        a, b = (pyro.sample(name, dist.Normal(0.0, 1.0).mask(False)) for name in "ab")
        pyro.factor("proper", dist.Normal(0.0, 1.0).log_prob(b))
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    _check_evidence(_fit(model, torch.tensor(1.0)), 0.0)


def far_from_zero(y):
    """An ulp of the values is a sixteenth in float32."""
    x = pyro.sample("x", Transformed(dist.Exponential(1.0), [AffineTransform(1e6, 1.0)]))
    pyro.sample("y", dist.Normal(x - 1e6, 0.5), obs=y)


@pytest.mark.slow
def test_fit_with_draws_on_an_edge_is_repeated_in_float64():
    with pytest.warns(UserWarning, match=r"draws on an edge.* at site 'x'.*repeated in float64"):
        posterior = _fit(far_from_zero, torch.tensor(0.1))
    assert posterior.sample(1)["x"].dtype == torch.float64
    x = torch.linspace(0, 10, 100_001, dtype=torch.float64)
    exact = (dist.Normal(x, 0.5).log_prob(torch.tensor(0.1).double()) - x).logsumexp(0) + math.log(1e-4)
    _check_evidence(posterior, exact.item())


def test_arrays_do_not_hinder_the_repetition_in_float64(monkeypatch):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu * y.clone(), 1.0).to_event(1), obs=y)

    _diverging(monkeypatch, also_in_float64=False)
    with pytest.warns(UserWarning, match="repeated in float64"):
        posterior = _fit(model, np.array([1.0, 2.0]))
    assert posterior.sample(1)["mu"].dtype == torch.float64


def test_shares_at_edges():
    def model():
        pyro.sample("x", dist.HalfCauchy(torch.ones(2)).to_event(1))
        pyro.sample("p", dist.Beta(0.1, 0.1))
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("q", dist.ContinuousBernoulli(0.3))

    layout = Layout(describe(model, (), {}))
    log_joint = LogJoint(model, (), {}, layout, torch.zeros(5, layout.dim))
    u = torch.zeros(4, layout.dim)
    assert log_joint.shares_at_edges(u) == {}
    u[0, layout.slices["x"]] = torch.tensor([0.0, -100.0])
    u[1, layout.slices["x"]] = torch.tensor([100.0, -100.0])
    u[:, layout.slices["p"]] = 50.0
    u[:, layout.slices["z"]] = 50.0
    u[0, layout.slices["q"]] = 17.0
    assert log_joint.shares_at_edges(u) == {"x": 0.5, "q": 0.25}


def simple(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def _diverging(monkeypatch, also_in_float64):
    run = pf.FlowVI._run

    def diverge(self, args, kwargs, progress):
        if self.dtype is None or also_in_float64:
            raise DivergedError(f"no finite loss in {self.dtype}")
        return run(self, args, kwargs, progress)

    monkeypatch.setattr(pf.FlowVI, "_run", diverge)


def test_fit_that_diverges_is_repeated_in_float64(monkeypatch):
    _diverging(monkeypatch, also_in_float64=False)
    vi = pf.FlowVI(simple, num_steps=50, num_starts=1, seed=0, progress_bar=False)
    with pytest.warns(UserWarning, match=r"diverged \(no finite loss in None\), and was repeated in float64"):
        posterior = vi.run(torch.tensor(1.0))
    assert posterior.sample(1)["mu"].dtype == torch.float64
    assert vi.posterior is posterior


@pytest.mark.parametrize("y", [torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64)], ids=["float32", "float64"])
def test_first_error_is_raised_if_float64_fails_too(monkeypatch, y):
    _diverging(monkeypatch, also_in_float64=True)
    with pytest.raises(DivergedError, match="in None"):
        _fit(simple, y)


def test_dtype_and_guide_of_the_user_are_kept(monkeypatch):
    _diverging(monkeypatch, also_in_float64=False)
    with pytest.raises(DivergedError):
        _fit(simple, torch.tensor(1.0), guide=pf.guides.AutoFlow(simple))
    _diverging(monkeypatch, also_in_float64=True)
    with pytest.raises(DivergedError, match="in torch.float32"):
        _fit(simple, torch.tensor(1.0), dtype=torch.float32)


def test_observed_angles_may_be_given_in_any_turn():
    def wind(y):
        mean = pyro.sample("mean", dist.VonMises(0.0, 0.1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.VonMises(mean, 2.0), obs=y)

    y = torch.tensor([6.1, 0.2, 0.1, 6.2])
    found = [pf.FlowVI(wind, seed=0, progress_bar=False).run(part).log_evidence for part in (y, wrapped(y))]
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_the_table_of_an_angle_is_around_its_mean_direction():
    def wind():
        pyro.sample("mean", dist.VonMises(3.0, 20.0))

    row = pf.FlowVI(wind, seed=0, progress_bar=False).run().summary().loc["mean"]
    # The sd of a von Mises law is about the root of the inverse concentration.
    assert row["mean"] == pytest.approx(3.0, abs=0.01)
    assert row["sd"] == pytest.approx(20**-0.5, rel=0.05)
    assert row["5%"] < 3.0 < row["95%"]

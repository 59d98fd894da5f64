"""Guides fitted to a posterior: distilled from its flow, or fitted to its weighted draws."""

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.errors import ModelError, OptionError, PlotError
from pyroflows.flows import IAF, Recipe
from pyroflows.inference.refit import _start_near

Y = torch.tensor([1.0, 2.0])


def model(y=Y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.Normal(mu[0] * mu[1], 0.3 + tau).expand([2]).to_event(1), obs=y)


def fitted(flow_fn, num_steps=300, model=model, **options):
    return pf.FlowVI(model, flow_fn, num_steps=num_steps, seed=0, progress_bar=False, **options).run(Y)


@pytest.fixture(scope="module")
def slow():
    return fitted(Recipe("MAF", num_layers=3, hidden_dims=(16, 16)))


@pytest.fixture(scope="module")
def fast(slow):
    options = {"num_steps": 500, "warm_start": 500, "seed": 0, "progress_bar": False}
    return slow.distill(Recipe("IAF", num_layers=3, hidden_dims=(32, 32)), **options)


@pytest.mark.slow
def test_distilled_posterior_is_that_of_the_teacher(slow, fast):
    teacher, student = slow.guide.flow(), fast.guide.flow()
    with torch.no_grad():
        x, log_q = student.rsample_and_log_prob((20_000,))
        log_weights = teacher.log_prob(x) - log_q
    assert -log_weights.mean() < 0.05
    # The ELBOs differ by E_q[log p - log q], and the student's cannot be far below.
    assert fast.elbo > slow.elbo - 0.1
    assert fast.sample(7)["mu"].shape == (7, 2) and (fast.sample(7)["tau"] > 0).all()


def test_distilled_posterior_judges_itself_against_the_model(slow, fast):
    assert fast.log_evidence == pytest.approx(slow.log_evidence, abs=4 * (slow.log_evidence_se + fast.log_evidence_se))
    assert "starts ended" in str(fast.diagnose())
    with pytest.raises(PlotError, match="fitted to another"):
        fast.plot_training()


def test_a_proposal_is_fitted_to_chains():
    def correlated():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("scale", dist.LogNormal(2.0 * x, 0.5))

    short = pf.FlowVI(correlated, Recipe("Gaussian"), num_steps=1, seed=0, progress_bar=False).run()
    chains = short.mcmc(60, num_chains=32, num_warmup=100, seed=0, progress_bar=False)
    options = {"seed": 0, "max_epochs": 10, "progress_bar": False}
    proposal = short.fit_proposal(chains=chains, method="maximum_likelihood", **options)
    log_scale = proposal.sample(4000)["scale"].log()
    assert abs(log_scale.std() / chains.draws["scale"].log().std() - 1) < 0.15
    # The sd of log scale is 2.06, and the ELBO of the exact posterior is 0.
    assert proposal.elbo > -0.1
    with pytest.raises(OptionError, match="chains must be what posterior.mcmc returns, got dict"):
        short.fit_proposal(chains=chains.draws)
    with pytest.raises(OptionError, match="method must be one of"):
        short.fit_proposal(chains=chains, method="none")


def test_distilled_posterior_is_saved_and_loaded(fast, tmp_path):
    fast.save(tmp_path / "fast")
    again = pf.load_posterior(tmp_path / "fast", model, Y)
    draws = fast.sample(10)
    torch.testing.assert_close(again.log_prob(draws), fast.log_prob(draws))


def test_a_student_of_the_default_recipe(slow):
    fast = slow.distill(num_steps=50, warm_start=50, seed=0, progress_bar=False)
    assert isinstance(fast.guide.flow, pf.Flow)
    assert fast.diagnose().verdict in ("good", "correct it", "do not use")


def test_what_fitted_the_guide_is_kept(slow, fast):
    assert slow.refitted is None
    assert fast.refitted.kl < 0.05 and fast.refitted.history.num_steps == 500
    proposal = slow.fit_proposal(num_samples=1000, max_epochs=1, seed=0, progress_bar=False)
    assert proposal.refitted.best_epoch <= 1


def test_a_flow_is_no_function_that_makes_one(slow):
    for method in (slow.distill, slow.fit_proposal):
        with pytest.raises(OptionError, match="flow_fn must be a function latent_dim -> flow.*got IAF"):
            method(IAF(3))


def test_options_of_distill_are_checked(slow):
    with pytest.raises(TypeError, match="temperature"):
        slow.distill(temperature=1.0)
    with pytest.raises(OptionError, match="batch_size"):
        slow.distill(batch_size=1)


def two_modes(y=Y):
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.5).to_event(1))
    pyro.sample("y", dist.Normal(x[0] ** 2, 0.3).expand([2]).to_event(1), obs=y)


def test_a_distilled_mixture_is_not_trusted_with_its_other_modes():
    mixture = fitted(Recipe("RealNVP", num_layers=4, hidden_dims=(16,)), model=two_modes)
    assert isinstance(mixture.guide.flow, pf.flows.Mixture)
    single = mixture.distill(
        Recipe("IAF", num_layers=3, hidden_dims=(16, 16)), num_steps=100, seed=0, progress_bar=False
    )
    assert "leaves out 1 separate mode(s)" in str(single.diagnose())


@pytest.mark.slow
def test_a_proposal_covers_what_reverse_kl_leaves_out():
    """A Gaussian is narrower than the posterior of a funnel; its weights tell."""

    def funnel(y=Y):
        scale = pyro.sample("scale", dist.Normal(0.0, 1.5))
        pyro.sample("x", dist.Normal(torch.zeros(2), torch.exp(scale / 2)).to_event(1))
        pyro.sample("y", dist.Normal(scale, 3.0).expand([2]).to_event(1), obs=y)

    # A guide of our own has no layer that learns to be non-centred, with which the Gaussian would fit.
    narrow = fitted(pf.guides.AutoFlow(funnel, Recipe("Gaussian")), model=funnel)
    wide = narrow.fit_proposal(num_samples=20_000, seed=0, max_epochs=30, progress_bar=False)
    assert wide.ess > 1.5 * narrow.ess
    grid = torch.linspace(-8, 8, 4001)  # the law of scale given y, by quadrature
    log_joint = dist.Normal(0.0, 1.5).log_prob(grid) + sum(dist.Normal(grid, 3.0).log_prob(y) for y in Y)
    weights = torch.softmax(log_joint, 0)
    mean = (weights * grid).sum()
    sd = (weights * (grid - mean) ** 2).sum().sqrt()
    draws = {name: p.sample(20_000)["scale"] for name, p in (("narrow", narrow), ("wide", wide))}
    gaps = {name: abs(draw.std() / sd - 1).item() for name, draw in draws.items()}
    assert gaps["wide"] < gaps["narrow"] / 2


def test_a_proposal_is_saved_and_loaded(slow, tmp_path):
    proposal = slow.fit_proposal(num_samples=2000, max_epochs=2, seed=0, progress_bar=False)
    proposal.save(tmp_path / "proposal")
    again = pf.load_posterior(tmp_path / "proposal", model, Y)
    draws = proposal.sample(10)
    torch.testing.assert_close(again.log_prob(draws), proposal.log_prob(draws))
    weighted = pf.importance_sample(model, proposal, Y, num_samples=2000, progress_bar=False)
    assert weighted.log_evidence == pytest.approx(slow.log_evidence, abs=0.5)


def test_a_proposal_is_reproducible_and_knows_its_seed(slow):
    state = torch.get_rng_state()
    found = [slow.fit_proposal(num_samples=1000, max_epochs=1, seed=3, progress_bar=False).elbo for _ in range(2)]
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert torch.equal(torch.get_rng_state(), state)


def test_fits_start_with_the_moments_of_the_draws():
    torch.manual_seed(0)
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    scale = torch.tensor([100.0, 1.0, 0.01])
    latents = scale * (torch.randn(5000, 3) @ factor.T) + 7
    guide = pf.guides.AutoFlow(model, Recipe("IAF", num_layers=2, hidden_dims=(8,)))
    flow = _start_near(guide, latents, torch.ones(5000), (Y,), {})
    started = flow().sample((50_000,))
    started = (started - 7) / scale
    torch.testing.assert_close(started.mean(0), torch.zeros(3), rtol=0, atol=0.06)
    torch.testing.assert_close(torch.cov(started.T), factor @ factor.T, rtol=0, atol=0.06)
    few = _start_near(guide, latents[:2], torch.ones(2), (Y,), {})
    assert few().sample((10,)).isfinite().all()


def test_a_proposal_needs_all_rows():
    def subsampled(y=Y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("N", 2, subsample_size=1) as rows:
            pyro.sample("y", dist.Normal(x, 1.0), obs=y[rows])

    posterior = fitted(Recipe("IAF", num_layers=2, hidden_dims=(8,)), num_steps=20, model=subsampled)
    with pytest.raises(ModelError, match="'N' is subsampled"):
        posterior.fit_proposal(num_samples=1000)


@pytest.mark.slow
def test_one_latent():
    def single(y=Y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0).expand([2]).to_event(1), obs=y)

    posterior = fitted(None, num_steps=20, model=single)
    proposal = posterior.fit_proposal(num_samples=5000, max_epochs=20, seed=0, progress_bar=False)
    assert proposal.sample(20_000)["x"].mean().item() == pytest.approx(1.0, abs=0.05)
    student = Recipe("Planar", num_layers=2)
    fast = posterior.distill(student, num_steps=20, warm_start=20, seed=0, progress_bar=False)
    assert fast.sample(5)["x"].shape == (5,)

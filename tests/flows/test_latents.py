"""Latents of Pyro programs in a flow's context, with a flow as prior, and with a flow as guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.mcmc.util import initialize_model

import pyroflows as pf
from tests.flows.programs import bent, elbo, make, rows, standard_normal, traced, train

# A latent as context


def latent_context(n=6):
    """A model whose latent z is the context; its posterior and its log evidence in closed form."""
    flow, f = bent()
    x = f(rows(n)).detach()

    def model():
        z = pyro.sample("z", standard_normal())
        with pyro.plate("rows", n):
            pyro.sample("x", flow(z), obs=x)

    u, ladj = f.inverse_and_ladj(x)
    posterior = dist.Normal(u.sum(0) / (n + 1), (n + 1) ** -0.5).to_event(1)
    # At any z, here at 0: prior times likelihood over posterior.
    likelihood = (standard_normal().log_prob(u) + ladj).sum()
    zero = torch.zeros(2, dtype=torch.float64)
    evidence = standard_normal().log_prob(zero) + likelihood - posterior.log_prob(zero)
    return model, posterior, evidence.detach()


def test_gradient_reaches_a_latent_context():
    """Against finite differences, and against the closed form."""
    model, posterior, evidence = latent_context()

    def log_joint(z):
        return traced(poutine.condition(model, {"z": z})).log_prob_sum()

    z = rows().requires_grad_()
    # Pyro's hooks on gradients refuse undefined ones.
    assert torch.autograd.gradcheck(log_joint, z, check_undefined_grad=False)
    torch.testing.assert_close(log_joint(z), posterior.log_prob(z) + evidence)
    _, potential, *_ = initialize_model(model)
    torch.testing.assert_close(potential({"z": z}), -log_joint(z))


def test_guide_of_a_latent_context_learns_the_posterior():
    model, posterior, evidence = latent_context()
    guide = AutoNormal(model)
    particles = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    train(model, guide, steps=150, lr=0.1, loss=particles)
    low, median, high = guide.quantiles([0.1587, 0.5, 0.8413])["z"]
    loc, scale = posterior.base_dist.loc, posterior.base_dist.scale
    assert ((median - loc).abs() < 0.2 * scale).all()
    torch.testing.assert_close((high - low) / 2, scale, rtol=0.15, atol=0)
    # The family of the guide holds the posterior: what is left is the error of 0.2 sd, a divergence of 0.02 each.
    torch.testing.assert_close(elbo(model, guide, particles), evidence, rtol=0, atol=0.04)


def test_flow_posterior_of_a_latent_context():
    model, posterior, evidence = latent_context()
    fitted = pf.FlowVI(model, num_steps=100, seed=0, progress_bar=False).run()
    assert abs(fitted.log_evidence - evidence) <= 5 * fitted.log_evidence_se < 0.02
    draws = fitted.importance_sample(4000).resample(4000)["z"]
    torch.testing.assert_close(draws.mean(0), posterior.base_dist.loc, rtol=0, atol=0.05)


@pytest.mark.slow
def test_nuts_over_a_latent_context():
    model, posterior, _ = latent_context()
    mcmc = MCMC(NUTS(model), num_samples=200, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    z = (mcmc.get_samples()["z"] - posterior.base_dist.loc) / posterior.base_dist.scale
    assert z.mean(0).abs().max() < 5 / 100**0.5  # as if half of the draws were independent
    torch.testing.assert_close(z.var(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=5 * (2 / 100) ** 0.5)


def test_laplace_approximation():
    """It takes second derivatives of the density."""
    flow = make()

    def model():
        pyro.sample("z", flow())

    z = rows()
    guide = AutoLaplaceApproximation(model, init_loc_fn=init_to_value(values={"z": z}))
    guide()
    covariance = guide.laplace_approximation().get_posterior().covariance_matrix

    def gradient(z):
        return torch.autograd.functional.jacobian(lambda z: flow().log_prob(z), z)

    step = 1e-5 * torch.eye(2, dtype=torch.float64)
    hessian = torch.stack([(gradient(z + e) - gradient(z - e)) / 2e-5 for e in step])
    torch.testing.assert_close(covariance, torch.linalg.inv(-hessian), rtol=1e-4, atol=1e-4)


# A flow as prior


def flow_prior():
    """A model whose latent has a flow as prior, and its log evidence by quadrature."""
    flow, y = make(noise=0.4), rows(3)

    def log_likelihood(z):
        return dist.Normal(z[..., None, :], 1.0).log_prob(y).sum((-1, -2))

    def model():
        z = pyro.sample("z", flow())
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    with torch.no_grad():
        evidence = (flow().log_prob(grid) + log_likelihood(grid)).flatten().logsumexp(0) + 2 * (axis[1] - axis[0]).log()
    return model, evidence


def test_flow_as_prior_under_flow_vi():
    model, evidence = flow_prior()
    fitted = pf.FlowVI(model, num_steps=100, seed=0, progress_bar=False).run()
    assert abs(fitted.log_evidence - evidence) <= 5 * fitted.log_evidence_se < 0.02


@pytest.mark.parametrize("make_guide", [AutoNormal, pf.guides.AutoIAF], ids=["AutoNormal", "AutoIAF"])
def test_flow_as_prior_under_svi(make_guide):
    model, evidence = flow_prior()
    guide = make_guide(model)
    particles = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    start = elbo(model, guide, particles)
    train(model, guide, steps=60, lr=0.05, loss=particles)
    with torch.no_grad():
        assert start + 0.1 < elbo(model, guide, particles) < evidence + 0.05


def test_plated_latents_with_a_flow_as_prior_at_a_latent_context():
    """The ELBO at fixed values, particle by particle and vectorised, is the log joint by hand."""
    flow, y = make(context_dim=1), rows(4)
    values = {"c": torch.tensor(0.3, dtype=torch.float64), "z": rows(4)}

    def model():
        c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("rows", 4):
            z = pyro.sample("z", flow(c[..., None]))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    c, z = values.values()
    expected = (
        dist.Normal(0.0, 1.0).log_prob(c) + (flow(c[None]).log_prob(z) + dist.Normal(z, 1.0).log_prob(y).sum(-1)).sum()
    )
    guide = AutoDelta(model, init_loc_fn=init_to_value(values=values))
    for vectorised in (False, True):
        loss = Trace_ELBO(num_particles=3, vectorize_particles=vectorised, max_plate_nesting=1)
        torch.testing.assert_close(elbo(model, guide, loss), expected)


# A flow as guide


def test_flow_as_amortised_guide_in_a_subsampled_plate():
    """z_n standard normal, x_n normal around z_n: x_n is N(0, 2), and z_n given x_n is N(x_n / 2, 1 / 2)."""
    flow, x = pf.flows.IAF(2, num_layers=1, hidden_dims=(16,), context_dim=2).double(), rows(50)

    def model(size):
        with pyro.plate("rows", 50, subsample_size=size) as index:
            z = pyro.sample("z", standard_normal(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[index])

    def guide(size):
        pyro.module("flow", flow)
        with pyro.plate("rows", 50, subsample_size=size) as index:
            pyro.sample("z", flow(x[index]))

    train(model, guide, 25, steps=400)
    law = flow(x)
    with torch.no_grad():
        z, log_q = law.rsample_and_log_prob((4000,))
    log_joint = standard_normal().log_prob(z) + dist.Normal(z, 1.0).to_event(1).log_prob(x)
    divergence = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1) - (log_joint - log_q).mean(0)
    assert divergence.mean() < 0.02
    torch.testing.assert_close(z.var(0).mean(0), torch.full((2,), 0.5, dtype=torch.float64), rtol=0.1, atol=0)


@pytest.mark.parametrize("vectorised", [False, True])
def test_a_guide_scores_its_draws_without_inverting(monkeypatch, vectorised):
    flow, x = make(context_dim=2, recipe=pf.flows.IAF), rows(5)

    def model():
        with pyro.plate("rows", 5):
            pyro.sample("z", standard_normal(1))

    def guide():
        pyro.module("flow", flow)
        with pyro.plate("rows", 5):
            pyro.sample("z", flow(x))

    monkeypatch.setattr(flow.transform, "_inverse_and_ladj", None)
    elbo(model, guide, Trace_ELBO(num_particles=3, vectorize_particles=vectorised, max_plate_nesting=1)).backward()

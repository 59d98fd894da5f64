"""Flows of categories as distributions of sites in Pyro programs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from pyro.optim import Adam

import pyroflows as pf
from pyroflows import flows

from .categories import make


def no_guide(*args):
    pass


@pytest.fixture
def flow():
    return make(base="autoregressive", univariate="permutation")


def test_observed_site_in_a_plate_with_subsampling(flow):
    x = flow().sample((20,))

    def model(size):
        pyro.module("flow", flow)
        with pyro.plate("rows", 20, subsample_size=size) as index:
            return index, pyro.sample("x", flow(), obs=x[index])

    for size in (20, 5):
        trace = poutine.trace(model).get_trace(size)
        index, _ = trace.nodes["_RETURN"]["value"]
        expected = 20 / size * flow().log_prob(x[index]).sum()
        torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_scale_and_mask(flow):
    x, mask = flow().sample((6,)), torch.tensor([True, False, True, True, False, True])

    def model():
        with pyro.plate("rows", 6), poutine.scale(scale=3.0), poutine.mask(mask=mask):
            pyro.sample("x", flow(), obs=x)

    found = poutine.trace(model).get_trace().log_prob_sum()
    torch.testing.assert_close(found, 3 * flow().log_prob(x)[mask].sum())


def test_enumerated_latent_is_exact():
    flow = make(base="autoregressive", univariate="permutation", length=2, num_categories=3)
    loc, y = torch.randn(2, 3), torch.tensor([0.3, -0.7])

    @config_enumerate
    def model():
        pyro.module("flow", flow)
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(loc[torch.arange(2), z], 0.5).to_event(1), obs=y)

    loss = TraceEnum_ELBO(max_plate_nesting=0).differentiable_loss(model, no_guide)
    z = flow().enumerate_support()
    log_joint = flow().log_prob(z) + dist.Normal(loc[torch.arange(2), z], 0.5).log_prob(y).sum(-1)
    expected = -log_joint.logsumexp(0)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, list(flow.parameters()), retain_graph=True)
    own = torch.autograd.grad(expected, list(flow.parameters()))
    for a, b in zip(found, own, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert all(gradient.abs().max() > 0 for gradient in found[-2:])


def test_enumerated_latents_in_a_plate_with_a_context():
    flow = make(base="autoregressive", univariate="permutation", length=2, num_categories=3, context_dim=2)
    context, loc, y = torch.randn(5, 2), torch.randn(2, 3), torch.randn(5, 2)

    def emission(z):
        return dist.Normal(loc[torch.arange(2), z], 0.5).to_event(1)

    def model():
        with pyro.plate("outer", 5):
            z = pyro.sample("z", flow(context), infer={"enumerate": "parallel"})
            w = pyro.sample("w", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(emission(z).mean + w[..., None], 0.5).to_event(1), obs=y)

    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, no_guide)
    total = 0.0
    for i in range(5):
        z = flow(context[i]).enumerate_support()
        mean = emission(z).mean
        terms = [
            flow(context[i]).log_prob(z) + dist.Normal(mean + w, 0.5).log_prob(y[i]).sum(-1) + torch.tensor(p).log()
            for w, p in ((0.0, 0.7), (1.0, 0.3))
        ]
        total = total + torch.cat(terms).logsumexp(0)
    torch.testing.assert_close(loss, -total)


def test_an_enumerated_sequence_of_one_hot_vectors():
    flow = make("coupling", length=2, num_categories=3, one_hot=True)
    y = torch.tensor(0.4)

    def model():
        z = pyro.sample("z", flow(), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal((z * torch.arange(6.0).reshape(2, 3)).sum((-1, -2)), 1.0), obs=y)

    loss = TraceEnum_ELBO(max_plate_nesting=0).differentiable_loss(model, no_guide)
    z = flow().enumerate_support()
    log_joint = flow().log_prob(z) + dist.Normal((z * torch.arange(6.0).reshape(2, 3)).sum((-1, -2)), 1.0).log_prob(y)
    torch.testing.assert_close(loss, -log_joint.logsumexp(0))


@pytest.mark.parametrize("base", ["factorized", "autoregressive"])
def test_the_prior_of_an_enumerated_latent_is_learned(base):
    # Two latent categories that always agree, seen through noise.
    z = torch.randint(3, (300,))
    y = torch.stack([z, z], -1) * 4.0 + torch.randn(300, 2)
    flow = flows.DiscreteAutoregressive(2, 3, univariate="affine", hidden_dims=(16,), base=base)

    def model():
        pyro.module("flow", flow)
        with pyro.plate("rows", 300):
            z = pyro.sample("z", flow(), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(4.0 * z, 1.0).to_event(1), obs=y)

    svi = SVI(model, no_guide, Adam({"lr": 0.02}), TraceEnum_ELBO(max_plate_nesting=1))
    for _ in range(100):
        svi.step()
    with torch.no_grad():
        prior = flow().log_prob(flow().enumerate_support()).exp().reshape(3, 3)
    shares = z.bincount(minlength=3) / 300
    # The standard error of a share is at most 0.03.
    torch.testing.assert_close(prior.diagonal(), shares, atol=0.05, rtol=0)


def test_predictive(flow):
    def model():
        with pyro.plate("rows", 5):
            pyro.sample("x", flow())

    draws = Predictive(model, {}, num_samples=7)()["x"]
    assert (draws.shape, draws.dtype) == ((7, 5, 3), torch.long)
    draws = Predictive(model, {}, num_samples=7, parallel=True)()["x"]
    assert draws.shape == (7, 5, 3)


@pytest.mark.parametrize("recipe", ["autoregressive", "coupling"])
@pytest.mark.parametrize("holder", ["pyro.module", "PyroModule", "to_pyro_module_"])
def test_trained_as_a_likelihood(recipe, holder):
    flow = make(recipe, length=2, univariate="permutation", context_dim=1, scale=0.1)
    x = torch.tensor([[0, 1], [2, 3], [2, 3], [2, 3]]).repeat(20, 1)

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = flow
            if holder == "to_pyro_module_":
                to_pyro_module_(self.flow)

        def forward(self):
            if holder == "pyro.module":
                pyro.module("flow", flow)
            location = pyro.sample("location", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(x)):
                pyro.sample("x", self.flow(location[None]), obs=x)

    model = Model()
    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert any("base" in name for name in pyro.get_param_store())


def test_flow_guide_beside_an_observed_flow():
    flow = make(context_dim=1, univariate="permutation")
    x = flow(torch.ones(1)).sample((30,))

    def model(x):
        location = pyro.sample("location", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", flow(location[..., None]), obs=x)

    vi = pf.FlowVI(model, guide=lambda dim: flows.Gaussian(dim), num_steps=50, seed=0, num_starts=1, progress_bar=False)
    assert vi.run(x).sample(5)["location"].shape == (5,)


def test_mixture_of_flows_of_categories():
    parts = [make("coupling"), make(base="autoregressive")]
    mixture = flows.Mixture(parts, torch.tensor([0.3, 0.7]).log())
    x = parts[0]().enumerate_support()
    expected = torch.stack([0.3 * parts[0]().log_prob(x).exp(), 0.7 * parts[1]().log_prob(x).exp()]).sum(0)
    torch.testing.assert_close(mixture().log_prob(x).exp(), expected)
    draws = mixture().sample((5,))
    assert (draws.shape, draws.dtype) == ((5, 3), torch.long)
    y = torch.tensor([0.5, -0.2])

    def model():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", mixture(), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z.sum(-1).float(), 1.0), obs=y)

    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, no_guide)
    log_joint = expected.log()[:, None] + dist.Normal(x.sum(-1, keepdim=True).float(), 1.0).log_prob(y)
    torch.testing.assert_close(loss, -log_joint.logsumexp(0).sum())
    assert not flows.Mixture([flows.Gaussian(2)])().has_enumerate_support


def test_mixture_of_flows_of_categories_is_fitted():
    x = torch.tensor([[0, 0], [2, 2]]).repeat(100, 1)
    parts = [flows.DiscreteCoupling(2, 3, hidden_dims=(8,), context_dim=1) for _ in range(2)]
    mixture, context = flows.Mixture(parts), torch.randn(200, 1)
    before = mixture(context).log_prob(x).mean()
    pf.fit_density(mixture, x, context, max_epochs=20, seed=0, progress_bar=False)
    assert mixture(context).log_prob(x).mean() > before + 0.5

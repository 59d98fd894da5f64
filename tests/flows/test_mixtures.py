"""Flows as components of mixtures whose class is summed out: values against sums over the classes by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate, infer_discrete
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.indexing import Vindex
from torch import nn

import pyroflows as pf
from tests.flows.programs import all_dtypes, elbo, make, nothing, rows

WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
CODES = torch.eye(3, dtype=torch.float64)


def mixture(dtype=torch.float64):
    """Rows of a mixture whose components are one flow at the classes' codes, and its log terms ``(6, 3)`` by hand."""
    flow, x = make(context_dim=3, dtype=dtype), rows(6, dtype=dtype)
    weights, codes = WEIGHTS.to(dtype), CODES.to(dtype)

    @config_enumerate
    def model():
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", flow(codes[z]), obs=x)
            return z

    return model, flow, torch.stack([flow(code).log_prob(x) for code in codes], -1) + weights.log()


@all_dtypes
def test_enumerated_class_of_each_row(dtype):
    model, flow, terms = mixture(dtype)
    marginal = elbo(model, loss=TraceEnum_ELBO(max_plate_nesting=1))
    expected = terms.logsumexp(-1).sum()
    assert marginal.dtype == dtype
    torch.testing.assert_close(marginal, expected)
    parameters = list(flow.parameters())
    for a, b in zip(*(torch.autograd.grad(value, parameters) for value in (marginal, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_enumerated_class_of_each_group():
    """One class for all rows of a group, and one for all data."""
    flow, x = make(context_dim=3), rows(4, 6)

    @config_enumerate
    def model():
        s = pyro.sample("s", dist.Categorical(WEIGHTS))
        with pyro.plate("groups", 6, dim=-1):
            z = pyro.sample("z", dist.Categorical(WEIGHTS))
            with pyro.plate("rows", 4, dim=-2):
                pyro.sample("x", flow(CODES[z] - 2 * CODES[s]), obs=x)

    by_class = torch.stack([torch.stack([flow(z - 2 * s).log_prob(x).sum(0) for z in CODES], -1) for s in CODES], -1)
    by_group = (by_class + WEIGHTS.log()[:, None]).logsumexp(-2)
    expected = (by_group.sum(0) + WEIGHTS.log()).logsumexp(-1)
    torch.testing.assert_close(elbo(model, loss=TraceEnum_ELBO(max_plate_nesting=2)), expected)


@pytest.mark.parametrize("vectorised", [False, True])
def test_enumerated_class_beside_a_continuous_latent(vectorised):
    flow, x = make(context_dim=3), rows(6)
    value = rows(dim=3)

    @config_enumerate
    def model():
        u = pyro.sample("u", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Categorical(WEIGHTS))
            pyro.sample("x", flow(CODES[z] + u), obs=x)

    terms = torch.stack([flow(code + value).log_prob(x) for code in CODES], -1) + WEIGHTS.log()
    expected = dist.Normal(0.0, 1.0).log_prob(value).sum() + terms.logsumexp(-1).sum()
    continuous = poutine.block(model, hide=["z"])
    guide = AutoDelta(continuous, init_loc_fn=init_to_value(values={"u": value}))
    loss = TraceEnum_ELBO(num_particles=2, vectorize_particles=vectorised, max_plate_nesting=1)
    torch.testing.assert_close(elbo(model, guide, loss), expected)
    _, potential, *_ = initialize_model(model, max_plate_nesting=1)
    torch.testing.assert_close(potential({"u": value}), -expected)


def test_class_enumerated_in_the_guide():
    model, _, terms = mixture()
    q = torch.rand(6, 3, dtype=torch.float64).softmax(-1)

    @config_enumerate
    def guide():
        with pyro.plate("rows", 6):
            pyro.sample("z", dist.Categorical(q))

    torch.testing.assert_close(elbo(model, guide, TraceEnum_ELBO(max_plate_nesting=1)), (q * (terms - q.log())).sum())


def test_posterior_of_the_classes():
    model, _, terms = mixture()
    exact = terms.softmax(-1)
    marginal = TraceEnum_ELBO(max_plate_nesting=1).compute_marginals(model, nothing)["z"]
    torch.testing.assert_close(marginal.probs, exact)
    assert torch.equal(infer_discrete(model, first_available_dim=-2, temperature=0)(), terms.argmax(-1))
    draws = torch.stack([infer_discrete(model, first_available_dim=-2)() for _ in range(200)])
    frequencies = nn.functional.one_hot(draws, 3).double().mean(0)
    assert ((frequencies - exact).abs() <= 5 * (exact * (1 - exact) / 200).sqrt() + 1e-9).all()


def chained(flows, z):
    """Each mask puts a flow in the place of what came before: it scores and it generates."""
    law = flows[0]()
    for k, flow in enumerate(flows[1:], start=1):
        law = dist.MaskedMixture(z == k, law, flow())
    return law


def by_chain(flows, x):
    with pyro.plate("rows", 6):
        z = pyro.sample("z", dist.Categorical(WEIGHTS))
        pyro.sample("x", chained(flows, z), obs=x)


def by_masked_sites(flows, x):
    with pyro.plate("rows", 6):
        z = pyro.sample("z", dist.Categorical(WEIGHTS))
        for k, flow in enumerate(flows):
            with poutine.mask(mask=z == k):
                pyro.sample(f"x_{k}", flow(), obs=x)


def by_index(flows, x):
    with pyro.plate("rows", 6):
        z = pyro.sample("z", dist.Categorical(WEIGHTS))
        log_probs = torch.stack([flow().log_prob(x) for flow in flows], -1)
        pyro.factor("x", Vindex(log_probs)[torch.arange(6), z])


@pytest.mark.parametrize("model", [by_chain, by_masked_sites, by_index])
def test_separate_flows_as_components(model):
    flows, x = [make(), make(), make(recipe=pf.flows.IAF)], rows(6)
    terms = torch.stack([flow().log_prob(x) for flow in flows], -1) + WEIGHTS.log()
    marginal = elbo(lambda: config_enumerate(model)(flows, x), loss=TraceEnum_ELBO(max_plate_nesting=1))
    torch.testing.assert_close(marginal, terms.logsumexp(-1).sum())


def test_separate_flows_generate_by_class():
    flows = [pf.Flow([pf.transforms.Elementwise(2, init=torch.tensor([[10.0 * k, 0.0]] * 2))]) for k in range(3)]
    z = torch.arange(3).repeat(5)
    x = chained(flows, z).sample()
    assert (x / 10).round().tolist() == z[:, None].expand(15, 2).tolist()


def test_flow_at_all_classes_as_components_of_a_mixture():
    """Without a latent class: the class is summed out by the distribution."""
    _, flow, _ = mixture()
    law = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), flow(CODES))
    with pyro.plate("rows", 6):
        x = pyro.sample("x", law)
    assert x.shape == (6, 2)
    terms = torch.stack([flow(code).log_prob(x) for code in CODES], -1) + WEIGHTS.log()
    torch.testing.assert_close(law.log_prob(x), terms.logsumexp(-1))

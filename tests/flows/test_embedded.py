"""Flows whose context passes through an embedding: densities, sampling, learning, exactness, copies."""

import copy

import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows.flows.embedded import flow_at, with_embedding


def parts():
    embedding = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inner = pf.flows.NSF(2, num_layers=2, hidden_dims=(8,), context_dim=3)
    with torch.no_grad():
        for parameter in inner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return inner, embedding, with_embedding(inner, embedding, 6)


def test_the_law_is_that_of_the_inner_flow_at_the_vector():
    inner, embedding, flow = parts()
    x, y = torch.randn(5, 2), torch.randn(5, 6)
    torch.testing.assert_close(flow(y).log_prob(x), inner(embedding(y)).log_prob(x))
    torch.testing.assert_close(flow(y).latent(x), inner(embedding(y)).latent(x))
    assert flow(y[0]).sample((7,)).shape == (7, 2) and flow(y.expand(3, 5, 6)).sample().shape == (3, 5, 2)


def test_vectors_are_standardised_as_contexts_are():
    inner, embedding, flow = parts()
    x, y = 10 + torch.randn(100, 2), 5 * torch.randn(100, 6)
    flow.adapt(x, y)
    assert flow.is_adapted and inner.is_adapted
    vectors = flow.transform.layer_context(y)
    torch.testing.assert_close(vectors.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(flow(y).log_prob(x), inner(embedding(y)).log_prob(x))


def test_a_fit_trains_the_embedding_and_keeps_its_best_state():
    _, embedding, flow = parts()
    y = torch.randn(500, 6)
    x = y[:, :2] * y[:, 2:3] + 0.1 * torch.randn(500, 2)
    before = copy.deepcopy(embedding.state_dict())
    fit = pf.fit_density(flow, x, y, max_epochs=30, compile="trace", seed=0, progress_bar=False)
    assert all(not torch.equal(value, before[name]) for name, value in embedding.state_dict().items())
    assert fit.best_log_prob > fit.gaussian_log_prob


def test_gradients_reach_the_embedding_and_the_context():
    _, embedding, flow = parts()
    y = torch.randn(5, 6, requires_grad=True)
    flow(y).log_prob(torch.randn(5, 2)).sum().backward()
    assert y.grad.abs().sum() > 0 and embedding[0].weight.grad.abs().sum() > 0


def test_the_flow_at_one_context_runs_the_embedding_once():
    _, embedding, flow = parts()
    calls = []
    embedding.register_forward_hook(lambda *_: calls.append(1))
    y, x = torch.randn(6), torch.randn(5, 2)
    at = flow_at(flow, y)
    torch.testing.assert_close(at().log_prob(x), flow(y).log_prob(x))
    assert len(calls) == 2 and at.context_dim == 0


def test_an_inexact_layer_is_exact_where_it_must_be():
    layer = pf.transforms.Residual(2, (8,), context_dim=3, log_det="roulette")
    flow = with_embedding(pf.Flow([layer]), nn.Linear(6, 3), 6)
    assert not flow.transform.ladj_is_exact and flow.transform.exact().ladj_is_exact
    x, y = torch.randn(5, 2), torch.randn(5, 6)
    torch.testing.assert_close(flow(y).log_prob(x), flow(y).log_prob(x.clone()))
    torch.testing.assert_close(flow_at(flow, y[0])().log_prob(x), flow(y[0]).log_prob(x))


def test_copies_and_files_hold_the_embedding(tmp_path):
    _, embedding, flow = parts()
    x, y = torch.randn(5, 2), torch.randn(5, 6)
    copied, expected = copy.deepcopy(flow), flow(y).log_prob(x)
    flow.save(tmp_path / "flow")  # an embedding of torch's own modules can be rebuilt
    with torch.no_grad():
        embedding[0].weight.add_(1.0)
    torch.testing.assert_close(copied(y).log_prob(x), expected)
    torch.testing.assert_close(pf.load_flow(tmp_path / "flow")(y).log_prob(x), expected)
    assert copied.double()(y).log_prob(x).dtype == torch.float64


def test_a_mixture_at_a_context_keeps_its_weights():
    flow = pf.flows.Mixture([pf.flows.Gaussian(2, context_dim=3), pf.flows.Gaussian(2, context_dim=3)])
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter))
    y, x = torch.randn(3), torch.randn(5, 2)
    torch.testing.assert_close(flow_at(flow, y)().log_prob(x), flow(y).log_prob(x))
    with pytest.raises(pf.OptionError, match="this one is a mixture"):
        with_embedding(flow, nn.Linear(6, 3), 6)


def test_components_of_a_mixture_can_have_embeddings_of_their_own():
    flows = [parts()[2] for _ in range(2)]
    mixture = pf.flows.Mixture(flows, context_dim=6)
    with torch.no_grad():
        for parameter in mixture.gate.parameters():
            parameter.add_(torch.randn_like(parameter))
    x, y = torch.randn(5, 2), torch.randn(5, 6)
    expected = (mixture.gate(y).log_softmax(-1) + torch.stack([flow(y).log_prob(x) for flow in flows], -1)).logsumexp(
        -1
    )
    torch.testing.assert_close(mixture(y).log_prob(x), expected)
    torch.testing.assert_close(flow_at(mixture, y[0])().log_prob(x), mixture(y[0]).log_prob(x))

"""Networks of categories: what depends on what, and evaluation place by place."""

import pytest
import torch
from torch import nn

from pyroflows.nets import MADE, CausalConv, Incremental, ResMADE
from pyroflows.nets.categories import Embedding, OnCategories, by_passes
from tests.transforms.discrete.registry import Running, one_hots, randomized

SIZE, NUM_PARAMS, ORDER = 5, 7, [2, 0, 3, 1]
FACTORIES = {"made": MADE, "residual": ResMADE, "causal_conv": CausalConv}

all_factories = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
embeddings = pytest.mark.parametrize("embedding_dim", [None, 1, 3])


def network(factory, embedding_dim=None, context_dim=0):
    return randomized(OnCategories(factory, ORDER, SIZE, NUM_PARAMS, (16, 16), context_dim, embedding_dim).double())


def test_embedding_is_linear_in_weights():
    embedding = Embedding(SIZE, 3)
    assert torch.equal(embedding(torch.eye(SIZE)), embedding.weight)
    weights = torch.rand(7, SIZE)
    torch.testing.assert_close(embedding(weights), weights @ embedding.weight)
    assert Embedding(SIZE)(weights) is weights


@all_factories
@embeddings
def test_parameters_depend_on_all_earlier_places_and_no_others(factory, embedding_dim):
    net = network(factory, embedding_dim)
    one_hot = one_hots(torch.randint(SIZE, (3, 4)), SIZE).requires_grad_()
    theta = net(one_hot)
    assert theta.shape == (3, 4, NUM_PARAMS)
    for i, j in enumerate(ORDER):
        (gradient,) = torch.autograd.grad((theta[:, j] * torch.randn(NUM_PARAMS)).sum(), one_hot, retain_graph=True)
        depends = gradient.flatten(2).any(-1).any(0)
        assert depends[ORDER[:i]].all() and not depends[ORDER[i:]].any()


@all_factories
@embeddings
@pytest.mark.parametrize("context_dim", [0, 2])
def test_places_one_after_the_other_give_what_passes_give(factory, embedding_dim, context_dim):
    net = network(factory, embedding_dim, context_dim)
    assert isinstance(net.net, Incremental)
    given = torch.randint(3, (20, 4))
    context = torch.randn(20, context_dim, dtype=torch.float64) if context_dim else None

    def category_of(given, theta):
        assert theta.shape == (*given.shape, NUM_PARAMS)
        return (theta.argmax(-1) + given) % SIZE

    found = net.by_place(given, context, category_of)
    assert not found.is_inference()
    assert torch.equal(found, by_passes(net, 4, given, context, category_of))
    theta = net(one_hots(found, SIZE), context)
    assert torch.equal(found, (theta.argmax(-1) + given) % SIZE)
    assert net.by_place(given[:0], None if context is None else context[:0], lambda g, t: g).shape == (0, 4)


def test_a_network_without_parameters_is_evaluated_by_passes():
    class Earlier(nn.Module):
        def __init__(self, order, num_params, hidden_dims, context_dim, channels):
            super().__init__()
            self.num_params = num_params

        def forward(self, z, context=None):
            return (z.cumsum(-1) - z)[..., None].expand(*z.shape, self.num_params)

    net = OnCategories(Earlier, range(3), SIZE, SIZE, ())
    found = net.by_place(torch.tensor([[2, 0, 0]]), None, lambda given, theta: (given + theta.argmax(-1)) % SIZE)
    assert found.tolist() == [[2, 2, 2]]


def test_own_networks_get_embeddings_as_channels():
    net = randomized(OnCategories(Running, range(3), SIZE, NUM_PARAMS, (), 2, 3))
    assert net(torch.eye(SIZE)[torch.randint(SIZE, (6, 3))], torch.randn(6, 2)).shape == (6, 3, NUM_PARAMS)

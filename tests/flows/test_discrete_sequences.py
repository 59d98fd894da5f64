"""Long sequences of categories: the base that is drawn group after group, and flows of convolutions."""

from functools import partial

import pytest
import torch

import pyroflows as pf
from pyroflows.errors import OptionError
from tests.transforms.registry import perturb

SIZES = [(6, 3), (7, 3), (5, 5), (5, 1)]


def sequences(length, size):
    return torch.cartesian_prod(*[torch.arange(size)] * length).view(-1, length)


def groupwise(length=7, size=3, num_groups=3, **options):
    options = {"hidden_dims": (6, 6), "embedding_dim": 2, **options}
    return perturb(pf.flows.GroupwiseCategorical(length, size, num_groups, **options))


def windows(count, length, size=5):
    """Sequences in which each category mostly follows the one before."""
    steps = (torch.rand(count, length) < 0.2).long() + 1
    return (steps.cumsum(-1) + torch.randint(size, (count, 1))) % size


@pytest.mark.parametrize(("length", "num_groups"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_sum_to_one(length, num_groups, dtype):
    base = groupwise(length, num_groups=num_groups).to(dtype)
    log_prob = base().log_prob(sequences(length, 3))
    assert log_prob.dtype == dtype
    assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("length", "num_groups"), SIZES[1:3])
def test_draws_follow_the_law(length, num_groups):
    torch.manual_seed(0)
    base, n = groupwise(length, 2, num_groups), 40_000
    values = sequences(length, 2)
    probs = base().log_prob(values).exp()
    draws = base().sample((n,))
    counts = (draws @ 2 ** torch.arange(length).flip(0)).bincount(minlength=len(values))
    # Pearson's statistic has mean and half its variance one below the number of sequences.
    statistic = ((counts - n * probs) ** 2 / (n * probs)).sum().item()
    df = len(values) - 1
    assert statistic == pytest.approx(df, abs=5 * (2 * df) ** 0.5)


def test_places_of_the_first_group_are_alike_and_independent():
    base = groupwise(6, 3, num_groups=3)
    probs = base().log_prob(sequences(6, 3)).exp().view((3,) * 6)
    pair = probs.sum((1, 2, 4, 5))  # places 0 and 3
    torch.testing.assert_close(pair.sum(0), pair.sum(1))
    torch.testing.assert_close(pair, pair.sum(1)[:, None] * pair.sum(0))


def test_batches_and_gradients():
    base = groupwise()
    law = base().expand((4,))
    assert law.sample((2,)).shape == (2, 4, 7) and law.log_prob(torch.zeros(7)).shape == (4,)
    law.log_prob(law.sample()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in base.parameters())


@pytest.mark.parametrize(("length", "expected"), [(1, 1), (2, 1), (64, 8), (1024, 32)])
def test_default_number_of_groups(length, expected):
    assert pf.flows.GroupwiseCategorical(length, 3, hidden_dims=(2,)).net.num_groups == expected


@pytest.mark.parametrize("options", [{"num_groups": 8}, {"num_groups": 0}, {"size": 1}, {"embedding_dim": 0}], ids=str)
def test_wrong_sizes(options):
    with pytest.raises(OptionError):
        groupwise(**options)


def coupling(length, size=3, **options):
    options = {"num_layers": 2, "hidden_dims": (4, 4), "embedding_dim": 2, "base": "groupwise", **options}
    return pf.flows.DiscreteCoupling(length, size, conditioner="dilated_conv", **options)


def test_coupling_on_a_groupwise_base():
    torch.manual_seed(0)
    flow = perturb(coupling(6, num_groups=3, num_layers=3))
    values = sequences(6, 3)
    assert flow().log_prob(values).exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    z = flow().latent(values)
    assert len(z.unique(dim=0)) == len(values) and torch.equal(flow().transport(z)[0].long(), values)


def test_groupwise_coupling_on_disk(tmp_path):
    flow = perturb(coupling(6))
    flow.save(tmp_path / "flow.safetensors")
    x = flow().sample((10,))
    torch.testing.assert_close(pf.load_flow(tmp_path / "flow.safetensors")().log_prob(x), flow().log_prob(x))


@pytest.mark.parametrize(("name", "dtype"), [("coupling", torch.float64), ("autoregressive", torch.float32)])
def test_convolutions_learn_long_sequences(name, dtype):
    torch.manual_seed(0)
    length, size = 48, 5
    x = windows(128, length).to(dtype)
    if name == "coupling":
        base = pf.flows.GroupwiseCategorical(length, size, 8, (16, 16), 4)
        flow = coupling(length, size, base=base, num_layers=1, num_groups=8)
    else:
        flow = pf.flows.DiscreteAutoregressive(length, size, hidden_dims=(16, 16), conditioner="causal_conv")
    optimizer = partial(torch.optim.Adam, lr=2e-2)
    options = {"max_epochs": 12, "batch_size": 16, "seed": 0, "progress_bar": False, "compile": "none"}
    fit = pf.fit_density(flow.to(dtype), x, optimizer=optimizer, **options)
    # Independent places have log 5 = 1.61 nats each, and the truth has 0.53.
    assert fit.best_log_prob > -1.0 * length
    assert flow().sample((2,)).shape == (2, length)


def test_autoregressive_convolutions_with_a_context():
    torch.manual_seed(0)
    flow = perturb(pf.flows.DiscreteAutoregressive(4, 3, 1, "permutation", (6, 6), "causal_conv", context_dim=2))
    context, values = 3 * torch.randn(9, 1, 2), sequences(4, 3)
    probs = flow(context).log_prob(values).exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones(9), rtol=0.0, atol=1e-6)
    assert (probs.std(0) > 1e-3).any()
    x = flow(context[:, 0]).sample((5,))
    assert x.shape == (5, 9, 4)
    z = flow(context[:, 0]).latent(x)
    assert torch.equal(flow(context[:, 0]).transport(z)[0].long(), x.long())


@pytest.mark.parametrize("name", ["coupling", "autoregressive"])
def test_memory_grows_linearly_with_the_length(name):
    def saved(length):
        sizes = []
        if name == "coupling":
            flow = coupling(length, base=pf.flows.GroupwiseCategorical(length, 3, 16, (8,) * 3))
        else:
            flow = pf.flows.DiscreteAutoregressive(length, 3, hidden_dims=(8,) * 3, conditioner="causal_conv")
        pack = lambda t: sizes.append(t.untyped_storage().nbytes()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            flow().log_prob(torch.zeros(2, length)).sum().backward()
        return sum(sizes)

    assert saved(512) < 2.1 * saved(256)

"""Coupling layers and their masks: what passes, what depends on what, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from pyroflows.errors import OptionError
from pyroflows.nets import MLP
from pyroflows.transforms import Autoregressive, Coupling, masks
from pyroflows.transforms.univariate import Affine
from tests.transforms.registry import jacobian, perturb, points

DIM = 6
MASKS = {
    "half": masks.half(DIM),
    "other-half": ~masks.half(DIM),
    "alternating": masks.alternating(DIM),
    "random": masks.random(DIM, seed=3),
    "one-passes": [False, False, True, False, False, False],
    "one-is-transformed": [True, True, True, True, False, True],
}
all_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def coupling(mask, univariate="affine", **options):
    return perturb(Coupling(len(mask), univariate, mask, **options).double())


# What depends on what


@all_masks
def test_where_the_mask_is_true_nothing_changes(mask):
    t, mask = coupling(mask), torch.as_tensor(mask)
    z = points((7,), DIM)
    for x in (t(z), t.inv(z)):
        assert torch.equal(x[:, mask], z[:, mask])
        assert ((x - z)[:, ~mask].abs() > 1e-6).all()


@all_masks
def test_where_the_mask_is_false_it_depends_on_itself_and_on_all_that_passes(mask):
    t, mask = coupling(mask), torch.as_tensor(mask)
    for view in (t, t.inv):
        matrix = jacobian(view, torch.randn(DIM, dtype=torch.float64))[~mask]
        assert (matrix[:, mask] != 0).all()
        among_transformed = matrix[:, ~mask]
        assert (among_transformed.diagonal() > 0).all()
        assert (among_transformed - among_transformed.diagonal().diag() == 0).all()


class Fixed(nn.Module):
    """Parameters that are linear in what passes, with weights that a test can write down."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, z_a):
        return z_a @ self.weight.T


def test_additive_coupling_by_hand():
    weight = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    t = Coupling(4, "additive", [False, True, False, True], lambda *_: Fixed(weight))
    z = torch.tensor([1.0, 2.0, 3.0, 4.0])
    x, ladj = t.forward_and_ladj(z)
    torch.testing.assert_close(x, torch.tensor([1.0 + 2 + 40, 2.0, 3.0 + 200 + 4000, 4.0]))
    torch.testing.assert_close(t.inv(x), z)
    assert ladj == 0


def test_parameters_stand_one_after_the_other_each_for_all_dimensions():
    """Shifts of all transformed dimensions, then their log-scales."""
    weight = torch.tensor([[5.0], [7.0], [0.1], [-0.2]])
    t = Coupling(3, Affine(None, None), [True, False, False], lambda *_: Fixed(weight))
    x, ladj = t.forward_and_ladj(torch.tensor([1.0, 2.0, 3.0]))
    expected = torch.tensor([1.0, 5 + 2 * math.exp(0.1), 7 + 3 * math.exp(-0.2)])
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(ladj, torch.tensor(-0.1))


@pytest.mark.parametrize("mask", ["alternating", "random", "one-is-transformed"])
def test_scattered_masks_are_blocks_in_another_order(mask):
    """Blocks are cut, scattered masks are indexed: two ways to the same map."""
    mask = torch.as_tensor(MASKS[mask])
    order = torch.cat([mask.nonzero(), (~mask).nonzero()]).squeeze(-1)
    scattered, blocks = coupling(mask, context_dim=2), Coupling(DIM, mask=mask[order], context_dim=2).double()
    blocks.load_state_dict(scattered.state_dict())
    z, context = points((7,), DIM), torch.randn(7, 2, dtype=torch.float64)
    for t, u in ((scattered, blocks), (scattered.inv, blocks.inv)):
        x, ladj = t.forward_and_ladj(z, context)
        y, ladj_of_blocks = u.forward_and_ladj(z[:, order], context)
        torch.testing.assert_close(x[:, order], y, rtol=0, atol=0)
        torch.testing.assert_close(ladj, ladj_of_blocks)


@pytest.mark.parametrize("mask", [MASKS["half"], MASKS["random"]], ids=["block", "scattered"])
def test_nothing_stays_behind_on_another_device(mask):
    """On the meta device, which every machine has, an operation with a tensor left on the CPU fails."""
    t = Coupling(DIM, mask=mask).to("meta")
    for result in (*t.forward_and_ladj(torch.zeros(7, DIM, device="meta")), t.inv(torch.zeros(7, DIM, device="meta"))):
        assert result.device.type == "meta"


def test_masks_are_not_saved():
    """They follow from the arguments, as those of masked networks do."""
    t = Coupling(DIM, mask=MASKS["random"])
    assert set(t.state_dict()) == {f"conditioner.{name}" for name in t.conditioner.state_dict()}


# One dimension


def test_one_dimension_holds_its_parameters():
    t = perturb(Coupling(1))
    assert sum(p.numel() for p in t.parameters()) == 2
    z = torch.randn(7, 1)
    x = t(z)
    slopes = (x[1:] - x[:1]) / (z[1:] - z[:1])
    assert (x != z).all()
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=1e-3, atol=0)


def test_one_dimension_is_conditioned_on_the_context():
    t = coupling([False], context_dim=2)
    z = torch.ones(1, dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(lambda c: t.condition(c)(z), torch.randn(2, dtype=torch.float64))
    assert (matrix != 0).all()


# Masks


@pytest.mark.parametrize("dim", [1, 2, 3, 10])
def test_every_mask_fits_every_dimension(dim):
    for mask in (masks.half(dim), masks.alternating(dim), masks.random(dim, 0), *masks.growing(dim, 4)):
        assert (mask.dtype, mask.shape) == (torch.bool, (dim,))
        Coupling(dim, mask=mask)
    for mask in (masks.half(dim), masks.alternating(dim), masks.random(dim, 0)):
        assert mask.sum() == dim // 2


def test_default_mask_is_the_first_half():
    assert Coupling(5).mask == masks.half(5).tolist() == [True, True, False, False, False]


def test_random_masks_follow_their_seed_alone():
    a = masks.random(50, seed=1)
    state = torch.get_rng_state()
    assert torch.equal(masks.random(50, seed=1), a)
    assert not torch.equal(masks.random(50, seed=2), a)
    assert torch.equal(torch.get_rng_state(), state)


def test_channelwise_mask_passes_whole_channels():
    mask = masks.channelwise(3, 4, 5).reshape(3, 4, 5)
    assert mask[0].all() and not mask[1:].any()


@pytest.mark.parametrize(("dim", "num_masks"), [(2, 1), (6, 5), (10, 4), (3, 7)])
def test_what_growing_masks_transform_grows(dim, num_masks):
    grown = masks.growing(dim, num_masks)
    transformed = torch.stack([~mask for mask in grown])
    assert len(grown) == num_masks
    assert transformed[0].sum() == 1 and transformed[-1].sum() < dim
    # Each contains the one before, and properly where there are dimensions enough.
    assert (transformed[1:] >= transformed[:-1]).all()
    assert num_masks >= dim or (transformed.sum(-1).diff() > 0).all()


def test_all_growing_masks_together_transform_all_that_can_be():
    assert (~masks.growing(6, 5)[-1]).tolist() == [False] + [True] * 5


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_mask_may_be_any_sequence(kind):
    assert Coupling(3, mask=kind([False, True, False])).mask == [False, True, False]


@pytest.mark.parametrize(
    "mask",
    [[True], [True, False] * 2, [1, 0, 1], [1.0, 0.0, 0.0], [[True, False, False]], [], torch.tensor(True)],
    ids=str,
)
def test_what_is_no_mask_of_three_dimensions_raises(mask):
    with pytest.raises(OptionError, match="events of size 3: the mask must be 3 booleans, true for"):
        Coupling(3, mask=mask)


@pytest.mark.parametrize("dim", [1, 3])
def test_mask_that_transforms_nothing_raises(dim):
    with pytest.raises(OptionError, match="transforms nothing: make it false"):
        Coupling(dim, mask=[True] * dim)


def test_mask_that_leaves_nothing_to_condition_on_raises():
    for context_dim in (0, 2):
        with pytest.raises(OptionError, match="nothing to condition on: make it true.*Elementwise"):
            Coupling(3, mask=[False] * 3, context_dim=context_dim)


@pytest.mark.parametrize("conditioner", ["conv", "residual_conv"])
def test_one_channel_that_convolutions_cannot_split_raises(conditioner):
    message = r"events of shape \(1, 4, 6\) cannot split one index along its axis 0.*checkerboard\(4, 6\), or Squeeze"
    with pytest.raises(OptionError, match=message):
        Coupling((1, 4, 6), conditioner=conditioner)
    given = Coupling((1, 4, 6), conditioner=conditioner, context_dim=2)
    assert given.condition(torch.ones(2))(torch.ones(1, 4, 6)).shape == (1, 4, 6)


# Conditioners


def test_factory_is_called_with_sizes():
    calls = []

    def factory(*args):
        calls.append(args)
        return MLP(*args)

    Coupling(5, mask=[True, False, False, False, True], conditioner=factory, hidden_dims=(8,), context_dim=3)
    assert calls == [(2 + 3, 3 * 2, (8,))]


@pytest.mark.parametrize("name", ["made", "Mlp", ""])
def test_unknown_conditioner_raises(name):
    with pytest.raises(OptionError, match=f"mlp.*residual.*factory, got '{name}'"):
        Coupling(3, conditioner=name)


def test_unknown_univariate_raises():
    with pytest.raises(OptionError, match="affine.*got 'linear'"):
        Coupling(3, "linear")


REFUSED = {
    "dropout": nn.Dropout(0.1),
    "dropout-2d": nn.Dropout2d(0.1),
    "alpha-dropout": nn.AlphaDropout(0.1),
    "feature-alpha-dropout": nn.FeatureAlphaDropout(0.1),
    "random-slope": nn.RReLU(),
    "batch-norm": nn.BatchNorm1d(4),
    "lazy-batch-norm": nn.LazyBatchNorm1d(),
    "batch-norm-across-devices": nn.SyncBatchNorm(4),
    "instance-norm-with-running-statistics": nn.InstanceNorm1d(4, track_running_stats=True),
    "attention": nn.MultiheadAttention(4, 2, dropout=0.1),
    "recurrent": nn.LSTM(4, 4, num_layers=2, dropout=0.1),
    "deep-inside": nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Dropout(0.1))),
}


@pytest.mark.parametrize("module", REFUSED.values(), ids=REFUSED)
def test_conditioner_that_is_no_function_of_its_input_raises(module):
    with pytest.raises(OptionError, match=r"must not contain.*(random|rest of the batch|batches before).*remove it"):
        Coupling(4, conditioner=lambda *_: module)


def test_message_says_where_the_culprit_stands():
    with pytest.raises(OptionError, match=r"must not contain Dropout at '1\.1'"):
        Coupling(4, conditioner=lambda *_: REFUSED["deep-inside"])


@pytest.mark.parametrize(
    "module",
    [nn.Dropout(0.0), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)],
    ids=repr,
)
def test_harmless_modules_are_accepted(module):
    assert Coupling(4, conditioner=lambda *_: module).conditioner is module


def test_conditioner_that_is_no_module_raises():
    """Its parameters would silently not train."""
    with pytest.raises(OptionError, match="must be a torch.nn.Module, got function"):
        Coupling(4, conditioner=lambda *_: lambda z_a: z_a)


@pytest.mark.parametrize("layer", [Coupling, Autoregressive])
@pytest.mark.parametrize(("given", "kind"), [(None, "NoneType"), (nn.Linear(2, 2), "Linear"), (3, "int")], ids=str)
def test_a_conditioner_that_makes_no_network_is_refused(layer, given, kind):
    with pytest.raises(OptionError, match=f"a function that makes the network from its sizes, got {kind}"):
        layer(4, conditioner=given)

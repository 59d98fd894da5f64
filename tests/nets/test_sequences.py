"""Networks of long sequences: dilated convolutions that look both ways, and causal ones along all blocks at once."""

import pytest
import torch
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.nets import DilatedConv, GroupwiseConv
from tests.transforms.registry import perturb


def shifted(h, distance):
    """The values at that distance, zero beyond the border, ``(N, C, length)``."""
    index = torch.arange(h.shape[-1]) + distance
    inside = (index >= 0) & (index < h.shape[-1])
    return h[..., index.clamp(0, h.shape[-1] - 1)] * inside


def convolved(layer, h, distance):
    taps = [shifted(h, k * distance) for k in (-1, 0, 1)]
    return sum(torch.einsum("oi,nil->nol", layer.weight[..., k], taps[k]) for k in range(3)) + layer.bias[:, None]


def pointwise(layer, h):
    return torch.einsum("oi,nil->nol", layer.weight[..., 0], h) + layer.bias[:, None]


def test_dilated_convolutions_are_those_of_the_formula():
    net = perturb(DilatedConv(3, 4, (5, 6, 7, 8), num_axes=1).double())
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    h = convolved(net.input, x, 1)
    for k, (gate, residual) in enumerate(zip(net.gates, net.residuals, strict=True)):
        value, openness = convolved(gate, h, 2**k).split(gate.out_channels // 2, 1)
        h = h + pointwise(residual, torch.tanh(value) * torch.sigmoid(openness))
    expected = pointwise(net.output, F.silu(pointwise(net.head, F.silu(h))))
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("num_blocks", [1, 3, 5])
def test_reach_of_dilated_convolutions(num_blocks):
    net = perturb(DilatedConv(2, 3, (6,) * num_blocks, num_axes=1).double())
    x = torch.randn(1, 2, 101, dtype=torch.float64, requires_grad=True)
    net(x)[..., 50].sum().backward()
    seen = x.grad.abs().sum((0, 1)).nonzero().flatten()
    assert (seen[0], seen[-1]) == (50 - 2**num_blocks, 50 + 2**num_blocks)


def test_dilations_start_anew_after_eight():
    net = DilatedConv(1, 1, (2,) * 9, num_axes=1)
    assert [gate.dilation for gate in net.gates] == [(2**k,) for k in (*range(8), 0)]


@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_dilated_convolutions_start_at_zero(num_axes):
    theta = DilatedConv(2, 5, (4, 4), num_axes)(torch.randn(3, 2, *(6, 5, 4)[:num_axes]))
    assert theta.shape == (3, 5, *(6, 5, 4)[:num_axes]) and (theta == 0).all()


@pytest.mark.parametrize("options", [{"hidden_dims": ()}, {"hidden_dims": (4, 0)}, {"num_axes": 4}], ids=str)
def test_dilated_convolutions_refuse_sizes(options):
    with pytest.raises(OptionError):
        DilatedConv(2, 3, **options)


# Groups of places: of (length, number of groups), the last block is shorter in some.
SIZES = [(12, 4), (11, 4), (9, 4), (5, 5), (4, 1), (1, 1)]
all_sizes = pytest.mark.parametrize(("length", "num_groups"), SIZES)


def groupwise(length, num_groups, embedding_dim=2, reach=1):
    return perturb(GroupwiseConv(length, 3, 5, num_groups, (6, 6, 6), embedding_dim, reach).double())


@all_sizes
@pytest.mark.parametrize(("embedding_dim", "reach"), [(None, 1), (2, 0), (2, 1), (2, 2)])
def test_parameters_depend_on_earlier_groups_within_reach(length, num_groups, embedding_dim, reach):
    net = groupwise(length, num_groups, embedding_dim, reach)
    one_hot = torch.eye(3, dtype=torch.float64)[torch.randint(3, (length,))]
    by_input = torch.autograd.functional.jacobian(net, one_hot).abs().sum((1, 3))  # (place, place it depends on)
    place = torch.arange(length)
    group, block = place % num_groups, place // num_groups
    is_earlier = group[:, None] > group
    is_near = (block[:, None] - block).abs() <= reach
    assert ((by_input > 0) == (is_earlier & is_near)).all()
    assert net.order == sorted(range(length), key=lambda j: (j % num_groups, j))


def test_blocks_share_weights():
    net = groupwise(20, 4)
    categories = torch.randint(3, (4,)).repeat(5)
    theta = net(torch.eye(3, dtype=torch.float64)[categories]).view(5, 4, -1)
    torch.testing.assert_close(theta[1], theta[3])
    assert not torch.allclose(theta[0, 1:], theta[1, 1:])  # nothing stands before the first


@all_sizes
@pytest.mark.parametrize("reach", [0, 1, 2])
def test_steps_find_what_passes_find(length, num_groups, reach):
    net = groupwise(length, num_groups, reach=reach)
    given = torch.randint(5, (7, length))

    def category_of(known, theta):
        return (known + theta.argmax(-1)) % 3

    found = net.by_place(given, None, category_of)
    theta = net(torch.eye(3, dtype=torch.float64)[found])
    assert torch.equal(found, category_of(given, theta))
    traced = torch.func.vmap(lambda row: net.by_place(row[None], None, category_of)[0])(given)
    assert torch.equal(traced, found)


def test_parameters_of_one_channel_may_be_many():
    assert GroupwiseConv(8, 2, 9, 4, (3,), 1)(torch.eye(2)[torch.zeros(4, 8, dtype=torch.long)]).shape == (4, 8, 9)


@pytest.mark.parametrize("num_groups", [0, 9, 1.5])
def test_numbers_of_groups_are_checked(num_groups):
    with pytest.raises(OptionError, match="num_groups"):
        GroupwiseConv(8, 2, 2, num_groups)

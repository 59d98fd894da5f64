"""The block autoregressive layer: its formula, its bounds whatever its parameters are, and the cost of its inverse."""

import math

import pytest
import torch
from torch.nn import functional as F

import pyroflows as pf
from pyroflows.errors import OptionError
from pyroflows.transforms import BlockAutoregressive
from pyroflows.transforms.triangular import block_autoregressive
from tests.transforms.registry import perturb, points

MIN_SLOPE, MAX_STRETCH = 1e-3, math.exp(2)


def wild(scale, hidden_dims=(6,), dtype=torch.float64):
    """A layer whose parameters have this size."""
    layer = BlockAutoregressive(4, [2, 0, 3, 1], hidden_dims).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, scale)
    return layer


def by_loops(layer, z):
    """x and the log-slopes of one row, unit by unit, as the class describes them."""
    order, widths = layer.order, layer.hidden_dims
    value = layer.parameters_of.value.split(layer._sizes, 1)
    sharpness = [torch.exp(3 * torch.tanh(5 * raw / 3)) for raw in value[0:-3:2]]
    biases, (heights, shift, log_scale) = value[1:-3:2], value[-3:]
    z = z[order]
    t, h, s = {}, {}, {}
    for j in range(len(order)):
        for k, width in enumerate(widths):
            weight = layer.weights[k].weight
            for u in range(width):
                row = weight[j * width + u]
                if k == 0:
                    earlier = sum(row[i] * z[i] for i in range(j))
                    own, slope = z[j], torch.tensor(1.0)
                else:
                    last = widths[k - 1]
                    earlier = sum(row[i * last + v] * t[i, k - 1, v] for i in range(j) for v in range(last))
                    mixing = torch.softmax(layer.mixing[k - 1][j, u], -1)
                    own = sum(mixing[v] * h[j, k - 1, v] for v in range(last))
                    slope = sum(mixing[v] * s[j, k - 1, v] for v in range(last))
                t[j, k, u] = torch.tanh(sharpness[k][j, u] * own + biases[k][j, u] + earlier)
                h[j, k, u] = t[j, k, u] / sharpness[k][j, u]
                s[j, k, u] = (1 - t[j, k, u] ** 2) * slope
    units, top, last = widths[-1], len(widths) - 1, layer.weights[-1].weight
    shifted = math.log(math.expm1(1 - 1e-3))
    x, log_slopes = torch.zeros(2, len(order), dtype=z.dtype)
    for j in range(len(order)):
        m = F.softplus(5 * units * heights[j] + shifted) - (1 - 1e-3)
        sigma = torch.exp(2 * torch.tanh(log_scale[j, 0] / 2))
        own = z[j] + sum(m[u] * h[j, top, u] for u in range(units)) / units
        earlier = sum(
            last[j, i] * z[i] + sum(last[j, len(order) + i * units + u] * t[i, top, u] for u in range(units))
            for i in range(j)
        )
        x[order[j]] = sigma * own + shift[j, 0] + earlier
        log_slopes[order[j]] = torch.log(sigma * (1 + sum(m[u] * s[j, top, u] for u in range(units)) / units))
    return x, log_slopes


@pytest.mark.parametrize("hidden_dims", [(3,), (3, 2), (2, 4, 3)])
@torch.no_grad()
def test_formula(hidden_dims):
    layer = perturb(BlockAutoregressive(4, [2, 0, 3, 1], hidden_dims).double())
    z = torch.randn(5, 4, dtype=torch.float64)
    expected = [torch.stack(rows) for rows in zip(*(by_loops(layer, row) for row in z), strict=True)]
    torch.testing.assert_close(list(layer._forward_and_log_slopes(z, None)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("hidden_dims", [(6,), (6, 4)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e3])
@torch.no_grad()
def test_slopes_are_positive_and_the_inverse_exists(scale, hidden_dims, dtype):
    """Whatever the parameters are: the search of a root has its bracket, and finds the root or raises."""
    layer = wild(scale, hidden_dims, dtype)
    z, inverse_log_slopes = layer._inverse_and_log_slopes(points((200,), 4, dtype), None)
    log_slopes = layer._forward_and_log_slopes(z, None)[1]
    assert z.isfinite().all() and inverse_log_slopes.isfinite().all()
    least = math.log(MIN_SLOPE / MAX_STRETCH) - 0.01
    assert (log_slopes >= least).all() and (inverse_log_slopes <= -least).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_far_tails_are_linear(dtype):
    """Slopes lie between exp(-2) and exp(2) there, so that rows stay finite in both directions."""
    layer = wild(1.0, dtype=dtype)
    for distance in (1e4, 1e12, 1e20):
        far = distance * torch.randn(50, 4, dtype=dtype)
        for values, log_slopes in (layer._forward_and_log_slopes(far, None), layer._inverse_and_log_slopes(far, None)):
            assert values.isfinite().all() and values.abs().amax() < 1e3 * far.abs().amax()
            assert (log_slopes.abs() <= 2 + 1e-5).float().mean() > 0.98  # some rows are near zero in a column


def test_a_round_trip_of_a_trained_flow_in_float32():
    torch.manual_seed(0)
    column = torch.randn(2000)
    x = torch.stack([column, torch.sin(3 * column) + 0.05 * torch.randn(2000)], -1)
    flow = pf.flows.BNAF(2, num_layers=2)
    pf.fit_density(flow, x, max_epochs=8, seed=0, progress_bar=False)
    with torch.no_grad():
        z = torch.randn(1000, 2)
        x, ladj = flow.transform.forward_and_ladj(z)
        again, inverse_ladj = flow.transform.inverse_and_ladj(x)
        assert x.isfinite().all() and ladj.isfinite().all()
        # Slopes of x are as small as 0.05, and those of each layer's base end as large as twenty.
        assert ((again - z).abs().amax(-1) <= 1e-4).float().mean() > 0.99
        assert (ladj + inverse_ladj).abs().median() < 1e-4


def test_second_derivatives_of_the_inverse():
    """The gradients of a root are those of the implicit function, of any order."""
    layer = perturb(BlockAutoregressive(3, [1, 2, 0], (4,)).double())
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer.inverse_and_ladj, (x,), fast_mode=True)


@torch.no_grad()
def test_the_inverse_evaluates_one_dimension_at_a_time(monkeypatch):
    shapes = []
    network = block_autoregressive._network
    monkeypatch.setattr(
        block_autoregressive, "_network", lambda units, z, below: shapes.append(z.shape) or network(units, z, below)
    )
    layer = BlockAutoregressive(5, hidden_dims=(6,))
    layer(torch.randn(7, 5))
    assert shapes == [(5, 7)]
    shapes.clear()
    layer.inv(torch.randn(7, 5))
    assert set(shapes) == {(7,)}


def test_a_context_moves_each_kind_of_parameter():
    layer = BlockAutoregressive(2, context_dim=3)
    assert layer.parameters_of(torch.zeros(3)).shape == layer.parameters_of.value.shape
    with torch.no_grad():
        layer.parameters_of.net[-1].bias += 0.1
    z, context = torch.randn(5, 2), torch.randn(5, 3)
    x, ladj = layer.forward_and_ladj(z, context)
    assert ((x - z).abs() > 1e-3).all() and (ladj.abs() > 1e-3).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": (2, 3)}, r"BlockAutoregressive takes vectors, got events of shape \(2, 3\)"),
        ({"dim": 2, "context_dim": (2, 3)}, r"takes vectors, got events of size 2 and contexts of shape \(2, 3\)"),
        ({"dim": 3, "order": [0, 1]}, r"must be a permutation of 0 to 2, got \[0, 1\]"),
        ({"dim": 3, "hidden_dims": ()}, "hidden_dims must be one or more positive widths"),
        ({"dim": 3, "hidden_dims": (8, 0)}, "hidden_dims must be one or more positive widths"),
    ],
)
def test_wrong_options_raise(arguments, message):
    with pytest.raises(OptionError, match=message):
        BlockAutoregressive(**arguments)

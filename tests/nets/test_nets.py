"""Conditioners, and the univariate maps that they parametrise."""

import math
from itertools import pairwise

import pytest
import torch

from pyroflows.errors import OptionError
from pyroflows.nets import MADE, MLP, CausalConv, Parameters, ScaledMADE, ScaledMLP
from pyroflows.nets.perceptron import _by_columns, _WrittenOut
from pyroflows.nets.products import product
from pyroflows.transforms import Autoregressive, Elementwise
from pyroflows.transforms.univariate import Affine
from tests.transforms.registry import perturb

ORDERS = {
    "one": [0],
    "ascending": [0, 1],
    "descending": [4, 3, 2, 1, 0],
    "mixed": [2, 0, 4, 1, 3],
    "many": torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist(),
}
WIDE = (64, 64)
HIDDEN_DIMS = [WIDE, (3,), (1, 2), (5, 3, 7)]

all_orders = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


def made(order, context_dim=0, hidden_dims=WIDE):
    return perturb(MADE(order, 2, hidden_dims, context_dim).double())


def dependence(net, order, context=None):
    """``(D, D)``: how much the parameters of place i depend on the input of place j, places counted in the order."""
    z = torch.randn(len(order), dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(lambda z: net(z, context), z).abs().sum(1)
    return rows[order][:, order]


# The masked network


@all_orders
@pytest.mark.parametrize("hidden_dims", HIDDEN_DIMS, ids=str)
@pytest.mark.parametrize("context_dim", [0, 3])
def test_made_is_strictly_triangular_in_its_order(order, hidden_dims, context_dim):
    net = made(order, context_dim, hidden_dims)
    context = torch.randn(context_dim, dtype=torch.float64) if context_dim else None
    assert (dependence(net, order, context).triu() == 0).all()


@all_orders
@pytest.mark.parametrize("context_dim", [0, 3])
def test_made_sees_all_earlier_inputs_where_wide_enough(order, context_dim):
    context = torch.randn(context_dim, dtype=torch.float64) if context_dim else None
    earlier = torch.ones(len(order), len(order)).tril(-1).bool()
    assert (dependence(made(order, context_dim), order, context)[earlier] > 0).all()


@all_orders
@pytest.mark.parametrize("hidden_dims", HIDDEN_DIMS, ids=str)
def test_narrow_made_still_sees_something(order, hidden_dims):
    """However few hidden units there are, the last place must see an input."""
    if len(order) > 1:
        assert dependence(made(order, hidden_dims=hidden_dims), order)[-1].max() > 0


@all_orders
@pytest.mark.parametrize("hidden_dims", HIDDEN_DIMS, ids=str)
def test_context_reaches_every_output(order, hidden_dims):
    net = made(order, 3, hidden_dims)
    z = torch.randn(len(order), dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(lambda c: net(z, c), torch.randn(3, dtype=torch.float64))
    assert (rows.abs().sum(-1) > 0).all()


@all_orders
def test_made_without_context_gives_the_first_place_a_constant(order):
    net = made(order)
    a, b = (net(torch.randn(len(order), dtype=torch.float64))[order[0]] for _ in range(2))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (a != 0).all()


@pytest.mark.parametrize("batch_shape", [(), (7,), (3, 2), (0,)], ids=str)
def test_shapes_of_made(batch_shape):
    net = MADE([1, 0, 2], 4, context_dim=2)
    assert net(torch.randn(*batch_shape, 3), torch.randn(*batch_shape, 2)).shape == (*batch_shape, 3, 4)
    assert net(torch.randn(*batch_shape, 3), torch.randn(2)).shape == (*batch_shape, 3, 4)


def test_conditioners_start_at_zero():
    z, context = torch.randn(7, 5), torch.randn(7, 3)
    assert (MADE(range(5), 2, context_dim=3)(z, context) == 0).all()
    assert (MLP(5, 4)(z) == 0).all()
    value = torch.randn(2, 2)
    assert (Parameters(value.clone(), 3)(context) == value).all()


def test_zero_output_layer_learns():
    """Zero is a start, not a fixed point: the last layer gets a gradient from it."""
    net = MADE(range(5), 2)
    net(torch.randn(7, 5)).sum().backward()
    assert (net.output.weight.grad != 0).any()


def test_masks_follow_from_the_arguments():
    """They are not saved, and move with the module."""
    net = MADE([1, 0], 2)
    assert not any("mask" in key for key in net.state_dict())
    assert net.double().input.mask.dtype == torch.float64


@pytest.mark.parametrize("hidden_dims", [(), (0,), (8, 0), (-1,)], ids=str)
def test_made_without_hidden_units_raises(hidden_dims):
    with pytest.raises(OptionError, match="hidden_dims"):
        MADE(range(3), 2, hidden_dims)


def test_perceptron_without_hidden_layers_is_linear():
    assert MLP(3, 2, ())(torch.randn(7, 3)).shape == (7, 2)


@pytest.mark.parametrize("batch_shape", [(), (7,), (3, 2)], ids=str)
def test_shapes_of_parameters(batch_shape):
    parameters = Parameters(torch.zeros(4, 2), 3)
    assert parameters(torch.randn(*batch_shape, 3)).shape == (*batch_shape, 4, 2)
    assert Parameters(torch.zeros(4, 2))().shape == (4, 2)


# Causal convolutions


def causal_conv(order, **options):
    return perturb(CausalConv(order, 3, **{"hidden_dims": (8, 6, 7), **options}).double())


def dependence_of_places(net, length, channels=1, context=None):
    """``(L, L)``: how much the parameters of place i depend on the inputs of place j."""
    shape = (channels, length) if net.channels else (length,)
    z = torch.randn(shape, dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(lambda z: net(z, context), z).abs()
    rows = rows.reshape(channels, length, net.num_params, channels, length).sum((0, 2, 3))
    return rows[net.order][:, net.order]


@all_orders
@pytest.mark.parametrize("channels", [None, 1, 2])
@pytest.mark.parametrize("context_dim", ["none", "vector", "sequence"])
def test_causal_conv_is_strictly_triangular_in_its_order(order, channels, context_dim):
    shape = {"none": 0, "vector": 3, "sequence": (2, len(order))}[context_dim]
    net = causal_conv(order, channels=channels, context_dim=shape)
    context = None if shape == 0 else torch.randn(shape, dtype=torch.float64)
    assert (dependence_of_places(net, len(order), channels or 1, context).triu() == 0).all()


@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize(("num_blocks", "dilation_cycle"), [(1, 8), (3, 8), (4, 2)])
def test_causal_conv_sees_its_receptive_field(kernel_size, num_blocks, dilation_cycle):
    options = {"hidden_dims": (8,) * num_blocks, "kernel_size": kernel_size, "dilation_cycle": dilation_cycle}
    net = causal_conv(range(30), **options)
    distance = torch.arange(30)[:, None] - torch.arange(30)
    sees = dependence_of_places(net, 30) > 0
    assert torch.equal(sees, (distance >= 1) & (distance <= net.receptive_field))


def test_causal_conv_has_the_dilations_of_its_cycle():
    assert causal_conv(range(3), hidden_dims=(4,) * 5, dilation_cycle=3).dilations == [1, 2, 4, 1, 2]


@all_orders
def test_conditioning_sequence_acts_at_its_own_time_and_later(order):
    net = causal_conv(order, context_dim=(2, len(order)))
    z, context = torch.randn(len(order), dtype=torch.float64), torch.randn(2, len(order), dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(lambda c: net(z, c), context).abs().sum((1, 2))[order][:, order]
    assert (rows.triu(1) == 0).all() and (rows.diagonal() > 0).all()


@all_orders
def test_order_of_causal_conv_is_one_of_times(order):
    """In any order the network is the one of the ascending order, applied to the sequence by place."""
    net = causal_conv(order, channels=2, context_dim=(1, len(order)))
    ascending = causal_conv(range(len(order)), channels=2, context_dim=(1, len(order)))
    ascending.load_state_dict(net.state_dict())
    z = torch.randn(4, 2, len(order), dtype=torch.float64)
    context = torch.randn(4, 1, len(order), dtype=torch.float64)
    expected = ascending(z[..., order], context[..., order])
    torch.testing.assert_close(net(z, context)[..., order, :], expected, rtol=0, atol=0)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_weights_of_one_length_load_into_another(context_dim):
    short = causal_conv(range(20), context_dim=context_dim)
    long = CausalConv(range(50), 3, (8, 6, 7), context_dim).double()
    long.load_state_dict(short.state_dict())
    z, context = torch.randn(50, dtype=torch.float64), torch.randn(context_dim, dtype=torch.float64)
    torch.testing.assert_close(long(z, context)[:20], short(z[:20], context))


@pytest.mark.parametrize("batch_shape", [(), (7,), (3, 2), (0,)], ids=str)
def test_shapes_of_causal_conv(batch_shape):
    z, context = torch.randn(*batch_shape, 9), torch.randn(*batch_shape, 2)
    assert CausalConv(range(9), 4, (5,))(z).shape == (*batch_shape, 9, 4)
    assert CausalConv(range(9), 4, (5,), 2)(z, context).shape == (*batch_shape, 9, 4)
    z = torch.randn(*batch_shape, 3, 9)
    assert CausalConv(range(9), 4, (5,), (2, 9), 3)(z, torch.randn(2, 9)).shape == (*batch_shape, 3, 9, 4)


def test_causal_conv_starts_at_zero_and_learns():
    net = CausalConv(range(9), 2)
    theta = net(torch.randn(7, 9))
    assert (theta == 0).all()
    theta.sum().backward()
    assert (net.output.weight.grad != 0).any()


def test_parameters_of_causal_conv_are_contiguous_blocks():
    theta = CausalConv(range(9), 2, (5,), channels=3)(torch.randn(7, 3, 9))
    assert theta[0, ..., 0].is_contiguous()


@pytest.mark.parametrize("options", [{"hidden_dims": ()}, {"kernel_size": 1}, {"dilation_cycle": 0}], ids=str)
def test_causal_conv_of_wrong_sizes_raises(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        CausalConv(range(9), 2, **options)


# The affine map


@pytest.mark.parametrize(("contraction", "expansion"), [(4.0, 2.0), (0.1, 3.0), (1e-3, 1e-3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_affine_scale_stays_within_its_bounds(contraction, expansion, dtype):
    raw = torch.cat([-torch.logspace(-10, 30, 401, dtype=dtype), torch.logspace(-10, 30, 401, dtype=dtype)])
    raw = torch.cat([raw, torch.tensor([0.0, math.inf, -math.inf], dtype=dtype)])
    theta = torch.stack([torch.zeros_like(raw), raw], -1).requires_grad_()
    _, ladj = Affine(contraction, expansion).forward_and_ladj(torch.ones_like(raw), theta)
    # Each bound is the sum or difference of the middle of both and half their distance.
    rounding = torch.finfo(dtype).eps * (contraction + expansion)
    assert (ladj >= -contraction - rounding).all()
    assert (ladj <= expansion + rounding).all()
    # The bounds are reached, and nothing is NaN on the way.
    torch.testing.assert_close(ladj.max().item(), expansion)
    torch.testing.assert_close(ladj.min().item(), -contraction)
    assert torch.autograd.grad(ladj.sum(), theta)[0].isfinite().all()


def test_affine_log_scale_is_smooth_at_zero():
    """Different bounds on the two sides must not make a kink."""
    s = torch.tensor([-1e-6, 1e-6], dtype=torch.float64, requires_grad=True)
    theta = torch.stack([torch.zeros_like(s), s], -1)
    _, ladj = Affine(4.0, 2.0).forward_and_ladj(torch.ones_like(s), theta)
    (slope,) = torch.autograd.grad(ladj.sum(), s)
    torch.testing.assert_close(slope, torch.ones_like(s))


def test_affine_without_bounds_is_the_exponential():
    theta = torch.tensor([[1.0, -7.0], [0.0, 7.0]])
    x, ladj = Affine(None, None).forward_and_ladj(torch.ones(2), theta)
    torch.testing.assert_close(x, torch.tensor([1 + math.exp(-7), math.exp(7)]))
    torch.testing.assert_close(ladj, theta[:, 1])


@pytest.mark.parametrize("univariate", [Affine(), Affine(None, None), Affine(0.5, 0.1)], ids=repr)
def test_zero_parameters_are_the_identity(univariate):
    z, theta = torch.randn(7), torch.zeros(7, univariate.num_params)
    for x, ladj in (univariate.forward_and_ladj(z, theta), univariate.inverse_and_ladj(z, theta)):
        assert (x == z).all()
        assert (ladj == 0).all()


# Infinity might be meant as "no bound", for which there is None; inf tanh(s / inf) is inf times 0.
@pytest.mark.parametrize("bound", [0.0, -1.0, None, math.nan, math.inf])
def test_bad_bounds_raise(bound):
    for bounds in ((bound, 1.0), (1.0, bound)):
        with pytest.raises(OptionError, match="bounds"):
            Affine(*bounds)


# Names and orders


@pytest.mark.parametrize("structure", [Elementwise, Autoregressive])
def test_unknown_univariate_raises(structure):
    with pytest.raises(OptionError, match="affine.*got 'linear'"):
        structure(3, "linear")


@pytest.mark.parametrize("structure", [Elementwise, Autoregressive])
def test_univariate_by_instance(structure):
    univariate = Affine(1.0, 1.0)
    assert structure(3, univariate).univariate is univariate


def test_unknown_conditioner_raises():
    with pytest.raises(OptionError, match="made.*got 'mlp'"):
        Autoregressive(3, conditioner="mlp")


def test_conditioner_by_factory():
    calls = []

    def factory(*args):
        calls.append(args)
        return MADE(*args)

    Autoregressive(3, order=[2, 0, 1], conditioner=factory, hidden_dims=(8,), context_dim=2)
    assert calls == [([2, 0, 1], 2, (8,), 2)]


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [1, 2, 3], [0, 1, 2, 3], []], ids=str)
def test_no_permutation_as_order_raises(order):
    with pytest.raises(OptionError, match="permutation of 0 to 2"):
        Autoregressive(3, order=order)


@pytest.mark.parametrize("seed", range(3))
def test_a_step_of_adam_moves_a_scaled_mlp_alike_at_any_width(seed):
    """The output layer starts at zero, so the first step moves the output by the rate times the sum of its inputs."""

    def moved(kind, width):
        torch.manual_seed(seed)
        net, x = kind(3, 4, (width, width)), torch.randn(20, 3)
        optimiser = torch.optim.Adam(net.parameters(), lr=0.05)
        net(x).sum().backward()
        optimiser.step()
        return net(x).abs().mean()

    assert 0.5 < moved(ScaledMLP, 512) / moved(ScaledMLP, 32) < 2
    assert moved(MLP, 512) / moved(MLP, 32) > 6


@pytest.mark.parametrize("seed", range(3))
def test_a_step_of_adam_moves_a_scaled_made_alike_at_any_width(seed):
    def moved(kind, width):
        torch.manual_seed(seed)
        net, z = kind(range(4), 2, (width, width)), torch.randn(20, 4)
        optimiser = torch.optim.Adam(net.parameters(), lr=0.05)
        net(z).sum().backward()
        optimiser.step()
        return (net(z) - net.output.bias.reshape(2, 4).T).abs().mean()

    assert 0.3 < moved(ScaledMADE, 512) / moved(ScaledMADE, 32) < 2
    assert moved(MADE, 512) / moved(MADE, 32) > 5


def test_a_scaled_made_starts_where_a_made_does():
    """The same seed gives hidden layers with the same values; the output layers are zero, here they are set."""
    z, found = torch.randn(5, 3), []
    for kind in (MADE, ScaledMADE):
        torch.manual_seed(0)
        net = kind([1, 0, 2], 2, (16, 16))
        assert (net(z) == 0).all()
        torch.nn.init.ones_(net.output.weight)
        found.append(net(z))
    # The outputs of place 2 see all 16 units, those of place 1 see 8, those of place 0 see none.
    torch.testing.assert_close(found[1], found[0] * torch.tensor([2 / 8, 1.0, 2 / 16])[:, None])


def test_a_scaled_mlp_starts_where_an_mlp_does():
    """The same seed gives hidden layers with the same values; the output layers are zero, here they are set."""
    x, found = torch.randn(5, 3), []
    for kind, factor in ((MLP, 1), (ScaledMLP, 2 / 16)):
        torch.manual_seed(0)
        net = kind(3, 4, (16, 16))
        torch.nn.init.ones_(net[-1].weight)
        found.append(net(x) / factor)
    torch.testing.assert_close(found[0], found[1])


# The function of perceptrons, whose gradient is written out


def columns_and_parameters(with_offset):
    """Columns, an offset, factors, weights and biases of a network of widths 3, 5, 4, 2."""
    torch.manual_seed(0)
    widths = [3, 5, 4, 2]
    weights = [torch.randn(b, a, dtype=torch.float64, requires_grad=True) for a, b in pairwise(widths)]
    biases = [torch.randn(b, dtype=torch.float64, requires_grad=True) for b in widths[1:]]
    factors = [(torch.rand(5, 3) < 0.5).double(), 0.5, None]
    offset = torch.randn(5, 7, dtype=torch.float64, requires_grad=True) if with_offset else None
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    return x, offset, factors, *weights, *biases


@pytest.mark.parametrize("with_offset", [False, True])
def test_written_out_gradient_of_perceptrons_is_that_of_the_recorded_one(with_offset):
    arguments = columns_and_parameters(with_offset)
    inputs = [t for t in arguments if isinstance(t, torch.Tensor)]
    output, expected = _WrittenOut.apply(*arguments), _by_columns(*arguments)
    torch.testing.assert_close(output, expected)
    g = torch.randn_like(output)
    found, right = (torch.autograd.grad(o, inputs, g, retain_graph=True) for o in (output, expected))
    torch.testing.assert_close(found, right)
    batch = torch.stack([g, -g])
    batched = torch.autograd.grad(output, inputs, batch, is_grads_batched=True)
    torch.testing.assert_close([t[1] for t in batched], [-t for t in right])


def test_second_derivatives_of_perceptrons():
    arguments = columns_and_parameters(True)
    inputs = [t for t in arguments if isinstance(t, torch.Tensor)]

    def function(*tensors):
        values = iter(tensors)
        return _WrittenOut.apply(*(next(values) if isinstance(t, torch.Tensor) else t for t in arguments))

    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_all_sizes_are_products(transposed):
    for size in (4, 256):
        a, b = torch.randn(size, size), torch.randn(2 * size, size).T
        a = a.T if transposed else a
        torch.testing.assert_close(product(a, b), a @ b, rtol=1e-5, atol=1e-4)


def test_wide_perceptrons_equal_narrow_ones_in_rows():
    """The widths decide by which library products are computed, and how gradients are."""
    net = perturb(MLP(16, 16, (256, 256)))
    x = torch.randn(2, 256, 16, requires_grad=True)
    rows = torch.nn.Sequential.forward(net, x)
    torch.testing.assert_close(net(x), rows, rtol=1e-4, atol=1e-5)
    found, right = (torch.autograd.grad(y.square().mean(), [x, *net.parameters()]) for y in (net(x), rows))
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-6)

"""Layers that mask or order an axis of events with several axes, such as the channels or the rows of an image."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows.errors import OptionError, ShapeError
from pyroflows.nets import MLP, CausalConv, IncrementalGradient
from pyroflows.nets.mlp import zero_initialized
from pyroflows.shapes import shape_of
from pyroflows.transforms import Autoregressive, Compose, Coupling, Elementwise, masks
from tests.transforms.registry import perturb

SHAPE = (3, 4, 2)
ORDERS = {3: [1, 2, 0], 4: [2, 0, 3, 1], 2: [1, 0]}


class Plain(nn.Module):
    """Parameters that are linear in sums over earlier places, of all channels, and in the context."""

    def __init__(self, order, num_params, hidden_dims, context_dim, channels=()):
        super().__init__()
        self.order, self.channels = order, shape_of(channels)
        size = math.prod(self.channels)
        self.weight = nn.Parameter(torch.zeros(num_params * size, size))
        self.context = zero_initialized(nn.Linear(context_dim, num_params * size)) if context_dim else None

    def theta(self, earlier, context):
        """``(P, *channels, K)`` from sums ``(C, K)`` and a context ``(K or 1, context_dim)``."""
        theta = self.weight @ earlier + (0 if context is None else self.context(context).T)
        return theta.unflatten(0, (-1, *self.channels))

    def forward(self, z, context=None):
        values = torch.tanh(z)[..., self.order]
        earlier = (values.cumsum(-1) - values)[..., torch.tensor(self.order).argsort()]
        theta = self.weight @ earlier.flatten(-1 - len(self.channels), -2)
        if context is not None:
            theta = theta + self.context(context)[..., None]
        return theta.unflatten(-2, (-1, *self.channels)).movedim(-2 - len(self.channels), -1)


class Stepwise(Plain):
    """The same, evaluated place by place in both directions."""

    def incremental(self, num_rows, context=None):
        return ForwardSteps(self, num_rows, context)

    def with_gradient_steps(self, z, context=None):
        rows = z.detach().reshape(-1, *self.channels, len(self.order))
        return self(z, context), partial(BackwardSteps, self, rows.transpose(0, -1))


class ForwardSteps:
    def __init__(self, net, num_rows, context):
        self.net, self.context = net, context
        self.inputs = net.weight.new_full((len(net.order), *net.channels, num_rows), torch.nan)

    def parameters_at(self, i):
        return self.net.theta(torch.tanh(self.inputs[:i]).sum(0).flatten(0, -2), self.context)


class BackwardSteps:
    def __init__(self, net, z, inputs):
        self.net, self.slopes, self.inputs = net, 1 - torch.tanh(z) ** 2, inputs

    def pull_back(self, i, gradient):
        share = (self.net.weight.T @ gradient.flatten(0, -2)).unflatten(0, self.net.channels)
        earlier = self.net.order[:i]
        self.inputs[earlier] += self.slopes[earlier] * share


def convolution(in_dim, out_dim, hidden_dims):
    """A network of one's own that mixes places: the parameters at each depend on its neighbours."""
    first, last = nn.Conv2d(in_dim, *hidden_dims, 3, padding=1), nn.Conv2d(*hidden_dims, out_dim, 3, padding=1)
    return nn.Sequential(first, nn.SiLU(), zero_initialized(last))


def coupling(context_dim, shape=SHAPE, **options):
    return Coupling(shape, **{"hidden_dims": (8,), **options}, context_dim=context_dim)


def ordered(context_dim, shape=SHAPE, axis=-1, conditioner=Stepwise, **options):
    order = ORDERS[shape[axis]]
    return Autoregressive(shape, order=order, conditioner=conditioner, context_dim=context_dim, axis=axis, **options)


LAYERS = {
    "coupling": coupling,
    "coupling-spline": partial(coupling, univariate="spline", conditioner="residual"),
    "coupling-rows": partial(coupling, axis=1, mask=masks.alternating(4)),
    "coupling-last-axis": partial(coupling, axis=-1, mask=[False, True]),
    "coupling-convolution": partial(coupling, conditioner=convolution, mask=[True, False, True]),
    "coupling-one-channel": partial(coupling, shape=(1, 4, 2)),
    "coupling-one-row": partial(coupling, shape=(3, 1, 2), axis=1),
    "autoregressive": ordered,
    "autoregressive-rows": partial(ordered, axis=1),
    "autoregressive-channels": partial(ordered, axis=0, univariate="spline"),
    "autoregressive-plain": partial(ordered, axis=-2, conditioner=Plain),
    "autoregressive-inverse": lambda context_dim: ordered(context_dim, axis=0).inv,
    "time-first": partial(ordered, shape=(4, 3), axis=0, conditioner="causal_conv", hidden_dims=(8, 8)),
    "elementwise": lambda context_dim: Elementwise(SHAPE, "spline", context_dim),
    "compose": lambda context_dim: Compose([ordered(context_dim, axis=1), coupling(context_dim), ordered(0).inv]),
}
with_and_without_context = pytest.mark.parametrize("context_dim", [0, 5])
all_layers = pytest.mark.parametrize("name", LAYERS)
ordered_layers = pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith(("auto", "time"))])
both_directions = pytest.mark.parametrize("direction", ["forward", "inverse"])
batch_shapes = pytest.mark.parametrize("batch_shape", [(), (2, 3), (0,)], ids=str)


def layer(name, context_dim=0, dtype=torch.float64, scale=0.5):
    return perturb(LAYERS[name](context_dim).to(dtype), scale)


def inputs(t, batch_shape=(), dtype=torch.float64):
    context = torch.randn(*batch_shape, *t.context_shape, dtype=dtype) if t.context_dim else None
    return 2 * torch.randn(*batch_shape, *t.event_shape, dtype=dtype), context


def pair_of(t, direction):
    return t.forward_and_ladj if direction == "forward" else t.inverse_and_ladj


# Laws


@all_layers
@with_and_without_context
@both_directions
def test_log_determinant_is_that_of_the_jacobian(name, context_dim, direction):
    t = layer(name, context_dim)
    value, context = inputs(t)
    matrix = torch.autograd.functional.jacobian(lambda v: pair_of(t, direction)(v, context)[0], value)
    ladj = pair_of(t, direction)(value, context)[1]
    torch.testing.assert_close(ladj, torch.linalg.slogdet(matrix.reshape(t.dim, t.dim)).logabsdet)


@all_layers
@with_and_without_context
@batch_shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_inverse_undoes_forward(name, context_dim, batch_shape, dtype):
    t = layer(name, context_dim, dtype)
    z, context = inputs(t, batch_shape, dtype)
    with torch.no_grad():
        x, ladj = t.forward_and_ladj(z, context)
        z_again, ladj_again = t.inverse_and_ladj(x, context)
    assert (x.shape, ladj.shape, x.dtype, ladj.dtype) == (z.shape, batch_shape, dtype, dtype)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(z_again, z, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ladj_again, -ladj, rtol=tolerance, atol=tolerance)


@all_layers
@both_directions
def test_rows_of_a_batch_do_not_mix(name, direction):
    t = layer(name, 5)
    value, context = inputs(t, (5,))
    expected = pair_of(t, direction)(value, context)
    rows = [pair_of(t, direction)(v, c) for v, c in zip(value, context, strict=True)]
    torch.testing.assert_close(tuple(map(torch.stack, zip(*rows, strict=True))), expected)
    torch.testing.assert_close(torch.func.vmap(pair_of(t, direction))(value, context), expected)
    shared = t.condition(context[0])
    torch.testing.assert_close(pair_of(shared, direction)(value[1]), pair_of(t, direction)(value[1], context[0]))
    assert pair_of(t, direction)(value[0], context)[0].shape == value.shape


@all_layers
@with_and_without_context
def test_score_is_the_gradient_of_the_log_density(name, context_dim):
    t = layer(name, context_dim)
    z, context = inputs(t, (3,))
    x, ladj, score = t.forward_and_score(z, -z, context)
    torch.testing.assert_close((x, ladj), t.forward_and_ladj(z, context))
    at = x.detach().requires_grad_()
    z_again, ladj = t.inverse_and_ladj(at, context)
    (expected,) = torch.autograd.grad((ladj - z_again.square().flatten(1).sum(-1) / 2).sum(), at)
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-6)


@all_layers
@both_directions
def test_identity_at_start(name, direction):
    t = LAYERS[name](5)
    value, context = inputs(t, (5,), torch.float32)
    result, ladj = pair_of(t, direction)(value, context)
    torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ladj, torch.zeros(5), rtol=0, atol=1e-5)


# What depends on what


@ordered_layers
@both_directions
def test_elements_see_all_elements_at_earlier_places(name, direction):
    t = layer(name)
    value, _ = inputs(t)
    matrix = torch.autograd.functional.jacobian(lambda v: pair_of(t, direction)(v)[0], value)
    axis, size = getattr(t, "layer", t).axis, t.event_shape[getattr(t, "layer", t).axis]
    order = ORDERS[size]
    # (places, other elements, places, other elements)
    matrix = matrix.movedim((axis - len(t.event_shape), axis), (0, 1)).reshape(size, size, t.dim // size, -1)
    blocks = matrix.transpose(1, 2)[order][:, :, order]
    for i in range(size):
        for k in range(size):
            block = blocks[i, :, k]
            if k > i:
                assert (block == 0).all()
            elif k == i:
                assert torch.equal(block, block.diag().diag()) and (block.diag() > 0).all()
            elif direction == "forward":
                assert (block != 0).all()


@pytest.mark.parametrize(("axis", "mask"), [(0, masks.half(3)), (1, masks.alternating(4)), (2, [True, False])])
def test_named_networks_see_one_place(axis, mask):
    """What passes is unchanged; what does not depends on itself and on what passes at its own place."""
    t = perturb(Coupling(SHAPE, mask=mask, hidden_dims=(8,), axis=axis).double())
    z, mask = inputs(t)[0], torch.as_tensor(mask)
    matrix = torch.autograd.functional.jacobian(t, z).movedim((axis, 3 + axis), (2, 5))
    matrix = matrix.reshape(24 // len(mask), len(mask), -1, len(mask))
    for place in range(len(matrix)):
        at_place = matrix[place][:, place]
        assert (matrix[place] != 0).sum() == (at_place != 0).sum()
        assert torch.equal(at_place[mask], torch.eye(len(mask), dtype=z.dtype)[mask])
        assert (at_place[~mask][:, mask] != 0).all() and (at_place.diagonal() > 0).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_coupling_along_an_axis_is_that_of_vectors_at_each_place(axis):
    size = SHAPE[axis]
    image, vector = coupling(5, axis=axis), Coupling(size, hidden_dims=(8,), context_dim=5)
    if axis == 2:
        vector.load_state_dict(perturb(image).state_dict())
    else:
        vector.conditioner.load_state_dict(perturb(image.conditioner.net).state_dict())
    z, context = torch.randn(7, *SHAPE), torch.randn(7, 5)
    x, ladj = image.forward_and_ladj(z, context)
    expected, ladj_of_places = vector.forward_and_ladj(z.movedim(1 + axis, -1), context[:, None, None])
    torch.testing.assert_close(x.movedim(1 + axis, -1), expected)
    torch.testing.assert_close(ladj, ladj_of_places.sum((1, 2)))


def test_time_first_is_a_sequence_transposed():
    first = perturb(Autoregressive((9, 2), order=None, conditioner="causal_conv", context_dim=(1, 9), axis=0))
    last = Autoregressive((2, 9), conditioner="causal_conv", context_dim=(1, 9))
    last.load_state_dict(first.state_dict())
    value, context = torch.randn(5, 9, 2), torch.randn(5, 1, 9)
    for t, u in ((first, last), (first.inv, last.inv)):
        (x, ladj), (y, expected) = t.forward_and_ladj(value, context), u.forward_and_ladj(value.mT, context)
        torch.testing.assert_close(x, y.mT)
        torch.testing.assert_close(ladj, expected)


def test_one_axis_may_be_counted_from_either_end():
    for axis in (0, -1):
        assert Autoregressive(3, axis=axis).triangular_order == (0, 1, 2)
        assert Coupling(3, axis=axis).axis == -1
    assert Coupling(SHAPE, axis=1).mask == Coupling(SHAPE, axis=-2).mask == [True, True, False, False]


# The inverse


@pytest.mark.parametrize("axis", [0, 1, 2])
@with_and_without_context
@pytest.mark.parametrize("batch_shape", [(), (2, 3)], ids=str)
def test_steps_give_what_passes_and_iterations_give(axis, context_dim, batch_shape):
    """Values, gradients and scores of a network that is evaluated place by place, and of one that is not."""
    by_steps = perturb(ordered(context_dim, axis=axis, univariate="spline").double(), 0.5)
    by_passes = ordered(context_dim, axis=axis, univariate="spline", conditioner=Plain).double()
    by_passes.load_state_dict(by_steps.state_dict())
    x, context = inputs(by_steps, batch_shape)
    weight, results = torch.randn_like(x), []
    for t in (by_steps, by_passes):
        leaves = [x.requires_grad_(), *([] if context is None else [context.requires_grad_()]), *t.parameters()]
        z, ladj = t.inverse_and_ladj(x, context)
        gradients = torch.autograd.grad((weight * z.sin()).sum() + ladj.square().sum(), leaves)
        results.append((z, ladj, *gradients, *t.forward_and_score(x, -weight, context)))
    torch.testing.assert_close(*results)


def test_backward_substitution_takes_the_steps_of_the_network(monkeypatch):
    calls, real = [], BackwardSteps.pull_back
    monkeypatch.setattr(BackwardSteps, "pull_back", lambda *args: calls.append(args[1]) or real(*args))
    t = layer("autoregressive-rows")
    assert isinstance(t.conditioner, IncrementalGradient)
    z, _ = inputs(t, (5,))
    t.forward_and_score(z, -z)
    assert calls == [3, 2, 1]


def test_orders_of_different_axes_differ():
    shape = (4, 4)
    time, channels = (Autoregressive(shape, conditioner=Plain, axis=axis) for axis in (1, 0))
    assert time.triangular_order == (0, 1, 2, 3) != channels.triangular_order == channels.inv.triangular_order


# Flows


def test_flow_of_images():
    """Couplings of channels and of rows are fitted; the rows of an image are copies of the first, and noise."""
    torch.manual_seed(0)
    x = torch.randn(500, 3, 1, 2).expand(500, *SHAPE) + 0.3 * torch.randn(500, *SHAPE)
    options = {"hidden_dims": (16,)}
    rows = [Coupling(SHAPE, mask=mask, axis=1, **options) for mask in (masks.half(4), ~masks.half(4))]
    channels = [Coupling(SHAPE, mask=mask, conditioner=convolution, **options) for mask in ([True, True, False],)]
    flow = pf.Flow([*channels, *rows, ordered(0, axis=1).inv])
    untrained = flow().log_prob(x).mean().item()
    fit = pf.fit_density(
        flow, x, max_epochs=30, optimizer=partial(torch.optim.Adam, lr=0.02), seed=0, progress_bar=False
    )
    covariance = 0.09 * torch.eye(4) + 1
    entropy = 6 * torch.distributions.MultivariateNormal(torch.zeros(4), covariance).entropy()
    assert untrained < -30 < fit.best_log_prob < 0.5 - entropy
    draws, log_q = flow().rsample_and_log_prob((7,))
    assert draws.shape == (7, *SHAPE)
    torch.testing.assert_close(flow().log_prob(draws), log_q, rtol=1e-4, atol=1e-4)


# What is refused


@pytest.mark.parametrize("structure", [Coupling, Autoregressive])
@pytest.mark.parametrize(("dim", "axis"), [(SHAPE, 3), (SHAPE, -4), (5, 1)], ids=str)
def test_axis_that_the_event_does_not_have_raises(structure, dim, axis):
    with pytest.raises(OptionError, match=rf"{structure.__name__} has events of .* needs an axis from .*, got {axis}"):
        structure(dim, axis=axis)


@pytest.mark.parametrize(
    "mask", [[True, False], masks.channelwise(*SHAPE), masks.half(24)], ids=["short", "flat", "all"]
)
def test_mask_of_another_axis_raises(mask):
    with pytest.raises(OptionError, match=r"Coupling with events of shape \(3, 4, 2\).*be 3 booleans.* of axis 0 that"):
        Coupling(SHAPE, mask=mask)


def test_masks_that_do_nothing_raise():
    with pytest.raises(OptionError, match=r"events of shape \(3, 4, 2\).*transforms nothing.* indices of axis 1"):
        Coupling(SHAPE, mask=[True] * 4, axis=1)
    with pytest.raises(OptionError, match=r"events of shape \(3, 4, 2\).*nothing to condition on.* indices of axis 2"):
        Coupling(SHAPE, mask=[False] * 2, axis=2)


def test_context_of_couplings_is_a_vector():
    with pytest.raises(OptionError, match=r"Coupling takes a vector as context, but got context_dim=\(2, 4\)"):
        Coupling(SHAPE, context_dim=(2, 4))


def test_conditioner_that_gives_another_shape_raises():
    t = Coupling(SHAPE, conditioner=lambda in_dim, out_dim, _: nn.Conv2d(in_dim, out_dim, 2))
    message = r"conditioner of Coupling must map \(5, 1, 4, 2\) to \(..., 4, 4, 2\), but gave \(5, 4, 3, 1\)"
    with pytest.raises(ShapeError, match=message):
        t(torch.zeros(5, *SHAPE))
    t = Autoregressive((4, 2), "spline", conditioner=lambda *_, channels: CausalConv(range(2), 2, channels=channels))
    message = r"conditioner of Autoregressive must map \(5, 4, 2\) to \(5, 4, 2, 23\), but gave \(5, 4, 2, 2\)"
    with pytest.raises(ShapeError, match=message):
        t(torch.zeros(5, 4, 2))


@pytest.mark.parametrize("conditioner", ["made", "residual"])
def test_networks_for_vectors_refuse_images(conditioner):
    with pytest.raises(
        OptionError, match=r'takes vectors, but got events of shape \(3, 4, 2\): use "causal_conv".*factory'
    ):
        Autoregressive(SHAPE, conditioner=conditioner, axis=0)


@pytest.mark.parametrize(("axis", "channels"), [(0, (4, 2)), (1, (3, 2)), (-1, (3, 4))])
def test_factory_is_told_the_other_axes(axis, channels):
    calls = []

    def factory(*args, **options):
        calls.append((args, options))
        return Plain(*args, **options)

    Autoregressive(SHAPE, conditioner=factory, hidden_dims=(8,), context_dim=2, axis=axis)
    assert calls == [((list(range(SHAPE[axis])), 2, (8,), 2), {"channels": channels})]


def test_factory_of_couplings_is_called_with_sizes_along_the_axis():
    calls = []

    def factory(*args):
        calls.append(args)
        return MLP(*args)

    Coupling(SHAPE, mask=[True, False, False, True], conditioner=factory, hidden_dims=(8,), context_dim=5, axis=1)
    assert calls == [(2 + 5, 2 * 2, (8,))]

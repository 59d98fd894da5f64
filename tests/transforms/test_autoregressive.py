"""The inverse of autoregressive layers that computes each hidden unit once, against one pass a dimension."""

import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows.errors import FlowError, OptionError, ShapeError
from pyroflows.nets import MADE, ResMADE, ScaledMADE
from pyroflows.transforms import Autoregressive
from tests.transforms.registry import perturb, points

UNIVARIATES = ["additive", "affine", "monotone", "sos", "spline"]
ORDERS = {"ascending": range(6), "descending": range(6)[::-1], "mixed": [2, 5, 0, 4, 1, 3]}
HIDDEN_DIMS = {"wide": (32, 16), "narrow": (3, 2), "one": (8,), "deep": (9, 7, 8, 5)}
CONTEXT_DIM = 3

all_orders = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
all_widths = pytest.mark.parametrize("hidden_dims", HIDDEN_DIMS.values(), ids=HIDDEN_DIMS)
both_nets = pytest.mark.parametrize("conditioner", ["made", "residual"])
with_and_without_context = pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])


def layer(univariate="affine", dtype=torch.float64, **options):
    return perturb(Autoregressive(6, univariate, **{"hidden_dims": (32, 16), **options}).to(dtype), 0.5)


def inputs(context_dim, batch_shape=(7,), dtype=torch.float64):
    context = torch.randn(*batch_shape, context_dim, dtype=dtype) if context_dim else None
    return points(batch_shape, 6, dtype), context


def assert_inverts_as_by_passes(t, x, context, **tolerance):
    """Values, and the gradients of both results with respect to x, context and all parameters."""
    leaves = [x.requires_grad_(), *t.parameters(), *([] if context is None else [context.requires_grad_()])]
    weight = torch.randn_like(x)
    results, gradients = [], []
    for inverse in (t._inverse_and_log_slopes, t._inverse_by_passes):
        z, log_slopes = inverse(x, context)
        results.append((z, log_slopes))
        loss = (weight * z.sin()).sum() + (weight * log_slopes.square()).sum()
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    for fast, slow in zip(results[0] + gradients[0], results[1] + gradients[1], strict=True):
        torch.testing.assert_close(fast, slow, **tolerance)


@pytest.mark.parametrize("univariate", UNIVARIATES)
@both_nets
@with_and_without_context
def test_inverse_equals_that_by_passes(univariate, conditioner, context_dim):
    t = layer(univariate, conditioner=conditioner, context_dim=context_dim, order=ORDERS["mixed"])
    assert_inverts_as_by_passes(t, *inputs(context_dim), rtol=1e-7, atol=1e-7)


@all_orders
@all_widths
@both_nets
def test_inverse_of_all_shapes_of_network(order, hidden_dims, conditioner):
    t = layer(order=order, hidden_dims=hidden_dims, conditioner=conditioner, context_dim=CONTEXT_DIM)
    assert_inverts_as_by_passes(t, *inputs(CONTEXT_DIM))


@pytest.mark.parametrize("batch_shape", [(), (1,), (3, 2), (0,)], ids=str)
def test_inverse_of_batches(batch_shape):
    t = layer(context_dim=CONTEXT_DIM)
    assert_inverts_as_by_passes(t, *inputs(CONTEXT_DIM, batch_shape))


def test_inverse_in_single_precision():
    t = layer("spline", dtype=torch.float32)
    assert_inverts_as_by_passes(t, *inputs(0, dtype=torch.float32), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("univariate", UNIVARIATES)
def test_inverse_without_gradients_is_the_same(univariate):
    t = layer(univariate)
    x, _ = inputs(0)
    with torch.no_grad():
        z, ladj = t.inverse_and_ladj(x)
    expected = t.inverse_and_ladj(x)
    torch.testing.assert_close((z, ladj), tuple(result.detach() for result in expected))
    # Tensors made in inference mode cannot be used for training.
    (t.forward_and_ladj(z)[0].sum() + ladj.sum()).backward()


def test_second_derivatives_by_autograd_raise():
    t = layer()
    x = points((2,), 6).requires_grad_()
    with pytest.raises(FlowError, match="use torch.func"):
        torch.autograd.functional.hessian(lambda x: t.inverse_and_ladj(x)[0].square().sum(), x)


def test_second_derivatives_by_function_transforms():
    t = layer()
    x = points((), 6)

    def loss(value):
        return t.inverse_and_ladj(value)[0].square().sum()

    # Rows of the Hessian by finite differences of the gradient.
    step = 1e-5 * torch.eye(6, dtype=torch.float64)
    gradient = torch.func.grad(loss)
    expected = torch.stack([(gradient(x + e) - gradient(x - e)) / 2e-5 for e in step])
    torch.testing.assert_close(torch.func.jacrev(gradient)(x), expected, rtol=1e-4, atol=1e-4)


def test_conditioner_of_ones_own_is_inverted_by_passes():
    class Constant(nn.Module):
        def __init__(self, order, num_params, hidden_dims, context_dim):
            super().__init__()
            self.value = nn.Parameter(torch.randn(len(order), num_params, dtype=torch.float64))

        def forward(self, z, context=None):
            return self.value.expand(*z.shape, -1)

    t = Autoregressive(6, conditioner=Constant)
    x, _ = inputs(0)
    torch.testing.assert_close(t(t.inv(x)), x)


# A network of one's own that can be evaluated place by place, by public names


class Recurrent(nn.Module):
    """The parameters at a place are linear in a state that has read the inputs before it."""

    def __init__(self, order, num_params, hidden_dims, context_dim):
        super().__init__()
        self.order, (self.width,) = order, hidden_dims
        self.read = nn.Linear(1 + self.width + context_dim, self.width)
        self.output = nn.Linear(self.width, num_params)

    def next_state(self, h, value, context):
        known = [h, value[..., None]] + ([] if context is None else [context.expand(*h.shape[:-1], -1)])
        return torch.tanh(self.read(torch.cat(known, -1)))

    def forward(self, z, context=None):
        h, theta = z.new_zeros(*z.shape[:-1], self.width), {}
        for j in self.order:
            theta[j] = self.output(h)
            h = self.next_state(h, z[..., j], context)
        return torch.stack([theta[j] for j in range(len(theta))], -2)

    def incremental(self, num_rows, context=None):
        return RecurrentSteps(self, num_rows, context)


class RecurrentSteps:
    calls = 0

    def __init__(self, net, num_rows, context):
        self.net, self.context = net, context
        self.inputs = net.output.bias.new_empty(len(net.order), num_rows)
        self.h = net.output.bias.new_zeros(num_rows, net.width)

    def parameters_at(self, i):
        RecurrentSteps.calls += 1
        if i > 0:
            self.h = self.net.next_state(self.h, self.inputs[i - 1], self.context)
        return self.net.output(self.h).T


@pytest.fixture
def calls(monkeypatch):
    """How often the network was asked for the parameters at a place."""
    monkeypatch.setattr(RecurrentSteps, "calls", 0)
    return lambda: RecurrentSteps.calls


@with_and_without_context
@pytest.mark.parametrize("batch_shape", [(), (3, 2)], ids=str)
def test_network_of_ones_own_is_inverted_place_by_place(context_dim, batch_shape, calls):
    t = layer("spline", conditioner=Recurrent, hidden_dims=(8,), context_dim=context_dim, order=ORDERS["mixed"])
    assert isinstance(t.conditioner, pf.nets.Incremental)
    assert isinstance(t.conditioner.incremental(2), pf.nets.ParameterSteps)
    x, context = inputs(context_dim, batch_shape)
    with torch.no_grad():
        z = t.inverse_and_ladj(x, context)[0]
    assert calls() == 6
    torch.testing.assert_close(t.forward_and_ladj(z, context)[0], x)
    assert_inverts_as_by_passes(t, x, context, rtol=1e-7, atol=1e-7)


def test_flow_with_a_network_of_ones_own(calls):
    """It is fitted and scored in one pass, and sampled place by place."""
    x = torch.randn(200, 3).cumsum(-1)
    flow = pf.Flow([Autoregressive(3, order=[2, 0, 1], conditioner=Recurrent, hidden_dims=(8,)).inv for _ in range(2)])
    perturb(flow, 0.3)
    pf.fit_density(flow, x, max_epochs=2, seed=0, progress_bar=False)
    assert calls() == 0
    draws, log_q = flow().rsample_and_log_prob((7,))
    assert calls() == 2 * 3
    torch.testing.assert_close(flow().log_prob(draws), log_q, rtol=1e-4, atol=1e-4)


def test_network_whose_parameters_have_a_wrong_shape_raises():
    t = Autoregressive(6, "spline", conditioner=lambda *_: MADE(range(6), 2))
    with pytest.raises(ShapeError, match=r"conditioner of Autoregressive must map \(7, 6\) to.*gave \(7, 6, 2\)"):
        t(torch.zeros(7, 6))


# The network, place by place


@all_orders
@all_widths
@with_and_without_context
@pytest.mark.parametrize("kind", [MADE, ResMADE, ScaledMADE])
def test_incremental_network_equals_one_pass(kind, order, hidden_dims, context_dim):
    net = perturb(kind(order, 4, hidden_dims, context_dim).double())
    z, context = inputs(context_dim)
    expected = net(z, context)
    steps = net.incremental(len(z), context)
    steps.inputs.fill_(torch.nan)  # what is not known yet must not be read
    with torch.no_grad():
        for i, j in enumerate(order):
            torch.testing.assert_close(steps.parameters_at(i).T, expected[:, j].detach())
            steps.inputs[i] = z[:, j]


@all_orders
@all_widths
@pytest.mark.parametrize("kind", [MADE, ResMADE, ScaledMADE])
def test_incremental_gradient_equals_autograd(kind, order, hidden_dims):
    net = perturb(kind(order, 4, hidden_dims).double())
    z = points((7,), 6).requires_grad_()
    gradient = torch.randn(7, 6, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(net(z), z, gradient)
    inputs = torch.zeros(6, 7, dtype=torch.float64)
    with torch.no_grad():
        theta, start = net.with_gradient_steps(z)
        torch.testing.assert_close(theta, net(z))
        steps = start(inputs)
        for i, j in reversed(list(enumerate(order))):
            torch.testing.assert_close(inputs[j], expected[:, j])
            steps.pull_back(i, gradient[:, j].T)
    torch.testing.assert_close(inputs.T, expected)


@pytest.mark.parametrize("hidden_dims", [(), (0,), (4, -1)], ids=str)
@both_nets
def test_network_without_hidden_units_raises(hidden_dims, conditioner):
    with pytest.raises(OptionError, match="positive widths"):
        Autoregressive(3, conditioner=conditioner, hidden_dims=hidden_dims)

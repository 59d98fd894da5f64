"""Layers whose events are sequences ``(channels, length)``, or whose context is a conditioning sequence."""

from functools import partial

import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows.errors import DataError, FlowError, OptionError, ShapeError
from pyroflows.nets import CausalConv
from pyroflows.transforms import Autoregressive, Compose, Elementwise, Planar, Standardize, TriangularTransform
from pyroflows.transforms.foreign import Foreign
from pyroflows.transforms.triangular import transposed_solve
from tests.transforms.networks import Running
from tests.transforms.registry import perturb

CHANNELS, LENGTH = 2, 9
SHAPE = (CHANNELS, LENGTH)
SHUFFLED = [4, 0, 8, 2, 6, 1, 7, 3, 5]
HIDDEN_DIMS = (8, 6, 7)
CONTEXTS = {"none": 0, "vector": 3, "sequence": (2, LENGTH)}
LAYERS = {
    "affine": lambda c: wavenet(context_dim=c),
    "spline": lambda c: wavenet(univariate="spline", context_dim=c),
    "shuffled": lambda c: wavenet(order=SHUFFLED, context_dim=c),
    "vector": lambda c: wavenet(LENGTH, context_dim=c),
    "own": lambda c: wavenet(conditioner=Running, context_dim=c),
}
CASES = [(name, context) for name in LAYERS for context in CONTEXTS if (name, context == "none") != ("own", False)]
all_cases = pytest.mark.parametrize(
    ("name", "context_dim"), [(name, CONTEXTS[context]) for name, context in CASES], ids=map("-".join, CASES)
)
both_directions = pytest.mark.parametrize("direction", ["forward", "inverse"])


def wavenet(dim=SHAPE, univariate="affine", **options):
    return Autoregressive(dim, univariate, **{"conditioner": "causal_conv", "hidden_dims": HIDDEN_DIMS, **options})


def layer(name, context_dim, dtype=torch.float64, scale=1.0):
    return perturb(LAYERS[name](context_dim).to(dtype), scale)


def inputs(t, batch_shape=(3,), dtype=torch.float64):
    context = torch.randn(*batch_shape, *t.context_shape, dtype=dtype) if t.context_dim else None
    return 2 * torch.randn(*batch_shape, *t.event_shape, dtype=dtype), context


real = transposed_solve.pull_back


def pair_of(t, direction):
    return t.forward_and_ladj if direction == "forward" else t.inverse_and_ladj


# The inverse


@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize(("length", "dilation_cycle"), [(1, 8), (5, 8), (21, 2), (21, 8)])
@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("num_contexts", [1, 4])
def test_incremental_network_equals_one_pass(kernel_size, length, dilation_cycle, channels, context, num_contexts):
    order = torch.randperm(length, generator=torch.Generator().manual_seed(1)).tolist()
    shape = {"none": 0, "vector": (3,), "sequence": (2, length)}[context]
    options = {"kernel_size": kernel_size, "dilation_cycle": dilation_cycle}
    net = perturb(CausalConv(order, 3, (8, 6, 7, 5), shape, channels, **options).double())
    z = torch.randn(4, *([channels] if channels else []), length, dtype=torch.float64)
    rows = torch.randn(num_contexts, *shape, dtype=torch.float64) if shape else None
    expected = net(z, rows)
    steps = net.incremental(4, rows)
    steps.inputs.fill_(torch.nan)  # what is not known yet must not be read
    with torch.no_grad():
        for i, j in enumerate(order):
            torch.testing.assert_close(steps.parameters_at(i).movedim(-1, 0).movedim(1, -1), expected[..., j, :])
            steps.inputs[i] = z[..., j].movedim(0, -1)


@all_cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_inverse_without_gradients_equals_that_by_passes(name, context_dim, dtype, tolerance):
    t = layer(name, context_dim, dtype, scale=0.3)
    x, context = inputs(t, (4,), dtype)
    with torch.no_grad():
        results, expected = t._inverse_and_log_slopes(x, context), t._inverse_by_passes(x, context)
    torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)


@all_cases
def test_inverse_has_the_gradients_of_that_by_passes(name, context_dim):
    t = layer(name, context_dim)
    x, context = inputs(t)
    leaves = [x.requires_grad_(), *([] if context is None else [context.requires_grad_()]), *t.parameters()]
    weight = torch.randn_like(x)
    gradients = []
    for z, log_slopes in (t._inverse_and_log_slopes(x, context), t._inverse_by_passes(x, context)):
        loss = (weight * z.sin()).sum() + (weight * log_slopes.square()).sum()
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("scale", "most"), [(0.0, 1), (0.1, 15), (3.0, 29)])
def test_iteration_solves_a_triangular_system(scale, most, monkeypatch):
    """As many backward passes as the dependence on earlier times needs, and D - 1 of them suffice."""
    length, passes = 30, []
    monkeypatch.setattr(transposed_solve, "pull_back", lambda *args: passes.append(1) or real(*args))
    strictly_lower = scale * torch.randn(length, length, dtype=torch.float64).tril(-1) / length**0.5
    slope, gradient = 0.5 + torch.rand(length, dtype=torch.float64), torch.randn(length, dtype=torch.float64)

    class Linear(nn.Module):
        def forward(self, z, context):
            return (strictly_lower @ z)[:, None]

    z = torch.randn(length, dtype=torch.float64)
    _, solve = transposed_solve.parameters_and_solver(Linear(), z, None, range(length), num_axes=1)
    by_theta = torch.randn(length, 1, dtype=torch.float64)
    v = solve(gradient, slope, torch.ones(length, 1, dtype=torch.float64), by_theta)
    matrix = (torch.diag(slope) + strictly_lower).mT
    expected = torch.linalg.solve(matrix, gradient - strictly_lower.mT @ by_theta[:, 0])
    torch.testing.assert_close(v, expected, rtol=1e-8, atol=1e-8 * expected.abs().max().item())
    assert len(passes) <= most


def test_second_derivatives_raise():
    t = layer("affine", 0)
    x, _ = inputs(t, ())
    with pytest.raises(FlowError, match=r"use torch\.func"):
        torch.autograd.functional.hessian(lambda x: t.inverse_and_ladj(x)[0].square().sum(), x)


def test_results_of_the_inverse_can_be_trained_on():
    t = layer("affine", 0)
    with torch.no_grad():
        z, ladj = t.inverse_and_ladj(inputs(t)[0])
    (t.forward_and_ladj(z)[0].sum() + ladj.sum()).backward()


# Slopes of the elements


@all_cases
@both_directions
def test_log_slopes_are_the_diagonal_of_the_jacobian(name, context_dim, direction):
    t = layer(name, context_dim)
    value, context = inputs(t, ())
    of = {"forward": t._forward_and_log_slopes, "inverse": t._inverse_and_log_slopes}[direction]
    matrix = torch.func.jacrev(lambda v: of(v, context)[0])(value).reshape(t.dim, t.dim)
    result, log_slopes = of(value, context)
    assert log_slopes.shape == t.event_shape
    torch.testing.assert_close(log_slopes.flatten(), matrix.diagonal().abs().log())
    torch.testing.assert_close((result, log_slopes.sum()), pair_of(t, direction)(value, context))


def test_triangular_order():
    ascending, shuffled = wavenet(), wavenet(order=SHUFFLED, context_dim=3)
    elementwise, standardize = Elementwise(SHAPE), Standardize(SHAPE)
    assert ascending.triangular_order == ascending.inv.triangular_order == tuple(range(LENGTH))
    assert shuffled.triangular_order == shuffled.inv.triangular_order == tuple(SHUFFLED)
    assert elementwise.triangular_order == standardize.triangular_order == ()
    assert not isinstance(Planar(3), TriangularTransform)


def test_affine_layers():
    affine, additive, spline = (wavenet(univariate=name) for name in ("affine", "additive", "spline"))
    standardize = Standardize(SHAPE)
    assert affine.is_affine and additive.inv.is_affine and standardize.is_affine and Elementwise(SHAPE).is_affine
    assert not (spline.is_affine or Elementwise(SHAPE, "spline").is_affine)


# Shapes


def test_shapes_of_layers():
    t = wavenet(context_dim=(3, LENGTH))
    assert (t.event_shape, t.dim, t.context_shape, t.context_dim) == (SHAPE, 18, (3, LENGTH), 27)
    assert t.domain.event_dim == t.codomain.event_dim == t.inv.codomain.event_dim == 2
    assert t.condition(torch.zeros(3, LENGTH)).event_shape == SHAPE
    assert "dim=(2, 9), context_dim=(3, 9)" in repr(t)
    assert (Planar(3).event_shape, Planar(3).context_shape, Planar(3, 2).context_shape) == ((3,), (), (2,))


@pytest.mark.parametrize("dim", [(), (2, 0), (0,), (-1, 3)], ids=str)
def test_empty_events_raise(dim):
    with pytest.raises(OptionError, match="dim >= 1"):
        Elementwise(dim)


def test_wrong_shapes_raise():
    t = wavenet(context_dim=(3, LENGTH))
    with pytest.raises(ShapeError, match=r"event shape \(2, 9\), but got a tensor of shape \(18,\)"):
        t.forward_and_ladj(torch.zeros(18), torch.zeros(3, LENGTH))
    with pytest.raises(ShapeError, match=r"context shape \(3, 9\), but got shape \(9,\)"):
        t.forward_and_ladj(torch.zeros(SHAPE), torch.zeros(LENGTH))
    with pytest.raises(ShapeError, match=r"needs a context of shape \(3, 9\)"):
        t.forward_and_ladj(torch.zeros(SHAPE))
    with pytest.raises(ShapeError, match=r"\(4,\).*\(3,\).*do not broadcast"):
        t.forward_and_ladj(torch.zeros(4, *SHAPE), torch.zeros(3, 3, LENGTH))


@pytest.mark.parametrize(
    "layers",
    [[wavenet(), Elementwise(18)], [wavenet(context_dim=18), wavenet(context_dim=(2, LENGTH))]],
    ids=["event", "context"],
)
def test_composition_of_layers_that_do_not_fit_raises(layers):
    with pytest.raises(ShapeError, match=r"must agree.*\(2, 9\)"):
        Compose(layers)


@pytest.mark.parametrize("conditioner", ["made", "residual"])
@pytest.mark.parametrize("options", [{"dim": SHAPE}, {"dim": LENGTH, "context_dim": (2, LENGTH)}], ids=str)
def test_networks_for_vectors_refuse_sequences(conditioner, options):
    with pytest.raises(OptionError, match='takes vectors.*"causal_conv"'):
        Autoregressive(**options, conditioner=conditioner)


def test_a_conditioning_sequence_of_another_length_raises():
    with pytest.raises(OptionError, match=r"of 16 times has shape \(channels, 16\), got \(2, 17\)"):
        Autoregressive((16,), conditioner="causal_conv", context_dim=(2, 17))


def test_events_with_three_axes_raise():
    with pytest.raises(OptionError, match=r"\(channels, length\), but got events of shape \(3, 4, 5\): use a factory"):
        wavenet((3, 4, 5))


def test_factory_is_told_the_channels():
    calls = []

    def factory(*args, **options):
        calls.append((args, options))
        return CausalConv(*args, **options)

    Autoregressive((2, 3), conditioner=factory, hidden_dims=(8,), context_dim=(1, 3))
    assert calls == [(([0, 1, 2], 2, (8,), (1, 3)), {"channels": 2})]


# Flows


@pytest.mark.parametrize("base", [None, "student_t"])
def test_flow_of_sequences(base):
    flow = pf.Flow([wavenet(context_dim=(3, LENGTH)).inv], base=base)
    context = torch.randn(4, 3, LENGTH)
    q = flow(context)
    assert (q.batch_shape, q.event_shape, q.support.event_dim) == ((4,), SHAPE, 2)
    x, log_q = q.rsample_and_log_prob((5,))
    assert (x.shape, log_q.shape) == ((5, 4, *SHAPE), (5, 4))
    torch.testing.assert_close(q.log_prob(x.detach()), log_q, rtol=1e-4, atol=1e-4)
    assert flow(context[0]).batch_shape == ()
    with pytest.raises(ShapeError, match=r"context shape \(3, 9\), but got shape \(4, 3, 8\)"):
        flow(context[..., 1:])


def test_wrong_base_raises():
    normal = torch.distributions.Normal(torch.zeros(SHAPE), torch.ones(SHAPE))
    with pytest.raises(ShapeError, match=r"must have event shape \(2, 9\).*to_event\(2\)"):
        pf.Flow([wavenet()], base=torch.distributions.Independent(normal, 1))


def test_support_of_sequences():
    flow = pf.Flow([perturb(wavenet())], support=torch.distributions.constraints.positive)
    x, log_q = flow().rsample_and_log_prob((5,))
    assert isinstance(flow.transform.layers[-1], Foreign) and (x > 0).all() and flow().support.event_dim == 2
    torch.testing.assert_close(flow().log_prob(x.detach()), log_q, rtol=1e-4, atol=1e-4)


def test_standardize_of_sequences():
    x = 3 + 5 * torch.arange(1, 19.0).reshape(SHAPE) * torch.randn(200, *SHAPE)
    flow = pf.Flow([wavenet()])
    flow.adapt(x)
    last = flow.transform.layers[-1]
    assert isinstance(last, Standardize)
    torch.testing.assert_close(last.loc, x.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.scale, x.std(0, correction=0), rtol=1e-4, atol=1e-4)
    fresh = pf.Flow([wavenet()])
    fresh.load_state_dict(flow.state_dict())
    torch.testing.assert_close(fresh().log_prob(x), flow().log_prob(x))
    x[:, 1, 2] = 0.0
    with pytest.raises(DataError, match=r"columns \[\(1, 2\)\]"):
        flow.adapt(x)


def test_fit_of_sequences_with_a_conditioning_sequence():
    """x follows its own past and the context of its time: x_t = 0.8 x_{t-1} + c_t + noise, in both channels alike."""
    torch.manual_seed(0)
    context = torch.randn(2000, 1, LENGTH)
    x = torch.zeros(2000, *SHAPE)
    noise = 0.5 * torch.randn(2000, *SHAPE)
    for t in range(LENGTH):
        x[..., t] = (0.8 * x[..., t - 1] if t else 0) + context[..., t] + noise[..., t]
    flow = pf.Flow([wavenet(hidden_dims=(8, 8), context_dim=(1, LENGTH)).inv])
    adam = partial(torch.optim.Adam, lr=0.02)
    fit = pf.fit_density(flow, x, context, max_epochs=40, optimizer=adam, seed=0, progress_bar=False)
    # The entropy of the noise is what no density can exceed; a tenth of a nat an element is lost to the short fit.
    best = -18 * (0.5 * torch.log(2 * torch.pi * torch.tensor(0.25 * torch.e)))
    assert best - 1.8 < fit.best_log_prob < best + 0.3
    with pytest.raises(ShapeError, match=r"x must have shape \(rows, 2, 9\), got \(2000, 18\)"):
        pf.fit_density(flow, x.flatten(1), context)
    with pytest.raises(ShapeError, match=r"context must have shape \(rows, 1, 9\)"):
        pf.fit_density(flow, x, context[..., 1:])
    with pytest.raises(ShapeError, match=r"needs a context of shape \(1, 9\) for each row"):
        pf.fit_density(flow, x)
    x[3, 1, 4] = torch.nan
    with pytest.raises(DataError, match=r"in row 3, column \(1, 4\)"):
        pf.fit_density(flow, x, context)

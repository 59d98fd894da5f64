"""The slope of a residual layer's network stays below the coefficient, and what breaks it by hand raises."""

import math

import pytest
import torch

import pyroflows as pf
from pyroflows.errors import InversionError
from pyroflows.transforms import Residual
from tests.transforms.registry import perturb

SHAPES = {"2": 2, "8": 8, "32": 32, "sequence": (3, 7), "image": (3, 5, 4), "row": (2, 1, 6), "video": (2, 3, 4, 2)}
OPTIMISERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "fused": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
}
all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def largest_singular_values(linear, steps=60):
    """Of the Jacobians of all rows, from below, by power iteration."""
    v = torch.randn_like(linear.value)
    for _ in range(steps):
        v = linear.transposed_times(linear.times(v))
        v = v / v.flatten(1).norm(dim=1).clamp(min=1e-300).reshape(-1, *[1] * (v.dim() - 1))
    return linear.times(v).flatten(1).norm(dim=1)


def slopes_between(g, a, b):
    return (g(a) - g(b)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(dim=1)


@pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS)
@all_shapes
def test_slope_stays_below_the_coefficient_after_steps(shape, optimiser):
    """Of plain torch optimisers with large steps, on a loss that wants steep functions, and without any other call."""
    torch.manual_seed(0)
    t = perturb(Residual(shape, (8, 6), coefficient=0.9).double(), 0.1)
    optimizer = optimiser(t.parameters())
    z = torch.randn(32, *t.event_shape, dtype=torch.float64)
    for _ in range(15):
        optimizer.zero_grad()
        (-(t.net.at(None)(z) - t.net.at(None)(z.flip(0))).square().mean()).backward()
        optimizer.step()
    with torch.no_grad():
        g = t.net.at(None)
        a, b = (torch.randn(200, *t.event_shape, dtype=torch.float64) for _ in range(2))
        b = a + torch.logspace(-4, 1, 200, dtype=torch.float64).reshape(-1, *[1] * len(t.event_shape)) * (b - a)
        norms = largest_singular_values(g.linearized(a))
        assert slopes_between(g, a, b).max() < 0.9 and norms.max() < 0.9
    assert norms.max() > 0.4  # training went to where the bound acts


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("activation", ["sine", "tanh", "lipswish"])
def test_slope_stays_below_the_coefficient_for_any_parameters(activation, scale):
    torch.manual_seed(0)
    t = Residual(5, (16, 7), coefficient=0.97, context_dim=2, activation=activation).double()
    with torch.no_grad():
        for name, parameter in t.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (1 if "log_scales" in name else scale))
    with torch.no_grad():
        g = t.net.at(torch.randn(200, 2, dtype=torch.float64))
        a, b = (torch.randn(200, 5, dtype=torch.float64) for _ in range(2))
        assert slopes_between(g, a, b).max() <= 0.97
        assert largest_singular_values(g.linearized(a)).max() <= 0.97


def test_a_bound_that_was_broken_by_hand_raises():
    torch.manual_seed(0)
    t = perturb(Residual(3, (16,), activation="tanh").double())
    x = 5 * torch.randn(100, 3, dtype=torch.float64)
    t.inv(x)
    t.net.coefficient = 50.0
    with pytest.raises(InversionError, match="missed its target by up to .* no contraction"):
        t.inv(x)
    with pytest.raises(AttributeError):  # the layer itself does not let it be set
        t.coefficient = 0.5


@pytest.mark.parametrize("log_det", ["exact", "roulette"])
@pytest.mark.parametrize("parallel", ["scoring", "sampling"])
def test_density_integrates_to_one(parallel, log_det):
    torch.manual_seed(0)
    flow = perturb(pf.flows.Residual(2, 3, (16,), parallel=parallel, log_det=log_det).double(), 0.3)
    x, log_q = flow().rsample_and_log_prob((1000,))
    torch.testing.assert_close(flow().log_prob(x), log_q)
    center, radius = x.mean(0), 8 * x.std(0)
    steps = [torch.linspace(-1, 1, 151, dtype=torch.float64)] * 2
    grid = center + radius * torch.cartesian_prod(*steps)
    with torch.no_grad():
        total = flow().log_prob(grid).exp().sum() * radius.prod() * (2 / 150) ** 2
    assert math.isclose(total, 1, abs_tol=1e-3)


def test_output_weights_are_free_as_long_as_they_are_small():
    torch.manual_seed(0)
    net = Residual(3, (6,), coefficient=0.9).double().net
    output, scale = net.layers[-1].weight, net.log_scales.exp()
    with torch.no_grad():
        output.normal_(std=0.01)
    weight = net.at(None).weights[-1]
    torch.testing.assert_close(weight, output * 0.9**0.5 / (0.9**0.5 * scale))
    # A new layer starts at zero, with gradients of ordinary size.
    t = Residual(3, (6,)).double()
    t(torch.randn(5, 3, dtype=torch.float64)).sum().backward()
    assert 0 < t.net.layers[-1].weight.grad.abs().max() < 100


def test_orthogonal_weights_attain_the_bound():
    torch.manual_seed(0)
    net = Residual(4, (4, 4), coefficient=0.9).double().net
    for layer in net.layers:
        torch.nn.init.orthogonal_(layer.weight)
    product = torch.linalg.multi_dot(list(net.at(None).weights)[::-1])
    torch.testing.assert_close(torch.linalg.svdvals(product), torch.full((4,), 0.9, dtype=torch.float64))


@pytest.mark.parametrize("shape", [3, (2, 4, 4)], ids=str)
@pytest.mark.parametrize("log_det", ["exact", "roulette"])
def test_autocast_leaves_the_dtype_of_the_weights(shape, log_det):
    torch.manual_seed(0)
    t = perturb(Residual(shape, (8,), log_det=log_det))
    z = torch.randn(5, *t.event_shape)
    with torch.autocast("cpu", torch.bfloat16):
        x, ladj = t.forward_and_ladj(z)
        for view in (t, t.exact()):
            torch.testing.assert_close(view(z), x)
            torch.testing.assert_close(view.inv(x), z, atol=1e-5, rtol=0)
    assert x.dtype == ladj.dtype == torch.float32
    ladj.sum().backward()
    torch.testing.assert_close(x, t(z))


def test_data_of_separate_points_can_be_sampled_one_by_one():
    """Such data make layers contract by nearly the coefficient in places, where the inverse is hardest."""
    torch.manual_seed(3)
    x = 3 * torch.randn(500, 2).sign() + 0.03 * torch.randn(500, 2)
    flow = pf.flows.Residual(2, num_blocks=3, hidden_dims=(16,))
    pf.fit_density(flow, x, max_epochs=15, seed=3, progress_bar=False)
    with torch.no_grad():
        z, law = torch.randn(100, 2), flow()
        together, _ = law.transport(z)
        alone = torch.cat([law.transport(row[None])[0] for row in z])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)

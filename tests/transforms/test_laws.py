"""The laws that every layer of the registry obeys, with random parameters."""

import copy
import pickle
import re
from functools import partial
from itertools import combinations, cycle, product
from statistics import median

import pyro
import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflows.errors import OptionError, ShapeError
from pyroflows.shapes import described
from pyroflows.transforms import Cached, Compose, Continuous, Elementwise, FixedSteps, Inverse, Permutation, Planar
from pyroflows.transforms.continuous.layer import ExactContinuous
from tests.transforms.in_turn import in_turn
from tests.transforms.registry import (
    BATCH_SHAPES,
    CASE_IDS,
    CASES,
    CONDITIONAL,
    CONTEXT_DIM,
    LAYERS,
    LEARNABLE,
    conditional,
    conditioned,
    context_for,
    grid,
    jacobian,
    layer,
    made,
    perturb,
    points,
)

DIRECTIONS = ["forward", "inverse"]
# Fused optimisers, and Pyro's, which write to ``.data``, change parameters without counting up their version.
OPTIMISERS = {
    "adam": torch.optim.Adam,
    "adam-foreach": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, foreach=True),
    "adam-fused": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True),
    "sgd": torch.optim.SGD,
    "pyro-clipped-adam": ClippedAdam,
}

all_cases = pytest.mark.parametrize(("name", "context_dim"), CASES, ids=CASE_IDS)
all_batch_shapes = pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)
all_layers = pytest.mark.parametrize("name", LAYERS)
learnable_layers = pytest.mark.parametrize("name", LEARNABLE)
volume_changing_layers = pytest.mark.parametrize(
    "name", [name for name in LEARNABLE if not LAYERS[name].preserves_volume]
)
conditional_layers = pytest.mark.parametrize("name", CONDITIONAL)
both_directions = in_turn("direction", cases=lambda: [(direction,) for direction in DIRECTIONS])
over_the_grid = in_turn(
    *("shape", "batch_shape", "dtype"),
    cases=lambda name, context_dim, pytestconfig: grid(name, context_dim, pytestconfig.getoption("--full-grid")),
)


class Pair(nn.Module):
    """One direction of a layer as a module, for ``functional_call``."""

    def __init__(self, t, direction):
        super().__init__()
        self.t = t
        self.direction = direction

    def forward(self, value, context=None):
        return pair_of(self.t, self.direction)(value, context)


def pair_of(t, direction):
    return t.forward_and_ladj if direction == "forward" else t.inverse_and_ladj


def with_equal_steps(t):
    """A continuous layer with few equal steps: adaptive ones are chosen anew at each value, which a graph cannot do."""
    if isinstance(t, Continuous | ExactContinuous):
        t = copy.deepcopy(getattr(t, "layer", t))
        t.solver = t.inverse_solver = FixedSteps(2)
        t.trace = "exact"
    return t


def usual(name):
    """The event shape of a law that needs one."""
    return LAYERS[name].usual


def values_for(t, direction="forward", batch_shape=(7,), dtype=torch.float64):
    """Points at the end of the layer that a direction starts from."""
    return points(batch_shape, t.base_shape if direction == "forward" else t.event_shape, dtype)


def norm(values, shape):
    """The length of events."""
    return values.flatten(values.dim() - len(shape)).norm(dim=-1)


def train(t, steps=3, optimiser=torch.optim.Adam):
    """A few steps on a loss that uses both directions."""
    optimiser = optimiser(t.parameters(), lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        results = [*t.forward_and_ladj(values_for(t)), *t.inverse_and_ladj(values_for(t, "inverse"))]
        sum(result.square().mean() for result in results).backward()
        # Far outside, the inverse of a map that flattens out is large, and its gradient larger.
        torch.nn.utils.clip_grad_norm_(t.parameters(), 1.0)
        optimiser.step()
    return t


def assert_same_outputs(a, b):
    for direction in DIRECTIONS:
        value = values_for(a, direction)
        for result, expected in zip(pair_of(a, direction)(value), pair_of(b, direction)(value), strict=True):
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


# Values and log-determinants


@all_cases
@over_the_grid
def test_log_determinant_is_that_of_the_jacobian(name, context_dim, shape, batch_shape, dtype):
    t = conditioned(name, context_dim, shape, batch_shape, dtype)
    z = values_for(t, "forward", batch_shape, dtype)
    matrix = jacobian(t, z, len(t.base_shape)).double()
    ladj = t.forward_and_ladj(z)[1].double()
    # The reference knows its matrix to rounding, and so its determinant to rounding times the condition number.
    reference_error = torch.finfo(dtype).eps * torch.linalg.cond(matrix)
    error = (ladj - torch.linalg.slogdet(matrix).logabsdet).abs()
    limit = (1e-8 if dtype == torch.float64 else 1e-4) + 30 * LAYERS[name].tolerance
    assert (error <= limit + reference_error).all()


@all_cases
@over_the_grid
def test_inverse_undoes_forward(name, context_dim, shape, batch_shape, dtype):
    t = conditioned(name, context_dim, shape, batch_shape, dtype)
    z = values_for(t, "forward", batch_shape, dtype)
    matrix = jacobian(t, z, len(t.base_shape)).double()
    with torch.no_grad():
        x, ladj = t.forward_and_ladj(z)
        z_again, ladj_again = t.inverse_and_ladj(x)
    # x is known to rounding of x itself and of what z contributes to it; the inverse's Jacobian carries that back.
    # The log-determinant, a function of z, varies faster than z by the layer's curvature: another factor 10.
    forward_norm = torch.linalg.matrix_norm(matrix, 2)
    inverse_norm = torch.linalg.matrix_norm(torch.linalg.inv(matrix), 2)
    size_of_x, size_of_z = norm(x.double(), t.event_shape), norm(z.double(), t.base_shape)
    conditioning = 1 + inverse_norm * (1 + size_of_x + forward_norm * size_of_z)
    error = 100 * torch.finfo(dtype).eps + 10 * LAYERS[name].tolerance
    assert (norm(z_again - z, t.base_shape) <= error * conditioning).all()
    assert ((ladj_again + ladj).abs() <= 10 * error * conditioning).all()


@all_cases
@over_the_grid
def test_shapes_and_dtypes(name, context_dim, shape, batch_shape, dtype):
    t = conditioned(name, context_dim, shape, batch_shape, dtype)
    before, after = (*batch_shape, *t.base_shape), (*batch_shape, *t.event_shape)
    for direction, end in (("forward", after), ("inverse", before)):
        result, ladj = pair_of(t, direction)(values_for(t, direction, batch_shape, dtype))
        assert (result.shape, ladj.shape) == (end, batch_shape)
        assert result.dtype == ladj.dtype == dtype
    assert (t.forward_shape(before), t.inverse_shape(after)) == (after, before)
    assert (t.inv.base_shape, t.inv.event_shape) == (t.event_shape, t.base_shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@all_layers
@both_directions
def test_half_precision_stays(name, dtype, direction):
    """Away from the start, where parameters are not zero: finite, and near what float64 gives."""
    t = perturb(made(name, usual(name)), scale=0.3)
    value = torch.randn(7, *t.base_shape if direction == "forward" else t.event_shape).to(dtype)
    expected = pair_of(copy.deepcopy(t).double(), direction)(value.double())
    results = pair_of(t.to(dtype), direction)(value)
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == dtype
        assert result.isfinite().all()
        error = (result.double() - reference).abs() / (1 + reference.abs())
        assert error.median() < 16 * torch.finfo(dtype).eps


@all_layers
def test_identity_at_start(name):
    """At all event shapes, with and without a context."""
    entry = LAYERS[name]
    if not entry.is_identity_at_start:
        pytest.skip("this layer is not the identity by its nature")
    for shape, context_dim in product(entry.shapes, {0, entry.context}):
        t = made(name, shape, context_dim)
        context = context_for(t, (7,), torch.float32) if context_dim else None
        for direction in DIRECTIONS:
            value = values_for(t, direction, dtype=torch.float32)
            result, ladj = pair_of(t, direction)(value, context)
            torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ladj, torch.zeros(7), rtol=0, atol=1e-5)


@learnable_layers
def test_perturbed_parameters_bend_the_map(name):
    """The laws say something only if they are tried on maps that are far from the identity."""
    bends, log_determinants = [], []
    for _ in range(3 if LAYERS[name].tolerance else 9):
        t = layer(name)
        z = values_for(t, batch_shape=(100,))
        x, ladj = t.forward_and_ladj(z)
        bends.append((x.flatten(1) - z.flatten(1)).abs().max().item())
        log_determinants.append(ladj.abs().max().item())
    assert median(bends) > 0.1
    assert LAYERS[name].preserves_volume or median(log_determinants) > 0.1


@all_layers
def test_estimates_are_declared_and_unbiased(name):
    """Layers say whether their own log-determinant is exact; an estimate has the exact one as its mean."""
    entry = LAYERS[name]
    t = perturb(entry.make(5 if entry.usual == (5,) else entry.usual, 0).double())
    assert t.ladj_is_exact == t.inv.ladj_is_exact == entry.is_exact
    assert t.exact().ladj_is_exact and t.exact().exact() is not None
    if entry.is_exact:
        assert t.exact() is t
    if entry.is_exact or not entry.is_random:
        return
    for direction in DIRECTIONS:
        num_rows = 2000 if entry.tolerance else 20_000  # solves are slow
        values = values_for(t, direction, (1,)).expand(num_rows, *t.event_shape)
        estimates = pair_of(t, direction)(values)[1]
        exact = pair_of(t.exact(), direction)(values[:1])[1]
        torch.testing.assert_close(pair_of(t.inv.exact().inv, direction)(values[:1])[1], exact)
        assert estimates.std() > 0
        assert (estimates.mean() - exact).abs() < 4 * estimates.std() / len(estimates) ** 0.5


@all_cases
@both_directions
def test_torch_interface_agrees_with_the_pair(name, context_dim, direction):
    t = conditioned(name, context_dim)
    t = t if direction == "forward" else t.inv
    z = values_for(t)
    # Solves for a value alone take other steps.
    close = max(1e-7, 100 * LAYERS[name].tolerance)
    assert_close = partial(torch.testing.assert_close, rtol=close, atol=close)
    x, ladj = t.forward_and_ladj(z)
    assert_close(t(z), x)
    assert_close(t.log_abs_det_jacobian(z, x), ladj)
    z_again, ladj = t.inverse_and_ladj(x)
    assert_close(t.inv(x), z_again)
    assert_close(t.inv.log_abs_det_jacobian(x, z_again), ladj)


# Gradients


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name, entry in LAYERS.items() for shape in (entry.shapes[0], entry.usual)],
    ids=str,
)
@both_directions
def test_gradients(name, shape, direction):
    """Of both results, with respect to the value and all parameters; for root searches this is the implicit one."""
    t = with_equal_steps(layer(name, shape))
    names = [f"t.{n}" for n, _ in t.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in t.parameters()]
    start = t.base_shape if direction == "forward" else t.event_shape
    value = torch.randn(2, *start, dtype=torch.float64, requires_grad=True)

    def results(value, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(Pair(t, direction), named, (value,))

    # Networks have hundreds of parameters: there a random projection of the Jacobian is checked.
    fast = sum(p.numel() for p in parameters) > 100
    assert torch.autograd.gradcheck(results, (value, *parameters), fast_mode=fast)


@conditional_layers
@both_directions
def test_gradients_reach_the_context(name, direction):
    t = conditional(name, LAYERS[name].shapes[:2][-1])
    shape = t.base_shape if direction == "forward" else t.event_shape
    value = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    context = context_for(t, (4,)).requires_grad_()
    assert torch.autograd.gradcheck(pair_of(with_equal_steps(t), direction), (value, context), fast_mode=True)
    result, ladj = pair_of(t.condition(context), direction)(value)
    (gradient,) = torch.autograd.grad(result.sum() + ladj.sum(), context)
    assert_in_each_event(name, gradient != 0)


@volume_changing_layers
@both_directions
def test_two_backward_passes_through_two_log_determinants(name, direction):
    """Nothing of the graph of an earlier call may linger in the layer."""
    t = layer(name)
    t = t if direction == "forward" else t.inv
    z = values_for(t)
    x = t(z).detach()
    for _ in range(2):
        t.log_abs_det_jacobian(z, x).sum().backward()
    # A log-determinant need not depend on all parameters.
    used = [p for p in t.parameters() if p.grad is not None]
    expected = torch.autograd.grad(t.log_abs_det_jacobian(z, x).sum(), used)
    assert any((gradient != 0).any() for gradient in expected)
    for p, once in zip(used, expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * once)


# Scores


@all_cases
@over_the_grid
def test_score_is_the_gradient_of_the_log_density(name, context_dim, shape, batch_shape, dtype):
    """Against the gradient of log q at x by the inverse, where z is standard normal."""
    t = layer(name, shape, context_dim, dtype)
    z = torch.randn(*batch_shape, *t.base_shape, dtype=dtype)
    context = context_for(t, batch_shape, dtype) if context_dim else None
    x, _, score = t.forward_and_score(z, -z, context)
    assert score.shape == x.shape and score.dtype == dtype and not score.requires_grad

    t, z, x = t.double(), z.double(), x.detach().double().requires_grad_()
    t = t.condition(context.double()) if context_dim else t
    z_again, ladj = t.inverse_and_ladj(x)
    (expected,) = torch.autograd.grad(ladj.sum() - z_again.square().sum() / 2, x)
    # Rounding of z and x reaches the score through the inverse's Jacobian.
    inverse = torch.linalg.inv(jacobian(t, z, len(t.base_shape)))
    scale = (1 + torch.linalg.matrix_norm(inverse, 2)) * (1 + norm(expected, t.event_shape))
    error = norm(score.double() - expected, t.event_shape) / scale
    limit = (1e-8 if dtype == torch.float64 else 1e-2) + 10 * LAYERS[name].tolerance
    assert (error <= limit).all()


@all_cases
def test_score_comes_with_the_pair_and_its_gradients(name, context_dim):
    t = conditioned(name, context_dim, batch_shape=(7,))
    leaves = [values_for(t).requires_grad_(), *t.parameters()]
    x, ladj, _ = t.forward_and_score(leaves[0], -leaves[0])
    expected = t.forward_and_ladj(leaves[0])
    # Solves with a score take other steps.
    close = max(1e-7, 100 * LAYERS[name].tolerance)
    torch.testing.assert_close((x, ladj), expected, rtol=close, atol=close)
    if LAYERS[name].has_parameters:
        gradients, expected = (
            torch.autograd.grad(x.sin().sum() + ladj.sum(), leaves, allow_unused=True, materialize_grads=True)
            for x, ladj in ((x, ladj), expected)
        )
        close = max(1e-7, 1000 * LAYERS[name].tolerance)
        torch.testing.assert_close(gradients, expected, rtol=close, atol=close)


@all_layers
def test_score_without_gradients(name):
    t = layer(name)
    z = values_for(t)
    expected = [result.detach() for result in t.forward_and_score(z, -z)]
    with torch.no_grad():
        results = t.forward_and_score(z, -z)
    assert not any(result.requires_grad for result in results)
    assert not z.requires_grad
    torch.testing.assert_close(list(results), expected)


@all_layers
def test_score_traced_equals_eager(name):
    # The cost of a recording grows with the number of entries, three of which have all kinds of neighbours.
    t = with_equal_steps(layer(name, (3,) if len(usual(name)) == 1 else usual(name)))
    z, other = torch.randn(2, 7, *t.base_shape, dtype=torch.float64)
    graph = make_fx(lambda z: t.forward_and_score(z, -z))(z)
    with torch.no_grad():
        torch.testing.assert_close(graph(other), t.forward_and_score(other, -other))


# Contexts


@conditional_layers
@both_directions
def test_context_broadcasts(name, direction):
    t = conditional(name)
    for batch, context_batch in (((), (7,)), ((7,), ()), ((3, 1), (7,)), ((2, 3, 7), (3, 7)), ((0,), ())):
        assert_broadcasts(t, direction, batch, context_batch)


def assert_broadcasts(t, direction, batch, context_batch):
    value = values_for(t, direction, batch)
    context = context_for(t, context_batch)
    together = torch.broadcast_shapes(batch, context_batch)
    results = pair_of(t.condition(context), direction)(value)
    start, end = (t.base_shape, t.event_shape) if direction == "forward" else (t.event_shape, t.base_shape)
    expanded = value.expand(*together, *start), context.expand(*together, *t.context_shape)
    expected = pair_of(t, direction)(*expanded)
    assert results[0].shape == (*together, *end) and results[1].shape == together
    for result, full in zip(results, expected, strict=True):
        torch.testing.assert_close(result, full)


@conditional_layers
def test_context_matters(name):
    t = conditional(name)
    z = values_for(t)
    a, b = (t.condition(context_for(t))(z) for _ in range(2))
    assert_in_each_event(name, (a - b).abs() > 1e-6)


def assert_in_each_event(name, found):
    """In each event, or in some if the layer lets others pass."""
    found = found.flatten(1).any(-1)
    assert found.all() if LAYERS[name].bends_all else found.any()


@conditional_layers
def test_inverse_and_conditioning_commute(name):
    t = conditional(name)
    context = context_for(t, (7,))
    x = values_for(t, "inverse")
    torch.testing.assert_close(t.inv.condition(context)(x), t.condition(context).inv(x), rtol=0, atol=0)


# Wrong input


@all_layers
@both_directions
def test_wrong_event_size_raises(name, direction):
    t = made(name, usual(name))
    for shape in ((11,), (7, 4), (5, 1), (3, 2, 4), ()):
        with pytest.raises(ShapeError, match=r"has event (size|shape) .*, but got a tensor of shape"):
            pair_of(t, direction)(torch.zeros(shape))


@all_layers
@both_directions
def test_superfluous_context_raises(name, direction):
    t = made(name, usual(name))
    with pytest.raises(ShapeError, match=r"takes no context.*context_dim"):
        pair_of(t, direction)(values_for(t, direction, ()), torch.zeros(3))


@conditional_layers
@both_directions
def test_missing_or_wrong_context_raises(name, direction):
    t = made(name, usual(name), LAYERS[name].context)
    value = torch.zeros(t.base_shape if direction == "forward" else t.event_shape)
    expected = re.escape(described(t.context_shape))
    with pytest.raises(ShapeError, match=rf"needs a context of {expected}.*condition"):
        pair_of(t, direction)(value)
    for shape in ((4,), (7, 2), ()):
        with pytest.raises(ShapeError, match=f"context {expected}, but got shape"):
            pair_of(t, direction)(value, torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"\(4,\).*\(3,\).*do not broadcast"):
        pair_of(t.condition(context_for(t, (3,))), direction)(torch.zeros(4, *value.shape))


@all_layers
def test_no_dimension_raises(name):
    with pytest.raises(OptionError):
        made(name, (0,) * len(usual(name)))


@conditional_layers
def test_negative_context_size_raises(name):
    with pytest.raises(OptionError):
        made(name, usual(name), -1)


# Modules


@learnable_layers
def test_parameters_of_the_inverse_are_found(name):
    t = made(name, usual(name))
    assert {id(p) for p in t.inv.parameters()} == {id(p) for p in t.parameters()}
    pyro.module("t", t.inv)
    stored = {id(p.unconstrained() if hasattr(p, "unconstrained") else p) for p in pyro.get_param_store().values()}
    assert {id(p) for p in t.parameters()} <= stored


@all_layers
def test_inverse_of_the_inverse_is_the_layer(name):
    t = made(name, usual(name))
    # An inverse is made anew each time, so only a layer that is none itself comes back as the same object.
    t = t.inv if isinstance(t, Inverse) else t
    assert t.inv.inv is t


@all_cases
def test_copies_of_a_trained_layer_agree(name, context_dim):
    t = made(name, usual(name), context_dim).double()
    context = context_for(t)
    view = t.condition(context) if context_dim else t
    if list(t.parameters()):
        train(view)
    fresh = made(name, usual(name), context_dim).double()
    fresh.load_state_dict(t.state_dict())
    fresh_inverse = made(name, usual(name), context_dim).double().inv
    fresh_inverse.load_state_dict(t.inv.state_dict())
    for other in (copy.deepcopy(t), pickle.loads(pickle.dumps(t.inv)).inv, fresh, fresh_inverse.inv):
        assert_same_outputs(other.condition(context) if context_dim else other, view)


@learnable_layers
def test_copies_do_not_share_parameters(name):
    t = layer(name)
    z = values_for(t)
    before = t(z)
    perturb(copy.deepcopy(t))
    torch.testing.assert_close(t(z), before, rtol=0, atol=0)


@all_layers
def test_what_was_adapted_is_saved(name):
    """Layers that adapt to data then standardise them in each channel, and know it; the others stay as they are."""
    t, fresh = made(name, usual(name)), made(name, usual(name))
    rows = 3 + 2 * torch.randn(500, *t.event_shape)
    before = copy.deepcopy(t)
    t.adapt(rows)
    assert t.is_adapted
    if t.adapts:
        z = t.inv(rows)
        by_channel = z.movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(by_channel.mean(0), torch.zeros(t.base_shape[0]), rtol=0, atol=1e-4)
        torch.testing.assert_close(by_channel.std(0, correction=0), torch.ones(t.base_shape[0]), rtol=1e-4, atol=0)
    else:
        assert_same_outputs(copy.deepcopy(t).double(), before.double())
    fresh.load_state_dict(t.state_dict())
    assert fresh.is_adapted
    assert_same_outputs(fresh.double(), t.double())


def test_initial_values_are_copied():
    """A tensor that a user gave as initial value must not train with the layer."""
    init = torch.zeros(2, 2)
    perturb(Elementwise(2, init=init))
    assert (init == 0).all()


@all_layers
def test_repr_names_layer_and_size(name):
    t = made(name, usual(name))
    assert type(t).__name__ in repr(t) and ("dim=5" in repr(t) or f"dim={usual(name)}" in repr(t))


# Function transforms


@all_layers
@both_directions
def test_vmap_equals_a_batch(name, direction):
    t = with_equal_steps(layer(name))
    pair, value = pair_of(t, direction), values_for(t, direction)
    for result, expected in zip(torch.func.vmap(pair)(value), pair(value), strict=True):
        torch.testing.assert_close(result, expected)


@conditional_layers
@both_directions
def test_vmap_with_context_equals_a_batch(name, direction):
    t = with_equal_steps(conditional(name))
    pair, value = pair_of(t, direction), values_for(t, direction)
    context = context_for(t, (7,))
    for result, expected in zip(torch.func.vmap(pair)(value, context), pair(value, context), strict=True):
        torch.testing.assert_close(result, expected)


@all_layers
@both_directions
def test_vmap_of_gradients_equals_a_batch(name, direction):
    t = with_equal_steps(layer(name))
    pair, value = pair_of(t, direction), values_for(t, direction)
    gradient = torch.func.vmap(torch.func.grad(lambda v: sum(r.sum() for r in pair(v))))(value)
    value.requires_grad_()
    expected = torch.autograd.grad(sum(r.sum() for r in pair(value)), value)[0]
    torch.testing.assert_close(gradient, expected)


# The inverse of a planar layer unrolls its root search, which takes a compiler long; capturing it can fail.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it imports its compiler
@pytest.mark.parametrize("name", ["planar", "autoregressive-affine", "coupling-affine"])
@pytest.mark.parametrize(("direction", "backend"), [("forward", "inductor"), ("inverse", "eager")])
def test_compiles_without_graph_breaks(name, direction, backend):
    pair = pair_of(layer(name, (3,)), direction)
    value = points((7,), 3)
    torch.compiler.reset()
    compiled = torch.compile(pair, fullgraph=True, backend=backend)
    for result, expected in zip(compiled(value), pair(value), strict=True):
        torch.testing.assert_close(result, expected)


# Nothing stale


@pytest.mark.parametrize(
    ("name", "optimiser"),
    [(name, key) for name, two in zip(LEARNABLE, cycle(combinations(OPTIMISERS, 2)), strict=False) for key in two],
)
def test_results_follow_the_parameters(name, optimiser):
    t = layer(name)
    views = [(view, values_for(view)) for view in (t, t.inv)]
    before = [result.detach() for view, value in views for result in view.forward_and_ladj(value)]
    train(t, steps=1, optimiser=OPTIMISERS[optimiser])
    after = [result.detach() for view, value in views for result in view.forward_and_ladj(value)]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        is_constant = LAYERS[name].preserves_volume and i % 2 == 1
        assert torch.equal(old, new) == is_constant


def cached(name="planar"):
    t = layer(name)
    view = t.with_cache()
    return t, view, values_for(t)


@all_layers
def test_cache_keeps_one_pair(name):
    t, view, z = cached(name)
    x = view(z)
    assert isinstance(view, Cached)
    assert view(z) is x
    torch.testing.assert_close(view.log_abs_det_jacobian(z, x), t.log_abs_det_jacobian(z, x))
    torch.testing.assert_close(x, t(z))
    view(z.clone())
    assert view(z) is not x


@all_layers
def test_cache_works_from_the_inverse(name):
    """As in torch, ``t.inv(t(z))`` of a cached transform is z itself, and ``t(t.inv(x))`` is x."""
    t, view, z = cached(name)
    x = view(z)
    assert view.inv(x) is z
    y = values_for(t, "inverse")
    z = view.inv(y)
    assert view(z) is y
    torch.testing.assert_close(view.log_abs_det_jacobian(z, y), t.log_abs_det_jacobian(z, y))


@all_layers
def test_cache_is_keyed_by_identity(name):
    t, view, z = cached(name)
    x = view(z)
    other = z + 1
    torch.testing.assert_close(view.log_abs_det_jacobian(other, t(other)), t.log_abs_det_jacobian(other, t(other)))
    torch.testing.assert_close(view(other), t(other))
    torch.testing.assert_close(view.log_abs_det_jacobian(z, x), t.log_abs_det_jacobian(z, x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["deepcopy", "pickle"])
def test_cache_is_dropped_by_copies(copied):
    t, view, z = cached()
    x = view(z)
    assert x.grad_fn is not None
    other = copied(view)
    assert other(z) is not x
    torch.testing.assert_close(other(z), t(z))


def _by_in_place_operation(t):
    with torch.no_grad():
        for parameter in t.parameters():
            parameter.add_(0.1)


def _by_state_dict(t):
    t.load_state_dict({name: value + 0.1 for name, value in t.state_dict().items()})


UPDATES = {
    "in-place": _by_in_place_operation,
    "state_dict": _by_state_dict,
    **{key: lambda t, o=o: train(t, steps=1, optimiser=o) for key, o in OPTIMISERS.items()},
}


@pytest.mark.parametrize("update", UPDATES)
def test_cache_does_not_outlive_a_parameter_update(update):
    t, view, z = cached()
    x = view(z)
    UPDATES[update](t)
    assert not torch.equal(t(z), x)
    torch.testing.assert_close(view.log_abs_det_jacobian(z, x), t.log_abs_det_jacobian(z, x), rtol=0, atol=0)
    torch.testing.assert_close(view(z), t(z), rtol=0, atol=0)


def test_cache_does_not_outlive_other_parameters():
    _, view, z = cached()
    view(z)
    # Changed in place as often as the layer's own.
    others = {name: torch.randn_like(parameter).add_(1) for name, parameter in view.named_parameters()}
    assert [p._version for p in others.values()] == [p._version for p in view.parameters()]
    expected = torch.func.functional_call(view, others, (z.clone(),))
    torch.testing.assert_close(torch.func.functional_call(view, others, (z,)), expected, rtol=0, atol=0)


def test_cache_filled_without_gradients_does_not_cut_them():
    _, view, z = cached()
    with torch.no_grad():
        x = view(z)
    assert view.log_abs_det_jacobian(z, x).requires_grad
    assert view(z).requires_grad


def test_no_cache_is_the_layer_itself():
    t = Planar(2)
    assert t.with_cache(0) is t
    assert t.with_cache().with_cache(0) is t


# Compositions and permutations


def test_composition_applies_the_first_layer_first():
    a, b = layer("planar", (3,)), layer("radial", (3,))
    z = points((7,), 3)
    torch.testing.assert_close(Compose([a, b])(z), b(a(z)))


def test_composition_of_layers_with_and_without_context():
    t = perturb(Compose([Planar(2, CONTEXT_DIM), Permutation([1, 0]), Elementwise(2)]).double())
    context = context_for(t, (7,))
    z = points((7,), 2)
    torch.testing.assert_close(t.condition(context).inv(t.condition(context)(z)), z)


@pytest.mark.parametrize("layers", [[Planar(2), Planar(3)], [Planar(2, 1), Planar(2, 3)]], ids=["dim", "context"])
def test_composition_of_layers_that_do_not_fit_raises(layers):
    with pytest.raises(ShapeError, match="must agree"):
        Compose(layers)


def test_empty_composition_raises():
    with pytest.raises(OptionError, match="at least one"):
        Compose([])


@pytest.mark.parametrize("order", [[0, 0], [1, 2], [0, 2]], ids=str)
def test_no_permutation_raises(order):
    with pytest.raises(OptionError, match="permutation"):
        Permutation(order)


def test_wrong_init_of_elementwise_raises():
    with pytest.raises(ShapeError, match="init"):
        Elementwise(3, init=torch.zeros(2, 2))

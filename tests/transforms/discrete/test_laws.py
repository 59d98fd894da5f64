"""The laws that every discrete layer obeys, with random parameters far from the identity."""

import copy
import pickle

import pyro
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyroflows as pf
from pyroflows.compiling.program import compiled
from pyroflows.errors import ShapeError
from pyroflows.transforms import Compose, Conditioned, DiscreteAutoregressive, DiscreteCoupling, Inverse, OneHot
from pyroflows.transforms.discrete.base import COOLING, LAST_TEMPERATURE, DiscreteTransform
from pyroflows.transforms.discrete.stacks import one_hot_value
from tests.transforms.discrete.registry import (
    CASES,
    CONTEXT_DIM,
    LENGTH,
    MAPS,
    NAMES,
    SIZE,
    all_sequences,
    conditioned,
    layer,
    made,
    one_hots,
    randomized,
    some_sequences,
)

DIRECTIONS = ("forward", "inverse")
DTYPES = (torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64)
BATCH_SHAPES = ((), (7,), (3, 2, 7), (0,))

all_layers = pytest.mark.parametrize("name", NAMES)
all_cases = pytest.mark.parametrize(("name", "context_dim"), CASES)
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


class Run(nn.Module):
    """One direction of a layer as a module, for ``functional_call``."""

    def __init__(self, t, direction):
        super().__init__()
        self.t, self.direction = t, direction

    def forward(self, value, context=None):
        return pair_of(self.t, self.direction)(value, context)


def pair_of(t, direction):
    return t.forward_and_ladj if direction == "forward" else t.inverse_and_ladj


def discrete_parts(t):
    return [part for part in t.modules() if isinstance(part, DiscreteTransform)]


def loss_of(t, one_hot, weights, direction):
    """A function of one-hot values that is linear in them, with a gradient of each parameter."""
    return (one_hot_value(t, one_hot, None, direction) * weights).sum()


# Values


@all_cases
def test_round_trip_of_the_whole_support(name, context_dim):
    for length, size in ((1, 5), (2, 6), (3, 4)):
        t = conditioned(name, context_dim, length=length, size=size)
        z = all_sequences(length, size)
        x, ladj = t.forward_and_ladj(z)
        assert len(x.unique(dim=0)) == len(z)
        assert x.min() == 0 and x.max() == size - 1
        z_again, inverse_ladj = t.inverse_and_ladj(x)
        assert torch.equal(z_again, z)
        assert ladj.dtype == inverse_ladj.dtype == torch.float64
        assert ladj.shape == inverse_ladj.shape == z.shape[:1]
        assert not ladj.any() and not inverse_ladj.any()


@all_cases
def test_shapes_and_dtypes_of_batches(name, context_dim):
    """Sequences keep their dtype, and those of a batch are what they are alone."""
    for batch_shape in BATCH_SHAPES:
        t = conditioned(name, context_dim, batch_shape)
        z = some_sequences(*batch_shape)
        for direction in DIRECTIONS:
            expected = pair_of(t, direction)(z)[0]
            for dtype in DTYPES:
                result, ladj = pair_of(t, direction)(z.to(dtype))
                assert result.dtype == dtype and result.shape == z.shape
                assert ladj.dtype == torch.float64 and ladj.shape == batch_shape
                assert torch.equal(result.long(), expected)
        assert t.forward_shape(z.shape) == t.inverse_shape(z.shape) == z.shape


@all_cases
@both_directions
def test_torch_interface_agrees_with_the_pair(name, context_dim, direction):
    t = conditioned(name, context_dim)
    t = t if direction == "forward" else t.inv
    z = some_sequences(7)
    x, ladj = t.forward_and_ladj(z)
    assert torch.equal(t(z), x)
    assert torch.equal(t.inv(x), z)
    assert torch.equal(t.log_abs_det_jacobian(z, x), ladj)


@all_layers
def test_identity_at_start(name):
    z = all_sequences(3, 4)
    t = made(name, 3, 4)
    assert torch.equal(t(z), z) and torch.equal(t.inv(z), z)


@all_layers
def test_random_parameters_move_categories(name):
    """The laws say something only if they are tried on maps that are far from the identity."""
    z = some_sequences(200)
    moved = torch.stack([layer(name)(z) != z for _ in range(5)])
    assert moved.double().mean() > 0.25


@pytest.mark.parametrize("univariate", MAPS)
def test_inverse_is_exact_where_parameters_are_nearly_equal(univariate):
    """In float32 steps round otherwise than passes, so that they order one of some 100,000 pairs otherwise."""
    t = randomized(DiscreteAutoregressive(64, 27, univariate, hidden_dims=(32,)))
    x = torch.randint(27, (4000, 64))
    assert torch.equal(t(t.inv(x)), x)
    z = t(x)
    assert torch.equal(t.inv(z), x)


def test_convolutions_give_each_place_its_own_parameters():
    class Places(nn.Module):
        def forward(self, x):
            return torch.eye(SIZE, LENGTH).expand(len(x), -1, -1)  # the location at place j is j

    t = DiscreteCoupling(LENGTH, SIZE, "additive", [True, False, True, False], lambda *sizes: Places())
    assert t(torch.zeros(LENGTH)).tolist() == [0, 1, 0, 3]


# One-hot vectors


@all_cases
@both_directions
def test_one_hot_vectors_have_exactly_the_values_of_categories(name, context_dim, direction):
    """At all temperatures, and gradients reach the vectors and all parameters."""
    t = layer(name, context_dim=context_dim)
    context = torch.randn(5, 7, context_dim, dtype=torch.float64) if context_dim else None
    for temperature in (0.01, 1.0, 30.0):
        for part in discrete_parts(t):
            part.temperature.fill_(temperature)
        value = some_sequences(7)
        one_hot = one_hots(value).requires_grad_()
        result = one_hot_value(t, one_hot, context, direction)
        expected = pair_of(t, direction)(value, context)[0]
        assert torch.equal(result, one_hots(expected))
    gradients = torch.autograd.grad((result * torch.randn_like(result)).sum(), [one_hot, *t.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("autoregressive-affine", "forward"),
        ("autoregressive-permutation", "inverse"),
        ("coupling-permutation", "forward"),
        ("coupling-conv-additive", "inverse"),
    ],
)
def test_one_hot_vectors_recorded_by_make_fx(name, direction):
    t = layer(name)
    weights = torch.randn(7, LENGTH, SIZE, dtype=torch.float64)
    parameters = list(t.parameters())

    def gradients(one_hot):
        return torch.autograd.grad(loss_of(t, one_hot, weights, direction), parameters)

    graph = make_fx(gradients)(one_hots(some_sequences(7)))
    other = one_hots(some_sequences(7))
    torch.testing.assert_close(graph(other), gradients(other))


@pytest.mark.parametrize("name", ["autoregressive-permutation", "coupling-affine"])
def test_recorded_steps_read_the_temperature(name):
    """It is an input of a recorded step, which is not recorded again when the temperature falls."""
    t = layer(name)
    one_hot, weights = one_hots(some_sequences(7)), torch.randn(7, LENGTH, SIZE, dtype=torch.float64)
    runs = []

    def gradients(one_hot):
        runs.append(1)
        return torch.autograd.grad(loss_of(t, one_hot, weights, "inverse"), list(t.parameters()))

    recorded = compiled(gradients, [one_hot], state=[t])
    runs.clear()
    before = recorded(one_hot)
    for _ in range(100):
        t.before_step()
    after = recorded(one_hot)
    assert not runs
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(list(after), list(gradients(one_hot)))


# The temperature


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_temperature_falls_in_every_dtype(dtype):
    t = DiscreteCoupling(3, 5).to(dtype)
    for step in range(1, 2501):
        t.before_step()
        if step in (500, 1000, 2500):
            expected = torch.tensor(max(COOLING**step, LAST_TEMPERATURE), dtype=dtype)
            torch.testing.assert_close(t.temperature, expected)


def test_temperature_falls_each_step_down_to_the_last():
    t = made("coupling-affine")
    for _ in range(3):
        t.before_step()
    torch.testing.assert_close(t.temperature, torch.tensor(COOLING**3, dtype=torch.float64))
    for _ in range(3000):
        t.before_step()
    torch.testing.assert_close(t.temperature, torch.tensor(LAST_TEMPERATURE, dtype=torch.float64))
    t.temperature.fill_(0.03)
    t.before_step()
    torch.testing.assert_close(t.temperature, torch.tensor(0.03, dtype=torch.float64))


# Contexts


@all_layers
@both_directions
def test_context_broadcasts(name, direction):
    t = layer(name, context_dim=CONTEXT_DIM)
    for batch, context_batch in (((), (7,)), ((7,), ()), ((3, 1), (7,)), ((2, 3, 7), (3, 7)), ((0,), ())):
        value = some_sequences(*batch)
        context = torch.randn(*context_batch, CONTEXT_DIM, dtype=torch.float64)
        together = torch.broadcast_shapes(batch, context_batch)
        result, ladj = pair_of(t.condition(context), direction)(value)
        expanded = value.expand(*together, LENGTH), context.expand(*together, CONTEXT_DIM)
        assert result.shape == (*together, LENGTH) and ladj.shape == together
        assert torch.equal(result, pair_of(t, direction)(*expanded)[0])


@all_layers
def test_context_matters(name):
    t = layer(name, context_dim=CONTEXT_DIM)
    z = some_sequences(200)
    a, b = (t.condition(torch.randn(200, CONTEXT_DIM, dtype=torch.float64))(z) for _ in range(2))
    assert (a != b).double().mean() > 0.05


@all_layers
def test_inverse_and_conditioning_commute(name):
    t = layer(name, context_dim=CONTEXT_DIM)
    context = torch.randn(7, CONTEXT_DIM, dtype=torch.float64)
    x = some_sequences(7)
    assert torch.equal(t.inv.condition(context)(x), t.condition(context).inv(x))
    assert isinstance(t.condition(context), Conditioned)


@all_layers
@both_directions
def test_wrong_shapes_raise(name, direction):
    with pytest.raises(ShapeError, match=r"has event size 4, but got a tensor of shape \(5,\)"):
        pair_of(made(name), direction)(torch.zeros(5))
    with pytest.raises(ShapeError, match=r"takes no context.*context_dim"):
        pair_of(made(name), direction)(some_sequences(), torch.zeros(3))
    t = made(name, context_dim=CONTEXT_DIM)
    with pytest.raises(ShapeError, match=r"needs a context of size 2.*condition"):
        pair_of(t, direction)(some_sequences())
    with pytest.raises(ShapeError, match=r"context size 2, but got shape \(7, 3\)"):
        pair_of(t, direction)(some_sequences(), torch.zeros(7, 3))


# Modules


@all_layers
def test_inverse_is_a_module_with_the_same_parameters(name):
    t = made(name)
    assert t.inv.inv is t and isinstance(t.inv, Inverse)
    assert {id(p) for p in t.inv.parameters()} == {id(p) for p in t.parameters()}
    pyro.module("t", t.inv)
    stored = {id(p.unconstrained() if hasattr(p, "unconstrained") else p) for p in pyro.get_param_store().values()}
    assert {id(p) for p in t.parameters()} <= stored
    assert t.adapts is t.adapts_to_draws is t.observes is False
    assert t.is_adapted and t.ladj_is_exact and t.exact() is t


@all_cases
def test_copies_agree(name, context_dim):
    """The temperature, as it is after some steps, is part of the state."""
    t = layer(name, context_dim=context_dim)
    for part in discrete_parts(t):
        part.before_step()
    context = torch.randn(7, context_dim, dtype=torch.float64) if context_dim else None
    loaded = made(name, context_dim=context_dim)
    loaded.load_state_dict(t.state_dict())
    z = some_sequences(7)
    for other in (copy.deepcopy(t), pickle.loads(pickle.dumps(t.inv)).inv, loaded):
        for direction in DIRECTIONS:
            assert torch.equal(pair_of(other, direction)(z, context)[0], pair_of(t, direction)(z, context)[0])
        assert [part.temperature.item() for part in discrete_parts(other)] == [COOLING] * len(discrete_parts(t))
    randomized(copy.deepcopy(t))
    assert torch.equal(loaded.forward_and_ladj(z, context)[0], t.forward_and_ladj(z, context)[0])


@all_layers
def test_a_layer_that_was_on_the_meta_device_works_once_it_is_loaded(name):
    t = layer(name)
    other = copy.deepcopy(t).to("meta").to_empty(device="cpu")
    for part in [*other.parameters(), *other.buffers()]:
        part.data.zero_()
    other.load_state_dict(t.state_dict())
    z = some_sequences(7)
    assert torch.equal(other(z), t(z)) and torch.equal(other.inv(z), t.inv(z))
    one_hot = one_hots(z)
    assert torch.equal(one_hot_value(other, one_hot, None, "inverse"), one_hot_value(t, one_hot, None, "inverse"))


@all_layers
def test_cache_keeps_one_pair(name):
    t = layer(name)
    view, z = t.with_cache(), some_sequences(7)
    x = view(z)
    assert view.inv(x) is z and torch.equal(x, t(z))
    assert torch.equal(one_hot_value(view, one_hots(z), None, "forward"), one_hots(x))


@pytest.mark.parametrize(
    "name", ["autoregressive-affine", "autoregressive-causal-conv-additive", "coupling-permutation"]
)
def test_flows_of_the_layer_are_saved_and_loaded(name, tmp_path):
    flow = pf.Flow([layer(name).float().inv, layer(name).float()])
    flow.before_step()
    flow.save(tmp_path / "flow.safetensors")
    loaded = pf.load_flow(tmp_path / "flow.safetensors")
    x = some_sequences(7)
    assert torch.equal(loaded().log_prob(x), flow().log_prob(x))
    assert torch.equal(loaded().latent(x), flow().latent(x))
    assert loaded.transform.layers[1].temperature == flow.transform.layers[1].temperature < 1


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        (DiscreteAutoregressive(3, 5, order=[0, 1, 2]), DiscreteAutoregressive(3, 5, order=[2, 1, 0]), "order"),
        (DiscreteCoupling(4, 5, mask=[True, True, False, False]), DiscreteCoupling(4, 5), "mask"),
        (DiscreteCoupling(3, 2, "additive"), DiscreteCoupling(3, 2, "permutation"), "univariate"),
    ],
    ids=["order", "mask", "map"],
)
def test_states_of_another_structure_are_refused(one, other, what):
    with pytest.raises(pf.errors.StateError, match=what):
        pf.Flow([other]).load_state_dict(pf.Flow([one]).state_dict())


def test_one_hot_layer_writes_categories_as_vectors_and_reads_them():
    t = OneHot(LENGTH, SIZE).double()
    for batch_shape in BATCH_SHAPES:
        z = some_sequences(*batch_shape)
        for view in (t, t.inv.inv, Compose([t]), copy.deepcopy(t), pickle.loads(pickle.dumps(t))):
            x, ladj = view.forward_and_ladj(z)
            assert torch.equal(x, one_hots(z)) and x.dtype == ladj.dtype == torch.float64
            z_again, inverse_ladj = view.inverse_and_ladj(x)
            assert torch.equal(z_again, z)
            assert ladj.shape == inverse_ladj.shape == batch_shape
            assert not ladj.any() and not inverse_ladj.any()
            assert torch.equal(view.inv(x), z)
        assert t.forward_shape(z.shape) == x.shape and t.inverse_shape(x.shape) == z.shape


# Function transforms


@all_layers
@both_directions
def test_vmap_equals_a_batch(name, direction):
    t = layer(name, context_dim=CONTEXT_DIM)
    value, context = some_sequences(7), torch.randn(7, CONTEXT_DIM, dtype=torch.float64)
    result, ladj = torch.func.vmap(pair_of(t, direction))(value, context)
    assert torch.equal(result, pair_of(t, direction)(value, context)[0])
    assert ladj.shape == (7,) and not ladj.any()


@all_layers
@both_directions
def test_vmap_over_stacked_parameters(name, direction):
    run = Run(layer(name), direction)
    names = [name for name, _ in run.named_parameters()]
    stacked = {key: torch.stack([3 * torch.randn_like(run.get_parameter(key)) for _ in range(3)]) for key in names}
    value = some_sequences(7)
    results = torch.func.vmap(lambda p: torch.func.functional_call(run, p, (value,))[0])(stacked)
    for i, result in enumerate(results):
        one = {key: parameter[i] for key, parameter in stacked.items()}
        assert torch.equal(result, torch.func.functional_call(run, one, (value,))[0])
    assert not torch.equal(results[0], results[1])


@all_layers
@both_directions
def test_vmap_of_gradients_equals_a_batch(name, direction):
    t = layer(name)
    weights = torch.randn(LENGTH, SIZE, dtype=torch.float64)
    one_hot = one_hots(some_sequences(7))
    result = torch.func.vmap(torch.func.grad(lambda v: loss_of(t, v, weights, direction)))(one_hot)
    one_hot.requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(t, one_hot, weights, direction), one_hot)
    torch.testing.assert_close(result, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it imports its compiler
@pytest.mark.parametrize("name", ["autoregressive-affine", "autoregressive-permutation", "coupling-permutation"])
@both_directions
def test_compiles_without_graph_breaks(name, direction):
    t, value = layer(name), some_sequences(7)
    torch.compiler.reset()
    compiled_pair = torch.compile(pair_of(t, direction), fullgraph=True, backend="eager")
    assert torch.equal(compiled_pair(value)[0], pair_of(t, direction)(value)[0])

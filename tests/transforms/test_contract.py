"""What every layer may declare: two shapes, an estimate with its exact view, state that comes from data."""

import copy
import pickle

import pytest
import torch
from torch.distributions import ReshapeTransform

from pyroflows.errors import DataError, InexactError, OptionError, ShapeError
from pyroflows.flows import Flow
from pyroflows.transforms import Compose, Elementwise, FlowTransform, Permutation, Planar, Standardize
from pyroflows.transforms.foreign import Foreign
from pyroflows.transforms.memory import Memory
from tests.transforms.examples import EstimatedScale
from tests.transforms.registry import perturb, points


class Halve(FlowTransform):
    """x = z / 2, an estimate without an exact value, which counts its steps."""

    ladj_is_exact = False

    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("num_steps", torch.tensor(0))

    def _forward_and_ladj(self, z, context):
        return z / 2, torch.randn(z.shape[:-1])

    def _inverse_and_ladj(self, x, context):
        return 2 * x, torch.randn(x.shape[:-1])

    def before_step(self):
        self.num_steps += 1


def fold(rows=2, columns=3):
    return Foreign(ReshapeTransform((rows * columns,), (rows, columns)), rows * columns)


# Shapes


def test_a_layer_may_change_the_shape_of_an_event():
    t = fold()
    assert (t.base_shape, t.event_shape, t.dim) == ((6,), (2, 3), 6)
    assert (t.inv.base_shape, t.inv.event_shape) == ((2, 3), (6,))
    assert (t.domain.event_dim, t.codomain.event_dim) == (1, 2)
    assert (t.inv.domain.event_dim, t.inv.codomain.event_dim) == (2, 1)
    assert "dim=(2, 3), base_dim=6" in repr(t)


def test_a_composition_chains_shapes():
    t = perturb(Compose([Planar(6), fold(), Elementwise((2, 3)), fold().inv, Permutation(range(6)[::-1])]).double())
    assert t.base_shape == t.event_shape == (6,)
    z = points((4,), 6)
    torch.testing.assert_close(t.inv(t(z)), z)
    head = Compose(list(t.layers)[:3])
    assert (head.base_shape, head.event_shape, head.codomain.event_dim) == ((6,), (2, 3), 2)
    assert head.forward_and_ladj(z)[0].shape == (4, 2, 3)


def test_a_composition_names_the_layers_that_do_not_fit():
    with pytest.raises(ShapeError, match=r"layer 1 \(Foreign\) gives events of shape \(2, 3\).*layer 2 \(Planar\).*6"):
        Compose([Planar(6), fold(), Planar(6)])


def test_a_layer_keeps_the_number_of_elements():
    class Grow(FlowTransform):
        def __init__(self):
            super().__init__(3, base_dim=2)

    with pytest.raises(ShapeError, match=r"Grow cannot map events of size 2 to events of size 3"):
        Grow()


# Exactness


def test_a_composition_is_exact_if_all_layers_are():
    t = perturb(Compose([Planar(3), EstimatedScale(3)]).double())
    assert Compose([Planar(3)]).ladj_is_exact and not t.ladj_is_exact
    z = points((5,), 3)
    assert (t.forward_and_ladj(z)[1] != t.forward_and_ladj(z)[1]).all()
    exact = t.exact()
    torch.testing.assert_close(exact.forward_and_ladj(z)[1], exact.forward_and_ladj(z)[1], rtol=0, atol=0)
    assert {id(p) for p in exact.parameters()} == {id(p) for p in t.parameters()}


@pytest.mark.parametrize("view", ["inv", "conditioned", "cached"])
def test_views_of_an_estimate_have_exact_views(view):
    inner = perturb(EstimatedScale(2).double())
    views = {"inv": lambda t: t.inv, "conditioned": lambda t: t, "cached": lambda t: t.with_cache()}
    t = views[view](inner)
    assert not t.ladj_is_exact and t.exact().ladj_is_exact
    sign = -1 if view == "inv" else 1
    torch.testing.assert_close(t.exact().forward_and_ladj(points((), 2))[1], sign * inner.log_scale.sum())


def test_a_layer_without_an_exact_value_says_so():
    for t in (Halve(2), Halve(2).inv, Compose([Planar(2), Halve(2)])):
        with pytest.raises(InexactError, match="log-determinant of Halve is an estimate"):
            t.exact()


# State that comes from data


def test_adaptation_goes_from_data_to_base():
    inner, outer = Standardize(2), Standardize(2)
    shuffle = Permutation([1, 0])
    t = Compose([inner, Elementwise(2, init=torch.tensor([[1.0, 0.0], [2.0, 0.0]])), shuffle, outer])
    assert t.adapts and not t.is_adapted
    x = torch.tensor([[0.0, 10.0], [2.0, 50.0]])
    t.adapt(x)
    assert t.is_adapted
    torch.testing.assert_close(outer.loc, torch.tensor([1.0, 30.0]))
    torch.testing.assert_close(outer.scale, torch.tensor([1.0, 20.0]))
    # What arrives there has mean zero before the shift of (1, 2) is taken off.
    torch.testing.assert_close(inner.loc, torch.tensor([-1.0, -2.0]))
    z, _ = t.inverse_and_ladj(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(2), atol=1e-6, rtol=0)


def test_a_state_knows_what_was_adapted():
    fresh, t = Compose([Planar(2), Standardize(2)]), Compose([Planar(2), Standardize(2)])
    t.adapt(torch.randn(10, 2))
    fresh.load_state_dict(t.state_dict())
    for other in (fresh, copy.deepcopy(t), pickle.loads(pickle.dumps(t)), t.double()):
        assert other.is_adapted
    assert not Standardize(2).is_adapted and Standardize(2, scale=torch.ones(2)).is_adapted
    assert Planar(2).is_adapted and not Planar(2).adapts


def test_an_inverse_does_not_adapt():
    t = Standardize(2).inv
    assert not t.adapts
    t.adapt(torch.randn(10, 2))
    assert not t.inv.is_adapted


def test_adaptation_that_fails_changes_nothing():
    t = Standardize(2)
    with pytest.raises(DataError, match=r"columns \[0\]"):
        t.adapt(torch.tensor([[1.0, 2.0], [1.0, 3.0]]))
    assert not t.is_adapted and (t.loc == 0).all() and (t.scale == 1).all()


def test_rows_of_another_shape_raise():
    with pytest.raises(ShapeError, match="Standardize has event size 2"):
        Standardize(2).adapt(torch.randn(10, 3))
    with pytest.raises(OptionError, match="must have the event's shape"):
        Standardize((2, 3), loc=torch.zeros(6))


# The memory


def test_memory_keeps_one_result_while_nothing_changes():
    layer = torch.nn.Linear(2, 2)
    memory = Memory(layer)
    x = torch.randn(2)
    y = layer(x)
    assert memory.recall(x, None) is None
    memory.keep(x, y)
    assert memory.recall(x, None) == (x, y) and memory.recall(None, y) == (x, y)
    assert memory.recall(x.clone(), None) is None
    memory.forget()
    assert memory.recall(x, None) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda t, z: t.extra.shift.add_(1),
        lambda t, z: t.extra.shift.copy_(t.extra.shift),
        lambda t, z: setattr(t.extra, "shift", torch.zeros(2)),
        lambda t, z: t.adapt(torch.randn(5, 2)),
        lambda t, z: t.load_state_dict(t.state_dict()),
        lambda t, z: torch.nn.init.ones_(t.extra.parameters_of.value),
        lambda t, z: z.add_(1),
        lambda t, z: t.double(),
        lambda t, z: t.extra.shift.data.add_(1),
        lambda t, z: t.extra.parameters_of.value.data.add_(1),
        lambda t, z: z.data.add_(1),
    ],
    ids=[
        "buffer",
        "buffer-copy",
        "buffer-replaced",
        "adapted",
        "loaded",
        "parameter",
        "value",
        "dtype",
        "data-of-buffer",
        "data-of-parameter",
        "data-of-value",
    ],
)
def test_memory_does_not_outlive(change):
    t = Standardize(2)
    t.extra = Planar(2)
    t.extra.register_buffer("shift", torch.zeros(2))
    memory = Memory(t)
    z = torch.randn(2)
    memory.keep(z)
    change(t, z)
    assert memory.recall(z) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_memory_is_dropped_by_copies(copied):
    memory = Memory(Planar(2))
    x = torch.randn(2)
    memory.keep(x)
    other = copied(memory)
    assert other.recall(None) is None
    other.keep(x)
    assert other.recall(x) is not None


# What a layer gives


class Forgetful(FlowTransform):
    """A layer that forgets to sum its log-determinant, or to return events of the shape that it says."""

    def __init__(self, dim, what):
        super().__init__(dim)
        self.what = what

    def _forward_and_ladj(self, z, context):
        return (z, torch.zeros_like(z)) if self.what == "sum" else (z[..., :-1], z.new_zeros(z.shape[:-1]))

    _inverse_and_ladj = _forward_and_ladj


@pytest.mark.parametrize("what", ["sum", "events"])
@pytest.mark.parametrize("dim", [1, 3])
def test_a_flow_names_the_layer_that_gives_other_shapes(what, dim):
    flow = Flow([Forgetful(dim, what)], standardize=False)
    for use in (lambda: flow().log_prob(torch.zeros(dim, dim)), lambda: flow().rsample((dim,))):
        with pytest.raises(ShapeError, match=r"Forgetful gave a value of shape .* with log-determinants of shape"):
            use()

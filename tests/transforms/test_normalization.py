"""Layers of location and scale: what they learn from data, from draws, and from batches."""

import copy
import math

import pytest
import torch

from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.transforms import ActNorm, BatchNorm, Compose, Coupling, Elementwise, FlowTransform, Planar, Standardize
from pyroflows.transforms.wild import wild_elements_among
from tests.transforms.registry import jacobian, perturb

SHAPES = {"vector": (3,), "sequence": (2, 5), "image": (3, 4, 2)}
all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def rows_of(shape, count=200, dtype=torch.float64, seed=0):
    """Rows whose channels have other locations, from 0 on, and scales, from 1 on."""
    torch.manual_seed(seed)
    channels = torch.arange(shape[0], dtype=dtype).reshape(-1, *[1] * (len(shape) - 1))
    return 10 * channels + (1 + channels) * torch.randn(count, *shape, dtype=dtype)


def by_channel(x):
    return x.movedim(1, -1).flatten(0, -2)


def assert_standard(x, weights=None, tol=1e-6):
    """Mean 0 and standard deviation 1 in each channel."""
    columns = by_channel(x)
    weights = torch.ones(len(x), dtype=x.dtype) if weights is None else weights
    share = weights.repeat_interleave(len(columns) // len(x))[:, None]
    share = share / share.sum()
    mean = (share * columns).sum(0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=tol)
    var = (share * (columns - mean) ** 2).sum(0)
    torch.testing.assert_close(var, torch.ones_like(var), rtol=0, atol=tol)


# ActNorm


@all_shapes
@all_dtypes
def test_act_norm_makes_data_standard_at_its_base_end(shape, dtype):
    t = ActNorm(shape).to(dtype)
    x = rows_of(shape, dtype=dtype)
    assert t.adapts and not t.is_adapted
    t.adapt(x)
    assert t.is_adapted and t.is_adapted_to_draws
    assert_standard(t.inv(x).detach(), tol=1e-4 if dtype == torch.float32 else 1e-9)
    assert [p.requires_grad for p in t.parameters()] == [True]


@all_shapes
@all_dtypes
def test_act_norm_makes_draws_standard_at_its_data_end(shape, dtype):
    t = ActNorm(shape).to(dtype)
    z = rows_of(shape, dtype=dtype)
    assert t.adapts_to_draws and not t.is_adapted_to_draws
    t.adapt_to_draws(z)
    assert t.is_adapted_to_draws and t.is_adapted
    assert_standard(t(z).detach(), tol=1e-4 if dtype == torch.float32 else 1e-9)


@all_shapes
def test_weights_count_as_repetitions(shape):
    x, weights = rows_of(shape, count=30), torch.arange(30.0, dtype=torch.float64) % 4
    weighted, repeated = ActNorm(shape).double(), ActNorm(shape).double()
    weighted.adapt(x, weights=weights)
    repeated.adapt(x.repeat_interleave(weights.long(), 0))
    torch.testing.assert_close(weighted.parameters_of.value, repeated.parameters_of.value)
    assert_standard(weighted.inv(x).detach(), weights)
    weighted.adapt_to_draws(x, weights=weights)
    assert_standard(weighted(x).detach(), weights)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
@all_dtypes
def test_a_constant_channel_keeps_the_scale_one(value, dtype):
    x = rows_of((2, 3), dtype=dtype)
    x[:, 0] = value
    for learn in (ActNorm.adapt, ActNorm.adapt_to_draws):
        t = ActNorm((2, 3)).to(dtype)
        learn(t, x)
        assert t.parameters_of.value[1, 0] == 0 and t.parameters_of.value[1, 1] != 0
        y = t.inv(x) if learn is ActNorm.adapt else t(x)
        torch.testing.assert_close(y[:, 0], torch.zeros_like(y[:, 0]), rtol=0, atol=1e-6 * abs(value))


def test_one_row():
    vector, image = ActNorm(2), ActNorm((2, 3))
    vector.adapt(torch.tensor([[3.0, -4.0]]))
    assert vector.inv(torch.tensor([3.0, -4.0])).tolist() == [0.0, 0.0]
    assert vector.inv(torch.tensor([4.0, -4.0])).tolist() == [1.0, 0.0]
    x = rows_of((2, 3), count=1, dtype=torch.float32)
    image.adapt(x)
    assert_standard(image.inv(x).detach(), tol=1e-5)


def test_numbers_that_are_not_finite_name_their_channel():
    x = rows_of((3, 2))
    x[4, 1, 0] = math.nan
    t = ActNorm((3, 2)).double()
    with pytest.raises(DataError, match=r"channels \[1\] of what arrives at a layer ActNorm"):
        t.adapt(x)
    assert not t.is_adapted and not t.parameters_of.value.any()
    with pytest.raises(DataError, match="no rows"):
        t.adapt(x[:0])


def test_a_wild_element_does_not_set_the_scale():
    x = rows_of((2,), count=1000)
    clean, t = ActNorm(2).double(), ActNorm(2).double()
    clean.adapt(x)
    x[7, 0] = 1e12
    t.adapt(x)
    torch.testing.assert_close(t.parameters_of.value, clean.parameters_of.value, rtol=0.02, atol=0.02)


def test_a_context_shifts_and_scales_what_data_have_in_common():
    t = ActNorm((2, 3), context_dim=4).double()
    x, context = rows_of((2, 3)), torch.randn(200, 4).double()
    t.adapt(x, context)
    assert_standard(t.inverse_and_ladj(x, context)[0].detach())
    perturb(t.parameters_of.net)
    z, ladj = t.inverse_and_ladj(x[:2], context[:2])
    assert (ladj[0] - ladj[1]).abs() > 1e-3
    found = jacobian(lambda rows: t.condition(context[:2]).inv(rows), x[:2], 2)
    torch.testing.assert_close(ladj, found.slogdet().logabsdet)
    torch.testing.assert_close(t.forward_and_ladj(z, context[:2])[0], x[:2])


def test_the_score_is_that_of_the_inverse():
    t = perturb(ActNorm((3, 2), context_dim=2).double())
    z, score, context = torch.randn(5, 3, 2).double(), torch.randn(5, 3, 2).double(), torch.randn(5, 2).double()
    found = t.forward_and_score(z, score, context)
    torch.testing.assert_close(found, FlowTransform._forward_and_score(t, z, score, context))
    assert not found[2].requires_grad and found[1].requires_grad


# BatchNorm


@all_shapes
def test_running_statistics_are_those_of_data_at_first(shape):
    t, x = BatchNorm(shape).double(), rows_of(shape)
    t.adapt(x)
    assert_standard(t.inv(x).detach())
    torch.testing.assert_close(t.running_mean, by_channel(x).mean(0))
    torch.testing.assert_close(t.running_var, by_channel(x).var(0, correction=0))


@all_shapes
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics_move_toward_those_of_a_batch(shape, momentum):
    t, x = BatchNorm(shape, momentum=momentum).double(), rows_of(shape)
    y, weights = 3 * rows_of(shape, seed=1, count=40), torch.arange(40.0).double()
    t.adapt(x)
    before = copy.deepcopy(t)
    t.observe(y, weights=weights)
    seen = ActNorm(shape).double()
    seen.adapt(y, weights=weights)
    scale = seen.parameters_of.value[1].exp()
    mean, var = seen.parameters_of.value[0] * scale, scale**2
    torch.testing.assert_close(t.running_mean, (1 - momentum) * before.running_mean + momentum * mean.detach())
    torch.testing.assert_close(t.running_var, (1 - momentum) * before.running_var + momentum * var.detach())


def test_both_directions_agree_in_training_and_do_not_depend_on_the_batch():
    t = perturb(BatchNorm((3, 2)).double()).train()
    x = rows_of((3, 2))
    t.adapt(x[:100])
    z, ladj = t.inverse_and_ladj(x)
    torch.testing.assert_close(t(z), x)
    torch.testing.assert_close(t.inverse_and_ladj(x[3])[0], z[3])
    torch.testing.assert_close(t.forward_and_ladj(z)[1], -ladj)
    statistics = t.running_mean.clone()
    t(z), t.inv(x)
    assert torch.equal(t.running_mean, statistics)


def test_a_batch_that_says_nothing_leaves_statistics_as_they_are():
    t = BatchNorm((4, 3))
    x = rows_of((4, 3), count=20, dtype=torch.float32)
    t.adapt(x)
    before = copy.deepcopy(t)
    x[:, 0], x[2, 1, 0] = 7.0, math.nan
    for _ in range(2000):
        t.observe(x)
    assert torch.equal(t.running_var[:2], before.running_var[:2])
    assert t.running_mean[0] == pytest.approx(7.0) and t.running_mean[1] == before.running_mean[1]
    assert t.inv(rows_of((4, 3), dtype=torch.float32)).isfinite().all()
    kept = copy.deepcopy(t)
    t.observe(x[:0])
    t.observe(x[:5], weights=torch.zeros(5))
    assert torch.equal(t.running_mean, kept.running_mean) and torch.equal(t.running_var, kept.running_var)


@pytest.mark.parametrize("momentum", [0.0, 1.5, -0.1, math.nan])
def test_a_momentum_outside_its_range_raises(momentum):
    with pytest.raises(OptionError, match="momentum of BatchNorm"):
        BatchNorm(2, momentum=momentum)


# Standardize by channel


@pytest.mark.parametrize("shape", [(2, 5), (3, 4, 2)])
def test_standardize_by_channel(shape):
    t, x = Standardize(shape, by_channel=True).double(), rows_of(shape)
    x[:, 0, 0] = 0.0  # places that are constant
    t.adapt(x)
    assert_standard(t.inv(x).detach())
    assert t.loc.shape == t.scale.shape == (shape[0], *[1] * (len(shape) - 1))
    z = t.inv(x[:2]).detach()
    expected = jacobian(t, z, len(shape)).slogdet().logabsdet
    torch.testing.assert_close(t.forward_and_ladj(z)[1], expected)
    with pytest.raises(DataError, match="columns .* of x have no positive finite standard deviation"):
        Standardize(shape).double().adapt(x)
    x[:, 1] = 3.0
    with pytest.raises(DataError, match=r"channels \[1\] of x have no positive finite .* leave out constant channels"):
        t.adapt(x)


def test_far_channels():
    t, x = Standardize((3, 4), by_channel=True), rows_of((3, 4), dtype=torch.float32)
    x[:, 0, 0] *= 1e-3  # nearly constant, which a channel may well be in places
    t.adapt(x)
    assert t.far_columns(x).tolist() == [False, False, False]
    x[:, 1] *= 50
    assert t.far_columns(x).tolist() == [False, True, False]


def test_options_of_standardize_by_channel():
    shape, scale = (3, 2), torch.tensor([[1.0], [2.0], [3.0]])
    given = Standardize(shape, scale=scale, by_channel=True)
    torch.testing.assert_close(given(torch.ones(shape)), scale.expand(shape))
    with pytest.raises(OptionError, match=r"must have shape \(3, 1\), by channel"):
        Standardize(shape, scale=torch.ones(shape), by_channel=True)
    with pytest.raises(OptionError, match="angles by channel"):
        Standardize(shape, angles=[True, False], by_channel=True)
    assert torch.equal(Standardize(2, scale=torch.ones(2), by_channel=True).scale, torch.ones(2))


def test_wild_elements_of_channels():
    x = rows_of((2, 4), dtype=torch.float32) + 5.0
    x[:, 0, 0] = 0.01 * torch.rand(200)
    x[3, 0, 0] = 6.0  # an ordinary value of the channel, which is rare at this place
    used = torch.ones(200, dtype=torch.bool)
    assert wild_elements_among(x, used).nonzero().tolist() == [[3, 0, 0]]
    assert not wild_elements_among(x, used, by_channel=True).any()
    x[5, 1, 2], x[6, 1, 2] = 1e7, 1e7
    used[6] = False
    assert wild_elements_among(x, used, by_channel=True).nonzero().tolist() == [[5, 1, 2]]


# Compositions and views


def bent(shape, seed=3):
    torch.manual_seed(seed)
    return perturb(Coupling(shape, hidden_dims=(8,)), 0.3).double()


@all_shapes
def test_compositions_let_data_arrive_from_the_data_end(shape):
    inner, outer = ActNorm(shape).double(), ActNorm(shape).double()
    t = Compose([inner, Compose([bent(shape), outer])])
    x = rows_of(shape)
    t.adapt(x)
    assert t.is_adapted and inner.is_adapted and outer.is_adapted
    assert_standard(t.inv(x).detach())
    assert_standard(outer.inv(x).detach())


@all_shapes
def test_compositions_let_draws_arrive_from_the_base_end(shape):
    inner, outer = ActNorm(shape).double(), ActNorm(shape).double()
    t = Compose([Compose([inner, bent(shape)]), outer, Planar(shape[0]) if len(shape) == 1 else bent(shape)])
    z = rows_of(shape)
    t.adapt_to_draws(z)
    assert t.is_adapted_to_draws and t.is_adapted
    assert_standard(inner(z).detach())
    assert_standard(Compose(list(t.layers)[:2])(z).detach())


def test_layers_that_have_adapted_stay_while_others_have_not():
    x = rows_of((3,))
    first, second = ActNorm(3).double(), ActNorm(3).double()
    for adapt in (Compose.adapt, Compose.adapt_to_draws):
        t = Compose([copy.deepcopy(first), copy.deepcopy(second)])
        t.layers[1].adapt(5 * x)
        kept = t.layers[1].parameters_of.value.clone()
        adapt(t, x)
        assert torch.equal(t.layers[1].parameters_of.value, kept) and t.is_adapted
        adapt(t, x)  # all have adapted now, and start anew
        assert not torch.equal(t.layers[1].parameters_of.value, kept)


def test_standardize_does_not_adapt_to_draws():
    t = Compose([Standardize(3), ActNorm(3)]).double()
    t.adapt_to_draws(rows_of((3,)))
    assert t.layers[0].is_identity and not t.is_adapted and t.is_adapted_to_draws
    assert not Standardize(3).adapts_to_draws and not Compose([Standardize(3)]).adapts_to_draws


@all_shapes
def test_an_inverse_adapts_in_the_other_direction(shape):
    x = rows_of(shape)
    for layer in (ActNorm(shape).double(), Compose([ActNorm(shape).double(), bent(shape), ActNorm(shape).double()])):
        t = copy.deepcopy(layer).inv
        assert t.adapts and t.adapts_to_draws and not t.is_adapted
        t.adapt(x)
        assert t.is_adapted
        assert_standard(t.inverse_and_ladj(x)[0].detach())
        t = copy.deepcopy(layer).inv
        t.adapt_to_draws(x)
        assert t.is_adapted_to_draws
        assert_standard(t(x).detach())
    # A layer that learns from data alone would learn from what is not at its data end.
    assert not Standardize(2).inv.adapts and not BatchNorm(2).inv.adapts and not BatchNorm(2).inv.observes


def test_a_layer_at_one_context_adapts_and_observes():
    class Centered(ActNorm):
        def _adapt(self, x, context, weights):
            self.seen = context
            super()._adapt(x, context, weights)

        def _observe(self, x, context, weights):
            self.seen = context

    layer = Centered(2, context_dim=3).double()
    t = layer.condition(torch.arange(3.0).double())
    x = rows_of((2,), count=50)
    t.adapt(x)
    assert layer.is_adapted and t.is_adapted and layer.seen.shape == (50, 3) and (layer.seen[7] == t.context).all()
    assert_standard(t.inv(x).detach())
    assert t.observes
    t.observe(x[:4])
    assert layer.seen.shape == (4, 3)
    cached = ActNorm(2).double().with_cache()
    cached.adapt(x)
    assert_standard(cached.inv(x).detach())


def test_batches_arrive_from_the_data_end_only_as_deep_as_needed():
    class Counting(Elementwise):
        calls = 0

        def _inverse_and_ladj(self, x, context):
            self.calls += 1
            return super()._inverse_and_ladj(x, context)

    deep, middle, norm = Counting(2), Counting(2, init=torch.tensor([[1.0, 0.0], [2.0, 0.0]])), BatchNorm(2, momentum=1)
    t = Compose([deep, Compose([norm, middle])]).double()
    assert t.observes and not Compose([deep]).observes
    x = rows_of((2,))
    t.observe(x)
    torch.testing.assert_close(norm.running_mean, x.mean(0) - torch.tensor([1.0, 2.0]))
    assert (deep.calls, middle.calls) == (0, 1)
    Compose([deep]).observe(x)
    assert deep.calls == 0


def test_a_part_of_many_rows_is_enough_for_layers_behind_others():
    class Counting(ActNorm):
        def _adapt(self, x, context, weights):
            self.num_rows = len(x), None if context is None else len(context), None if weights is None else len(weights)
            self.all_count = weights is None or bool((weights > 0).all())
            super()._adapt(x, context, weights)

    shape = (2, 16, 16)
    t = Compose([Counting(shape, context_dim=1), Counting(shape)])
    x, context = rows_of(shape, count=2000, dtype=torch.float32), torch.randn(2000, 1)
    weights = (torch.arange(2000) % 2).float()
    t.adapt(x, context, weights)
    assert t.layers[1].num_rows == (2000, None, 2000) and t.layers[0].num_rows == (512, 512, 512)
    assert t.layers[0].all_count
    # 512 rows of 256 places give means up to 1 / sqrt(131072), and 1000 rows ones up to twice the ratio of both.
    assert_standard(t.inverse_and_ladj(x, context)[0].detach(), weights, tol=0.03)
    t.adapt(x[:100], context[:100])
    assert t.layers[0].num_rows == (100, 100, None)


def test_rows_and_draws_of_another_shape_raise():
    fold = Compose([ActNorm(6)])
    for learn in (fold.adapt, fold.adapt_to_draws, ActNorm(6).adapt_to_draws, BatchNorm(6).observe):
        with pytest.raises(ShapeError):
            learn(torch.randn(10, 5))

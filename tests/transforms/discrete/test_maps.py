"""Maps of one category: their values and gradients, against definitions written out in Python."""

import math
from itertools import permutations

import pytest
import torch

from pyroflows.errors import OptionError
from pyroflows.transforms import DiscreteAutoregressive, DiscreteCoupling
from pyroflows.transforms.discrete.maps import (
    MAPS,
    Modular,
    Ranking,
    Sorting,
    balanced,
    map_named,
    seen_by_network,
    straight_through,
)
from pyroflows.transforms.discrete.stacks import one_hot_value
from tests.transforms.discrete.registry import one_hots, randomized, some_sequences

ALL_MAPS = {**MAPS, "sorting": Sorting}
TEMPERATURES = (0.3, 1.0, 5.0)

all_maps = pytest.mark.parametrize("name", ALL_MAPS)
all_temperatures = pytest.mark.parametrize("temperature", TEMPERATURES)


def parameters(map_, *batch_shape):
    """Random parameters; half of the rows have ties."""
    theta = 2 * torch.randn(*batch_shape, map_.num_params, dtype=torch.float64)
    return torch.where(torch.rand(*batch_shape, 1) < 0.5, theta, theta.round())


def chosen(map_, theta):
    """Location and scale of one row of parameters, by Python's own ``max``."""
    values, size = theta.tolist(), map_.num_categories
    loc = max(range(size), key=lambda k: values[k] - k / 1000)
    units = [k for k in range(1, size) if math.gcd(k, size) == 1]
    scale = units[max(range(len(units)), key=lambda k: values[size + k] - k / 1000)] if map_.has_scale else 1
    return loc, scale


def ranked(theta):
    """The categories of one row of scores, by Python's own sort, where earlier ones have a little more."""
    return sorted(range(len(theta)), key=lambda k: k / 1000 - theta[k].item())


@pytest.mark.parametrize("size", range(2, 13))
@all_maps
def test_values_are_those_of_the_definition(name, size):
    map_ = ALL_MAPS[name](size)
    theta = parameters(map_, 50)
    z = torch.arange(size)[:, None].expand(size, 50)
    x = map_(z, theta.expand(size, 50, -1))
    assert torch.equal(map_.inverse(x, theta.expand(size, 50, -1)), z)
    for row, found in zip(theta, x.T.tolist(), strict=True):
        if isinstance(map_, Modular):
            loc, scale = chosen(map_, row)
            expected = [(loc + scale * k) % size for k in range(size)]
        else:
            expected = ranked(row)
            if not isinstance(map_, Sorting):
                expected = [expected.index(k) for k in range(size)]
        assert found == expected


def test_every_permutation_has_scores():
    orders = torch.tensor(list(permutations(range(4))))
    scores = -orders.double()
    z = torch.arange(4).expand(24, 4)
    assert torch.equal(Ranking(4)(z, scores[:, None].expand(24, 4, 4)), orders)


def test_all_units_and_all_locations_are_reached():
    map_ = Modular(12)
    theta = torch.cat([torch.eye(12).repeat_interleave(4, 0), torch.eye(4).repeat(12, 1)], 1)
    z = torch.arange(12).expand(48, 12)
    x = map_(z, theta[:, None].expand(48, 12, 16))
    assert len(x.unique(dim=0)) == 48
    assert {(row[1] - row[0]).item() % 12 for row in x} == {1, 5, 7, 11}


@all_maps
@all_temperatures
@pytest.mark.parametrize("size", [2, 5, 6])
def test_gradient_of_the_value_is_the_permutation(name, temperature, size):
    map_ = ALL_MAPS[name](size)
    theta = parameters(map_, 30)
    for one_hot, exact in ((map_.one_hot_forward, map_), (map_.one_hot_inverse, map_.inverse)):
        for value in torch.arange(size):
            given = one_hots(value.expand(30), size).requires_grad_()
            result = one_hot(given, theta, temperature)
            assert torch.equal(result, one_hots(exact(value.expand(30), theta), size))
            weights = torch.randn_like(result)
            (gradient,) = torch.autograd.grad((result * weights).sum(), given)
            images = torch.stack([exact(torch.full((30,), k), theta) for k in range(size)], -1)
            torch.testing.assert_close(gradient, weights.gather(-1, images))


@pytest.mark.parametrize("has_scale", [False, True])
@all_temperatures
@pytest.mark.parametrize("size", [2, 5, 6])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_modular_gradient_is_that_of_expectations(has_scale, temperature, size, direction):
    """Of a linear function of the value, over all locations at the chosen scale, and all scales at that location."""
    map_ = Modular(size, has_scale)
    units = [k for k in range(1, size) if math.gcd(k, size) == 1]
    for theta in parameters(map_, 20).requires_grad_():
        loc, scale = chosen(map_, theta)
        weights = torch.randn(size, dtype=torch.float64)
        value = int(torch.randint(size, ()))

        def weight_of(loc, scale, value=value, weights=weights):
            if direction == "forward":
                return weights[(loc + scale * value) % size]
            return weights[pow(scale, -1, size) * (value - loc) % size]

        locs = (theta[:size] / temperature).softmax(-1)
        expectation = sum(locs[k] * weight_of(k, scale) for k in range(size))
        if has_scale:
            scales = (theta[size:] / temperature).softmax(-1)
            expectation = expectation + sum(p * weight_of(loc, unit) for p, unit in zip(scales, units, strict=True))
        one_hot = map_.one_hot_forward if direction == "forward" else map_.one_hot_inverse
        result = one_hot(one_hots(torch.tensor(value), size), theta, torch.tensor(temperature))
        (gradient,) = torch.autograd.grad((result * weights).sum(), theta)
        (expected,) = torch.autograd.grad(expectation, theta)
        torch.testing.assert_close(gradient, expected)
        assert gradient.any()


@pytest.mark.parametrize("cls", [Ranking, Sorting])
@all_temperatures
@pytest.mark.parametrize("size", [2, 5, 6])
def test_scores_of_a_ranked_category_learn_to_predict_it(cls, temperature, size):
    """The mean over the entries of the gradient is the derivative with respect to the log-probability."""
    map_ = cls(size)
    one_hot = map_.one_hot_forward if cls is Ranking else map_.one_hot_inverse
    for theta in 2 * torch.randn(20, size, dtype=torch.float64):
        weights, value = torch.randn(size, dtype=torch.float64), torch.randint(size, ())
        theta.requires_grad_()
        result = one_hot(one_hots(value, size), theta, torch.tensor(temperature))
        (gradient,) = torch.autograd.grad((result * weights).sum(), theta)
        (expected,) = torch.autograd.grad(weights.mean() * theta.log_softmax(-1)[value], theta)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("cls", [Ranking, Sorting])
@all_temperatures
@pytest.mark.parametrize("size", [2, 5, 6])
def test_gradient_of_scores_of_a_rank_is_the_sum_over_swaps(cls, temperature, size):
    """Each swap is tried: the gain is that of the value with two scores exchanged."""
    map_ = cls(size)
    exact, one_hot = (map_.forward, map_.one_hot_forward) if cls is Sorting else (map_.inverse, map_.one_hot_inverse)
    for theta in 2 * torch.randn(20, size, dtype=torch.float64):
        weights, value = torch.randn(size, dtype=torch.float64), torch.randint(size, ())
        category = exact(value, theta)
        expected = torch.zeros(size, dtype=torch.float64)
        for k in range(size):
            if k == category:
                continue
            swapped = theta.clone()
            swapped[k], swapped[category] = theta[category], theta[k]
            gain = weights[exact(value, swapped)] - weights[category]
            slope = torch.sigmoid((theta[k] - theta[category]) / temperature) / temperature
            expected[k] = gain * slope * (-1 if theta[k] > theta[category] else 1)
        expected[category] = -expected.sum()
        theta.requires_grad_()
        result = one_hot(one_hots(value, size), theta, torch.tensor(temperature))
        (gradient,) = torch.autograd.grad((result * weights).sum(), theta)
        torch.testing.assert_close(gradient, expected)
        assert gradient.any()


def test_balanced_log_probabilities_have_mean_one_and_keep_their_differences():
    table = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(balanced(table).mean(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(balanced(table).diff(), table.diff())


def test_networks_see_one_hot_vectors_and_leave_the_mean_of_their_gradient_alone():
    z = one_hots(torch.tensor([1, 0]), 3).requires_grad_()
    seen = seen_by_network(z)
    assert torch.equal(seen, z)
    (gradient,) = torch.autograd.grad((seen * torch.randn_like(z)).sum(), z)
    assert gradient.any()
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(2, dtype=gradient.dtype))


@all_maps
def test_values_and_gradients_of_large_parameters_are_finite(name):
    map_ = ALL_MAPS[name](5)
    theta = (1e30 * torch.randn(20, map_.num_params)).requires_grad_()
    z = torch.eye(5).repeat(4, 1)
    for one_hot in (map_.one_hot_forward, map_.one_hot_inverse):
        result = one_hot(z, theta, torch.tensor(0.1))
        assert torch.equal(result.sort(-1).values, z.sort(-1).values)
        (gradient,) = torch.autograd.grad((result * torch.randn(5)).sum(), theta)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("univariate", "differentiates"), [("affine", True), ("permutation", False)])
def test_ranks_pass_no_gradient_to_the_parameters_of_later_places(univariate, differentiates):
    t = randomized(DiscreteAutoregressive(3, 5, univariate, hidden_dims=(16,)).double())
    z = one_hots(some_sequences(20, length=3, size=5), 5).requires_grad_()
    last = one_hot_value(t, z, None, "forward")[:, 2]
    (gradient,) = torch.autograd.grad((last * torch.randn_like(last)).sum(), z)
    assert gradient[:, 2].any()
    assert bool(gradient[:, :2].any()) == differentiates


def test_straight_through_is_zero_with_a_gradient():
    x = torch.randn(5, requires_grad=True)
    zeros = straight_through(3 * x)
    assert not zeros.any()
    assert (torch.autograd.grad(zeros.sum(), x)[0] == 3).all()


@pytest.mark.parametrize("name", ["shift", 3, Modular])
def test_unknown_map_raises(name):
    with pytest.raises(OptionError, match=r"univariate map .* must be one of \['additive', 'affine', 'permutation'\]"):
        map_named(name, 5)


@pytest.mark.parametrize("univariate", ["affine", "permutation"])
@pytest.mark.parametrize("num_rows", [5, 7, 9, 10, 144])
def test_scores_that_are_equal_up_to_rounding_keep_their_order(univariate, num_rows):
    """Categories that never occur have equal rows of weights, and products of matrices round rows differently."""
    torch.manual_seed(0)
    t = DiscreteCoupling(2, 12, univariate, mask=[True, False], hidden_dims=(64, 64))
    for parameter in t.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    output = [m for m in t.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        output.weight[:] = output.weight[:1]
        output.bias[:] = output.bias[0]
    support = torch.cartesian_prod(torch.arange(12), torch.arange(12))
    x = torch.cat([t(part) for part in support.split(num_rows)])
    assert len(x.unique(dim=0)) == 144
    assert torch.equal(torch.cat([t.inv(part) for part in x.split(7)]), support)

"""Bits per dimension of integers, beside those of laws whose probabilities are known."""

import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Normal, constraints

import pyroflows as pf
from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.transforms import Elementwise, Standardize
from tests.transforms.registry import perturb

LOC, SCALE = torch.tensor([6.0, 9.5], dtype=torch.float64), torch.tensor([2.0, 0.7], dtype=torch.float64)
# Independent normal columns, the second of which is narrower than a level.
NORMAL = pf.Flow([Standardize(2, LOC, SCALE)]).double()
LAW = Normal(LOC, SCALE)
LEVELS = 20
X = torch.randint(4, 13, (300, 2), generator=torch.Generator().manual_seed(0))


def exact_bits(x):
    """By the distribution function: P(x) = F(x + 1) - F(x) in each column."""
    return -(LAW.cdf(x + 1.0) - LAW.cdf(x.double())).log2().mean().item()


def bound_in_bits(x):
    """By the midpoint rule: the mean of -log2 p(x + u) over uniform u, which training with uniform noise maximises."""
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    return -(LAW.log_prob(x + u[:, None, None]) / math.log(2)).mean().item()


def narrow(num_rows=300):
    """Rows that the law gives likely values, as those it was fitted to have."""
    torch.manual_seed(3)
    return LAW.sample((num_rows,)).floor().clamp(0, LEVELS - 1)


def test_many_draws_give_the_exact_bits():
    x = narrow()
    assert pf.bits_per_dim(NORMAL, x, LEVELS, num_samples=20_000, seed=0).item() == pytest.approx(
        exact_bits(x), abs=2e-3
    )


def test_one_draw_gives_the_bound_that_training_maximises():
    x = narrow()
    draws = torch.stack([pf.bits_per_dim(NORMAL, x, LEVELS, num_samples=1, seed=s) for s in range(100)])
    assert abs(draws.mean() - bound_in_bits(x)) < 4 * draws.std() / 10


def test_more_draws_tighten_the_bound():
    x = narrow()
    numbers = (1, 4, 16, 64)
    bits = torch.stack(
        [
            torch.stack([pf.bits_per_dim(NORMAL, x, LEVELS, num_samples=k, seed=100 * k + s) for s in range(30)])
            for k in numbers
        ]
    )
    means, errors = bits.mean(1), bits.std(1) / math.sqrt(30)
    assert (means[1:] + 4 * errors[1:] < means[:-1]).all()
    assert means[-1] > exact_bits(x) - 4 * errors[-1]


def test_draws_of_the_noise_that_fits_have_no_error():
    """Where q(u | x) is p(x + u) / P(x), each weight is P(x). A density that is constant on cells has uniform noise."""
    flow = pf.Flow([Elementwise(1)], base=dist.Uniform(torch.zeros(1), 8.0).to_event(1), standardize=False)
    x = torch.arange(8)[:, None]
    for k in (1, 5):
        assert pf.bits_per_dim(flow, x, 8, num_samples=k).item() == pytest.approx(3.0, abs=1e-6)


def noise_of_two():
    torch.manual_seed(1)
    noise = pf.flows.Dequantizer(2, num_layers=2, hidden_dims=(8,)).double()
    noise.adapt(torch.rand(100, 2), X[:100].double())
    return perturb(noise, 0.3)


def test_learned_noise_estimates_the_same_bits():
    noise, x = noise_of_two(), narrow(60)
    bits = pf.bits_per_dim(NORMAL, x, LEVELS, noise=noise, num_samples=20_000, seed=0)
    assert bits.item() == pytest.approx(exact_bits(x), abs=5e-3)


def test_rows_and_draws_in_parts_are_those_at_once(monkeypatch):
    """With one draw a row the parts draw the same noise, so that the result is the same."""
    x = narrow(50)
    at_once = pf.bits_per_dim(NORMAL, x, LEVELS, num_samples=1, seed=0)
    monkeypatch.setattr("pyroflows.fitting.maximum_likelihood.MAX_SCORED", 7)
    assert pf.bits_per_dim(NORMAL, x, LEVELS, num_samples=1, seed=0).item() == pytest.approx(at_once.item(), rel=1e-6)
    many = pf.bits_per_dim(NORMAL, x, LEVELS, num_samples=400, seed=0)
    assert many.item() == pytest.approx(exact_bits(x), abs=2e-2)


def test_it_is_a_number_without_gradients_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    bits = pf.bits_per_dim(NORMAL, X, LEVELS, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert bits.shape == () and bits.dtype == torch.float64 and not bits.requires_grad
    assert torch.equal(pf.bits_per_dim(NORMAL, X, LEVELS, seed=5), bits)


@pytest.mark.parametrize(
    "as_given",
    [lambda x: x.to(torch.uint8), lambda x: x.numpy(), lambda x: x.float(), lambda x: pd.DataFrame(x.numpy())],
    ids=["bytes", "numpy", "floats", "pandas"],
)
def test_integers_may_come_in_any_form(as_given):
    bits = pf.bits_per_dim(NORMAL, X, LEVELS, seed=0)
    assert torch.equal(pf.bits_per_dim(NORMAL, as_given(X), LEVELS, seed=0), bits)


def test_rows_have_contexts_of_their_own():
    torch.manual_seed(0)
    flow = perturb(pf.flows.RealNVP(2, num_layers=2, hidden_dims=(8,), context_dim=3), 0.3)
    x, context = torch.randint(0, 3, (40, 2)), torch.randn(40, 3)
    each = [pf.bits_per_dim(flow, x[i : i + 1], 3, context[i : i + 1], num_samples=2000) for i in range(40)]
    together = pf.bits_per_dim(flow, x, 3, context, num_samples=2000)
    assert together.item() == pytest.approx(torch.stack(each).mean().item(), abs=0.02)
    with pytest.raises(ShapeError, match="needs a context"):
        pf.bits_per_dim(flow, x, 3)
    with pytest.raises(ShapeError, match="x has 40 rows, but context has 39"):
        pf.bits_per_dim(flow, x, 3, context[1:])


def test_one_row_is_enough_and_none_is_an_error():
    assert pf.bits_per_dim(NORMAL, X[:1], LEVELS).isfinite()
    with pytest.raises(ShapeError, match="x has no rows"):
        pf.bits_per_dim(NORMAL, X[:0], LEVELS)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[0, 20]], r"outside of the 20 levels from 0 to 19 .*the first is 20 in row 0, column 1"),
        ([[3, 4], [-1, 4]], r"outside of the 20 levels .* in 1 of 2 rows, the first is -1 in row 1, column 0"),
        ([[0.5, 1.0]], "values that are no integers"),
        ([[np.nan, 1.0]], "NaN or infinite"),
    ],
)
def test_values_that_are_no_levels_are_refused(x, message):
    with pytest.raises(DataError, match=message):
        pf.bits_per_dim(NORMAL, x, LEVELS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"levels": 1}, OptionError, "levels must be at least 2"),
        ({"levels": 2.5}, OptionError, "levels must be an integer"),
        ({"levels": 20, "num_samples": 0}, OptionError, "num_samples must be at least 1"),
        ({"levels": 20, "noise": "uniform"}, OptionError, "noise must be a pyroflows.Flow such as pf.flows.Dequant"),
        ({"levels": 20, "noise": pf.flows.Dequantizer(3).double()}, ShapeError, r"use pf.flows.Dequantizer\(2\)"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        pf.bits_per_dim(NORMAL, X, **options)


def test_what_is_no_density_of_integers_with_noise_is_refused():
    with pytest.raises(OptionError, match=r"takes a pyroflows.Flow, got FlowDistribution"):
        pf.bits_per_dim(NORMAL(), X, LEVELS)


def test_a_flow_on_a_bounded_support_scores_all_levels():
    flow = pf.flows.NSF(2, num_layers=2, hidden_dims=(8,), support=constraints.interval(0.0, 4.0))
    x = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    probabilities = [2 ** (-2 * pf.bits_per_dim(flow, row[None], 4, num_samples=4000, seed=0).item()) for row in x]
    assert sum(probabilities) == pytest.approx(1.0, abs=0.02)


def test_a_flow_without_parameters_scores_as_others_do():
    base = dist.Uniform(torch.zeros(3), 8 * torch.ones(3)).to_event(1)
    flow = pf.Flow([pf.transforms.Permutation([1, 0, 2])], base=base, standardize=False)
    assert pf.bits_per_dim(flow, torch.randint(8, (50, 3)), 8).item() == pytest.approx(3.0, abs=1e-5)


def test_a_flow_on_another_scale_is_noticed():
    flow = pf.Flow([Standardize(2, LOC / LEVELS, SCALE / LEVELS)]).double()
    with pytest.warns(UserWarning, match=r"many more than the 4.32 that tell 20 levels apart without any flow"):
        pf.bits_per_dim(flow, narrow(), LEVELS, seed=0)


def test_a_law_of_counts_needs_no_noise():
    swap = pf.transforms.Permutation([1, 0, 2])
    swap.codomain = constraints.independent(constraints.nonnegative_integer, 1)
    flow = pf.Flow([swap], base=dist.Poisson(2 * torch.ones(3)).to_event(1), standardize=False)
    x = torch.randint(8, (50, 3))
    expected = -flow().log_prob(x).mean() / (3 * math.log(2))
    torch.testing.assert_close(pf.bits_per_dim(flow, x, 8), expected)

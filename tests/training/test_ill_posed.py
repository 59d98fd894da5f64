"""Rows on which a density does not exist, or that a flow learns badly, are seen before a fit."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine, make_moons, make_swiss_roll
from torch.distributions import constraints

import pyroflows as pf
from pyroflows import DataError, Flow, flows
from pyroflows.training.data import load
from pyroflows.training.ill_posed import check_density
from pyroflows.training.shuffling import split
from pyroflows.transforms import Elementwise, Planar

N = 1000
FLOWS = {dim: flows.NSF(dim, num_layers=1, hidden_dims=(8,)) for dim in (1, 2, 3, 4, 5)}


def check(x, context=None, weights=None, flow=None):
    """Do what a fit does before its first step."""
    if flow is None:
        size = np.prod(np.shape(x)[1:], dtype=int)
        flow = FLOWS[int(size)] if context is None else flows.MAF(size, 1, (8,), context_dim=np.shape(context)[1])
    torch.manual_seed(0)
    data = load(flow, x, context, weights)
    check_density(flow, data.rows, split(data.rows, 0.1)[0])


def normal(*shape, seed=0):
    return torch.randn(*(shape or (N, 1)), generator=torch.Generator().manual_seed(seed))


def one_hot(num=3):
    return torch.eye(num)[torch.randint(num, (N,), generator=torch.Generator().manual_seed(1))]


def shares():
    return (0.3 * normal(N, 3)).softmax(-1)


# Columns that depend linearly on others


U = normal()
DEPENDENT = {
    "equal": (torch.cat([U, U], 1), r"column 1 of x is a linear function of columns \[0\] of x, in all 900"),
    "other units": (torch.cat([2.54 * U - 3, U], 1), r"column 1 .* columns \[0\] of x"),
    "one-hot": (one_hot(), r"column 2 .* columns \[0, 1\] of x"),
    "two one-hots": (torch.cat([one_hot(2), normal(seed=5), one_hot(2)[torch.arange(N).flip(0)]], 1), "column 1 .*0"),
    "shares": (shares(), r"column 2 .* columns \[0, 1\] of x"),
    "percent": (100 * shares(), r"column 2 .* columns \[0, 1\] of x"),
    "a sum": (torch.cat([normal(N, 2), normal(N, 2).sum(1, keepdim=True)], 1), r"column 2 .* columns \[0, 1\]"),
    "far from zero": (torch.cat([1e4 + U, 2e4 + 2 * U - 3], 1), r"column 1 .* columns \[0\]"),
    "large": (torch.cat([1e30 * U, 3e30 * U], 1), r"column 1 .* columns \[0\]"),
    "nearly equal": (
        torch.cat([U, U + math.sqrt(2e-10) * normal(seed=7)], 1),  # the correlation is 1 - 1e-10
        r"column 1 .* columns \[0\] of x, up to 1e-05 of its standard deviation,",
    ),
    "with a wild row": (torch.cat([torch.cat([U, U], 1), torch.tensor([[1e20, 0.0]])])[:N], "column 1"),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_columns_that_depend_linearly(name):
    x, message = DEPENDENT[name]
    with pytest.raises(DataError, match=message + ".*the density is unbounded: leave it out"):
        check(x)


ORDINARY, V = normal(N, 4, seed=11).double(), U.double()
ROUNDED = {
    "one-hot of 40": torch.cat([torch.eye(40)[torch.arange(N) % 40], normal(N, 1)], 1),
    "shares of which the last is small": torch.cat([ORDINARY[:, :3], ORDINARY[:, 3:] - 9], 1).softmax(-1),
    "difference": torch.cat([V, V + 1e-3 * ORDINARY[:, :1], (V + 1e-3 * ORDINARY[:, :1]) - V], 1),
    "other units far from zero": torch.cat([300 + V, 1.8 * (300 + V) - 459.67], 1),
    "a sum of quite different columns": torch.cat([ORDINARY.exp() ** 4, (ORDINARY.exp() ** 4).sum(1, keepdim=True)], 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_does_not_hide_a_linear_dependence(name, dtype):
    x = ROUNDED[name].to(dtype)
    flow = flows.MAF(x.shape[1], 1, (8,)).to(dtype)
    with pytest.raises(DataError, match="the density is unbounded: leave it out"):
        check(x, flow=flow)


@pytest.mark.parametrize(
    ("dtype", "noise", "loc"), [(torch.float32, 1e-4, 0.0), (torch.float32, 1e-4, 100.0), (torch.float64, 1e-9, 1e3)]
)
def test_small_noise_beside_a_column_is_a_density_and_warns(dtype, noise, loc):
    x = (loc + torch.cat([U.double(), U + noise * normal(seed=7).double()], 1)).to(dtype)
    with pytest.warns(UserWarning, match="column 1 of x is a linear function .*, nearly,"):
        check(x, flow=flows.MAF(2, 1, (8,)).to(dtype))


def test_fit_density_refuses_columns_that_depend_linearly():
    with pytest.raises(DataError, match="the density is unbounded"):
        pf.fit_density(FLOWS[2], DEPENDENT["equal"][0], max_epochs=1, progress_bar=False)


def test_images_with_equal_pixels():
    x = normal(N, 1, 2, 2)
    x[:, 0, 1, 1] = x[:, 0, 0, 0]
    with pytest.raises(DataError, match=r"column 3 of x is a linear function of columns \[0\]"):
        check(x, flow=Flow([Elementwise((1, 2, 2))]))


def test_columns_that_depend_on_the_context_warn():
    context = normal(N, 2)
    x = torch.cat([normal(seed=3), 3 * context[:, 1:] + 1], 1)
    message = r"column 1 of x is a linear function of columns \[1\] of the context, so that its density at a context is"
    with pytest.warns(UserWarning, match=message):
        check(x, context)
    x = torch.cat([normal(seed=3), 3 * context[:, 1:] + normal(seed=3)], 1)
    with pytest.warns(UserWarning, match=r"columns \[0\] of x and columns \[1\] of the context, so that"):
        check(x, context)


def test_only_rows_with_a_weight_count():
    weights = (torch.arange(N) < 100).float()
    x = torch.cat([U, torch.where(weights[:, None] > 0, U, normal(seed=4))], 1)
    check(x)
    with pytest.raises(DataError, match=r"columns \[0\] of x, in all 90 training rows"):
        check(x, weights=weights)


def test_a_few_rows_can_break_a_dependence():
    """They may not be among those that are looked at first."""
    x = torch.cat([normal(20000, 1), torch.zeros(20000, 1)], 1)
    x[:, 1] = x[:, 0]
    x[torch.arange(50, 20000, 2000), 1] += 5
    check(x)


def cauchy():
    return torch.distributions.Cauchy(0.0, 1.0).icdf(torch.rand(N, 1, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize(
    ("x", "context"),
    [
        (torch.cat([U, U + 0.01 * normal(seed=1)], 1), None),
        (normal(N, 2), torch.cat([U, U, 0 * U + 5], 1)),
        (normal(N, 2), one_hot()),
        (torch.cat([1e4 + normal(seed=4), U, U + 6e-3 * normal(seed=1)], 1), None),
        (torch.cat([cauchy(), cauchy() + normal(seed=1)], 1), None),
        (normal(7, 5), None),  # of too few rows nothing can be said
    ],
    ids=["close", "context that depends on itself", "one-hot context", "beside a far one", "heavy tails", "few rows"],
)
def test_columns_that_have_a_density(x, context):
    check(x, context)


def test_one_row_far_out_in_two_columns_does_not_make_them_dependent():
    x = normal(N, 2)
    x[7] = 1e20
    with pytest.warns(UserWarning, match="row 7 of x"):
        check(x)


def test_nearly_dependent_columns_warn():
    x = torch.cat([U, U + 1e-3 * normal(seed=1)], 1)
    with pytest.warns(
        UserWarning, match=r"column 1 of x is a linear function of columns \[0\] of x, up to 0.001 .* nearly,"
    ):
        check(x)
    x = torch.cat([U.double(), U + 1e-5 * normal(seed=1)], 1)
    with pytest.warns(UserWarning, match="column 1 of x is .*, nearly,"):
        check(x, flow=flows.MAF(2, 1, (8,)).double())


def test_wide_events_are_cheap_to_check():
    check(normal(20, 2, 32, 32), flow=Flow([Elementwise((2, 32, 32))]))


# Values that repeat


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ((U > 0).float(), r"columns \[1\] of x take few values, column 1 takes 2.*make columns \[1\] floating"),
        (U.round(), r"columns \[1\] of x take few values, column 1 takes \d,.*: dequantise them.* such as 1 times"),
        (torch.poisson(torch.full((N, 1), 5.0), generator=torch.Generator().manual_seed(0)), "takes 1"),
        (torch.poisson(torch.full((N, 1), 30.0), generator=torch.Generator().manual_seed(0)), "takes [34]."),
        (U.clamp(min=0), r"columns \[1\] of x repeat one value, column 1 is 0 in (49|50|51)% of the rows"),
        (torch.where(torch.arange(N)[:, None] % 10 > 0, U, -1.5), "column 1 is -1.5 in 10% of the rows"),
    ],
    ids=["binary", "rounded", "counts", "larger counts", "censored", "code"],
)
def test_repeated_values_warn(column, message):
    with pytest.warns(UserWarning, match=message):
        check(torch.cat([normal(seed=9), column], 1))


def test_images_of_few_levels_warn():
    x = (256 * torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))).floor()
    flow = Flow([Elementwise((1, 8, 8))])
    with pytest.warns(UserWarning, match="x takes 25. values in all.*dequantise"):
        check(x, flow=flow)
    check(x + torch.rand(x.shape, generator=torch.Generator().manual_seed(1)), flow=flow)


def test_repeated_rows_warn():
    generator = torch.Generator().manual_seed(0)
    x = normal(N, 2)
    bootstrap = x[torch.randint(N, (N,), generator=generator)]
    with pytest.warns(UserWarning, match=r"3\d\d of 1000 rows repeat others, .*: leave the repetitions out, and give"):
        check(bootstrap)
    check(bootstrap, normal(N, 1, seed=1))  # with contexts of their own they are other rows
    weights = torch.ones(N)
    weights[100:] = 0.0
    x[200:] = x[200]
    check(x, weights=weights)


# Rows far out


@pytest.mark.parametrize("value", [-9999.0, 1e5, 1e20, -3e38])
def test_one_row_far_out_warns(value):
    x = normal(N, 2)
    x[7, 1] = value
    with pytest.warns(UserWarning, match=rf"row 7 of x has {re.escape(f'{value:.6g}')} in column 1, .*leave them out"):
        check(x)


def test_several_rows_far_out_are_counted_and_not_validated():
    x = normal(N, 2)
    x[5:N:50, 0] = -9999.0
    with pytest.warns(UserWarning, match="row 5 of x has -9999 in column 0.*and 19 more rows are as far out"):
        check(x)
    training, held_out = split(load(FLOWS[2], x).rows, 0.5)
    assert {*range(5, N, 50)} <= {*training.tolist()}
    assert len(held_out) == N / 2


def test_a_context_far_out_warns():
    context = normal(N, 2)
    context[7, 1] = 1e9
    with pytest.warns(UserWarning, match="row 7 of context has 1e.09 in column 1"):
        check(normal(N, 2, seed=1), context)


def test_rows_without_weight_do_not_warn():
    x, weights = normal(N, 2), torch.ones(N)
    x[7, 1], weights[7] = 1e9, 0.0
    check(x, weights=weights)


def test_values_of_a_bounded_support_are_judged_before_the_map_onto_it():
    """On their own scale these are log-normal rows of a standard deviation of 12, half of which are tiny."""
    x = (12 * normal(N, 2)).exp()
    flow = flows.MAF(2, 1, (8,), support=constraints.positive)
    check(x, flow=flow)
    x = x**0.001
    x[7, 1] = 1e-38
    with pytest.warns(UserWarning, match="row 7 of x has 1e-38 in column 1"):
        check(x, flow=flow)


def test_a_heavy_tailed_base_expects_rows_far_out():
    x = normal(N, 2)
    x[7, 1] = 1e9
    check(x, flow=flows.MAF(2, 1, (8,), base="student_t"))


def mixture(n, seed):
    torch.manual_seed(seed)
    return (4.0 * torch.randint(2, (n, 1)) - 2 + 0.4 * torch.randn(n, 1)).float()


def held_out_log_prob(x):
    flow = flows.NSF(1, num_layers=2, hidden_dims=(16,))
    pf.fit_density(flow, x, max_epochs=15, seed=0, compile="none", progress_bar=False)
    return flow().log_prob(mixture(2000, 1)).mean().item()


def test_one_row_far_out_costs_little():
    """With the standard deviation as scale, these rows cost 1.2, 1.7 and 35 nats."""
    x = mixture(2000, 0)
    expected = held_out_log_prob(x)
    for value in (-9999.0, 1e5, 1e20):
        x[7] = value
        with pytest.warns(UserWarning, match="row 7 of x"):
            assert held_out_log_prob(x) > expected - 0.2


# Digits


@pytest.mark.parametrize(
    ("loc", "scale"), [(59000.0, 1e-3), (1e7, 1.0), (-1.7e9, 60.0), (1e300, 1e290)], ids=["days", "1e7", "s", "range"]
)
def test_digits_that_the_flow_would_lose(loc, scale):
    x = loc + scale * normal(N, 2).double()
    with pytest.raises(DataError, match=r"columns \[0, 1\] of x lose the digits.*flow.double\(\)|beyond the range"):
        check(x)
    check(x, flow=flows.MAF(2, 1, (8,)).double()) if loc < 1e300 else None
    with pytest.raises(DataError, match=r"columns \[0, 1\] of context lose the digits|beyond the range"):
        check(normal(N, 2), x)


def test_digits_that_survive():
    check(1.7e9 + 86400 * torch.rand(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    check(1e7 + (1000 * normal(N, 2)).round().long().double())


def test_a_float64_flow_learns_data_far_from_zero():
    x, held_out = (59000 + 1e-3 * normal(2000, 1, seed=seed).double() for seed in (0, 1))
    flow = flows.NSF(1, num_layers=1, hidden_dims=(8,)).double()
    pf.fit_density(flow, x, max_epochs=10, seed=0, progress_bar=False)
    expected = torch.distributions.Normal(59000.0, 1e-3).log_prob(held_out).mean()
    torch.testing.assert_close(flow().log_prob(held_out).mean(), expected, rtol=0, atol=0.05)


# Flows that do not suit the data


@pytest.mark.parametrize("family", [flows.MAF, flows.IAF, flows.RealNVP, flows.NICE])
def test_affine_flows_of_one_variable_warn(family):
    with pytest.warns(UserWarning, match="affine maps of one variable, so that its density is that of its base"):
        check(U, flow=family(1))
    with pytest.warns(UserWarning, match="affine maps of one variable"):
        check(U.exp(), flow=family(1, mixing="lu", support=constraints.positive))
    check(normal(N, 2), flow=family(2, 1, (8,)))
    check(U, normal(seed=4), flow=family(1, 1, (8,), context_dim=1))


@pytest.mark.parametrize("family", [flows.NSF, flows.SOS, flows.NAF, flows.Planar, flows.Radial, flows.Gaussian])
def test_other_flows_of_one_variable_do_not_warn(family):
    check(U, flow=family(1))


def test_a_flow_much_larger_than_the_data_warns():
    with pytest.warns(UserWarning, match="this flow has .* parameters for 45 training rows of size 5.*Gaussian"):
        check(normal(50, 5), flow=flows.NSF(5, hidden_dims=(256, 256)))
    check(normal(160, 13), flow=flows.NSF(13, autoregressive=True))


# Ordinary data


def ordinary():
    rng = np.random.default_rng(0)
    digits = load_digits().data
    yield "moons", make_moons(1000, noise=0.1, random_state=0)[0]
    yield "swiss roll", make_swiss_roll(1000, random_state=0)[0]
    yield "wine", load_wine().data
    yield "breast cancer", load_breast_cancer().data
    yield "iris", load_iris().data
    yield "digits", digits + rng.random(digits.shape)
    yield "normal", rng.standard_normal((2000, 3))
    yield "t3", rng.standard_t(3, (2000, 3))
    yield "lognormal", np.exp(rng.standard_normal((2000, 3)))
    yield "wide lognormal", np.exp(2 * rng.standard_normal((2000, 3)))
    yield "exponential", rng.exponential(size=(2000, 2))
    yield "two scales", np.where(rng.random((2000, 1)) < 0.9, 0.01, 10) * rng.standard_normal((2000, 1))
    yield "far modes", np.where(rng.random((2000, 1)) < 0.9, 0.0, 1e6) + rng.standard_normal((2000, 1))
    yield "large counts", rng.poisson(1000, (2000, 2))
    yield "few rows", rng.standard_normal((30, 2))


@pytest.mark.parametrize(("name", "x"), list(ordinary()), ids=[name for name, _ in ordinary()])
def test_ordinary_data_pass_without_a_warning(name, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(x, flow=flows.NSF(x.shape[1], *((1, (8,)) if name == "few rows" else ())))


def test_a_flow_of_any_layers_is_checked():
    check(normal(N, 3), flow=Flow([Planar(3)]))

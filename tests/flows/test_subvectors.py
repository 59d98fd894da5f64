"""Conditional and marginal laws of columns, against exact laws, integrals and one another."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch.distributions import constraints

import pyroflows as pf

ORDER = [2, 0, 1]


def moved(flow, scale=0.2):
    """The flow in float64, with noise on all parameters."""
    flow = flow.double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return flow


FLOWS = {
    "MAF": lambda **kwargs: pf.flows.MAF(3, 3, (16,), order=ORDER, **kwargs),
    "IAF": lambda **kwargs: pf.flows.IAF(3, 3, (16,), order=ORDER, **kwargs),
    "NSF": lambda **kwargs: pf.flows.NSF(3, 3, (16,), autoregressive=True, order=ORDER, **kwargs),
    "NAF": lambda **kwargs: pf.flows.NAF(3, 2, (16,), order=ORDER, **kwargs),
    "BNAF": lambda **kwargs: pf.flows.BNAF(3, 2, (8,), order=ORDER, **kwargs),
    "SOS": lambda **kwargs: pf.flows.SOS(3, 2, (16,), order=ORDER, **kwargs),
}


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("base", [None, "student_t"])
def test_marginal_times_conditional_is_the_density(name, context_dim, base):
    flow = moved(FLOWS[name](context_dim=context_dim, base=base))
    context = torch.randn(5, 2).double() if context_dim else None
    q = flow(context)
    x = q.sample((5,) if context is None else ())
    for k in (1, 2):
        first = flow.marginal(ORDER[:k], context).log_prob(x[:, ORDER[:k]])
        rest = flow.conditional(x[:, ORDER[:k]], context)
        assert rest.columns == sorted(ORDER[k:]) and rest.batch_shape == (5,)
        torch.testing.assert_close(first + rest.log_prob(x[:, rest.columns]), q.log_prob(x))


@pytest.mark.parametrize("values", [[[0.25, 0.5]], np.array([[0.25, 0.5]]), torch.tensor([[0.25, 0.5]])])
def test_values_are_cast(values):
    rest = moved(FLOWS["MAF"]()).conditional([0.5])
    x = torch.tensor([[0.25, 0.5]]).double()
    for method in (rest.log_prob, rest.conditional_cdf, rest.conditional_icdf):
        assert torch.equal(method(values), method(x))


@pytest.mark.parametrize("support", [None, constraints.positive, constraints.cat([constraints.unit_interval] * 3, -1)])
def test_a_marginal_is_the_integral_of_the_density(support):
    flow = moved(pf.flows.NSF(3, 2, (16,), autoregressive=True, order=ORDER, support=support))
    x = flow().sample()
    # The integral runs over the last column of the order, at midpoints in the unbounded space of its quantiles.
    level = (torch.arange(20_000).double() + 0.5) / 20_000
    last = flow.conditional(x[ORDER[:2]])
    values = last.conditional_icdf(level[:, None])
    edges = last.conditional_icdf((torch.arange(1, 20_000).double() / 20_000)[:, None])[:, 0]
    rows = x.repeat(len(values), 1)
    rows[:, ORDER[2]] = values[:, 0]
    density = flow().log_prob(rows).exp()
    total = (density[1:-1] * edges.diff()).sum()
    assert total.item() == pytest.approx(flow.marginal(ORDER[:2]).log_prob(x[ORDER[:2]]).exp().item(), rel=2e-3)


def test_a_gaussian_flow_has_the_textbook_conditional():
    flow = moved(pf.flows.Gaussian(3))
    flow.adapt(torch.randn(50, 3).double() * 3 + 7)
    at = flow().latent(torch.zeros(3).double())  # any linear map shows its matrix by differences
    jacobian = torch.autograd.functional.jacobian(lambda z: flow().transport(z)[0], at)
    loc, cov = flow().transport(torch.zeros(3).double())[0], jacobian @ jacobian.mT
    given = torch.tensor([[1.0], [4.0]]).double()
    slope = cov[1:, :1] / cov[0, 0]
    exact = dist.MultivariateNormal(loc[1:] + (given - loc[0]) * slope.T, cov[1:, 1:] - slope @ cov[:1, 1:])
    x = exact.sample()
    rest = flow.conditional(given)
    torch.testing.assert_close(rest.log_prob(x), exact.log_prob(x))
    draws = rest.sample((40_000,))
    error = (draws.mean(0) - exact.mean) / exact.variance.sqrt() * 40_000**0.5
    assert error.abs().max() < 4
    torch.testing.assert_close(
        flow.marginal([0]).log_prob(given), dist.Normal(loc[0], cov[0, 0] ** 0.5).log_prob(given)[:, 0]
    )


@pytest.mark.parametrize("name", FLOWS)
def test_levels_of_draws_are_uniform_and_lead_back(name):
    flow = moved(FLOWS[name]())
    whole = flow.marginal(ORDER)
    x = flow().sample((4000,))
    level = whole.conditional_cdf(x[:, ORDER])
    torch.testing.assert_close(whole.conditional_icdf(level), x[:, ORDER], rtol=1e-6, atol=1e-6)
    # The largest distance of an empirical distribution function exceeds 1.95 / sqrt(n) once in a thousand.
    distance = (level.sort(0).values - (torch.arange(4000).double()[:, None] + 0.5) / 4000).abs().max()
    assert distance < 1.95 / 4000**0.5


def test_a_base_without_a_distribution_function_is_named():
    whole = pf.flows.MAF(2, order=[0, 1], base="student_t").marginal([0, 1])
    for method in (whole.conditional_cdf, whole.conditional_icdf):
        with pytest.raises(NotImplementedError, match="the base of this flow, StudentT, has no i?cdf"):
            method(torch.full((2,), 0.5))


def test_levels_grow_with_x_behind_a_falling_map():
    falling = torch.distributions.transforms.AffineTransform(1.0, -2.0)
    flow = pf.Flow([pf.transforms.Elementwise(2), falling])
    level = flow.marginal([0, 1]).conditional_cdf(torch.tensor([[3.0, 1.0]]))
    torch.testing.assert_close(level, dist.Normal(1.0, 2.0).cdf(torch.tensor([[3.0, 1.0]])))


def test_draws_given_columns_follow_the_conditional_and_keep_gradients():
    flow = moved(FLOWS["MAF"]())
    given = torch.tensor([0.3]).double().requires_grad_()
    rest = flow.conditional(given)
    level = rest.conditional_cdf(rest.sample((4000,)))
    distance = (level.sort(0).values - (torch.arange(4000).double()[:, None] + 0.5) / 4000).abs().max()
    assert distance < 1.95 / 4000**0.5
    (gradient,) = torch.autograd.grad(rest.rsample((10,)).sum(), given)
    assert gradient != 0


def test_an_elementwise_flow_takes_any_columns():
    flow = moved(pf.Flow(pf.transforms.Elementwise(3, "spline")))
    rest = flow.conditional(torch.zeros(1).double(), columns=[1])
    assert rest.columns == [0, 2] and rest.sample((4,)).shape == (4, 2)


def test_a_subvector_is_a_site_of_a_pyro_model():
    flow = moved(FLOWS["MAF"]())

    def model():
        given = pyro.sample("given", dist.Normal(0.0, 1.0).expand([1]).to_event(1)).double()
        return pyro.sample("rest", flow.conditional(given))

    mcmc = MCMC(NUTS(model), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["rest"].shape == (5, 2)


@pytest.mark.parametrize(
    ("flow", "words"),
    [
        (pf.flows.MAF(3, 2), "layer 0"),
        (pf.flows.NSF(3, 2), "Coupling"),
        (pf.flows.Planar(3, 2), "Planar"),
        (pf.flows.MAF(3, 2, base=dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), order=ORDER), "base"),
    ],
)
def test_a_flow_without_one_order_is_refused(flow, words):
    with pytest.raises(pf.FlowError, match=words):
        flow.conditional(torch.zeros(1))


def test_columns_that_do_not_come_first_are_refused():
    flow = pf.flows.MAF(3, order=ORDER)
    with pytest.raises(pf.FlowError, match=r"columns \[0\] are not the first 1"):
        flow.conditional(torch.zeros(1), columns=[0])
    with pytest.raises(pf.FlowError, match=r"columns \[1\]"):
        flow.marginal([1])
    with pytest.raises(pf.FlowError, match="one value for each"):
        flow.conditional(torch.zeros(3))


def test_couplings_have_no_order():
    with pytest.raises(pf.FlowError, match="autoregressive=True"):
        pf.flows.NSF(3, order=[0, 1, 2])


def test_given_values_that_are_no_numbers_are_named():
    with pytest.raises(pf.DataError, match="given has NaN or infinite values in 1 of 2 rows, .* row 1"):
        pf.flows.MAF(2, order=[0, 1]).conditional(torch.tensor([[0.0], [torch.nan]]))


@pytest.mark.parametrize("columns", [2, [], [0, 0], [3], [0.0], "0"])
def test_columns_are_different_numbers(columns):
    with pytest.raises(pf.FlowError, match="columns must be one or more different numbers from 0 to 2"):
        pf.flows.MAF(3, order=ORDER).marginal(columns)
    assert pf.flows.MAF(3, order=ORDER).marginal(torch.tensor([2])).columns == [2]


def test_given_values_outside_of_the_support_are_refused():
    flow = pf.flows.MAF(2, order=[1, 0], support=constraints.positive)
    for value in ([-1.0], [[1.0], [0.0]]):
        with pytest.raises(pf.DataError, match="given has values outside of the support .* of columns .1."):
            flow.conditional(value)
    with pytest.raises(pf.ShapeError, match="one value for each"):
        flow.conditional(1.0)

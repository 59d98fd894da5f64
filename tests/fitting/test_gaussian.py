"""The Gaussian beside a density fit, against moments and densities that are written out."""

import numpy as np
import pytest
import torch
from torch.distributions import LogNormal, MultivariateNormal, constraints

import pyroflows as pf
from pyroflows.fitting.gaussian import gaussian_log_prob
from pyroflows.training.data import load


def rows_of(flow, x, context=None, weights=None):
    return load(flow, x, context, weights).rows


def test_moments_are_those_of_the_weighted_training_rows():
    x = torch.randn(200, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) + 100
    weights = torch.rand(200, dtype=torch.float64)
    flow = pf.flows.MAF(3).double()
    rows = rows_of(flow, x, weights=weights)
    found = gaussian_log_prob(flow, rows[:150], rows[150:])
    mean = np.average(x[:150], axis=0, weights=weights[:150])
    cov = np.cov(x[:150].T, aweights=weights[:150], ddof=0)
    law = MultivariateNormal(torch.as_tensor(mean), torch.as_tensor(cov))
    assert found == pytest.approx(np.average(law.log_prob(x[150:]), weights=weights[150:]), abs=1e-8)


def test_with_contexts_the_mean_is_linear_in_them():
    context = torch.randn(300, 2, dtype=torch.float64)
    x = 5 + context @ torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
    x = x + 0.1 * torch.randn(300, 2, dtype=torch.float64)
    flow = pf.flows.MAF(2, context_dim=2).double()
    rows = rows_of(flow, x, context)
    found = gaussian_log_prob(flow, rows[:250], rows[250:])
    design = np.column_stack([np.ones(250), context[:250]])
    coefficients, *_ = np.linalg.lstsq(design, x[:250].numpy(), rcond=None)
    residual = x[:250].numpy() - design @ coefficients
    mean = np.column_stack([np.ones(50), context[250:]]) @ coefficients
    law = MultivariateNormal(torch.as_tensor(mean), torch.as_tensor(residual.T @ residual / 250))
    assert found == pytest.approx(law.log_prob(x[250:]).mean().item(), abs=1e-8)


def test_contexts_that_depend_linearly_have_the_least_squares_solution():
    """A one-hot context and its constant."""
    context = torch.eye(3, dtype=torch.float64)[torch.arange(300) % 3]
    x = context @ torch.tensor([[0.0], [5.0], [9.0]], dtype=torch.float64) + torch.randn(300, 1, dtype=torch.float64)
    flow = pf.flows.MAF(1, context_dim=3).double()
    rows = rows_of(flow, x, context)
    # The entropy of the noise, 1.419 nats; the standard error of its mean over 30 rows is 0.13.
    assert gaussian_log_prob(flow, rows[:270], rows[270:]) == pytest.approx(-1.419, abs=0.5)


def test_on_a_bounded_support_it_is_the_image_of_a_gaussian():
    x = (2 + torch.randn(400, 2, dtype=torch.float64)).exp()
    flow = pf.flows.MAF(2, support=constraints.positive).double()
    rows = rows_of(flow, x)
    y = x[:300].log()
    law = LogNormal(y.mean(0), y.std(0, correction=0))
    # The two columns have a correlation in the sample only, of order 1 / sqrt(300).
    expected = law.log_prob(x[300:]).sum(-1).mean().item()
    assert gaussian_log_prob(flow, rows[:300], rows[300:]) == pytest.approx(expected, abs=0.05)


def test_units_do_not_count():
    x = torch.randn(100, 2, dtype=torch.float64)
    flow, units = pf.flows.MAF(2).double(), torch.tensor([1e-9, 1e9], dtype=torch.float64)
    found = [gaussian_log_prob(flow, rows[:90], rows[90:]) for rows in (rows_of(flow, x), rows_of(flow, x * units))]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize("x", [torch.randn(10, 12), torch.randn(50, 1).repeat(1, 2)], ids=["few rows", "equal columns"])
def test_there_is_none_where_the_covariance_is_singular(x):
    flow = pf.flows.MAF(x.shape[1])
    rows = rows_of(flow, x)
    assert gaussian_log_prob(flow, rows[:-2], rows[-2:]) is None


def test_there_is_none_for_angles():
    """A Gaussian is no density on a circle: for angles around pi it has the two ends far from their mean."""
    x = torch.distributions.VonMises(torch.pi, 4.0).sample((100, 2))
    mixed = constraints.cat([pf.constraints.circular, constraints.real], dim=-1)
    for flow in (pf.flows.CircularNSF(2), pf.flows.CircularNSF(2, support=mixed)):
        rows = rows_of(flow, x)
        assert gaussian_log_prob(flow, rows[:-10], rows[-10:]) is None
    fit = pf.fit_density(flow, x, max_epochs=1, progress_bar=False)
    assert fit.gaussian_log_prob is None and "Gaussian" not in repr(fit)


def test_events_of_another_shape_count_as_vectors():
    x = torch.randn(100, 6, dtype=torch.float64)
    flow, images = pf.flows.MAF(6), pf.Flow([pf.transforms.Standardize((2, 3))])
    found = [
        gaussian_log_prob(f, *(rows_of(f, part) for part in values.split([90, 10])))
        for f, values in ((flow, x), (images, x.unflatten(1, (2, 3))))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-9)

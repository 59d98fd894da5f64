"""Conditional draws by importance sampling, against closed forms and integrals on a grid."""

import numpy as np
import pytest
import torch
from torch.distributions import constraints

import pyroflows as pf


def moved(flow, scale=0.2):
    """The flow with noise on all parameters."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return flow


@pytest.mark.parametrize("support", [None, constraints.positive, constraints.cat([constraints.unit_interval] * 4, -1)])
def test_weighted_draws_agree_with_the_closed_form(support):
    flow = moved(pf.flows.MAF(4, 3, (16,), order=[2, 0, 1, 3], support=support))
    given = flow().sample()[[2, 0]]
    weighted = pf.sample_conditional(flow, given, columns=[2, 0], seed=0)
    exact = flow.marginal([2, 0]).log_prob(given).item()
    assert weighted.log_evidence == pytest.approx(exact, abs=4 * weighted.log_evidence_se)
    assert weighted.khat < 0.7 and weighted.ess > 400
    part = flow.conditional(given)
    x = weighted.draws["x"]
    assert torch.equal(x[:, [2, 0]], given.expand(len(x), 2))
    # Levels of exact draws are uniform, with mean 1/2 and variance 1/12.
    level = part.conditional_cdf(x[:, part.columns]).detach()
    mean = weighted.weights.normalized.float() @ level
    assert (mean - 0.5).abs().max() < 4 / (12 * weighted.ess) ** 0.5


def test_both_branches_of_a_law_are_drawn():
    flow = moved(pf.flows.Mixture([pf.flows.Gaussian(2), pf.flows.Gaussian(2)], torch.zeros(2)), 0.0)
    for component, loc in zip(flow.components, (-4.0, 4.0), strict=True):
        component.transform.layers[0].matrix_of.value.data[:, -1] = torch.tensor([0.0, loc])
    weighted = pf.sample_conditional(flow, torch.tensor([0.3]), columns=[0], seed=0)
    share = weighted.weights.normalized @ (weighted.draws["x"][:, 1] > 0).double()
    assert share.item() == pytest.approx(0.5, abs=4 * (0.25 / weighted.ess) ** 0.5)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(0.3)).item()
    assert weighted.log_evidence == pytest.approx(exact, abs=4 * weighted.log_evidence_se)


def test_a_context_and_a_seed():
    flow = moved(pf.flows.NSF(3, 2, (16,), context_dim=2))
    context, before = torch.randn(2), torch.get_rng_state()
    draws = [pf.sample_conditional(flow, torch.zeros(1), [1], context, seed=3).draws["x"] for _ in range(2)]
    assert torch.equal(*draws) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "columns", "num_samples", "words"),
    [
        (torch.zeros(2), [0], 1000, "one row at a time"),
        (torch.zeros(5, 1), [0], 1000, "one row at a time"),
        (torch.zeros(3), [0, 1, 2], 1000, "nothing to draw"),
        (torch.zeros(1), [3], 1000, "different numbers from 0 to 2"),
        (torch.zeros(2), [0, 0], 1000, "different numbers from 0 to 2"),
        (torch.zeros(1), 1, 1000, "such as .0., got 1"),
        (torch.tensor([torch.nan]), [0], 1000, "NaN"),
        (torch.zeros(1), [0], 10, "at least 100"),
    ],
)
def test_wrong_arguments_are_refused(given, columns, num_samples, words):
    with pytest.raises(pf.FlowError, match=words):
        pf.sample_conditional(pf.flows.NSF(3), given, columns, num_samples=num_samples)


def test_a_support_of_separate_parts_is_refused():
    parts = [pf.flows.NSF(2, support=constraints.interval(a, a + 1.0)) for a in (0.0, 2.0)]
    with pytest.raises(pf.FlowError, match="draw from its components"):
        pf.sample_conditional(pf.flows.Mixture(parts), torch.tensor([0.5]), [0])


def test_values_outside_of_the_support_are_refused():
    flow = pf.flows.NSF(2, support=constraints.positive)
    for value in (-1.0, 0.0):
        with pytest.raises(pf.DataError, match="given has values outside of the support .* of columns .0."):
            pf.sample_conditional(flow, [value], columns=[0])


def test_what_is_no_flow_is_named():
    with pytest.raises(pf.FlowError, match=r"needs a pyroflows.Flow of vectors, got FlowDistribution"):
        pf.sample_conditional(pf.flows.NSF(2)(), [0.0], columns=[0])


def test_arrays_and_lists_are_taken():
    flow = pf.flows.NSF(2)
    draws = [
        pf.sample_conditional(flow, v, [0], seed=0).draws["x"] for v in ([1.0], np.ones(1), torch.ones(1).double())
    ]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])

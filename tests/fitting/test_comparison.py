"""Comparisons of flows: the same rows for all, and differences with the errors of paired ones."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows.errors import OptionError


def bent(n):
    first, second = torch.randn(2, n)
    return torch.stack([first, 0.3 * second + first**2], -1)


def compare(flows, x, **options):
    return pf.compare_densities(flows, x, **{"seed": 0, "progress_bar": False, "max_epochs": 20, **options})


def test_the_flow_that_can_bend_is_found_better_than_a_gaussian():
    torch.manual_seed(0)
    flows = {"Gaussian": pf.flows.Gaussian(2), "MAF": pf.flows.MAF(2, num_layers=2, hidden_dims=(16,))}
    found = compare(flows, bent(1000))
    assert found.best == "MAF"
    lead, error = found.lead("MAF", "Gaussian")
    assert lead > 3 * error > 0
    assert found.lead("Gaussian", "MAF") == pytest.approx((-lead, error))
    assert found.fits["MAF"].flow is flows["MAF"]
    table = repr(found).splitlines()
    assert table[1].startswith(f"MAF        {found.log_prob('MAF'):16.3f}")
    assert f"{lead:.3f} ± {error:.3f}" in table[2]


def test_all_flows_see_and_score_the_same_rows():
    """Two equal flows give the same numbers, whatever was drawn between their fits."""
    flow, x = pf.flows.MAF(2, num_layers=1, hidden_dims=(8,)), bent(300)
    twin = pf.flows.MAF(2, num_layers=1, hidden_dims=(8,))
    twin.load_state_dict(flow.state_dict())
    found = compare({"one": flow, "other": twin}, x, seed=None, max_epochs=3)
    assert found.lead("one", "other") == (0.0, 0.0)
    assert len(found.weights) == 60
    scored = flow().log_prob(x).tolist()
    assert all(min(abs(value - np.array(scored))) < 1e-5 for value in found.log_probs["one"])


def test_weights_count():
    torch.manual_seed(0)
    x, weights = torch.randn(400, 1), torch.rand(400)
    found = compare({"a": pf.flows.Gaussian(1), "b": pf.flows.NSF(1, num_layers=1)}, x, weights=weights, max_epochs=3)
    difference = found.log_probs["a"] - found.log_probs["b"]
    shares = found.weights / found.weights.sum()
    mean = (shares * difference).sum()
    assert found.lead("a", "b") == pytest.approx((mean, math.sqrt((shares**2 * (difference - mean) ** 2).sum())))


def test_contexts_are_used():
    context = torch.randn(1000, 1)
    x = dist.Normal(3 * context, 0.1).sample()
    (name,) = (found := compare({"q": pf.flows.MAF(1, num_layers=1, context_dim=1)}, x, context=context)).fits
    assert found.log_prob(name) > -1.0  # the entropy of x alone is 2.5 nats


def fitted(flow, x):
    pf.fit_density(flow, x, max_epochs=1, seed=0, progress_bar=False)
    return flow


def test_flows_that_have_seen_rows_are_refused():
    """Their training rows may be test rows here, on which they would look better than they are."""
    torch.manual_seed(0)
    x, new, seen = bent(100), pf.flows.MAF(2, num_layers=1), pf.flows.MAF(2, num_layers=1)
    seen.adapt(x)
    loaded = pf.flows.Gaussian(2)
    loaded.load_state_dict(fitted(pf.flows.Gaussian(2), x).state_dict())
    mixtures = [
        fitted(pf.flows.Mixture([pf.flows.Gaussian(2)]), x),
        pf.flows.Mixture([pf.flows.Gaussian(2), seen]),
        pf.flows.Mixture([pf.flows.Gaussian(2), pf.flows.Mixture([seen])]),
    ]
    for flow in (seen, loaded, *mixtures):
        with pytest.raises(OptionError, match="flow 'q' was fitted or adapted to rows before.*: give a new one"):
            compare({"new": new, "q": flow}, x)
    assert not new.is_adapted


def test_a_location_and_scale_that_were_given_are_not_learned():
    given = pf.transforms.Standardize(2, torch.zeros(2), torch.ones(2))
    flow = pf.Flow([pf.transforms.Triangular(2), given])
    assert compare({"q": flow}, bent(100), max_epochs=1).best == "q"


def test_flows_that_share_parameters_are_refused():
    flow = pf.flows.MAF(2, num_layers=1)
    for other in (flow, pf.flows.Mixture([flow, pf.flows.Gaussian(2)])):
        with pytest.raises(OptionError, match="flows 'a' and 'b' have parameters in common.*make a flow for each name"):
            compare({"a": flow, "b": other}, bent(100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flows": {}}, "at least one flow"),
        ({"flows": [pf.flows.MAF(2)]}, "takes flows by name, such as .*, but got list"),
        ({"flows": pf.flows.MAF(2)}, "takes flows by name, such as .*, but got MAF"),
        ({"flows": {"q": pf.flows.MAF(2)()}}, "takes pyroflows.Flow objects by name, but 'q' is FlowDistribution"),
        ({"flows": {"q": pf.flows.MAF}}, "'q' is the class MAF: make an instance first"),
        ({"flows": {1: pf.flows.MAF(2)}}, "names of flows must be strings, got 1"),
        ({"test": 1.0}, "test must be a fraction of the rows"),
        ({"test": None}, "test must be a fraction of the rows"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        compare(**{"flows": {"q": pf.flows.MAF(2)}, "x": bent(50), **options})

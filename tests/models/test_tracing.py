"""Runs of a model with initial values, also where there is nothing to draw from."""

import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import init_to_sample, init_to_value
from torch.distributions import biject_to, constraints

from pyroflows.models.structure import describe
from pyroflows.models.tracing import latent_init, trace_model
from tests.models.test_structure import DOUBLE, everything


def test_inspection_is_unseen():
    """Neither handlers outside nor gradients notice that the model ran."""
    with poutine.trace() as outer:
        describe(everything, (), {})
    assert not outer.trace.nodes
    assert not trace_model(everything, (), {}).nodes["loc"]["value"].requires_grad


def test_initial_values_are_used():
    init = init_to_value(values={"loc": torch.tensor(3.0, dtype=DOUBLE)}, fallback=init_to_sample)
    trace = trace_model(everything, (), {}, init)
    assert trace.nodes["loc"]["value"] == 3
    assert trace.nodes["double"]["value"] == 6


# An initial value where there is nothing to draw from


SUPPORTS = [constraints.real, constraints.positive, constraints.simplex, constraints.interval(-1.0, 3.0)]


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_latent_init(support):
    event_shape = (3,) if support is constraints.simplex else ()
    fn = dist.ImproperUniform(support, (2,), event_shape)
    value = latent_init(init_to_sample)({"name": "x", "fn": fn})
    assert value.shape == (2, *event_shape)
    assert support.check(value).all()
    assert (biject_to(support).inv(value).abs() < 1e-6).all()


def test_feasible_leaves_proper_priors_alone():
    site = {"name": "x", "fn": dist.Normal(5.0, 1e-3)}
    assert latent_init(init_to_sample)(site).item() == pytest.approx(5.0, abs=0.01)


def test_feasible_leaves_given_values_alone():
    init = latent_init(init_to_value(values={"x": torch.tensor(4.0)}, fallback=init_to_sample))
    improper = dist.ImproperUniform(constraints.positive, (), ())
    assert init({"name": "x", "fn": improper}) == 4
    assert init({"name": "z", "fn": improper}) == 1


def test_feasible_without_a_site_is_itself():
    init = latent_init(init_to_sample)
    assert init() is init

"""Runs of a model with initial values, also where there is nothing to draw from."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import init_to_sample, init_to_value
from torch.distributions import biject_to, constraints

from pyroflows import FlowVI, ModelError
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


# Values that a model changes in place


def adds_to_it():
    a = pyro.sample("a", dist.HalfNormal(1.0))
    a += 0.1
    pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(0.5))


def adds_another_to_it():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    mean = a
    mean += b
    pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(0.5))


def fills_an_entry():
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    a[0] = 0.0
    pyro.sample("y", dist.Normal(a.sum(), 1.0), obs=torch.tensor(0.5))


def fails_after_the_change():
    a = pyro.sample("a", dist.HalfNormal(1.0))
    a.neg_()
    pyro.sample("y", dist.Normal(0.0, a), obs=torch.tensor(0.5))


@pytest.mark.parametrize("model", [adds_to_it, adds_another_to_it, fills_an_entry, fails_after_the_change])
def test_a_value_that_changes_in_place_is_refused(model):
    with pytest.raises(ModelError, match="changes the value of site 'a' in place"):
        FlowVI(model, progress_bar=False).run()


def test_a_copy_may_change_in_place():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0)).clone()
        a += 1.0
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(0.5))

    trace = trace_model(model, (), {})
    assert trace.nodes["y"]["fn"].mean == trace.nodes["a"]["value"] + 1


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

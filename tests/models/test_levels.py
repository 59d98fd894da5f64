"""Levels of models: rows are local where they are independent given what is above them, and not because of plates."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyroflows.compiling.check import Compiler
from pyroflows.inference.search.hierarchical import hessian_product
from pyroflows.models.layout import Layout
from pyroflows.models.levels import NUM_HALVES, independent_levels
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe

GROUP = torch.arange(60) % 20
X = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))


def groups():
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", 20):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 60):
        pyro.sample("y", dist.Normal(theta[GROUP] + slope[GROUP].sum(-1), 1.0), obs=torch.linspace(-1, 1, 60))


def regression():
    with pyro.plate("predictors", 20):
        weights = pyro.sample("weights", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 60):
        pyro.sample("y", dist.Normal((X * weights).sum(-1), 1.0), obs=torch.zeros(60))


def neighbours():
    """Each row is coupled with the next one alone."""
    with pyro.plate("rows", 20):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("steps", dist.Normal(x[1:] - x[:-1], 1.0).to_event(1), obs=torch.zeros(19))


def items():
    with pyro.plate("items", 10, dim=-1):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with pyro.plate("persons", 30, dim=-2):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("answers", 10, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=ability - difficulty), obs=torch.ones(30, 10))


def nested():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("states", 8, dim=-1):
        state = pyro.sample("state", dist.Normal(mu, 1.0))
        with pyro.plate("counties", 9, dim=-2):
            county = pyro.sample("county", dist.Normal(state, 1.0))
            pyro.sample("y", dist.Normal(county, 1.0), obs=torch.zeros(9, 8))


def found(model):
    torch.manual_seed(0)
    layout = Layout(describe(model, (), {}))
    log_joint = LogJoint(model, (), {}, layout, 0.1 * torch.randn(5, layout.dim), Compiler("none"))
    return independent_levels(layout, hessian_product(log_joint), 0.3 * torch.randn(NUM_HALVES, layout.dim))


def test_rows_are_local_through_an_index():
    of_globals, of_groups = found(groups)
    assert [site.name for site in of_globals.sites] == ["mu", "tau"]
    assert [site.name for site in of_groups.sites] == ["theta", "slope"]
    assert of_groups.places.shape == (20, 3)
    assert of_groups.places[1].tolist() == [3, 24, 25]


@pytest.mark.parametrize("model", [regression, neighbours])
def test_a_plate_does_not_make_rows_independent(model):
    (of_globals,) = found(model)
    assert of_globals.places.shape == (1, 20)


def test_the_larger_of_two_crossed_plates_is_local():
    of_globals, of_persons = found(items)
    assert [site.name for site in of_globals.sites] == ["difficulty"]
    assert [site.name for site in of_persons.sites] == ["ability"]


def test_nested_plates_are_both_local():
    of_globals, of_states, of_counties = found(nested)
    assert [site.name for site in of_globals.sites] == ["mu"]
    assert of_states.places.shape == (8, 1)
    assert of_counties.places.shape == (72, 1)
    assert of_counties.parents == (0,)

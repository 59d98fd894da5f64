"""Recipes as values: equal where they make the same flow, written as JSON, and refused when they are made."""

import copy
import json
import pickle

import pyro.distributions as dist
import pytest
import torch

from pyroflows import flows
from pyroflows.errors import OptionError
from pyroflows.flows import Recipe

NAMES = [
    "BNAF",
    "CNF",
    "IAF",
    "MAF",
    "NAF",
    "NICE",
    "NSF",
    "SOS",
    "Gaussian",
    "Planar",
    "Radial",
    "RealNVP",
    "Sylvester",
]


def sizes(flow):
    return {name: value.shape for name, value in flow.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_makes_the_flow_of_its_name(name):
    flow = Recipe(name)(3)
    assert type(flow) is getattr(flows, name)
    assert sizes(flow) == sizes(getattr(flows, name)(3))


def test_options_act():
    options = {"num_layers": 2, "hidden_dims": (5, 6), "base": "student_t", "mixing": "lu", "bins": 3}
    assert sizes(Recipe("NSF", **options)(4)) == sizes(flows.NSF(4, **options)) != sizes(flows.NSF(4))


@pytest.mark.parametrize(
    ("dim", "kind"), [(1, flows.Planar), (2, flows.IAF), (64, flows.IAF), (65, flows.RealNVP)], ids=str
)
def test_the_default_fits_the_dimension(dim, kind):
    flow, heavy = Recipe("default")(dim), Recipe("default", base="student_t")(dim)
    assert type(flow) is type(heavy) is kind
    assert sizes(flow) == sizes(kind(dim))
    assert sizes(heavy) == sizes(kind(dim, base="student_t"))


@pytest.mark.parametrize(("dim", "kind", "conditioner"), [(2, "IAF", "scaled_made"), (65, "RealNVP", "scaled_mlp")])
def test_the_default_has_scaled_networks_where_asked(dim, kind, conditioner):
    assert str(Recipe("default", scaled=True)(dim)) == str(Recipe(kind, conditioner=conditioner)(dim))
    assert str(Recipe("default", scaled=True)(dim)) != str(Recipe(kind)(dim))


def test_equality_is_that_of_names_and_options():
    recipe = Recipe("IAF", num_layers=2, hidden_dims=(8, 8))
    assert recipe == Recipe("IAF", hidden_dims=[8, 8], num_layers=2)
    assert recipe != Recipe("MAF", num_layers=2, hidden_dims=(8, 8))
    assert recipe != Recipe("IAF", num_layers=3, hidden_dims=(8, 8))
    assert Recipe("IAF") == Recipe("IAF", num_layers=4, base=None)
    assert Recipe("default") != Recipe("IAF")
    assert recipe != "IAF"
    assert {recipe: 1}[Recipe("IAF", hidden_dims=[8, 8], num_layers=2)] == 1


@pytest.mark.parametrize(
    "recipe",
    [Recipe("default"), Recipe("default", base="student_t"), Recipe("NSF", hidden_dims=(8,), autoregressive=True)],
    ids=repr,
)
def test_copies_are_equal(recipe):
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe
    assert eval(repr(recipe), {"Recipe": Recipe}) == recipe


def test_repr_shows_what_was_changed():
    assert repr(Recipe("NSF", bins=4, hidden_dims=(8,), num_layers=5)) == "Recipe('NSF', hidden_dims=[8], bins=4)"
    assert repr(Recipe("default")) == "Recipe('default')"


def test_a_recipe_does_not_change():
    recipe = Recipe("IAF", hidden_dims=[8])
    recipe.options["hidden_dims"].append(8)
    recipe.to_json()["options"]["num_layers"] = 1
    assert recipe == Recipe("IAF", hidden_dims=[8])


@pytest.mark.parametrize("name", ["iaf", "Flow", "Mixture", ""])
def test_unknown_name_raises(name):
    with pytest.raises(OptionError, match=f"no recipe '{name}': it must be one of.*'default', 'BNAF', 'CNF'"):
        Recipe(name)


@pytest.mark.parametrize(
    ("name", "option"), [("IAF", "bins"), ("default", "num_layers"), ("Gaussian", "mixing"), ("MAF", "dim")]
)
def test_unknown_option_raises(name, option):
    with pytest.raises(OptionError, match=f"the recipe '{name}' has no option '{option}': it has.*base"):
        Recipe(name, **{option: 2})


def test_option_that_is_no_json_raises():
    with pytest.raises(OptionError, match="base of the recipe 'MAF' must be a value that JSON can hold, got Laplace"):
        Recipe("MAF", base=dist.Laplace(torch.zeros(2), 1.0))

"""Batches of no rows, such as the last rest of a data set, are sampled and scored as others are."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch.distributions import constraints

import pyroflows as pf

RECIPES = [
    recipe
    for recipe in vars(pf.flows).values()
    if isinstance(recipe, type) and issubclass(recipe, pf.Flow) and recipe not in (pf.Flow, pf.flows.Mixture)
]
SUPPORTS = [constraints.positive, constraints.cat([constraints.real, constraints.unit_interval], dim=-1)]
OTHERS = {
    **{f"support {support}": lambda support=support: pf.flows.NSF(2, support=support) for support in SUPPORTS},
    "mixture": lambda: pf.flows.Mixture([pf.flows.MAF(2, context_dim=3), pf.flows.Gaussian(2)]),
    "supports": lambda: pf.flows.Mixture([pf.flows.NSF(2, support=support) for support in SUPPORTS]),
    "bounded base": lambda: pf.Flow([pf.transforms.LU(2)], base=dist.Exponential(torch.ones(2)).to_event(1)),
    "flow as base": lambda: pf.Flow([pf.transforms.LU(2)], base=pf.flows.MAF(2)),
    "several axes": lambda: pf.Flow([pf.transforms.Elementwise((3, 2))], support=constraints.positive),
}
# Noise has a context of its own size.
IMAGES = ("Glow", "MultiscaleRealNVP", "MultiscaleResidual")
SIZES = {**dict.fromkeys(IMAGES, (1, 4, 4)), "Dequantizer": 3}
DISCRETE = ("DiscreteAutoregressive", "DiscreteCoupling")


def made(recipe, **options):
    if recipe.__name__ in DISCRETE:
        options = {"num_categories": 4, **options}
    return recipe(SIZES.get(recipe.__name__, 2), **options)


MAKE = {f"{recipe.__name__}": lambda recipe=recipe: made(recipe) for recipe in RECIPES}
MAKE |= {
    f"{recipe.__name__} with context": lambda recipe=recipe: made(recipe, context_dim=3)
    for recipe in RECIPES
    if recipe is not pf.flows.Dequantizer
}
MAKE |= OTHERS
validated = pytest.mark.parametrize("validates", [True, False])


@validated
@pytest.mark.parametrize("name", MAKE)
def test_no_rows(name, validates):
    flow = MAKE[name]()
    x = torch.zeros(0, *flow.event_shape)
    with pyro.validation_enabled(validates):
        law = flow(torch.zeros(0, 3)) if flow.context_dim else flow()
        assert law.log_prob(x).shape == (0,)
        assert law.latent(x).shape == (0, *flow.base_shape)
        draws, log_q = law.rsample_and_log_prob((4,) if flow.context_dim else (0,))
        assert (draws.shape[-x.dim() :], log_q.shape[-1:]) == (x.shape, (0,))
        if flow.context_dim:
            assert law.log_prob(torch.zeros(flow.event_shape)).shape == (0,)
            assert flow(torch.zeros(5, 1, 3)).log_prob(x).shape == (5, 0)
        else:
            assert law.expand((0,)).log_prob(x).shape == law.expand((0,)).sample().shape[:1] == (0,)


@validated
@pytest.mark.parametrize("support", [None, *SUPPORTS])
def test_no_rows_of_a_conditional_and_a_marginal_law(support, validates):
    flow = pf.flows.MAF(2, order=[0, 1], context_dim=3, support=support)
    with pyro.validation_enabled(validates):
        for rest, context in [((0, 1), (0, 3)), ((1, 1), (0, 3)), ((0, 1), (1, 3))]:
            law = flow.conditional(torch.full(rest, 0.5), torch.zeros(context))
            assert law.log_prob(torch.zeros(0, 1)).shape == law.sample().shape[:1] == (0,)
        marginal = flow.marginal([0, 1], torch.zeros(0, 3))
        assert marginal.log_prob(torch.zeros(0, 2)).shape == (0,)
        assert marginal.conditional_cdf(torch.zeros(0, 2)).shape == (0, 2)


def test_no_rows_of_another_size_are_refused():
    with pytest.raises(pf.ShapeError):
        pf.flows.MAF(2)().log_prob(torch.zeros(0, 3))

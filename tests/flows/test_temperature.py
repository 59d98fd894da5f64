"""Draws at a temperature: the base's deviations from its mean are multiplied by it."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows.errors import OptionError
from pyroflows.transforms import Planar

LOC, SCALE = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
FACTOR = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
NORMALS = {
    "default": None,
    "normal": dist.Normal(LOC, SCALE).to_event(1),
    "expanded": dist.Normal(1.0, 2.0).expand([2]).to_event(1),
    "masked": dist.Normal(LOC, SCALE).to_event(1).mask(True),
    "full": dist.MultivariateNormal(LOC, scale_tril=FACTOR),
    "low rank": dist.LowRankMultivariateNormal(LOC, torch.ones(2, 1), torch.ones(2)),
    "flow": pf.Flow([pf.transforms.Elementwise(2)], base=dist.Normal(LOC, SCALE).to_event(1)),
}
OTHERS = {
    "Laplace": dist.Laplace(torch.zeros(2), 1.0).to_event(1),
    "StudentT": "student_t",
    "Uniform": dist.Uniform(torch.zeros(2), 1.0).to_event(1),
}


def bent(base=None, **options):
    torch.manual_seed(1)
    flow = pf.Flow([Planar(2, **options), Planar(2)], base)
    for parameter in flow.transform.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return flow


@pytest.mark.parametrize("base", NORMALS)
def test_a_normal_base_keeps_its_mean_and_has_its_deviations_multiplied(base):
    flow, temperature = bent(NORMALS[base]), 0.3
    law = flow()
    torch.manual_seed(5)
    z = law.base.sample((4,))
    torch.manual_seed(5)
    x = law.sample((4,), temperature=temperature)
    mean = LOC if base == "flow" else law.base.mean
    assert torch.allclose(x, law.transport(mean + temperature * (z - mean))[0], atol=1e-6)


def test_draws_of_the_base_have_the_covariance_of_the_temperature():
    z = pf.Flow([pf.transforms.Elementwise(2)], NORMALS["full"])().sample((40_000,), temperature=2.0)
    covariance = 4 * FACTOR @ FACTOR.T
    # A product of normal variables of variance 4 has a standard deviation below 6.
    assert (z.T.cov() - covariance).abs().max() < 4 * 6 / math.sqrt(40_000)
    assert (z.mean(0) - LOC).abs().max() < 4 * 2 / math.sqrt(40_000)


@pytest.mark.parametrize("temperature", [1, 1.0])
@pytest.mark.parametrize("base", [*NORMALS.values(), *OTHERS.values()])
def test_temperature_one_is_a_plain_draw(base, temperature):
    law = bent(base)()
    torch.manual_seed(0)
    x = law.sample((3,))
    torch.manual_seed(0)
    assert torch.equal(law.sample((3,), temperature=temperature), x)


def test_temperature_zero_gives_the_image_of_the_mean():
    law = bent()()
    assert torch.equal(law.sample((3,), temperature=0), law.transport(torch.zeros(3, 2))[0])


@pytest.mark.parametrize("base", OTHERS)
def test_other_bases_are_refused_by_name(base):
    with pytest.raises(OptionError, match=f"normal base.* is {base}"):
        bent(OTHERS[base])().sample((3,), temperature=0.7)


@pytest.mark.parametrize("temperature", [-0.1, math.inf, math.nan, None, True, torch.ones(2)])
def test_no_temperatures_are_refused(temperature):
    with pytest.raises(OptionError, match="temperature must be a finite number of at least 0"):
        bent()().sample((3,), temperature=temperature)


def test_contexts_and_expanded_laws_have_temperatures():
    flow, context = bent(context_dim=3), torch.randn(5, 3)
    law = flow(context)
    assert torch.equal(law.sample((7,), temperature=0.0), law.transport(torch.zeros(7, 5, 2))[0])
    wide = law.expand([4, 5])
    assert wide.sample((7,), temperature=0.5).shape == (7, 4, 5, 2)
    assert not wide.sample(temperature=0.5).requires_grad


def test_a_score_after_a_cool_draw_is_that_of_the_law():
    law = bent()()
    x = law.sample((5,), temperature=0.1)
    assert torch.equal(law.log_prob(x), bent()().log_prob(x))


def test_components_of_a_mixture_draw_at_the_temperature_with_their_weights():
    ends = [pf.Flow([pf.transforms.Standardize(1, torch.tensor([loc]), torch.ones(1))]) for loc in (-5.0, 5.0)]
    mixture = pf.flows.Mixture(ends, log_weights=torch.tensor([0.2, 0.8]).log())
    x = mixture().sample((4000,), temperature=0.0)
    assert set(x.flatten().tolist()) == {-5.0, 5.0}
    assert abs((x > 0).float().mean() - 0.8) < 4 * math.sqrt(0.2 * 0.8 / 4000)
    with pytest.raises(OptionError, match="StudentT"):
        pf.flows.Mixture([ends[0], pf.Flow([Planar(1)], "student_t")])().sample((99,), temperature=0.5)

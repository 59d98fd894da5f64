"""The sites and the forms of a model that a poor fit names."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import init_to_median
from pyro.infer.reparam import LocScaleReparam
from torch.distributions import constraints

from pyroflows.inference.verdict.mismatch import helpful_forms, worst_sites
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe

NUM_DRAWS = 10_000


def log_joint_of(model, dtype=None):
    layout = Layout(describe(model, (), {}, init_to_median))
    return LogJoint(model, (), {}, layout, 0.1 * torch.randn(5, layout.dim, dtype=dtype))


def three_sites():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("c", dist.Normal(0.0, 1.0))


def worst(log_weights_of):
    """The worst sites of standard normal draws with these log weights."""
    latents = torch.randn(NUM_DRAWS, 5, dtype=torch.float64)
    log_weights = log_weights_of(latents)
    return worst_sites(Layout(describe(three_sites, (), {})), latents, log_weights, log_weights.softmax(0))


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("shape", [lambda x: 0.4 * x, lambda x: 0.15 * (x**2 - 1)], ids=["shifted", "narrow"])
def test_the_site_that_is_off(place, shape):
    noise = 0.05 * torch.randn(NUM_DRAWS, dtype=torch.float64)
    found = worst(lambda x: shape(x[:, place]) + noise)
    assert [site.name for site in found] == ["abbbc"[place]]
    assert found[0].explained > 0.9


def test_moments_at_the_site():
    """Weights exp(0.4 x) move the mean of a standard normal to 0.4."""
    (site,) = worst(lambda x: 0.4 * x[:, 0])
    assert site.shift == pytest.approx(0.4, abs=0.05) and site.sd_ratio == pytest.approx(1, abs=0.05)
    (site,) = worst(lambda x: -0.3 * x[:, 0] ** 2)
    assert site.sd_ratio == pytest.approx(1 / math.sqrt(1.6), rel=0.03)


def test_two_sites_are_named_where_both_are_off():
    assert {site.name for site in worst(lambda x: 0.4 * x[:, 0] + 0.4 * x[:, 4])} == {"a", "c"}


def test_no_site_is_named_where_none_is_to_blame():
    assert worst(lambda x: 0.05 * torch.randn(NUM_DRAWS, dtype=torch.float64)) == []


def test_one_draw_with_all_the_weight():
    (site, *_) = worst(lambda x: torch.where(x[:, 0] == x[0, 0], 1e6, 0.01 * x[:, 0]))
    assert site.sd_ratio == 0 and "an sd by 100 %" in str(site)


def test_draws_without_weight_are_left_out():
    (site,) = worst(lambda x: torch.where(x[:, 2] > 1, -torch.inf, 0.4 * x[:, 0]))[:1]
    assert site.name in {"a", "b"} and math.isfinite(site.score)


# Forms


def forms(log_joint, latents, log_weights=None, names=()):
    log_weights = torch.zeros(len(latents)) if log_weights is None else log_weights
    return list(helpful_forms(log_joint, latents, log_weights, list(names)))


def centred():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("group", 6):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.arange(6.0))


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("D", 9):
        pyro.sample("x", dist.Normal(0.0, torch.exp(v / 2)))


def funnel_draws(log_joint):
    v = 3 * torch.randn(NUM_DRAWS, 1)
    return torch.cat([v, torch.exp(v / 2) * torch.randn(NUM_DRAWS, 9)], -1)


def normal_draws(log_joint):
    return torch.randn(NUM_DRAWS, log_joint.layout.dim)


@pytest.mark.parametrize(
    ("model", "draws", "pair"),
    [(centred, normal_draws, ("tau", "theta")), (funnel, funnel_draws, ("v", "x"))],
    ids=["positive scale", "log scale"],
)
def test_a_centred_hierarchy_is_named_with_its_way_out(model, draws, pair):
    log_joint = log_joint_of(model)
    (text, *_) = forms(log_joint, draws(log_joint))
    scale, scaled = pair
    assert f"site '{scale}' sets the scale of site '{scaled}'" in text
    assert f'poutine.reparam(model, config={{"{scaled}": LocScaleReparam(0.0)}})' in text


def test_the_form_is_code_that_runs():
    log_joint = log_joint_of(centred)
    (text, *_) = forms(log_joint, normal_draws(log_joint))
    names = {"model": centred, "poutine": poutine, "LocScaleReparam": LocScaleReparam}
    model = eval(text[text.index("poutine.reparam") :], names)
    assert "theta_decentered" in poutine.trace(model).get_trace().nodes


def non_centred():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("group", 6):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, 1.0), obs=torch.arange(6.0))


def location_alone():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", 6):
        pyro.sample("theta", dist.Normal(mu, 1.0))


def gamma_hierarchy():
    """A site that has no location, so that it has no non-centred form of this kind."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("group", 6):
        pyro.sample("theta", dist.Gamma(2.0, rate))


@pytest.mark.parametrize("model", [non_centred, location_alone, three_sites, gamma_hierarchy])
def test_no_centre_is_named_where_none_is_to_blame(model):
    log_joint = log_joint_of(model)
    assert forms(log_joint, normal_draws(log_joint)) == []


def two_hierarchies():
    for name in ("a", "b"):
        scale = pyro.sample(f"scale_{name}", dist.HalfNormal(1.0))
        pyro.sample(name, dist.Normal(torch.zeros(3), scale[..., None]).to_event(1))


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_hierarchy_of_the_worst_site_comes_first(name):
    log_joint = log_joint_of(two_hierarchies)
    assert f"the scale of site '{name}'" in forms(log_joint, normal_draws(log_joint), names=[name])[0]


def many_hierarchies():
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    for name in (*(f"w_{i}" for i in range(8, 12)), "b_1", "b_3", "b_4", "o'clock", 'a "b" {c}', "x01"):
        pyro.sample(name, dist.Normal(0.0, tau))


def test_all_sites_of_a_hierarchy_are_counted_and_reparametrised():
    log_joint = log_joint_of(many_hierarchies)
    (text,) = forms(log_joint, normal_draws(log_joint), names=["w_9"])
    assert text.startswith("site 'tau' sets the scale of site 'w_9', the first of 10 sites whose scale a latent sets: ")
    assert '*[f"w_{i}" for i in range(8, 12)]' in text and len(text) < 300
    names = {"model": many_hierarchies, "poutine": poutine, "LocScaleReparam": LocScaleReparam}
    nodes = poutine.trace(eval(text[text.index("poutine.reparam") :], names)).get_trace().nodes
    latents = {name for name, node in nodes.items() if node["type"] == "sample" and not node["is_observed"]}
    assert latents == {"tau"} | {
        f"{name}_decentered"
        for name in nodes
        if name in [s.name for s in log_joint.structure.latents] and name != "tau"
    }
    assert len(latents) == 11


def test_scales_that_lie_far_apart():
    log_joint = log_joint_of(three_sites)
    (text,) = forms(log_joint, torch.randn(NUM_DRAWS, 5) * torch.tensor([1e-4, 1.0, 1.0, 1.0, 200.0]))
    assert "from 0.0001 at site 'a' to 2e+02 at site 'c'" in text and "standardised" in text
    assert forms(log_joint, torch.randn(NUM_DRAWS, 5) * torch.tensor([0.01, 1.0, 1.0, 1.0, 2.0])) == []


@pytest.mark.parametrize(
    ("dtype", "size", "is_named"), [("float32", 1e5, True), ("float32", 1e3, False), ("float64", 1e5, False)]
)
def test_a_log_joint_that_float32_rounds(dtype, size, is_named):
    latents = torch.randn(NUM_DRAWS, 5, dtype=getattr(torch, dtype))
    found = forms(log_joint_of(three_sites), latents, torch.full((NUM_DRAWS,), -size))
    assert any("dtype=torch.float64" in text for text in found) == is_named


def test_a_model_that_raises_for_exchanged_values_is_described_all_the_same():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.ImproperUniform(constraints.real, (), ()))
        if ((a - b).abs() > 1e-3).any():
            raise RuntimeError("a and b must be equal")

    log_joint = log_joint_of(lambda: [pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))])
    log_joint.batched._model = model
    latents = torch.randn(NUM_DRAWS, 1).expand(-1, 2)
    assert forms(log_joint, latents) == []

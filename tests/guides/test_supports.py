"""Guides of models with angles, bounded supports behind transforms, and mass at the edges, under plain Pyro."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import TransformedDistribution as Transformed
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.infer.reparam import NeuTraReparam
from torch.distributions import AffineTransform

from pyroflows.guides import AutoFlow
from pyroflows.guides.neutra import ToDeclaredSpace
from pyroflows.models.log_joint import LogJoint

FLIP = AffineTransform(0.0, -1.0)


def on_circle():
    pyro.sample("phi", dist.VonMises(torch.tensor(3.0), 2.0))


def on_circles():
    """Angles in plates and events, beside a number and a debt, which is minus a half-normal."""
    pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("phi", dist.VonMises(torch.tensor([0.0, 2.0, -3.0]), 1.0))
        pyro.sample("pair", dist.SineBivariateVonMises(1.0, -2.0, 2.0, 3.0, 1.0))
    pyro.sample("debt", Transformed(dist.HalfNormal(1.0), [FLIP]))


def _trained(model, steps=300, **options):
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoFlow(model, **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(num_particles=16, vectorize_particles=True))
    for _ in range(steps):
        svi.step()
    return guide


def _elbo(model, guide, num=4000):
    with torch.no_grad():
        return -Trace_ELBO(num_particles=num, vectorize_particles=True, max_plate_nesting=1).loss(model, guide)


@pytest.mark.slow
def test_elbo_of_a_circle_is_below_its_evidence_and_near_it():
    guide = _trained(on_circle)
    elbo = _elbo(on_circle, guide)
    assert -0.05 < elbo < 0.02
    phi = Predictive(on_circle, guide=guide, num_samples=2000, parallel=True)()["phi"]
    assert ((phi > -math.pi) & (phi <= math.pi)).all()
    exact = dist.VonMises(3.0, 2.0).sample((20_000,))
    assert (phi - 3.0).cos().mean().item() == pytest.approx((exact - 3.0).cos().mean().item(), abs=0.06)


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()], ids=["trace", "mean field"])
def test_values_lie_in_the_true_supports(elbo):
    guide = AutoFlow(on_circles, init_scale=3.0)
    svi = SVI(on_circles, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert math.isfinite(svi.step())
    for _ in range(20):
        values = guide()
        assert values["phi"].shape == (3,)
        assert values["pair"].shape == (3, 2)
        assert values["phi"].abs().max() <= math.pi
        assert values["pair"].abs().max() <= math.pi
        assert values["debt"] <= 0


def test_trace_has_the_density_of_the_values():
    """The log-density of a traced guide is that of the flow, pushed onto circles and half lines."""
    guide = AutoFlow(on_circles)
    guide()
    trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    latent = trace.nodes["_AutoFlow_latent"]["value"]
    values, ladj = guide.layout.constrain(latent)
    torch.testing.assert_close(trace.log_prob_sum(), guide.get_posterior().log_prob(latent) - ladj)
    torch.testing.assert_close(trace.nodes["pair"]["value"], values["pair"])


def test_mask_leaves_out_the_density():
    guide = AutoFlow(on_circles)
    guide()
    with poutine.mask(mask=False):
        trace = poutine.trace(guide).get_trace()
    assert (trace.nodes["phi"]["fn"].log_density == 0).all()


def _angle_of(guide):
    with torch.no_grad():
        return guide.layout.constrain(torch.zeros(guide.layout.dim))[0]["phi"]


def test_centers_are_in_the_state():
    guide = AutoFlow(on_circles)
    guide()
    guide.center_at({"phi": torch.tensor([0.5, 1.0, 1.5])})
    fresh = AutoFlow(on_circles)
    fresh.load_state_dict(guide.state_dict())
    assert fresh.state_dict().keys() == guide.state_dict().keys()
    fresh()
    torch.testing.assert_close(_angle_of(fresh), torch.tensor([0.5, 1.0, 1.5]))
    built = AutoFlow(on_circles)
    built()
    built.load_state_dict(guide.state_dict())
    torch.testing.assert_close(_angle_of(built), _angle_of(guide))
    # A guide that was loaded and not called passes the centers on.
    again = AutoFlow(on_circles)
    loaded = AutoFlow(on_circles)
    loaded.load_state_dict(guide.state_dict())
    again.load_state_dict(loaded.state_dict())
    again()
    torch.testing.assert_close(_angle_of(again), _angle_of(guide))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))])
def test_copies_keep_the_centers(copied):
    guide = AutoFlow(on_circles)
    guide()
    guide.center_at({"phi": torch.tensor([0.5, 1.0, 1.5])})
    other = copied(guide)
    torch.testing.assert_close(_angle_of(other), _angle_of(guide))
    torch.testing.assert_close(other.median()["phi"], guide.median()["phi"], atol=0.2, rtol=0)


def test_param_store_of_another_process_serves_a_fresh_guide(tmp_path):
    """The centers of a guide follow from the model alone, so that the store, which has no buffers, is enough."""
    guide = _trained(on_circle, steps=20)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    pyro.set_rng_seed(1)
    fresh = AutoFlow(on_circle)
    fresh()
    torch.testing.assert_close(fresh.flow().log_prob(torch.ones(1)), guide.flow().log_prob(torch.ones(1)))
    torch.testing.assert_close(_angle_of(fresh), _angle_of(guide))


def test_initial_values_act():
    guide = AutoFlow(on_circle, init_loc_fn=init_to_value(values={"phi": torch.tensor(-2.0)}), init_scale=1e-3)
    guide()
    assert guide()["phi"].item() == pytest.approx(-2.0, abs=0.05)


def test_map_to_declared_space():
    guide = AutoFlow(on_circles)
    guide()
    transform = ToDeclaredSpace(guide.layout, guide.prototype_trace).double()
    u = torch.randn(guide.layout.dim, dtype=torch.float64)
    x, ladj = transform.forward_and_ladj(u)
    jacobian = torch.autograd.functional.jacobian(transform, u)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(transform.inv(x), u)


def test_neutra_has_the_log_joint_of_the_true_supports():
    guide = AutoFlow(on_circles, init_scale=1.0)
    guide()
    neutra = NeuTraReparam(guide)
    z = torch.randn(guide.layout.dim)
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(neutra.reparam(on_circles), data={"x_shared_latent": z})).get_trace()
        u, ladj = guide.flow.transform.forward_and_ladj(z)
        log_joint = LogJoint(on_circles, (), {}, guide.layout, torch.zeros(1, guide.layout.dim))
        torch.testing.assert_close(trace.log_prob_sum(), log_joint(u[None])[0] + ladj)
        torch.testing.assert_close(neutra.transform_sample(z)["pair"], guide.layout.constrain(u)[0]["pair"])


@pytest.mark.slow
def test_neutra_draws_the_posterior_of_an_angle():
    """Pyro's handler knows the declared support alone, and gets values that it maps to the right ones."""

    def model():
        phi = pyro.sample("phi", dist.VonMises(torch.tensor(3.0), 1.0))
        debt = pyro.sample("debt", Transformed(dist.HalfNormal(1.0), [FLIP]))
        pyro.sample("y", dist.Normal(phi.cos() + debt, 0.5), obs=torch.tensor(-1.0))

    guide = _trained(model, steps=200)
    neutra = NeuTraReparam(guide)
    kernel = NUTS(neutra.reparam(model))
    mcmc = MCMC(kernel, num_samples=400, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    draws = neutra.transform_sample(next(iter(mcmc.get_samples().values())))
    assert draws["phi"].abs().max() <= math.pi
    assert draws["debt"].max() <= 0
    grid = torch.linspace(-math.pi, math.pi, 801)[:-1]
    debt = -torch.linspace(0, 5, 501)[:, None]
    log_p = dist.VonMises(3.0, 1.0).log_prob(grid) + dist.HalfNormal(1.0).log_prob(-debt)
    p = (log_p + dist.Normal(grid.cos() + debt, 0.5).log_prob(torch.tensor(-1.0))).exp()
    mean, mean_square = ((p * v).sum() / p.sum() for v in (debt, debt**2))
    # 400 draws of a chain are worth 100 at least.
    assert draws["debt"].mean().item() == pytest.approx(mean.item(), abs=4 * (mean_square - mean**2).item() ** 0.5 / 10)
    assert draws["phi"].cos().mean().item() == pytest.approx((p * grid.cos()).sum().item() / p.sum().item(), abs=0.25)


@pytest.mark.slow
def test_elbo_with_mass_at_the_edge_is_no_more_than_the_evidence():
    """Pyro's log-density sees the rounded value, which makes the bound looser and never wrong."""

    def model():
        p = pyro.sample("p", dist.Beta(0.3, 0.3))
        pyro.sample("k", dist.Binomial(20, p), obs=torch.tensor(20.0))

    exact = dist.BetaBinomial(0.3, 0.3, 20).log_prob(torch.tensor(20.0)).item()
    guide = _trained(model, steps=400)
    assert exact - 0.5 < _elbo(model, guide) < exact + 0.05

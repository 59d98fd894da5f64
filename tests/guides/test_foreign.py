"""Guides made of other libraries' flows: Pyro's and torch's transforms, Zuko's flows."""

import copy
import math
import pickle
import subprocess
import sys

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.distributions import transforms as T
from pyro.infer import Predictive, Trace_ELBO
from torch.distributions import AffineTransform, ComposeTransform, SigmoidTransform, TanhTransform

import pyroflows as pf
from pyroflows.errors import FlowError, InversionError, ShapeError
from pyroflows.guides import AutoFlow
from pyroflows.training.objective import trained_parameters
from tests.guides.models import (
    Y,
    assert_same_draws,
    changed,
    fit,
    groups,
    parameters,
    perturb,
    regression,
    regression_log_joint,
)


def zuko_flow(family, **options):
    """A factory of Zuko flows; the import is here, since it changes settings of torch for the whole process."""

    def factory(dim, context=0):
        zuko = pytest.importorskip("zuko")
        return getattr(zuko.flows, family)(dim, context, transforms=2, hidden_features=(8, 8), **options)

    return factory


FLOWS = {
    "own": lambda dim: pf.flows.IAF(dim, num_layers=2, hidden_dims=(8, 8)),
    "own-student-t": lambda dim: pf.flows.Planar(dim, num_layers=2, base="student_t"),
    "own-layers": lambda dim: [pf.transforms.Planar(dim), pf.transforms.Radial(dim).inv],
    "pyro-one": T.affine_autoregressive,
    "pyro-list": lambda dim: [T.affine_autoregressive(dim), T.affine_autoregressive(dim)],
    "pyro-inverse": lambda dim: T.affine_autoregressive(dim).inv,
    "pyro-spline": lambda dim: [T.spline(dim)],
    "pyro-spline-coupling": lambda dim: [
        T.spline_coupling(dim),
        T.Permute(torch.arange(dim).flip(0)),
        T.spline_coupling(dim),
    ],
    "pyro-affine-coupling": lambda dim: T.affine_coupling(dim),
    "pyro-compose": lambda dim: dist.transforms.ComposeTransformModule([T.affine_autoregressive(dim), T.spline(dim)]),
    "torch-compose": lambda dim: ComposeTransform(
        [T.affine_autoregressive(dim), AffineTransform(torch.ones(dim), 2.0)]
    ),
    "torch-compose-inverse": lambda dim: ComposeTransform([T.affine_autoregressive(dim), T.spline(dim)]).inv,
    "torch-without-parameters": lambda dim: AffineTransform(torch.ones(dim), 2.0),
    "torch-elementwise": lambda dim: [T.affine_autoregressive(dim), TanhTransform(), AffineTransform(0.0, 3.0)],
    "mixed": lambda dim: [T.affine_autoregressive(dim), pf.transforms.Planar(dim), AffineTransform(0.5, 2.0)],
    "zuko-maf": zuko_flow("MAF"),
    "zuko-nsf": zuko_flow("NSF", bins=4),
}
ZUKO = [name for name in FLOWS if name.startswith("zuko")]

all_flows = pytest.mark.parametrize("flow", FLOWS)


@pytest.fixture(autouse=True)
def _validation():
    """Zuko's import switches validation off for the process; other tests must not depend on its order."""
    yield
    pyro.enable_validation(True)


def guide_of(flow, model=regression):
    guide = AutoFlow(model, FLOWS[flow])
    guide()
    return guide


@all_flows
def test_parameters_are_found_and_trained(flow):
    """All that the other library's module has, and the location and scale of the guide's own last layer."""
    guide = guide_of(flow)
    made = FLOWS[flow](2)
    parts = made if isinstance(made, list) else [made]
    transforms = [p for part in parts for p in getattr(part, "parts", [part])]
    # Of a Pyro inverse the parameters are those of what it inverts.
    modules = [t if isinstance(t, torch.nn.Module) else t.inv for t in transforms]
    expected = sum(p.numel() for m in modules if isinstance(m, torch.nn.Module) for p in trained_parameters(m))
    if flow == "torch-compose-inverse":
        expected = sum(p.numel() for t in (T.affine_autoregressive(2), T.spline(2)) for p in t.parameters())
    assert sum(parameter.numel() for parameter in guide.parameters()) == expected + 4
    before = parameters(guide)
    losses = fit(regression, guide, steps=4)
    assert all(math.isfinite(loss) for loss in losses)
    # A linear layer whose outputs are all masked, as of the first variable, stays.
    assert len(changed(guide, before)) >= 0.8 * len(before)
    assert next(reversed(before)) in changed(guide, before)


# In float32, since Pyro's autoregressive layers invert in no other dtype than the default one.


@all_flows
def test_loss_by_hand(flow):
    """The same noise through the transforms themselves, with autograd's Jacobian for the log-determinant."""
    guide = perturb(guide_of(flow), 0.1)
    torch.manual_seed(1)
    loss = Trace_ELBO().loss(regression, guide)
    torch.manual_seed(1)
    base = guide.get_base_dist()
    z = base.sample()
    u = guide.flow.transform(z)
    ladj = torch.linalg.slogdet(torch.autograd.functional.jacobian(guide.flow.transform, z)).logabsdet
    expected = base.log_prob(z) - ladj - regression_log_joint(u)
    assert loss == pytest.approx(expected.item(), rel=1e-4)


@all_flows
def test_density_scores_any_value(flow):
    """Draws scored afresh, by the inverse, and as they were made."""
    guide = perturb(guide_of(flow), 0.1)
    with torch.no_grad():
        x, log_q = guide.get_posterior().rsample_and_log_prob((20,))
        torch.testing.assert_close(guide.get_posterior().log_prob(x.clone()), log_q, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(guide.get_posterior().log_prob(x.flip(0)), log_q.flip(0), rtol=1e-3, atol=1e-3)


@all_flows
def test_copies_after_training(flow):
    """Nothing that a transform remembers of its last call is in the way, and copies share no parameters."""
    guide = guide_of(flow)
    fit(regression, guide)
    u = guide._init_loc()  # a flow with bounds need not reach zero
    guide.get_posterior().log_prob(u)
    for copied in (copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))):
        other = copied(guide)
        assert_same_draws(guide, other)
        expected = guide.get_posterior().log_prob(u).detach()
        torch.testing.assert_close(other.get_posterior().log_prob(u), expected, rtol=0, atol=0)
        perturb(other)
        assert not torch.equal(other.get_posterior().log_prob(u), expected)
        torch.testing.assert_close(guide.get_posterior().log_prob(u), expected, rtol=0, atol=0)


@all_flows
def test_state_dict_of_a_fresh_guide(flow):
    guide = guide_of(flow)
    fit(regression, guide)
    fresh = AutoFlow(regression, FLOWS[flow])
    fresh.load_state_dict(guide.state_dict())
    fresh(Y)
    assert_same_draws(fresh, guide, Y)


@all_flows
def test_nothing_is_stale(flow):
    """A value scored before and after each step of an optimiser, in both directions."""
    guide = guide_of(flow)
    optimiser = torch.optim.SGD(guide.parameters(), lr=0.01)
    u = guide._init_loc() + 0.01  # a flow with bounds need not reach zero
    z = guide.get_base_dist().sample()
    for _ in range(2):
        log_prob, x = guide.get_posterior().log_prob(u), guide.flow.transform(z)
        optimiser.zero_grad()
        Trace_ELBO().differentiable_loss(regression, guide).backward()
        optimiser.step()
        assert guide.get_posterior().log_prob(u) != log_prob
        assert not torch.equal(guide.flow.transform(z), x)


@all_flows
@pytest.mark.parametrize("vectorize", [False, True])
def test_works_with_particles_and_predictive(flow, vectorize):
    guide = guide_of(flow)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorize)
    assert all(math.isfinite(loss) for loss in fit(regression, guide, elbo=elbo))
    draws = Predictive(regression, guide=guide, num_samples=3, parallel=vectorize)()
    assert draws["mu"].numel() == 3


@pytest.mark.parametrize("flow", [name for name in FLOWS if "inverse" not in name])
def test_follows_the_dtype_of_the_model(flow):
    guide = guide_of(flow, groups)
    fit(groups, guide)
    assert {value.dtype for value in guide().values()} == {torch.float64}
    assert {p.dtype for p in guide.parameters()} == {torch.float64}


# Zuko


@pytest.mark.parametrize("flow", ZUKO)
def test_zuko_leaves_validation_on(flow):
    zuko_flow("MAF")(2)
    # What its import does, which happens once a process.
    torch.distributions.Distribution.set_default_validate_args(False)
    guide = guide_of(flow)
    fit(regression, guide)
    with pytest.raises(ValueError, match="constraint"):
        dist.Normal(0.0, -1.0)
    with pytest.raises(ValueError, match="constraint"):
        torch.distributions.Normal(0.0, -1.0)


def test_zuko_leaves_validation_on_in_a_fresh_process():
    pytest.importorskip("zuko")
    code = """
import torch, zuko
from pyro import distributions as dist
from pyroflows.flows.conversion import as_flow
as_flow(zuko.flows.MAF(2), 2)
dist.Normal(0.0, -1.0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: Expected parameter scale" in result.stderr


@pytest.mark.parametrize("flow", ZUKO)
def test_zuko_does_not_switch_on_what_the_user_switched_off(flow):
    with pyro.validation_enabled(False):
        guide_of(flow)
        dist.Normal(0.0, -1.0)


@pytest.mark.parametrize("flow", ZUKO)
def test_zuko_base_moves_into_the_flow(flow):
    """Its tensors are buffers, so the state has them and a change of dtype takes them along."""
    guide = guide_of(flow).double()
    assert guide.get_base_dist().sample().dtype == torch.float64
    assert any("base" in name for name in guide.state_dict())


# What does not fit


@pytest.mark.parametrize(
    "flow_fn",
    [
        lambda dim: pf.flows.IAF(dim + 1),
        lambda dim: [pf.transforms.Planar(dim + 1)],
        lambda dim: [pf.transforms.Planar(dim), pf.transforms.Planar(dim + 1)],
        lambda dim: zuko_flow("MAF")(dim + 1),
        lambda dim: T.affine_autoregressive(dim + 1),
        lambda dim: T.affine_autoregressive(dim + 1).inv,
        lambda dim: [T.spline(dim + 1)],
        lambda dim: [T.spline_coupling(dim + 1)],
        lambda dim: ComposeTransform([AffineTransform(torch.zeros(dim + 1), 1.0)]),
    ],
    ids=["own", "own-layer", "own-layers", "zuko", "pyro", "pyro-inverse", "pyro-spline", "pyro-coupling", "torch"],
)
def test_flow_of_another_dimension_raises(flow_fn):
    with pytest.raises(ShapeError, match="dim|must agree"):
        AutoFlow(regression, flow_fn)()


@pytest.mark.parametrize(
    "flow_fn",
    [lambda dim: pf.flows.IAF(dim, context_dim=1), lambda dim: zuko_flow("MAF")(dim, 1)],
    ids=["own", "zuko"],
)
def test_flow_with_a_context_raises(flow_fn):
    with pytest.raises(ShapeError, match="context"):
        AutoFlow(regression, flow_fn)()


@pytest.mark.parametrize(
    "result", [None, "iaf", 3, [None], torch.nn.Linear(2, 2), dist.Normal(0.0, 1.0)], ids=lambda r: type(r).__name__
)
def test_flow_fn_that_returns_no_flow_raises(result):
    with pytest.raises(FlowError, match=type(result[0] if isinstance(result, list) else result).__name__):
        AutoFlow(regression, lambda dim: result)()


def test_transform_that_is_no_bijection_raises():
    with pytest.raises(FlowError, match="bijection"):
        AutoFlow(regression, lambda dim: [torch.distributions.AbsTransform()])()


def test_transform_without_an_inverse_trains_but_does_not_score():
    """Pyro's planar flow: the guide draws and scores what it drew; another value raises, with the layer's name."""
    guide = AutoFlow(regression, lambda dim: [T.planar(dim)])
    assert all(math.isfinite(loss) for loss in fit(regression, guide))
    with pytest.raises(InversionError, match="Planar"):
        guide.get_posterior().log_prob(torch.zeros(2))


def test_bounded_flow_covers_a_bounded_region():
    """A flow that ends in a sigmoid is stretched by the guide's last layer; values outside of it have no density."""
    guide = AutoFlow(regression, lambda dim: [T.affine_autoregressive(dim), SigmoidTransform()], init_scale=2.0)
    assert all(math.isfinite(loss) for loss in fit(regression, guide))
    x = guide.get_posterior().sample((1000,))
    assert (x.max(0).values - x.min(0).values < 2.5).all()

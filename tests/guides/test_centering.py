"""The layer of learned centring: the laws of layers, and guides whose flow has one."""

import copy
import pickle

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflows import CheckpointError, ModelError
from pyroflows.flows import Flow, Recipe
from pyroflows.guides import AutoFlow
from pyroflows.guides.centering import Centering, centerings
from pyroflows.guides.packed import flow_near
from pyroflows.models.layout import Layout
from pyroflows.models.structure import describe

Y = torch.tensor([1.0, -2.0, 0.5])


def schools(y, loc=0.0):
    mu = pyro.sample("mu", dist.Normal(loc, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones_like(y[0])))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu + loc, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def layer(dtype=torch.float64):
    args = (Y.to(dtype),)
    layout = Layout(describe(schools, args, {}))
    made = Centering.of(schools, args, {}, layout, torch.zeros(layout.dim, dtype=dtype))
    return made.at(torch.rand(layout.dim, dtype=dtype))


def guide_with_centering(*args):
    """A built guide, as a fit leaves it."""
    guide = AutoFlow(schools, Recipe("Planar", num_layers=1))
    guide(Y, *args)
    centering = Centering.of(schools, (Y, *args), {}, guide.layout, torch.zeros(5))
    start = torch.tensor([0.3, -0.5, 0.1, -0.2, 0.2]), 0.3 * torch.eye(5)
    guide.hold(flow_near(guide.flow_fn, *start, centering.at(torch.tensor([0.0, 0.0, 0.2, 0.4, 0.6]))), guide.flow_fn)
    return guide


@pytest.mark.parametrize("batch_shape", [(), (7,), (3, 2), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shapes_dtypes_and_the_inverse(batch_shape, dtype):
    t = layer(dtype)
    v = torch.randn(*batch_shape, 5, dtype=dtype)
    u, ladj = t.forward_and_ladj(v)
    assert u.shape == v.shape and ladj.shape == batch_shape and u.dtype == ladj.dtype == dtype
    again, inverse_ladj = t.inverse_and_ladj(u)
    close = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close((again, inverse_ladj), (v, -ladj), rtol=close, atol=close)


def test_the_log_determinant_is_that_of_the_jacobian():
    t, v = layer(), torch.randn(5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(t, v)
    torch.testing.assert_close(t.forward_and_ladj(v)[1], torch.linalg.slogdet(jacobian)[1])


def test_the_score_is_the_gradient_of_the_log_density():
    t, z = layer(), torch.randn(7, 5, dtype=torch.float64)
    x, _, score = t.forward_and_score(z, -z)
    x = x.detach().requires_grad_()
    again, ladj = t.inverse_and_ladj(x)
    (expected,) = torch.autograd.grad(ladj.sum() - again.square().sum() / 2, x)
    torch.testing.assert_close(score, expected)


def test_a_recording_equals_the_layer():
    t = layer()
    z, other = torch.randn(2, 7, 5, dtype=torch.float64)
    graph = make_fx(lambda z: t.forward_and_score(z, -z))(z)
    with torch.no_grad():
        torch.testing.assert_close(graph(other), t.forward_and_score(other, -other))


def test_gradients_reach_values_and_centredness():
    t, z = layer(), torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def results(z, c):
        return torch.func.functional_call(t, {"centredness": c}, (z,))

    assert torch.autograd.gradcheck(results, (z, t.centredness))


def test_a_law_is_bound_to_the_centredness_of_its_call():
    flow = Flow([layer()], standardize=False)
    law, x = flow(), flow().sample()
    before = law.log_prob(x)
    centredness = torch.zeros(5, dtype=torch.float64)
    other = torch.func.functional_call(flow, {"transform.layers.0.centredness": centredness}, ())
    assert torch.equal(law.log_prob(x), before)
    expected = Flow([layer().at(centredness)], standardize=False)().log_prob(x)
    torch.testing.assert_close(other.log_prob(x), expected)


def test_copies_share_the_model_but_not_the_centredness():
    t, v = layer(), torch.randn(3, 5, dtype=torch.float64)
    copied = copy.deepcopy(t)
    assert copied._forms is t._forms
    assert torch.equal(copied(v), t(v))
    with torch.no_grad():
        t.centredness += 1.0
    assert not torch.equal(copied(v), t(v))


def test_a_pickled_layer_has_lost_its_model():
    t = pickle.loads(pickle.dumps(layer()))
    with pytest.raises(ModelError, match=r"'theta'.*has lost its model"):
        t(torch.randn(5, dtype=torch.float64))


def test_constant_priors_have_no_layer():
    def model():
        pyro.sample("x", dist.Normal(torch.arange(3.0), 2.0).to_event(1))

    assert Centering.of(model, (), {}, Layout(describe(model, (), {})), torch.zeros(3)) is None


def test_a_guide_works_in_pyro():
    guide = guide_with_centering()
    for options in ({}, {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}):
        svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(**options))
        before = centerings(guide.flow)[0].centredness.detach().clone()
        assert torch.isfinite(torch.tensor(svi.step(Y)))
        assert not torch.equal(centerings(guide.flow)[0].centredness, before)
    assert Predictive(schools, guide=guide, num_samples=4)(Y)["theta"].shape == (4, 3)
    names = {name for name, node in poutine.trace(guide).get_trace(Y).nodes.items() if node["type"] == "sample"}
    assert names == {"_AutoFlow_latent", "school", "mu", "tau", "theta"}


def test_a_state_builds_the_layer_before_the_model_is_known():
    guide = guide_with_centering()
    fresh = AutoFlow(schools, guide.flow_fn)
    fresh.load_state_dict(guide.state_dict())
    assert not centerings(fresh.flow)[0].is_bound
    fresh(Y)
    torch.manual_seed(0)
    expected = guide.flow().sample((3,))
    torch.manual_seed(0)
    assert torch.equal(fresh.flow().sample((3,)), expected)


def test_a_state_with_learned_centring_needs_a_flow_with_it():
    plain = AutoFlow(schools, Recipe("Planar", num_layers=1))
    plain.start_at(torch.zeros(5), torch.eye(5), Y)
    with pytest.raises(CheckpointError, match=r"learned centring of the sites \['theta'\]"):
        plain.load_state_dict(guide_with_centering().state_dict())


def test_other_priors_are_noticed():
    t = centerings(guide_with_centering().flow)[0]
    t.note_priors()
    t.require_priors()
    t.bind(centerings(guide_with_centering(0.5).flow)[0]._forms)
    with pytest.raises(CheckpointError, match=r"priors of the sites \['theta'\].*are other ones"):
        t.require_priors()

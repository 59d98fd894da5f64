"""Models under effect handlers are fitted as Pyro's own guides fit them, on the sites of the finished trace."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.infer.reparam import LocScaleReparam, TransformReparam

import pyroflows as pf
from pyroflows.errors import ModelError
from pyroflows.guides import AutoFlow
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe
from tests.guides.handled import FLOW, HANDLED, Y, flow_prior, groups, handler_inside_a_plate, vectors_inside_a_plate
from tests.guides.test_models import trainable


@pytest.mark.parametrize("name", HANDLED)
def test_guide_has_the_sites_of_pyros_own(name):
    model, _, _ = HANDLED[name]
    guide = trainable(AutoFlow, model)
    shapes = {site: value.shape for site, value in guide().items()}
    assert shapes == {site: value.shape for site, value in AutoNormal(model)().items()}


@pytest.mark.parametrize("name", HANDLED)
def test_replaced_sites_are_not_observed(name):
    model, deterministic, observed = HANDLED[name]
    structure = describe(model, (), {})
    assert [site.name for site in structure.deterministic] == deterministic
    assert [site.name for site in structure.observed] == observed


@pytest.mark.parametrize("name", HANDLED)
def test_log_joint_of_a_batch(name):
    """Runs for all draws at once give what single runs give, replaced sites included."""
    model, deterministic, _ = HANDLED[name]
    layout = Layout(describe(model, (), {}))
    vectors = torch.randn(6, layout.dim)
    log_joint = LogJoint(model, (), {}, layout, vectors)
    assert log_joint.batched.mode in ("plate", "paths")
    values, ladj = layout.constrain(vectors)
    record = log_joint.batched(values, 6)
    for i, found in enumerate(log_joint(vectors)):
        given = {site: value[i] for site, value in values.items()}
        trace = poutine.trace(poutine.condition(model, given)).get_trace()
        torch.testing.assert_close(found, trace.log_prob_sum() + ladj[i], rtol=1e-4, atol=1e-4)
        for site in deterministic:
            torch.testing.assert_close(record.values[site][i], trace.nodes[site]["value"], rtol=1e-4, atol=1e-4)


def test_reparametrised_log_joint_is_that_of_the_model():
    """With x = t x_0, the log joint of (t, x_0) is that of (t, x) plus log |det dx/dx_0| = n log t."""
    layout, plain = (Layout(describe(model, (), {})) for model in (handler_inside_a_plate, groups))
    u = torch.randn(4, 1 + len(Y))
    t = u[:, :1].exp()
    moved = torch.cat([u[:, :1], t * u[:, 1:]], -1)
    found = LogJoint(handler_inside_a_plate, (), {}, layout, u)(u)
    expected = LogJoint(groups, (), {}, plain, moved)(moved) + len(Y) * u[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [handler_inside_a_plate, vectors_inside_a_plate])
def test_replaced_sites_keep_their_plates(model):
    (site,) = describe(model, (), {}).deterministic
    assert site.plate_names == ("rows",)


def test_posterior_of_a_replaced_site():
    y = Y[:3]
    posterior = pf.FlowVI(handler_inside_a_plate, seed=0, num_steps=20, progress_bar=False).run(y)
    draws = posterior.sample(7)
    assert {name: value.shape for name, value in draws.items()} == {"t": (7,), "x_decentered": (7, 3), "x": (7, 3)}
    torch.testing.assert_close(draws["x"], draws["t"][:, None] * draws["x_decentered"])
    assert posterior.predictive(5).keys() >= {"y"}


# Initial values


def test_values_of_the_original_site_reach_a_handler_inside_a_plate():
    x = torch.linspace(-1, 1, len(Y))
    init = init_to_value(values={"t": torch.tensor(2.0), "x": x})
    guide = AutoFlow(handler_inside_a_plate, init_loc_fn=init, init_scale=1e-6)
    torch.testing.assert_close(guide()["x_decentered"], x / 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_extra", [1, 2])
def test_initial_values_may_have_leading_dimensions_of_one(num_extra):
    values = {"t": torch.full((1,) * num_extra, 2.0), "x": Y.reshape((1,) * num_extra + Y.shape)}
    guide = AutoFlow(groups, init_loc_fn=init_to_value(values=values), init_scale=1e-6)
    torch.testing.assert_close(guide()["t"], torch.tensor(2.0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(guide()["x"], Y, atol=1e-4, rtol=1e-4)


def test_initial_value_of_a_wrong_shape_raises_where_it_broadcasts_too():
    """It would fit the data, five numbers for one latent, and make another model."""
    init = init_to_value(values={"t": torch.ones(5)})
    with pytest.raises(ModelError, match=r"'t'.*\(5,\)"):
        AutoFlow(groups, init_loc_fn=init)()


# A flow as the law of a site


@pytest.mark.parametrize("in_plate", [False, True])
def test_transform_reparam_of_a_flow_with_context(in_plate):
    """z_base follows the base, z = t(z_base), and the two densities differ by the log-determinant."""
    flow = pf.flows.MAF(2, context_dim=3, num_layers=2, hidden_dims=(8,))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    context = torch.randn(4, 3)

    def model():
        if in_plate:
            with pyro.plate("rows", 4):
                return pyro.sample("z", flow(context))
        return pyro.sample("z", flow(context[0]))

    trace = poutine.trace(poutine.reparam(model, {"z": TransformReparam()})).get_trace()
    base, z = trace.nodes["z_base"], trace.nodes["z"]["value"]
    law = flow(context) if in_plate else flow(context[0])
    x, log_q = law.transport(base["value"])
    torch.testing.assert_close(z, x)
    moved, ladj = base["value"], 0.0
    for transform in law.transforms:
        before, moved = moved, transform(moved)
        ladj = ladj + transform.log_abs_det_jacobian(before, moved)
    torch.testing.assert_close(base["fn"].log_prob(base["value"]) - ladj, log_q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(law.log_prob(z), log_q, rtol=1e-4, atol=1e-4)


def test_a_flow_is_a_transformed_distribution():
    law = FLOW().expand((3,))
    assert isinstance(law, torch.distributions.TransformedDistribution)
    assert law.base_dist.batch_shape == (3,)
    by_hand = dist.TransformedDistribution(law.base_dist, law.transforms)
    x = law.sample()
    torch.testing.assert_close(by_hand.log_prob(x), law.log_prob(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError):
        law.cdf(x)


def test_a_flow_stays_one_under_other_handlers():
    structure = describe(poutine.reparam(flow_prior, {"other": LocScaleReparam()}), (), {})
    assert [(site.name, site.family, site.is_flat) for site in structure.latents] == [("z", "FlowDistribution", False)]

"""A distribution is that of the tensors that its flow holds when it is made, and no density of it is ever stale."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as pyro_transforms
from torch import nn
from torch.func import functional_call, grad, hessian, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import pyroflows as pf
from pyroflows.transforms.binding import Binding, Places
from tests.flows.programs import rows
from tests.transforms.registry import perturb


class LearnedNormal(nn.Module):
    """A base whose law is computed from its parameters."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def forward(self):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


def _normal():
    return dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)


SMALL = {"num_layers": 2, "hidden_dims": (8,)}
FLOWS = {
    "maf": lambda: pf.flows.MAF(2, **SMALL),
    "iaf": lambda: pf.flows.IAF(2, **SMALL),
    "nsf": lambda: pf.flows.NSF(2, **SMALL),
    "naf": lambda: pf.flows.NAF(2, num_layers=1, hidden_dims=(8,)),
    "planar": lambda: pf.flows.Planar(2, num_layers=2),
    "positive": lambda: pf.flows.NSF(2, support=dist.constraints.positive, **SMALL),
    "student-t": lambda: pf.flows.MAF(2, base="student_t", **SMALL),
    "base-parameter": lambda: pf.flows.MAF(2, base=dist.Normal(nn.Parameter(torch.zeros(2)), 1.0).to_event(1), **SMALL),
    "base-module": lambda: pf.flows.NSF(2, base=LearnedNormal(), **SMALL),
    "base-flow": lambda: pf.Flow([pf.transforms.Planar(2)], base=pf.flows.MAF(2, **SMALL)),
    "pyro": lambda: pf.Flow([pyro_transforms.affine_coupling(2, hidden_dims=[4])], base=_normal()),
    "pyro-inverse": lambda: pf.Flow([pyro_transforms.affine_coupling(2, hidden_dims=[4]).inv], base=_normal()),
}
all_flows = pytest.mark.parametrize("name", FLOWS)
# Pyro's own layers read values of tensors.
vmapped_flows = pytest.mark.parametrize("name", [name for name in FLOWS if not name.startswith("pyro")])


def two(name):
    """Two flows that differ in their parameters."""
    return [perturb(FLOWS[name]().double(), 0.4) for _ in range(2)]


def state_of(flow):
    return {**dict(flow.named_parameters()), **dict(flow.named_buffers())}


def points(*shape):
    return torch.rand(*shape, 2, dtype=torch.float64) + 0.1


# Each of these gives log-densities of a law at x in another way.
USES = {
    "log_prob": lambda law, x: law.log_prob(x),
    "estimated": lambda law, x: law.estimated().log_prob(x),
    "expand": lambda law, x: law.expand((5,)).log_prob(x),
    "transforms": lambda law, x: dist.TransformedDistribution(law.base_dist, law.transforms).log_prob(x),
    "transform": lambda law, x: law.base.log_prob(law.transform.inv(x)) + law.transform.inverse_and_ladj(x)[1],
    "latent": lambda law, x: law.transport(law.latent(x))[1],
    "deepcopy": lambda law, x: copy.deepcopy(law).log_prob(x),
    "pickle": lambda law, x: pickle.loads(pickle.dumps(law)).log_prob(x),
}


@pytest.mark.grid(name=FLOWS, use=USES)
def test_a_functional_call_uses_the_given_tensors(name, use):
    flow, other = two(name)
    x = points(5)
    law = functional_call(flow, state_of(other), ())
    torch.testing.assert_close(USES[use](law, x), other().log_prob(x))
    assert (other().log_prob(x) - flow().log_prob(x)).abs().max() > 0.01


@all_flows
def test_a_functional_call_samples_with_the_given_tensors(name):
    flow, other = two(name)
    law = functional_call(flow, state_of(other), ())
    for draw in ("sample", "rsample", "rsample_and_log_prob"):
        drawn = []
        for q in (law, other()):
            torch.manual_seed(1)
            drawn.append(getattr(q, draw)((3,)))
        torch.testing.assert_close(*drawn)
    x = law.rsample((3,))
    torch.testing.assert_close(law.log_prob(x), other().log_prob(x.clone()))


@vmapped_flows
def test_vmap_over_stacked_parameters(name):
    members = two(name)
    x = points(5)
    skeleton = copy.deepcopy(members[0])
    stacked = stack_module_state(members)
    found = vmap(lambda *state: functional_call(skeleton, state, ()).log_prob(x))(*stacked)
    torch.testing.assert_close(found, torch.stack([member().log_prob(x) for member in members]))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[0], found[1])


@all_flows
def test_gradients_in_the_given_parameters(name):
    flow, _ = two(name)
    x = points(5)
    given = {key: value.detach() for key, value in flow.named_parameters()}
    found = grad(lambda p: functional_call(flow, p, ()).log_prob(x).mean())(given)
    expected = torch.autograd.grad(flow().log_prob(x).mean(), list(flow.parameters()))
    for key, gradient in zip(given, expected, strict=True):
        torch.testing.assert_close(found[key], gradient)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_hessian_in_the_given_parameters():
    """Of a normal with a learned location the mean log-density has the Hessian -1 / scale^2."""
    flow = pf.Flow([pf.transforms.Permutation([1, 0])], base=LearnedNormal()).double()
    fixed = {key: value.detach() for key, value in flow.named_parameters()}
    fixed["base.log_scale"] = torch.tensor([0.0, 0.5], dtype=torch.float64)
    x = rows(5)

    def mean(loc):
        return functional_call(flow, {**fixed, "base.loc": loc}, ()).log_prob(x).mean()

    expected = -torch.diag((-2 * fixed["base.log_scale"]).exp())
    torch.testing.assert_close(hessian(mean)(torch.zeros(2, dtype=torch.float64)), expected)


def test_a_context_and_gradients_to_what_parameters_are_computed_from():
    flow, other = (perturb(pf.flows.NSF(2, context_dim=1, **SMALL).double(), 0.4) for _ in range(2))
    context, x = rows(5, dim=1), rows(5)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    law = functional_call(flow, {key: scale * value for key, value in other.named_parameters()}, (context,))
    torch.testing.assert_close(law.log_prob(x), other(context).log_prob(x))
    assert torch.autograd.grad(law.log_prob(x).sum(), scale)[0] != 0
    torch.testing.assert_close(law.transforms[-1].inv(x), other(context).transforms[-1].inv(x))


def test_inside_a_pyro_model():
    flow = perturb(pf.flows.MAF(2, **SMALL).double(), 0.4)
    x = rows(50)
    pyro.clear_param_store()

    def model():
        factor = pyro.param("factor", torch.tensor(1.0, dtype=torch.float64))
        pyro.module("flow", flow)
        given = {key: factor * value for key, value in flow.named_parameters()}
        with pyro.plate("rows", len(x)):
            pyro.sample("x", functional_call(flow, given, ()), obs=x)

    trace = pyro.poutine.trace(model).get_trace()
    factor, *others = torch.autograd.grad(
        trace.log_prob_sum(), [pyro.param("factor").unconstrained(), *flow.parameters()], allow_unused=True
    )
    assert factor != 0 and any(gradient is not None for gradient in others)
    svi = pyro.infer.SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    first = svi.step()
    assert pyro.param("factor") != 1 and svi.step() < first
    pyro.clear_param_store()


class RandomNormal(nn.Module):
    """A base with a random location, as a model of Pyro may have one."""

    def forward(self):
        return dist.Normal(pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1)), 1.0).to_event(1)


def test_a_base_with_a_sample_site_is_called_once():
    flow = pf.Flow([pf.transforms.Planar(2)], base=RandomNormal())
    trace = pyro.poutine.trace(lambda: pyro.sample("x", flow())).get_trace()
    assert list(trace.nodes)[:2] == ["_INPUT", "loc"]
    expected = dist.Normal(trace.nodes["loc"]["value"], 1.0).to_event(1)
    law, x = trace.nodes["x"]["fn"], torch.randn(5, 2)
    torch.testing.assert_close(law.log_prob(x), expected.log_prob(x))


def test_laws_of_one_flow_score_in_several_threads():
    flow, *others = (perturb(pf.flows.MAF(2, **SMALL).double(), 0.4) for _ in range(5))
    laws = [flow(), *(functional_call(flow, state_of(other), ()) for other in others)]
    x = rows(20)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda law: [law.log_prob(x) for _ in range(5)], laws))
    for member, scores in zip([flow, *others], found, strict=True):
        for score in scores:
            torch.testing.assert_close(score, member().log_prob(x))


def test_a_law_follows_changes_in_place_and_keeps_buffers_that_were_replaced():
    flow, other = two("nsf")
    law, x = flow(), points(5)
    bound = functional_call(flow, state_of(other), ())
    perturb(flow, 0.1), perturb(other, 0.1)
    torch.testing.assert_close(law.log_prob(x), flow().log_prob(x))
    torch.testing.assert_close(bound.log_prob(x), other().log_prob(x))
    before = law.log_prob(x)
    flow.base.base_dist.scale = 2 * flow.base.base_dist.scale
    torch.testing.assert_close(law.log_prob(x), before)
    assert (flow().log_prob(x) != before).all()


def test_a_layer_that_is_replaced_is_bound_as_well():
    flow, other = (perturb(pf.flows.Planar(2, num_layers=2).double(), 0.4) for _ in range(2))
    flow()
    for member in (flow, other):
        member.transform.layers[0] = perturb(pf.transforms.Radial(2).double(), 0.4)
    x = points(5)
    torch.testing.assert_close(functional_call(flow, state_of(other), ()).log_prob(x), other().log_prob(x))


def test_copies_of_a_binding_share_what_holds_no_tensors():
    layer = pf.transforms.Planar(2)
    places = Places(layer)
    binding = Binding(places)
    assert binding.is_current and binding.modules == (layer,)
    before = dict(layer.parameters_of._parameters)
    layer.parameters_of.value = nn.Parameter(torch.ones_like(layer.parameters_of.value))
    (bound,) = binding.modules
    assert bound is not layer and bound.event_shape is layer.event_shape
    assert bound.parameters_of.value is before["value"] and binding.modules[0] is bound
    assert places.are_current


# What is remembered


def _by_vector(flow):
    vector_to_parameters(0.9 * parameters_to_vector(flow.parameters()).detach(), flow.parameters())


def _by_data(flow):
    for parameter in flow.parameters():
        parameter.data.add_(0.1)


def _by_data_of_buffers(flow):
    for buffer in flow.buffers():
        if buffer.is_floating_point():
            buffer.data.mul_(1.1)


CHANGES = {"vector": _by_vector, "data": _by_data, "buffers": _by_data_of_buffers}


@pytest.mark.grid(name=FLOWS, change=CHANGES)
def test_the_score_of_a_draw_does_not_outlive_a_change_that_torch_does_not_note(name, change):
    flow, _ = two(name)
    law = flow()
    x = law.rsample((3,)).detach()
    law.log_prob(x)
    x = law.rsample((3,))
    before = flow().log_prob(x.detach())
    CHANGES[change](flow)
    after = law.log_prob(x)
    assert (after != before).any()
    torch.testing.assert_close(after, flow().log_prob(x.detach()))


@pytest.mark.parametrize("parameter", ["raw_df", "loc", "log_scale"])
def test_laws_see_a_change_of_the_parameters_of_their_base(parameter):
    flow, _ = two("student-t" if parameter == "raw_df" else "base-module")
    law = flow()
    x = law.rsample((3,))
    with torch.no_grad():
        getattr(flow.base, parameter).add_(1.0)
    torch.testing.assert_close(law.log_prob(x), flow().log_prob(x.clone()))
    torch.testing.assert_close(law.base_dist.log_prob(x), flow.base().log_prob(x))


@pytest.mark.parametrize("what", ["context", "x"])
def test_the_score_of_a_draw_does_not_outlive_a_change_of_data(what):
    flow = perturb(pf.flows.IAF(2, context_dim=1, **SMALL).double(), 0.4)
    context = rows(3, dim=1)
    law = flow(context)
    with torch.no_grad():
        x = law.rsample()
        (context if what == "context" else x).data.add_(1.0)
        torch.testing.assert_close(law.log_prob(x), flow(context).log_prob(x.clone()))


@pytest.mark.parametrize("change", CHANGES)
def test_a_cached_layer_remembers_nothing_that_changed(change):
    flow, _ = two("nsf")
    layer = flow.transform.with_cache()
    z = rows(5)
    x = layer(z)
    assert layer(z) is x and layer.inv(x) is z
    CHANGES[change](flow)
    torch.testing.assert_close(layer(z), flow.transform(z))
    x = layer(z)
    x.data.add_(0.1)
    torch.testing.assert_close(layer.inv(x), flow.transform.inv(x))


def test_a_draw_is_scored_without_an_inversion(monkeypatch):
    """Also under vmap and where a function is traced, which give nothing to compare."""
    flow, _ = two("iaf")

    def refuse(*args):
        raise AssertionError("the inverse was called")

    monkeypatch.setattr(pf.transforms.Compose, "_inverse_and_ladj", refuse)

    def draw_and_score(_=None):
        law = flow()
        return law.log_prob(law.rsample((3,)))

    assert draw_and_score().shape == (3,)
    assert vmap(draw_and_score, randomness="same")(torch.zeros(2)).shape == (2, 3)
    flow.requires_grad_(False)
    with pyro.validation_enabled(False):
        assert make_fx(draw_and_score)(torch.zeros(()))(torch.zeros(())).shape == (3,)

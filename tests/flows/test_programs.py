"""Flows as observed sites of Pyro programs: plates, handlers, modules, prediction."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn

import pyroflows as pf
from pyroflows.errors import OptionError, ShapeError
from tests.flows.programs import Shift, all_dtypes, bent, make, nothing, rows, standard_normal, traced

# Plates


@all_dtypes
@pytest.mark.parametrize("context_shape", [None, (), (4,), (3, 1), (3, 4)], ids=str)
def test_nested_plates(dtype, context_shape):
    """Every place of the plates holds an own draw, scored at its own context."""
    flow = make(0 if context_shape is None else 5, dtype=dtype)
    contexts = [] if context_shape is None else [rows(*context_shape, dim=5, dtype=dtype)]

    def model():
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            return pyro.sample("x", flow(*contexts))

    site = traced(model).nodes["x"]
    x = site["value"]
    assert x.dtype == site["log_prob"].dtype == dtype
    assert x.shape == (3, 4, 2) and x.flatten(0, 1).unique(dim=0).shape == (12, 2)
    assert site["log_prob"].shape == (3, 4)
    for i in range(3):
        for j in range(4):
            at = [context.expand(3, 4, 5)[i, j] for context in contexts]
            torch.testing.assert_close(site["log_prob"][i, j], flow(*at).log_prob(x[i, j]))


def test_subsamples_average_to_the_whole():
    flow, x = make(), rows(6, 8)

    def model(i, j):
        with pyro.plate("outer", 6, subsample=i, dim=-2), pyro.plate("inner", 8, subsample=j, dim=-1):
            pyro.sample("x", flow(), obs=x[i[:, None], j])

    parts = [(i, j) for i in torch.randperm(6).split(2) for j in torch.randperm(8).split(4)]
    total = torch.stack([traced(model, *part).log_prob_sum() for part in parts]).mean()
    torch.testing.assert_close(total, flow().log_prob(x).sum())


def test_what_depends_on_the_context_alone_is_computed_once_for_all_rows():
    flow = make(context_dim=3)
    shapes = []
    for name, module in flow.named_modules():
        if name.endswith("conditioner.context"):
            module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))

    def model():
        with pyro.plate("outer", 5, dim=-2), pyro.plate("rows", 100, dim=-1):
            pyro.sample("x", flow(rows(5, 1, dim=3)), obs=rows(5, 100))

    traced(model)
    assert shapes == [(5, 1, 8)] * 2


def test_mask_and_missing_rows():
    flow, x = make(), rows(4)
    seen = torch.tensor([True, False, True, True])

    def model():
        with pyro.plate("rows", 4):
            with poutine.mask(mask=seen):
                pyro.sample("masked", flow(), obs=x)
            return pyro.sample("partly", flow(), obs=x, obs_mask=seen)

    trace = traced(model)
    expected = flow().log_prob(x)[seen].sum()
    torch.testing.assert_close(trace.nodes["masked"]["log_prob_sum"], expected)
    torch.testing.assert_close(trace.nodes["partly_observed"]["log_prob_sum"], expected)
    imputed = trace.nodes["_RETURN"]["value"]
    assert (imputed == x).all(-1).tolist() == seen.tolist()


def test_condition_and_replay():
    flow, x = make(context_dim=2), rows(4)

    def model():
        z = pyro.sample("z", standard_normal())
        with pyro.plate("rows", 4):
            return pyro.sample("x", flow(z))

    conditioned = traced(poutine.condition(model, {"x": x}))
    z = conditioned.nodes["z"]["value"]
    expected = standard_normal().log_prob(z) + flow(z).log_prob(x).sum()
    torch.testing.assert_close(conditioned.log_prob_sum(), expected)

    drawn = traced(model)
    replayed = traced(poutine.replay(model, trace=drawn))
    assert replayed.nodes["x"]["value"] is drawn.nodes["x"]["value"]
    torch.testing.assert_close(replayed.log_prob_sum(), drawn.log_prob_sum())


def test_data_or_context_that_do_not_fit_say_where():
    flow = make(context_dim=1)

    def model(context, x):
        with pyro.plate("rows", 5):
            pyro.sample("x", flow(context), obs=x)

    with pytest.raises(ValueError, match="(?s)site 'x'.*right-most size of value must match event_shape"):
        traced(model, rows(5, dim=1), rows(5, dim=3))
    with pytest.raises(ValueError, match="inside plate\\('rows'\\) at site x"):
        traced(model, rows(4, dim=1), rows(5))
    with pytest.raises(ShapeError, match="context size 1, but got shape \\(\\)"):
        traced(model, torch.tensor(0.5), rows(5))


@pytest.mark.parametrize("recipe", [pf.flows.MAF, pf.flows.IAF, pf.flows.RealNVP, pf.flows.Planar])
def test_layers_without_context_beside_one_with_it(recipe):
    plain, shift, c = make(recipe=recipe), Shift(2), rows(5)
    flow = pf.Flow([shift, plain.transform], base=standard_normal())
    x, log_q = flow(c).rsample_and_log_prob()
    u, ladj = plain.transform.inverse_and_ladj(x)
    expected = dist.Normal(c, 1.0).to_event(1).log_prob(u) + ladj
    torch.testing.assert_close(log_q, expected)
    torch.testing.assert_close(flow(c).log_prob(x), expected)


# Prediction


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    """Under a base of nearly no width every draw of x must lie at its own draw of the context."""
    flow, f = bent(base=dist.Normal(torch.zeros(2), 1e-6).to_event(1))

    def model(n):
        z = pyro.sample("z", standard_normal())
        with pyro.plate("rows", n):
            c = pyro.sample("c", dist.Normal(z, 1.0).to_event(1))
            pyro.sample("x", flow(c))

    prior = Predictive(model, num_samples=7, parallel=parallel)(5)
    given_z = Predictive(model, {"z": prior["z"]}, parallel=parallel, return_sites=["c", "x"])(5)
    for draws in (prior, given_z):
        assert draws["x"].shape == (7, 5, 2) and draws["x"].flatten(0, 1).unique(dim=0).shape == (35, 2)
        torch.testing.assert_close(draws["x"], f(draws["c"]), rtol=1e-3, atol=1e-3)


# Modules


class Regression(PyroModule):
    """A flow at the context that an encoder computes."""

    def __init__(self, encoder, flow):
        super().__init__()
        self.encoder, self.flow = encoder, flow

    def forward(self, u, x=None):
        with pyro.plate("rows", len(u)):
            return pyro.sample("x", self.flow(self.encoder(u)), obs=x)


class Stacked(PyroModule):
    """The same, with the two as members of a sequence, where Pyro finds the parameters of PyroModules only."""

    def __init__(self, encoder, flow):
        super().__init__()
        for member in (encoder, flow):
            to_pyro_module_(member, recurse=False)
        self.stack = PyroModule[nn.Sequential](encoder, flow)

    def forward(self, u, x=None):
        with pyro.plate("rows", len(u)):
            return pyro.sample("x", self.stack(u), obs=x)


class Nested(PyroModule):
    def __init__(self, encoder, flow):
        super().__init__()
        self.inner = Regression(encoder, flow)

    def forward(self, u, x=None):
        return self.inner(u, x)


def converted(encoder, flow):
    """Every layer and every network of the flow becomes a PyroModule."""
    model = Regression(encoder, flow)
    to_pyro_module_(model)
    return model


def by_statement(encoder, flow):
    def model(u, x=None):
        pyro.module("encoder", encoder)
        pyro.module("flow", flow)
        with pyro.plate("rows", len(u)):
            return pyro.sample("x", flow(encoder(u)), obs=x)

    return model


@pytest.mark.parametrize("build", [Regression, Stacked, Nested, converted, by_statement])
def test_modules_train_by_svi(build):
    """One step moves all parameters, and those of the encoder before the flow, as Adam does by hand."""
    modules = nn.ModuleList([nn.Linear(3, 4).double(), make(context_dim=4)])
    u, x = rows(20, dim=3), rows(20) + 1
    encoder, flow = by_hand = copy.deepcopy(modules)
    (-flow(encoder(u)).log_prob(x).sum()).backward()
    torch.optim.Adam(by_hand.parameters(), lr=0.01).step()

    SVI(build(*modules), nothing, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(u, x)
    in_store = {id(value.unconstrained()) for value in pyro.get_param_store().values()}
    for (name, parameter), expected in zip(modules.named_parameters(), by_hand.parameters(), strict=True):
        assert id(parameter) in in_store, name
        torch.testing.assert_close(parameter, expected)


class Density(PyroModule):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", self.flow(), obs=x)


def test_flow_of_converted_modules_trains_alone():
    """Pyro's ELBO makes no backward pass unless the program itself has read a parameter."""
    flow, x = make(), rows(20)
    model = Density(flow)
    to_pyro_module_(model)
    before = copy.deepcopy(flow.state_dict())
    SVI(model, nothing, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    assert all((parameter != before[name]).any() for name, parameter in flow.named_parameters())


def test_parameters_train_in_the_module_local_mode():
    with pyro.settings.context(module_local_params=True):
        model = Regression(nn.Linear(3, 4).double(), make(context_dim=4))
        u, x = rows(20, dim=3), rows(20)
        loss = Trace_ELBO()(model, nothing)(u, x)
        loss.backward()
    assert not pyro.get_param_store().keys()
    assert all((parameter.grad != 0).any() for parameter in model.parameters())
    torch.testing.assert_close(loss, -model.flow(model.encoder(u)).log_prob(x).sum())


@pytest.mark.parametrize("build", [Regression, Stacked, Nested, converted])
def test_trained_module_can_be_stored(build):
    """By deepcopy, by pickle, and by its state dict."""

    def fresh():
        pyro.clear_param_store()
        return build(nn.Linear(3, 4).double(), make(context_dim=4))

    model = fresh()
    u, x = rows(20, dim=3), rows(20)
    SVI(model, nothing, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(u, x)
    expected = traced(model, u, x).log_prob_sum()
    copied, pickled, state = copy.deepcopy(model), pickle.dumps(model), copy.deepcopy(model.state_dict())
    loaded = fresh()
    loaded.load_state_dict(state)
    for other in (copied, pickle.loads(pickled), loaded):
        pyro.clear_param_store()
        torch.testing.assert_close(traced(other, u, x).log_prob_sum(), expected, rtol=0, atol=0)


def test_flow_takes_its_parameters_from_the_param_store(tmp_path):
    flow, x = make(), rows(20)
    pyro.module("flow", flow)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    other = pyro.module("flow", make(), update_module_params=True)
    torch.testing.assert_close(other().log_prob(x), flow().log_prob(x), rtol=0, atol=0)


def test_prior_on_the_weights_of_a_flow_raises():
    flow = make()
    to_pyro_module_(flow)
    layer = flow.transform.layers[0].layer.conditioner.input
    layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(layer.weight.shape).to_event(2))
    with pytest.raises(OptionError, match="has priors on \\['weight'\\]"):
        flow()

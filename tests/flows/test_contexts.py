"""What a call of a flow takes: contexts in any units, and numbers in any form."""

import copy
import pickle

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyroflows as pf
from pyroflows import DataError, Flow, NotCalledError, ShapeError, flows
from pyroflows.transforms import Compose, Planar
from pyroflows.transforms.normalization import ContextScale

FAMILIES = [flows.NSF, flows.MAF, flows.IAF, flows.RealNVP, flows.NICE, flows.SOS, flows.NAF]
FAMILIES += [flows.Planar, flows.Radial, flows.Sylvester, flows.Gaussian]
X = np.random.default_rng(0).standard_normal((20, 2))


@pytest.fixture(params=FAMILIES, ids=lambda family: family.__name__)
def family(request):
    return request.param


def noisy(flow):
    """Give parameters values at which each input matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


# Contexts that are no numbers


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_context_that_is_no_number_is_named(family, value):
    flow = family(2, context_dim=3)
    context = torch.zeros(4, 5, 3)
    context[1, 2, 0] = value
    with pytest.raises(DataError, match=r"context has NaN or infinite values in 1 of 20 rows, .* row \(1, 2\)"):
        flow(context)
    with pytest.raises(DataError, match=r"in 1 of 5 rows, the first of which is row 2$"):
        flow(context[1].numpy())
    with pytest.raises(DataError, match="context has NaN or infinite values$"):
        flows.Mixture([flow, flows.Gaussian(2)])(context[1, 2])
    with pyro.validation_enabled(False):
        assert flow(context).batch_shape == (4, 5)
    assert torch.func.vmap(lambda c: flow(c).log_prob(torch.zeros(2)))(context).shape == (4, 5)


# Location and scale of contexts


YEARS = torch.tensor([1990.0, 0.0]) + torch.tensor([30.0, 1e-3]) * torch.rand(
    500, 2, generator=torch.Generator().manual_seed(0)
)


def test_contexts_lose_their_location_and_scale(family):
    flow = noisy(family(2, context_dim=2))
    plain = copy.deepcopy(flow)
    x = torch.randn(500, 2)
    flow.adapt(x, YEARS)
    plain.adapt(x, torch.randn(500, 2))
    plain.transform.context_scale = None
    scaled = (YEARS - YEARS.mean(0)) / YEARS.std(0, correction=0)
    torch.testing.assert_close(flow(YEARS).log_prob(x), plain(scaled).log_prob(x), rtol=1e-3, atol=1e-3)
    z = torch.randn(500, 2)
    torch.testing.assert_close(
        flow(YEARS).transport_and_score(z), plain(scaled).transport_and_score(z), rtol=2e-3, atol=2e-3
    )
    law = flow(YEARS)
    composed = dist.TransformedDistribution(law.base_dist, law.transforms)
    torch.testing.assert_close(composed.log_prob(x), law.log_prob(x.clone()), rtol=1e-3, atol=1e-3)


def test_contexts_of_years_are_learned_from():
    """Without their location and scale taken off, one nat was lost."""
    torch.manual_seed(0)
    year = 1990 + 30 * torch.rand(2000, 1)
    x = torch.sin((year - 1990) / 3) + 0.1 * torch.randn(2000, 1)
    found = []
    for context in (year, (year - year.mean()) / year.std()):
        torch.manual_seed(0)
        flow = flows.NSF(1, num_layers=1, hidden_dims=(32, 32), context_dim=1)
        fit = pf.fit_density(flow, x, context, max_epochs=20, seed=0, compile="none", progress_bar=False)
        found.append(fit.best_log_prob)
    assert abs(found[0] - found[1]) < 0.05
    assert found[0] > -0.8  # a Gaussian without context has -1.1


@pytest.mark.parametrize(
    ("column", "scaled"),
    [
        (torch.full((100,), 59000.1), [0.0]),
        (torch.cat([torch.ones(1), torch.zeros(9999)]), [-1e-3, 10.0]),
        (torch.cat([torch.full((1,), 1e20), torch.arange(99.0)]), None),
    ],
    ids=["constant", "rare", "wild"],
)
def test_columns_of_contexts_that_have_no_plain_scale(column, scaled):
    t = ContextScale(1)
    t.adapt(column[:, None])
    values = t.inv(column[:, None])
    assert values.isfinite().all()
    if scaled is None:
        torch.testing.assert_close(t.loc.item(), 49.0)
    else:
        assert sorted({round(value, 2) for value in values.flatten().tolist()}) == pytest.approx(scaled, abs=0.02)


def test_location_and_scale_of_contexts_are_saved_and_copied():
    flow, fresh = (noisy(flows.MAF(2, context_dim=2)) for _ in range(2))
    assert not fresh.is_adapted
    flow.adapt(torch.randn(500, 2), YEARS)
    fresh.load_state_dict(flow.state_dict())
    x = torch.randn(500, 2)
    for other in (fresh, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert other.is_adapted
        assert torch.equal(other(YEARS).log_prob(x), flow(YEARS).log_prob(x))
    assert flow.double()(YEARS.double()).log_prob(x.double()).dtype == torch.float64


def test_a_second_adaptation_replaces_the_first():
    flow = flows.MAF(2, context_dim=2)
    x = torch.randn(500, 2)
    for context in (YEARS, torch.randn(500, 2)):
        flow.adapt(x, context)
        torch.testing.assert_close(flow.transform.context_scale.loc, context.mean(0))


def test_a_fit_goes_on_from_the_location_of_contexts_that_is_there():
    flow = flows.MAF(2, 1, (8,), context_dim=2)
    for context in (YEARS, YEARS + torch.tensor([30.0, 1e-3])):
        pf.fit_density(flow, torch.randn(500, 2), context, max_epochs=1, seed=0, progress_bar=False)
    torch.testing.assert_close(flow.transform.context_scale.loc, YEARS.mean(0), rtol=1e-3, atol=1e-3)


def test_flows_without_the_layer_take_contexts_as_they_are():
    assert Flow([Planar(2, 3)], standardize=False).transform.context_scale is None
    assert flows.MAF(2).transform.context_scale is None
    assert Compose([Planar(2, 3)]).context_scale is None


def test_gradients_flow_into_the_context():
    flow = noisy(flows.MAF(2, context_dim=2))
    flow.adapt(torch.randn(500, 2), YEARS)
    context = YEARS.clone().requires_grad_()
    flow(context).log_prob(torch.randn(500, 2)).sum().backward()
    assert context.grad.abs().min() > 0


def test_a_change_of_the_context_shows():
    flow = noisy(flows.MAF(2, context_dim=2))
    flow.adapt(torch.randn(500, 2), YEARS)
    context = YEARS.clone()
    law = flow(context)
    x = law.sample()
    context += 1
    torch.testing.assert_close(law.log_prob(x), flow(context).log_prob(x))


@pytest.mark.parametrize("warm_start", [0, 100])
def test_distillation_at_contexts_of_any_units(warm_start):
    torch.manual_seed(0)
    teacher = noisy(flows.MAF(2, 1, (8,), context_dim=2))
    teacher.adapt(torch.randn(500, 2), YEARS)
    student = flows.IAF(2, 1, (8,), context_dim=2)
    fit = pf.distill(student, teacher, YEARS.numpy(), 100, 64, warm_start=warm_start, seed=0, progress_bar=False)
    assert fit.kl < 0.2
    if warm_start:
        own, others = (flow.transform.context_scale.state_dict() for flow in (student, teacher))
        torch.testing.assert_close(own, others)


# Numbers in any form


FORMS = {
    "float64": torch.as_tensor,
    "array": lambda x: x,
    "list": lambda x: x.tolist(),
    "frame": pd.DataFrame,
    "nullable frame": lambda x: pd.DataFrame(x).convert_dtypes(),
    "float16": lambda x: torch.as_tensor(x, dtype=torch.float16),
    "float32 array": lambda x: x.astype(np.float32),
}


@pytest.mark.parametrize("form", FORMS)
def test_values_and_contexts_in_many_forms(form, family):
    convert = FORMS[form]
    flow = noisy(family(2, context_dim=2))
    x = torch.tensor(X, dtype=torch.float32)
    law, expected = flow(convert(X)), flow(x)
    tolerance = {"rtol": 0, "atol": 0.1} if form == "float16" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(law.log_prob(convert(X)), expected.log_prob(x), **tolerance)
    torch.testing.assert_close(law.latent(convert(X)), expected.latent(x), **tolerance)
    assert law.sample().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integer_contexts_and_values(dtype, family):
    context = torch.tensor([[0, 1], [1, 1]])
    flow = noisy(family(2, context_dim=2))
    expected = flow(context.float()).log_prob(context.float())
    assert torch.equal(flow(context.to(dtype)).log_prob(context.to(dtype)), expected)


def test_a_flow_of_float64_takes_float32():
    flow = noisy(flows.NSF(2, context_dim=2)).double()
    x = torch.tensor(X, dtype=torch.float32)
    assert flow(x).log_prob(x).dtype == flow(x).sample().dtype == torch.float64


@pytest.mark.parametrize("bad", [np.array([["a", "b"]]), torch.zeros(2, dtype=torch.complex64), [[1.0], [1.0, 2.0]]])
def test_what_is_no_number(bad):
    flow = flows.NSF(2, context_dim=2)
    for use in (flow, flow(torch.zeros(2)).log_prob, flow(torch.zeros(2)).latent, lambda x: flow.adapt(x, x)):
        with pytest.raises(DataError, match="no array of numbers|complex numbers"):
            use(bad)


@pytest.mark.parametrize("observed", [torch.as_tensor(X), torch.as_tensor(X).float()])
def test_an_observed_site_takes_values_of_another_dtype(observed, family):
    flow = noisy(family(2))

    def model():
        with pyro.plate("rows", 20):
            return pyro.sample("x", flow(), obs=observed)

    trace = poutine.trace(model).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), flow().log_prob(observed.float()).sum())


def test_gradients_pass_through_a_cast():
    x = torch.tensor(X, requires_grad=True)
    flows.MAF(2)().log_prob(x).sum().backward()
    assert x.grad.dtype == torch.float64


def test_values_move_to_the_device_of_the_flow():
    with pyro.validation_enabled(False):
        assert flows.MAF(2).to("meta")().log_prob(X).device.type == "meta"


# A flow is not its distribution


@pytest.mark.parametrize("name", ["log_prob", "sample", "rsample", "latent", "rsample_and_log_prob"])
def test_a_flow_says_that_it_must_be_called(name):
    flow = flows.NSF(2)
    assert not hasattr(flow, name)
    with pytest.raises(NotCalledError, match=rf"a call returns: flow\(\).{name}"):
        getattr(flow, name)
    with pytest.raises(AttributeError, match=rf"flow\(context\).{name}"):
        getattr(flows.NSF(2, context_dim=1), name)
    with pytest.raises(NotCalledError):
        getattr(Flow([Planar(2)]), name)


def test_other_names_are_missing_as_ever():
    with pytest.raises(AttributeError, match="'NSF' object has no attribute 'log_probs'"):
        flows.NSF(2).log_probs  # noqa: B018
    assert isinstance(flows.NSF(2).base, nn.Module)


@pytest.mark.parametrize("fit", [pf.fit_density, pf.distill])
def test_a_class_instead_of_a_flow(fit):
    with pytest.raises(pf.OptionError, match=r"got the class MAF: make an instance first, MAF\(...\)"):
        fit(flows.MAF, torch.randn(100, 2) if fit is pf.fit_density else flows.MAF(2))


def test_numbers_of_classes_are_pointed_to_one_hot_vectors():
    flow, classes = pf.flows.MAF(2, context_dim=3), torch.tensor([0, 2, 1] * 30)
    with pytest.raises(ShapeError, match=r"got shape \(90,\): classes are one-hot vectors, which torch.nn.functional"):
        flow(classes)
    with pytest.raises(ShapeError, match=r"got \(90,\): classes are one-hot vectors"):
        pf.fit_density(flow, torch.randn(90, 2), classes, progress_bar=False)

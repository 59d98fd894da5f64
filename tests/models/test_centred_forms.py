"""Locations and scales that priors get from other latents, and the map that takes them out, against single runs."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch.distributions import constraints

from pyroflows.models.centred_forms import CentredForms, hierarchical_sites, loc_and_scale
from pyroflows.models.layout import Layout
from pyroflows.models.structure import describe

X = torch.linspace(0, 1, 4, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def covariance(length):
    return (-((X[:, None] - X) ** 2) / length**2).exp() + 0.1 * torch.eye(4)


def every_family():
    m = pyro.sample("m", dist.Normal(0.3, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("group", 3):
        a = pyro.sample("a", dist.Normal(m, s))
        b = pyro.sample("b", dist.LogNormal(a, s))
        c = pyro.sample("c", dist.StudentT(3.0, a, b))
        d = pyro.sample("d", dist.Cauchy(c, s))
        e = pyro.sample("e", dist.Laplace(d, s))
        pyro.sample("f", dist.Logistic(e, s))


def autoregression():
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    x = torch.tensor(0.0)
    for t in range(4):
        x = pyro.sample(f"x{t}", dist.Normal(phi * x, s))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def sequential_plate():
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    for t in pyro.plate("step", 3):
        pyro.sample(f"x{t}", dist.Normal(s.log(), s))


def factor_of_covariance():
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    pyro.sample("f", dist.MultivariateNormal(length * X, scale_tril=torch.linalg.cholesky(covariance(length))))


def covariance_in_a_plate():
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    with pyro.plate("output", 3):
        pyro.sample("f", dist.MultivariateNormal(torch.zeros(4), covariance(length)))


def events_and_plates():
    m = pyro.sample("m", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.sample("s", dist.HalfNormal(torch.ones(3)).to_event(1))
    with pyro.plate("outer", 2, dim=-2):
        k = pyro.sample("k", dist.Normal(m[0], s[0]))
        with pyro.plate("inner", 5, dim=-1):
            pyro.sample("b", dist.Normal(m * k[..., None], s).to_event(1))


def masked_and_expanded():
    s = pyro.sample("s", dist.HalfNormal(1.0))
    kept = torch.tensor([True, False, True])
    with pyro.plate("step", 3):
        z = pyro.sample("z", dist.Normal(s, s).mask(kept))
    x = pyro.sample("x", dist.Normal(0.0, s).expand([3]).mask(True).to_event(1))
    pyro.sample("y", dist.Normal(z[0] + z[2] + x.sum(-1), 1.0), obs=torch.tensor(1.0))


def branches():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, 0.1 if a > 0 else 2.0))


def filled_in_place():
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    x = torch.zeros(4)
    for t in range(1, 4):
        x[t] = pyro.sample(f"x{t}", dist.Normal(x[t - 1].clone(), s))


def through_numpy():
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, s + 0.1 * float(s.detach().numpy())))


MODELS = {
    "every family": (every_family, "plate", "abcdef"),
    "autoregression": (autoregression, "plate", ["x0", "x1", "x2", "x3"]),
    "sequential plate": (sequential_plate, "plate", ["x0", "x1", "x2"]),
    "factor of a covariance": (factor_of_covariance, "vmap", ["f"]),
    "covariance in a plate": (covariance_in_a_plate, "vmap", ["f"]),
    "events and plates": (events_and_plates, "vmap", ["k", "b"]),
    "masked and expanded": (masked_and_expanded, "vmap", ["z", "x"]),
    "branches": (branches, "paths", ["x"]),
    "filled in place": (filled_in_place, "paths", ["x1", "x2", "x3"]),
    "through NumPy": (through_numpy, "loop", ["x"]),
}
all_models = pytest.mark.parametrize(("model", "mode", "names"), MODELS.values(), ids=MODELS)


def forms_of(model, *args):
    layout = Layout(describe(model, args, {}))
    center = torch.full((layout.dim,), 0.1)
    names = hierarchical_sites(model, args, {}, layout, center)
    return layout, CentredForms(model, args, {}, layout, names, center)


@all_models
def test_the_sites_and_the_way_of_running(model, mode, names):
    _, forms = forms_of(model)
    assert forms.names == tuple(names)
    assert forms._forward.mode == forms._inverse.mode == mode


@all_models
def test_the_map_takes_out_location_and_scale_of_a_run(model, mode, names):
    layout, forms = forms_of(model)
    v, c = torch.randn(4, layout.dim), torch.rand(layout.dim)
    u, _ = forms.forward(v, c)
    for row, before in zip(u, v, strict=True):
        values, _ = layout.constrain(row)
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace()
        for site, part in layout.split(row):
            given, centredness = (vector[layout.slices[site.name]] for vector in (before, c))
            if site.name not in names:
                assert torch.equal(part, given)
                continue
            loc, scale = loc_and_scale(trace.nodes[site.name]["fn"])
            if scale.dim() > loc.dim():
                expected = loc + (scale @ given.reshape(loc.shape)[..., None])[..., 0]
            else:
                shape = torch.broadcast_shapes(loc.shape, scale.shape, site.unconstrained_shape)
                loc, scale = (
                    x.expand(shape)[site.kept] if site.kept is not None else x.expand(shape).flatten()
                    for x in (loc, scale)
                )
                expected = loc + scale ** (1 - centredness) * (given - centredness * loc)
            torch.testing.assert_close(part, expected.flatten())


@all_models
def test_the_inverse_and_the_log_determinants(model, mode, names):
    layout, forms = forms_of(model)
    v, c = torch.randn(4, layout.dim), torch.rand(layout.dim)
    u, ladj = forms.forward(v, c)
    again, inverse_ladj = forms.inverse(u, c)
    torch.testing.assert_close(again, v)
    torch.testing.assert_close(inverse_ladj, -ladj)
    for row, expected in zip(v, ladj, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: forms.forward(v[None], c)[0][0], row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], expected)


def test_the_centred_form_is_the_identity():
    layout, forms = forms_of(every_family)
    v = torch.randn(4, layout.dim)
    u, ladj = forms.forward(v, torch.ones(layout.dim))
    torch.testing.assert_close(u, v)
    assert not ladj.any()


def test_the_gradient_of_the_centredness():
    layout, forms = forms_of(autoregression)
    v, c = torch.randn(2, layout.dim), torch.rand(layout.dim, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: forms.forward(v, c), c)


def constant_priors():
    x = pyro.sample("x", dist.Normal(torch.arange(3.0), 2.0).to_event(1))
    with pyro.plate("group", 2):
        pyro.sample("b", dist.Beta(x[0].exp(), 1.0))  # no location, no scale
        pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(0.0))


def observed_hierarchy():
    s = pyro.sample("s", dist.HalfNormal(1.0))
    pyro.sample("y", dist.Normal(0.0, s), obs=torch.tensor(1.0))


@pytest.mark.parametrize("model", [constant_priors, observed_hierarchy])
def test_models_without_a_hierarchy(model):
    layout = Layout(describe(model, (), {}))
    assert hierarchical_sites(model, (), {}, layout, torch.zeros(layout.dim)) == ()


def test_the_likelihood_is_not_run():
    seen = []

    def model():
        s = pyro.sample("s", dist.HalfNormal(1.0))
        x = pyro.sample("x", dist.Normal(0.0, s))
        seen.append("likelihood")
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    layout, forms = forms_of(model)
    seen.clear()
    forms.forward(torch.randn(4, layout.dim), torch.zeros(layout.dim))
    assert not seen


def test_handlers_and_plates_around_a_run_do_not_matter():
    layout, forms = forms_of(every_family)
    v, c = torch.randn(4, layout.dim), torch.rand(layout.dim)
    expected = forms.forward(v, c)
    with poutine.trace() as tracer, pyro.plate("particles", 4, dim=-2), pyro.plate("group", 3):
        found = forms.forward(v, c)
        pyro.sample("after", dist.Normal(0.0, 1.0))
    torch.testing.assert_close(found, expected)
    assert tracer.trace.nodes["after"]["value"].shape == (4, 3)
    assert not tracer.trace.nodes.keys() & {"m", "s", "a"}


def test_a_support_on_the_way():
    def model():
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
        pyro.sample("flat", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("x", dist.Normal(p[..., 0] + angle, 1 + p[..., 1]))

    layout, forms = forms_of(model)
    v, c = torch.randn(4, layout.dim), torch.rand(layout.dim)
    u, _ = forms.forward(v, c)
    torch.testing.assert_close(forms.inverse(u, c)[0], v)

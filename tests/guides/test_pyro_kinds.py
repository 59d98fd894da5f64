"""What Pyro's own tests ask of its autoguides and of NeuTra, except what only a Gaussian has, asked of flow guides."""

import io
import math
import warnings

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.transforms import ComposeTransform
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from pyro.infer.autoguide import (
    AutoCallable,
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuide,
    AutoGuideList,
    AutoNormal,
    init_to_feasible,
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.util import check_model_guide_match
from torch import nn

from pyroflows import flows
from pyroflows.errors import ModelError
from pyroflows.guides import AutoFlow, AutoIAF, AutoPlanar, AutoRealNVP, AutoSpline
from tests.guides.models import GUIDES, all_guides, built, fit, perturb
from tests.guides.pyro_kinds import (
    KINDS,
    BayesianRegression,
    WithParameters,
    clusters,
    funnel,
    nested_plates,
    plated,
    scalar,
    shares,
    time_series,
    with_factors,
)
from tests.guides.test_models import assert_loss_is_right
from tests.transforms import registry

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's, on every use of it

ELBOS = {"trace": Trace_ELBO, "graph": TraceGraph_ELBO, "enum": TraceEnum_ELBO}
INITS = {
    "feasible": init_to_feasible,
    "mean": init_to_mean,
    "median": init_to_median,
    "sample": init_to_sample,
    "uniform": init_to_uniform,
    "value": init_to_value(values={}),
    "generated": init_to_generated(generate=lambda: init_to_value(values={})),
}


def elbo_named(name, **options):
    return ELBOS[name](strict_enumeration_warning=False, **options)


def without_tracer_warnings(trace):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        return trace()


def saved_and_loaded(traced):
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


# Losses and shapes


@pytest.mark.grid(make=GUIDES.values(), model=KINDS.values())
def test_shapes_and_loss(make, model):
    guide = built(make, model)
    values = guide()
    assert {name: value.shape for name, value in values.items()} == {
        name: value.shape for name, value in AutoNormal(model)().items()
    }
    trace = poutine.trace(poutine.replay(model, trace=poutine.trace(guide).get_trace())).get_trace()
    for name in values:
        assert trace.nodes[name]["fn"].support.check(trace.nodes[name]["value"]).all()
    assert_loss_is_right(model, guide)


@pytest.mark.grid(make=GUIDES.values(), model=KINDS.values(), elbo=ELBOS, init=INITS.values())
def test_every_elbo_and_every_initialisation(make, model, elbo, init):
    guide = make(model, init_loc_fn=init)
    assert all(math.isfinite(loss) for loss in fit(model, guide, elbo=elbo_named(elbo), steps=2))


@all_guides
def test_density_stands_at_the_latent_site_alone(make):
    guide = make(scalar)
    guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(scalar, trace=guide_trace)).get_trace()
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    (latent,) = [name for name in guide_trace.nodes if name.endswith("_latent")]
    assert latent not in model_trace.nodes
    assert guide_trace.nodes[latent]["log_prob_sum"].item() != 0.0
    # On the real line the map from the latent vector to the site has no log-determinant.
    assert guide_trace.nodes["x"]["log_prob_sum"].item() == 0.0
    assert model_trace.nodes["x"]["log_prob_sum"].item() != 0.0


@pytest.mark.grid(make=GUIDES.values(), elbo=ELBOS)
def test_factors(make, elbo):
    guide, loss = make(with_factors), elbo_named(elbo)
    loss.loss(with_factors, guide, torch.tensor(0.0))
    losses = []
    for factor in (5.0, 4.0):
        pyro.set_rng_seed(123)
        losses.append(loss.loss(with_factors, guide, torch.tensor(factor)))
    assert losses[0] - losses[1] == pytest.approx(-1 - 3, abs=1e-4)


@all_guides
def test_jit_elbo_is_the_eager_one(make):
    guide = built(make, plated)
    losses = []
    for elbo in (Trace_ELBO(num_particles=3), JitTrace_ELBO(num_particles=3, ignore_jit_warnings=True)):
        elbo.loss_and_grads(plated, guide)  # here the loss is traced, at other noise
        guide.zero_grad()
        pyro.set_rng_seed(1)
        loss = elbo.loss_and_grads(plated, guide)
        losses.append((loss, [parameter.grad.clone() for parameter in guide.parameters()]))
    (eager, gradients), (traced, traced_gradients) = losses
    assert traced == pytest.approx(eager, rel=1e-4)
    torch.testing.assert_close(traced_gradients, gradients, rtol=1e-3, atol=1e-4)


def gaussian_in_three_dimensions():
    scale_tril = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.3, 0.4, 0.5]])
    pyro.sample("x", dist.MultivariateNormal(torch.tensor([1.0, -2.0, 0.5]), scale_tril=scale_tril))


@pytest.mark.slow
@pytest.mark.parametrize("make", [AutoIAF, AutoRealNVP, AutoSpline])
@pytest.mark.parametrize("seed", [0, 1])
def test_large_steps_do_not_lead_astray(make, seed):
    """One noisy draw a step, at a rate of 0.05. The evidence is 1, so the loss is the KL divergence in nats.

    Noise of such steps leaves about one nat; networks whose speed grows with their width ended at 10 to 900 nats.
    """
    pyro.set_rng_seed(seed)
    guide = make(gaussian_in_three_dimensions)
    svi = SVI(gaussian_in_three_dimensions, guide, pyro.optim.ClippedAdam({"lr": 0.05}), Trace_ELBO())
    for _ in range(600):
        svi.step()
    with torch.no_grad():
        elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=0)
        assert elbo.loss(gaussian_in_three_dimensions, guide) < 4.0


# Guides in lists


def _with_delta(make, model):
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["x"])))
    guide.append(make(poutine.block(model, hide=["x"])))
    return guide


def _with_callable(make, model):
    def x_guide():
        loc = pyro.param("x_loc", torch.tensor(1.0))
        scale = pyro.param("x_scale", torch.tensor(0.1), constraint=dist.constraints.positive)
        pyro.sample("x", dist.Normal(loc, scale))

    guide = AutoGuideList(model)
    guide.append(AutoCallable(model, x_guide, lambda: {"x": pyro.param("x_loc").detach()}))
    guide.append(make(poutine.block(model, hide=["x"])))
    return guide


class XGuide(AutoGuide):
    """A guide of one's own for a site, as a callable module."""

    def __init__(self, model):
        super().__init__(model)
        self.x_loc = nn.Parameter(torch.tensor(1.0))

    def forward(self, *args, **kwargs):
        return {"x": pyro.sample("x", dist.Normal(self.x_loc, 0.1))}

    def median(self, *args, **kwargs):
        return {"x": self.x_loc.detach()}


def _with_module(make, model):
    guide = AutoGuideList(model)
    guide.custom = XGuide(model)
    guide.flow = make(poutine.block(model, hide=["x"]))
    return guide


def _nested(make, model):
    inner = AutoGuideList(poutine.block(model, hide=["x"]))
    inner.y = make(poutine.block(model, expose=["y"]))
    inner.append(AutoDelta(poutine.block(model, hide=["x", "y"])))
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["x"])))
    guide.append(inner)
    return guide


LISTS = {"delta": _with_delta, "callable": _with_callable, "module": _with_module, "nested": _nested}


@pytest.mark.grid(make=GUIDES.values(), parts=LISTS.values(), elbo=ELBOS)
def test_lists_of_guides(make, parts, elbo):
    guide = parts(make, scalar)
    assert all(math.isfinite(loss) for loss in fit(scalar, guide, elbo=elbo_named(elbo)))
    assert guide().keys() >= {"y", "z"}
    assert guide.median().keys() == {"x", "y", "z"}
    check_model_guide_match(poutine.trace(scalar).get_trace(), poutine.trace(guide).get_trace())


def test_parts_of_a_nested_list_have_the_outermost_as_master():
    guide = _nested(AutoPlanar, plated)
    guide()
    parts = [module for module in guide.modules() if isinstance(module, AutoGuide) and module is not guide]
    assert len(parts) == 4
    assert all(part.master() is guide for part in parts)
    nodes = poutine.trace(guide).get_trace().stochastic_nodes
    assert "_AutoGuideList.1.y_latent" in nodes


@all_guides
def test_guide_of_discrete_sites_beside_a_flow(make):
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    guide = AutoGuideList(clusters)
    guide.append(make(poutine.block(clusters, hide=["assignment"])))
    guide.append(AutoDiscreteParallel(poutine.block(clusters, expose=["assignment"])))
    assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(clusters, guide, data))


@all_guides
def test_flow_of_globals_beside_locals_of_a_subsampled_plate(make):
    full_size, num_steps = 50, 4
    data = torch.randint(2, (num_steps, full_size)).float()

    def create_plates(batch, subsample, full_size):
        return pyro.plate("data", full_size, subsample=subsample)

    guide = AutoGuideList(time_series, create_plates=create_plates)
    guide.append(make(poutine.block(time_series, expose=["drift"])))
    guide.append(AutoNormal(poutine.block(time_series, hide=["drift"])))
    svi = SVI(time_series, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for start in (0, 20, 40):
        rows = torch.arange(start, min(start + 20, full_size))
        assert math.isfinite(svi.step(data[:, rows], rows, full_size=full_size))


# Modules and predictions


@pytest.mark.grid(make=GUIDES.values(), elbo=ELBOS)
def test_model_with_parameters(make, elbo):
    guide = make(WithParameters(), init_scale=0.01)
    fit(guide.model, guide, elbo=elbo_named(elbo), steps=4, lr=0.005)
    median = guide.median()
    torch.testing.assert_close(median["x"], torch.tensor(1.0), rtol=0, atol=0.15)
    torch.testing.assert_close(median["y"], torch.full((2,), 2.0), rtol=0, atol=0.15)


@all_guides
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_of_a_module_in_a_module(make, parallel):
    x, y = torch.randn(3, 1), torch.randn(3)
    model = BayesianRegression(1)
    guide = make(model)
    fit(model, guide, x, y)
    # Under a plate of draws the weight has one dimension more than nn.Linear takes.
    if parallel:
        guide = poutine.block(guide, hide_fn=lambda site: False)
        model = _regression_for_batches
    draws = Predictive(model, guide=guide, num_samples=6, parallel=parallel)(x)
    assert draws["y"].shape == (6, 3)
    assert draws.keys() >= {"y", "sigma", "linear.weight", "linear.bias"}


def _regression_for_batches(x, y=None):
    weight = pyro.sample("linear.weight", dist.Normal(torch.zeros(1, 1), 1.0).to_event(2))
    bias = pyro.sample("linear.bias", dist.Normal(torch.zeros(1), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(weight[..., 0] * x[:, 0] + bias, sigma), obs=y)


@all_guides
def test_frozen_guide(make):
    guide = built(make, plated)
    guide.requires_grad_(False).eval()
    values = guide()
    assert not any(value.requires_grad for value in values.values())
    assert math.isfinite(Trace_ELBO().loss(plated, guide))


@all_guides
def test_replay(make):
    guide = built(make, nested_plates)
    trace = poutine.trace(guide).get_trace()
    again = poutine.trace(poutine.replay(nested_plates, trace=trace)).get_trace()
    for name, value in poutine.replay(guide, trace=trace)().items():
        torch.testing.assert_close(value, trace.nodes[name]["value"], rtol=0, atol=0)
        torch.testing.assert_close(again.nodes[name]["value"], value, rtol=0, atol=0)


@all_guides
def test_unpacked_latent_of_a_correlation_matrix(make):
    def model():
        return pyro.sample("x", dist.LKJCholesky(2, torch.tensor(1.0)))

    guide = make(model)
    assert guide()["x"].shape == model().shape
    ((_, part),) = guide._unpack_latent(guide.sample_latent())
    assert part.shape == (1,)


@all_guides
def test_initial_values_by_a_function_of_the_user_s(make):
    values = {"x": torch.tensor(0.7), "y": torch.tensor([1.5, 0.2]), "z": torch.tensor([0.3, 0.9])}
    guide = make(plated, init_loc_fn=lambda site: values[site["name"]], init_scale=1e-4)
    guide()
    for name, value in guide.median().items():
        torch.testing.assert_close(value, values[name], rtol=0, atol=1e-3)


# Serialisation


@all_guides
def test_traced_guide_draws_what_the_guide_draws(make):
    guide = built(make, plated)
    pyro.set_rng_seed(1)
    expected = guide.call()
    loaded = saved_and_loaded(
        without_tracer_warnings(lambda: torch.jit.trace_module(guide, {"call": ()}, check_trace=False))
    )
    pyro.set_rng_seed(1)
    for value, right in zip(loaded.call(), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5)
    found = dict(loaded.named_parameters())
    assert found.keys() == dict(guide.named_parameters()).keys()
    for name, parameter in guide.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=0, atol=0)


@all_guides
def test_traced_predictive_follows_its_argument(make):
    """With a guide that hardly varies, the predictions at another x are those of the line, so x is no constant."""
    x = torch.randn(3, 2)
    model = BayesianRegression(2)
    values = {"linear.weight": torch.tensor([[2.0, -1.0]]), "linear.bias": torch.ones(1), "sigma": torch.tensor(1e-4)}
    guide = make(model, init_loc_fn=init_to_value(values=values), init_scale=1e-4)
    guide(x, torch.zeros(3))
    predictive = Predictive(model, guide=guide, num_samples=5)
    loaded = saved_and_loaded(
        without_tracer_warnings(lambda: torch.jit.trace_module(predictive, {"call": (x,)}, check_trace=False))
    )
    other = torch.randn(3, 2)
    expected = 1 + other @ torch.tensor([2.0, -1.0])
    draws = loaded.call(other)
    assert len(draws) == len(predictive(x))
    (y,) = [draw for draw in draws if draw.shape == (5, 3)]
    torch.testing.assert_close(y, expected.expand(5, 3), rtol=0, atol=0.01)
    assert y.std(0).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("layer", [name for name, entry in registry.LAYERS.items() if not entry.is_slow])
def test_traced_layers_compute_what_they_compute(layer):
    """In both directions, at other values than those at which they were traced."""
    # Traced inverses go by passes of the network, which in float32 round unlike the steps of the others. Each entry is
    # one pass, with a root search of its own in some layers; three entries are enough to need passes in order.
    usual = registry.LAYERS[layer].usual
    t = registry.layer(layer, (3,) if len(usual) == 1 else usual)
    z, other = torch.randn(2, 5, *t.base_shape, dtype=torch.float64).unbind()
    for direction, values in ((t, (z, other)), (t.inv, (t(z), t(other)))):
        values = [value.detach() for value in values]
        traced = without_tracer_warnings(
            lambda direction=direction, values=values: torch.jit.trace(direction, values[0], check_trace=False)
        )
        torch.testing.assert_close(traced(values[1]), direction(values[1]), rtol=1e-4, atol=1e-4)


class Served(nn.Module):
    """A program that draws from a flow, as one serves it."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, context):
        law = self.flow(context)
        x = law.rsample()
        return x, law.log_prob(x), law.log_prob(context)


def test_traced_flow_with_context():
    flow = perturb(flows.MAF(2, context_dim=2, num_layers=2, hidden_dims=(8,)))
    served, context, other = Served(flow), torch.randn(5, 2), torch.randn(5, 2)
    traced = without_tracer_warnings(lambda: torch.jit.trace(served, context, check_trace=False))
    torch.manual_seed(2)
    expected = served(other)
    torch.manual_seed(2)
    for value, right in zip(traced(other), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-4)


# NeuTra


@all_guides
@pytest.mark.parametrize(("model", "args"), [(funnel, ()), (shares, (torch.tensor([0.0, 1.0, 1.0, 2.0]),))])
def test_neutra_potential_is_that_of_the_model(make, model, args):
    """Up to the log-determinant of the transforms of the guide's posterior, which Pyro composes by itself."""
    guide = built(make, model, *args)
    neutra = NeuTraReparam(guide)
    reparametrised = neutra.reparam(model)
    _, potential, transforms, _ = initialize_model(model, model_args=args)
    params, neutra_potential, _, _ = initialize_model(reparametrised, model_args=args)
    z = next(iter(params.values()))
    values = neutra.transform_sample(z)
    found = neutra_potential(params)
    transform = ComposeTransform(guide.get_posterior(*args).transforms)
    ladj = transform.log_abs_det_jacobian(z, transform(z))
    expected = potential({name: transforms[name](value) for name, value in values.items()})
    torch.testing.assert_close(found, expected - ladj, rtol=1e-4, atol=1e-4)


# Errors name the way out


def test_discrete_latents_name_enumeration():
    with pytest.raises(ModelError, match="'assignment'.*TraceEnum_ELBO.*config_enumerate"):
        SVI(clusters, AutoFlow(clusters), pyro.optim.Adam({}), Trace_ELBO()).step(torch.zeros(5))


@pytest.mark.parametrize("num_event_dims", [1, 2])
def test_spherical_latents_name_their_reparametrisation(num_event_dims):
    def model():
        fn = dist.ProjectedNormal(torch.ones(2, 3))
        pyro.sample("z", fn.to_event(num_event_dims - 1))

    with pytest.raises(ModelError, match="'z'.*ProjectedNormalReparam"):
        AutoFlow(model)()

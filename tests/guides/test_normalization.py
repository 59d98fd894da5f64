"""Layers that learn before training, in flows that have no data: ActNorm learns from draws, BatchNorm is refused."""

import copy
import io

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO

import pyroflows as pf
from pyroflows import FlowVI, load_posterior
from pyroflows.errors import OptionError
from pyroflows.flows import Flow, Mixture, Recipe
from pyroflows.guides import AutoFlow
from pyroflows.guides.packed import flow_near
from pyroflows.transforms import ActNorm, BatchNorm, Compose, Elementwise, Standardize
from tests.guides.models import Y, assert_same_draws, fit, parameters, regression

NUM_DRAWS = 20_000


def uneven_base(dim):
    return dist.Normal(torch.arange(float(dim)) + 5, torch.arange(float(dim)) + 2).to_event(1)


def normalized(dim):
    """A flow whose layers do not give what ActNorm is to make standard, on a base that is not standard."""
    shift = Elementwise(dim, init=torch.tensor([[3.0, 1.0]] * dim))
    return Flow([ActNorm(dim), shift, Compose([ActNorm(dim)])], base=uneven_base(dim), standardize=False)


def with_batch_norm(dim):
    return Flow([Elementwise(dim), Compose([BatchNorm(dim)])])


def act_norms(flow):
    return [layer for layer in flow.modules() if isinstance(layer, ActNorm)]


def guide_of(flow_fn=normalized):
    return AutoFlow(regression, flow_fn, init_scale=1.0)


def assert_starts_standard(flow):
    """Draws before the guide's own last layer are standard, up to four standard errors of the two samples."""
    assert act_norms(flow) and all(layer.is_adapted for layer in act_norms(flow))
    torch.manual_seed(1)
    before_last = Compose(list(flow.transform.layers)[:-1])
    with torch.no_grad():
        x = before_last(flow.base().sample((NUM_DRAWS,)))
    assert x.mean(0).abs().max() < 4 * (1 / 1000 + 1 / NUM_DRAWS) ** 0.5
    assert (x.std(0) - 1).abs().max() < 4 * (1 / 2000 + 1 / (2 * NUM_DRAWS)) ** 0.5


def changes(before, after):
    return [not torch.equal(a.parameters_of.value, b.parameters_of.value) for a, b in zip(before, after, strict=True)]


# Where a flow is built


def test_a_guide_learns_from_draws_when_it_is_built():
    state = torch.get_rng_state()
    guide = guide_of()
    guide._setup_prototype(Y)
    assert_starts_standard(guide.flow)
    other = guide_of()
    torch.manual_seed(5)
    other._setup_prototype(Y)
    assert changes(act_norms(guide.flow), act_norms(other.flow)) == [False, False]  # whatever the random state is
    torch.set_rng_state(state)
    flow = flow_near(normalized, torch.zeros(2), torch.ones(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert_starts_standard(flow)


@pytest.mark.parametrize("scale", [torch.ones(2), torch.eye(2)], ids=["diagonal", "triangular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flow_near_a_place_learns_from_draws(scale, dtype):
    flow = flow_near(normalized, torch.zeros(2, dtype=dtype), scale.to(dtype))
    assert_starts_standard(flow)
    assert act_norms(flow)[0].parameters_of.value.dtype == dtype


def test_a_guide_that_starts_elsewhere_learns_anew():
    guide = guide_of()
    guide.start_at(torch.tensor([1.0, 2.0]), torch.eye(2), Y)
    assert_starts_standard(guide.flow)


def test_a_mixture_in_a_guide_learns_in_each_component():
    flow = flow_near(lambda dim: Mixture([normalized(dim), normalized(dim)]), torch.zeros(2), torch.ones(2))
    assert len(act_norms(flow)) == 4
    for part in (flow.base.flows[0], flow.base.flows[1]):
        x = part().sample((NUM_DRAWS,))
        assert x.mean(0).abs().max() < 0.13 and (x.std(0) - 1).abs().max() < 0.1


def test_layers_that_were_adapted_before_stay_as_they_are():
    x = 5 + 3 * torch.randn(100, 2)

    def adapted(dim):
        flow = Flow([ActNorm(dim), Standardize(dim, scale=torch.ones(dim))])
        flow.adapt(x)
        return flow

    kept = act_norms(adapted(2))[0].parameters_of.value
    (layer,) = act_norms(flow_near(adapted, torch.zeros(2), torch.ones(2)))
    assert torch.equal(layer.parameters_of.value, kept)


def test_location_and_scale_of_data_stay_as_they_are():
    def flow_fn(dim):
        return Flow([ActNorm(dim), Standardize(dim, loc=torch.ones(dim)), ActNorm(dim).inv], standardize=False)

    flow = flow_near(flow_fn, torch.zeros(2), torch.ones(2))
    assert flow.layers[1].loc.tolist() == pytest.approx([1.0, 1.0])
    assert_starts_standard(flow)


# Training


def test_svi_trains_what_was_learned_from_draws():
    guide = guide_of()
    fit(regression, guide, steps=1)
    before = copy.deepcopy(act_norms(guide.flow))
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(Y)
    assert changes(before, act_norms(guide.flow)) == [True, True]
    assert guide.flow.is_adapted


@pytest.mark.parametrize("make", [lambda: normalized, guide_of], ids=["function", "guide"])
def test_flow_vi_trains_what_was_learned_from_draws(make):
    posterior = FlowVI(regression, make(), num_steps=300, seed=0, progress_bar=False).run(Y)
    layers = act_norms(posterior.guide.flow)
    assert len(layers) == 2 and all(layer.is_adapted for layer in layers)
    start = act_norms(flow_near(normalized, torch.zeros(2), torch.ones(2)))
    assert changes(start, layers) == [True, True]
    elbo = posterior.history["elbo"]
    assert elbo[-50:].mean() > elbo[:50].mean() - 0.05  # a fit from a function starts at its best Gaussian


# States


def test_a_loaded_guide_keeps_what_it_has_learned():
    guide = guide_of()
    fit(regression, guide, steps=5)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    fresh = guide_of()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, copy.deepcopy(guide)):
        assert changes(act_norms(guide.flow), act_norms(other.flow)) == [False, False]
        assert all(layer.is_adapted for layer in act_norms(other.flow))
        other(Y)  # the first call runs the model, and must not adapt the flow again
        assert changes(act_norms(guide.flow), act_norms(other.flow)) == [False, False]
        assert_same_draws(other, guide, Y)


def test_the_param_store_restores_what_a_guide_has_learned():
    guide = guide_of()
    fit(regression, guide, steps=5)
    expected, state = parameters(guide), copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    fresh = guide_of()
    fresh(Y)
    for name, value in parameters(fresh).items():
        assert torch.equal(value, expected[name])
    assert_same_draws(fresh, guide, Y)


def test_a_posterior_keeps_what_its_flow_has_learned(tmp_path):
    posterior = FlowVI(regression, normalized, num_steps=50, seed=0, progress_bar=False).run(Y)
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = load_posterior(tmp_path / "posterior.safetensors", regression, Y, flow_fn=normalized)
    assert changes(act_norms(posterior.guide.flow), act_norms(loaded.guide.flow)) == [False, False]
    assert loaded.guide.flow.is_adapted
    draws = posterior.sample(100)
    torch.testing.assert_close(loaded.log_prob(draws), posterior.log_prob(draws))


def test_other_guides_of_a_posterior_learn_from_draws():
    posterior = FlowVI(regression, Recipe("Gaussian"), num_steps=100, seed=0, progress_bar=False).run(Y)
    distilled = posterior.distill(lambda dim: [ActNorm(dim)], num_steps=10, warm_start=10, seed=0, progress_bar=False)
    fitted = posterior.fit_proposal(lambda dim: [ActNorm(dim)], num_samples=500, max_epochs=2, progress_bar=False)
    for other in (distilled, fitted):
        assert all(layer.is_adapted for layer in act_norms(other.guide.flow)) and act_norms(other.guide.flow)
        assert all(value.isfinite().all() for value in other.sample(10).values())


# Running statistics

REFUSED = r"BatchNorm \(.*of this flow\) keeps running statistics of data, but {} is trained on draws.*take ActNorm"


@pytest.mark.parametrize(
    "build",
    [
        lambda: guide_of(with_batch_norm)(Y),
        lambda: fit(regression, guide_of(with_batch_norm), steps=1),
        lambda: guide_of(lambda dim: Mixture([Flow([BatchNorm(dim)])]))(Y),
        lambda: guide_of(with_batch_norm).start_at(torch.zeros(2), torch.ones(2), Y),
        lambda: FlowVI(regression, with_batch_norm, progress_bar=False).run(Y),
        lambda: FlowVI(regression, guide_of(with_batch_norm), progress_bar=False).run(Y),
    ],
    ids=["call", "svi", "mixture", "start", "flow_vi", "flow_vi_of_a_guide"],
)
def test_guides_refuse_running_statistics(build):
    with pytest.raises(OptionError, match=REFUSED.format("a guide")):
        build()


def test_a_posterior_refuses_other_guides_with_running_statistics():
    posterior = FlowVI(regression, Recipe("Gaussian"), num_steps=20, seed=0, progress_bar=False).run(Y)
    for make in (posterior.distill, posterior.fit_proposal):
        with pytest.raises(OptionError, match=REFUSED.format("a guide")):
            make(with_batch_norm)


def test_reverse_kl_and_students_refuse_running_statistics():
    flow = Flow([BatchNorm(2), Elementwise(2)])
    with pytest.raises(OptionError, match=REFUSED.format("a flow that minimises the reverse KL")):
        pf.fitting.ReverseKL(flow, lambda x: -(x**2).sum(-1))
    teacher = pf.flows.Gaussian(2)
    with pytest.raises(OptionError, match=REFUSED.format("a student")):
        pf.distill(flow, teacher, num_steps=2, progress_bar=False)
    # A teacher may have them, and they stay as they are.
    student = pf.flows.Gaussian(2)
    pf.distill(student, flow, num_steps=2, warm_start=2, progress_bar=False)
    assert flow.transform.layers[0].running_mean.tolist() == [0.0, 0.0]

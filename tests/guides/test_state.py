"""What a guide is made of survives: state_dict, copies, pickle, the param store; and nothing in it is stale."""

import copy
import io
import pickle
from functools import partial
from itertools import pairwise

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from safetensors.torch import load_file, save_file
from torch.distributions import AffineTransform, ComposeTransform, TanhTransform

from pyroflows import FlowVI
from pyroflows.errors import CheckpointError, FlowError
from pyroflows.flows import IAF, Flow, Mixture, Planar, Recipe
from pyroflows.guides import AutoFlow, AutoIAF, AutoPlanar, AutoRadial
from pyroflows.transforms import Radial, Standardize
from tests.guides.models import (
    GUIDES,
    Y,
    all_guides,
    assert_same_draws,
    built,
    changed,
    draws_under_seed,
    fit,
    groups,
    parameters,
    regression,
)


def trained(make, model=regression, *args, steps=3):
    guide = make(model)
    fit(model, guide, *args, steps=steps)
    return guide


def points(guide):
    d = guide.get_posterior()
    with torch.no_grad():
        return torch.randn((5, *d.event_shape), dtype=d.rsample().dtype)


# state_dict


@all_guides
def test_fresh_guide_loads_a_state(make):
    """Without a call: same draws, same density; and it can be called afterwards."""
    guide = trained(make)
    fresh = make(regression)
    fresh.load_state_dict(guide.state_dict())
    u = points(guide)
    posterior, expected = fresh.get_posterior(), guide.get_posterior()
    torch.testing.assert_close(posterior.log_prob(u), expected.log_prob(u), rtol=0, atol=0)
    torch.manual_seed(1)
    draws = posterior.sample((5,))
    torch.manual_seed(1)
    torch.testing.assert_close(draws, expected.sample((5,)), rtol=0, atol=0)
    # The first call runs the model; it must not touch the flow.
    fresh(Y)
    assert_same_draws(fresh, guide, Y)
    assert not changed(fresh, parameters(guide))


@all_guides
def test_loaded_guide_trains_on(make):
    fresh = make(regression)
    fresh.load_state_dict(trained(make).state_dict())
    pyro.clear_param_store()
    before = parameters(fresh)
    fit(regression, fresh)
    assert changed(fresh, before) == before.keys()


@all_guides
def test_loaded_guide_needs_no_call_for_quantiles(make):
    guide = trained(make)
    fresh = make(regression)
    fresh.load_state_dict(guide.state_dict())
    fresh.quantiles([0.5], Y)
    torch.manual_seed(1)
    expected = guide.quantiles([0.1, 0.9])
    torch.manual_seed(1)
    for name, value in fresh.quantiles([0.1, 0.9]).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@all_guides
def test_state_of_a_double_guide(make):
    guide = trained(make, groups)
    fresh = make(groups)
    fresh.load_state_dict(guide.state_dict())
    assert {parameter.dtype for parameter in fresh.parameters()} == {torch.float64}
    fresh()
    assert_same_draws(fresh, guide)
    assert next(iter(fresh().values())).dtype == torch.float64


@all_guides
def test_state_loads_into_a_guide_that_was_called(make):
    guide, other = trained(make), built(make, regression)
    other.load_state_dict(guide.state_dict())
    assert_same_draws(guide, other, Y)


@all_guides
def test_state_on_disk_without_pickle(make):
    guide = trained(make)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    fresh = make(regression)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    fresh(Y)
    assert_same_draws(fresh, guide, Y)


@all_guides
@pytest.mark.parametrize("change", [torch.clone, torch.Tensor.double], ids=["clone", "double"])
def test_state_is_of_tensors_that_may_be_changed(make, change):
    """Whoever walks over a state dict meets tensors alone; what says how the flow was built survives a cast."""
    guide = trained(make)
    state = {name: change(value) for name, value in guide.state_dict().items()}
    assert all(name == "_extra_state" or name.startswith("flow.") for name in state)
    fresh = make(regression)
    fresh.load_state_dict(state)
    fresh(Y)
    assert_same_draws(fresh, guide, Y)


@all_guides
def test_state_in_safetensors(make, tmp_path):
    guide = trained(make)
    save_file({name: value.contiguous() for name, value in guide.state_dict().items()}, tmp_path / "guide.safetensors")
    fresh = make(regression)
    fresh.load_state_dict(load_file(tmp_path / "guide.safetensors"))
    fresh(Y)
    assert_same_draws(fresh, guide, Y)


@pytest.mark.parametrize("dim", [1, 2])
def test_state_of_a_flow_function_of_the_user_s(dim):
    """Whatever it makes, and however its layers are called."""
    model = regression if dim == 2 else one_latent

    def flow_fn(dim):
        standardize = Standardize(dim)
        standardize.scale.fill_(2.0)
        layers = [Radial(dim), ComposeTransform([TanhTransform(), AffineTransform(0.0, 0.9), TanhTransform().inv])]
        layers.append(standardize)
        return Flow(layers, base=dist.Laplace(torch.zeros(dim), 1.0).to_event(1))

    guide = trained(lambda model: AutoFlow(model, flow_fn), model)
    fresh = AutoFlow(model, flow_fn)
    fresh.load_state_dict(guide.state_dict())
    fresh(Y)
    assert_same_draws(fresh, guide, Y)


def test_state_loads_into_an_empty_guide_list():
    def guide_list():
        guide = AutoGuideList(groups)
        guide.append(AutoPlanar(poutine.block(groups, expose=["scale", "vector"])))
        guide.append(AutoRadial(poutine.block(groups, expose=["weights", "rate", "local"])))
        return guide

    guide, fresh = guide_list(), guide_list()
    fit(groups, guide)
    fresh.load_state_dict(guide.state_dict())
    pyro.clear_param_store()
    fresh()
    assert_same_draws(fresh, guide)


def one_latent(y=Y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@all_guides
def test_state_of_another_model_raises_at_the_call(make):
    """As often as it is called: nothing must be left half built."""
    guide = make(one_latent)
    guide.load_state_dict(trained(make).state_dict())
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"2 dimensions.*model has 1"):
            guide(Y)
    with pytest.raises(CheckpointError):
        guide.median(Y)


@all_guides
def test_state_of_another_model_does_not_load_into_a_guide_that_was_called(make):
    guide = trained(make, one_latent)
    before = parameters(guide)
    with pytest.raises(CheckpointError, match="of a flow of 2 dimensions, but this guide holds one of 1: they belong"):
        guide.load_state_dict(trained(make).state_dict())
    assert not changed(guide, before)


OTHER_RECIPES = {
    "another family": (
        AutoIAF,
        AutoRadial,
        r"Recipe\('IAF', conditioner='scaled_made'\) made, but this guide has Recipe\('Radial'\)",
    ),
    "number of layers": (
        partial(AutoPlanar, num_layers=2),
        partial(AutoPlanar, num_layers=3),
        r"Recipe\('Planar', num_layers=2\) made, but this guide has Recipe\('Planar', num_layers=3\)",
    ),
    "the user's": (
        partial(AutoFlow, flow_fn=lambda dim: Planar(dim, num_layers=2)),
        partial(AutoPlanar, num_layers=2),
        r"a function of the user's made, but this guide has Recipe\('Planar', num_layers=2\): make the guide with the",
    ),
    "not the user's": (
        AutoFlow,
        partial(AutoFlow, flow_fn=lambda dim: IAF(dim)),
        r"Recipe\('default', scaled=True\) made, but this guide has a function of the user's",
    ),
}


@pytest.mark.parametrize(("make", "other", "message"), OTHER_RECIPES.values(), ids=OTHER_RECIPES)
@pytest.mark.parametrize("called", [True, False])
def test_state_of_another_recipe_does_not_load(make, other, message, called):
    guide = built(other, regression) if called else other(regression)
    with pytest.raises(CheckpointError, match=message):
        guide.load_state_dict(trained(make).state_dict())
    assert (guide.flow is not None) == called


def mixture_of(num, scale):
    guide = AutoFlow(regression)
    parts = []
    for _ in range(num):
        guide.start_at(torch.zeros(2), scale, Y)
        parts.append(guide.flow)
    if num > 1:
        guide.flow = Mixture(parts, torch.zeros(num))
    return guide


def test_state_of_another_kind_of_flow_does_not_load():
    """The first difference is named, and a guide that was not called takes the state as it is."""
    diagonal, triangular = torch.ones(2), torch.eye(2)
    guide = mixture_of(1, diagonal)
    for other, message in [
        (mixture_of(1, triangular), "ends in a triangular layer, but this guide holds one that ends in a diagonal"),
        (mixture_of(2, triangular), "ends in a triangular layer, but this guide holds one that ends in a diagonal"),
        (
            mixture_of(3, diagonal),
            "number of flows that are mixed is 3 in the state, but 1 in this guide: load the state into a fresh",
        ),
    ]:
        with pytest.raises(CheckpointError, match=message):
            guide.load_state_dict(other.state_dict())
        fresh = AutoFlow(regression)
        fresh.load_state_dict(other.state_dict())
        assert len(fresh.flow.components) == len(other.flow.components)
        assert not changed(fresh, parameters(other))


@pytest.mark.parametrize("text", ["", "{}", "nonsense", '{"recipe": {"name": "Glow", "options": {}}}'])
def test_state_that_says_nothing_of_its_flow_raises(text):
    state = {**trained(AutoPlanar).state_dict(), "_extra_state": torch.tensor([*text.encode(), 32], dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="does not say how its flow was built"):
        AutoPlanar(regression).load_state_dict(state)


def test_state_without_its_description_raises():
    state = trained(AutoPlanar).state_dict()
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match='Missing key.*"_extra_state"'):
        AutoPlanar(regression).load_state_dict(state)


def test_state_of_another_kind_of_guide_does_not_load():
    other = trained(AutoNormal)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        AutoPlanar(regression).load_state_dict(other.state_dict())


@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
@all_guides
def test_missing_key_raises(make, which):
    guide = trained(make)
    state = guide.state_dict()
    missing = list(parameters(guide))[which]
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        guide.load_state_dict(state)
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        make(regression).load_state_dict(state)


@all_guides
def test_unexpected_key_raises(make):
    state = {**trained(make).state_dict(), "flow.nonsense": torch.zeros(2)}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        make(regression).load_state_dict(state)


def test_empty_state_does_not_pass_for_a_loaded_one():
    """That of a guide that was never called: it holds nothing, and the guide that loads it stays to be built."""
    guide = AutoPlanar(regression)
    assert not sum(value.numel() for value in guide.state_dict().values())
    guide.load_state_dict(AutoPlanar(regression).state_dict())
    with pytest.raises(FlowError):
        guide.get_posterior()
    assert guide().keys() == {"mu", "sigma"}


# Copies


@all_guides
@pytest.mark.parametrize("model", [regression, groups], ids=["regression", "groups"])
def test_deepcopy_leaves_both_usable(make, model):
    guide = trained(make, model)
    other = copy.deepcopy(guide)
    # Pyro's own copy takes the model from both.
    for one in (guide, other):
        poutine.trace(one.model).get_trace()
        assert_same_draws(one, guide)
        Predictive(model, guide=one, num_samples=2)()
    for one, still in ((guide, other), (other, guide)):
        pyro.clear_param_store()
        before = parameters(still)
        own = parameters(one)
        fit(model, one)
        assert changed(one, own) == own.keys()
        assert not changed(still, before)


@all_guides
def test_deepcopy_of_a_guide_that_was_never_called(make):
    guide = make(regression)
    other = copy.deepcopy(guide)
    assert guide(Y).keys() == other(Y).keys() == {"mu", "sigma"}
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in other.parameters()}


def test_deepcopy_of_local_functions():
    guide = AutoFlow(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), lambda dim: Planar(dim, num_layers=2))
    other = copy.deepcopy(guide)
    assert other().keys() == guide().keys() == {"x"}
    assert_same_draws(copy.deepcopy(guide), guide)


@all_guides
def test_deepcopy_of_a_graph_in_use(make):
    """In the middle of a step, with a graph behind the last loss and gradients on the parameters."""
    guide = make(regression)
    guide()
    loss = Trace_ELBO().differentiable_loss(regression, guide)
    guide.get_transform()(guide.get_base_dist().sample())
    other = copy.deepcopy(guide)
    loss.backward()
    assert_same_draws(guide, other)


def test_deepcopy_shares_the_model_but_no_tensors():
    guide = trained(AutoPlanar)
    other = copy.deepcopy(guide)
    assert [site.name for site in other.structure.latents] == ["mu", "sigma"]
    assert other.model is guide.model
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in other.parameters()}


def test_deepcopy_of_a_guide_list():
    guide = AutoGuideList(groups)
    guide.append(AutoPlanar(poutine.block(groups, expose=["scale", "vector"])))
    guide.append(AutoNormal(poutine.block(groups, expose=["weights", "rate", "local"])))
    fit(groups, guide)
    other = copy.deepcopy(guide)
    assert_same_draws(guide, other)
    for one in (guide, other):
        assert one[0].model is not None


@all_guides
@pytest.mark.parametrize("model", [regression, groups], ids=["regression", "groups"])
def test_pickle_after_training(make, model):
    guide = trained(make, model)
    other = pickle.loads(pickle.dumps(guide))
    assert_same_draws(guide, other)
    poutine.trace(guide.model).get_trace()
    u = points(guide)
    torch.testing.assert_close(other.get_posterior().log_prob(u), guide.get_posterior().log_prob(u), rtol=0, atol=0)
    # Still trainable, and so is the guide that was pickled.
    for one in (guide, other):
        pyro.clear_param_store()
        before = parameters(one)
        fit(model, one)
        assert changed(one, before) == before.keys()


def test_pickle_keeps_a_recipe():
    guide = pickle.loads(pickle.dumps(AutoIAF(regression, num_layers=2)))
    assert guide.flow_fn == Recipe("IAF", num_layers=2, conditioner="scaled_made")
    guide.load_state_dict(trained(partial(AutoIAF, num_layers=2)).state_dict())


def test_pickle_of_a_guide_of_local_functions():
    guide = AutoFlow(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), lambda dim: Planar(dim, num_layers=2))
    guide()
    assert_same_draws(guide, pickle.loads(pickle.dumps(guide)))


def test_whole_guide_through_torch_save(tmp_path):
    guide = trained(AutoIAF)
    torch.save(guide, tmp_path / "guide.pt")
    assert_same_draws(guide, torch.load(tmp_path / "guide.pt", weights_only=False))


# The param store


@pytest.mark.parametrize("name", GUIDES)
def test_names_in_the_param_store(name):
    guide = trained(GUIDES[name])
    store = pyro.get_param_store()
    # "AutoPlanar.flow$$$transform.layers.0...": the guide's name, its module, and the parameter's path in the module.
    expected = {f"{name}.{path}".replace(".flow.", ".flow$$$", 1): p for path, p in guide.named_parameters()}
    assert set(store.keys()) == set(expected)
    assert all(store[key] is parameter for key, parameter in expected.items())


def on_disk(state):
    file = io.BytesIO()
    torch.save(state["params"], file)
    file.seek(0)
    return {**state, "params": torch.load(file, weights_only=True)}


@all_guides
@pytest.mark.parametrize("saved", [on_disk, copy.deepcopy], ids=["disk", "copy"])
def test_param_store_restores_a_fresh_guide(make, saved):
    guide = trained(make)
    state = saved(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    fresh = make(regression)
    fresh(Y)
    assert not changed(fresh, parameters(guide))
    assert_same_draws(fresh, guide, Y)


@all_guides
@pytest.mark.parametrize("saved", [on_disk, copy.deepcopy], ids=["disk", "copy"])
def test_param_store_restores_the_guide_itself(make, saved):
    """The best state of a training, say: set back, it is what the guide draws from and trains on from."""
    guide = trained(make)
    expected = parameters(guide)
    state = saved(pyro.get_param_store().get_state())
    fit(regression, guide)
    pyro.get_param_store().set_state(state)
    guide(Y)
    assert not changed(guide, expected)
    fit(regression, guide)
    assert changed(guide, expected) == expected.keys()


@all_guides
def test_restored_guide_trains_on(make):
    trained(make)
    state = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    fresh = make(regression)
    fresh(Y)
    before = parameters(fresh)
    fit(regression, fresh)
    assert changed(fresh, before) == before.keys()


# Guides of one class have one name, so in one process they meet in the store. What an optimiser trains must be the
# parameters of the guide that it was given.


@all_guides
def test_second_guide_of_the_same_name_trains(make):
    """A notebook makes a guide anew, and does not clear the store."""
    trained(make)
    second = make(regression)
    second(Y)
    before = parameters(second)
    fit(regression, second)
    assert changed(second, before) == before.keys()


@all_guides
def test_second_guide_of_another_model_trains(make):
    trained(make)
    second = make(groups)
    second()
    before = parameters(second)
    fit(groups, second)
    assert changed(second, before) == before.keys()


@all_guides
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))], ids=["deepcopy", "pickle"]
)
def test_copy_and_original_train_in_turns(make, copied):
    guide = trained(make)
    other = copied(guide)
    for one, still in ((guide, other), (other, guide), (guide, other)):
        before, own = draws_under_seed(still, Y), parameters(one)
        fit(regression, one)
        assert changed(one, own) == own.keys()
        for name, value in draws_under_seed(still, Y).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@all_guides
def test_loaded_state_wins_over_the_param_store(make):
    guide = trained(make)
    state = copy.deepcopy(guide.state_dict())
    expected = parameters(guide)
    fit(regression, guide)
    fresh = make(regression)
    fresh.load_state_dict(state)
    fresh(Y)
    assert not changed(fresh, expected)
    fit(regression, fresh)
    assert changed(fresh, expected) == expected.keys()


GIVEN = {
    "state": lambda guide, state: guide.load_state_dict(state),
    "start": lambda guide, state: guide.start_at(torch.ones(2), torch.full((2,), 0.5), Y),
    "fit": lambda guide, state: FlowVI(regression, guide, num_steps=2, seed=0, progress_bar=False).run(Y),
}


@pytest.mark.parametrize("give", GIVEN.values(), ids=GIVEN)
def test_values_that_a_guide_is_given_win_over_a_store_that_was_loaded_before(give):
    state = copy.deepcopy(trained(AutoPlanar).state_dict())
    guide = trained(AutoPlanar)
    loaded, again = (on_disk(pyro.get_param_store().get_state()) for _ in range(2))
    fit(regression, guide)
    pyro.clear_param_store()
    pyro.get_param_store().set_state(loaded)
    give(guide, state)
    expected = parameters(guide)
    guide(Y)
    assert not changed(guide, expected)
    # A store that is loaded after that counts again.
    pyro.get_param_store().set_state(again)
    guide(Y)
    loaded_values = {name.partition(".")[2].replace("$$$", "."): value for name, value in again["params"].items()}
    assert not changed(guide, loaded_values)


# Nothing stale


@all_guides
def test_every_step_changes_the_density(make):
    """By hand with a torch optimiser, and each density scored before and after its parameters changed."""
    guide = built(make, regression)
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)
    u = points(guide)
    transform = guide.get_transform()
    seen = []
    for _ in range(3):
        seen.append((guide.get_posterior().log_prob(u).detach(), transform(u).detach()))
        optimiser.zero_grad()
        Trace_ELBO().differentiable_loss(regression, guide).backward()
        optimiser.step()
    for (log_prob, x), (next_log_prob, next_x) in pairwise(seen):
        assert (log_prob != next_log_prob).all()
        assert (x != next_x).any(-1).all()


@all_guides
def test_one_svi_object_over_the_whole_life_of_a_guide(make):
    """Steps, then quantiles, Predictive, a copy, a density, and steps again: no graph is walked through twice."""
    guide = make(regression)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(3):
        svi.step()
        guide.quantiles([0.5])
        Predictive(regression, guide=guide, num_samples=2)()
        copy.deepcopy(guide)
        guide.get_posterior().log_prob(points(guide)).sum().backward()
        guide.zero_grad()
        before = parameters(guide)
        svi.step()
        assert changed(guide, before) == before.keys()


def test_parameters_of_the_guide_are_those_of_its_flow():
    guide = AutoFlow(regression, lambda dim: IAF(dim, num_layers=2, base="student_t"))
    assert not list(guide.parameters())
    guide()
    assert {id(p) for p in guide.parameters()} == {id(p) for p in guide.flow.parameters()}
    names = dict(guide.named_parameters())
    assert "flow.base.raw_df" in names
    # The last layer holds location and scale, one pair a latent.
    assert names["flow.transform.layers.2.parameters_of.value"].shape == (2, 2)

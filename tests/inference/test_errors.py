"""Every wrong input has an error that says what was wrong, where, and what to do."""

import warnings
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch.distributions import constraints

from pyroflows import (
    DataError,
    DivergedError,
    FlowError,
    FlowVI,
    ModelError,
    OptionError,
    Posterior,
    ShapeError,
    importance_sample,
    load_posterior,
    to_arviz,
)
from pyroflows.errors import InexactError
from pyroflows.flows import Mixture, Planar
from pyroflows.guides import AutoFlow, AutoPlanar
from pyroflows.training.loop import History
from pyroflows.transforms import FlowTransform
from tests.transforms.examples import EstimatedScale

Y = torch.tensor([0.5, -1.0, 2.0])


def good(y=Y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Normal(mean[..., :1], scale[..., None]).to_event(1), obs=y[:, None])


def fit(model, *args, num_steps=3, **options):
    return FlowVI(model, num_steps=num_steps, seed=0, progress_bar=False, **options).run(*args)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "num_particles must be at least 1, got 0"),
        ({"num_particles": -4}, "num_particles must be at least 1, got -4"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_steps": -1}, "num_steps must be at least 1, got -1"),
        ({"estimator": "score"}, "estimator must be one of .*'auto'.*'total'.*'path'.* got 'score'"),
        ({"guide": AutoNormal(good)}, "FlowVI trains flow guides, but got AutoNormal: use pyro.infer.SVI"),
        ({"guide": Planar(3)}, "a function latent_dim -> flow, got a flow"),
        ({"guide": AutoFlow(good), "dtype": torch.float64}, "give dtype to the guide, not to FlowVI"),
        ({"compile": "jit"}, "compile must be one of .*'auto'.*'trace'.*'inductor'.*'none'.* got 'jit'"),
        ({"num_starts": 0}, "num_starts must be at least 1, got 0"),
        ({"temper": 0.0}, "temper must be an inverse temperature between 0 and 1, got 0.0"),
        ({"temper": 1.0}, "temper must be an inverse temperature between 0 and 1, got 1.0"),
        ({"temper": 3}, "temper must be an inverse temperature between 0 and 1, got 3"),
        ({"estimator": "vargrad", "num_particles": 1}, 'estimator="vargrad" needs .* num_particles of at least 2'),
    ],
)
def test_options(options, message):
    """At once, not after minutes of training."""
    with pytest.raises(OptionError, match=message) as caught:
        FlowVI(good, **options)
    assert isinstance(caught.value, FlowError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("option", ["num_particle", "lr", "checkpoint"])
def test_unknown_options(option):
    with pytest.raises(TypeError, match=option):
        FlowVI(good, **{option: 1})


@pytest.mark.parametrize("option", ["num_sample", "group"])
def test_unknown_options_of_arviz(option):
    posterior = fit(good)
    with pytest.raises(TypeError, match=option):
        posterior.to_arviz(**{option: 1})


@pytest.mark.parametrize("guide", ["planar", 3, [1, 2]])
def test_what_is_no_guide(guide):
    with pytest.raises(OptionError, match="guide"):
        fit(good, guide=guide)


def test_a_recipe_whose_draws_carry_no_gradients():
    with pytest.raises(OptionError, match="carry no gradients.*mixture of flows.*give another guide"):
        fit(good, guide=lambda dim: Mixture([Planar(dim), Planar(dim)]))


def test_a_flow_of_another_size():
    with pytest.raises(ShapeError, match="a flow of 3 dimensions without a context is needed.* has events of size 5"):
        fit(good, guide=lambda dim: Planar(5))


def test_a_guide_of_another_model():
    def other():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoPlanar(other)
    with pytest.raises(ModelError, match="'mean'|'scale'|'z'"):
        fit(good, guide=guide)


# Models


def without_latents(y=Y):
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def counts():
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    pyro.sample("unseen", dist.Poisson(rate))


def sequential_plate():
    for i in pyro.plate("N", 3):
        pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))


def on_a_sphere():
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (without_latents, "no latent variables"),
        (counts, r"latent site 'unseen' is discrete \(Poisson\)"),
        (sequential_plate, "latent site 'x_0' stands in the sequential plate 'N': use 'with pyro.plate"),
        (on_a_sphere, "latent site 'direction' has support .* no bijection to the reals"),
    ],
)
def test_models_that_cannot_be_fitted(model, message):
    with pytest.raises(ModelError, match=message) as caught:
        fit(model)
    assert isinstance(caught.value, ValueError)


def test_the_advice_about_discrete_latents_works():
    """The support of counts, cut off."""

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("N", len(y)):
            logits = dist.Poisson(rate[..., None]).log_prob(torch.arange(100.0))
            count = pyro.sample("count", dist.Categorical(logits=logits))
            pyro.sample("y", dist.Normal(1.0 * count, 1.0), obs=y)

    assert fit(model, Y).sample(3)["count"].shape == (3, len(Y))


def appearing(y=Y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x > 0:
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def vanishing(y=Y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x < 0.3:
        pyro.sample("other", dist.Normal(0.0, 1.0))


def appearing_by_a_list(y=Y):
    """What is read of a tensor as a list is not seen when the model is described."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x.tolist() > 0:
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def growing(y=Y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    size = 2 if x > 0 else 3
    pyro.sample("vector", dist.Normal(torch.zeros(size), 1.0).to_event(1))


@pytest.mark.filterwarnings("ignore:the model runs draw by draw")
@pytest.mark.parametrize(
    ("model", "site"), [(appearing, "extra"), (appearing_by_a_list, "extra"), (vanishing, "other"), (growing, "vector")]
)
@pytest.mark.parametrize("seed", range(5))
def test_dynamic_structure(model, site, seed):
    """Whatever the first look at the model shows."""
    with pytest.raises(ModelError, match=rf"dynamic structure.*'{site}'"):
        FlowVI(model, num_steps=20, seed=seed, progress_bar=False).run(Y)


def test_dynamic_structure_at_other_arguments():
    """A posterior with data for which the latents are others."""

    def model(size):
        pyro.sample("x", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    posterior = fit(model, 2)
    with pytest.raises(ModelError, match=r"'x' has shape \(2,\) in one run and \(3,\) in another"):
        posterior.with_data(3)


def local_effects(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("N", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize(
    "ask", [lambda p, y: p.predictive(10, y), lambda p, y: p.with_data(y).elbo], ids=["predictive", "with_data"]
)
def test_local_latents_at_other_rows(size, ask):
    """Draws of 4 effects say nothing of 6, and one must not be spread over 6."""
    posterior = fit(local_effects, torch.zeros(size))
    with pytest.raises(ModelError, match="'effect'"):
        ask(posterior, torch.zeros(6))


def nested_effects(x, y=None):
    mean = pyro.sample("mean", dist.Normal(5.0, 0.1))
    with pyro.plate("group", 2, dim=-2):
        of_group = pyro.sample("of_group", dist.Normal(mean, 1.0))
        with pyro.plate("N", len(x), dim=-1):
            effect = pyro.sample("effect", dist.Normal(of_group, 0.1))
            with pyro.poutine.scale(scale=1.0):
                second = pyro.sample("second", dist.Normal(effect, 0.1))
            pyro.deterministic("sum", effect + second)
            pyro.sample("y", dist.Normal(second + x, 0.1), obs=y)


def local_alone(x, y=None):
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.Normal(pyro.sample("effect", dist.Normal(5.0, 1.0)) + x, 0.1), obs=y)


@pytest.mark.parametrize("model", [nested_effects, local_alone])
def test_the_way_to_predict_other_rows_works(model):
    torch.manual_seed(0)
    y = torch.full((2, 3) if model is nested_effects else (3,), 5.0)
    posterior = fit(model, torch.zeros(3), y)
    x = torch.arange(4.0)
    with pytest.raises(ModelError, match=r"\(2, 4\)|\(4,\)") as caught:
        posterior.predictive(200, x)
    text = str(caught.value)
    assert ("['mean', 'of_group']" in text) == (model is nested_effects)
    names = {"posterior": posterior, "model": model, "pyro": pyro, "x": x}
    first, _, call = text[text.index("of the fit: ") + 12 : text.index("(...)")].rpartition("; ")
    exec(first, names)
    predicted = eval(call, names)(x)
    assert predicted["y"].shape[0] == 200 and predicted["y"].shape[-1] == 4
    assert (predicted["y"].reshape(-1, 4).mean(0) - x - 5).abs().max() < 0.5
    if model is nested_effects:
        assert predicted["sum"].shape == (200, 2, 4)


# Data


@pytest.mark.parametrize("value", [torch.tensor([1.0, torch.nan, 2.0, torch.nan])])
def test_nan_data(value):
    with pytest.raises(DataError, match=r"observed site 'y' has 2 NaN of 4 values, at \(1, 0\), \(3, 0\): ") as caught:
        fit(good, value)
    assert isinstance(caught.value, ValueError)


def masked(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("N", len(y)), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y.nan_to_num())


def test_the_advice_about_nan_data_works():
    """Masked rows do not count, whatever stands there."""
    y = torch.tensor([1.0, torch.nan, 2.0])
    posterior = FlowVI(masked, num_steps=300, seed=0, progress_bar=False).run(y)
    assert posterior.sample(2000)["mean"].mean().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_data(value):
    """The log joint is -inf there, whatever the latents."""
    with pytest.raises((DataError, ModelError), match="'y'"):
        fit(good, torch.tensor([1.0, value, 2.0]))


def test_data_outside_the_support():
    """Pyro's own message names the site."""

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("N", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    with pytest.raises(ValueError, match="'y'|support"):
        fit(model, torch.tensor([1.0, -1.0]))


# Shapes, data and arguments


def line(x, y=None):
    a, b = pyro.sample("a", dist.Normal(0.0, 3.0)), pyro.sample("b", dist.Normal(0.0, 3.0))
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Normal(a + b * x, 0.3), obs=y)


X = torch.linspace(-1, 1, 60)
ON_LINE = 1 + 2 * X + 0.3 * torch.randn(60, generator=torch.Generator().manual_seed(0))


def test_data_of_another_shape():
    """The likelihood would have 60 times 60 terms."""
    message = r"observed site 'y' in plate 'n' of size 60 has a value of shape \(60, 1\).*y\.squeeze\(-1\)"
    with pytest.raises(ModelError, match=message):
        fit(line, X, ON_LINE[:, None])
    with pytest.raises(ModelError, match=message):
        importance_sample(line, AutoFlow(line), X, ON_LINE[:, None], num_samples=10, progress_bar=False)
    with pytest.raises(ModelError, match=message):
        AutoFlow(line)(X, ON_LINE[:, None])
    with pytest.raises(ModelError, match=message):
        fit(line, X, ON_LINE).with_data(X, ON_LINE[:, None])


def test_forgotten_data():
    with pytest.warns(UserWarning, match="nothing is observed.*the posterior is the prior.*'y' to be given") as record:
        posterior = fit(line, X)
    assert record[0].filename == __file__
    assert not posterior.structure.has_data
    assert fit(line, X, ON_LINE).structure.has_data


FORMS = {
    "numpy": lambda tensor: tensor.double().numpy(),
    "series": lambda tensor: pd.Series(tensor.double().numpy()),
    "list": lambda tensor: tensor.tolist(),
}


@pytest.mark.parametrize("form", FORMS)
def test_arguments_that_are_no_tensors(form):
    """A fit, new data, predictions, weights, ArviZ data and a file give what they give with tensors."""
    convert = FORMS[form]
    args = convert(X), convert(ON_LINE)
    posterior, expected = fit(line, *args), fit(line, X, ON_LINE)
    assert posterior.elbo == pytest.approx(expected.elbo, abs=1e-3)
    assert posterior.with_data(*args).elbo == pytest.approx(expected.elbo, abs=1e-3)
    assert posterior.predictive(5, convert(X[:7]))["y"].shape == (5, 7)
    weighted = importance_sample(line, posterior, *args, num_samples=200, progress_bar=False)
    assert weighted.log_evidence == pytest.approx(expected.log_evidence, abs=0.1)
    data = to_arviz(posterior.sample(10), line, args)
    assert data["observed_data"]["y"].shape == (60,)


@pytest.mark.parametrize("obs", [9.5, [9.5], np.array(9.5)], ids=repr)
def test_observations_that_are_no_tensors(obs):
    def model(y):
        w = pyro.sample("w", dist.Normal(8.5, 1.0))
        pyro.sample("m", dist.Normal(w, 0.75), obs=y)

    posterior = FlowVI(model, seed=0, progress_bar=False).run(obs)
    exact = dist.Normal(8.5, 1.25).log_prob(torch.tensor(9.5)).item()
    assert posterior.log_evidence == pytest.approx(exact, abs=1e-3)
    assert AutoFlow(model)(obs)["w"].shape == ()


def test_a_saved_posterior_with_arguments_of_numpy(tmp_path):
    args = X.numpy(), ON_LINE.numpy()
    posterior = fit(line, *args)
    posterior.save(tmp_path / "posterior.safetensors")
    assert load_posterior(tmp_path / "posterior.safetensors", line, *args).elbo == posterior.elbo


@pytest.mark.parametrize("index", [0, 1])
def test_nan_in_any_argument(index):
    args = [X, ON_LINE]
    args[index] = torch.where(X[3] == X, torch.nan, args[index])
    with pytest.raises(DataError, match=rf"argument '{'xy'[index]}' has 1 NaN of 60 values, the first at \[3\]"):
        fit(line, *args)


def test_nan_in_arguments_of_predictions():
    with pytest.raises(DataError, match=r"argument 'x' has 1 NaN of 2 values, the first at \[1\]"):
        fit(line, X, ON_LINE).predictive(5, torch.tensor([1.0, torch.nan]))


def test_nan_under_a_mask_make_the_gradient_nan():
    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=~x.isnan()):
            pyro.sample("y", dist.StudentT(3.0, slope * x, 1.0, validate_args=False), obs=y)

    with pytest.raises(
        DataError, match=r"argument 'x' has 1 NaN of 3 values, the first at \[1\].*gradient.*nan_to_num"
    ):
        fit(model, torch.tensor([1.0, torch.nan, 2.0]), Y)
    assert fit(model, torch.tensor([1.0, 0.5, 2.0]), Y).sample(3)["slope"].shape == (3,)


def test_a_model_that_draws_rows_by_itself():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[torch.randperm(len(x))[:2]])

    with pytest.raises(ModelError, match="no fixed log joint.*'x'.*outside of pyro.sample"):
        fit(model, Y)
    svi = SVI(model, AutoFlow(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert svi.step(Y) > 0  # there every step may have other rows


def test_dropout():
    network = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.1))

    def model(x, y):
        weights = pyro.sample("weights", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        features = network(x[:, None]).detach()
        pyro.sample("y", dist.Normal(weights @ features.T, 1.0).to_event(1), obs=y)

    with pytest.raises(ModelError, match=r"'y'.*\.eval\(\) on a module with dropout"):
        fit(model, X, ON_LINE)
    network.eval()
    fit(model, X, ON_LINE)


def test_a_flat_prior_on_what_nothing_depends():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("unused", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ModelError, match="the prior of site 'unused' is flat"):
        fit(model, torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, "float32"])
def test_dtypes(dtype):
    for make in (FlowVI, AutoFlow):
        with pytest.raises(OptionError, match="dtype must be torch.float32 or torch.float64"):
            make(good, dtype=dtype)


def test_a_model_that_is_no_function():
    with pytest.raises(OptionError, match="model must be a function with pyro.sample statements, got Tensor"):
        FlowVI(torch.zeros(3))


# Where a fit starts


def far_away():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("wall", torch.where(x > 50.0, 0.0, -torch.inf))


def test_log_joint_that_is_not_finite_at_the_start():
    with pytest.raises(ModelError, match=r"not finite at the initial values: site 'wall'.*-inf.*init_loc_fn"):
        fit(far_away)


def test_the_advice_about_the_start_works():
    guide = AutoFlow(far_away, init_loc_fn=init_to_value(values={"x": torch.tensor(60.0)}))
    posterior = fit(far_away, guide=guide)
    assert posterior.sample(10)["x"].mean() > 50


def test_an_error_in_the_model_passes_on():
    class OfTheUser(Exception):
        pass

    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        raise OfTheUser("what the user wrote")

    with pytest.raises(OfTheUser, match="what the user wrote"):
        fit(model)


# Training


def unbounded():
    """A log joint that is NaN at all draws once one of them is far from the start."""
    x = pyro.sample("x", dist.Normal(0.0, 10.0))
    pyro.factor("pull", torch.where(x.max() < 3.0, 10 * x, torch.nan))


def test_divergence_leaves_the_last_good_state():
    guide = AutoPlanar(unbounded, num_layers=2)
    with pytest.raises(DivergedError, match=r"25 steps in a row.*non-finite elbo.*last good state.*learning rate"):
        fit(unbounded, guide=guide, num_steps=2000)
    assert all(torch.isfinite(p).all() for p in guide.flow.parameters())
    assert guide.flow().sample((100,)).mean() < 3.0


def test_an_interrupted_fit_leaves_its_guide():
    # Compiled, the model's code does not run in a step, but the optimizer's does.
    class Interrupted(torch.optim.Adam):
        def step(self, closure=None):
            if next(count) == 100:
                raise KeyboardInterrupt
            return super().step(closure)

    count = iter(range(10**6))

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    guide = AutoPlanar(model, num_layers=2, init_loc_fn=init_to_value(values={"mean": torch.tensor(0.0)}))
    with pytest.raises(KeyboardInterrupt):
        fit(model, torch.tensor(0.5), guide=guide, num_steps=1000, optimizer=partial(Interrupted, lr=0.05))
    draws = guide.flow().sample((100,))
    assert torch.isfinite(draws).all()
    assert draws.mean() > 0.2
    # And what there is can be used.
    assert Posterior(model, guide, (torch.tensor(0.5),), {}, History()).sample(5)["mean"].shape == (5,)


# Posteriors


@pytest.fixture(scope="module")
def posterior():
    return fit(good)


def draws_of(posterior):
    return {name: value.clone() for name, value in posterior.sample(5).items()}


@pytest.mark.parametrize(
    "ask",
    [
        lambda p, n: p.sample(n),
        lambda p, n: p.importance_sample(n),
        lambda p, n: p.predictive(n),
        lambda p, n: p.to_arviz(num_samples=n),
    ],
    ids=["sample", "importance_sample", "predictive", "to_arviz"],
)
@pytest.mark.parametrize(
    ("num_samples", "message"),
    [
        (0, "num_samples must be at least 1, got 0"),
        (-1, "num_samples must be at least 1, got -1"),
        (1.5, "num_samples must be an integer of at least 1, got 1.5"),
        ("100", "num_samples must be an integer of at least 1, got '100'"),
        (True, "num_samples must be an integer of at least 1, got True"),
    ],
)
def test_num_samples(posterior, ask, num_samples, message):
    with pytest.raises(OptionError, match=message):
        ask(posterior, num_samples)


@pytest.mark.parametrize("number", [np.int64(7), torch.tensor(7)])
def test_numbers_of_numpy_and_torch(posterior, number):
    assert posterior.sample(number)["scale"].shape == (7,)
    assert len(posterior.predictive(number)["y"]) == 7
    assert len(posterior.importance_sample(number).resample(number)["scale"]) == 7
    assert importance_sample(good, posterior, Y, num_samples=number, progress_bar=False).draws["scale"].shape == (7,)
    assert FlowVI(good, num_steps=number, num_particles=number, num_starts=number).num_steps == 7


def test_log_prob_of_arrays(posterior):
    draws = posterior.sample(5)
    arrays = {name: value.double().numpy() for name, value in draws.items()}
    assert posterior.log_prob(arrays).tolist() == pytest.approx(posterior.log_prob(draws).tolist(), abs=1e-3)


def test_log_prob_of_a_site_that_does_not_exist(posterior):
    draws = posterior.sample(5)
    with pytest.raises(OptionError, match=r"the model has no site 'scal': its sites are 'scale', 'mean', 'y'"):
        posterior.log_prob({"scal": draws["scale"], "mean": draws["mean"]})


@pytest.mark.parametrize(
    "ask",
    [
        lambda p: p.predictive(5, Y, z=1),
        lambda p: importance_sample(good, p, Y, z=1, progress_bar=False),
        lambda p: to_arviz(p.sample(5), good, (Y,), {"z": 1}),
        lambda p: p.with_data(Y, z=1),
        lambda p: FlowVI(good).run(Y, z=1),
    ],
    ids=["predictive", "importance_sample", "to_arviz", "with_data", "run"],
)
def test_arguments_that_the_model_does_not_have(posterior, ask):
    message = r"the model does not take these arguments \(got an unexpected keyword argument 'z'\): it takes \(y=.*\)"
    with pytest.raises(OptionError, match=message):
        ask(posterior)


def test_arguments_that_the_model_lacks():
    with pytest.raises(OptionError, match=r"missing a required argument: 'y'\): it takes \(x, y\)"):
        FlowVI(lambda x, y: None).run(Y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(5, 3)}, r"site 'mean' must have shape \(S, 2\), got \(5, 3\)"),
        ({"mean": torch.zeros(())}, r"site 'mean' must have shape \(S, 2\), got \(\)"),
        ({"mean": None}, r"site 'mean' must have shape \(S, 2\), got None"),
        ({"scale": None}, r"site 'scale' must have shape \(S,\), got None"),
        ({"scale": torch.ones(5, 7)}, "'scale'"),
        ({"scale": torch.ones(4)}, "'scale'|'mean'"),
    ],
    ids=["event", "scalar", "missing", "missing scalar", "too many dimensions", "too few draws"],
)
def test_log_prob_of_wrong_shapes(posterior, change, message):
    draws = {name: value for name, value in (draws_of(posterior) | change).items() if value is not None}
    with pytest.raises(ShapeError, match=message):
        posterior.log_prob(draws)


@pytest.mark.parametrize("value", [-1.0, torch.nan])
def test_log_prob_outside_the_support(posterior, value):
    """An error that names the site, never NaN."""
    draws = draws_of(posterior)
    draws["scale"][2] = value
    with pytest.raises(FlowError, match="'scale'"):
        posterior.log_prob(draws)


def test_a_guide_that_is_not_built():
    with pytest.raises(ModelError, match="not built yet"):
        Posterior(good, AutoFlow(good), (), {}, History())


def test_summary_of_an_unknown_site(posterior):
    with pytest.raises((KeyError, FlowError), match="nowhere"):
        posterior.summary(var_names=["nowhere"])


def test_a_posterior_of_another_model(posterior):
    def other():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match="'mean'|'scale'|'z'"):
        Posterior(other, posterior.guide, (), {}, History())


def test_saving_where_nothing_can_be_written(posterior, tmp_path):
    with pytest.raises((OSError, FlowError)):
        posterior.save(tmp_path / "no" / "such" / "directory")


# What is no error


def test_a_sound_fit_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = fit(good)
        repr(posterior)
        posterior.importance_sample(50)
        posterior.predictive(10)


@pytest.mark.parametrize("num_particles", [1, 2])
def test_few_particles_warn_of_nothing(num_particles):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(good, num_particles=num_particles)


def test_a_flow_without_exact_densities_is_refused_before_it_is_trained():
    class Rough(EstimatedScale):
        _exact = FlowTransform._exact

    calls = []
    vi = FlowVI(
        lambda: pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1)),
        lambda dim: [Rough(dim)],
        optimizer=lambda parameters: calls.append(1) or torch.optim.Adam(parameters),
        progress_bar=False,
    )
    with pytest.raises(InexactError, match="log-determinant of Rough is an estimate"):
        vi.run()
    assert not calls


def test_a_run_that_is_not_compiled_warns_each_time():
    """What one run could not compile says nothing of the next."""

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("y", -0.5 * (x - y) ** 2 - 0.1 * torch.as_tensor(x.detach().numpy() ** 2))

    vi = FlowVI(model, num_steps=3, num_starts=1, seed=0, progress_bar=False)
    for _ in range(2):
        with pytest.warns(UserWarning, match="without compilation"):
            vi.run(torch.tensor(1.0))


def test_data_in_one_branch_are_refused_without_advice_on_initial_values():
    """The search for modes finds the other branch, which no initial values take away."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 1.0:
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(3.0))
        pyro.sample("z", dist.Normal(x, 1.0), obs=torch.tensor(0.5))

    with pytest.warns(UserWarning, match="draw by draw"), pytest.raises(ModelError, match="site 'y'.*run$"):
        FlowVI(model, seed=0, progress_bar=False).run()


def test_a_fit_finds_that_a_branch_through_numpy_is_for_one_draw():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        scale = 1.0 if (x.detach().numpy() > -1.0).all() else 5.0
        pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(-1.0))

    with pytest.warns(UserWarning, match="draw by draw"):
        posterior = FlowVI(model, num_steps=2, num_starts=1, seed=0, progress_bar=False).run()
    assert posterior.log_joint.batched.mode == "loop"

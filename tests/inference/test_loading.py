"""Posteriors that are loaded with the data of the fit, without them, and into other models."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive

import pyroflows as pf
from pyroflows import CheckpointError, ModelError, load_posterior
from pyroflows.guides import AutoFlow, AutoPlanar
from pyroflows.training.history import History

X = torch.arange(5.0)
Y = 2 * X + 1


def line(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    angle = pyro.sample("angle", dist.VonMises(1.0, 2.0))
    pyro.deterministic("twice", 2 * slope)
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x + angle.cos(), scale + 0.1), obs=y)


def untrained(model, *args, flow_fn=None):
    """The posterior of a guide as it starts, which a file holds like any other."""
    guide = AutoFlow(model, flow_fn or partial(pf.flows.Planar, num_layers=1))
    guide(*args)
    return pf.Posterior(model, guide, args, {}, History({"elbo": [-3.0]}), num_diagnostic_samples=100)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    posterior = untrained(line, X, Y)
    posterior.diagnose()
    path = tmp_path_factory.mktemp("saved") / "line"
    posterior.save(path)
    return posterior, path


def drawn(posterior):
    torch.manual_seed(0)
    return posterior.sample(4)


@pytest.mark.parametrize("args", [(), (X,), (X, None), (X[:3],)], ids=["nothing", "inputs", "None", "other inputs"])
def test_without_data_a_posterior_draws_scores_and_predicts(args, saved):
    posterior, path = saved
    loaded = load_posterior(path, line, *args)
    draws, right = drawn(loaded), drawn(posterior)
    assert draws.keys() == right.keys() - (set() if args else {"twice"})
    assert all(torch.equal(value, right[name]) for name, value in draws.items())
    assert torch.equal(loaded.log_prob(draws), posterior.log_prob(right))
    predicted = loaded.predictive(7, torch.zeros(2))
    assert predicted["y"].shape == (7, 2) and predicted["twice"].shape == (7,)
    assert set(loaded.summary().index) >= {"slope", "scale", "angle"}
    if args:
        assert loaded.predictive(7)["y"].shape == (7, len(args[0]))
    else:
        with pytest.raises(ModelError, match="give predictive the inputs"):
            loaded.predictive(7)


@pytest.mark.parametrize("args", [(), (X,)], ids=["nothing", "inputs"])
def test_without_data_a_posterior_scores_draws_of_the_fit(args, saved):
    """Draws have deterministic and observed sites too, of which a posterior without data does not know."""
    posterior, path = saved
    loaded = load_posterior(path, line, *args)
    draws = {**drawn(posterior), **posterior.predictive(4)}
    assert torch.equal(loaded.log_prob(draws), posterior.log_prob(draws))
    misspelt = {name.replace("slope", "slop"): value for name, value in draws.items()}
    with pytest.raises(pf.ShapeError, match="draws of site 'slope'"):
        loaded.log_prob(misspelt)
    with pytest.raises(pf.OptionError, match="no site 'slop'"):
        posterior.log_prob(misspelt)


@pytest.mark.parametrize(
    "ask",
    [
        lambda p: p.elbo,
        lambda p: p.khat,
        lambda p: p.log_evidence,
        lambda p: p.diagnose(),
        lambda p: p.importance_sample(10),
        lambda p: p.mcmc(10),
        lambda p: p.bridge_sample(),
        lambda p: p.fit_proposal(),
        lambda p: p.distill(),
        lambda p: p.to_arviz(),
        lambda p: p.save("anywhere"),
    ],
)
@pytest.mark.parametrize("args", [(), (X,)], ids=["nothing", "inputs"])
def test_what_needs_data_says_so(args, ask, saved):
    with pytest.raises(ModelError, match=r"without (the|its) data.*with_data"):
        ask(load_posterior(saved[1], line, *args))


@pytest.mark.parametrize("args", [(), (X,)], ids=["nothing", "inputs"])
def test_data_may_follow(args, saved):
    posterior, path = saved
    later = load_posterior(path, line, *args).with_data(X, Y)
    assert type(later) is pf.Posterior
    assert later.elbo == load_posterior(path, line, X, Y).elbo
    assert drawn(later).keys() == drawn(posterior).keys()


def test_a_guide_without_data_works_in_pyro(saved):
    for args in ((), (X,)):
        guide = load_posterior(saved[1], line, *args).guide
        assert Predictive(line, guide=guide, num_samples=3)(X[:2])["y"].shape == (3, 2)


def test_the_verdict_of_the_fit_is_printed(saved):
    posterior, path = saved
    text = repr(load_posterior(path, line))
    assert "the verdict of the fit when it was saved" in text and str(posterior.diagnose()) in text


def test_a_verdict_that_was_not_known_is_not_printed(tmp_path):
    untrained(line, X, Y).save(tmp_path / "line")
    assert "no verdict: loaded without the data" in repr(load_posterior(tmp_path / "line", line))


def test_loading_leaves_the_random_state_alone(saved):
    before = torch.get_rng_state()
    load_posterior(saved[1], line)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("law", [dist.Bernoulli, dist.Poisson])
def test_missing_data_may_be_discrete(law, tmp_path):
    def model(y=None):
        rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", 4):
            pyro.sample("y", law(rate), obs=y)

    untrained(model, torch.ones(4)).save(tmp_path / "a")
    loaded = load_posterior(tmp_path / "a", model)
    assert loaded.sample(3).keys() == {"rate"} and loaded.predictive(3)["y"].shape == (3, 4)


def test_data_of_a_factor_may_be_missing(tmp_path):
    def model(y=None):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if y is not None:
            pyro.factor("likelihood", -((y - x) ** 2))

    untrained(model, torch.tensor(1.0)).save(tmp_path / "a")
    loaded = load_posterior(tmp_path / "a", model)
    assert loaded.sample(3)["x"].shape == (3,)
    with pytest.raises(ModelError, match="without the data"):
        loaded.elbo  # noqa: B018


def test_masked_latents_without_data(tmp_path):
    """Entries without a posterior are drawn where the model runs, and NaN where it does not."""
    mask = torch.tensor([True, True, False])

    def model(mask, y=None):
        with pyro.plate("rows", 3), pyro.poutine.mask(mask=mask):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    posterior = untrained(model, mask, torch.ones(3))
    posterior.save(tmp_path / "a")
    bare, inputs = load_posterior(tmp_path / "a", model), load_posterior(tmp_path / "a", model, mask)
    assert drawn(bare)["x"].isnan().sum(0).tolist() == [0, 0, 4]
    assert drawn(inputs)["x"].isfinite().all()
    assert torch.equal(drawn(bare)["x"][:, :2], drawn(posterior)["x"][:, :2])
    assert torch.equal(bare.log_prob(drawn(bare)), posterior.log_prob(drawn(posterior)))


def test_a_model_with_parameters_needs_its_inputs(tmp_path):
    def model(x, y=None):
        offset = pyro.param("offset", torch.tensor(0.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x + offset, 1e-3), obs=y)

    posterior = untrained(model, X, Y)
    with torch.no_grad():
        pyro.param("offset").fill_(5.0)
    posterior.save(tmp_path / "a")
    pyro.clear_param_store()
    with pytest.raises(CheckpointError, match=r"the model's parameters \['offset'\].*give load_posterior"):
        load_posterior(tmp_path / "a", model)
    predicted = load_posterior(tmp_path / "a", model, X).predictive(50, torch.zeros(1))["y"]
    assert abs(predicted.mean() - 5.0) < 0.01


class _Odd(torch.distributions.constraints.Constraint):
    """A support of the user's, which is the real line."""

    event_dim = 0

    def check(self, value):
        return value == value


class OddNormal(dist.Normal):
    support = _Odd()


torch.distributions.biject_to.register(_Odd)(lambda _: torch.distributions.transforms.identity_transform)


def test_a_support_of_the_user_s_needs_the_model(tmp_path):
    def model(x, y=None):
        odd = pyro.sample("odd", OddNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(odd * x, 1.0).to_event(1), obs=y)

    posterior = untrained(model, X, Y)
    posterior.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="a support of a class of the user's"):
        load_posterior(tmp_path / "a", model)
    assert torch.equal(drawn(load_posterior(tmp_path / "a", model, X))["odd"], drawn(posterior)["odd"])


# Other models


def one(law):
    def model(y=None):
        x = pyro.sample("x", law())
        pyro.sample("y", dist.Normal(x, 1.0).to_event(x.dim()), obs=y)

    return model


LAWS = {
    "normal": lambda: dist.Normal(0.0, 1.0),
    "half-normal": lambda: dist.HalfNormal(1.0),
    "uniform to 1": lambda: dist.Uniform(0.0, 1.0),
    "uniform to 2": lambda: dist.Uniform(0.0, 2.0),
    "negative": lambda: dist.TransformedDistribution(
        dist.HalfNormal(1.0), [torch.distributions.AffineTransform(0.0, -1.0)]
    ),
    "Pareto": lambda: dist.Pareto(1.0, 2.0),
    "another Pareto": lambda: dist.Pareto(1.5, 2.0),
    "angle": lambda: dist.VonMises(0.0, 1.0),
}
VECTORS = {
    "normals": lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1),
    "half-normals": lambda: dist.HalfNormal(torch.ones(3)).to_event(1),
    "uniforms": lambda: dist.Uniform(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).to_event(1),
    "other uniforms": lambda: dist.Uniform(torch.zeros(3), torch.tensor([1.0, 2.0, 4.0])).to_event(1),
    "angles": lambda: dist.VonMises(torch.zeros(3), 1.0).to_event(1),
    "ordered": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
}


@pytest.mark.parametrize("laws", [LAWS, VECTORS], ids=["scalars", "vectors"])
def test_a_latent_with_another_support_is_refused(laws, tmp_path):
    for name, law in laws.items():
        path = tmp_path / "a"
        posterior = untrained(one(law), torch.ones(law().shape()))
        posterior.save(path)
        for other_name, other in laws.items():
            args = (torch.ones(law().shape()),)
            if name == other_name:
                assert torch.equal(drawn(load_posterior(path, one(other), *args))["x"], drawn(posterior)["x"])
                assert torch.equal(drawn(load_posterior(path, one(other)))["x"], drawn(posterior)["x"])
                continue
            with pytest.raises(CheckpointError, match="support|belongs to"):
                load_posterior(path, one(other), *args)
            with pytest.raises(CheckpointError, match="support|belongs to"):
                load_posterior(path, one(other))


def test_the_same_support_of_another_law_is_taken(tmp_path):
    """Laws of one support say the same of a flow; whether an end belongs to it does not matter."""
    path = tmp_path / "a"
    untrained(one(lambda: dist.LogNormal(0.0, 1.0)), torch.tensor(1.0)).save(path)
    for law in (lambda: dist.Gamma(2.0, 1.0), lambda: dist.HalfNormal(3.0), lambda: dist.Weibull(1.0, 2.0)):
        assert load_posterior(path, one(law), torch.tensor(1.0)).sample(3)["x"].min() > 0


def test_data_that_follow_need_the_same_supports(tmp_path):
    path = tmp_path / "a"

    def model(high, y=None):
        x = pyro.sample("x", dist.Uniform(0.0, high))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    untrained(model, 1.0, torch.tensor(1.0)).save(path)
    loaded = load_posterior(path, model)
    assert loaded.with_data(1.0, torch.tensor(0.5)).elbo < 0
    with pytest.raises(CheckpointError, match=r"'x' has the support Interval\(.*1.0\), but in this one it has"):
        loaded.with_data(2.0, torch.tensor(0.5))


def test_an_amortised_fit_checks_supports_and_angles(tmp_path):
    def model(high, direction, y=None):
        x = pyro.sample("x", dist.Uniform(0.0, high))
        angle = pyro.sample("angle", dist.VonMises(direction, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(x + angle.cos(), 1.0), obs=y)

    options = {"num_simulations": 100, "max_epochs": 1, "num_flows": 1, "compile": "none", "progress_bar": False}
    pf.fit_amortized(model, args=(1.0, 0.0), seed=0, **options).save(tmp_path / "a")
    assert pf.load_amortized(tmp_path / "a", model, args=(1.0, 0.0)).num_simulations == 100
    with pytest.raises(CheckpointError, match="'x' has the support"):
        pf.load_amortized(tmp_path / "a", model, args=(2.0, 0.0))
    with pytest.raises(CheckpointError, match="'angle' has another mean direction"):
        pf.load_amortized(tmp_path / "a", model, args=(1.0, 2.0))


def test_a_flow_of_nan_is_refused(tmp_path):
    posterior = untrained(line, X, Y)
    with torch.no_grad():
        next(iter(posterior.guide.flow.parameters())).fill_(torch.nan)
    saved = (posterior.guide, posterior.structure, {}, History(), None, None, None, posterior.labels)
    pf.inference.files.save(*saved, tmp_path / "a")
    with pytest.raises(CheckpointError, match="its flow has NaN among the numbers of"):
        load_posterior(tmp_path / "a", line, X, Y)


LEVELS = 10 * torch.arange(4.0)
NAN_AT_1, NAN_AT_3 = (torch.where(torch.arange(4) == i, torch.nan, LEVELS) for i in (1, 3))


def missing_values(y=None):
    """Its missing values are latents, which are as many as the NaN."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(mu + LEVELS, 0.5), obs=y, obs_mask=None if y is None else ~y.isnan())


def masked_latents(mask, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4), pyro.poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(mu + LEVELS, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


@pytest.mark.parametrize(
    ("model", "args", "other_args", "site"),
    [
        (missing_values, (NAN_AT_1,), (NAN_AT_3,), "y_unobserved"),
        (masked_latents, (~NAN_AT_1.isnan(), LEVELS), (~NAN_AT_3.isnan(), LEVELS), "z"),
    ],
)
def test_other_masks_are_refused(model, args, other_args, site, tmp_path):
    """Draws of row 1 would stand in row 3."""
    posterior = untrained(model, *args)
    posterior.save(tmp_path / "a")
    assert drawn(load_posterior(tmp_path / "a", model, *args))[site].equal(drawn(posterior)[site])
    with pytest.raises(CheckpointError, match=rf"entry \[1\] of latent site '{site}' has .* posterior, but in this"):
        load_posterior(tmp_path / "a", model, *other_args)


def slope_and_scale(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.sample("y", dist.Normal(slope * x, scale).to_event(1), obs=y)


def another_support(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.Uniform(0.0, 2.0))
    pyro.sample("y", dist.Normal(slope * x, scale).to_event(1), obs=y)


def another_order(x, y=None):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope * x, scale).to_event(1), obs=y)


def a_latent_less(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=y)


def a_latent_more(x, y=None):
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    slope_and_scale(x - offset, y)


@pytest.mark.parametrize("other", [another_support, another_order, a_latent_less, a_latent_more])
def test_a_file_without_arguments_checks_the_model_at_its_first_run(other, tmp_path):
    untrained(slope_and_scale, X, Y).save(tmp_path / "a")
    assert load_posterior(tmp_path / "a", slope_and_scale).predictive(3, X[:2])["y"].shape == (3, 2)
    loaded = load_posterior(tmp_path / "a", other)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="belongs to a model"):
            loaded.predictive(3, X)


def test_a_known_model_may_predict_with_further_latents(tmp_path):
    def model(num_groups, y=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        groups = [pyro.sample(f"group_{i}", dist.Normal(mean, 1.0)) for i in range(num_groups)]
        pyro.sample("y", dist.Normal(torch.stack(groups), 1.0).to_event(1), obs=y)

    untrained(model, 2, torch.ones(2)).save(tmp_path / "a")
    loaded = load_posterior(tmp_path / "a", model)
    assert loaded.predictive(3, 2)["y"].shape == (3, 2)
    assert loaded.predictive(3, 4)["y"].shape == (3, 4)


def missing_values_at(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(mu + x, 0.5), obs=y, obs_mask=None if y is None else ~y.isnan())


@pytest.mark.parametrize(
    ("model", "inputs", "loaded_with"),
    [(missing_values, (), ()), (missing_values_at, (LEVELS,), ()), (missing_values_at, (LEVELS,), (LEVELS,))],
    ids=["none", "inputs", "inputs at once"],
)
def test_missing_values_without_data(model, inputs, loaded_with, tmp_path):
    """Missing values are latents of the file, although the model without data shows none of them."""
    posterior = untrained(model, *inputs, NAN_AT_1)
    posterior.save(tmp_path / "a")
    loaded = load_posterior(tmp_path / "a", model, *loaded_with)
    draws, right = drawn(loaded), drawn(posterior)
    assert draws.keys() == {"mu", "y_unobserved"} and draws["mu"].equal(right["mu"])
    assert draws["y_unobserved"][:, 1].equal(right["y_unobserved"][:, 1])
    assert draws["y_unobserved"].isnan().sum(0).tolist() == [4, 0, 4, 4]
    assert torch.equal(loaded.log_prob(draws), posterior.log_prob(right))
    predicted = loaded.predictive(1000, *inputs, seed=0)["y"]
    assert predicted.shape == (1000, 4)
    # Replicates have a standard deviation of at most 0.6 around the levels and the mean of the flow.
    assert (predicted.mean(0) - LEVELS - drawn(loaded)["mu"].mean()).abs().max() < 0.5
    assert loaded.with_data(*inputs, NAN_AT_1).elbo == load_posterior(tmp_path / "a", model, *inputs, NAN_AT_1).elbo
    with pytest.raises(CheckpointError, match=r"entry \[1\] of latent site 'y_unobserved' has a posterior"):
        loaded.with_data(*inputs, NAN_AT_3)


# Classes as guides


def test_a_class_of_flows_is_a_guide_and_is_saved_as_a_recipe(tmp_path):
    cases = {
        pf.flows.NSF: pf.flows.Recipe("NSF"),
        partial(pf.flows.NSF, num_layers=2): pf.flows.Recipe("NSF", num_layers=2),
    }
    for flow_fn, recipe in cases.items():
        posterior = untrained(line, X, Y, flow_fn=flow_fn)
        assert posterior.guide.flow_fn == recipe
        posterior.save(tmp_path / "a")
        assert torch.equal(drawn(load_posterior(tmp_path / "a", line, X, Y))["slope"], drawn(posterior)["slope"])


@pytest.mark.parametrize("guide", [pf.flows.NSF, partial(pf.flows.Radial, num_layers=2), pf.flows.Planar])
def test_vi_takes_a_class_of_flows(guide):
    vi = pf.FlowVI(line, guide=guide, num_steps=2, num_starts=2, seed=0, compile="none", progress_bar=False)
    assert isinstance(vi.run(X, Y).guide.flow_fn, pf.flows.Recipe)


def test_refits_take_a_class_of_flows():
    posterior = untrained(line, X, Y)
    distilled = posterior.distill(pf.flows.IAF, num_steps=2, seed=0, progress_bar=False)
    assert distilled.guide.flow_fn == pf.flows.Recipe("IAF")
    proposal = posterior.fit_proposal(pf.flows.MAF, num_samples=100, max_epochs=1, seed=0, progress_bar=False)
    assert proposal.guide.flow_fn == pf.flows.Recipe("MAF")


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (int, "int is no class of flows"),
        (AutoPlanar, r"AutoPlanar is a class of guides, .*: give AutoPlanar\(model\)"),
        (pf.flows.Recipe, "Recipe is no class of flows"),
        (torch.nn.Linear, "Linear is not made of a dimension alone"),
        (3, "guide must be a flow guide"),
    ],
)
def test_other_classes_are_no_guides(guide, message):
    with pytest.raises(pf.OptionError, match=message):
        pf.FlowVI(line, guide=guide)


def with_names_of_options(x, obs_mask=None, seed=0.0, num_samples=1, y=None):
    """A mask of its own, which is no ``obs_mask`` of a site, and arguments that have the names of options."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", num_samples), pyro.poutine.mask(mask=True if obs_mask is None else obs_mask):
        pyro.sample("y", dist.Normal(slope + 100 * x + seed, 0.01), obs=y)


def test_arguments_of_a_model_may_have_the_names_of_options(tmp_path):
    mask = torch.tensor([True, False, True, True, False])
    kwargs = {"obs_mask": mask, "seed": 7.0, "num_samples": 5, "y": 100 * X + 7}
    posterior = untrained(with_names_of_options, X, *kwargs.values())
    posterior.save(tmp_path / "file")
    loaded, draws = load_posterior(tmp_path / "file", with_names_of_options, X, **kwargs), torch.randn(5, 1)
    assert torch.equal(loaded.log_joint.in_chunks(draws), posterior.log_joint.in_chunks(draws))
    for loaded in (
        load_posterior(tmp_path / "file", with_names_of_options),
        load_posterior(tmp_path / "file", with_names_of_options, X, obs_mask=mask, seed=7.0, num_samples=5),
    ):
        assert loaded.summary().index.tolist() == ["slope"] and repr(loaded)
        y = loaded.predictive(3, 2 * X, mask, 7.0, 5)["y"]
        assert y.shape == (3, 5) and (y[:, 1:] - y[:, :1] - 200 * X[1:]).abs().max() < 0.2
        assert (y[:, 0] - loaded.predictive(3, 0 * X, mask, 0.0, 5)["y"][:, 0] - 7).abs().max() < 7

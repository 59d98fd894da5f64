"""What a fit returns: samples, scores, figures, verdicts, corrections, ArviZ data, files."""

import json
import math
import warnings
from functools import partial

import arviz as az
import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Predictive
from pyro.infer.autoguide import init_to_value
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributions import constraints

import pyroflows as pf
from pyroflows import CheckpointError, FlowVI, ModelError, OptionError, Posterior, load_posterior
from pyroflows.archive import write_archive
from pyroflows.guides import AutoFlow, AutoIAF, AutoPlanar
from pyroflows.models.layout import Layout
from pyroflows.models.structure import describe
from pyroflows.training.loop import History
from pyroflows.transforms import Elementwise

MAX_Z = 4.5


def by_hand(model, loc, sd, *args, dtype=None, **kwargs):
    """The posterior of a Gaussian guide that nothing was trained for."""
    guide = AutoFlow(model, lambda dim: [Elementwise(dim)], dtype=dtype)
    guide(*args, **kwargs)
    loc, sd = torch.as_tensor(loc), torch.as_tensor(sd)
    with torch.no_grad():
        guide.flow.transform.layers[-1].parameters_of.value.copy_(torch.stack([loc, sd.log()], -1))
    return Posterior(model, guide, args, kwargs, History({"elbo": [-1.0]}))


LOC, SD = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])


def gaussian():
    """Its own posterior; the evidence is 1."""
    pyro.sample("x", dist.Normal(LOC, SD).to_event(1))


def exact():
    return by_hand(gaussian, LOC, SD)


def shifted():
    return by_hand(gaussian, LOC + 0.5 * SD, SD)


def too_wide():
    return by_hand(gaussian, LOC, 1.5 * SD)


def too_narrow():
    return by_hand(gaussian, LOC, 0.15 * SD)


# A model with a bit of everything


COUNTS = torch.tensor([3.0, 1.0, 2.0])
Y = torch.tensor([0.5, -1.0, 2.0, 1.0])


def everything(y, counts=COUNTS):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    pyro.deterministic("variance", scale**2)
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(0.0, scale))
        pyro.deterministic("twice", 2 * effect)
        pyro.sample("y", dist.Normal(effect, 0.5), obs=y)
    pyro.sample("counts", dist.Multinomial(6, weights, validate_args=False), obs=counts)


@pytest.fixture(scope="module")
def posterior():
    pyro.clear_param_store()
    return FlowVI(everything, num_steps=400, seed=1, progress_bar=False).run(Y)


SHAPES = {"weights": (3,), "scale": (), "variance": (), "effect": (4,), "twice": (4,)}


# Samples


@pytest.mark.parametrize("num_samples", [1, 7])
def test_sample_shapes_and_supports(posterior, num_samples):
    draws = posterior.sample(num_samples)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        name: (num_samples, *shape) for name, shape in SHAPES.items()
    }
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in draws.values())
    assert (draws["weights"] >= 0).all()
    assert draws["weights"].sum(-1).tolist() == pytest.approx([1.0] * num_samples, abs=1e-5)
    assert (draws["scale"] > 0).all()


def test_deterministic_sites_belong_to_their_draw(posterior):
    draws = posterior.sample(50)
    assert torch.equal(draws["variance"], draws["scale"] ** 2)
    assert torch.equal(draws["twice"], 2 * draws["effect"])


def test_sample_has_the_dtype_of_the_fit():
    draws = by_hand(gaussian, LOC.double(), SD.double(), dtype=torch.float64).sample(5)
    assert draws["x"].dtype == torch.float64


def test_samples_are_draws_of_the_flow():
    x = shifted().sample(20_000)["x"]
    error = (x.mean(0) - LOC - 0.5 * SD) / SD
    assert error.abs().max() < MAX_Z / math.sqrt(20_000)
    assert ((x.std(0) / SD - 1).abs() < MAX_Z / math.sqrt(40_000)).all()


def test_samples_follow_the_global_seed(posterior):
    torch.manual_seed(5)
    first = posterior.sample(3)["effect"]
    torch.manual_seed(5)
    assert torch.equal(posterior.sample(3)["effect"], first)
    assert not torch.equal(posterior.sample(3)["effect"], first)


# Scores


def test_log_prob_is_that_of_the_flow_on_the_constrained_space(posterior):
    latents, log_q = posterior.guide.flow().rsample_and_log_prob((200,))
    values, ladj = posterior.layout.constrain(latents.detach())
    result = posterior.log_prob(values)
    assert result.shape == (200,)
    assert not result.requires_grad
    assert result.tolist() == pytest.approx((log_q - ladj).tolist(), abs=2e-3)


def test_log_prob_takes_what_sample_gives(posterior):
    """Deterministic sites are no part of the density."""
    draws = posterior.sample(20)
    latent = {name: draws[name] for name in ("weights", "scale", "effect")}
    assert torch.equal(posterior.log_prob(draws), posterior.log_prob(latent))


@pytest.mark.parametrize(
    ("prior", "sd"),
    [
        (dist.Dirichlet(torch.ones(100)), 3.0),
        (dist.LKJCholesky(8, 1.0), 1.0),
        (dist.HalfCauchy(1.0).expand([50]).to_event(1), 3.0),
        (dist.Uniform(0.0, 1.0).expand([50]).to_event(1), 3.0),
    ],
    ids=["simplex", "correlation", "positive", "interval"],
)
def test_log_prob_takes_draws_near_the_bounds(prior, sd):
    """In float32 a sum of 100 weights is not 1 to the last digit."""

    def model():
        pyro.sample("x", prior)

    dim = Layout(describe(model, (), {})).dim
    posterior = by_hand(model, torch.zeros(dim), torch.full((dim,), sd))
    log_q = posterior.log_prob(posterior.sample(1000))
    assert log_q.shape == (1000,)
    assert not log_q.isnan().any()


@pytest.mark.parametrize("which", ["positive", "interval", "simplex"])
def test_log_prob_integrates_to_one(which):
    prior = {
        "positive": dist.LogNormal(0.0, 1.0),
        "interval": dist.Uniform(-1.0, 3.0),
        "simplex": dist.Dirichlet(torch.tensor([2.0, 3.0])),
    }[which]

    def model():
        pyro.sample("x", prior)

    posterior = by_hand(model, torch.tensor([0.3]), torch.tensor([0.7]))
    low, high = {"positive": (0.0, 60.0), "interval": (-1.0, 3.0), "simplex": (0.0, 1.0)}[which]
    # Midpoints: the density vanishes at the bounds.
    num = 40_000
    x = low + (high - low) * (torch.arange(num) + 0.5) / num
    # A density on the simplex is one over its first components.
    draws = torch.stack([x, 1 - x], -1) if which == "simplex" else x
    density = posterior.log_prob({"x": draws}).double().exp()
    assert density.sum().item() * (high - low) / num == pytest.approx(1.0, abs=2e-3)


def test_log_prob_by_hand():
    def model():
        pyro.sample("x", dist.LogNormal(0.0, 1.0))

    x = torch.tensor([0.5, 1.0, 3.0])
    result = by_hand(model, torch.tensor([0.3]), torch.tensor([0.7])).log_prob({"x": x})
    assert result.tolist() == pytest.approx(dist.LogNormal(0.3, 0.7).log_prob(x).tolist(), abs=1e-5)


# Figures


def test_figures(posterior):
    assert posterior.elbo < posterior.log_evidence
    assert 0 < posterior.elbo_se < 0.1
    assert 0 < posterior.log_evidence_se < 0.1
    assert 1 < posterior.ess <= posterior.num_diagnostic_samples


def test_figures_stay_what_they_were(posterior):
    assert posterior.elbo == posterior.elbo
    assert posterior.khat == posterior.diagnose().khat


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_flow(dtype):
    posterior = by_hand(gaussian, LOC.to(dtype), SD.to(dtype), dtype=dtype)
    assert posterior.khat == 0.0
    assert posterior.elbo == pytest.approx(0.0, abs=1e-5)
    assert posterior.log_evidence == pytest.approx(0.0, abs=1e-5)
    assert posterior.ess == pytest.approx(posterior.num_diagnostic_samples, rel=1e-6)
    assert posterior.log_evidence_se < 1e-4
    diagnosis = posterior.diagnose()
    assert diagnosis.verdict == "good"
    assert diagnosis.log_weight_variance < 1e-8
    assert diagnosis.num_non_finite == 0


def test_figures_of_a_shifted_flow():
    """Shifted by a: log w = a^2/2 a component below and above, so KL = D a^2 / 2 and the variance is D a^2."""
    posterior = shifted()
    kl, variance = 0.25, 0.5
    num = posterior.num_diagnostic_samples
    assert abs(posterior.elbo + kl) < MAX_Z * posterior.elbo_se
    assert posterior.elbo_se == pytest.approx(math.sqrt(variance / num), rel=0.1)
    assert abs(posterior.log_evidence) < MAX_Z * posterior.log_evidence_se
    # E w^2 = exp(variance).
    assert posterior.ess / num == pytest.approx(math.exp(-variance), rel=0.1)
    assert posterior.log_evidence_se == pytest.approx(math.sqrt((math.exp(variance) - 1) / num), rel=0.15)
    diagnosis = posterior.diagnose()
    assert diagnosis.log_weight_variance == pytest.approx(variance, rel=0.1)
    assert diagnosis.mean_shift == pytest.approx(0.5, abs=0.06)
    assert diagnosis.ess == posterior.ess


@pytest.mark.parametrize(("make", "ratio"), [(too_wide, 1.5), (too_narrow, 0.15)])
def test_elbo_is_minus_the_divergence(make, ratio):
    """Of Normal(0, r) from Normal(0, 1), in two dimensions."""
    posterior = make()
    kl = 2 * (0.5 * ratio**2 - 0.5 - math.log(ratio))
    assert abs(posterior.elbo + kl) < MAX_Z * posterior.elbo_se


def test_sd_ratio_of_a_wide_flow():
    assert too_wide().diagnose().sd_ratio == pytest.approx(1 / 1.5, rel=0.05)


def test_num_diagnostic_samples_can_be_chosen():
    posterior = shifted()
    chosen = Posterior(gaussian, posterior.guide, (), {}, History(), num_diagnostic_samples=500)
    assert chosen.diagnose().num_samples == 500
    assert chosen.with_data().num_diagnostic_samples == 500
    with pytest.raises(OptionError, match="num_diagnostic_samples must be at least 100, got 10"):
        Posterior(gaussian, posterior.guide, (), {}, History(), num_diagnostic_samples=10)


# The verdict


@pytest.mark.parametrize(
    ("make", "verdict"),
    [(exact, "good"), (shifted, "correct it"), (too_wide, "correct it"), (too_narrow, "do not use")],
)
def test_verdict(make, verdict):
    diagnosis = make().diagnose()
    assert diagnosis.verdict == verdict
    assert diagnosis.khat_threshold == pytest.approx(0.7)
    assert len(diagnosis.reasons) >= 4
    assert f"verdict: {verdict}" in str(diagnosis)
    assert all(reason in str(diagnosis) for reason in diagnosis.reasons)
    advice = {"good": "can be used", "correct it": "importance_sample", "do not use": "more steps"}[verdict]
    assert advice in str(diagnosis)


def test_khat_of_a_narrow_flow():
    """Weights exp(x^2 (1/r^2 - 1) / 2) under Normal(0, r): the tail index is 1 - r^2."""
    assert too_narrow().khat == pytest.approx(1 - 0.15**2, abs=0.15)


def test_verdict_where_the_density_is_zero():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 1.0, -torch.inf, 0.0))

    posterior = by_hand(model, torch.tensor([0.0]), torch.tensor([1.0]))
    diagnosis = posterior.diagnose()
    assert diagnosis.verdict == "correct it"
    share = diagnosis.num_non_finite / diagnosis.num_samples
    assert share == pytest.approx(0.1587, abs=MAX_Z * math.sqrt(0.16 * 0.84 / diagnosis.num_samples))
    assert diagnosis.reasons[0].startswith("the density is zero at 16 %")
    # Such draws have weight zero, and the evidence is what is left.
    assert math.exp(posterior.log_evidence) == pytest.approx(0.8413, abs=0.02)


def test_a_diagnosis_says_what_it_cannot_see():
    assert "mode that neither the flow nor a start visits" in str(exact().diagnose())


# Importance sampling


def test_importance_sample_corrects():
    weighted = shifted().importance_sample(20_000)
    weights = weighted.log_weights.softmax(0)
    x = weighted.draws["x"].double()
    mean = weights @ x
    error = (weights**2 @ (x - mean) ** 2).sqrt()
    assert ((mean - LOC).abs() < MAX_Z * error).all()
    assert (((weights @ (x - mean) ** 2).sqrt() / SD - 1).abs() < 0.05).all()


def test_weighted_draws(posterior):
    weighted = posterior.importance_sample(400)
    assert {name: tuple(value.shape) for name, value in weighted.draws.items()} == {
        name: (400, *shape) for name, shape in SHAPES.items()
    }
    assert torch.equal(weighted.draws["twice"], 2 * weighted.draws["effect"])
    assert weighted.log_weights.shape == (400,)
    assert weighted.log_weights.dtype == torch.float64
    # The offset is kept: the mean weight is the evidence, up to what smoothing does to the tail.
    mean = weighted.log_weights.logsumexp(0).item() - math.log(400)
    assert abs(weighted.log_evidence - mean) < 3 * weighted.log_evidence_se
    assert weighted.log_evidence == pytest.approx(
        posterior.log_evidence, abs=MAX_Z * (weighted.log_evidence_se + posterior.log_evidence_se)
    )
    normalized = weighted.log_weights.softmax(0)
    assert weighted.ess == pytest.approx(1 / normalized.square().sum().item())
    assert weighted.weights.normalized.tolist() == pytest.approx(normalized.tolist())
    assert weighted.khat < 1.0
    assert repr(weighted).startswith("WeightedDraws(400 draws, ess=")


def test_weights_belong_to_their_draws():
    weighted = too_wide().importance_sample(1000)
    z = (weighted.draws["x"] - LOC) / SD
    raw = (-0.5 * z**2 + 0.5 * (z / 1.5) ** 2 + math.log(1.5)).sum(-1)
    # Smoothing changes the largest weights only; these are bounded, so by little.
    lower = raw < raw.quantile(0.7)
    assert weighted.log_weights[lower].tolist() == pytest.approx(raw[lower].tolist(), abs=1e-4)


def test_the_largest_weights_are_smoothed():
    weighted = shifted().importance_sample(1000)
    raw = -((weighted.draws["x"] - LOC) / SD - 0.25).sum(-1).double() / 2
    changed = (weighted.log_weights - raw).abs() > 1e-3
    # The tail is the 3 sqrt(S) largest.
    assert 50 < changed.sum() <= 95
    assert raw[changed].min() > raw[~changed].quantile(0.9)
    assert weighted.log_weights.max() <= raw.max() + 1e-4


def test_resample():
    drawn = shifted().importance_sample(20_000).resample(10_000)
    assert drawn.keys() == {"x"}
    assert drawn["x"].shape == (10_000, 2)
    assert (((drawn["x"].mean(0) - LOC) / SD).abs() < MAX_Z * math.sqrt(1 / 10_000 + 1.7 / 20_000)).all()


def test_resample_keeps_sites_together(posterior):
    drawn = posterior.importance_sample(300).resample(1000)
    assert {name: tuple(value.shape) for name, value in drawn.items()} == {
        name: (1000, *shape) for name, shape in SHAPES.items()
    }
    assert torch.equal(drawn["twice"], 2 * drawn["effect"])


# Posterior predictive


def line(x, y=None):
    """The posterior of the slope is Normal(1, 0.5) if y says so; here it is set by hand."""
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("N", len(x)):
        mean = pyro.deterministic("mean", slope * x)
        return pyro.sample("y", dist.Normal(mean, 0.3), obs=y)


X = torch.tensor([0.0, 1.0, -2.0])


@pytest.fixture
def slope():
    return by_hand(line, torch.tensor([1.0]), torch.tensor([0.5]), X, y=torch.full((3,), 50.0))


@pytest.mark.parametrize(
    ("args", "kwargs", "x"),
    [
        ((), {}, X),
        ((torch.tensor([3.0, -1.0]),), {}, torch.tensor([3.0, -1.0])),
        ((torch.tensor([3.0, -1.0]),), {"y": torch.zeros(2)}, torch.tensor([3.0, -1.0])),
        ((), {"x": torch.tensor([2.0])}, torch.tensor([2.0])),
    ],
    ids=["same", "new", "new with obs", "new by name"],
)
def test_predictive(slope, args, kwargs, x):
    num = 20_000
    predicted = slope.predictive(num, *args, **kwargs)
    assert predicted.keys() == {"mean", "y"}
    assert predicted["y"].shape == (num, len(x))
    variance = (0.5 * x) ** 2 + 0.3**2
    assert ((predicted["y"].mean(0) - x).abs() < MAX_Z * (variance / num).sqrt()).all()
    assert ((predicted["y"].var(0) / variance - 1).abs() < MAX_Z * math.sqrt(2 / num)).all()
    # Rows share the slope and nothing else.
    residual = predicted["y"] - predicted["mean"]
    assert ((residual.std(0) / 0.3 - 1).abs() < MAX_Z / math.sqrt(2 * num)).all()
    correlation = torch.cov(residual.T).reshape(len(x), -1) / 0.09 - torch.eye(len(x))
    assert correlation.abs().max() < MAX_Z * math.sqrt(2 / num)


def test_predictive_does_not_change_the_model_s_arguments():
    y = torch.full((3,), 50.0)
    posterior = by_hand(line, torch.tensor([1.0]), torch.tensor([0.5]), X, y=y)
    posterior.predictive(10)
    assert y.tolist() == [50.0] * 3


def test_predictive_of_discrete_data():
    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("N", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    posterior = by_hand(model, torch.tensor([1.0]), torch.tensor([0.01]), torch.tensor([1.0, 4.0]))
    y = posterior.predictive(20_000)["y"]
    assert y.shape == (20_000, 2)
    assert (y == y.round()).all()
    assert ((y.mean(0) - math.e).abs() < MAX_Z * math.sqrt(math.e / 20_000) + 0.001).all()


def test_with_data():
    """Other data, the same guide: what changes is the joint density."""
    y = torch.tensor([0.1, 1.2, -1.8])
    first = by_hand(line, torch.tensor([1.0]), torch.tensor([0.5]), X, y=y)
    second = first.with_data(X, y=y + 1)
    assert second.guide is first.guide
    slope = torch.tensor([[0.7], [1.3]])
    for posterior, data in ((first, y), (second, y + 1)):
        expected = dist.Normal(0.0, 10.0).log_prob(slope[:, 0]) + dist.Normal(slope * X, 0.3).log_prob(data).sum(-1)
        assert posterior.log_joint(slope).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


# Summaries


def test_summary_against_exact_moments():
    table = exact().summary()
    assert list(table.columns) == ["mean", "sd", "mcse", "5%", "50%", "95%", "hdi_5%", "hdi_95%"]
    assert list(table.index) == ["x[0]", "x[1]"]
    num = exact().num_diagnostic_samples
    for i, (loc, sd) in enumerate(zip(LOC.tolist(), SD.tolist(), strict=True)):
        row = table.loc[f"x[{i}]"]
        assert row["mean"] == pytest.approx(loc, abs=MAX_Z * sd / math.sqrt(num))
        assert row["sd"] == pytest.approx(sd, rel=MAX_Z / math.sqrt(2 * num))
        for name, p in (("5%", 0.05), ("50%", 0.5), ("95%", 0.95)):
            normal = dist.Normal(loc, sd)
            quantile = normal.icdf(torch.tensor(p))
            error = math.sqrt(p * (1 - p) / num) / normal.log_prob(quantile).exp().item()
            assert row[name] == pytest.approx(quantile.item(), abs=MAX_Z * error)


def test_summary_has_every_component(posterior):
    table = posterior.summary()
    assert {"weights[0]", "weights[2]", "scale", "variance", "effect[3]", "twice[0]"} <= set(table.index)
    assert len(table) == 3 + 1 + 1 + 4 + 4
    assert (table["5%"] < table["50%"]).all() and (table["50%"] < table["95%"]).all()
    assert table.filter(like="weights", axis=0)["mean"].sum() == pytest.approx(1.0, abs=1e-4)


def test_summary_of_matrices():
    def model():
        pyro.sample("w", dist.Normal(torch.arange(6.0).reshape(2, 3), 1e-3).to_event(2))

    table = by_hand(model, torch.arange(6.0), torch.full((6,), 1e-3)).summary()
    assert table.loc["w[1, 0]", "mean"] == pytest.approx(3.0, abs=1e-3)
    assert list(table.index) == [f"w[{i}, {j}]" for i in range(2) for j in range(3)]


def test_summary_of_chosen_sites(posterior):
    assert list(posterior.summary(var_names=["scale"]).index) == ["scale"]


@pytest.mark.parametrize(("make", "verdict"), [(exact, "good"), (too_narrow, "do not use")])
def test_printing(make, verdict):
    text = repr(make())
    assert f"verdict: {verdict}" in text
    assert "x[1]" in text and "sd" in text
    assert "ELBO" in text and "log evidence" in text


@pytest.mark.parametrize("magnitude", [1.0, 1e6])
def test_printing_shows_every_column(magnitude):
    """Pandas leaves out columns where it takes the table to be too wide."""

    def model():
        pyro.sample("a_site_with_quite_a_long_name", dist.Normal(torch.zeros(2), magnitude).to_event(1))

    text = repr(by_hand(model, torch.zeros(2), torch.full((2,), magnitude)))
    assert all(column in text for column in ("mean", "sd", "5%", "50%", "95%"))
    assert " ... " not in text


# ArviZ


def test_arviz_groups_and_shapes(posterior):
    data = posterior.to_arviz(num_samples=60)
    sizes = {
        "posterior": {**SHAPES},
        "sample_stats": {"lp": (), "log_q": (), "log_weight": ()},
        "log_likelihood": {"y": (4,), "counts": ()},
        "posterior_predictive": {"y": (4,), "counts": (3,)},
        "prior": SHAPES,
        "prior_predictive": {"y": (4,), "counts": (3,)},
    }
    for group, variables in sizes.items():
        assert {name: data[group][name].shape for name in data[group].data_vars} == {
            name: (1, 60, *shape) for name, shape in variables.items()
        }, group
    assert data["observed_data"]["y"].values.tolist() == Y.tolist()
    assert data["observed_data"]["counts"].values.tolist() == COUNTS.tolist()
    assert data["posterior"].attrs["inference_library"] == "pyroflows"


def test_arviz_dims_are_plates(posterior):
    data = posterior.to_arviz(num_samples=30)
    for group, names in (("posterior", ["effect", "twice"]), ("log_likelihood", ["y"]), ("prior", ["effect"])):
        for name in names:
            assert data[group][name].dims == ("chain", "draw", "groups")
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "groups")
    assert data["observed_data"]["y"].dims == ("groups",)
    assert data["posterior"]["scale"].dims == ("chain", "draw")
    assert data["posterior"]["weights"].dims[:2] == ("chain", "draw")


def test_arviz_names_of_the_user(posterior):
    data = posterior.to_arviz(
        num_samples=30,
        coords={"groups": ["a", "b", "c", "d"], "kind": ["red", "green", "blue"]},
        dims={"weights": ["kind"], "counts": ["kind"]},
    )
    assert data["posterior"]["weights"].dims == ("chain", "draw", "kind")
    assert data["posterior"]["weights"].sel(kind="green").shape == (1, 30)
    assert data["posterior"]["effect"].sel(groups="d").shape == (1, 30)
    assert data["posterior_predictive"]["counts"].dims == ("chain", "draw", "kind")
    assert data["observed_data"]["y"].sel(groups="c").item() == 2.0


def test_arviz_values_belong_together(posterior):
    data = posterior.to_arviz(num_samples=40)
    draws = {name: torch.tensor(data["posterior"][name].values[0]) for name in data["posterior"].data_vars}
    log_likelihood = dist.Normal(draws["effect"], 0.5).log_prob(Y)
    assert data["log_likelihood"]["y"].values[0] == pytest.approx(log_likelihood.numpy(), abs=1e-4)
    counts = dist.Multinomial(6, draws["weights"], validate_args=False).log_prob(COUNTS)
    assert data["log_likelihood"]["counts"].values[0] == pytest.approx(counts.numpy(), abs=1e-4)
    # lp and log_q are densities of the unconstrained vector.
    vectors = posterior.layout.unconstrain(draws)
    stats = {name: data["sample_stats"][name].values[0] for name in ("lp", "log_q", "log_weight")}
    assert stats["lp"] == pytest.approx(posterior.log_joint(vectors).numpy(), abs=5e-3)
    _, ladj = posterior.layout.constrain(vectors)
    assert stats["log_q"] == pytest.approx((posterior.log_prob(draws) + ladj).numpy(), abs=5e-3)
    assert stats["log_weight"] == pytest.approx(stats["lp"] - stats["log_q"], abs=1e-4)


@pytest.mark.parametrize(
    ("option", "groups"),
    [
        ("log_likelihood", {"log_likelihood"}),
        ("posterior_predictive", {"posterior_predictive"}),
        ("prior", {"prior", "prior_predictive"}),
    ],
)
def test_arviz_groups_can_be_left_out(posterior, option, groups):
    whole = set(posterior.to_arviz(num_samples=30).groups())
    assert groups <= whole
    assert set(posterior.to_arviz(num_samples=30, **{option: False}).groups()) == whole - groups


def test_arviz_prior_draws_come_from_the_prior(posterior):
    prior = posterior.to_arviz(num_samples=4000)["prior"]
    scale = prior["scale"].values[0]
    assert scale.mean() == pytest.approx(2 * math.sqrt(2 / math.pi), abs=MAX_Z * 2 * 0.603 / math.sqrt(4000))
    assert prior["weights"].values[0].mean(0) == pytest.approx([1 / 3] * 3, abs=MAX_Z * 0.236 / math.sqrt(4000))
    assert prior["variance"].values == pytest.approx(prior["scale"].values ** 2, rel=1e-5)


def test_arviz_loo():
    """Against the log predictive density of the exact posterior, each datum left out."""
    y = torch.randn(20, generator=torch.Generator().manual_seed(0)) + 1.0

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("N", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    variance = 1 / (20 + 0.01)
    posterior = by_hand(model, (y.sum() * variance)[None], torch.tensor([variance]).sqrt(), y)
    loo = az.loo(posterior.to_arviz(num_samples=4000))
    left = 1 / (19 + 0.01)
    expected = dist.Normal((y.sum() - y) * left, math.sqrt(1 + left)).log_prob(y).sum().item()
    assert loo.elpd_loo == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("how", ["improper", "masked"])
def test_arviz_without_a_prior_to_draw_from(how):
    def model(y):
        fn = dist.ImproperUniform(constraints.real, (), ()) if how == "improper" else dist.Normal(0.0, 1.0).mask(False)
        mean = pyro.sample("mean", fn)
        with pyro.plate("N", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    posterior = by_hand(model, torch.tensor([1.0]), torch.tensor([1 / math.sqrt(2)]), torch.tensor([0.0, 2.0]))
    assert posterior.diagnose().verdict == "good"
    with pytest.warns(UserWarning, match="without prior of 'mean'.*prior_predictive of 'y', since it follows from"):
        data = posterior.to_arviz(num_samples=30)
    assert "prior" not in data.groups()
    assert "prior_predictive" not in data.groups()
    assert {"posterior", "log_likelihood", "posterior_predictive"} <= set(data.groups())
    posterior.to_arviz(num_samples=30, prior=False)  # nothing to warn of


def test_arviz_of_a_vague_prior():
    """Prior draws that the likelihood cannot take: a scale of zero or infinity."""

    def model(y):
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 200.0))
        with pyro.plate("N", len(y)):
            pyro.sample("y", dist.Normal(0.0, log_scale.exp()), obs=y)

    y = torch.tensor([0.5, -1.0, 2.0])
    guide = AutoFlow(model, init_loc_fn=init_to_value(values={"log_scale": torch.tensor(0.0)}))
    posterior = FlowVI(model, guide, num_steps=50, seed=0, progress_bar=False).run(y)
    with pytest.warns(UserWarning, match="prior"):
        data = posterior.to_arviz(num_samples=200)
    assert data["posterior"]["log_scale"].shape == (1, 200)


def test_arviz_without_observations():
    data = exact().to_arviz(num_samples=30)
    assert {"posterior", "sample_stats", "prior"} == set(data.groups())


def test_arviz_of_plain_draws():
    data = pf.to_arviz({"a": torch.zeros(50, 2)}, coords={"k": ["x", "y"]}, dims={"a": ["k"]})
    assert data["posterior"]["a"].dims == ("chain", "draw", "k")
    assert set(data.groups()) == {"posterior"}


def test_arviz_of_resampled_draws(posterior):
    """Draws from elsewhere, with the model."""
    drawn = posterior.importance_sample(100).resample(80)
    data = pf.to_arviz(drawn, model=everything, args=(Y,))
    assert data["log_likelihood"]["y"].shape == (1, 80, 4)
    assert data["posterior"]["effect"].dims == ("chain", "draw", "groups")


# Pictures


def test_plot_training(posterior):
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    figure = posterior.plot_training()
    assert len(figure.axes) == 2
    plt.close(figure)


# Files


@pytest.mark.parametrize(
    "guide",
    [
        None,
        lambda model: AutoPlanar(model, num_layers=2),
        lambda model: AutoIAF(model, num_layers=2, hidden_dims=(8, 8)),
        lambda model: AutoFlow(model, pf.flows.Recipe("MAF", num_layers=1, hidden_dims=[8], base="student_t")),
        lambda model: pf.flows.Recipe("Planar", num_layers=2),
        lambda model: AutoPlanar(model, num_layers=2, dtype=torch.float64),
    ],
    ids=["default", "planar", "iaf", "maf with a base", "recipe", "float64"],
)
def test_save_and_load(guide, tmp_path):
    path = tmp_path / "posterior.safetensors"
    saved = FlowVI(everything, guide=guide and guide(everything), num_steps=20, seed=0, progress_bar=False).run(Y)
    saved.save(path)
    loaded = load_posterior(path, everything, Y)
    draws = saved.sample(30)
    assert torch.equal(loaded.log_prob(draws), saved.log_prob(draws))
    torch.manual_seed(0)
    first = saved.sample(5)
    torch.manual_seed(0)
    second = loaded.sample(5)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert loaded.elbo == saved.elbo
    assert loaded.history.keys() == saved.history.keys()
    assert loaded.history["elbo"].tolist() == pytest.approx(saved.history["elbo"].tolist(), rel=1e-6)
    # The share that lies far out differs in the third digit where the flow learns how far sites are centred.
    tables = [repr(posterior).partition("verdict")[0] for posterior in (loaded, saved)]
    assert tables[0] == tables[1] and loaded.diagnose().verdict == saved.diagnose().verdict


def test_a_file_is_safetensors(posterior, tmp_path):
    """Readable without pyroflows, and without pickle."""
    path = tmp_path / "posterior.safetensors"
    posterior.save(path)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert "history.elbo" in names
    assert any(name.startswith("flow.") for name in names)


def test_saved_paths_may_be_strings(posterior, tmp_path):
    posterior.save(str(tmp_path / "a"))
    assert load_posterior(str(tmp_path / "a"), everything, Y).elbo == posterior.elbo


def test_load_with_other_data(posterior, tmp_path):
    posterior.save(tmp_path / "a")
    loaded = load_posterior(tmp_path / "a", everything, Y + 1)
    assert loaded.with_data(Y).elbo == pytest.approx(posterior.elbo, abs=1e-5)
    assert loaded.elbo != posterior.elbo


def test_a_loaded_posterior_goes_on(posterior, tmp_path):
    posterior.save(tmp_path / "a")
    loaded = load_posterior(tmp_path / "a", everything, Y)
    further = FlowVI(everything, guide=loaded.guide, num_steps=5, seed=0, progress_bar=False).run(Y)
    assert further.history["elbo"][0] > posterior.history["elbo"][:5].mean()


def test_load_restores_the_model_s_parameters(tmp_path):
    def model(y):
        location = pyro.param("location", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        x = pyro.sample("x", dist.Normal(location, 1.0))
        pyro.sample("y", dist.Normal(x, scale), obs=y)

    posterior = FlowVI(model, num_steps=60, seed=0, progress_bar=False).run(torch.tensor(3.0))
    trained = pyro.param("location").item(), pyro.param("scale").item()
    assert trained[0] > 0.1
    posterior.save(tmp_path / "a")
    elbo = posterior.elbo
    pyro.clear_param_store()
    loaded = load_posterior(tmp_path / "a", model, torch.tensor(3.0))
    assert (pyro.param("location").item(), pyro.param("scale").item()) == pytest.approx(trained, rel=1e-6)
    assert loaded.elbo == pytest.approx(elbo, rel=1e-5)


def own_flow(dim):
    return pf.flows.Planar(dim, num_layers=3)


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own"
    posterior = FlowVI(everything, guide=own_flow, num_steps=5, seed=0, progress_bar=False).run(Y)
    posterior.save(path)
    return path, posterior


def test_a_flow_function_of_the_user_s_is_needed_again(own):
    path, posterior = own
    with pytest.raises(CheckpointError, match="flow_fn"):
        load_posterior(path, everything, Y)
    assert load_posterior(path, everything, Y, flow_fn=own_flow).elbo == posterior.elbo


@pytest.mark.parametrize(
    "flow_fn",
    [pf.flows.Radial, lambda dim: pf.flows.Planar(dim, num_layers=4), pf.flows.Recipe("Planar", num_layers=3)],
    ids=["family", "number of layers", "recipe"],
)
def test_another_flow_function_is_refused(own, flow_fn):
    path, _ = own
    with pytest.raises(CheckpointError, match="holds another flow than flow_fn makes"):
        load_posterior(path, everything, Y, flow_fn=flow_fn)


def test_another_recipe_is_refused(posterior, tmp_path):
    path = tmp_path / "a"
    posterior.save(path)
    recipe = posterior.guide.flow_fn
    assert load_posterior(path, everything, Y, flow_fn=pf.flows.Recipe.from_json(recipe.to_json())).elbo
    with pytest.raises(CheckpointError, match=r"holds another flow.*Recipe\('MAF'\)"):
        load_posterior(path, everything, Y, flow_fn=pf.flows.Recipe("MAF"))


def test_a_recipe_of_another_version_is_refused(posterior, tmp_path):
    path = tmp_path / "a"
    posterior.save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["pyroflows"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header["recipe"] = {"name": "Glow", "options": {}}
    write_archive(path, header.pop("kind"), header.pop("format"), header, tensors)
    with pytest.raises(CheckpointError, match="a recipe that this version does not have: there is no recipe 'Glow'"):
        load_posterior(path, everything, Y)


def test_options_that_a_file_cannot_hold_need_the_flow_function_again(tmp_path):
    """A base distribution is an object; the posterior is saved all the same."""
    base = dist.Laplace(torch.zeros(2), 1.0).to_event(1)
    flow_fn = partial(pf.flows.MAF, num_layers=1, base=base)
    posterior = FlowVI(gaussian, guide=flow_fn, num_steps=5, seed=0, progress_bar=False).run()
    posterior.save(tmp_path / "a")
    assert load_posterior(tmp_path / "a", gaussian, flow_fn=flow_fn).elbo == posterior.elbo


def other_size(y):
    pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def other_site(y):
    """As many unconstrained latents: 2 + 1 + 4."""
    pyro.sample("z", dist.Normal(torch.zeros(7), 1.0).to_event(1))


def more_parameters(y):
    pyro.param("another", torch.zeros(3))
    everything(y)


@pytest.mark.parametrize("model", [other_size, other_site, more_parameters])
def test_another_model_is_refused(posterior, tmp_path, model):
    posterior.save(tmp_path / "a")
    with pytest.raises(CheckpointError):
        load_posterior(tmp_path / "a", model, Y)


def test_data_of_another_size_are_refused(posterior, tmp_path):
    posterior.save(tmp_path / "a")
    with pytest.raises((CheckpointError, ModelError), match=r"belongs to|another model"):
        load_posterior(tmp_path / "a", everything, torch.zeros(9))


def damaged(content):
    flipped = bytearray(content)
    flipped[12] ^= 0xFF
    return {
        "cut off": content[: len(content) // 2],
        "cut off in the header": content[:50],
        "empty": b"",
        "text": b"this is no posterior",
        "flipped bits": bytes(flipped),
        "something appended": content + b"xxxxxxxx",
    }


@pytest.mark.parametrize("how", list(damaged(bytes(100))))
def test_a_damaged_file_is_refused(posterior, tmp_path, how):
    path = tmp_path / "a"
    posterior.save(path)
    path.write_bytes(damaged(path.read_bytes())[how])
    with pytest.raises(CheckpointError, match=str(path)):
        load_posterior(path, everything, Y)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no file"):
        load_posterior(tmp_path / "nothing", everything, Y)
    with pytest.raises(CheckpointError, match="no file"):
        load_posterior(tmp_path, everything, Y)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"other": "1"},
        {"pyroflows": "{}"},
        {"pyroflows": "no json"},
        {"pyroflows": '{"format": "pyroflows posterior 1"}'},
    ],
    ids=["none", "other", "empty", "no json", "no fields"],
)
def test_a_file_of_something_else_is_refused(tmp_path, metadata):
    save_file({"weight": torch.zeros(3)}, tmp_path / "a", metadata=metadata)
    with pytest.raises(CheckpointError):
        load_posterior(tmp_path / "a", everything, Y)


# Seeds and independence


def test_a_seed_makes_a_fit_reproducible():
    fits = [FlowVI(everything, num_steps=20, seed=seed, progress_bar=False).run(Y) for seed in (3, 3, 4)]
    states = [torch.cat([p.flatten() for p in fit.guide.flow.parameters()]) for fit in fits]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert fits[0].history["elbo"].tolist() == fits[1].history["elbo"].tolist()
    assert fits[0].elbo == fits[1].elbo


def test_a_seed_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    FlowVI(everything, num_steps=5, seed=3, progress_bar=False).run(Y)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failed_fit_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    with pytest.raises(pf.DataError):
        FlowVI(everything, num_steps=5, seed=3, progress_bar=False).run(torch.full((4,), torch.nan))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_global_generator_decides():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        fit = FlowVI(gaussian, num_steps=3, progress_bar=False).run()
        states.append(torch.cat([p.flatten() for p in fit.guide.flow.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    "ask",
    [lambda p: p.elbo, lambda p: p.khat, lambda p: p.diagnose(), lambda p: p.summary(), repr, lambda p: p.with_data(Y)],
    ids=["elbo", "khat", "diagnose", "summary", "repr", "with_data"],
)
def test_figures_leave_the_global_generator_alone(posterior, ask):
    fresh = posterior.with_data(Y)
    before = torch.get_rng_state()
    ask(fresh)
    assert torch.equal(torch.get_rng_state(), before)


def normal_mean(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize(
    "guide",
    [
        pytest.param(lambda: None, marks=pytest.mark.slow, id="own guide"),
        pytest.param(lambda: AutoIAF(normal_mean, num_layers=1), id="user's guide"),
    ],
)
def test_two_fits_share_nothing(guide):
    """Pyro's store knows parameters by name, and a call of a guide puts them there."""
    data = torch.full((50,), -3.0), torch.full((50,), 3.0)
    fits = []
    for y in data:
        vi = FlowVI(
            normal_mean,
            guide=guide(),
            num_steps=200,
            seed=0,
            progress_bar=False,
            optimizer=partial(torch.optim.Adam, lr=0.02),
        )
        fits.append(vi.run(y))
        Predictive(normal_mean, guide=fits[-1].guide, num_samples=2)(y)
    for fit, y in zip(fits, data, strict=True):
        assert fit.sample(500)["mean"].mean().item() == pytest.approx(y[0].item(), abs=0.2)
        drawn = Predictive(normal_mean, guide=fit.guide, num_samples=500)(y)["mean"]
        assert drawn.mean().item() == pytest.approx(y[0].item(), abs=0.2)


def test_a_fit_puts_nothing_of_the_flow_into_the_store():
    FlowVI(normal_mean, num_steps=3, seed=0, progress_bar=False).run(torch.zeros(3))
    assert list(pyro.get_param_store()) == []


def test_history_of_a_fit(posterior):
    history = posterior.history
    assert {"elbo", "log_weight_variance", "grad_norm", "learning_rate"} <= set(history)
    assert history.num_steps == 400
    assert all(np.isfinite(values).all() for values in history.values())
    assert history["elbo"][-50:].mean() == pytest.approx(posterior.elbo, abs=0.3)


def test_a_posterior_looks_at_the_model_at_its_own_median():
    """A draw from this prior would be outside the likelihood's domain."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, x - 99.0), obs=torch.tensor(0.0))

    start = init_to_value(values={"x": torch.tensor(100.0)})
    guide = AutoFlow(model, lambda dim: [Elementwise(dim)], init_loc_fn=start, init_scale=0.01)
    with pyro.validation_enabled(False):
        guide()
    posterior = Posterior(model, guide, (), {}, History())
    assert posterior.elbo == pytest.approx(-5000.0, rel=0.01)


def test_a_file_of_the_same_sites_in_another_order_is_refused(tmp_path):
    """Latents are packed in the order of the model, so that they would change places."""

    def model(names):
        for name in names:
            pyro.sample(name, dist.Normal(float(ord(name)), 1.0))

    path = tmp_path / "posterior.safetensors"
    FlowVI(model, seed=0, progress_bar=False).run("ab").save(path)
    assert abs(load_posterior(path, model, "ab").sample(1000)["a"].mean() - ord("a")) < 0.3
    with pytest.raises(CheckpointError, match=r"latent sites \{'a': \[\], 'b': \[\]\}, but this one has \{'b'"):
        load_posterior(path, model, "ba")


# Warnings


def flat(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_a_warning_is_given_once_for_each_posterior():
    posterior = by_hand(flat, torch.zeros(1), torch.ones(1), torch.tensor(0.5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            posterior.to_arviz(10)
        posterior.mcmc(4, 2, num_warmup=1, seed=0, progress_bar=False).to_arviz()
    assert len([w for w in caught if "flat" in str(w.message)]) == 1


# Models without observations


def with_factor(center=0.0):
    x = pyro.sample("x", dist.Normal(center, 1.0))
    pyro.factor("weight", -0.5 * x**2)


def test_a_model_of_factors_has_nothing_to_predict():
    posterior = by_hand(with_factor, torch.zeros(1), torch.full((1,), 0.5**0.5))
    for args in ((), (1.0,)):
        with pytest.raises(ModelError, match=r"nothing to predict: data enter this model by pyro.factor\('weight', "):
            posterior.predictive(10, *args)
    assert posterior.diagnose().verdict == "good"
    assert posterior.log_evidence == pytest.approx(-0.5 * math.log(2), abs=1e-4)
    with pytest.warns(UserWarning, match="a factor has no values"):
        assert posterior.to_arviz(10)["posterior"]["x"].shape == (1, 10)
    assert posterior.mcmc(4, 2, num_warmup=1, seed=0, progress_bar=False).to_arviz()["posterior"]["x"].shape == (2, 4)


def test_a_model_of_a_prior_has_nothing_to_predict():
    posterior = by_hand(gaussian, LOC, SD)
    with pytest.raises(ModelError, match="nothing to predict, since the model has neither observed nor deterministic"):
        posterior.predictive(10)

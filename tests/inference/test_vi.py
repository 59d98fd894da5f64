"""Fits as a user sees them: whether a flow is trained, from where, compiled or not, and at what temperature."""

import math
import re
import warnings
from dataclasses import replace
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyroflows import DivergedError, FlowVI, OptionError, PlotError, load_posterior
from pyroflows.errors import UntraceableError, warn
from pyroflows.flows import MAF, Gaussian, Mixture, Planar, Recipe
from pyroflows.guides import AutoIAF
from pyroflows.inference.candidates import FittedCandidate
from pyroflows.training.loop import History

NUM_DRAWS = 20_000


def fit(model, *args, **options):
    return FlowVI(model, **{"seed": 0, "progress_bar": False, **options}).run(*args)


def draws_of(posterior, name):
    torch.manual_seed(1)
    return posterior.sample(NUM_DRAWS)[name].double()


# Linear regression in two coefficients, whose posterior is a Gaussian known exactly


X = torch.tensor([[1.0, 0.5], [0.3, -1.0], [-0.8, 0.2], [0.5, 1.5], [-1.2, -0.4]])
Y = torch.tensor([0.7, -0.9, -0.1, 2.0, -1.3])
COVARIANCE = torch.linalg.inv(torch.eye(2) + X.T @ X / 0.25).double()
MEAN = COVARIANCE @ (X.T @ Y / 0.25).double()
LOG_EVIDENCE = dist.MultivariateNormal(torch.zeros(5), 0.25 * torch.eye(5) + X @ X.T).log_prob(Y).item()


def regression(x=X, y=Y):
    b = pyro.sample("b", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("N", len(x)):
        pyro.sample("y", dist.Normal(b @ x.T, 0.5), obs=y)


def assert_exact(posterior, bias=0.02):
    """Mean, covariance and evidence up to a bias, in standard deviations, and 4 standard errors."""
    b = draws_of(posterior, "b")
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(COVARIANCE), (b - MEAN).mT, upper=False)
    assert white.mean(1).abs().max() < bias + 4 / math.sqrt(NUM_DRAWS)
    assert (torch.cov(white) - torch.eye(2)).abs().max() < 2 * bias + 4 * math.sqrt(2 / NUM_DRAWS)
    assert posterior.log_evidence == pytest.approx(LOG_EVIDENCE, abs=0.005 + 4 * posterior.log_evidence_se)


# Whether a flow is trained


@pytest.fixture(scope="module")
def gaussian():
    return fit(regression)


def test_where_a_gaussian_is_enough_no_flow_is_trained(gaussian):
    assert gaussian.is_gaussian
    assert gaussian.history.num_steps == 0 and len(gaussian.history) == 0
    assert_exact(gaussian)
    assert gaussian.diagnose().verdict == "good"


def test_it_says_so(gaussian):
    assert "a Gaussian was enough, so that no flow was trained" in repr(gaussian)
    assert re.search(r"\d+ of \d+ starts ended within 1 nat of the best Gaussian", repr(gaussian))
    assert "a further start would find a new mode with probability below 2 %" in repr(gaussian)
    with pytest.raises(PlotError, match="a Gaussian was enough"):
        gaussian.plot_training()


def test_it_survives_a_file(gaussian, tmp_path):
    gaussian.save(tmp_path / "gaussian.safetensors")
    loaded = load_posterior(tmp_path / "gaussian.safetensors", regression)
    draws = gaussian.sample(10)
    assert loaded.is_gaussian and loaded.history.num_steps == 0
    assert loaded.starts == gaussian.starts
    assert torch.equal(loaded.log_prob(draws), gaussian.log_prob(draws))


def test_it_can_be_corrected(gaussian):
    chains = gaussian.mcmc(num_samples=100, num_chains=20, num_warmup=100, seed=0, progress_bar=False)
    assert_close = partial(torch.testing.assert_close, rtol=0.0, atol=0.1)
    sd = COVARIANCE.diagonal().sqrt()
    assert_close((chains.draws["b"].double().mean((0, 1)) - MEAN) / sd, torch.zeros(2).double())


@pytest.mark.parametrize(
    "options", [{"num_steps": 30}, {"gate": False, "num_steps": 30}, {"guide": Gaussian, "num_steps": 30}]
)
def test_where_steps_are_given_a_flow_is_trained(options):
    posterior = fit(regression, **{**options, "guide": partial(Gaussian) if "guide" in options else None})
    assert posterior.history.num_steps == 30
    assert not posterior.is_gaussian
    assert "no flow was trained" not in repr(posterior)
    assert_exact(posterior)  # where it starts already


def test_few_starts_train_no_flow():
    """They might have missed a mode, which the verdict says; a flow at the same starts would miss it too."""
    posterior = fit(regression, num_starts=1)
    assert posterior.is_gaussian and posterior.diagnose().verdict == "correct it"


def test_without_the_gate_a_flow_is_trained():
    posterior = fit(regression, gate=False)
    assert posterior.history.num_steps >= 200 and not posterior.is_gaussian
    assert_exact(posterior)


def heavy():
    pyro.sample("x", dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1))


def learned_mean(y=Y):
    mean = pyro.param("mean", torch.tensor(0.0))
    pyro.sample("x", dist.Normal(mean, 1.0))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def in_parts(y=Y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("N", len(y), subsample_size=4) as rows:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])


@pytest.mark.parametrize("model", [heavy, learned_mean, in_parts], ids=lambda model: model.__name__)
def test_what_is_no_gaussian_or_not_known_to_be_is_trained(model, monkeypatch):
    """Tails that are too heavy, parameters to learn, no full data to judge by."""

    class TrainedError(Exception):
        pass

    def stop(*args, **kwargs):
        raise TrainedError

    monkeypatch.setattr(FlowVI, "_train", stop)
    with pytest.raises(TrainedError):
        fit(model)


# Heavier tails


def very_heavy():
    pyro.sample("x", dist.StudentT(0.7, torch.zeros(2), 1.0).to_event(1))


@pytest.mark.slow
def test_a_student_base_is_tried_where_the_verdict_is_bad(monkeypatch):
    """The flow whose log weights vary less is kept."""
    judge, variances = FittedCandidate.diagnosis.func, {}

    def judged(fitted):
        diagnosis = judge(fitted)
        variances[fitted.candidate.flow_fn] = fitted, diagnosis.log_weight_variance
        return replace(diagnosis, verdict="do not use")

    monkeypatch.setattr(FittedCandidate, "diagnosis", property(judged))
    posterior = fit(very_heavy)
    light, heavy = Recipe("default"), Recipe("default", base="student_t")
    assert {light, heavy} <= set(variances)
    kept, other = sorted((variances[light], variances[heavy]), key=lambda pair: pair[1])
    assert kept[1] < other[1] and posterior.guide.flow is kept[0].flow


@pytest.mark.slow
def test_a_file_of_a_student_base(tmp_path):
    posterior = fit(very_heavy, guide=Recipe("default", base="student_t"), num_steps=200)
    posterior.save(tmp_path / "heavy.safetensors")
    loaded = load_posterior(tmp_path / "heavy.safetensors", very_heavy)
    draws = posterior.sample(10)
    assert torch.equal(loaded.log_prob(draws), posterior.log_prob(draws))


def test_a_student_base_that_diverges_is_left_out(monkeypatch):
    flows = []

    def briefly(vi, flow, make, **rest):
        flows.append(flow)
        if len(flows) == 2:
            raise DivergedError("25 steps in a row")
        return History({"elbo": [-1.0]})

    monkeypatch.setattr(FlowVI, "_train", briefly)
    with pytest.warns(UserWarning, match="heavier tails was tried, and left out: 25 steps in a row"):
        posterior = fit(very_heavy)
    assert posterior.guide.flow is flows[0] and posterior.guide.flow_fn == Recipe("default")
    assert [hasattr(flow.base, "raw_df") for flow in flows] == [False, True]
    assert posterior.sample(3)["x"].shape == (3, 2)


# Compiled


@pytest.mark.parametrize(
    "mode",
    [
        "auto",
        "trace",
        "none",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
                pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning"),
            ],
        ),
    ],
)
def test_all_ways_to_compile_find_the_same(mode):
    options = {"compile": mode, "num_steps": 60, "num_particles": 64}
    first = fit(regression, **options)
    assert_exact(first)
    if mode == "inductor":  # once is dear enough
        return
    second = fit(regression, **options)
    assert (first.history["elbo"] == second.history["elbo"]).all()
    for a, b in zip(first.guide.flow.parameters(), second.guide.flow.parameters(), strict=True):
        assert torch.equal(a, b)


def branching():
    """A normal with another mean left of zero, where next to nothing lies."""
    x = pyro.sample("x", dist.Normal(4.0, 1.0))
    pyro.sample("y", dist.Normal(x if x > 0 else -x, 1.0), obs=torch.tensor(6.0))


def leaving_torch():
    x = pyro.sample("x", dist.Normal(4.0, 1.0))
    pyro.factor("y", x * 0 - 0.5 * torch.as_tensor((x.detach().numpy() - 4.0) ** 2))


def test_a_branch_on_a_latent_fits_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = fit(branching, num_steps=40, num_particles=8, num_starts=2)
    posterior.num_diagnostic_samples = 1000
    x = posterior.sample(2000)["x"]
    assert x.mean() == pytest.approx(5.0, abs=0.1)
    assert x.std() == pytest.approx(math.sqrt(0.5), rel=0.1)


def reading():
    """The same, by a number that vmap cannot give."""
    x = pyro.sample("x", dist.Normal(4.0, 1.0))
    pyro.sample("y", dist.Normal(x if x.item() > 0 else -x, 1.0), obs=torch.tensor(6.0))


def test_a_model_that_runs_draw_by_draw_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = fit(reading, num_steps=40, num_particles=8, num_starts=2)
        posterior.num_diagnostic_samples = 1000
        posterior.predictive(10)
        assert posterior.sample(2000)["x"].mean() == pytest.approx(5.0, abs=0.1)
    (message,) = [str(warning.message) for warning in caught]
    for part in ("draw by draw", "test_vi.py:", '`pyro.sample("y", dist.Normal(x if x.item() > 0', "docs/models.md"):
        assert part in message


@pytest.mark.filterwarnings("ignore:the model runs draw by draw")
@pytest.mark.parametrize(("model", "message"), [(reading, "torch.where"), (leaving_torch, "its Python code")])
def test_trace_raises_where_code_depends_on_latents(model, message):
    with pytest.raises(UntraceableError, match=message):
        fit(model, compile="trace", num_steps=5)


def test_a_program_of_a_branch_takes_both_paths():
    assert fit(branching, compile="trace", num_steps=5).log_joint.batched.mode == "paths"


def series(filled):
    """A series, as a tensor that is filled or as a list."""
    decay = pyro.sample("decay", dist.Normal(0.5, 0.2))
    start = pyro.sample("start", dist.Normal(0.0, 1.0))
    states = torch.zeros(8) if filled else [None] * 8
    states[0] = start
    for t in range(1, 8):
        states[t] = decay * states[t - 1] + (0.5 if filled and start > 0 else torch.where(start > 0, 0.5, 0.5))
    mean = states if filled else torch.stack(states, -1)
    pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=torch.linspace(1.0, 0.0, 8))


def test_a_tensor_that_is_filled_is_fitted_like_a_list():
    """Also by a program, and although torch itself gives no gradient of a product that reads what is written later."""
    results = []
    for is_filled in (True, False):
        vi = FlowVI(series, compile="trace", num_steps=3, gate=False, num_starts=1, seed=0, progress_bar=False)
        log_joint = vi.run(is_filled).log_joint
        vectors = torch.linspace(-2.0, 2.0, 10).reshape(5, 2)
        results.append(log_joint.value_and_grad(vectors)(vectors.flip(0)))
        assert log_joint.batched.mode == ("paths" if is_filled else "plate")
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_none_compiles_nothing_and_does_not_warn():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model runs draw by draw")
        assert fit(leaving_torch, compile="none", num_steps=3, num_particles=4).history.num_steps == 3


# Several modes


LOCS = torch.tensor([[-5.0, 0.0], [5.0, 2.0]])


def two_modes():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 20.0).to_event(1).mask(False))
    parts = dist.Normal(LOCS, torch.tensor([[1.0], [0.5]])).to_event(1)
    pyro.factor("density", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts).log_prob(x))


@pytest.fixture(scope="module")
def mixed():
    return fit(two_modes, gate=True)


def test_two_modes_are_found_and_weighted(mixed):
    assert isinstance(mixed.guide.flow, Mixture) and len(mixed.guide.flow.components) == 2
    assert mixed.is_gaussian and "a Gaussian at each mode was enough" in repr(mixed)
    x = draws_of(mixed, "x")
    left = x[:, 0] < 0
    # The weights are evidences from 4000 draws each, of nearly exact flows.
    assert left.double().mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / NUM_DRAWS) + 0.005)
    for side, loc, sd in ((x[left], LOCS[0], 1.0), (x[~left], LOCS[1], 0.5)):
        assert ((side.mean(0) - loc) / sd).abs().max() < 0.02 + 4 / math.sqrt(len(side))
        torch.testing.assert_close(side.std(0), torch.full((2,), sd).double(), rtol=0.05, atol=0.0)
    assert mixed.log_evidence == pytest.approx(0.0, abs=0.01 + 4 * mixed.log_evidence_se)


def test_two_modes_in_the_verdict(mixed):
    diagnosis = mixed.diagnose()
    assert diagnosis.verdict == "good" and diagnosis.num_other_modes == 0
    assert len(mixed.starts.modes) == 2
    assert "in 2 separate modes whose ELBOs lie 0.8 nats apart" in repr(mixed)


def test_two_modes_in_a_file(mixed, tmp_path):
    mixed.save(tmp_path / "two.safetensors")
    loaded = load_posterior(tmp_path / "two.safetensors", two_modes)
    draws = mixed.sample(10)
    assert isinstance(loaded.guide.flow, Mixture) and loaded.starts == mixed.starts
    assert torch.equal(loaded.log_prob(draws), mixed.log_prob(draws))
    assert loaded.diagnose().verdict == "good"


@pytest.mark.parametrize("method", ["hmc", "independence"])
def test_chains_from_two_modes(mixed, method):
    chains = mixed.mcmc(num_samples=20, num_chains=100, num_warmup=30, method=method, seed=0, progress_bar=False)
    left = (chains.draws["x"][..., 0] < 0).double().mean()
    # Chains of "hmc" stay in the mode that they start in: a hundred draws.
    assert left == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 100))


def test_a_mixture_is_not_trained_on(mixed):
    with pytest.raises(OptionError, match="carry no gradients.*mixture of flows"):
        fit(two_modes, guide=mixed.guide, num_steps=5)


def test_a_flow_function_is_used_at_each_mode():
    posterior = fit(two_modes, guide=lambda dim: Planar(dim, num_layers=2), num_steps=20, seed=1)
    assert isinstance(posterior.guide.flow, Mixture)
    assert draws_of(posterior, "x")[:, 0].lt(0).double().mean() == pytest.approx(0.3, abs=0.05)


def test_one_start_finds_the_mode_at_its_values():
    init = pyro.infer.autoguide.init_to_value(values={"x": torch.tensor([-4.0, 0.0])})
    guide = AutoIAF(two_modes, num_layers=1, hidden_dims=(8,), init_loc_fn=init)
    posterior = fit(two_modes, guide=guide, num_steps=200)
    assert posterior.starts is None  # a guide of the user's starts where it stands
    assert (draws_of(posterior, "x")[:, 0] < 0).all()


@pytest.mark.parametrize("num_starts", [1, 2])
def test_few_starts(num_starts):
    posterior = fit(regression, num_starts=num_starts)
    assert posterior.starts.num_starts == num_starts
    assert_exact(posterior)


# Temperature


def near_modes():
    """Two modes that are near enough for one flow to cover, and no mirror images."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 20.0).to_event(1).mask(False))
    parts = dist.Normal(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), 1.0).to_event(1)
    pyro.factor("density", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.6, 0.4])), parts).log_prob(x))


@pytest.mark.slow
def test_tempering_helps_out_of_one_mode():
    """From one start, which finds one mode."""

    def smaller_share(temper):
        posterior = fit(near_modes, seed=1, num_starts=1, num_steps=900, num_particles=64, temper=temper)
        left = draws_of(posterior, "x")[:, 0].lt(0).double().mean().item()
        return min(left, 1 - left)

    assert smaller_share(None) < 0.1
    assert smaller_share(0.1) == pytest.approx(0.4, abs=0.1)


def test_a_tempered_fit_ends_at_the_target():
    posterior = fit(regression, temper=0.1, num_steps=300)
    assert posterior.history.num_steps == 300
    assert_exact(posterior)
    # While it is tempered the ELBO is another one.
    assert posterior.history["elbo"][:50].mean() > LOG_EVIDENCE + 0.5
    assert posterior.history["elbo"][-50:].mean() == pytest.approx(LOG_EVIDENCE, abs=0.02)


def test_without_num_steps_no_decay_while_it_is_tempered():
    history = fit(regression, temper=0.1, guide=partial(Gaussian), num_particles=16).history
    rates = history["learning_rate"]
    assert (rates[50:501] == rates.max()).all()


# Guides, bases, sizes


def test_a_guide_is_trained_where_it_stands():
    guide = AutoIAF(regression, num_layers=1, hidden_dims=(8,), init_scale=0.3)
    guide()
    flow = guide.flow
    posterior = fit(regression, guide=guide, num_steps=400)
    assert posterior.guide is guide and guide.flow is flow
    assert posterior.starts is None
    assert posterior.history["elbo"][0] < LOG_EVIDENCE - 1
    assert_exact(posterior)


def test_parameters_have_memory_of_their_own_after_a_fit():
    """Also after one that failed, so that the guide can be saved."""
    guide = AutoIAF(regression, num_layers=1, hidden_dims=(8,))

    def interrupted(parameters):
        raise KeyboardInterrupt

    fit(regression, guide=guide, num_steps=3)
    for _ in range(2):
        storages = [p.untyped_storage().data_ptr() for p in guide.flow.parameters()]
        assert len(set(storages)) == len(storages)
        with pytest.raises(KeyboardInterrupt):
            fit(regression, guide=guide, num_steps=3, optimizer=interrupted)


@pytest.mark.slow
def test_a_student_base_on_heavy_tails():
    flow_fn = partial(MAF, num_layers=1, hidden_dims=(8,), base="student_t")
    posterior = fit(heavy, guide=flow_fn, num_steps=800, optimizer=partial(torch.optim.Adam, lr=0.03))
    assert posterior.diagnose().verdict == "good", posterior.diagnose()
    assert posterior.guide.flow.base().base_dist.df.tolist() == pytest.approx([3.0, 3.0], rel=0.25)


def test_one_particle_a_step():
    posterior = fit(regression, num_particles=1, num_steps=300)
    assert torch.tensor(posterior.history["log_weight_variance"]).isnan().all()
    assert_exact(posterior, bias=0.05)


def skewed(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def test_one_latent_that_is_no_gaussian():
    """Gamma(3, 3), in the logarithm skewed."""
    y = torch.tensor([1.0, 0.0])
    posterior = fit(skewed, y)
    assert posterior.history.num_steps > 0
    rate = draws_of(posterior, "rate")
    assert rate.mean() == pytest.approx(1.0, abs=0.02 + 4 * math.sqrt(1 / 3 / NUM_DRAWS))
    assert rate.std() == pytest.approx(math.sqrt(1 / 3), rel=0.05)
    assert posterior.guide.flow.dim == 1


@pytest.mark.parametrize("as_data", [True, False])
def test_float64(as_data):
    args, options = ((X.double(), Y.double()), {}) if as_data else ((X, Y), {"dtype": torch.float64})
    posterior = fit(regression, *args, **options)
    assert posterior.sample(1)["b"].dtype == torch.float64
    assert posterior.is_gaussian
    assert_exact(posterior)


# Models that break at some values


@pytest.mark.parametrize("mode", ["auto", "none"])
def test_a_matrix_that_is_singular_at_some_latents(mode):
    """A correlation without bounds: beyond 1 there is no covariance."""
    y = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.6], [0.6, 1.0]])).sample((20,))

    def model(y):
        r = pyro.sample("r", dist.Normal(0.3, 0.5))
        one = torch.ones_like(r)
        covariance = torch.stack([torch.stack([one, r], -1), torch.stack([r, one], -1)], -2)
        factor = torch.linalg.cholesky(covariance)[..., None, :, :]
        with pyro.plate("N", len(y)):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = fit(model, y, num_steps=50, compile=mode)
    grid = torch.linspace(-0.999, 0.999, 2000)
    log_p = dist.Normal(0.3, 0.5).log_prob(grid)
    log_p += (
        dist.MultivariateNormal(torch.zeros(2), torch.stack([grid**0, grid, grid, grid**0], -1).reshape(-1, 1, 2, 2))
        .log_prob(y)
        .sum(-1)
    )
    exact = (log_p.softmax(0) * grid).sum().item()
    assert draws_of(posterior, "r").mean() == pytest.approx(exact, abs=0.05)
    assert posterior.diagnose().num_samples == 10_000


@pytest.mark.parametrize("options", [{"gate": "no"}, {"num_steps": 1.5}, {"num_starts": 2.0}], ids=str)
def test_options_of_the_wrong_type(options):
    (name,) = options
    with pytest.raises(OptionError, match=name):
        FlowVI(lambda: None, **options)


# Runs of the model


def test_a_fit_runs_its_model_a_few_times():
    """Traced once for the search and once for training, described twice, batched, checked, and drawn from as a start.

    The checks of the batch include eight single runs at far draws, and one of the batch with them.
    """
    num_runs = 0

    def model(y):
        nonlocal num_runs
        num_runs += 1
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + tau * eta)
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)

    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    posterior = FlowVI(model, num_steps=20, seed=0, progress_bar=False).run(y)
    assert num_runs < 28 + 9
    posterior.diagnose()
    # In chunks, for the draws, those that reach further, those of the prior, and exchanged values of each latent; and
    # a dozen single runs with which draws are compared.
    assert num_runs < 37 + 9 + 10 + 14
    for _ in range(2):
        posterior.predictive(10)
    assert num_runs < 47 + 9 + 10 + 14  # the ways of drawing are compared once


# Warnings


def test_a_warning_is_given_once_for_each_fit(monkeypatch):
    """Two candidates and the repetition in float64 meet the same reason."""

    def briefly(vi, flow, make, **rest):
        warn("this fit is slow")
        return History({"elbo": [-1.0]})

    monkeypatch.setattr(FlowVI, "_train", briefly)
    monkeypatch.setattr("pyroflows.inference.vi._describe_edges", lambda posterior: "draws lie on edges")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(very_heavy)
        fit(very_heavy)
    assert [str(w.message) for w in caught].count("this fit is slow") == 2

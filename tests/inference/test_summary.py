"""Tables of draws and how fits are printed."""

import math
import re
import signal

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.inference.arviz import ess as effective_size
from pyroflows.inference.summary import Summary, weighted_figures
from pyroflows.inference.weights import WeightedDraws, Weights
from pyroflows.models.structure import describe

az = pytest.importorskip("arviz")
QUIET = {"seed": 0, "progress_bar": False}
COLUMNS = ["mean", "sd", "mcse", "5%", "50%", "95%", "hdi_5%", "hdi_95%"]


def skewed(num=3000, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).gamma(2.0, size=num))


# Figures


def test_columns_of_independent_draws():
    x = skewed()
    table = Summary({"x": x}).table()
    assert list(table.columns) == COLUMNS
    row = table.loc["x"]
    assert row["mcse"] == pytest.approx(x.std().item() / math.sqrt(len(x)))
    assert [row["hdi_5%"], row["hdi_95%"]] == pytest.approx(az.hdi(x.numpy(), 0.9).tolist())
    assert row["hdi_95%"] - row["hdi_5%"] < row["95%"] - row["5%"]


def test_equal_weights_change_nothing():
    x = skewed(2000).numpy()
    weighted = weighted_figures(x, np.full(2000, 1 / 2000))
    plain = Summary({"x": torch.from_numpy(x)}).table().loc["x"].tolist()
    assert weighted[:2] == pytest.approx(plain[:2])
    # Quantiles and intervals end at draws, which may be the next ones.
    assert weighted[2:] == pytest.approx(plain[2:], abs=0.02)


def test_weights_are_those_of_repeated_draws():
    x, counts = skewed(300).numpy(), np.random.default_rng(1).integers(0, 5, 300)
    weighted = dict(zip(COLUMNS, weighted_figures(x, counts / counts.sum()), strict=True))
    repeated = np.repeat(x, counts)
    assert weighted["mean"] == pytest.approx(repeated.mean())
    for name, level in (("5%", 0.05), ("50%", 0.5), ("95%", 0.95)):
        assert weighted[name] == pytest.approx(np.quantile(repeated, level, method="inverted_cdf"))
    inside = (repeated >= weighted["hdi_5%"]) & (repeated <= weighted["hdi_95%"])
    assert 0.9 <= inside.mean() < 0.93
    low, high = az.hdi(repeated, 0.9)
    assert weighted["hdi_95%"] - weighted["hdi_5%"] <= high - low + 1e-12


def test_the_error_of_a_weighted_mean_is_right():
    """Over repetitions the mean varies by as much as its error says."""
    means, errors = [], []
    for seed in range(400):
        x = 1.5 * np.random.default_rng(seed).normal(size=500)
        weights = np.exp(-(x**2) / 2 + x**2 / 4.5 + 0.3 * x)
        mean, _, error, *_ = weighted_figures(x, weights / weights.sum())
        means.append(mean)
        errors.append(error)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=4 / math.sqrt(2 * 400))
    assert abs(np.mean(errors) * math.sqrt(500) - 1) > 0.05  # nor is it that of independent draws


def test_one_draw_with_all_the_weight():
    figures = dict(zip(COLUMNS, weighted_figures(np.arange(5.0), np.eye(5)[3]), strict=True))
    assert math.isnan(figures.pop("sd")) and figures.pop("mcse") == 0
    assert set(figures.values()) == {3.0}


def test_draws_without_weight_do_not_count():
    figures = weighted_figures(np.array([1.0, 2.0, np.nan]), np.array([0.5, 0.5, 0.0]))
    assert figures[0] == 1.5 and np.isfinite(figures).all()


def test_chains_have_the_error_of_correlated_draws():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    chains = pf.FlowVI(model, num_steps=10, num_starts=1, **QUIET).run().mcmc(50, 4, num_warmup=20, **QUIET)
    table = chains.summary()
    assert list(table.columns) == [*COLUMNS, "ess", "rhat"]
    x = chains.draws["x"][..., 1].double().numpy()
    row = table.loc["x[1]"]
    assert row["mcse"] == pytest.approx(float(az.mcse(x)))
    assert row["mcse"] == pytest.approx(x.std(ddof=1) / math.sqrt(effective_size(x[..., None], "mean")[0]))
    assert (row["ess"], row["rhat"]) == (chains.ess["x"][1], chains.rhat["x"][1])
    assert str(chains).startswith("      ") and str(chains).endswith(repr(chains))


def test_angles_are_averaged_by_their_weights():
    def model():
        pyro.sample("angle", dist.VonMises(3.0, 1.0))

    structure = describe(model, (), {})
    draws = {"angle": torch.tensor([3.0, -3.0, 1.0])}
    table = Summary(draws, structure, weights=np.array([0.5, 0.5, 0.0])).table()
    assert table.loc["angle", "mean"] == pytest.approx(math.pi)
    assert table.loc["angle", "95%"] == pytest.approx(2 * math.pi - 3)


# Printing


def test_a_long_site_is_one_line_in_print_and_a_table_when_asked():
    draws = {"mu": torch.zeros(5), "z": torch.arange(2000.0).expand(5, 2000), "w": torch.zeros(5, 30)}
    summary = Summary(draws)
    lines = str(summary).splitlines()
    assert len(lines) == 1 + 1 + 30 + 1
    assert lines[-1] == "z  2,000 components, means from 0 to 2e+03: see summary(['z'])"
    assert len(summary.table(["z"])) == 2000
    assert len(summary.table()) == 1 + 2000 + 30


def test_only_long_sites():
    assert str(Summary({"z": torch.ones(2, 31)})) == "z  31 components, means from 1 to 1: see summary(['z'])"


def test_an_unknown_site():
    with pytest.raises(pf.errors.OptionError, match=r"no draws of \['a'\], only of \['x'\]"):
        Summary({"x": torch.zeros(2)}).table(["x", "a"])


def test_weighted_draws_print_a_table_and_their_figures():
    weighted = WeightedDraws({"x": skewed(100)}, Weights.smoothed(torch.zeros(100)))
    table, _, lines = str(weighted).rpartition("\n\n")
    assert table.split()[:3] == ["mean", "sd", "mcse"]
    assert lines.splitlines() == [repr(weighted), weighted.weights.khat_in_words]
    assert "khat=0.00 +- 0.00 (good below 0.50)" in repr(weighted)
    assert weighted.summary(["x"]).loc["x", "mean"] == pytest.approx(weighted.draws["x"].mean().item())


@pytest.mark.parametrize(
    ("khat", "num_draws", "words"),
    [
        (0.30, 1000, r"below 0\.67, the threshold for 1,000 draws: the weights can be trusted"),
        (0.60, 1000, r"too close to 0\.67.*draw more"),
        (0.76, 1000, r"too close to 0\.67"),
        (0.90, 1000, r"above 0\.67.*may be far off.*run chains"),
        (0.60, 10_000, r"too close to 0\.70, the threshold for 10,000 draws"),
        (0.59, 10_000, r"below 0\.70"),
        (math.inf, 1000, "says nothing.*draw more"),
        (0.0, 10, "says nothing.*draw more"),
    ],
)
def test_weights_say_whether_their_khat_is_good(khat, num_draws, words):
    weights = Weights(torch.zeros(num_draws), khat, 0.1, ess=num_draws, log_evidence=0.0, log_evidence_se=0.0)
    assert re.search(f"^k-hat .*{words}", weights.khat_in_words)


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu.exp(), 0.3), obs=y)


def interrupting(at):
    def call(history, posterior):
        if history.num_steps == at:
            signal.raise_signal(signal.SIGINT)

    return call


def lines_of(posterior):
    return [line for line in repr(posterior).splitlines() if " s, " in line or " s;" in line or line.endswith(" s")]


def test_print_says_how_long_a_fit_took(tmp_path):
    vi = pf.FlowVI(model, num_steps=60, num_starts=1, **QUIET)
    posterior = vi.run(torch.tensor(1.0))
    seconds = posterior.outcome.seconds
    assert 0 < seconds < 60 and posterior.outcome.ending == "fitted"
    assert lines_of(posterior) == [f"fitted in {seconds:.1f} s, 60 steps"]
    posterior.save(tmp_path / "posterior")
    loaded = pf.load_posterior(tmp_path / "posterior", model, torch.tensor(1.0))
    assert loaded.outcome == posterior.outcome and repr(loaded) == repr(posterior)
    assert posterior.with_data(torch.tensor(1.1)).outcome == posterior.outcome


def test_print_of_a_gaussian():
    def exact(y):
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    posterior = pf.FlowVI(exact, **QUIET).run(torch.tensor(1.0))
    took = f"fitted in {posterior.outcome.seconds:.1f} s"
    assert lines_of(posterior) == [f"{took}; a Gaussian was enough, so that no flow was trained"]


def test_an_interrupted_fit_says_so_in_print_and_verdict():
    vi = pf.FlowVI(model, num_steps=200, num_starts=1, callback=interrupting(at=50), **QUIET)
    with pytest.raises(pf.FitInterrupted) as caught:
        vi.run(torch.tensor(1.0))
    posterior = caught.value.result
    how = f"interrupted after 50 steps, {posterior.outcome.seconds:.1f} s"
    assert how in repr(posterior).splitlines()
    reason = posterior.diagnose().reasons[0]
    assert reason == f"the fit was {how}: this is the verdict on what it had found by then"


def test_an_interrupted_search_trained_nothing(monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyroflows.inference.vi.find_start", stop)
    with pytest.raises(pf.FitInterrupted) as caught:
        pf.FlowVI(model, **QUIET).run(torch.tensor(1.0))
    posterior = caught.value.result
    assert not posterior.is_gaussian  # nobody found that a Gaussian is enough
    assert lines_of(posterior)[:1] == [f"interrupted after {posterior.outcome.seconds:.1f} s, untrained"]


def test_a_callback_sees_a_fit_in_training_and_its_end_is_noted():
    seen = []

    def call(history, posterior):
        seen.append(posterior.outcome.ending)
        return history.num_steps < 100

    posterior = pf.FlowVI(model, num_steps=200, num_starts=1, callback=call, **QUIET).run(torch.tensor(1.0))
    assert seen == ["still in training"] * 2
    assert lines_of(posterior)[0].startswith("ended by the callback after 100 steps, ")

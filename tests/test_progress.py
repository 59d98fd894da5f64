"""Fits show from the first second what they do, and print nothing where they shall not."""

import re
from types import SimpleNamespace

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.inference import weights
from pyroflows.models.batching import BatchedModel
from pyroflows.progress import Progress

Y = torch.tensor([0.5, -1.0, 2.0])


def normal(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("N", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def unknown_sign(y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(a.abs(), 0.1), obs=y)


def skewed(y):
    a = pyro.sample("a", dist.Gamma(0.5, 1.0))
    pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def stages(capsys):
    """The names of the stages that were shown, in their order."""
    shown = capsys.readouterr()
    assert not shown.out
    texts = [re.split(r": +\d+(?:%|step)| \[", line)[0].strip() for line in re.split("[\r\n]", shown.err)]
    return list(dict.fromkeys(text for text in texts if text))


def test_stages(capsys):
    with Progress(True, "again: ") as progress:
        progress.say("first")
        progress.start("second", total=10, initial=2, unit="fit")
        progress.update(3, total=20, text="third", elbo="-3.1")
        progress._bar.refresh()
        progress.finish("done")
    shown = capsys.readouterr().err
    for text in ("again: first [00:00]", "again: second:  20%", "2/10", "again: third:  25%", "5/20", "elbo=-3.1"):
        assert text in shown
    assert shown.endswith("again: done [00:00]\n")


def test_a_notebook_learns_of_the_total():
    widget = SimpleNamespace(max=1, bar_style="info", layout=SimpleNamespace(width="20px"))
    with Progress(True) as progress:
        progress.start("training")
        progress._bar.container = SimpleNamespace(children=(None, widget, None))
        progress.update(1, total=70)
    assert (widget.max, widget.bar_style, widget.layout.width) == (70, "", None)


def test_a_fit_by_a_gaussian(capsys):
    pf.FlowVI(normal, seed=0).run(Y)
    assert stages(capsys) == [
        "describing the model",
        "search for modes from 8 starts",
        "search for modes, 1 mode so far",
        "checking whether a Gaussian is enough",
        "fit: 55 starts, 1 mode, a Gaussian was enough, verdict: good",
    ]


def test_the_search_says_how_many_starts_are_left(capsys):
    pf.FlowVI(normal, seed=0).run(Y)
    assert "8/55 " in capsys.readouterr().err


def test_each_training_is_named(capsys):
    pf.FlowVI(unknown_sign, num_steps=3, num_starts=8, seed=0).run(torch.tensor(1.0))
    shown = stages(capsys)
    assert shown[3:5] == ["training of the flow 1 of 2", "training of the flow 2 of 2"]
    assert shown[5] == "fit: 8 starts, 2 modes, 3 steps of the first flow"


def test_a_fit_that_is_repeated_in_float64(capsys, monkeypatch):
    monkeypatch.setattr("pyroflows.inference.vi._describe_edges", lambda posterior: "draws lie on edges")
    with pytest.warns(UserWarning, match="draws lie on edges, and was repeated in float64"):
        pf.FlowVI(normal, seed=0).run(Y)
    shown = stages(capsys)
    assert shown[0] == "describing the model"
    assert "in float64: describing the model" in shown
    assert shown[-1].startswith("in float64: fit: 55 starts, ")


@pytest.mark.slow
def test_the_total_is_shown_once_the_decay_begins(capsys):
    pf.FlowVI(skewed, gate=False, seed=0).run(torch.tensor(1.0))
    shown = capsys.readouterr().err
    assert re.search(r"training of the flow: \d+step", shown)
    assert re.search(r"training of the flow: +\d+%.*/[1-9]\d\d ", shown)


def test_an_amortised_fit_and_its_calibration(capsys):
    amortized = pf.fit_amortized(normal, num_simulations=100, max_epochs=1, num_flows=2, seed=0)
    assert stages(capsys) == [
        "describing the model",
        "100 simulations",
        "training of the flow 1 of 2",
        "training of the flow 2 of 2",
    ]
    pf.sbc(normal, amortized, num_datasets=10, num_samples=10, seed=0)
    assert stages(capsys) == ["simulation of 10 data sets", "fits"]


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_printed_without_it(capsys):
    pf.FlowVI(skewed, num_steps=3, seed=0, progress_bar=False).run(torch.tensor(1.0))
    amortized = pf.fit_amortized(normal, num_simulations=100, max_epochs=1, num_flows=2, seed=0, progress_bar=False)
    pf.sbc(normal, amortized, num_datasets=10, num_samples=10, seed=0, progress_bar=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("is_slow", [False, True])
def test_importance_sampling_shows_a_bar_where_it_takes_long(monkeypatch, capsys, is_slow):
    posterior = pf.FlowVI(normal, num_steps=3, seed=0, progress_bar=False).run(Y)
    capsys.readouterr()
    monkeypatch.setattr(BatchedModel, "chunk_size", 10)
    monkeypatch.setattr(weights, "DELAY", 0.0 if is_slow else 60.0)
    for show in (True, False):
        posterior.importance_sample(100, seed=0, progress_bar=show)
        assert ("100/100" in capsys.readouterr().err) == (is_slow and show)


def test_draws_one_by_one_come_in_small_batches():
    """A bar that moves once in thousands of slow draws would seem to stand still."""

    def slow():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(sum(x.reshape(-1).tolist()), 1.0), obs=Y[0])

    with pytest.warns(UserWarning, match="draw by draw"):
        batched = BatchedModel(slow, (), {}, {"x": torch.randn(5)})
    assert batched.mode == "loop" and batched.chunk_size == 10

"""Pictures of a fit."""

import subprocess
import sys

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist

from pyroflows import FlowError, FlowVI, OptionError, PlotError
from pyroflows.plots import plot_density_fit, plot_distillation, plot_training
from pyroflows.training.loop import History

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture
def plt():
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


@pytest.fixture
def history():
    """A climb from far below, then noise about -3."""
    rng = np.random.default_rng(0)
    steps = np.arange(400)
    elbo = -3.0 - 1e4 * np.exp(-steps / 5) + 0.1 * rng.normal(size=400)
    return History({"elbo": elbo, "log_weight_variance": 10 * np.exp(-steps / 50) + 0.01})


@pytest.fixture(scope="module")
def posterior():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(mean.sum(-1), scale), obs=y)

    return FlowVI(model, num_steps=30, seed=0, progress_bar=False).run(torch.tensor(1.0))


# The training


def test_plot_training(plt, history):
    figure = plot_training(history)
    assert isinstance(figure, plt.Figure)
    top, bottom = figure.axes
    assert "ELBO" in top.get_ylabel()
    assert "variance" in bottom.get_ylabel()
    assert bottom.get_xlabel() == "step"
    assert bottom.get_yscale() == "log"
    # The numbers themselves, and a smooth line.
    raw, smooth = top.get_lines()
    assert raw.get_xdata().tolist() == list(range(1, 401))
    assert raw.get_ydata() == pytest.approx(history["elbo"])
    assert np.std(np.diff(smooth.get_ydata()[100:])) < 0.2 * np.std(np.diff(raw.get_ydata()[100:]))
    assert bottom.get_lines()[0].get_ydata() == pytest.approx(history["log_weight_variance"])


def test_the_axis_leaves_out_the_climb(plt, history):
    low, high = plot_training(history).axes[0].get_ylim()
    assert -5.0 < low < -3.2
    assert -2.8 < high < 0.0


@pytest.mark.parametrize("num_steps", [1, 2, 9, 30])
def test_short_histories(plt, num_steps):
    history = History({"elbo": [-1.0] * num_steps, "log_weight_variance": [0.5] * num_steps})
    figure = plot_training(history)
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()
    assert low < -1.0 < high


def test_steps_that_were_left_out(plt, history):
    """A history may hold NaN and infinities, which the guard met."""
    elbo, variance = history["elbo"], history["log_weight_variance"]
    elbo[[50, 51, 300]] = [np.nan, -np.inf, np.nan]
    variance[[50, 51, 300]] = np.nan
    figure = plot_training(History({"elbo": elbo, "log_weight_variance": variance}))
    figure.canvas.draw()
    assert np.isfinite(figure.axes[0].get_ylim()).all()


def test_one_particle_a_step_has_no_variance(plt, history):
    history = History({"elbo": history["elbo"], "log_weight_variance": [np.nan] * 400})
    plot_training(history).canvas.draw()


def test_no_training_to_plot(plt):
    with pytest.raises(PlotError, match="no training on the model to plot: a Gaussian was enough"):
        plot_training(History())
    assert not plt.get_fignums()


def test_plot_training_of_a_posterior(plt, posterior, tmp_path):
    figure = posterior.plot_training()
    assert len(figure.axes) == 2
    assert len(figure.axes[0].get_lines()[0].get_xdata()) == 30
    figure.savefig(tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 0


# A density fit


def epochs(num_epochs=60, num_constant=40):
    """A climb from far below, for both curves, and a learning rate that falls at the end."""
    rng = np.random.default_rng(0)
    steps = np.arange(num_epochs)
    climb = -3.0 - 1e3 * np.exp(-2.0 * steps)
    falling = np.maximum(steps - num_constant + 1, 0) / (num_epochs - num_constant + 1)
    records = {
        "log_prob": climb + 0.1 * rng.normal(size=num_epochs),
        "validation_log_prob": climb - 0.5 + 0.1 * rng.normal(size=num_epochs),
        "learning_rate": 2e-3 * np.minimum((steps + 1) / 3, 1) * (1 - falling),
    }
    return History(records, unit="epoch")


def test_plot_density_fit(plt):
    history = epochs()
    figure = plot_density_fit(history, best_epoch=47)
    figure.canvas.draw()
    (axis,) = figure.axes
    training, validation, kept = axis.get_lines()
    assert training.get_xdata().tolist() == list(range(1, 61))
    assert training.get_ydata() == pytest.approx(history["log_prob"])
    assert validation.get_ydata() == pytest.approx(history["validation_log_prob"])
    assert list(kept.get_xdata()) == [47, 47]
    (falling,) = axis.patches
    assert falling.get_x() == 40.5
    assert falling.get_width() == 20
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["training rows", "validation rows", "kept: epoch 47", "learning rate falls, from the best state"]
    assert axis.get_xlabel() == "epoch"
    assert "nats a row" in axis.get_ylabel()
    low, high = axis.get_ylim()
    assert -5.0 < low < -3.5 and -3.0 < high < -2.0  # without the climb, with both curves


@pytest.mark.parametrize("num_epochs", [1, 2, 9])
def test_plot_of_few_epochs(plt, num_epochs):
    figure = plot_density_fit(epochs(num_epochs, num_constant=num_epochs), best_epoch=0)
    figure.canvas.draw()
    (axis,) = figure.axes
    assert not axis.patches
    assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_plot_of_an_epoch_without_a_finite_step(plt):
    history = dict(epochs())
    history["log_prob"][[5, 30]] = np.nan
    history["validation_log_prob"][30] = -np.inf
    figure = plot_density_fit(History(history), best_epoch=12)
    figure.canvas.draw()
    assert np.isfinite(figure.axes[0].get_ylim()).all()


# Pairs


def test_plot_pairs(plt, posterior, tmp_path):
    figure = posterior.plot_pairs(num_samples=200)
    figure.savefig(tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").stat().st_size > 0


def labels_of(figure):
    """The labels along the bottom, and those of single panels."""
    return [axis.get_xlabel() for axis in figure.axes if axis.get_xlabel()]


def test_plot_pairs_of_a_single_component(plt, posterior):
    plt.figure()
    figure = posterior.plot_pairs(var_names=["scale"], num_samples=200)
    assert labels_of(figure) == ["scale"]
    assert len(plt.get_fignums()) == 2  # beside the figure that was there


def big_model(y):
    rows = pyro.plate("row", len(y))
    with rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with rows:
        pyro.sample("y", dist.Normal(z + (slope.sum((-1, -2)) * scale)[..., None], 1.0), obs=y)


@pytest.fixture(scope="module")
def big():
    labels = {"coords": {"row": list("abcdefghijkl"), "kind": ["wet", "dry"]}, "dims": {"slope": ["kind"]}}
    return FlowVI(big_model, num_steps=20, seed=0, progress_bar=False, num_starts=1, **labels).run(torch.zeros(12))


def test_plot_pairs_of_a_big_model_shows_six_scalars_and_says_what_it_leaves_out(plt, big):
    figure = big.plot_pairs(num_samples=100)
    assert labels_of(figure) == ["scale", "z[a]", "z[b]", "z[c]", "z[d]", "z[e]"]
    title = "6 of 17 components, without z (7), slope (4): choose by var_names, coords"
    assert figure.get_suptitle() == title


def test_plot_pairs_of_chosen_labels(plt, big):
    figure = big.plot_pairs(
        ["slope", "z"], coords={"kind": "dry", "row": ["l", "a"], "slope_dim_1": [0]}, num_samples=9
    )
    assert labels_of(figure) == ["slope[dry, 0]", "z[a]", "z[l]"]
    assert not figure.get_suptitle()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"var_names": ["z"]}, r"up to 6 components, but \['z'\] have 12: choose by var_names and coords"),
        ({"coords": {"kind": ["wett"]}}, r"dimension 'kind' has no labels \['wett'\], only \[wet, dry\]"),
        ({"coords": {"knd": ["wet"]}}, r"no dimension 'knd' to choose from, only \['row', 'kind', 'slope_dim_1'\]"),
        ({"var_names": ["zz"]}, r"no draws of \['zz'\], only of \['z', 'slope', 'scale'\]"),
    ],
)
def test_plot_pairs_of_what_there_is_not(plt, big, options, message):
    with pytest.raises(OptionError, match=message):
        big.plot_pairs(num_samples=100, **options)
    assert not plt.get_fignums()


def test_plot_pairs_of_corrected_draws(plt, big):
    weighted = big.importance_sample(100)
    assert labels_of(weighted.plot_pairs(["scale", "z"], {"row": ["b", "c"]})) == ["scale", "z[b]", "z[c]"]
    chains = big.mcmc(4, 2, num_warmup=1, seed=0, progress_bar=False)
    assert labels_of(chains.plot_pairs(["scale", "z"], {"row": ["b", "c"]})) == ["scale", "z[b]", "z[c]"]


# Axes of what is near zero


def steps_of(name, values):
    return History({"elbo": np.zeros(len(values)), name: values})


def test_a_variance_of_rounding_errors_looks_like_zero(plt):
    """A logarithmic axis would show the noise of an exact flow, from 1e-16 to 1e-13."""
    rng = np.random.default_rng(0)
    axis = plot_training(steps_of("log_weight_variance", 1e-13 * rng.random(100))).axes[1]
    assert axis.get_yscale() == "symlog"
    low, high = axis.get_ylim()
    assert -1e-4 < low < 0 and 1e-5 < high < 1e-3


def test_a_single_exact_step_does_not_stretch_the_axis(plt):
    variance = np.full(100, 0.02)
    variance[0] = 1e-13
    axis = plot_training(steps_of("log_weight_variance", variance)).axes[1]
    assert axis.get_yscale() == "log"
    assert axis.get_ylim()[0] == pytest.approx(1e-4)


def test_a_divergence_within_its_noise_is_on_a_linear_part_of_the_axis(plt):
    noise = 1e-3 * np.random.default_rng(0).normal(size=300)
    (axis,) = plot_distillation(History({"kl": noise + 10 * np.exp(-np.arange(300) / 10)}), 1e-5).axes
    assert axis.get_yscale() == "symlog"
    raw = axis.get_lines()[0]
    assert np.isfinite(raw.get_ydata()).all() and (raw.get_ydata() < 0).any()
    assert 5e-4 < axis.yaxis.get_transform().linthresh < 3e-3
    low, high = axis.get_ylim()
    assert low < 0 and high > 10


def test_a_divergence_far_from_zero_is_on_a_logarithmic_axis(plt):
    (axis,) = plot_distillation(History({"kl": 1 + np.exp(-np.arange(300) / 10)}), 1.0).axes
    assert axis.get_yscale() == "log"


# Without matplotlib


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


@pytest.mark.parametrize(
    "draw",
    [
        lambda p: p.plot_training(),
        lambda p: p.plot_pairs(),
        lambda p: plot_training(p.history),
        lambda p: plot_density_fit(epochs(), 1),
    ],
    ids=["plot_training", "plot_pairs", "function", "density fit"],
)
def test_without_matplotlib(no_matplotlib, posterior, draw):
    with pytest.raises(PlotError, match=r"pip install 'pyroflows\[plots\]'") as caught:
        draw(posterior)
    assert isinstance(caught.value, FlowError)
    assert isinstance(caught.value, ImportError)


def test_pyroflows_itself_needs_no_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import pyroflows; print(pyroflows.FlowVI.__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "FlowVI"


@pytest.mark.parametrize(("gaussian", "is_shown"), [(-3.4, True), (-2.0, True), (-9.0, False)])
def test_a_gaussian_is_in_the_picture_or_its_value_in_the_legend(plt, gaussian, is_shown):
    log_prob = -3.0 + 0.3 * np.sin(np.arange(40))
    history = History({"log_prob": log_prob, "validation_log_prob": log_prob, "learning_rate": np.ones(40)})
    (axis,) = plot_density_fit(history, best_epoch=30, gaussian=gaussian).axes
    low, high = axis.get_ylim()
    assert (low < gaussian < high) == is_shown
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert ("a Gaussian: -9, below" in labels) != is_shown

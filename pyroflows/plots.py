"""Plots of how a fit went, as matplotlib figures."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pyroflows.errors import PlotError
from pyroflows.training.history import History

# A variance of log weights, and a divergence in nats, below which a flow is as good as exact.
NEGLIGIBLE_VARIANCE, NEGLIGIBLE_KL = 1e-4, 1e-5


def plot_training(history: History) -> Any:
    """Plot the ELBO and the variance of the log weights over the steps, each step and running medians.

    The range of the ELBO's axis leaves out its rise in the first steps, which would flatten the rest.

    Args:
        history: the history of a fit to a model, with "elbo" and "log_weight_variance".

    Returns:
        A matplotlib figure.

    Raises:
        PlotError: if matplotlib is not installed, or no flow was trained on the model.
    """
    plt = require_matplotlib()
    if not history:
        raise PlotError(
            "there is no training on the model to plot: a Gaussian was enough, or the guide was fitted to another"
        )
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(6.4, 5.0), layout="constrained")
    elbo = history["elbo"]
    steps = np.arange(1, len(elbo) + 1)
    top.plot(steps, elbo, color="C0", alpha=0.25, linewidth=0.8)
    top.plot(steps, _smooth(elbo), color="C0")
    top.set_ylim(*_robust_range(elbo))
    top.set_ylabel("ELBO (nats)")
    variance = history["log_weight_variance"]
    if np.isfinite(variance).any():  # the variance of one particle a step is NaN
        bottom.plot(steps, variance, color="C1", alpha=0.25, linewidth=0.8)
        curve = _smooth(variance)
        bottom.plot(steps, curve, color="C1")
        _set_log_axis(bottom, variance, curve, NEGLIGIBLE_VARIANCE)
    bottom.set_ylabel("variance of log weights")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    return figure


def plot_density_fit(history: History, best_epoch: int, gaussian: float | None = None) -> Any:
    """Plot the mean log-density of training and validation rows over the epochs, and mark the epoch that was kept.

    As in :func:`plot_training`, the range of the axis leaves out the rise in the first epochs.

    Args:
        history: the history of a density fit, with "log_prob", "validation_log_prob" and "learning_rate".
        best_epoch: the epoch whose state was kept, counted from 1.
        gaussian: mean log-density of the validation rows under a Gaussian, None to leave it out.

    Returns:
        A matplotlib figure.

    Raises:
        PlotError: if matplotlib is not installed.
    """
    figure, axis, (low, high) = _plot_epochs(history, "log_prob", best_epoch)
    if gaussian is not None:
        # One further below would leave too little room for the curves, so that its value has to do.
        is_shown = gaussian > 2 * low - high
        label = "validation rows, a Gaussian" if is_shown else f"a Gaussian: {gaussian:.4g}, below"
        axis.axhline(gaussian, color="C1", linestyle="--", linewidth=1.0, label=label)
        if is_shown:
            margin = 0.05 * (high - low)
            low, high = min(low, gaussian - margin), max(high, gaussian + margin)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    axis.set_ylim(low, high)
    axis.set_ylabel("mean log-density (nats a row)")
    return figure


def plot_matching_fit(history: History, best_epoch: int) -> Any:
    """Plot the loss of training and validation rows over the epochs, and mark the epoch that was kept.

    As in :func:`plot_training`, the range of the axis leaves out the fall in the first epochs.

    Args:
        history: the history of flow matching, with "loss", "validation_loss" and "learning_rate".
        best_epoch: the epoch whose state was kept, counted from 1.

    Returns:
        A matplotlib figure.

    Raises:
        PlotError: if matplotlib is not installed.
    """
    figure, axis, limits = _plot_epochs(history, "loss", best_epoch)
    axis.set_ylim(*limits)
    axis.set_ylabel("mean squared error of the velocity")
    return figure


def plot_distillation(history: History, kl: float) -> Any:
    """Plot the KL divergence over the steps, and its value after training.

    The axis is logarithmic, and linear about zero where the divergence is as small as the noise of its estimates.

    Args:
        history: the history of a distillation, with "kl".
        kl: the KL divergence after training, in nats.

    Returns:
        A matplotlib figure.

    Raises:
        PlotError: if matplotlib is not installed.
    """
    plt = require_matplotlib()
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    values = history["kl"]
    steps = np.arange(1, len(values) + 1)
    axis.plot(steps, values, color="C0", alpha=0.25, lw=0.8, label="draws of a step")
    curve = _smooth(values, np.nanmean)
    axis.plot(steps, curve, color="C0", label="running mean")
    axis.axhline(kl, color="black", linestyle=":", linewidth=1.0, label=f"after training: {kl:.3g} nats")
    _set_log_axis(axis, values, curve, NEGLIGIBLE_KL)
    axis.set_xlabel("step")
    axis.set_ylabel("KL(student || teacher) (nats)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    axis.grid(alpha=0.3)
    return figure


def _plot_epochs(history: History, name: str, best_epoch: int) -> tuple[Any, Any, tuple[float, float]]:
    """Plot a figure of training and validation rows; return figure, axis, and limits of what was plotted."""
    plt = require_matplotlib()
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    curves = np.stack([history[name], history[f"validation_{name}"]], -1)
    epochs = np.arange(1, len(curves) + 1)
    marker = "." if len(epochs) < 20 else None
    # Batches make the curve of training noisy; it must not hide the other one.
    axis.plot(epochs, curves[:, 0], color="C0", alpha=0.5, linewidth=1.0, label="training rows", marker=marker)
    axis.plot(epochs, curves[:, 1], color="C1", label="validation rows", marker=marker)
    axis.axvline(best_epoch, color="black", linestyle=":", linewidth=1.0, label=f"kept: epoch {best_epoch}")
    rates = history["learning_rate"]
    num_constant = np.flatnonzero(np.isclose(rates, rates.max()))[-1] + 1
    if num_constant < len(epochs):
        label = "learning rate falls, from the best state"
        axis.axvspan(num_constant + 0.5, len(epochs) + 0.5, color="black", alpha=0.06, linewidth=0, label=label)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axis.set_xlabel("epoch")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    axis.grid(alpha=0.3)
    return figure, axis, _robust_range(curves.ravel())


def require_matplotlib() -> Any:
    """Import ``matplotlib.pyplot``.

    Raises:
        PlotError: if matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install 'pyroflows[plots]'") from error
    return plt


def _set_log_axis(axis: Any, values: np.ndarray, curve: np.ndarray, negligible: float) -> None:
    """Make the vertical axis logarithmic, and linear about zero where the curve is as small as the noise of the values.

    Args:
        axis: the axis, with its curves.
        values: estimates of what is positive or zero; those below zero tell the size of their noise.
        curve: the smoothed values.
        negligible: the size below which values do not matter.
    """
    negative = -values[values < 0]
    noise = max(negligible, float(np.quantile(negative, 0.9)) if len(negative) else 0.0)
    if (curve <= noise).any() or (values <= 0).any():
        axis.set_yscale("symlog", linthresh=noise)
        axis.axhline(0.0, color="black", linewidth=0.5)
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, -0.1 * noise), max(high, noise))
    else:
        axis.set_yscale("log")
        axis.set_ylim(bottom=max(axis.get_ylim()[0], noise))


def _smooth(values: np.ndarray, statistic: Callable[[np.ndarray], Any] = np.nanmedian, window: int = 25) -> np.ndarray:
    """The running median, or another statistic, with a shorter window at both ends."""
    half = window // 2
    return np.array([statistic(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _robust_range(values: np.ndarray) -> tuple[float, float]:
    """Limits of an axis for all but extreme values, without the first tenth."""
    settled = values[len(values) // 10 :]
    low, high = np.nanquantile(settled[np.isfinite(settled)], [0.02, 0.98])
    margin = 0.15 * (high - low) + 1e-3
    return low - margin, high + margin

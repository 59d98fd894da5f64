"""Pictures of a calibration: ECDF differences, and expected coverage."""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyroflows.inference.arviz import ecdf_band
from pyroflows.plots import require_matplotlib

PROBABILITY = 0.95
NUM_POINTS = 100
MAX_COLUMNS = 4
# More coloured lines than this in a panel are counted, not named.
MAX_NAMED = 4
LEGEND = (
    "Latents: above zero, the fit is shifted up; below, shifted down; first above, then below, too narrow; the other "
    "way round, too wide. In each panel exact fits stay inside the band with probability 95 %. The verdict "
    "names what is coloured."
)


def plot_ecdf_differences(
    panels: Mapping[str, Mapping[str, np.ndarray]], wrong: Mapping[str, str], verdict: str
) -> Any:
    """Plot the empirical distribution of levels minus the uniform one, a panel for each latent.

    Lines of quantities that are called wrong are coloured and named, others are grey. The band of a panel
    with several lines is wide enough to hold all of them with a probability of at least 95 %.

    Args:
        panels: levels ``(N,)`` by name of the line, by panel.
        wrong: what the legend says of the lines that are called wrong, by name of the line.
        verdict: the title.

    Returns:
        A matplotlib figure.

    Raises:
        PlotError: if matplotlib is not installed.
    """
    plt = require_matplotlib()
    num_rows = -(-len(panels) // MAX_COLUMNS)
    num_columns = -(-len(panels) // num_rows)
    size = (2.6 * num_columns + 0.6, 2.4 * num_rows + 0.5)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    points = np.linspace(0.0, 1.0, NUM_POINTS + 1)
    for axis, (panel, lines) in zip(axes.flat, panels.items(), strict=False):
        low, high = _band(len(next(iter(lines.values()))), points, 1 - (1 - PROBABILITY) / len(lines))
        axis.fill_between(points, low - points, high - points, color="C0", alpha=0.15, linewidth=0)
        axis.axhline(0.0, color="black", linewidth=0.8)
        num_named = 0
        for name, levels in lines.items():
            heights = _ecdf(levels, points)
            is_wrong = name in wrong
            num_named += is_wrong
            label = wrong[name] if is_wrong and num_named <= MAX_NAMED else None
            color = f"C{(num_named - 1) % 9 + 1}" if is_wrong else "0.35"
            axis.plot(
                points,
                heights - points,
                linewidth=1.6 if is_wrong else 0.9,
                color=color,
                label=label,
                zorder=2 + is_wrong,
            )
        axis.set_title(panel if len(lines) == 1 else f"{panel} ({len(lines)} components)", fontsize="medium")
        if num_named:
            more = f"and {num_named - MAX_NAMED} more" if num_named > MAX_NAMED else None
            axis.legend(frameon=False, fontsize="small", title=more, alignment="left")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes.flat[max(0, len(panels) - num_columns) : len(panels)]:
        axis.tick_params(labelbottom=True)
    label = "level of the true value among the draws"
    figure.supxlabel("\n".join([label, *textwrap.wrap(LEGEND, 44 * num_columns)]), fontsize="small", color="0.35")
    figure.supylabel("ECDF - uniform", fontsize="medium")
    figure.suptitle("\n".join(textwrap.wrap(verdict, 36 * num_columns)), fontsize="medium")
    return figure


def plot_coverage(levels: np.ndarray) -> Any:
    """Plot the share of data sets whose credible region of a level holds the true value.

    Args:
        levels: the smallest credibility level that does, ``(N,)``.

    Returns:
        A matplotlib figure.

    Raises:
        PlotError: if matplotlib is not installed.
    """
    plt = require_matplotlib()
    figure, axis = plt.subplots(figsize=(4.2, 4.2), layout="constrained")
    points = np.linspace(0.0, 1.0, NUM_POINTS + 1)
    low, high = _band(len(levels), points, PROBABILITY)
    label = f"{PROBABILITY:.0%} of exact fits stay inside"
    axis.fill_between(points, low, high, color="C0", alpha=0.15, linewidth=0, label=label)
    axis.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--", label="exact")
    axis.plot(points, _ecdf(levels, points), color="C1", label=f"{len(levels)} data sets")
    axis.set_xlabel("credibility level")
    axis.set_ylabel("share of regions that hold the true value")
    axis.set_aspect("equal")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.legend(frameon=False, loc="upper left")
    axis.grid(alpha=0.3)
    return figure


def _ecdf(levels: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(levels), points, side="right") / len(levels)


def _band(num: int, points: np.ndarray, probability: float) -> tuple[np.ndarray, np.ndarray]:
    """The simultaneous band at points from 0 to 1, at both ends of which every distribution is the same."""
    low, high = ecdf_band(num, points[1:-1], probability)
    return np.concatenate([[0.0], low, [1.0]]), np.concatenate([[0.0], high, [1.0]])

"""A picture of the marginals and pairs of some components."""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyroflows import plots
from pyroflows.errors import OptionError
from pyroflows.inference.arviz import plot_components
from pyroflows.inference.summary import Summary
from pyroflows.shapes import listed

MAX_PAIRS = 6  # components, since ArviZ 1.x refuses more than 40 panels
NUM_DRAWS = 2000
MAX_NAMED = 8  # sites that a title names
TITLE_WIDTH = 100

Component = tuple[str, tuple[int, ...]]


def plot_pairs(
    summary: Summary, var_names: Sequence[str] | None, coords: Mapping[str, Any] | None, **kwargs: Any
) -> Any:
    """Plot marginals and pairs of up to six components, by ArviZ; of a single one the marginal.

    Args:
        summary: the draws, with their labels.
        var_names: sites to show; None for those of a table.
        coords: labels to show by dimension; None for all.
        kwargs: further options of ArviZ's ``plot_pair``, or ``plot_dist`` for a single component.

    Raises:
        PlotError: if matplotlib is not installed.
        OptionError: if there is no such site, dimension or label, or if more than six components were chosen.
    """
    plots.require_matplotlib()
    names = summary.default_names if var_names is None else summary.checked(var_names)
    components = list(summary.components(names))
    shown = _chosen(summary, components, coords or {})
    title = None
    if len(shown) > MAX_PAIRS:
        if var_names is not None or coords:
            raise OptionError(
                f"a pair plot shows up to {MAX_PAIRS} components, but {names} have {len(shown)}: choose by var_names "
                "and coords"
            )
        # Scalar sites say most of a model: the others are in plates, or vectors.
        shown = sorted(shown, key=lambda component: len(component[1]) > 0)[:MAX_PAIRS]
        title = _left_out(components, shown)
    draws = {summary.labels.component(*component): summary.values(*component) for component in shown}
    return plot_components(draws, title, **kwargs)


def _left_out(components: list[Component], shown: list[Component]) -> str:
    """A title that says what a picture leaves out, and how to see it."""
    sites = Counter(name for name, index in components if (name, index) not in shown)
    names = [f"{name} ({num:,})" for name, num in sites.most_common(MAX_NAMED)]
    left_out = ", ".join(names) + (f" and {len(sites) - len(names)} more sites" if len(sites) > len(names) else "")
    text = f"{len(shown)} of {len(components):,} components, without {left_out}: choose by var_names, coords"
    return "\n".join(textwrap.wrap(text, TITLE_WIDTH))


def _chosen(summary: Summary, components: list[Component], coords: Mapping[str, Any]) -> list[Component]:
    """The components that have chosen labels along each dimension of which labels were chosen."""
    existing: dict[str, dict[Any, None]] = {}  # in the order of the dimensions
    for component in components:
        for dim, label in summary.labels.entries(*component):
            existing.setdefault(dim, {})[label] = None
    chosen = {dim: _as_list(labels) for dim, labels in coords.items()}
    for dim, labels in chosen.items():
        if dim not in existing:
            raise OptionError(f"there is no dimension '{dim}' to choose from, only {list(existing)}")
        if unknown := [label for label in labels if label not in existing[dim]]:
            raise OptionError(f"the dimension '{dim}' has no labels {unknown}, only {listed([*existing[dim]])}")
    return [c for c in components if all(label in chosen.get(d, [label]) for d, label in summary.labels.entries(*c))]


def _as_list(labels: Any) -> list[Any]:
    """Chosen labels as a list; a single one may be given as it is."""
    return [labels] if isinstance(labels, str) or not np.iterable(labels) else list(labels)

"""A table of means, standard deviations and quantiles."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyroflows.models.structure import ModelStructure

if TYPE_CHECKING:
    import pandas as pd

QUANTILES = (0.05, 0.5, 0.95)


def summary_table(
    draws: Mapping[str, Tensor],
    names: Sequence[str],
    kept: Mapping[str, Tensor] | None = None,
    angles: Collection[str] = (),
) -> "pd.DataFrame":
    """Tabulate mean, standard deviation and quantiles of every component.

    The mean of an angle is its mean direction, and its standard deviation and quantiles are those of the values that
    lie within half a turn of it.

    Args:
        draws: tensors ``(S, *site shape)`` by site.
        names: the sites to show.
        kept: the components to show, by site of which others are left out; booleans that broadcast with its shape.
        angles: the sites whose values are angles.

    Example:
        >>> summary_table({"x": torch.tensor([[1.0, 5.0], [3.0, 5.0]])}, ["x"])
              mean        sd   5%  50%  95%
        x[0]   2.0  1.414214  1.1  2.0  2.9
        x[1]   5.0  0.000000  5.0  5.0  5.0
    """
    import pandas as pd

    rows = {}
    for name in names:
        value = draws[name]
        is_shown = (kept or {}).get(name, torch.tensor(True)).expand(value.shape[1:])
        for index in map(tuple, is_shown.nonzero().tolist()):
            component = value[(slice(None), *index)].double().cpu().numpy()
            if name in angles:
                component = around_mean_direction(component)
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            rows[label] = [component.mean(), component.std(ddof=1), *np.quantile(component, QUANTILES)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "sd", *(f"{q:.0%}" for q in QUANTILES)])


def around_mean_direction(angles: np.ndarray) -> np.ndarray:
    """Add turns to angles, so that they lie within half a turn of their mean direction.

    Example:
        >>> around_mean_direction(np.array([3.0, -3.0])).round(2).tolist()
        [3.0, 3.28]
    """
    mean = np.arctan2(np.sin(angles).mean(), np.cos(angles).mean())
    return mean + np.remainder(angles - mean + np.pi, 2 * np.pi) - np.pi


def default_names(structure: ModelStructure) -> list[str]:
    """The sites that a table shows by default.

    Deterministic sites in plates without latents are left out, since they have a value for each observation, and so are
    sites with ``obs_mask``, whose missing values are a latent's.

    Args:
        structure: the structure of the model.
    """
    local = {plate for site in structure.latents for plate in site.plate_names} | {None}
    observed = {site.name for site in structure.observed}
    deterministic = [
        s.name
        for s in structure.deterministic
        if local.issuperset(s.plate_names) and f"{s.name}_observed" not in observed
    ]
    return [*(site.name for site in structure.latents), *deterministic]

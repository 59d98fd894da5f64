"""A table of means, standard deviations and quantiles."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

QUANTILES = (0.05, 0.5, 0.95)


def summary_table(
    draws: Mapping[str, Tensor], names: Sequence[str], kept: Mapping[str, Tensor] | None = None
) -> "pd.DataFrame":
    """Tabulate mean, standard deviation and quantiles of every component.

    Args:
        draws: tensors ``(S, *site shape)`` by site.
        names: the sites to show.
        kept: the components to show, by site of which others are left out; booleans that broadcast with its shape.

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
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            rows[label] = [component.mean(), component.std(ddof=1), *np.quantile(component, QUANTILES)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "sd", *(f"{q:.0%}" for q in QUANTILES)])

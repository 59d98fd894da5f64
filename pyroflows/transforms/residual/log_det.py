r"""The log-determinant of :math:`I + J` for the Jacobian J of a contraction: exact, truncated, or estimated.

All of them take the Jacobian at the values of a batch, and the number of axes of an event; they say by ``is_exact``
whether they give the log-determinant itself.
"""

from pyroflows.transforms.residual.exact import Exact
from pyroflows.transforms.residual.roulette import RussianRoulette
from pyroflows.transforms.residual.series import TruncatedSeries

LogDet = Exact | RussianRoulette | TruncatedSeries

__all__ = ["Exact", "LogDet", "RussianRoulette", "TruncatedSeries"]

"""Residual layers, with log-determinants that say how right they are."""

from pyroflows.transforms.residual.layer import Residual
from pyroflows.transforms.residual.log_det import Exact, RussianRoulette, TruncatedSeries

__all__ = ["Exact", "Residual", "RussianRoulette", "TruncatedSeries"]

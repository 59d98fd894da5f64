"""Simulation-based calibration: whether the posteriors of a fit are neither shifted, nor too narrow or too wide."""

from pyroflows.inference.calibration.result import Calibration
from pyroflows.inference.calibration.sbc import sbc

__all__ = ["Calibration", "sbc"]

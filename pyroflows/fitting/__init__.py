"""Fits of flows, one objective a file: to data, and to other flows."""

from pyroflows.fitting.density import DensityFit, fit_density
from pyroflows.fitting.distillation import Distillation, distill

__all__ = ["DensityFit", "Distillation", "distill", "fit_density"]

"""Fit flows to data, to other flows, and to log-densities."""

from pyroflows.fitting.density import DensityFit, fit_density
from pyroflows.fitting.distillation import Distillation, distill
from pyroflows.fitting.reverse_kl import ReverseKL

__all__ = ["DensityFit", "Distillation", "ReverseKL", "distill", "fit_density"]

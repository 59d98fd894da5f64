"""Fit flows to data, to other flows, and to log-densities."""

from pyroflows.fitting.bits import bits_per_dim
from pyroflows.fitting.comparison import DensityComparison, compare_densities
from pyroflows.fitting.density import DensityFit, fit_density
from pyroflows.fitting.distillation import Distillation, distill
from pyroflows.fitting.flow_matching import MatchingFit, fit_flow_matching
from pyroflows.fitting.reverse_kl import ReverseKL

__all__ = [
    "DensityComparison",
    "DensityFit",
    "Distillation",
    "MatchingFit",
    "ReverseKL",
    "bits_per_dim",
    "compare_densities",
    "distill",
    "fit_density",
    "fit_flow_matching",
]

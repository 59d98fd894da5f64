"""The interface to ArviZ: conversion to its data, Pareto-smoothed importance sampling, R-hat, ESS, intervals, pictures.

Nothing else uses ArviZ. Both generations are supported: 0.x with ``InferenceData``, and 1.x with xarray's ``DataTree``.
Everything here takes NumPy arrays, and neither torch nor the rest of pyroflows is needed, so that each generation can
be tested in an environment of its own. Hence imports in this package are relative.
"""

from .data import DATA_GROUPS, SAMPLE_DIMS, SAMPLED_GROUPS, allows_slashes, to_arviz_data
from .draws import ecdf_band, ess, hdi, plot_components, rhat
from .pareto import pareto_k_se, pareto_k_threshold, pareto_smoothed, pareto_smoothed_rows

__all__ = [
    "DATA_GROUPS",
    "SAMPLED_GROUPS",
    "SAMPLE_DIMS",
    "allows_slashes",
    "ecdf_band",
    "ess",
    "hdi",
    "pareto_k_se",
    "pareto_k_threshold",
    "pareto_smoothed",
    "pareto_smoothed_rows",
    "plot_components",
    "rhat",
    "to_arviz_data",
]

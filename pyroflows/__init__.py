"""Normalizing flows for Pyro: posteriors, densities and proposals."""

from pyroflows import errors, fitting, flows, guides, inference, nets, training, transforms
from pyroflows.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    FlowError,
    InexactError,
    InversionError,
    ModelError,
    OptionError,
    PlotError,
    ShapeError,
    UntraceableError,
)
from pyroflows.fitting import DensityComparison, DensityFit, Distillation, compare_densities, distill, fit_density
from pyroflows.flows import Flow
from pyroflows.inference import FlowVI, Posterior, importance_sample, load_posterior, to_arviz
from pyroflows.training import Objective, Trainer, train

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DataError",
    "DensityComparison",
    "DensityFit",
    "Distillation",
    "DivergedError",
    "Flow",
    "FlowError",
    "FlowVI",
    "InexactError",
    "InversionError",
    "ModelError",
    "Objective",
    "OptionError",
    "PlotError",
    "Posterior",
    "ShapeError",
    "Trainer",
    "UntraceableError",
    "compare_densities",
    "distill",
    "errors",
    "fit_density",
    "fitting",
    "flows",
    "guides",
    "importance_sample",
    "inference",
    "load_posterior",
    "nets",
    "to_arviz",
    "train",
    "training",
    "transforms",
]

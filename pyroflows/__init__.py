"""Normalizing flows for Pyro: posteriors, densities and proposals."""

from pyroflows import constraints, errors, fitting, flows, guides, inference, nets, training, transforms
from pyroflows.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    FlowError,
    InexactError,
    InversionError,
    ModelError,
    NotCalledError,
    OptionError,
    PlotError,
    ShapeError,
    StateError,
    UntraceableError,
)
from pyroflows.fitting import (
    DensityComparison,
    DensityFit,
    Distillation,
    bits_per_dim,
    compare_densities,
    distill,
    fit_density,
)
from pyroflows.flows import Flow, load_flow
from pyroflows.inference import FlowVI, Posterior, importance_sample, load_posterior, sample_conditional, to_arviz
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
    "NotCalledError",
    "Objective",
    "OptionError",
    "PlotError",
    "Posterior",
    "ShapeError",
    "StateError",
    "Trainer",
    "UntraceableError",
    "bits_per_dim",
    "compare_densities",
    "constraints",
    "distill",
    "errors",
    "fit_density",
    "fitting",
    "flows",
    "guides",
    "importance_sample",
    "inference",
    "load_flow",
    "load_posterior",
    "nets",
    "sample_conditional",
    "to_arviz",
    "train",
    "training",
    "transforms",
]

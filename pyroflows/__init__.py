"""Normalizing flows for Pyro: posteriors, densities and proposals."""

from pyroflows import errors, flows, guides, inference, transforms
from pyroflows.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    FlowError,
    InversionError,
    ModelError,
    OptionError,
    PlotError,
    ShapeError,
)
from pyroflows.flows import Flow
from pyroflows.inference import FlowVI, Posterior, load_posterior, to_arviz

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "DataError",
    "DivergedError",
    "Flow",
    "FlowError",
    "FlowVI",
    "InversionError",
    "ModelError",
    "OptionError",
    "PlotError",
    "Posterior",
    "ShapeError",
    "errors",
    "flows",
    "guides",
    "inference",
    "load_posterior",
    "to_arviz",
    "transforms",
]

"""Layers that learn location and scale, before training or during it."""

from pyroflows.transforms.normalization.act_norm import ActNorm
from pyroflows.transforms.normalization.batch_norm import BatchNorm
from pyroflows.transforms.normalization.standardize import ContextScale, Standardize

__all__ = ["ActNorm", "BatchNorm", "ContextScale", "Standardize"]

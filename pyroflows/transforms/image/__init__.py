"""Layers of images: events of shape (channels, height, width)."""

from pyroflows.transforms.image.conv1x1 import Conv1x1
from pyroflows.transforms.image.emerging import EmergingConv
from pyroflows.transforms.image.multiscale import Multiscale
from pyroflows.transforms.image.squeeze import Squeeze

__all__ = ["Conv1x1", "EmergingConv", "Multiscale", "Squeeze"]

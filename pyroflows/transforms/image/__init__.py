"""Layers of images: events of shape (channels, height, width)."""

from pyroflows.transforms.image.emerging import EmergingConv

__all__ = ["EmergingConv"]

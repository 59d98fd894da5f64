"""Layers of images: events of shape (channels, height, width)."""

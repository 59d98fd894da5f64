"""Fits of flows to data, one objective a file."""

from pyroflows.fitting.density import DensityFit, fit_density

__all__ = ["DensityFit", "fit_density"]

"""Amortised posteriors: one training on simulations of a model, and the posterior at any value of its data."""

from pyroflows.inference.amortized.amortized import Amortized
from pyroflows.inference.amortized.files import load_amortized
from pyroflows.inference.amortized.fit import fit_amortized

__all__ = ["Amortized", "fit_amortized", "load_amortized"]

"""Layers: bijections with parameters, from base to data."""

from pyroflows.transforms import univariate
from pyroflows.transforms.autoregressive import Autoregressive
from pyroflows.transforms.base import Cached, Compose, Conditioned, FlowTransform, Inverse
from pyroflows.transforms.elementwise import Elementwise
from pyroflows.transforms.linear import Permutation
from pyroflows.transforms.planar import Planar
from pyroflows.transforms.radial import Radial
from pyroflows.transforms.sylvester import Sylvester

__all__ = [
    "Autoregressive",
    "Cached",
    "Compose",
    "Conditioned",
    "Elementwise",
    "FlowTransform",
    "Inverse",
    "Permutation",
    "Planar",
    "Radial",
    "Sylvester",
    "univariate",
]

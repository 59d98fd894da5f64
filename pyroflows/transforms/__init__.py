"""Layers: bijections with parameters, from base to data."""

from pyroflows.transforms import masks, univariate
from pyroflows.transforms.autoregressive import Autoregressive
from pyroflows.transforms.base import Cached, Conditioned, FlowTransform, Inverse
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.coupling import Coupling
from pyroflows.transforms.elementwise import Elementwise
from pyroflows.transforms.linear import LU, Permutation, Triangular
from pyroflows.transforms.normalization import Standardize
from pyroflows.transforms.planar import Planar
from pyroflows.transforms.radial import Radial
from pyroflows.transforms.sylvester import Sylvester
from pyroflows.transforms.triangular import TriangularTransform

__all__ = [
    "LU",
    "Autoregressive",
    "Cached",
    "Compose",
    "Conditioned",
    "Coupling",
    "Elementwise",
    "FlowTransform",
    "Inverse",
    "Permutation",
    "Planar",
    "Radial",
    "Standardize",
    "Sylvester",
    "Triangular",
    "TriangularTransform",
    "masks",
    "univariate",
]

"""Layers: bijections from base to data with parameters that are trained."""

from pyroflows.transforms import univariate
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.linear import LU, Permutation, Triangular
from pyroflows.transforms.normalization import ActNorm, BatchNorm, Standardize
from pyroflows.transforms.planar import Planar
from pyroflows.transforms.radial import Radial
from pyroflows.transforms.sylvester import Sylvester
from pyroflows.transforms.triangular import Autoregressive, Coupling, Elementwise, TriangularTransform, masks
from pyroflows.transforms.views import Cached, Conditioned, Inverse

__all__ = [
    "LU",
    "ActNorm",
    "Autoregressive",
    "BatchNorm",
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

"""Layers: bijections from base to data with parameters that are trained."""

from pyroflows.transforms import univariate
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.linear import LU, QR, LowRank, Orthogonal, Permutation, Triangular
from pyroflows.transforms.normalization import Standardize
from pyroflows.transforms.planar import Planar
from pyroflows.transforms.radial import Radial
from pyroflows.transforms.sylvester import Sylvester
from pyroflows.transforms.triangular import (
    Autoregressive,
    Coupling,
    Diagonal,
    Elementwise,
    LeakyReLU,
    TriangularTransform,
    masks,
)
from pyroflows.transforms.views import Cached, Conditioned, Inverse

__all__ = [
    "LU",
    "QR",
    "Autoregressive",
    "Cached",
    "Compose",
    "Conditioned",
    "Coupling",
    "Diagonal",
    "Elementwise",
    "FlowTransform",
    "Inverse",
    "LeakyReLU",
    "LowRank",
    "Orthogonal",
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

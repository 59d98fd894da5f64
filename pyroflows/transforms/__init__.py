"""Layers: bijections from base to data with parameters that are trained."""

from pyroflows.transforms import univariate
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.continuous import Adaptive, Continuous, FixedSteps
from pyroflows.transforms.discrete import DiscreteAutoregressive, DiscreteCoupling, DiscreteTransform, OneHot
from pyroflows.transforms.image import Conv1x1, EmergingConv, Multiscale, Squeeze
from pyroflows.transforms.linear import LU, QR, LowRank, Orthogonal, Permutation, Triangular
from pyroflows.transforms.normalization import ActNorm, BatchNorm, Standardize
from pyroflows.transforms.planar import Planar
from pyroflows.transforms.radial import Radial
from pyroflows.transforms.residual import Residual
from pyroflows.transforms.sylvester import Sylvester
from pyroflows.transforms.triangular import (
    Autoregressive,
    BlockAutoregressive,
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
    "ActNorm",
    "Adaptive",
    "Autoregressive",
    "BatchNorm",
    "BlockAutoregressive",
    "Cached",
    "Compose",
    "Conditioned",
    "Continuous",
    "Conv1x1",
    "Coupling",
    "Diagonal",
    "DiscreteAutoregressive",
    "DiscreteCoupling",
    "DiscreteTransform",
    "Elementwise",
    "EmergingConv",
    "FixedSteps",
    "FlowTransform",
    "Inverse",
    "LeakyReLU",
    "LowRank",
    "Multiscale",
    "OneHot",
    "Orthogonal",
    "Permutation",
    "Planar",
    "Radial",
    "Residual",
    "Squeeze",
    "Standardize",
    "Sylvester",
    "Triangular",
    "TriangularTransform",
    "masks",
    "univariate",
]

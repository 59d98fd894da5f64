"""Flows: layers stacked on a base distribution, and the recipes of the literature, by class and by name."""

from pyroflows.flows.columns import Blocks, CircularUniform
from pyroflows.flows.continuous_recipes import CNF
from pyroflows.flows.dequantizer import Dequantizer
from pyroflows.flows.discrete.base import AutoregressiveCategorical, FactorizedCategorical
from pyroflows.flows.discrete.distribution import DiscreteFlowDistribution
from pyroflows.flows.discrete.groupwise import GroupwiseCategorical
from pyroflows.flows.discrete.recipes import DiscreteAutoregressive, DiscreteCoupling
from pyroflows.flows.distribution import FlowDistribution
from pyroflows.flows.files import load_flow
from pyroflows.flows.flow import Flow
from pyroflows.flows.image_recipes import Glow, MultiscaleRealNVP, MultiscaleResidual
from pyroflows.flows.law import Law
from pyroflows.flows.mixture import Mixture
from pyroflows.flows.named import Recipe
from pyroflows.flows.recipes import (
    BNAF,
    IAF,
    MAF,
    NAF,
    NICE,
    SOS,
    Gaussian,
    Planar,
    Radial,
    RealNVP,
    Residual,
    Sylvester,
)
from pyroflows.flows.spline_recipes import NSF, CircularNSF
from pyroflows.flows.subvector import SubvectorDistribution

__all__ = [
    "BNAF",
    "CNF",
    "IAF",
    "MAF",
    "NAF",
    "NICE",
    "NSF",
    "SOS",
    "AutoregressiveCategorical",
    "Blocks",
    "CircularNSF",
    "CircularUniform",
    "Dequantizer",
    "DiscreteAutoregressive",
    "DiscreteCoupling",
    "DiscreteFlowDistribution",
    "FactorizedCategorical",
    "Flow",
    "FlowDistribution",
    "Gaussian",
    "Glow",
    "GroupwiseCategorical",
    "Law",
    "Mixture",
    "MultiscaleRealNVP",
    "MultiscaleResidual",
    "Planar",
    "Radial",
    "RealNVP",
    "Recipe",
    "Residual",
    "SubvectorDistribution",
    "Sylvester",
    "load_flow",
]

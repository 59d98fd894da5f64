"""Flows: transforms stacked on a base distribution, and the recipes of the literature."""

from pyroflows.flows.autoregressive import IAF, MAF, NAF, SOS
from pyroflows.flows.coupling import NICE, RealNVP
from pyroflows.flows.distribution import FlowDistribution
from pyroflows.flows.flow import Flow
from pyroflows.flows.gaussian import Gaussian
from pyroflows.flows.mixture import Mixture
from pyroflows.flows.planar import Planar
from pyroflows.flows.radial import Radial
from pyroflows.flows.spline import NSF
from pyroflows.flows.sylvester import Sylvester

__all__ = [
    "IAF",
    "MAF",
    "NAF",
    "NICE",
    "NSF",
    "SOS",
    "Flow",
    "FlowDistribution",
    "Gaussian",
    "Mixture",
    "Planar",
    "Radial",
    "RealNVP",
    "Sylvester",
]

"""Flows: transforms stacked on a base distribution, and the recipes of the literature."""

from pyroflows.flows.autoregressive import IAF, MAF
from pyroflows.flows.base import Flow
from pyroflows.flows.distribution import FlowDistribution
from pyroflows.flows.planar import Planar
from pyroflows.flows.radial import Radial
from pyroflows.flows.sylvester import Sylvester

__all__ = ["IAF", "MAF", "Flow", "FlowDistribution", "Planar", "Radial", "Sylvester"]

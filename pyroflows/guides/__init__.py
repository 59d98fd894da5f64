"""Pyro autoguides whose distribution over the latents is a flow."""

from pyroflows.guides.packed import AutoFlow
from pyroflows.guides.recipes import (
    AutoCNF,
    AutoIAF,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoResidual,
    AutoSpline,
    AutoSylvester,
)
from pyroflows.guides.structured import AutoStructuredFlow

__all__ = [
    "AutoCNF",
    "AutoFlow",
    "AutoIAF",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoResidual",
    "AutoSpline",
    "AutoStructuredFlow",
    "AutoSylvester",
]

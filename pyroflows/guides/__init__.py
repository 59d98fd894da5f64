"""Pyro autoguides whose distribution over the latents is a flow."""

from pyroflows.guides.packed import AutoFlow
from pyroflows.guides.recipes import (
    AutoIAF,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoResidual,
    AutoSpline,
    AutoSylvester,
)

__all__ = [
    "AutoFlow",
    "AutoIAF",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoResidual",
    "AutoSpline",
    "AutoSylvester",
]

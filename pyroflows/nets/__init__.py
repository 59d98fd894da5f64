"""Conditioners: the networks that compute the parameters of a transform.

Every conditioner starts with a zero output layer, so that what it conditions starts at its neutral parameters.
"""

from pyroflows.nets.causal_conv import CausalConv
from pyroflows.nets.incremental import GradientSteps, Incremental, IncrementalGradient, ParameterSteps
from pyroflows.nets.made import MADE, MaskedLinear, ResMADE
from pyroflows.nets.mlp import MLP, Parameters, Pointwise, ResidualMLP

__all__ = [
    "MADE",
    "MLP",
    "CausalConv",
    "GradientSteps",
    "Incremental",
    "IncrementalGradient",
    "MaskedLinear",
    "ParameterSteps",
    "Parameters",
    "Pointwise",
    "ResMADE",
    "ResidualMLP",
]

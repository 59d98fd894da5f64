"""Conditioners: the networks that compute the parameters of a transform.

The output layer of every conditioner starts at zero, so that a layer starts at ``theta = 0``, where it is the identity.
"""

from pyroflows.nets.angles import AngleFeatures, OnAngles
from pyroflows.nets.causal_conv import CausalConv
from pyroflows.nets.conv import Conv, DilatedConv, ResidualConv
from pyroflows.nets.groupwise import GroupwiseConv
from pyroflows.nets.incremental import GradientSteps, Incremental, IncrementalGradient, ParameterSteps
from pyroflows.nets.made import MADE, MaskedLinear, ResMADE, ScaledMADE
from pyroflows.nets.mlp import MLP, Parameters, Pointwise, ResidualMLP, ScaledMLP

__all__ = [
    "MADE",
    "MLP",
    "AngleFeatures",
    "CausalConv",
    "Conv",
    "DilatedConv",
    "GradientSteps",
    "GroupwiseConv",
    "Incremental",
    "IncrementalGradient",
    "MaskedLinear",
    "OnAngles",
    "ParameterSteps",
    "Parameters",
    "Pointwise",
    "ResMADE",
    "ResidualConv",
    "ResidualMLP",
    "ScaledMADE",
    "ScaledMLP",
]

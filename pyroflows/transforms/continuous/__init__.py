"""Continuous flows: the layer, and how its differential equation is solved."""

from pyroflows.transforms.continuous.counting import Evaluations, Penalties
from pyroflows.transforms.continuous.layer import Continuous
from pyroflows.transforms.continuous.solvers import Adaptive, FixedSteps

__all__ = ["Adaptive", "Continuous", "Evaluations", "FixedSteps", "Penalties"]

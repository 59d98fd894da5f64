"""Networks that give the velocity of a continuous flow."""

from pyroflows.nets.velocity.conv import VelocityConv
from pyroflows.nets.velocity.dense import VelocityMLP
from pyroflows.nets.velocity.field import Field
from pyroflows.nets.velocity.free import FreeVelocity

__all__ = ["Field", "FreeVelocity", "VelocityConv", "VelocityMLP"]

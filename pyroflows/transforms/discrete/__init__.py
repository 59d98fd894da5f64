"""Discrete layers: bijections of sequences of categories."""

from pyroflows.transforms.discrete.autoregressive import DiscreteAutoregressive
from pyroflows.transforms.discrete.base import DiscreteTransform
from pyroflows.transforms.discrete.coupling import DiscreteCoupling
from pyroflows.transforms.discrete.one_hot import OneHot

__all__ = ["DiscreteAutoregressive", "DiscreteCoupling", "DiscreteTransform", "OneHot"]

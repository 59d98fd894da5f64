"""Linear layers: permutations, triangular factors and their products."""

from pyroflows.transforms.linear.lu import LU
from pyroflows.transforms.linear.permutation import Permutation
from pyroflows.transforms.linear.triangular import Triangular

__all__ = ["LU", "Permutation", "Triangular"]

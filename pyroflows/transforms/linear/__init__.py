"""Linear layers: permutations, rotations, and products of factors that are cheap to invert."""

from pyroflows.transforms.linear.low_rank import LowRank
from pyroflows.transforms.linear.lu import LU
from pyroflows.transforms.linear.orthogonal import Orthogonal
from pyroflows.transforms.linear.permutation import Permutation
from pyroflows.transforms.linear.qr import QR
from pyroflows.transforms.linear.triangular import Triangular

__all__ = ["LU", "QR", "LowRank", "Orthogonal", "Permutation", "Triangular"]

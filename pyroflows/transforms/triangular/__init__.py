"""Layers with a triangular Jacobian, made of a univariate map, a structure and, except elementwise, a conditioner."""

from pyroflows.transforms.triangular import masks
from pyroflows.transforms.triangular.autoregressive import Autoregressive
from pyroflows.transforms.triangular.base import TriangularTransform
from pyroflows.transforms.triangular.block_autoregressive import BlockAutoregressive
from pyroflows.transforms.triangular.coupling import Coupling
from pyroflows.transforms.triangular.elementwise import Elementwise

__all__ = ["Autoregressive", "BlockAutoregressive", "Coupling", "Elementwise", "TriangularTransform", "masks"]

"""Record functions of tensors once and run them without Python in between, as an optional executor."""

from pyroflows.compiling.check import MODES, Compiler, is_singular
from pyroflows.compiling.eager import is_transformed, runs_in_python

__all__ = ["MODES", "Compiler", "is_singular", "is_transformed", "runs_in_python"]

"""Functions of tensors recorded once and run without Python in between: an optional executor."""

from pyroflows.compiling.check import MODES, Compiler, is_singular
from pyroflows.compiling.eager import is_transformed, runs_in_python

__all__ = ["MODES", "Compiler", "is_singular", "is_transformed", "runs_in_python"]

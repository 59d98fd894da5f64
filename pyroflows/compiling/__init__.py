"""Record functions of tensors once and run them without Python in between, as an optional executor."""

from pyroflows.compiling.check import MODES, Compiler
from pyroflows.compiling.eager import is_transformed, runs_in_python
from pyroflows.compiling.singular import is_singular, nan_where_singular

__all__ = ["MODES", "Compiler", "is_singular", "is_transformed", "nan_where_singular", "runs_in_python"]

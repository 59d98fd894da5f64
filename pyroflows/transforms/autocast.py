"""Keep computations that need the precision of their parameters out of autocast."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


def without_autocast(method: Method) -> Method:
    """Let a method of a layer, whose first argument is a tensor, run in the dtype of the layer's parameters.

    Bounds, iterations to float precision and solves to a tolerance need it.
    """

    @wraps(method)
    def called(self: Any, value: Tensor, *arguments: Any, **options: Any) -> Any:
        device = value.device.type
        if not torch.is_autocast_enabled(device):
            return method(self, value, *arguments, **options)
        dtype = next(self.parameters()).dtype
        with torch.autocast(device, enabled=False):
            cast = [part.to(dtype) if isinstance(part, Tensor) else part for part in (value, *arguments)]
            return method(self, *cast, **options)

    found: Any = called
    return found

"""Notice when Python code reads the value of a tensor, so that what it does next may depend on it."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# These operations read values only if they are given a mask.
_SELECTIONS = {_aten.index.Tensor, _aten.masked_select.default}
_VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class ValueReads(TorchDispatchMode):
    """A context that notices an ``if`` on a tensor, a ``float()``, an ``.item()`` or a boolean mask.

    The validation of distributions reads values too, but does not count, since it either raises or changes nothing.
    Reads through numpy or ``.tolist()`` go unnoticed.

    Attributes:
        any: whether a value was read.

    Example:
        >>> with ValueReads() as reads:
        ...     x = torch.ones(2).exp()
        ...     reads.any
        ...     y = 1.0 if x.sum() > 0 else 2.0
        False
        >>> reads.any
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.any = False
        self._validation: Tensor | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True, the default, imports torch._dynamo, which takes a second.
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is _aten._is_all_true.default:
            self._validation = output
        elif function in _SELECTIONS:
            self.any |= any(_is_mask(index) for index in (args[1] if isinstance(args[1], list) else [args[1]]))
        elif not _VALUE_TAGS.isdisjoint(function.tags):
            self.any |= args[0] is not self._validation
        return output


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)

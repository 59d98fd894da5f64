"""Notice when Python code reads the value of a tensor, so that what it does next may depend on it."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyroflows.models.lines import line_of_frame

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
        factorisations: where matrices were factorised, by the lines of the user that led there.

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
        self.factorisations: set[str] = set()
        self._validation: Tensor | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True, the default, imports torch._dynamo, which takes a second.
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is _aten._linalg_check_errors.default:
            self.factorisations.add(line_of_frame(sys._getframe()))
        elif function is _aten._is_all_true.default:
            self._validation = output
        elif function in _SELECTIONS:
            self.any |= any(_is_mask(index) for index in (args[1] if isinstance(args[1], list) else [args[1]]))
        elif not _VALUE_TAGS.isdisjoint(function.tags):
            self.any |= args[0] is not self._validation
        return output


def caught_failure(function: Callable[[], Any], factorisations: Iterable[str]) -> str | None:
    """Find a factorisation whose failure a function catches, so that it goes on in another way; None if there is none.

    Args:
        function: a function, which is called once for each factorisation.
        factorisations: where there are factorisations, as :class:`ValueReads` has noted.

    Example:
        >>> def factor():
        ...     try:
        ...         return torch.linalg.cholesky(torch.eye(2))
        ...     except RuntimeError:
        ...         return torch.eye(2)
        >>> with ValueReads() as reads:
        ...     y = factor()
        >>> caught_failure(factor, reads.factorisations) in reads.factorisations
        True
    """
    for line in sorted(factorisations):
        failing = _Failing(line)
        try:
            with failing:
                function()
        except Exception as error:
            if failing.error is None or failing.error in (error, error.__cause__, error.__context__):
                continue
        if failing.error is not None:
            return line
    return None


class _Failing(TorchDispatchMode):
    """Inside of this mode the first factorisation at one of the user's lines fails."""

    def __init__(self, line: str) -> None:
        super().__init__()
        self.line = line
        self.error: RuntimeError | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as above

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_check = function is _aten._linalg_check_errors.default
        if is_check and self.error is None and line_of_frame(sys._getframe()) == self.line:
            # Without the word "linalg", since the package itself goes on after true errors of factorisations.
            self.error = torch.linalg.LinAlgError("a factorisation fails, to see what follows")  # type: ignore[attr-defined]
            raise self.error
        return function(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)

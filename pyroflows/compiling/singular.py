"""Let a factorisation that fails give NaN, as a recorded program does, so that the other rows of a batch go on."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")

_aten = torch.ops.aten


def is_singular(error: BaseException) -> bool:
    """Tell whether an error says that a factorisation or a solve failed; a program loses torch's class of the error."""
    return isinstance(error, RuntimeError) and "linalg" in str(error)


def nan_where_singular(function: Callable[..., T], *args: Any) -> T:
    """Call a function, and call it again without errors of factorisations if one of them fails.

    Where a matrix of a batch has no Cholesky factor, the factor is NaN in the second call; where it has no inverse, the
    inverse and solutions are not finite.

    Args:
        function: a function, which may be called twice.
        args: its arguments.

    Example:
        >>> matrices = torch.stack([4 * torch.eye(1), -torch.eye(1)])
        >>> nan_where_singular(torch.linalg.cholesky, matrices).flatten()
        tensor([2., nan])
    """
    try:
        return function(*args)
    except RuntimeError as error:
        if not is_singular(error):
            raise
    with _Unchecked():
        return function(*args)


def nan_where_failed(factor: Tensor, info: Tensor) -> Tensor:
    """Replace Cholesky factors ``(..., n, n)`` by NaN where LAPACK failed, since it leaves finite numbers there."""
    return factor.masked_fill((info != 0)[..., None, None], torch.nan)


class _Unchecked(TorchDispatchMode):
    """Inside of this mode no factorisation raises."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default, True, would import torch._dynamo, which takes a second.
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is _aten._linalg_check_errors.default:
            return None
        output = function(*args, **kwargs or {})
        if function is _aten.linalg_cholesky_ex.default:
            return nan_where_failed(*output), output[1]
        return output

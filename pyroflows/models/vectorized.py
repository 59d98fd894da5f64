"""Let Pyro's and torch's distributions run under ``torch.func.vmap``, which refuses some of their operations.

What vmap refuses falls into four groups, and each is met once:

- a ``torch.autograd.Function`` without ``setup_context``, such as Pyro's safe logarithm, see
  :mod:`pyroflows.models.old_functions`;
- a look at ``tensor.data``, as in Pyro's Cholesky factor with jitter, and the check of values in ``torch.mvlgamma``;
- a new tensor that is filled in place, such as ``tensor.new_empty(shape).exponential_()`` in a sampler;
- a branch on values, and an index by a mask. The few methods that have one are replaced by those of
  :mod:`pyroflows.models.vectorized_methods`.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyroflows.compiling.eager import is_under_func
from pyroflows.models.old_functions import apply_function
from pyroflows.models.over_draws import number_of_draw
from pyroflows.models.vectorized_methods import METHODS

_lock = threading.Lock()
# One entry for each run that is inside of the context, in any thread, and what the methods were before the first.
_runs: list[None] = []
_originals: list[tuple[Any, str, Any]] = []


@contextmanager
def vectorized(number: Tensor) -> Iterator[None]:
    """A context for a run under vmap, in which distributions run that vmap refuses otherwise.

    Outside of vmap, in this thread and in others, nothing changes, and after the last context nothing is left replaced.

    Args:
        number: the number of the draw, a scalar that differs along the dimension over which vmap runs.

    Example:
        >>> def log_prob(number, cutpoints):
        ...     with vectorized(number):
        ...         return dist.OrderedLogistic(torch.zeros(2), cutpoints).log_prob(torch.tensor([0, 2]))
        >>> cutpoints = torch.tensor([[-1.0, 1.0], [-2.0, 0.5], [0.0, 3.0]])
        >>> torch.func.vmap(log_prob)(torch.arange(3), cutpoints).shape
        torch.Size([3, 2])
    """
    token = number_of_draw.set(number)
    _replace_methods()
    try:
        with _Permitted():
            yield
    finally:
        _restore_methods()
        number_of_draw.reset(token)


def draw(fn: Any) -> Tensor:
    """Draw from a distribution, for each draw of a run in :func:`vectorized` by itself.

    Args:
        fn: a distribution with a ``sample`` method. Its ``rsample`` would fill tensors in place more often.
    """
    number = number_of_draw.get()
    with nullcontext() if number is None else _Filling(number):
        return fn.sample()


class _Permitted(TorchFunctionMode):
    """Inside of this mode, operations whose results vmap could compute are not refused."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == _DATA:
            return args[0].detach()
        if function in _LOG_MULTIGAMMAS:
            return _log_multigamma(*args, **kwargs or {})
        return function(*args, **kwargs or {})


class _Filling(TorchFunctionMode):
    """Inside of this mode, new tensors have the dimension over which vmap runs."""

    def __init__(self, number: Tensor) -> None:
        super().__init__()
        self._zero = torch.zeros_like(number)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **kwargs or {})
        return torch.where(self._zero == 0, made, made) if function in _FACTORIES else made


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_LOG_MULTIGAMMAS = {torch.mvlgamma, torch.special.multigammaln, Tensor.mvlgamma}
_FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like),
    *(Tensor.new, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
}


def _log_multigamma(a: Tensor, p: int) -> Tensor:
    r""":math:`\log\Gamma_p(a) = \frac{p(p-1)}{4}\log\pi + \sum_{j=0}^{p-1}\log\Gamma(a - j/2)`."""
    steps = torch.arange(p, dtype=a.dtype, device=a.device) / 2
    return p * (p - 1) / 4 * math.log(math.pi) + (a[..., None] - steps).lgamma().sum(-1)


def _replace_methods() -> None:
    with _lock:
        if not _runs:
            for owner, name, version in [*METHODS, (torch.autograd.Function, "apply", apply_function)]:
                original = vars(owner)[name]
                _originals.append((owner, name, original))
                setattr(owner, name, _under_vmap(version, original))
        _runs.append(None)


def _restore_methods() -> None:
    with _lock:
        _runs.pop()
        while _originals and not _runs:
            setattr(*_originals.pop())


def _under_vmap(version: Callable[..., Any], original: Any) -> Any:
    """A function that is one version under vmap, and the other elsewhere."""
    if isinstance(original, classmethod):
        return classmethod(_under_vmap(version, original.__func__))

    @functools.wraps(original)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (version if is_under_func() else original)(*args, **kwargs)

    return either

"""What a fit needs, whatever its caller does: gradients, no automatic casts, and no other thread in between."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any, tree_map

from pyroflows.errors import OptionError
from pyroflows.exclusive import exclusive

P = ParamSpec("P")
R = TypeVar("R")


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function do the same whatever goes on around it: ``no_grad``, ``inference_mode``, ``autocast``, threads.

    Tensors among its arguments that were made under ``inference_mode`` are cloned, since torch refuses gradients to
    them. One thread at a time is in such functions, see :func:`pyroflows.exclusive.exclusive`; another one waits.

    Args:
        function: a function that fits something, or that runs a model.

    Example:
        >>> @isolated
        ... def slope(x):
        ...     leaf = torch.ones((), requires_grad=True)
        ...     return torch.autograd.grad((leaf * x).sum(), leaf)[0]
        >>> with torch.inference_mode():
        ...     slope(torch.tensor([1.0, 2.0]))
        tensor(3.)
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with exclusive(), _plain_modes():
            if tree_any(_is_inference, (args, kwargs)):
                args, kwargs = tree_map(lambda leaf: leaf.clone() if _is_inference(leaf) else leaf, (args, kwargs))
            return function(*args, **kwargs)

    return run


@contextmanager
def _plain_modes() -> Iterator[None]:
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield


def _is_inference(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_inference()


def require_trainable(module: nn.Module) -> None:
    """Raise if a module was made under ``inference_mode``, so that torch cannot train it.

    Raises:
        OptionError: if so; names a parameter or buffer.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_inference():
            raise OptionError(
                f"this flow was made under torch.inference_mode (its '{name}' is an inference tensor), so that it "
                "cannot be trained: make it outside"
            )

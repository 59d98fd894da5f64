"""Whether Python runs now, so that the value of a tensor can be looked at, and written to."""

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


class Recording(TorchDispatchMode):
    """A mode that records operations: the values it sees are those of one run only."""


def is_transformed() -> bool:
    """Whether vmap, torch.compile or make_fx put something else in the place of tensors.

    Then Python cannot write into them row by row, and loops over dimensions make long programs.
    """
    # torch.compile comes first: it follows the other questions only as far as they are asked.
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or get_proxy_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def runs_in_python() -> bool:
    """Whether a tensor's value can be looked at here: not under vmap, torch.compile, make_fx, nor while a compiled
    function is recorded."""
    return not is_transformed() and not (
        torch._C._len_torch_dispatch_stack()
        and any(isinstance(mode, Recording) for mode in _get_current_dispatch_mode_stack())
    )

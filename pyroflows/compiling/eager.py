"""Tell whether code runs in plain Python, where it can read the values of tensors and write into them."""

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


class Recording(TorchDispatchMode):
    """A mode of this class records operations, so that the values that Python sees belong to one run only."""


def is_under_func() -> bool:
    """Tell whether vmap, grad or another transformation of ``torch.func`` runs, under which tensors may be batches."""
    # Under torch.compile the absence of an interpreter is not None, but an object that stands for None.
    functorch = torch._C._functorch
    return isinstance(functorch.peek_interpreter_stack(), functorch.CInterpreter)


def is_transformed() -> bool:
    """Tell whether vmap, torch.compile, torch.jit.trace or make_fx put something else in the place of tensors.

    Python then cannot write into tensors row by row, and loops over dimensions make long programs.
    """
    # torch.compile comes first: it traces the questions after it only if they are asked.
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or get_proxy_mode() is not None
        or is_under_func()
    )


def runs_in_python() -> bool:
    """Tell whether Python can read the value of a tensor here.

    It cannot under vmap, torch.compile, torch.jit.trace and make_fx, nor while the package records a function.
    """
    return not is_transformed() and not (
        torch._C._len_torch_dispatch_stack()
        and any(isinstance(mode, Recording) for mode in _get_current_dispatch_mode_stack())
    )

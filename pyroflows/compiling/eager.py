"""Whether Python runs now, so that the value of a tensor can be looked at."""

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def runs_in_python() -> bool:
    """Whether a tensor's value can be looked at here: not under vmap, torch.compile or make_fx."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and get_proxy_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )

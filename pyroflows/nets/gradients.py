"""What functions with a written-out gradient need where their backward pass is itself differentiated, or batched."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def recorded_gradients(
    function: Callable[..., Any], arguments: Sequence[Tensor | None], gradients: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients by the arguments of a function, through which gradients flow again if they are recorded.

    Args:
        function: maps the arguments to a tensor, or to a tuple of tensors, by operations that autograd records.
        arguments: tensors, and None for what is left out.
        gradients: the gradients by what the function returns.

    Returns:
        One for each argument; None for those that require none.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> (slope,) = recorded_gradients(lambda x: x**3, [x], [torch.tensor(1.0)])
        >>> torch.autograd.grad(slope, x)
        (tensor(18.),)
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One argument may be computed from another one; views part the ways that lead to each.
        views = [None if argument is None else argument.view_as(argument) for argument in arguments]
        outputs = function(*views)
    wanted = [view for view in views if view is not None and view.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=create_graph))
    return [next(found) if view is not None and view.requires_grad else None for view in views]


def is_batch(gradient: Tensor) -> bool:
    """Tell whether a gradient is a batch of them, by ``is_grads_batched=True``, which no mode of torch shows."""
    return torch._C._functorch.is_legacy_batchedtensor(gradient)

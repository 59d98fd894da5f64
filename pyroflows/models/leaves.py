"""Gradients with respect to all that a number was computed from: given values, parameters, tensors of closures."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyroflows.models.one_draw import CopiedReads


def gradients_of_leaves(value: Tensor) -> dict[Tensor, Tensor]:
    """The gradient of a number with respect to each tensor that needs one and that it was computed from.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradients_of_leaves(x.square().sum())[x]
        tensor([2., 4.])
    """
    nodes: list[Any] = [value.grad_fn] if value.grad_fn is not None else []
    seen, leaves = set(nodes), []
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        new = {previous for previous, _ in node.next_functions if previous is not None} - seen
        seen |= new
        nodes += new
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True) if leaves else ()
    return dict(zip(leaves, gradients, strict=True))


def gradients_of_leaves_with_writes(function: Callable[[], Tensor]) -> dict[Tensor, Tensor]:
    """The same for what a function gives, which may write into what it has read, see :class:`CopiedReads`."""
    try:
        return gradients_of_leaves(function())
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
    with CopiedReads():
        value = function()
    return gradients_of_leaves(value)


def are_close(found: dict[Tensor, Tensor], expected: dict[Tensor, Tensor]) -> bool:
    """Whether gradients agree up to rounding; where there is none it is zero."""
    return all(
        _is_close(found.get(leaf, torch.zeros_like(leaf)), expected.get(leaf, torch.zeros_like(leaf)))
        for leaf in found.keys() | expected.keys()
    )


def _is_close(found: Tensor, expected: Tensor) -> bool:
    # Entries can be differences of larger numbers.
    scale = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1.0) if expected.numel() else 1.0
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    return torch.allclose(found / scale, expected / scale, rtol=tolerance, atol=tolerance, equal_nan=True)

"""Gradients with respect to all that a number was computed from: given values, parameters, tensors of closures."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyroflows.models.one_draw import CopiedReads
from pyroflows.models.run import RunRecord, SiteValues
from pyroflows.models.ways import rows_of


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


@torch.enable_grad()
def run_with_gradients(
    batch: Callable[[SiteValues], RunRecord],
    single: Callable[[SiteValues], RunRecord],
    examples: SiteValues,
    num_examples: int,
) -> tuple[RunRecord, bool]:
    """Run a batch where gradients are computed, and compare these with those of single runs.

    Args:
        batch: runs the model for a batch of draws.
        single: runs the model for one draw.
        examples: values ``(num_examples, *site shape)`` by site.
        num_examples: the number of draws.

    Returns:
        The record of the batch, without gradients, and whether these were the same.
    """
    leaves = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in examples.items()}

    def singly() -> Tensor:
        return _total([single(tree_map(torch.clone, rows_of(leaves, i))) for i in range(num_examples)])

    record = batch({k: v.clone() for k, v in leaves.items()})
    found = gradients_of_leaves(_total([record]))
    with pyro.validation_enabled(False):
        expected = gradients_of_leaves_with_writes(singly)
    return RunRecord(*tree_map(torch.detach, (record.values, record.log_probs))), are_close(found, expected)


def _total(records: list[RunRecord]) -> Tensor:
    return torch.stack([log_prob.sum() for record in records for log_prob in record.log_probs.values()]).sum()


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

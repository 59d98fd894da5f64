"""A guard against tensors that would not fit into memory."""

from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class TooLarge(Exception):
    """An operation would make a tensor that is too large.

    Args:
        num_numbers: how many numbers the tensor would hold.
    """

    def __init__(self, num_numbers: int) -> None:
        super().__init__(f"a tensor of {num_numbers:,} numbers")
        self.num_numbers = num_numbers


class SizeGuard(TorchFunctionMode):
    """A context in which no operation makes a tensor of more than so many numbers.

    It foresees what broadcasting and ``torch.einsum`` make; the results of other operations are looked at afterwards.

    Args:
        max_numbers: the largest number of numbers.

    Raises:
        TooLarge: at the operation.

    Example:
        >>> with SizeGuard(1000):
        ...     torch.ones(100, 1) + torch.ones(100)
        Traceback (most recent call last):
        pyroflows.models.size_guard.TooLarge: a tensor of 10,000 numbers
    """

    def __init__(self, max_numbers: int) -> None:
        super().__init__()
        self._max_numbers = max_numbers

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        expected = _einsum_size(*args) if function is torch.einsum else _broadcast_size(args)
        self._require_small(expected)
        output = function(*args, **kwargs or {})
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor):
                self._require_small(tensor.numel())
        return output

    def _require_small(self, num_numbers: int) -> None:
        if num_numbers > self._max_numbers:
            raise TooLarge(num_numbers)


def _einsum_size(equation: str, *operands: Any) -> int:
    """The number of entries of what ``torch.einsum`` gives."""
    inputs, output = equation.split("->")
    shapes = [operand.shape for operand in (operands[0] if isinstance(operands[0], list | tuple) else operands)]
    sizes = dict(chain.from_iterable(map(zip, inputs.split(","), shapes)))
    return prod(sizes[symbol] for symbol in output)


def _broadcast_size(args: Any) -> int:
    """The number of entries of tensors that are broadcast; 0 where they are not."""
    nested = (arg if isinstance(arg, tuple | list) else (arg,) for arg in args)
    shapes = [arg.shape for arg in chain.from_iterable(nested) if isinstance(arg, Tensor)]
    if len(shapes) < 2 or len(set(shapes)) == 1:
        return 0
    try:
        return torch.broadcast_shapes(*shapes).numel()
    except RuntimeError:  # as the arguments of a matrix product
        return 0

"""Call a function that takes batches itself for all draws of a run under vmap at once.

Inside of the function nothing runs under vmap, so that it may branch on values, index by masks and loop until a sampler
has accepted every draw.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_map

# The number of the draw in a run under vmap, a scalar that differs along the dimension over which vmap runs.
number_of_draw: ContextVar[Tensor | None] = ContextVar("number_of_draw", default=None)


def over_draws(function: Callable[..., Any], *event_dims: int) -> Callable[..., Any]:
    """Give a function that under vmap is called once, with the dimension of the draws on the left of all others.

    Args:
        function: a function whose first arguments are tensors that broadcast with each other, in all dimensions but
            those of an event. Its other arguments are the same for all draws.
        event_dims: the number of dimensions of an event of each of these tensors. The last tensors may be left out.

    Example:
        >>> clipped = over_draws(lambda x, top: x.clamp(max=top) if (x > top).any() else x, 0)
        >>> torch.func.vmap(lambda x: clipped(x, 1.0))(torch.tensor([0.5, 2.0]))
        tensor([0.5000, 1.0000])
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        tensors, others = args[: len(event_dims)], args[len(event_dims) :]
        ranks = [tensor.dim() - event_dim for tensor, event_dim in zip(tensors, event_dims, strict=False)]
        aligned = [_with_ones(tensor, max(ranks) - rank) for tensor, rank in zip(tensors, ranks, strict=True)]

        def call(*of_all_draws: Tensor) -> Any:
            return function(*of_all_draws, *others, **kwargs)

        # With the number, each draw has a call of its own, also if all draws have the same arguments.
        number = number_of_draw.get()
        return _OverDraws.apply(call, aligned[0].new_zeros(()) if number is None else number, *aligned)

    return called


def _with_ones(tensor: Tensor, num_dims: int) -> Tensor:
    return tensor.reshape((1,) * num_dims + tensor.shape)


class _OverDraws(Function):
    @staticmethod
    def forward(call: Any, number: Tensor, *tensors: Tensor) -> Any:
        return call(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: vmap alone calls the function, and autograd follows what it does."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: Any, number: Tensor, *tensors: Tensor) -> Any:
        first = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        outputs = call(*first)
        return outputs, tree_map(lambda _: 0, outputs)


def each_draw(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a function of a batch of tensors that calls another one for each row of them, and stacks the results."""

    def called(*rows: Tensor) -> Tensor:
        return torch.stack([function(*row) for row in zip(*rows, strict=True)])

    return called

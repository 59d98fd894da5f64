"""Masked autoregressive networks: one pass gives the parameters of every dimension from the dimensions before it."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.nets.mlp import checked_widths, zero_initialized


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a fixed 0/1 mask of shape ``(out, in)``."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        # It follows from the constructor's arguments, so it does not belong in a state_dict.
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    @property
    def masked_weight(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.masked_weight, self.bias)


class MADE(nn.Module):
    r"""Masked autoregressive network (Germain et al. 2015, arXiv:1502.03509).

    One pass gives :math:`\theta_j = f_j(z_{<j}, c)` for all j, where :math:`z_{<j}` are the inputs before j in
    ``order``. Input j carries the degree of its place in the order, 0 to D - 1; a hidden unit of degree d sees inputs
    of degree below d, and the outputs for place j see hidden units of degree at most j. Hidden units are sorted by
    degree. The context reaches every hidden unit; units of degree 0 see nothing else.

    Args:
        order: a permutation of ``range(D)``; ``order[i]`` is the dimension that stands at place i.
        num_params: parameters per dimension.
        hidden_dims: widths of the hidden layers; they may be smaller than D.
        context_dim: size of the context, 0 for none.

    Shapes: ``(..., D)`` and a context ``(..., context_dim)`` give ``(..., D, num_params)``.

    Attributes:
        units: for each hidden layer, the number of units of each degree.
        known: for each hidden layer, the number of units of each degree or a lower one.

    Raises:
        OptionError: if there is no hidden layer, or a width is not positive.
    """

    index_of_place: Tensor

    def __init__(
        self, order: Sequence[int], num_params: int, hidden_dims: Sequence[int] = (64, 64), context_dim: int = 0
    ) -> None:
        super().__init__()
        dim = len(order)
        self.order = list(order)
        self.num_params = num_params
        # What follows from the constructor's arguments does not belong in a state_dict.
        self.register_buffer("index_of_place", torch.as_tensor(self.order), persistent=False)
        place = self.index_of_place.argsort()

        # Without a context a unit of degree 0 would be a constant: only D = 1 has nothing better.
        lowest = 0 if context_dim or dim == 1 else 1
        widths = self._widths(checked_widths(hidden_dims))
        degrees = [_spread(lowest, dim - 1, width) for width in widths]
        masks = [degrees[0][:, None] > place]
        masks += [b[:, None] >= a for a, b in pairwise(degrees)]
        last = (place[:, None] >= degrees[-1]).repeat(num_params, 1)
        self.units = [torch.bincount(d, minlength=dim).tolist() for d in degrees]
        self.known = [list(accumulate(units)) for units in self.units]

        self.input = MaskedLinear(masks[0])
        self.context = nn.Linear(context_dim, widths[0], bias=False) if context_dim else None
        self.hidden = nn.ModuleList(MaskedLinear(mask) for mask in masks[1:])
        self.output = zero_initialized(MaskedLinear(last))

    def _widths(self, hidden_dims: Sequence[int]) -> list[int]:
        return list(hidden_dims)

    def skip(self, k: int) -> int | None:
        """The hidden layer whose pre-activation is added to that of hidden layer k."""
        return None

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.parameters_from(self.pre_activations(z, context))

    def pre_activations(self, z: Tensor, context: Tensor | None) -> list[Tensor]:
        """The hidden layers before their activations."""
        first = self.input(z)
        hidden = [first if self.context is None else first + self.context(context)]
        for k, layer in enumerate(self.hidden, start=1):
            h = layer(F.silu(hidden[-1]))
            skip = self.skip(k)
            hidden.append(h if skip is None else h + hidden[skip])
        return hidden

    def parameters_from(self, pre_activations: list[Tensor]) -> Tensor:
        """``(..., D, num_params)`` from the hidden layers."""
        output = self.output(F.silu(pre_activations[-1]))
        # Parameter-major in memory, so that each parameter is one contiguous block over the dimensions.
        return output.unflatten(-1, (self.num_params, -1)).transpose(-1, -2)

    def weights_by_place(self) -> list[Tensor]:
        """The masked weights of all layers, inputs and outputs by place; the last is ``(D, num_params, width)``."""
        output = self.output.masked_weight.unflatten(0, (self.num_params, -1))
        return [
            self.input.masked_weight[:, self.index_of_place],
            *(layer.masked_weight for layer in self.hidden),
            output.transpose(0, 1)[self.index_of_place],
        ]


class ResMADE(MADE):
    r"""Residual masked autoregressive network (Durkan and Nash 2019, arXiv:1904.05626).

    As :class:`MADE`, with a block :math:`h_k = h_{k-1} + W_k'\, \sigma(W_k\, \sigma(h_{k-1}))` for every width in
    ``hidden_dims``: all :math:`h_k` have the first width, the inside of block k has the k-th.

    Args:
        order: a permutation of ``range(D)``; ``order[i]`` is the dimension that stands at place i.
        num_params: parameters per dimension.
        hidden_dims: one or more widths, a block of two masked layers for each.
        context_dim: size of the context, 0 for none.

    Shapes: ``(..., D)`` and a context ``(..., context_dim)`` give ``(..., D, num_params)``.

    Raises:
        OptionError: if there is no hidden layer, or a width is not positive.
    """

    def _widths(self, hidden_dims: Sequence[int]) -> list[int]:
        stream = hidden_dims[0]
        return [stream, *(width for inner in hidden_dims for width in (inner, stream))]

    def skip(self, k: int) -> int | None:
        """The hidden layer whose pre-activation is added to that of hidden layer k."""
        return k - 2 if k > 0 and k % 2 == 0 else None


def _spread(lowest: int, highest: int, width: int) -> Tensor:
    """``width`` integers from lowest to highest, evenly spread, ascending."""
    return torch.linspace(lowest, highest + 1 - 1e-6, width, dtype=torch.float64).floor().long()

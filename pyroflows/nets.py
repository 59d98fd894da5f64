"""Conditioners: the networks that compute the parameters of a transform.

Every conditioner starts with a zero output layer, so that what it conditions starts at its neutral parameters.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.errors import OptionError

L = TypeVar("L", bound=nn.Linear)


class MLP(nn.Sequential):
    """A multi-layer perceptron with SiLU activations and a zero output layer.

    Args:
        in_dim: size of the input's last dimension.
        out_dim: size of the output's last dimension.
        hidden_dims: widths of the hidden layers.

    Shapes: ``(..., in_dim)`` to ``(..., out_dim)``.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int] = (64, 64)) -> None:
        widths = [in_dim, *hidden_dims]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.SiLU()]
        super().__init__(*layers, _zero(nn.Linear(widths[-1], out_dim)))


class Parameters(nn.Module):
    """The parameters of one layer: held, or computed from a context.

    ``theta = value + net(context)``, where ``net`` exists only if ``context_dim > 0`` and starts at zero.

    Args:
        value: initial value, of any shape.
        context_dim: size of the context, 0 for none.
        hidden_dims: widths of the network that reads the context.

    Shapes: a context ``(..., context_dim)`` gives ``(..., *value.shape)``; no context gives ``value.shape``.
    """

    def __init__(self, value: Tensor, context_dim: int = 0, hidden_dims: Sequence[int] = (64,)) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())
        self.net = MLP(context_dim, value.numel(), hidden_dims) if context_dim else None

    def forward(self, context: Tensor | None = None) -> Tensor:
        if self.net is None:
            return self.value
        offset = self.net(context)
        return self.value + offset.reshape(offset.shape[:-1] + self.value.shape)


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a fixed 0/1 mask of shape ``(out, in)``."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        # The mask follows from the constructor's arguments, so it does not belong in a state_dict.
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


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

    Raises:
        OptionError: if there is no hidden layer, or a width is not positive.
    """

    def __init__(
        self, order: Sequence[int], num_params: int, hidden_dims: Sequence[int] = (64, 64), context_dim: int = 0
    ) -> None:
        super().__init__()
        if not hidden_dims or min(hidden_dims) < 1:
            raise OptionError(f"hidden_dims must be one or more positive widths, got {tuple(hidden_dims)}")
        dim = len(order)
        self.num_params = num_params
        place = torch.empty(dim, dtype=torch.long)
        place[torch.as_tensor(order)] = torch.arange(dim)

        # Without a context a unit of degree 0 would be a constant: only D = 1 has nothing better.
        lowest = 0 if context_dim or dim == 1 else 1
        degrees = [_spread(lowest, dim - 1, width) for width in hidden_dims]
        masks = [degrees[0][:, None] > place]
        masks += [b[:, None] >= a for a, b in pairwise(degrees)]
        last = (place[:, None] >= degrees[-1]).repeat(num_params, 1)

        self.input = MaskedLinear(masks[0])
        self.context = nn.Linear(context_dim, hidden_dims[0], bias=False) if context_dim else None
        self.hidden = nn.ModuleList(MaskedLinear(mask) for mask in masks[1:])
        self.output = _zero(MaskedLinear(last))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.input(z)
        if self.context is not None:
            h = h + self.context(context)
        h = F.silu(h)
        for layer in self.hidden:
            h = F.silu(layer(h))
        # Parameter-major in memory, so that each parameter is one contiguous block over the dimensions.
        return self.output(h).unflatten(-1, (self.num_params, z.shape[-1])).transpose(-1, -2)


def _zero(layer: L) -> L:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _spread(lowest: int, highest: int, width: int) -> Tensor:
    """``width`` integers from lowest to highest, evenly spread, ascending."""
    return torch.linspace(lowest, highest + 1 - 1e-6, width, dtype=torch.float64).floor().long()

"""Causal dilated convolutions: the parameters of every time of a sequence from the times before it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.nets.mlp import checked_widths, zero_initialized
from pyroflows.shapes import shape_of


class CausalConv(nn.Module):
    r"""Causal dilated convolutions with gates (WaveNet; van den Oord et al. 2016, arXiv:1609.03499).

    One pass gives :math:`\theta_t = f_t(z_{<t}, c)` for all times t. A causal convolution reads the inputs before t; a
    block for every width in ``hidden_dims`` follows,

    .. math:: g_k = \tanh(W_k * h_k + V_k c) \odot \sigma(W_k' * h_k + V_k' c), \qquad h_{k+1} = h_k + R_k g_k,

    where :math:`*` is a causal convolution of dilation 1, 2, 4, ..., and the output is a perceptron of
    :math:`\sum_k S_k g_k`, time by time. All :math:`h_k` have the first width, the inside of block k the k-th. The
    weights do not depend on the length: those of one length load into a network of another.

    Args:
        order: a permutation of ``range(length)``; ``order[i]`` is the time that stands at place i, and "before" refers
            to places.
        num_params: parameters per element of the sequence.
        hidden_dims: one or more widths, a block for each.
        context_dim: size of a context vector, which every gate sees, 0 for none; or ``(context_channels, length)``, a
            conditioning sequence, which the gates see each at its own time.
        channels: of the input; None for sequences ``(length,)`` without an axis of channels.
        kernel_size: taps of each causal convolution, 2 or more.
        dilation_cycle: the dilation of block k is ``2 ** (k % dilation_cycle)``.

    Shapes: ``(..., length)`` to ``(..., length, num_params)``, or ``(..., channels, length)`` to ``(..., channels,
    length, num_params)``; a context is ``(..., context_dim)`` or ``(..., context_channels, length)``.

    Attributes:
        dilations: of the blocks.
        receptive_field: how many inputs before t the parameters at t depend on.

    Raises:
        OptionError: if there is no hidden layer, or a size is too small.

    Example:
        >>> net = CausalConv(range(100), num_params=2, hidden_dims=[16] * 6)
        >>> net(torch.randn(5, 100)).shape, net.receptive_field
        (torch.Size([5, 100, 2]), 65)
    """

    index_of_place: Tensor
    place: Tensor

    def __init__(
        self,
        order: Sequence[int],
        num_params: int,
        hidden_dims: Sequence[int] = (32,) * 6,
        context_dim: int | Sequence[int] = 0,
        channels: int | None = None,
        kernel_size: int = 2,
        dilation_cycle: int = 8,
    ) -> None:
        super().__init__()
        if kernel_size < 2 or dilation_cycle < 1:
            raise OptionError(
                f"kernel_size must be at least 2 and dilation_cycle at least 1, got {kernel_size}, {dilation_cycle}"
            )
        stream, total = checked_widths(hidden_dims)[0], sum(hidden_dims)
        self.order = list(order)
        self.num_params = num_params
        self.channels = channels
        self.num_context_axes = len(shape_of(context_dim)) if context_dim else 0
        self.kernel_size = kernel_size
        self.dilations = [2 ** (k % dilation_cycle) for k in range(len(hidden_dims))]
        self.receptive_field = kernel_size + (kernel_size - 1) * sum(self.dilations)
        # What follows from the constructor's arguments does not belong in a state_dict.
        self.register_buffer("index_of_place", torch.as_tensor(self.order), persistent=False)
        self.register_buffer("place", self.index_of_place.argsort(), persistent=False)
        self._is_ascending = self.order == sorted(self.order)

        self.input = nn.Conv1d(channels or 1, stream, kernel_size)
        self.gates: Any = nn.ModuleList(
            nn.Conv1d(stream, 2 * width, kernel_size, dilation=dilation)
            for width, dilation in zip(hidden_dims, self.dilations, strict=True)
        )
        # After the last block the stream is not read. A bias of the stream would be one of the gates.
        self.residuals: Any = nn.ModuleList(nn.Conv1d(width, stream, 1, bias=False) for width in hidden_dims[:-1])
        # The sum of all S_k g_k, and all V_k c, in one product each.
        self.skip = nn.Conv1d(total, stream, 1)
        context_channels = shape_of(context_dim)[0] if context_dim else 0
        self.context = nn.Conv1d(context_channels, 2 * total, 1, bias=False) if context_channels else None
        self.head = nn.Conv1d(stream, stream, 1)
        self.output = zero_initialized(nn.Conv1d(stream, num_params * (channels or 1), 1))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        batch_shape = z.shape[: z.dim() - (1 if self.channels is None else 2)]
        h = self._by_place(z.reshape(-1, self.channels or 1, z.shape[-1]))
        # The convolution ends one step before the time that its output is for.
        h = self.input(F.pad(h, (self.kernel_size, 0))[..., :-1])
        terms = self.context_terms(batch_shape, context)
        outputs = []
        for k, (gate, from_context) in enumerate(zip(self.gates, terms, strict=True)):
            a = gate(F.pad(h, ((self.kernel_size - 1) * self.dilations[k], 0)))
            value, openness = (a if from_context is None else a + from_context).chunk(2, 1)
            outputs.append(torch.tanh(value) * torch.sigmoid(openness))
            if k < len(self.residuals):
                h = h + self.residuals[k](outputs[-1])
        h = self.head(F.silu(self.skip(torch.cat(outputs, 1))))
        theta = self.output(F.silu(h))
        if not self._is_ascending:
            theta = theta[..., self.place]
        # Parameter-major in memory, so that each parameter is one contiguous block over the sequence.
        return theta.unflatten(1, (self.num_params, -1)).movedim(1, -1).reshape(*z.shape, self.num_params)

    def context_terms(self, batch_shape: torch.Size, context: Tensor | None) -> list[Tensor | None]:
        """What each block's gates get from the context, ``(N, 2 * width, 1 or length)`` by place."""
        if self.context is None or context is None:
            return [None] * len(self.gates)
        sequence = self._by_place(context) if self.num_context_axes > 1 else context[..., None]
        terms = self.context(sequence.reshape(-1, *sequence.shape[-2:]))
        terms = terms.reshape(*sequence.shape[:-2], *terms.shape[1:])
        terms = terms.expand(*batch_shape, *terms.shape[-2:]).reshape(-1, *terms.shape[-2:])
        return list(terms.split([gate.out_channels for gate in self.gates], 1))

    def _by_place(self, sequence: Tensor) -> Tensor:
        return sequence if self._is_ascending else sequence[..., self.index_of_place]

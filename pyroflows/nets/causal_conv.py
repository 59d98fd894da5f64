"""Causal dilated convolutions, which compute the parameters at each time of a sequence from the times before it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.nets.constants import Constants
from pyroflows.nets.incremental import ParameterSteps
from pyroflows.nets.mlp import checked_widths, zero_initialized
from pyroflows.shapes import shape_of


class CausalConv(Constants):
    r"""Causal dilated convolutions with gates (WaveNet; van den Oord et al. 2016, arXiv:1609.03499).

    One pass gives :math:`\theta_t = f_t(z_{<t}, c)` for all times t. A causal convolution reads the inputs before t;
    then each width in ``hidden_dims`` adds a block,

    .. math:: g_k = \tanh(W_k * h_k + V_k c) \odot \sigma(W_k' * h_k + V_k' c), \qquad h_{k+1} = h_k + R_k g_k,

    where :math:`*` is a causal convolution of dilation 1, 2, 4, ..., and the output is a perceptron of
    :math:`\sum_k S_k g_k`, applied to each time alone. All :math:`h_k` have the first width; :math:`g_k` has the k-th.
    The weights do not depend on the length, so that those of one length load into a network of another.

    It offers :class:`pyroflows.nets.Incremental`.

    Args:
        order: a permutation of ``range(length)``; ``order[i]`` is the time at place i, and "before" refers to places.
        num_params: number of parameters of each element of the sequence.
        hidden_dims: one or more widths, a block for each.
        context_dim: size of a context vector that the gates see at all times, 0 for none; or ``(context_channels,
            length)``, the shape of a conditioning sequence that the gates see each at its own time.
        channels: number of channels of the input; None for sequences ``(length,)`` without an axis of channels.
        kernel_size: number of taps of each causal convolution, 2 or more.
        dilation_cycle: number of blocks after which dilations start anew at 1; that of block k, counted from 0, is
            ``2 ** (k % dilation_cycle)``.

    Shapes: it maps ``(..., length)`` to ``(..., length, num_params)``, or ``(..., channels, length)`` to ``(...,
    channels, length, num_params)``; a context is ``(..., context_dim)`` or ``(..., context_channels, length)``.

    Attributes:
        dilations: the dilations of the blocks, in times.
        receptive_field: the number of inputs before t on which the parameters at t depend, in times.

    Raises:
        OptionError: if there is no hidden layer, a size is too small, or a conditioning sequence has another length.

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
        self.hidden_dims = checked_widths(hidden_dims)
        stream, total = self.hidden_dims[0], sum(self.hidden_dims)
        self.order = list(order)
        context_shape = shape_of(context_dim) if context_dim else torch.Size()
        if len(context_shape) > 1 and context_shape[1:] != (len(order),):
            raise OptionError(
                f"a conditioning sequence of {len(order)} times has shape (channels, {len(order)}), got {context_dim}"
            )
        self.num_params = num_params
        self.channels = channels
        self.num_context_axes = len(context_shape)
        self.kernel_size = kernel_size
        self.dilations = [2 ** (k % dilation_cycle) for k in range(len(hidden_dims))]
        self.receptive_field = kernel_size + (kernel_size - 1) * sum(self.dilations)
        self.register_constants()
        self._is_ascending = self.order == sorted(self.order)

        self.input = nn.Conv1d(channels or 1, stream, kernel_size)
        self.gates: Any = nn.ModuleList(
            nn.Conv1d(stream, 2 * width, kernel_size, dilation=dilation)
            for width, dilation in zip(hidden_dims, self.dilations, strict=True)
        )
        # Nothing reads the stream after the last block. A bias of the stream would do what those of the gates do.
        self.residuals: Any = nn.ModuleList(nn.Conv1d(width, stream, 1, bias=False) for width in hidden_dims[:-1])
        # One product gives the sum of all S_k g_k, and one gives all V_k c.
        self.skip = nn.Conv1d(total, stream, 1)
        self.context = nn.Conv1d(context_shape[0], 2 * total, 1, bias=False) if context_shape else None
        self.head = nn.Conv1d(stream, stream, 1)
        self.output = zero_initialized(nn.Conv1d(stream, num_params * (channels or 1), 1))

    def constants(self) -> dict[str, Tensor | None]:
        index_of_place = torch.as_tensor(self.order)
        return {"index_of_place": index_of_place, "place": index_of_place.argsort()}

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        batch_shape = z.shape[: z.dim() - (1 if self.channels is None else 2)]
        h = self._by_place(z.reshape(-1, self.channels or 1, z.shape[-1]))
        # The last tap reads the time before the one that the output belongs to.
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
        # Memory stays parameter-major, so that each parameter is one contiguous block over the sequence.
        return theta.unflatten(1, (self.num_params, -1)).movedim(1, -1).reshape(*z.shape, self.num_params)

    def context_terms(self, batch_shape: torch.Size, context: Tensor | None) -> list[Tensor | None]:
        """Return the terms of the context in each block's gates, ``(N, 2 * width, 1 or length)`` by place."""
        if self.context is None or context is None:
            return [None] * len(self.gates)
        sequence = self._by_place(context) if self.num_context_axes > 1 else context[..., None]
        terms = self.context(sequence.reshape(-1, *sequence.shape[-2:]))
        terms = terms.reshape(*sequence.shape[:-2], *terms.shape[1:])
        terms = terms.expand(*batch_shape, *terms.shape[-2:]).reshape(-1, *terms.shape[-2:])
        return list(terms.split([gate.out_channels for gate in self.gates], 1))

    def incremental(self, num_rows: int, context: Tensor | None = None) -> ParameterSteps:
        """Return the steps that compute the parameters of one time after the other.

        See :class:`pyroflows.nets.Incremental`.

        Example:
            >>> net = CausalConv(range(3), 2, [8, 8])
            >>> steps = net.incremental(num_rows=5)
            >>> z = torch.randn(5, 3)
            >>> with torch.no_grad():
            ...     for i in range(3):
            ...         theta = steps.parameters_at(i)
            ...         steps.inputs[i] = z[:, i]
            >>> torch.allclose(theta.T, net(z)[:, 2], atol=1e-6)
            True
        """
        return _ParameterSteps(self, num_rows, context)

    def _by_place(self, sequence: Tensor) -> Tensor:
        return sequence if self._is_ascending else sequence[..., self.index_of_place]


class _ParameterSteps:
    """The steps of a :class:`CausalConv`, each of which computes every block at one time only.

    So a step is a few products of small matrices, not a pass over the sequence. Each convolution keeps the part of its
    input's past that it still needs. It applies its taps in the past for as many steps at once as its dilation allows,
    so that each step applies only the tap at the present. Tensors are ``(width, N)``.
    """

    def __init__(self, net: CausalConv, num_rows: int, context: Tensor | None = None) -> None:
        weight, taps = net.input.weight, net.kernel_size
        length, channels = len(net.order), net.channels or 1
        sources = weight.new_zeros(taps + length, channels, num_rows)
        self.inputs = sources[taps:] if net.channels else sources[taps:, 0]
        # The inputs that a time's taps read are one block of memory.
        size = (length, taps * channels, num_rows)
        self._windows = sources.as_strided(size, (channels * num_rows, num_rows, 1)).unbind()
        self._input = weight.transpose(1, 2).flatten(1)
        self._input_bias = _bias(net.input).expand(-1, num_rows).contiguous()

        terms = net.context_terms(torch.Size([1 if context is None else len(context)]), context)
        self._blocks = [_Block(net, k, from_context, num_rows) for k, from_context in enumerate(terms)]
        self._residuals = [-layer.weight[..., 0] for layer in net.residuals]
        # The outputs of all blocks are stacked below a row of ones, whose weights are the biases.
        widths = [block.width for block in self._blocks]
        self._sources = [weight.new_ones(1 + width, num_rows) for width in (sum(widths), len(weight), len(weight))]
        self._block_outputs = self._sources[0][1:].split(widths)
        self._perceptron = [
            torch.cat([_bias(layer), layer.weight[..., 0] * sign], 1)
            for layer, sign in ((net.skip, -1), (net.head, 1), (net.output, 1))
        ]
        self._hidden = [source[1:] for source in self._sources[1:]]
        self._num_params = net.num_params
        self._is_vector = net.channels is None

    def parameters_at(self, i: int) -> Tensor:
        """Return the parameters ``(num_params, N)`` or ``(num_params, channels, N)`` of the time at place i."""
        blocks, outputs = self._blocks, self._block_outputs
        h = torch.addmm(self._input_bias, self._input, self._windows[i], out=blocks[0].slot(i))
        for k, block in enumerate(blocks):
            block.step(i, h, outputs[k])
            if k < len(self._residuals):
                h = torch.addmm(h, self._residuals[k], outputs[k], out=blocks[k + 1].slot(i))
        for weight, source, hidden in zip(self._perceptron, self._sources, self._hidden, strict=False):
            F.silu(torch.mm(weight, source, out=hidden), inplace=True)
        theta = torch.mm(self._perceptron[-1], self._sources[-1])
        return theta if self._is_vector else theta.unflatten(0, (self._num_params, -1))


class _Block:
    r"""One gated convolution, evaluated time by time.

    Since :math:`\tanh(a) = 2\, \sigma(2a) - 1`, one call of the sigmoid, which is several times as fast as tanh, gives
    both factors of the gate. The output has the opposite sign, which the weights that read it make up for.
    """

    def __init__(self, net: CausalConv, k: int, from_context: Tensor | None, num_rows: int) -> None:
        gate = net.gates[k]
        self.width, stream = gate.out_channels // 2, gate.in_channels
        factors = gate.bias.new_ones(2 * self.width, 1)
        factors[: self.width] = 2.0
        # The oldest tap comes first. The weights are contiguous, since a product would copy them each time otherwise.
        self._past: list[Tensor]
        *self._past, self._present = (gate.weight * factors[..., None]).movedim(-1, 0).contiguous().unbind()
        # (2 width, 1 or length, 1 or N)
        self._terms = (_bias(gate) * factors)[..., None]
        if from_context is not None:
            self._terms = self._terms + (from_context * factors).permute(1, 2, 0)
        # A dilation longer than the sequence reaches nothing.
        self.period = min(net.dilations[k], len(net.order))
        # This ring holds the stream of the present period and of those that the taps reach.
        self._stream = gate.bias.new_zeros(net.kernel_size, stream, self.period * num_rows).unbind()
        self._slots = [period.unflatten(1, (self.period, num_rows)).unbind(1) for period in self._stream]
        self._before_gate = gate.bias.new_empty(2 * self.width, self.period, num_rows)
        self._now = [(a, *a.split(self.width)) for a in self._before_gate.unbind(1)]

    def slot(self, i: int) -> Tensor:
        """Return the memory that holds the stream at time i."""
        period, step = divmod(i, self.period)
        return self._slots[period % len(self._slots)][step]

    def step(self, i: int, h: Tensor, out: Tensor) -> None:
        """Write minus the block's output at time i to ``out``, where the stream is h."""
        period, step = divmod(i, self.period)
        if step == 0:
            self._start(period)
        a, value, openness = self._now[step]
        a.addmm_(self._present, h).sigmoid_()
        torch.addcmul(openness, value, openness, value=-2, out=out)

    def _start(self, period: int) -> None:
        """Compute the terms of the context and of the taps in the past, for the gates of a whole period."""
        first = period * self.period
        terms = self._terms if self._terms.shape[1] == 1 else self._terms[:, first : first + self.period]
        a = self._before_gate
        # The last period may be shorter.
        (a if terms.shape[1] == 1 else a[:, : terms.shape[1]]).copy_(terms)
        if period > 0:
            for ago, weight in enumerate(reversed(self._past), start=1):
                a.flatten(1).addmm_(weight, self._stream[(period - ago) % len(self._stream)])


def _bias(layer: Any) -> Tensor:
    return layer.bias[:, None]

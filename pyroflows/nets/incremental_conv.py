r"""A causal convolutional network computed time by time, with its past activations kept.

Where the inputs become known one after the other, as in the inversion of an autoregressive layer, a step computes each
block at one time only: a few products of small matrices instead of a pass over the sequence. Each convolution keeps the
part of its input's past that it still needs, and applies its taps in the past for as many steps at once as its dilation
allows, so that only the tap at the present is left to each step.

Tensors are laid out as (width, N), so that what one step reads and writes are contiguous blocks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.nets.causal_conv import CausalConv


class IncrementalConv:
    """The parameters of one time after the other, while the inputs become known.

    For i = 0, 1, ..., length - 1, ask for ``parameters_at(i)``, then fill ``inputs[i]``. Not for use with gradients.

    Args:
        net: the network.
        num_rows: N.
        context: ``(N, *context_shape)`` or ``(1, *context_shape)``, if the network takes one.

    Attributes:
        inputs: ``(length, N)`` or ``(length, channels, N)``, by place.

    Example:
        >>> net = CausalConv(range(3), 2, [8, 8])
        >>> steps = IncrementalConv(net, num_rows=5)
        >>> z = torch.randn(5, 3)
        >>> with torch.no_grad():
        ...     for i in range(3):
        ...         theta = steps.parameters_at(i)
        ...         steps.inputs[i] = z[:, i]
        >>> torch.allclose(theta.T, net(z)[:, 2], atol=1e-6)
        True
    """

    def __init__(self, net: CausalConv, num_rows: int, context: Tensor | None = None) -> None:
        weight, taps = net.input.weight, net.kernel_size
        length, channels = len(net.order), net.channels or 1
        sources = weight.new_zeros(taps + length, channels, num_rows)
        self.inputs = sources[taps:] if net.channels else sources[taps:, 0]
        # What stands before a time is one block of memory.
        size = (length, taps * channels, num_rows)
        self._windows = sources.as_strided(size, (channels * num_rows, num_rows, 1)).unbind()
        self._input = weight.transpose(1, 2).flatten(1)
        self._input_bias = _bias(net.input).expand(-1, num_rows).contiguous()

        terms = net.context_terms(torch.Size([1 if context is None else len(context)]), context)
        self._blocks = [_Block(net, k, from_context, num_rows) for k, from_context in enumerate(terms)]
        self._residuals = [-layer.weight[..., 0] for layer in net.residuals]
        # The outputs of all blocks stand below each other, and below ones, whose weights are the biases.
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
        """``(num_params, N)`` or ``(num_params, channels, N)``, for the time at place i."""
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
    r"""One gated convolution.

    Since :math:`\tanh(a) = 2\, \sigma(2a) - 1`, one call of the sigmoid, which is several times as fast as tanh, makes
    both factors of the gate; the block's output is kept with the sign changed.
    """

    def __init__(self, net: CausalConv, k: int, from_context: Tensor | None, num_rows: int) -> None:
        gate = net.gates[k]
        self.width, stream = gate.out_channels // 2, gate.in_channels
        factors = gate.bias.new_ones(2 * self.width, 1)
        factors[: self.width] = 2.0
        # Oldest tap first. Products with weights that are not contiguous copy them each time.
        self._past: list[Tensor]
        *self._past, self._present = (gate.weight * factors[..., None]).movedim(-1, 0).contiguous().unbind()
        # (2 width, 1 or length, 1 or N)
        self._terms = (_bias(gate) * factors)[..., None]
        if from_context is not None:
            self._terms = self._terms + (from_context * factors).permute(1, 2, 0)
        # A longer dilation than the sequence reaches nothing.
        self.period = min(net.dilations[k], len(net.order))
        # The stream of the present period and of those that the taps reach, a ring.
        self._stream = gate.bias.new_zeros(net.kernel_size, stream, self.period * num_rows).unbind()
        self._slots = [period.unflatten(1, (self.period, num_rows)).unbind(1) for period in self._stream]
        self._before_gate = gate.bias.new_empty(2 * self.width, self.period, num_rows)
        self._now = [(a, *a.split(self.width)) for a in self._before_gate.unbind(1)]

    def slot(self, i: int) -> Tensor:
        """Where the stream at time i belongs."""
        period, step = divmod(i, self.period)
        return self._slots[period % len(self._slots)][step]

    def step(self, i: int, h: Tensor, out: Tensor) -> None:
        """Minus the gate's output at time i, where the stream is h."""
        period, step = divmod(i, self.period)
        if step == 0:
            self._start(period)
        a, value, openness = self._now[step]
        a.addmm_(self._present, h).sigmoid_()
        torch.addcmul(openness, value, openness, value=-2, out=out)

    def _start(self, period: int) -> None:
        """What the gates of a whole period get from the context and from the taps in the past."""
        first = period * self.period
        terms = self._terms if self._terms.shape[1] == 1 else self._terms[:, first : first + self.period]
        a = self._before_gate
        # Of the last period there may be less.
        (a if terms.shape[1] == 1 else a[:, : terms.shape[1]]).copy_(terms)
        if period > 0:
            for ago, weight in enumerate(reversed(self._past), start=1):
                a.flatten(1).addmm_(weight, self._stream[(period - ago) % len(self._stream)])


def _bias(layer: Any) -> Tensor:
    return layer.bias[:, None]

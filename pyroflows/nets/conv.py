"""Convolutional conditioners, whose parameters at each place depend on the places around it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.nets.convolutions import convolutions
from pyroflows.nets.mlp import checked_widths, zero_initialized

# Dilations double with each block, and start anew after so many.
MAX_DILATIONS = 8


class Conv(nn.Module):
    """Convolutions with rectified linear units, as in Glow (Kingma and Dhariwal 2018, arXiv:1807.03039), whose output
    layer starts at zero.

    The hidden layers start as those of He et al. (2015, arXiv:1502.01852), with features of order one. The first and
    the last convolution have three taps along each axis, and those between the hidden layers have one, so that the
    parameters at a place depend on the places at a distance of up to two. Places beyond the border are zero.

    Args:
        in_dim: number of channels of the input.
        out_dim: number of channels of the output.
        hidden_dims: channels of the hidden layers; if there is none, the network is one convolution.
        num_axes: the number of axes after the channels, from 1 to 3; 2 for an image ``(C, H, W)``.

    Shapes: it maps ``(N, in_dim, *rest)`` to ``(N, out_dim, *rest)``, where ``rest`` has ``num_axes`` axes.

    Raises:
        OptionError: if a width is not positive, or there is another number of axes.

    Example:
        >>> Conv(3, 8, hidden_dims=(16, 16))(torch.randn(5, 3, 4, 6)).shape
        torch.Size([5, 8, 4, 6])
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int] = (64, 64), num_axes: int = 2) -> None:
        super().__init__()
        self.hidden_dims = checked_widths(hidden_dims, least=0)
        convolution = _convolution(num_axes)
        *widths, last = [in_dim, *self.hidden_dims]
        layers = [
            _he_initialized(convolution(a, b, 1) if i else convolution(a, b, 3, padding=1))
            for i, (a, b) in enumerate(pairwise([*widths, last]))
        ]
        self.layers: Any = nn.ModuleList([*layers, zero_initialized(convolution(last, out_dim, 3, padding=1))])

    def forward(self, x: Tensor) -> Tensor:
        return convolutions(x, [layer.weight for layer in self.layers], [layer.bias for layer in self.layers])


class ResidualConv(nn.Module):
    r"""A residual network of convolutions whose output layer starts at zero (He et al. 2016, arXiv:1603.05027), as in
    RealNVP (Dinh et al. 2017, arXiv:1605.08803).

    Starting from :math:`h_0 = W * x + b`, each width in ``hidden_dims`` adds a block,

    .. math:: h_k = h_{k-1} + W_k' * \sigma(W_k * \sigma(h_{k-1}) + b_k) + b_k',

    where :math:`*` is a convolution with three taps along each axis and :math:`\sigma` is ReLU; the output is linear in
    :math:`\sigma(h)` at each place. All :math:`h_k` have the first width; the hidden layer inside block k has the k-th.
    So each block lets the parameters at a place depend on places that are farther away by two. Places beyond the border
    are zero. The hidden layers start as those of :class:`Conv`.

    Args:
        in_dim: number of channels of the input.
        out_dim: number of channels of the output.
        hidden_dims: one or more widths, a block of two convolutions for each.
        num_axes: the number of axes after the channels, from 1 to 3; 2 for an image ``(C, H, W)``.

    Shapes: it maps ``(N, in_dim, *rest)`` to ``(N, out_dim, *rest)``, where ``rest`` has ``num_axes`` axes.

    Raises:
        OptionError: if there is no hidden layer, a width is not positive, or there is another number of axes.

    Example:
        >>> ResidualConv(3, 8, hidden_dims=(16, 16))(torch.randn(5, 3, 4, 6)).shape
        torch.Size([5, 8, 4, 6])
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int] = (32, 32), num_axes: int = 2) -> None:
        super().__init__()
        self.hidden_dims = checked_widths(hidden_dims)
        convolution = _convolution(num_axes)
        width = self.hidden_dims[0]
        self.input = _he_initialized(convolution(in_dim, width, 3, padding=1))
        self.inner = nn.ModuleList(_he_initialized(convolution(width, h, 3, padding=1)) for h in self.hidden_dims)
        self.outer = nn.ModuleList(_he_initialized(convolution(h, width, 3, padding=1)) for h in self.hidden_dims)
        self.output = zero_initialized(convolution(width, out_dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.input(_channels_last(x))
        for inner, outer in zip(self.inner, self.outer, strict=True):
            h = h + outer(F.relu_(inner(F.relu(h))))
        return self.output(F.relu(h))


class DilatedConv(nn.Module):
    r"""Dilated convolutions with gates (WaveNet; van den Oord et al. 2016, arXiv:1609.03499) that look both ways, whose
    output layer starts at zero.

    Starting from :math:`h_0 = W * x + b`, each width in ``hidden_dims`` adds a block,

    .. math:: h_{k+1} = h_k + R_k \left(\tanh(W_k * h_k + b_k) \odot \sigma(W_k' * h_k + b_k')\right),

    where :math:`*` is a convolution with three taps along each axis, at distances 1, 2, 4, ..., 128, and then from 1
    again; the output is a perceptron of h at each place. All :math:`h_k` have the first width; the gates of block k
    have the k-th. So n blocks, up to eight, let the parameters at a place depend on places at a distance of up to
    ``2 ** n``, where those of :class:`Conv` see two. Places beyond the border are zero.

    Args:
        in_dim: number of channels of the input.
        out_dim: number of channels of the output.
        hidden_dims: one or more widths, a block for each.
        num_axes: the number of axes after the channels, from 1 to 3; 1 for a sequence ``(C, length)``.

    Shapes: it maps ``(N, in_dim, *rest)`` to ``(N, out_dim, *rest)``, where ``rest`` has ``num_axes`` axes.

    Raises:
        OptionError: if there is no hidden layer, a width is not positive, or there is another number of axes.

    Example:
        >>> DilatedConv(3, 8, hidden_dims=(16,) * 4, num_axes=1)(torch.randn(5, 3, 100)).shape
        torch.Size([5, 8, 100])
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int] = (64,) * 4, num_axes: int = 2) -> None:
        super().__init__()
        self.hidden_dims = checked_widths(hidden_dims)
        convolution = _convolution(num_axes)
        width = self.hidden_dims[0]
        distances = [2 ** (k % MAX_DILATIONS) for k in range(len(self.hidden_dims))]
        self.input = convolution(in_dim, width, 3, padding=1)
        self.gates = nn.ModuleList(
            convolution(width, 2 * h, 3, padding=distance, dilation=distance)
            for h, distance in zip(self.hidden_dims, distances, strict=True)
        )
        self.residuals = nn.ModuleList(convolution(h, width, 1) for h in self.hidden_dims)
        self.head = convolution(width, width, 1)
        self.output = zero_initialized(convolution(width, out_dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.input(x)
        for gate, residual in zip(self.gates, self.residuals, strict=True):
            value, openness = gate(h).chunk(2, 1)
            h = h + residual(value.tanh() * openness.sigmoid())
        return self.output(F.silu(self.head(F.silu(h))))


def _convolution(num_axes: int) -> Any:
    """Return torch's class of convolutions along that many axes."""
    classes = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    if num_axes not in classes:
        raise OptionError(f"a convolutional conditioner needs one to three axes after the channels, got {num_axes}")
    return classes[num_axes]


def _he_initialized(layer: Any) -> Any:
    """Draw the weights of a layer such that it keeps the size of its input, and set its bias to zero.

    Torch's own start is smaller by far, and the zero output layer learns at the speed of what it sees.
    """
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


def _channels_last(x: Tensor) -> Tensor:
    """Return the tensor with the channels of a place side by side in memory, where processors convolve faster."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)

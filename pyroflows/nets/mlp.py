"""Dense conditioners: plain and residual networks, and parameters that may depend on a context."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.nets.perceptron import perceptron
from pyroflows.options import as_int
from pyroflows.shapes import shape_of

L = TypeVar("L", bound=nn.Module)


class MLP(nn.Sequential):
    """A multi-layer perceptron with SiLU activations, whose output layer starts at zero.

    Args:
        in_dim: size of the input's last dimension.
        out_dim: size of the output's last dimension.
        hidden_dims: widths of the hidden layers; if there is none, the network is linear.

    Shapes: it maps ``(..., in_dim)`` to ``(..., out_dim)``.

    Raises:
        OptionError: if a width is not positive, or the input is no vector.

    Example:
        >>> MLP(3, 8, hidden_dims=(16,))(torch.randn(5, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int] = (64, 64)) -> None:
        if len(in_shape := shape_of(in_dim)) > 1:
            raise OptionError(
                f"this network reads vectors, such as a context with context_dim={in_shape.numel()}, and not what has "
                f"the shape {tuple(in_shape)}: flatten it, or use a Coupling, which reads images place by place"
            )
        widths = [*in_shape, *checked_widths(hidden_dims, least=0)]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.SiLU()]
        super().__init__(*layers, zero_initialized(nn.Linear(widths[-1], out_dim)))
        self.hidden_dims = widths[1:]

    def forward(self, x: Tensor) -> Tensor:
        layers = self._linear
        return perceptron(x, [layer.weight for layer in layers], [layer.bias for layer in layers])

    @property
    def _linear(self) -> list[nn.Linear]:
        return [layer for layer in self if isinstance(layer, nn.Linear)]


class ScaledMLP(MLP):
    r"""A multi-layer perceptron whose speed of learning does not grow with its width (Yang and Hu 2021,
    arXiv:2011.14522).

    A step of Adam moves each weight by about the learning rate, and so an output of n inputs by n times as much. In
    stacks of wide networks, with noisy gradients and learning rates near 0.05, that leads astray for good within a few
    steps. Here the layers are

    .. math:: h_k = \sigma\left(\tfrac{4}{n} W_k h_{k-1} + b_k\right), \qquad
        \theta = \tfrac{2}{n} (W h + b),

    where n is the number of inputs of each layer, and the factors are at most 1. The network starts where an
    :class:`MLP` does.

    The arguments, shapes and errors are those of :class:`MLP`.

    Example:
        >>> ScaledMLP(3, 8, hidden_dims=(16,))(torch.randn(5, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int] = (64, 64)) -> None:
        super().__init__(in_dim, out_dim, hidden_dims)
        for layer in self._linear[:-1]:
            layer.weight.data /= _factor(4, layer)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, output = self._linear
        scale = _factor(2, output)
        weights, biases = [layer.weight for layer in self._linear], [layer.bias for layer in hidden]
        return perceptron(x, weights, [*biases, scale * output.bias], [*(_factor(4, layer) for layer in hidden), scale])


def _factor(numerator: float, layer: nn.Linear) -> float:
    return min(1.0, numerator / layer.in_features)


class ResidualMLP(nn.Module):
    r"""A residual network whose output layer starts at zero (He et al. 2016, arXiv:1603.05027).

    Starting from :math:`h_0 = W x + b`, each width in ``hidden_dims`` adds a block,

    .. math:: h_k = h_{k-1} + W_k'\, \sigma(W_k\, \sigma(h_{k-1}) + b_k) + b_k',

    where :math:`\sigma` is SiLU, and the output is linear in :math:`\sigma(h)`. All :math:`h_k` have the first width;
    the hidden layer inside block k has the k-th.

    Args:
        in_dim: size of the input's last dimension.
        out_dim: size of the output's last dimension.
        hidden_dims: one or more widths, a block of two linear layers for each.

    Shapes: it maps ``(..., in_dim)`` to ``(..., out_dim)``.

    Raises:
        OptionError: if there is no hidden layer, or a width is not positive.

    Example:
        >>> ResidualMLP(3, 8, hidden_dims=(16, 16))(torch.randn(5, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(self, in_dim: int, out_dim: int, hidden_dims: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.hidden_dims = checked_widths(hidden_dims)
        width = self.hidden_dims[0]
        self.input = nn.Linear(in_dim, width)
        self.inner = nn.ModuleList(nn.Linear(width, inner) for inner in hidden_dims)
        self.outer = nn.ModuleList(nn.Linear(inner, width) for inner in hidden_dims)
        self.output = zero_initialized(nn.Linear(width, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.input(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            h = h + outer(F.silu(inner(F.silu(h))))
        return self.output(F.silu(h))


class Pointwise(nn.Module):
    """A network for vectors, applied along one axis at each place of the axes after it, as a 1 x 1 convolution is.

    Args:
        net: maps ``(..., in_dim)`` to ``(..., out_dim)``.
        num_axes: the number of axes after the one that the network acts along; 2 for an image ``(C, H, W)``.

    Shapes: it maps ``(..., in_dim, *rest)`` to ``(..., out_dim, *rest)``, where ``rest`` has ``num_axes`` axes.

    Example:
        >>> Pointwise(MLP(3, 8), num_axes=2)(torch.randn(5, 3, 4, 2)).shape
        torch.Size([5, 8, 4, 2])
    """

    def __init__(self, net: nn.Module, num_axes: int) -> None:
        super().__init__()
        self.net = net
        self.axis = -1 - num_axes

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.movedim(self.axis, -1)).movedim(-1, self.axis)


class Parameters(nn.Module):
    """The parameters of one layer, which may depend on a context.

    They are ``theta = value + net(context)``, where ``net`` exists only if ``context_dim > 0`` and its output starts at
    zero.

    Args:
        value: initial value, of any shape.
        context_dim: size of the context, 0 for none.
        hidden_dims: widths of the network that reads the context.

    Shapes: a context ``(..., context_dim)`` gives ``(..., *value.shape)``; no context gives ``value.shape``.

    Example:
        >>> Parameters(torch.zeros(3, 2), context_dim=4)(torch.randn(5, 4)).shape
        torch.Size([5, 3, 2])
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


def zero_initialized(layer: L) -> L:
    """Set weight and bias of a layer to zero, and return it."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def checked_widths(hidden_dims: Sequence[int], least: int = 1) -> list[int]:
    """Return the widths as integers if there are at least that many and all are positive.

    Raises:
        OptionError: otherwise.
    """
    if not isinstance(hidden_dims, Iterable) or isinstance(hidden_dims, str):
        raise OptionError(f"hidden_dims must be a sequence of widths, such as (64, 64), got {hidden_dims!r}")
    given = tuple(hidden_dims)
    widths = [width for width in map(as_int, given) if width is not None and width > 0]
    if len(widths) < max(least, len(given)):
        raise OptionError(f"hidden_dims must be one or more positive widths, which are integers, got {given}")
    return widths

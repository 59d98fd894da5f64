"""A network at one context, as a function with a bounded slope that multiplies its own Jacobian."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from pyroflows.nets.lipschitz.activations import ACTIVATIONS
from pyroflows.nets.products import affine


@dataclass(frozen=True)
class Contraction:
    r"""The function :math:`g(z) = a_K`, with :math:`a_k = W_k h_{k-1} + b_k`, :math:`h_0 = z` and
    :math:`h_k = \sigma(a_k)`.

    Args:
        weights: the :math:`W_k`, matrices ``(out, in)`` or kernels ``(out, in, *taps)`` of convolutions that take
            places beyond the border as zero.
        offsets: the :math:`b_k`, ``(..., out)`` or, for convolutions, ``(..., out, *rest)`` with axes that broadcast.
        activation: the name of :math:`\sigma`.
    """

    weights: Sequence[Tensor]
    offsets: Sequence[Tensor]
    activation: str

    def __call__(self, z: Tensor) -> Tensor:
        return self.linearized(z).value

    def linearized(self, z: Tensor) -> "Linearized":
        """Return value and Jacobian at z."""
        activation = ACTIVATIONS[self.activation]
        slopes = []
        a = _affine(self.weights[0], z, self.offsets[0])
        for weight, offset in zip(self.weights[1:], self.offsets[1:], strict=True):
            h, slope = activation(a)
            slopes.append(slope)
            a = _affine(weight, h, offset)
        return Linearized(a, self.weights, slopes)

    def held(self) -> "Contraction":
        """Return the same function without gradients to its parameters."""
        weights, offsets = ([t.detach() for t in part] for part in (self.weights, self.offsets))
        return Contraction(weights, offsets, self.activation)


@dataclass(frozen=True)
class Linearized:
    r"""Value and Jacobian :math:`J = W_K D_{K-1} W_{K-1} \cdots D_1 W_1` of a contraction at z.

    Args:
        value: :math:`g(z)`, ``(*batch, *shape)``.
        weights: the :math:`W_k`.
        slopes: the diagonals of the :math:`D_k`, :math:`\sigma'(a_k)`, ``(*batch, *hidden_shape)``.

    Shapes: vectors are ``(*more, *batch, *shape)``.
    """

    value: Tensor
    weights: Sequence[Tensor]
    slopes: Sequence[Tensor]

    def times(self, v: Tensor) -> Tensor:
        """Return :math:`J v`."""
        for weight, slope in zip(self.weights, self.slopes, strict=False):
            v = slope * multiplied(weight, v)
        return multiplied(self.weights[-1], v)

    def transposed_times(self, u: Tensor) -> Tensor:
        r"""Return :math:`J^\top u`."""
        return transposed_times(u, self.weights, self.slopes)

    def held(self) -> "Linearized":
        """Return the same Jacobian as a constant."""
        return Linearized(
            self.value.detach(), [w.detach() for w in self.weights], [slope.detach() for slope in self.slopes]
        )


def transposed_times(u: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`J^\top u` for the Jacobian of a :class:`Linearized`."""
    u = multiplied_transposed(weights[-1], u)
    for weight, slope in zip(reversed(weights[:-1]), reversed(slopes), strict=True):
        u = multiplied_transposed(weight, slope * u)
    return u


def network_value(
    weights: Sequence[Tensor], offsets: Sequence[Tensor], activate_: Callable[[Tensor], Tensor], z: Tensor
) -> Tensor:
    """Return the value of a network in less time than a :class:`Contraction` does, for no gradients.

    Args:
        weights: those of a contraction.
        offsets: likewise.
        activate_: the activation, which writes its values into the place of the pre-activations.
        z: ``(n, *shape)``.
    """
    h = z
    for weight, offset in zip(weights, offsets, strict=True):
        h = h if h is z else activate_(h)
        h = affine(h, weight, offset) if weight.dim() == 2 else multiplied(weight, h).add_(offset)
    return h


def multiplied(weight: Tensor, v: Tensor) -> Tensor:
    """Return the product of a matrix, or of a convolution's matrix, with vectors or images ``(..., *shape)``."""
    if weight.dim() == 2:
        return F.linear(v, weight)
    return _convolved(_CONVOLVE, weight, v)


def multiplied_transposed(weight: Tensor, u: Tensor) -> Tensor:
    """Return the product of the transposed matrix with vectors or images ``(..., *shape)``."""
    if weight.dim() == 2:
        return u @ weight
    return _convolved(_CONVOLVE_TRANSPOSED, weight, u)


def _affine(weight: Tensor, h: Tensor, offset: Tensor) -> Tensor:
    if weight.dim() == 2 and offset.dim() == 1:
        return F.linear(h, weight, offset)
    return multiplied(weight, h) + offset


_CONVOLVE: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVOLVE_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _convolved(functions: dict[int, Any], kernel: Tensor, v: Tensor) -> Tensor:
    num_axes = kernel.dim() - 1
    batch_shape, shape = v.shape[:-num_axes], v.shape[-num_axes:]
    # Processors convolve faster where the channels of a place are side by side in memory.
    flat = v.reshape(batch_shape.numel(), *shape).movedim(1, -1).contiguous().movedim(-1, 1)
    # The name "same" of this padding takes a slower way.
    out = functions[num_axes - 1](flat, kernel, padding=[taps // 2 for taps in kernel.shape[2:]])
    return out.reshape(batch_shape + out.shape[1:])

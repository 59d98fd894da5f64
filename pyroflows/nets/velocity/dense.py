"""The dense velocity network, whose divergence has a closed form."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.compiling.eager import is_transformed
from pyroflows.nets.mlp import checked_widths, zero_initialized
from pyroflows.nets.velocity.bilinear import velocity_and_divergence
from pyroflows.nets.velocity.time import NUM_FREQUENCIES, time_features


class VelocityMLP(nn.Module):
    r"""A perceptron that gives the velocity of a continuous flow,

    .. math:: a_k = W_k h_{k-1} + A_k\, \phi(t) + C_k\, e(c) + b_k, \qquad h_0 = z, \quad h_k = \sigma(a_k),

    the velocity being the last a, with SiLU activations :math:`\sigma`. Time enters each layer by its features
    :math:`\phi(t)`, and the context by a vector e(c) that a further network computes once for a whole solve. The last
    layer starts at zero.

    The divergence has a closed form. With the slopes :math:`s_k = \sigma'(a_k)`, two hidden layers have

    .. math:: \operatorname{tr} \frac{\partial v}{\partial z} = s_2^\top (W_2 \odot (W_1 W_3)^\top)\, s_1,

    one product with a matrix that all rows share, whatever the dimension D is; one hidden layer has
    :math:`\operatorname{diag}(W_1 W_2)^\top s_1`. Three hidden layers take 2 D such products, whose matrices all rows
    share as well, and deeper networks push D vectors through the layers.

    Args:
        dim: the event size D.
        hidden_dims: widths of the hidden layers, at least one.
        context_dim: size of the context, 0 for none.

    Shapes: places and velocities are ``(*batch, dim)``, a context is ``(*batch, context_dim)``.

    Example:
        >>> field = VelocityMLP(2, (16, 16)).at(None)
        >>> velocity, divergence = field.with_divergence(torch.tensor(0.5), torch.randn(5, 2))
        >>> velocity.shape, divergence.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(self, dim: int, hidden_dims: Sequence[int] = (64, 64), context_dim: int = 0) -> None:
        super().__init__()
        self.hidden_dims = checked_widths(hidden_dims)
        widths = [dim, *self.hidden_dims, dim]
        *hidden, last = [nn.Linear(a, b) for a, b in pairwise(widths)]
        self.linear: Any = nn.ModuleList([*hidden, zero_initialized(last)])
        # The offsets of all layers come from one product.
        self.time = _zero_for_last(nn.Linear(1 + 2 * NUM_FREQUENCIES, sum(widths[1:]), bias=False), dim)
        if context_dim:
            self.embedding = nn.Sequential(nn.Linear(context_dim, widths[1]), nn.SiLU())
            self.context = _zero_for_last(nn.Linear(widths[1], sum(widths[1:]), bias=False), dim)

    def at(self, context: Tensor | None) -> "DenseField":
        """Return the velocity field at a context ``(*batch, context_dim)``."""
        offset = torch.cat([layer.bias for layer in self.linear])
        if context is not None:
            offset = self.context(self.embedding(context)) + offset
        return DenseField([layer.weight for layer in self.linear], self.time.weight, offset)


def _zero_for_last(layer: nn.Linear, dim: int) -> nn.Linear:
    """Let a layer that computes the offsets of all layers start at zero where these are the last one's."""
    nn.init.zeros_(layer.weight[-dim:])
    return layer


@dataclass
class DenseField:
    """The velocity field of a :class:`VelocityMLP`.

    Args:
        weights: the weights of the layers.
        time_weight: the weights of the features of time, for the offsets of all layers.
        offset: the offsets of all layers without those of time, ``(total,)`` or ``(*batch, total)``.
    """

    weights: Sequence[Tensor]
    time_weight: Tensor
    offset: Tensor

    def __post_init__(self) -> None:
        self._sizes = [len(weight) for weight in self.weights]

    @cached_property
    def _traced(self) -> tuple[Tensor, ...]:
        """What the divergence of up to three hidden layers takes of the weights alone, made at the first divergence.

        Gradients flow through it wherever that is, since the adjoint equation goes on with what a solve has made.
        """
        with torch.enable_grad():
            return _traced(*self.weights)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return [*self.weights, self.time_weight, self.offset]

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        h, offsets = z, self._offsets(t)
        for weight, offset in zip(self.weights[:-1], offsets[:-1], strict=True):
            h = F.silu(_affine(h, weight, offset))
        return _affine(h, self.weights[-1], offsets[-1])

    def with_divergence(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        # The transforms of torch.func cannot see into a gradient that is written out.
        is_written_out = torch.is_grad_enabled() and not is_transformed()
        if is_written_out and len(self.weights) == 3:
            return velocity_and_divergence(z, self._offset(t), self.weights, *self._traced)
        velocity, slopes = self._with_slopes(t, z)
        return velocity, self._divergence(slopes)

    def with_product(self, t: Tensor, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        velocity, slopes = self._with_slopes(t, z)
        product = w @ self.weights[-1]
        for weight, slope in zip(self.weights[-2::-1], slopes[::-1], strict=True):
            product = (product * slope) @ weight
        return velocity, product

    def _offset(self, t: Tensor) -> Tensor:
        return F.linear(time_features(t, NUM_FREQUENCIES), self.time_weight) + self.offset

    def _offsets(self, t: Tensor) -> tuple[Tensor, ...]:
        return self._offset(t).split(self._sizes, -1)

    def _with_slopes(self, t: Tensor, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        h, offsets, slopes = z, self._offsets(t), []
        for weight, offset in zip(self.weights[:-1], offsets[:-1], strict=True):
            a = _affine(h, weight, offset)
            s = torch.sigmoid(a)
            h = a * s
            slopes.append(torch.addcmul(s + h, s, h, value=-1))
        return _affine(h, self.weights[-1], offsets[-1]), slopes

    def _divergence(self, slopes: Sequence[Tensor]) -> Tensor:
        if len(slopes) <= 3:
            return _DIVERGENCES[len(slopes) - 1](*slopes, *self._traced)
        rows = slopes[0].unsqueeze(-2) * self.weights[0].T
        for weight, slope in zip(self.weights[1:-1], slopes[1:], strict=True):
            rows = slope.unsqueeze(-2) * (rows @ weight.T)
        return (rows * self.weights[-1]).sum((-2, -1))


def _affine(h: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Return :math:`W h + b` of rows, with one b or one for each row."""
    return torch.addmm(offset, h, weight.T) if h.dim() == 2 else h @ weight.T + offset


def _linear(s1: Tensor, diagonal: Tensor) -> Tensor:
    return s1 @ diagonal


def _bilinear(s1: Tensor, s2: Tensor, m: Tensor) -> Tensor:
    return torch.linalg.vecdot(s1 @ m.T, s2)


def _trilinear(s1: Tensor, s2: Tensor, s3: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""Return the divergence :math:`\sum_{dj} s_{2j} (A s_1)_{dj} (B s_3)_{dj}` of three hidden layers.

    The weights make :math:`A_{dji} = W_{2ji} W_{1id}` and :math:`B_{djk} = W_{3kj} W_{4dk}`, which all rows share.
    """
    terms = ((s1 @ a.T) * (s3 @ b.T)).unflatten(-1, (-1, s2.shape[-1]))
    return torch.linalg.vecdot(terms.sum(-2), s2)


_DIVERGENCES = (_linear, _bilinear, _trilinear)


def _traced(*weights: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors by which the slopes of up to three hidden layers give the divergence."""
    first, last = weights[0], weights[-1]
    if len(weights) == 2:
        return ((first.T * last).sum(0),)
    if len(weights) == 3:
        return (weights[1] * (first @ last).T,)
    a, b = weights[1] * first.T.unsqueeze(1), weights[2].T * last.unsqueeze(1)
    return a.flatten(0, 1), b.flatten(0, 1)

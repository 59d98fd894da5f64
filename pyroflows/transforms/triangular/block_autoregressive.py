"""The block autoregressive layer: one masked network in place of a univariate map and a conditioner.

Tensors are by place in the order here, and the rows of a batch are their last axis: z and x are ``(D, N)``, what
belongs to the hidden units of a layer is ``(D, units, N)``, or ``(D, units, 1)`` if it is the same for all rows.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.nets import MaskedLinear, Parameters
from pyroflows.nets.constants import Constants
from pyroflows.nets.mlp import checked_widths, zero_initialized
from pyroflows.shapes import described
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.gradients import pull_back
from pyroflows.transforms.planar import above_minus_one
from pyroflows.transforms.root import increasing_root
from pyroflows.transforms.triangular.base import TriangularTransform
from pyroflows.transforms.triangular.transposed_solve import solved_by_iteration
from pyroflows.transforms.univariate.clamp import soft_clamped
from pyroflows.transforms.univariate.overflow import bounded_coefficients

# Maps of data with clusters need sharpnesses and heights of about ten, which raw parameters of order one reach by this.
GAIN = 5.0
# Sharper units bend so strongly that rounding of x in float32 shows in scores.
MAX_LOG_SHARPNESS = (3.0, 3.0)
MAX_LOG_SCALE = (2.0, 2.0)
# Units start with centres spread over (-2, 2), so that their gradients differ.
SPREAD = 2.0


class BlockAutoregressive(Constants, TriangularTransform):
    r"""The block neural autoregressive layer (De Cao et al. 2019, arXiv:1904.04676), with an inverse.

    Each dimension has units of its own in every hidden layer of one network. They are increasing in that dimension's
    :math:`z_j`, by diagonal blocks with positive elements, and depend in any way on the units of the dimensions before
    it, :math:`k < j` in the order, by full blocks below the diagonal:

    .. math::
        a^{(1)}_j &= \kappa^{(1)}_j z_j + b^{(1)}_j + \sum_{k<j} W^{(1)}_{jk} z_k, \qquad t^{(l)}_j = \tanh a^{(l)}_j,
        \\
        a^{(l)}_j &= \kappa^{(l)}_j P^{(l)}_j h^{(l-1)}_j + b^{(l)}_j + \sum_{k<j} W^{(l)}_{jk} t^{(l-1)}_k, \qquad
        h^{(l)}_j = t^{(l)}_j / \kappa^{(l)}_j,
        \\
        x_j &= \sigma_j \Bigl( z_j + \tfrac{1}{U} \sum_{u=1}^U m_{ju} h^{(L)}_{ju} \Bigr) + \mu_j
        + \sum_{k<j} \bigl( V_{jk} z_k + W_{jk} t^{(L)}_k \bigr).

    The positive diagonal block of layer l is :math:`\operatorname{diag}(\kappa^{(l)}_j)\, P^{(l)}_j
    \operatorname{diag}(\kappa^{(l-1)}_j)^{-1}`, where the rows of :math:`P_j` sum to one. So every h has a slope
    :math:`s = \partial h / \partial z_j` in (0, 1], which no product of blocks can take out of the range of a float,

    .. math::
        s^{(1)} = 1 - t^{(1)} \odot t^{(1)}, \qquad
        s^{(l)} = (1 - t^{(l)} \odot t^{(l)}) \odot P^{(l)} s^{(l-1)}, \qquad
        \log \frac{\partial x_j}{\partial z_j}
        = \log \sigma_j + \log \Bigl( 1 + \tfrac{1}{U} \sum_u m_{ju} s^{(L)}_{ju} \Bigr).

    In place of the paper's gate, which passes a share of z, all of z passes here, and the heights m may be negative
    down to :math:`-1 + 10^{-3}`, which keeps slopes positive. So m = 0 is the identity, from which training can go
    either way. The tails are linear, with slopes :math:`\sigma_j` between :math:`e^{-2}` and :math:`e^2`.

    The forward direction is parallel. The inverse computes one dimension after the other. In each it evaluates the
    units of this dimension alone, by a root search in the bracket :math:`\pm \frac{1}{U} \sum_u |m_u| / \kappa_u`
    about :math:`z_j = y_j`, where y is what remains of :math:`x_j` after :math:`\sigma_j`, :math:`\mu_j` and earlier
    dimensions; what those contribute costs one pass in all. A score costs up to D backward passes.

    Args:
        dim: the event size D.
        order: a permutation of ``range(D)``; ``order[i]`` is the index at place i. None for ascending order.
        hidden_dims: the number of units that each dimension has in each hidden layer; a layer has D times as many.
        context_dim: size of the context that :math:`\kappa`, b, m, :math:`\mu` and :math:`\sigma` depend on, 0 for
            none.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if ``order`` is no permutation, events or contexts are no vectors, there is no hidden layer, or a
            width is not positive.
        InversionError: from the inverse, if the root search misses its target, see
            :func:`pyroflows.transforms.root.increasing_root`.

    Example:
        >>> t = BlockAutoregressive(3, hidden_dims=(8, 8))
        >>> z = torch.randn(5, 3)
        >>> x, ladj = t.forward_and_ladj(z)
        >>> torch.allclose(t.inv(x), z, atol=1e-5)
        True
    """

    index_of_place: Tensor
    place_of_index: Tensor

    def __init__(
        self,
        dim: int,
        order: Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (32,),
        context_dim: int = 0,
    ) -> None:
        super().__init__(dim, context_dim)
        if len(self.event_shape) > 1 or len(self.context_shape) > 1:
            given = f"events of {described(self.event_shape)} and contexts of {described(self.context_shape)}"
            raise OptionError(f"BlockAutoregressive takes vectors, got {given}")
        self.order = list(range(self.dim)) if order is None else list(order)
        if sorted(self.order) != list(range(self.dim)):
            raise OptionError(
                f"the order of BlockAutoregressive must be a permutation of 0 to {self.dim - 1}, got {self.order}"
            )
        self.hidden_dims = checked_widths(hidden_dims)
        self.register_constants()
        *hidden, last = self._masks()
        self.weights = nn.ModuleList([*map(_random, hidden), zero_initialized(_weight(last))])
        self.mixing = nn.ParameterList(torch.randn(self.dim, b, a) for a, b in pairwise(self.hidden_dims))
        # Each dimension has log-sharpnesses and biases of its units, layer by layer, heights, a shift and a log-scale.
        values = []
        for units in self.hidden_dims:
            centers = SPREAD * (2 * torch.arange(units) + 1 - units) / units
            values += [torch.zeros(units), -centers]
        values += [torch.zeros(self.hidden_dims[-1]), torch.zeros(1), torch.zeros(1)]
        self._sizes = [len(value) for value in values]
        self.parameters_of = Parameters(torch.cat(values).repeat(self.dim, 1), context_dim)

    def _masks(self) -> list[Tensor]:
        """Return masks that let pass what belongs to earlier dimensions; the last one's inputs are z and the units."""
        is_before = torch.ones(self.dim, self.dim).tril(-1)
        masks = [torch.kron(is_before, torch.ones(b, a)) for a, b in pairwise([1, *self.hidden_dims, 1])]
        return [*masks[:-1], torch.cat([is_before, masks[-1]], 1)]

    def constants(self) -> dict[str, Tensor | None]:
        index_of_place = torch.tensor(self.order)
        masks = {f"weights.{k}.mask": mask for k, mask in enumerate(self._masks())}
        return {"index_of_place": index_of_place, "place_of_index": index_of_place.argsort(), **masks}

    @property
    def triangular_order(self) -> tuple[int, ...]:
        return tuple(self.order)

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        units, (*hidden, last) = self._units(z, context), self._masked_weights()
        z_by_place = self._by_place(z)

        def below(k: int, inputs: Tensor) -> Tensor:
            bias = units.bias[k].flatten(0, 1)
            return torch.addmm(bias, hidden[k], inputs.flatten(0, -2)).unflatten(0, (self.dim, -1))

        value, slope, activations = _network(units, z_by_place, below)
        known = torch.cat([z_by_place, activations[-1].flatten(0, 1)])
        x = units.log_scale.exp() * value + units.shift + last @ known
        return self._by_index(x, z), self._by_index(units.log_scale + slope.log(), z)

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        units_of_all, (*hidden, last) = self._units(x, context), self._masked_weights()
        hidden = [weight.unflatten(0, (self.dim, -1)) for weight in hidden]
        x_by_place = self._by_place(x)
        # This is what the steps have computed: z, and the activations of each layer.
        known = [x_by_place[:0]] * (1 + len(hidden))
        log_slopes = []
        for i, x_i in enumerate(x_by_place):
            units = units_of_all.at(i)
            below = [
                torch.addmm(bias, weight[i, :, : len(inputs)], inputs)
                for bias, weight, inputs in zip(units.bias, hidden, known, strict=False)
            ]
            on_z, on_activations = last[i, :i], last[i, self.dim : self.dim + len(known[-1])]
            rest = x_i - units.shift - on_z @ known[0] - on_activations @ known[-1]
            z_i, slope, activations = _solved(units, rest * (-units.log_scale).exp(), below)
            known = [torch.cat(parts) for parts in zip(known, [z_i[None], *activations], strict=True)]
            log_slopes.append(-units.log_scale - slope.log())
        return self._by_index(known[0], x), self._by_index(torch.stack(log_slopes), x)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        x, log_slopes = self._forward_and_log_slopes(z, context)
        with torch.no_grad():
            (by_z,) = pull_back((log_slopes,), (torch.ones_like(log_slopes),), (z,))
            slopes = log_slopes.exp()

            def above_diagonal(v: Tensor) -> Tensor:
                return pull_back((x,), (v,), (z,))[0] - slopes * v

            score = solved_by_iteration(above_diagonal, slopes, score - by_z)
        return x, self._summed(log_slopes), score

    def _units(self, z: Tensor, context: Tensor | None) -> "_Units":
        raw = self.parameters_of(context)
        rows = raw[None] if raw.dim() == 2 else raw.expand(*z.shape[:-1], *raw.shape[-2:]).flatten(0, -3)
        *of_layers, heights, shift, log_scale = rows.permute(1, 2, 0).split(self._sizes, 1)
        sharpness = [soft_clamped(GAIN * s, MAX_LOG_SHARPNESS).exp() for s in of_layers[::2]]
        num_units = self.hidden_dims[-1]
        return _Units(
            sharpness,
            of_layers[1::2],
            [F.softmax(logits, -1) for logits in self.mixing],
            above_minus_one(bounded_coefficients(GAIN * num_units * heights)) / num_units,
            shift.squeeze(1),
            soft_clamped(log_scale.squeeze(1), MAX_LOG_SCALE),
        )

    def _masked_weights(self) -> list[Tensor]:
        layers: Any = self.weights
        return [layer.masked_weight for layer in layers]

    def _by_place(self, t: Tensor) -> Tensor:
        """Return what has the shape of z as ``(D, N)``, by place."""
        return t.index_select(-1, self.index_of_place).reshape(-1, self.dim).T.contiguous()

    def _by_index(self, t: Tensor, like: Tensor) -> Tensor:
        """Undo :meth:`_by_place`, for a tensor of this shape."""
        return t.T.reshape(like.shape).index_select(-1, self.place_of_index)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order={self.order}, hidden_dims={self.hidden_dims}"


class _Units(NamedTuple):
    """The parameters of the units, of all dimensions or of one, which has the same tensors without their first axis."""

    sharpness: list[Tensor]
    bias: list[Tensor]
    mixing: list[Tensor]
    heights: Tensor
    shift: Tensor
    log_scale: Tensor

    def at(self, i: int) -> "_Units":
        """Return those of the dimension at place i."""
        sharpness, bias, mixing = ([t[i] for t in ts] for ts in (self.sharpness, self.bias, self.mixing))
        return _Units(sharpness, bias, mixing, self.heights[i], self.shift[i], self.log_scale[i])


def _network(units: _Units, z: Tensor, below: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return ``z + mean(m h)``, its slope, and the activations t of each layer.

    Args:
        units: the parameters.
        z: ``(D, N)``, or ``(N,)`` for one dimension.
        below: a function of the number of a hidden layer and its inputs, z or the activations of the layer before,
            which returns the biases of the layer with what earlier dimensions add to them.
    """
    t, s, activations = z, z, []
    for k, sharpness in enumerate(units.sharpness):
        offsets = below(k, t)
        h = units.mixing[k - 1] @ (t / units.sharpness[k - 1]) if k else z.unsqueeze(-2)
        t = torch.tanh(torch.addcmul(offsets, sharpness, h))
        s = (1 - t * t) * (units.mixing[k - 1] @ s) if k else 1 - t * t
        activations.append(t)
    value = z + _weighted_sum(units.heights / units.sharpness[-1], t)
    return value, 1 + _weighted_sum(units.heights, s), activations


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Return the sums over units; where all rows have the same weights, a product of matrices reads values once."""
    return (weights.mT @ values).squeeze(-2) if weights.shape[-1] == 1 else (weights * values).sum(-2)


def _solved(units: _Units, y: Tensor, below: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the z at which the network of one dimension has the value y, its slope there, and its activations."""

    def network(z: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        return _network(units, z, lambda k, _: below[k])

    # Activations are at most 1.
    reach = (units.heights.abs() / units.sharpness[-1]).sum(-2)
    z = increasing_root(lambda z: network(z)[:2], y, y - reach, y + reach)
    return z, *network(z)[1:]


def _weight(mask: Tensor) -> MaskedLinear:
    """Return a masked weight; biases are parameters of the units."""
    layer = MaskedLinear(mask)
    layer.register_parameter("bias", None)
    return layer


def _random(mask: Tensor) -> MaskedLinear:
    """Return a masked weight that keeps the variance of its inputs, of which it may use fewer for earlier places."""
    layer = _weight(mask)
    nn.init.normal_(layer.weight)
    layer.weight.data /= mask.sum(1, keepdim=True).clamp_min(1).sqrt()
    return layer

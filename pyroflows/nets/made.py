"""Masked autoregressive networks, which compute the parameters of each dimension from the dimensions before it.

A hidden unit of degree d depends on the inputs at places below d only. If the inputs become known one after the other,
each unit can be computed once, as soon as its inputs are known; the gradients of the inputs can be computed likewise,
from the last place to the first.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyroflows.nets.constants import Constants
from pyroflows.nets.incremental import GradientSteps, ParameterSteps
from pyroflows.nets.mlp import checked_widths, zero_initialized
from pyroflows.nets.perceptron import perceptron


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a fixed mask.

    Args:
        mask: ``(out_features, in_features)``, true or a factor where the output may depend on the input.

    Shapes: it maps ``(..., in_features)`` to ``(..., out_features)``.

    Example:
        >>> layer = MaskedLinear(torch.eye(2, dtype=torch.bool))
        >>> (layer.masked_weight != 0).tolist()
        [[True, False], [False, True]]
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        # The constructor's argument determines this buffer, so it does not belong in a state_dict.
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    @property
    def masked_weight(self) -> Tensor:
        """The weight, with zeros where the mask is zero."""
        return self.weight * self.mask

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.masked_weight, self.bias)


class MADE(Constants):
    r"""The masked autoregressive network (Germain et al. 2015, arXiv:1502.03509).

    One pass gives :math:`\theta_j = f_j(z_{<j}, c)` for all j, where :math:`z_{<j}` are the inputs before j in
    ``order``. The degree of an input is its place in the order, 0 to D - 1. A hidden unit of degree d depends on inputs
    of degree below d, and the outputs for place i depend on hidden units of degree at most i. Hidden units are sorted
    by degree. All of them see the context; those of degree 0 see nothing else.

    It offers :class:`pyroflows.nets.Incremental` and :class:`pyroflows.nets.IncrementalGradient`.

    Args:
        order: a permutation of ``range(D)``; ``order[i]`` is the dimension at place i.
        num_params: number of parameters of each dimension.
        hidden_dims: one or more widths of hidden layers; they may be smaller than D.
        context_dim: size of the context, 0 for none.
        features: number of inputs that describe one dimension, such as 2 for the cosine and sine of an angle.

    Shapes: ``(..., D)``, or ``(..., features, D)`` for several, and a context ``(..., context_dim)`` give
    ``(..., D, num_params)``.

    Attributes:
        units: for each hidden layer, the number of units of each degree.
        known: for each hidden layer and each degree, the number of units of at most this degree.

    Raises:
        OptionError: if there is no hidden layer, or a width is not positive.

    Example:
        >>> net = MADE([2, 0, 1], num_params=2, hidden_dims=(16,), context_dim=4)
        >>> net(torch.randn(5, 3), torch.randn(5, 4)).shape
        torch.Size([5, 3, 2])
    """

    index_of_place: Tensor

    def __init__(
        self,
        order: Sequence[int],
        num_params: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        features: int = 1,
    ) -> None:
        super().__init__()
        dim = len(order)
        self.hidden_dims = checked_widths(hidden_dims)
        self.order = list(order)
        self.num_params = num_params
        self.features = features
        # Without a context a unit of degree 0 is a constant, which only D = 1 has to make do with.
        lowest = 0 if context_dim or dim == 1 else 1
        widths = self._widths(self.hidden_dims)
        degrees = [_spread(lowest, dim - 1, width) for width in widths]
        self.units = [torch.bincount(d, minlength=dim).tolist() for d in degrees]
        self.known = [list(accumulate(units)) for units in self.units]

        self.register_constants()
        first, *masks, last = self._masks()
        self.input = MaskedLinear(first)
        self.context = nn.Linear(context_dim, widths[0], bias=False) if context_dim else None
        self.hidden = nn.ModuleList(MaskedLinear(mask) for mask in masks)
        self.output = zero_initialized(MaskedLinear(last))

    def _widths(self, hidden_dims: Sequence[int]) -> list[int]:
        return list(hidden_dims)

    def constants(self) -> dict[str, Tensor | None]:
        names = ["input", *(f"hidden.{k}" for k in range(len(self.units) - 1)), "output"]
        masks = {f"{name}.mask": mask for name, mask in zip(names, self._masks(), strict=True)}
        return {"index_of_place": torch.as_tensor(self.order), **masks}

    def _masks(self) -> list[Tensor]:
        """Return the masks of all layers, from the degrees of the units."""
        place = torch.as_tensor(self.order).argsort()
        degrees = [torch.arange(len(units)).repeat_interleave(torch.tensor(units)) for units in self.units]
        first = degrees[0][:, None] > place.repeat_interleave(self.features)
        last = (place[:, None] >= degrees[-1]).repeat(self.num_params, 1)
        return [first, *(b[:, None] >= a for a, b in pairwise(degrees)), last]

    def skip(self, k: int) -> int | None:
        """Return the number of the hidden layer whose pre-activation is added to that of hidden layer k, or None."""
        return None

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        layers: list[MaskedLinear] = [self.input, *self.hidden, self.output]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        offset = None if self.context is None else self.context(context)
        output = perceptron(self._flat(z), weights, biases, [layer.mask for layer in layers], offset)
        return output.unflatten(-1, (self.num_params, -1)).transpose(-1, -2)

    def _flat(self, z: Tensor) -> Tensor:
        """Return the inputs of the first layer: the features of each dimension, one after the other."""
        return z if self.features == 1 else z.transpose(-1, -2).flatten(-2)

    def pre_activations(self, z: Tensor, context: Tensor | None) -> list[Tensor]:
        """Return the hidden layers before their activations."""
        first = self.input(self._flat(z))
        hidden = [first if self.context is None else first + self.context(context)]
        for k, layer in enumerate(self.hidden, start=1):
            h = layer(F.silu(hidden[-1]))
            skip = self.skip(k)
            hidden.append(h if skip is None else h + hidden[skip])
        return hidden

    def parameters_from(self, pre_activations: list[Tensor]) -> Tensor:
        """Return the parameters ``(..., D, num_params)``, given the hidden layers before their activations."""
        output = self.output(F.silu(pre_activations[-1]))
        # Memory stays parameter-major, so that each parameter is one contiguous block over the dimensions.
        return output.unflatten(-1, (self.num_params, -1)).transpose(-1, -2)

    def incremental(self, num_rows: int, context: Tensor | None = None) -> ParameterSteps:
        """Return the steps that compute the parameters place by place, see :class:`pyroflows.nets.Incremental`."""
        return _ParameterSteps(self, num_rows, context)

    def with_gradient_steps(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Callable[[Tensor], GradientSteps]]:
        """Return the parameters and what makes the gradient steps, see :class:`pyroflows.nets.IncrementalGradient`."""
        hidden = self.pre_activations(z, context)
        rows = [h.detach().reshape(-1, h.shape[-1]) for h in hidden]
        return self.parameters_from(hidden), partial(_GradientSteps, self, rows)

    def weights_by_place(self) -> list[Tensor]:
        """Return the masked weights of all layers by place; those of the output are ``(D, num_params, width)``."""
        output = self.output.masked_weight.unflatten(0, (self.num_params, -1))
        by_dimension = self.input.masked_weight.unflatten(1, (-1, self.features))
        return [
            by_dimension[:, self.index_of_place].flatten(1),
            *(layer.masked_weight for layer in self.hidden),
            output.transpose(0, 1)[self.index_of_place],
        ]


class ResMADE(MADE):
    r"""The residual masked autoregressive network (Durkan and Nash 2019, arXiv:1904.05626).

    It is a :class:`MADE` with a block :math:`h_k = h_{k-1} + W_k'\, \sigma(W_k\, \sigma(h_{k-1}))` for every width in
    ``hidden_dims``. All :math:`h_k` have the first width; the hidden layer inside block k has the k-th.

    Args:
        order: a permutation of ``range(D)``; ``order[i]`` is the dimension at place i.
        num_params: number of parameters of each dimension.
        hidden_dims: one or more widths, a block of two masked layers for each.
        context_dim: size of the context, 0 for none.

    Shapes: ``(..., D)`` and a context ``(..., context_dim)`` give ``(..., D, num_params)``.

    Raises:
        OptionError: if there is no hidden layer, or a width is not positive.

    Example:
        >>> net = ResMADE([2, 0, 1], num_params=2, hidden_dims=(16, 16))
        >>> net(torch.randn(5, 3)).shape
        torch.Size([5, 3, 2])
    """

    def _widths(self, hidden_dims: Sequence[int]) -> list[int]:
        stream = hidden_dims[0]
        return [stream, *(width for inner in hidden_dims for width in (inner, stream))]

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.parameters_from(self.pre_activations(z, context))

    def skip(self, k: int) -> int | None:
        """Return the number of the hidden layer whose pre-activation is added to that of hidden layer k, or None."""
        return k - 2 if k > 0 and k % 2 == 0 else None


class ScaledMADE(MADE):
    r"""A :class:`MADE` whose speed of learning does not grow with its width, as that of
    :class:`pyroflows.nets.ScaledMLP`.

    The weights into each unit are multiplied by :math:`4/n`, and those into each output by :math:`2/n`, where n is the
    number of units that its mask lets through, and the factors are at most 1. The network starts where a :class:`MADE`
    does. The weights of the context are not scaled.

    The arguments, shapes and errors are those of :class:`MADE`.

    Example:
        >>> net = ScaledMADE([2, 0, 1], num_params=2, hidden_dims=(16,))
        >>> net(torch.randn(5, 3)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        order: Sequence[int],
        num_params: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        features: int = 1,
    ) -> None:
        super().__init__(order, num_params, hidden_dims, context_dim, features)
        for layer in (self.input, *self.hidden):
            layer.weight.data.div_(_factors(4, layer.mask != 0))

    def _masks(self) -> list[Tensor]:
        # The factors are part of the masks, so that they cost nothing.
        *masks, last = super()._masks()
        return [*(mask * _factors(4, mask) for mask in masks), last * _factors(2, last)]


class _ParameterSteps:
    """The steps of a :class:`MADE`, which compute each hidden unit once, as soon as its inputs are known."""

    def __init__(self, net: MADE, num_rows: int, context: Tensor | None = None) -> None:
        weights = net.weights_by_place()
        # The sources of each layer start with a row of ones, whose weights are the biases; those of the first layer
        # have the context next.
        ones = weights[0].new_ones(1, num_rows)
        if net.context is not None and context is not None:
            weights[0] = torch.cat([net.context.weight, weights[0]], 1)
            given = torch.cat([ones, context.T.expand(-1, num_rows)])
        else:
            given = ones
        biases = [layer.bias for layer in (net.input, *net.hidden)]
        weights[:-1] = [torch.cat([b[:, None], w], 1) for b, w in zip(biases, weights[:-1], strict=True)]
        output_bias = net.output.bias.unflatten(0, (net.num_params, -1)).T[net.index_of_place]
        self._output = torch.cat([output_bias[..., None], weights[-1]], 2).unbind()

        inputs = torch.cat([given, given.new_empty(len(net.order) * net.features, num_rows)])
        active = [torch.cat([ones, ones.new_empty(len(weight), num_rows)]) for weight in weights[:-1]]
        self.inputs = inputs[len(given) :]
        if net.features > 1:
            self.inputs = self.inputs.unflatten(0, (-1, net.features))
        # The views of all steps are made here at once, rather than one by one in the steps.
        self._weights = [w.split(units) for w, units in zip(weights, net.units, strict=False)]
        self._active = [a[1:].split(units) for a, units in zip(active, net.units, strict=True)]
        self._sources = [inputs, *active]
        self._units = list(zip(*net.units, strict=True))
        widths = [
            range(len(given), len(inputs), net.features),
            *([1 + known for known in layer] for layer in net.known),
        ]
        self._widths = list(zip(*widths, strict=True))
        self._skips = [net.skip(k) for k in range(len(active))]

    def parameters_at(self, i: int) -> Tensor:
        """Return the parameters ``(num_params, N)`` of the dimension at place i."""
        *widths, last = self._widths[i]
        before_activation: dict[int, Tensor] = {}
        for k, (units, width, skip) in enumerate(zip(self._units[i], widths, self._skips, strict=True)):
            if not units:
                continue
            h = torch.mm(self._weights[k][i][:, :width], self._sources[k][:width], out=self._active[k][i])
            if skip is not None:
                h += before_activation[skip]
            if k in self._skips:
                before_activation[k] = h.clone()
            F.silu(h, inplace=True)
        return torch.mm(self._output[i][:, :last], self._sources[-1][:last])


class _GradientSteps:
    """The backward steps of a :class:`MADE`, which reach each hidden unit once, when its gradient is complete.

    Args:
        net: the network.
        hidden: its pre-activations ``(N, width)`` at the inputs.
        inputs: the gradient of the inputs by dimension, ``(D, N)`` or ``(D, features, N)``, to which the steps add in
            place.
    """

    def __init__(self, net: MADE, hidden: list[Tensor], inputs: Tensor) -> None:
        self._order = net.order
        self._output = net.output.masked_weight.unflatten(0, (net.num_params, -1)).permute(1, 2, 0).unbind()
        # The weights of the units of each degree lead back to the layer before.
        layers = [net.input, *net.hidden]
        self._weights = [layer.masked_weight.T.split(units, 1) for layer, units in zip(layers, net.units, strict=True)]
        slopes = [torch.ops.aten.silu_backward(torch.ones_like(h), h).T.contiguous() for h in hidden]
        self._slopes = [slope.split(units) for slope, units in zip(slopes, net.units, strict=True)]
        gradients = [inputs.new_zeros(slope.shape) for slope in slopes]
        self._units = [gradient.split(units) for gradient, units in zip(gradients, net.units, strict=True)]
        self._layers = [inputs if net.features == 1 else inputs.flatten(0, 1), *gradients]
        self._skip_to = {skip: k for k in range(len(hidden)) if (skip := net.skip(k)) is not None}

    def pull_back(self, i: int, gradient: Tensor) -> None:
        """Add what passes through the parameters at place i, given their gradient ``(num_params, N)``."""
        # All sums are in place, since an allocation would cost more than the arithmetic.
        self._layers[-1].addmm_(self._output[self._order[i]], gradient)
        # A hidden unit of degree i gets gradients from the parameters at places from i on, all of which are known.
        for k in reversed(range(len(self._units))):
            units = self._units[k][i]
            if len(units):
                units.mul_(self._slopes[k][i])
                if k in self._skip_to:
                    units.add_(self._units[self._skip_to[k]][i])
                self._layers[k].addmm_(self._weights[k][i], units)


def _spread(lowest: int, highest: int, width: int) -> Tensor:
    """Return ``width`` integers from lowest to highest, evenly spread and ascending."""
    return torch.linspace(lowest, highest + 1 - 1e-6, width, dtype=torch.float64).floor().long()


def _factors(numerator: float, mask: Tensor) -> Tensor:
    """Return the factor of each row of a mask: numerator / number of true entries, at most 1."""
    return (numerator / mask.sum(1, keepdim=True).clamp(min=numerator)).clamp(max=1.0)

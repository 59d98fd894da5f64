r"""A masked autoregressive network computed place by place, each hidden unit once, forwards and backwards.

A hidden unit of degree d needs only the inputs at places below d. Where the inputs become known one after the other, as
in the inversion of an autoregressive layer, each unit is computed as soon as its inputs are there, and all D steps
together cost about one pass through the network, instead of D passes. The same holds for the gradient of the inputs,
from the last place to the first.

Tensors are laid out as (units, N), so that what one step reads and writes are contiguous blocks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.nets.made import MADE


class Incremental:
    """The parameters of one place after the other, while the inputs become known.

    For i = 0, 1, ..., D - 1, ask for ``parameters_at(i)``, then fill ``inputs[i]``.

    Args:
        net: the network.
        num_rows: N.
        context: ``(N, context_dim)`` or ``(1, context_dim)``, if the network takes one.

    Attributes:
        inputs: ``(D, N)``, by place.
    """

    def __init__(self, net: MADE, num_rows: int, context: Tensor | None = None) -> None:
        weights = net.weights_by_place()
        # What does not depend on the inputs stands first among the sources: ones, whose weights are the biases, and
        # for the first layer the context.
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

        inputs = torch.cat([given, given.new_empty(len(net.order), num_rows)])
        active = [torch.cat([ones, ones.new_empty(len(weight), num_rows)]) for weight in weights[:-1]]
        self.inputs = inputs[len(given) :]
        # One split makes the views of all steps.
        self._weights = [w.split(units) for w, units in zip(weights, net.units, strict=False)]
        self._active = [a[1:].split(units) for a, units in zip(active, net.units, strict=True)]
        self._sources = [inputs, *active]
        self._units = list(zip(*net.units, strict=True))
        widths = [range(len(given), len(inputs)), *([1 + known for known in layer] for layer in net.known)]
        self._widths = list(zip(*widths, strict=True))
        self._skips = [net.skip(k) for k in range(len(active))]

    def parameters_at(self, i: int) -> Tensor:
        """``(num_params, N)``, for the dimension at place i."""
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


class IncrementalGradient:
    """The gradient of one input after the other, from the last place to the first.

    For i = D - 1, ..., 1, ``inputs[order[i]]`` is complete: read it, then give ``parameter_gradient(i, ...)``, which
    adds to the inputs at places before i.

    Args:
        net: the network.
        hidden: its pre-activations ``(N, width)`` at the inputs.
        inputs: ``(D, N)``, to which the gradient is added in place.
    """

    def __init__(self, net: MADE, hidden: list[Tensor], inputs: Tensor) -> None:
        self._order = net.order
        self._output = net.output.masked_weight.unflatten(0, (net.num_params, -1)).permute(1, 2, 0).unbind()
        # From the units of each degree to the layer before.
        layers = [net.input, *net.hidden]
        self._weights = [layer.masked_weight.T.split(units, 1) for layer, units in zip(layers, net.units, strict=True)]
        slopes = [torch.ops.aten.silu_backward(torch.ones_like(h), h).T.contiguous() for h in hidden]
        self._slopes = [slope.split(units) for slope, units in zip(slopes, net.units, strict=True)]
        gradients = [inputs.new_zeros(slope.shape) for slope in slopes]
        self._units = [gradient.split(units) for gradient, units in zip(gradients, net.units, strict=True)]
        self._layers = [inputs, *gradients]
        self._skip_to = {skip: k for k in range(len(hidden)) if (skip := net.skip(k)) is not None}

    def parameter_gradient(self, i: int, gradient: Tensor) -> None:
        """Take in the gradient ``(num_params, N)`` of the parameters at place i."""
        # In place, since an allocation would cost more than the arithmetic.
        self._layers[-1].addmm_(self._output[self._order[i]], gradient)
        # What reaches a hidden unit of degree i comes from parameters at places from i on, all of which are there.
        for k in reversed(range(len(self._units))):
            units = self._units[k][i]
            if len(units):
                units.mul_(self._slopes[k][i])
                if k in self._skip_to:
                    units.add_(self._units[self._skip_to[k]][i])
                self._layers[k].addmm_(self._weights[k][i], units)

"""Stacks of residual blocks of three libraries with the same networks, under the same names, for their comparison.

All networks are dense, with LipSwish between the layers. normflows' begin with an activation, which is left out here.
torchflows' have as many hidden layers as units whatever they are asked for, so that its spectral linear layers are put
together here.
"""

from itertools import pairwise
from typing import Any

import normflows
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchflows.bijections.base import BijectiveComposition
from torchflows.bijections.finite.residual.iterative import ResFlowBlock, SpectralLinear
from torchflows.flows import Flow

import pyroflows as pf

COEFFICIENT = 0.97

Weights = list[tuple[Tensor, Tensor]]
"""Weight and bias of each layer of a network."""


def trained_like(dim: int, hidden_dims: tuple[int, ...]) -> Weights:
    share = COEFFICIENT ** (1 / (len(hidden_dims) + 1))
    dims = (dim, *hidden_dims)
    matrices = [nn.init.orthogonal_(torch.empty(b, a)) for a, b in pairwise(dims)]
    product = torch.eye(dim)
    for matrix in matrices:
        product = matrix @ product
    matrices.append(-product.T)
    # Units whose offsets are mostly positive have slopes near one.
    offsets = [1 + torch.randn(len(matrix)) for matrix in matrices]
    return [(share * matrix, offset) for matrix, offset in zip(matrices, offsets, strict=True)]


def linear(dim: int, slope: float) -> Weights:
    return [(slope * torch.eye(dim), torch.zeros(dim))]


def normflows_net(weights: Weights) -> nn.Module:
    dims = [weights[0][0].shape[1], *(len(bias) for _, bias in weights)]
    net = normflows.nets.LipschitzMLP(dims, lipschitz_const=COEFFICIENT ** (1 / len(weights)))
    net.net = net.net[1:]  # without the activation of the input
    with torch.no_grad():
        for layer, (weight, bias) in zip(net.net[::2], weights, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    normflows.utils.update_lipschitz(net, 200)
    return net


def our_layer(weights: Weights, **options: Any) -> pf.transforms.Residual:
    """The same function as that of normflows, whose LipSwish has beta = softplus(1 / 2), the scale of units in ours."""
    (first, _), *_ = weights
    hidden_dims = [len(bias) for _, bias in weights[:-1]]
    layer = pf.transforms.Residual(first.shape[1], hidden_dims, COEFFICIENT, activation="lipswish", **options)
    scale = F.softplus(torch.tensor(0.5))
    with torch.no_grad():
        layer.net.log_scales.fill_(scale.log())
        for linear, (weight, bias) in zip(layer.net.layers, weights, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias if linear is layer.net.layers[-1] else scale * bias)
    return layer


def torchflows_net(weights: Weights) -> nn.Module:
    layers: list[nn.Module] = []
    for weight, bias in weights:
        layer = SpectralLinear(weight.shape[1], len(weight), c=COEFFICIENT)
        with torch.no_grad():
            layer.w.data.copy_(weight)
            layer.bias.copy_(bias)
        layers += [layer, normflows.nets.lipschitz.Swish()]
    return nn.Sequential(*layers[:-1])


class Normflows(nn.Module):
    """A stack of normflows' residual flows, which go from data to base in parallel."""

    def __init__(self, networks: list[Weights], iterations: int, **options: bool) -> None:
        super().__init__()
        dim = networks[0][0][0].shape[1]
        blocks = [normflows.flows.Residual(normflows_net(weights), **options) for weights in networks]
        self.flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(dim, trainable=False), blocks)
        self.iterations = iterations
        self.tolerance = 1e-5

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def after_step(self) -> None:
        normflows.utils.update_lipschitz(self.flow, self.iterations)

    def to_base(self, x: Tensor) -> Tensor:
        for block in reversed(self.flow.flows):
            x = block.iresblock(x)
        return x

    def to_data(self, z: Tensor) -> Tensor:
        for block in self.flow.flows:
            z = block.iresblock._inverse_fixed_point(z, self.tolerance, self.tolerance)
        return z

    def finer(self) -> None:
        self.tolerance /= 2


class Torchflows(nn.Module):
    """A stack of torchflows' residual flow blocks, whose roulette has no terms that are always there."""

    def __init__(self, networks: list[Weights], p: float) -> None:
        super().__init__()
        dim = networks[0][0][0].shape[1]
        # The last network is the first on the way from data to base, as in the other libraries.
        blocks = [ResFlowBlock((dim,), g=torchflows_net(weights), p=p) for weights in reversed(networks)]
        self.flow = Flow(BijectiveComposition(blocks))
        self.iterations = 25

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x)

    def after_step(self) -> None:
        pass

    def to_base(self, x: Tensor) -> Tensor:
        for block in self.flow.bijection.layers:
            x, _ = block.forward(x, skip_log_det=True)
        return x

    def to_data(self, z: Tensor) -> Tensor:
        for block in reversed(self.flow.bijection.layers):
            z, _ = block.inverse(z, skip_log_det=True, n_iterations=self.iterations)
        return z

    def finer(self) -> None:
        self.iterations += 5


class Ours(nn.Module):
    """A stack of our residual layers, which go from data to base in parallel."""

    def __init__(self, networks: list[Weights], **options: Any) -> None:
        super().__init__()
        self.flow = pf.Flow([our_layer(weights, **options).inv for weights in networks])

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow().estimated().log_prob(x)

    def after_step(self) -> None:
        pass

    def to_base(self, x: Tensor) -> Tensor:
        return self.flow.transform.inv(x)

    def to_data(self, z: Tensor) -> Tensor:
        return self.flow.transform(z)

"""Networks of one's own under couplings and autoregressive layers."""

import math
from functools import partial

import torch
from torch import nn

from pyroflows.nets.mlp import zero_initialized
from pyroflows.shapes import shape_of


def convolution(in_dim, out_dim, hidden_dims):
    """A network of one's own that mixes places: the parameters at each depend on its neighbours."""
    first, last = nn.Conv2d(in_dim, *hidden_dims, 3, padding=1), nn.Conv2d(*hidden_dims, out_dim, 3, padding=1)
    return nn.Sequential(first, nn.SiLU(), zero_initialized(last))


class Running(nn.Module):
    """A conditioner of one's own: parameters are linear in the sums of earlier inputs."""

    def __init__(self, order, num_params, hidden_dims, context_dim, channels):
        super().__init__()
        assert order == list(range(len(order)))
        self.weight = nn.Parameter(torch.zeros(channels, channels * num_params))
        self.num_params = num_params

    def forward(self, z, context=None):
        earlier = torch.tanh(z.cumsum(-1) - z)
        return (earlier.mT @ self.weight).mT.unflatten(-2, (-1, self.num_params)).movedim(-2, -1)


class Plain(nn.Module):
    """Parameters that are linear in sums over earlier places, of all channels, and in the context."""

    def __init__(self, order, num_params, hidden_dims, context_dim, channels=()):
        super().__init__()
        self.order, self.num_params, self.channels = order, num_params, shape_of(channels)
        size = math.prod(self.channels)
        self.weight = nn.Parameter(torch.zeros(num_params * size, size))
        self.context = zero_initialized(nn.Linear(context_dim, num_params * size)) if context_dim else None

    def theta(self, earlier, context):
        """``(P, *channels, K)`` from sums ``(C, K)`` and a context ``(K or 1, context_dim)``."""
        theta = self.weight @ earlier + (0 if context is None else self.context(context).T)
        return theta.unflatten(0, (self.num_params, *self.channels))

    def forward(self, z, context=None):
        values = torch.tanh(z)[..., self.order]
        earlier = (values.cumsum(-1) - values)[..., torch.tensor(self.order).argsort()]
        theta = self.weight @ earlier.flatten(-1 - len(self.channels), -2)
        if context is not None:
            theta = theta + self.context(context)[..., None]
        return theta.unflatten(-2, (self.num_params, *self.channels)).movedim(-2 - len(self.channels), -1)


class Stepwise(Plain):
    """The same, evaluated place by place in both directions."""

    def incremental(self, num_rows, context=None):
        return ForwardSteps(self, num_rows, context)

    def with_gradient_steps(self, z, context=None):
        rows = z.detach().reshape(-1, *self.channels, len(self.order))
        return self(z, context), partial(BackwardSteps, self, rows.transpose(0, -1))


class ForwardSteps:
    def __init__(self, net, num_rows, context):
        self.net, self.context = net, context
        self.inputs = net.weight.new_full((len(net.order), *net.channels, num_rows), torch.nan)

    def parameters_at(self, i):
        return self.net.theta(torch.tanh(self.inputs[:i]).sum(0).flatten(0, -2), self.context)


class BackwardSteps:
    def __init__(self, net, z, inputs):
        self.net, self.slopes, self.inputs = net, 1 - torch.tanh(z) ** 2, inputs

    def pull_back(self, i, gradient):
        share = self.net.weight.T @ gradient.reshape(len(self.net.weight), gradient.shape[-1])
        share = share.reshape(*self.net.channels, gradient.shape[-1])
        earlier = self.net.order[:i]
        self.inputs[earlier] += self.slopes[earlier] * share


class Velocity(nn.Module):
    """A velocity of a continuous flow: one hidden layer of places, time and context."""

    def __init__(self, dim, hidden_dims, context_dim):
        super().__init__()
        self.first = nn.Linear(dim + 1 + context_dim, hidden_dims[0])
        self.last = zero_initialized(nn.Linear(hidden_dims[0], dim))

    def forward(self, t, z, context=None):
        inputs = [z, t.unsqueeze(-1), *([] if context is None else [context])]
        return self.last(torch.tanh(self.first(torch.cat(inputs, -1))))

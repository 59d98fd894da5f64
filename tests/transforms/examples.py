"""Layers as a user would write them, by public names alone."""

import torch
from torch import nn

import pyroflows as pf


class EstimatedScale(pf.transforms.FlowTransform):
    r""":math:`x_j = e^{a_j} z_j` with an unbiased estimate of its log-determinant, :math:`v^\top \mathrm{diag}(a) v`.

    v is standard normal, so that :math:`E[v v^\top] = I` (Hutchinson's estimator of a trace).
    """

    ladj_is_exact = False

    def __init__(self, dim):
        super().__init__(dim)
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def _forward_and_ladj(self, z, context):
        return z * self.log_scale.exp(), (torch.randn_like(z) ** 2 * self.log_scale).sum(-1)

    def _inverse_and_ladj(self, x, context):
        return x * (-self.log_scale).exp(), -(torch.randn_like(x) ** 2 * self.log_scale).sum(-1)

    def _exact(self):
        return ExactScale(self)


class ExactScale(pf.transforms.FlowTransform):
    """The view of an :class:`EstimatedScale` whose log-determinant is the trace itself."""

    def __init__(self, layer):
        super().__init__(layer.event_shape)
        self.layer = layer

    def _forward_and_ladj(self, z, context):
        a = self.layer.log_scale
        return z * a.exp(), a.sum().expand(z.shape[:-1])

    def _inverse_and_ladj(self, x, context):
        a = self.layer.log_scale
        return x * (-a).exp(), -a.sum().expand(x.shape[:-1])

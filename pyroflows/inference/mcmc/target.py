"""The target of a sampler: a log-density that may be -inf but not NaN, and a finite gradient."""

import torch
from torch import Tensor

from pyroflows.models.log_joint import ValueAndGrad


def where_finite(value_and_grad: ValueAndGrad) -> ValueAndGrad:
    """Replace log-densities that are NaN or infinite by -inf, and such entries of gradients by 0.

    A proposal with NaN is then rejected, and affects no other chain. The chains stay exact whatever the gradient is,
    since leapfrog steps preserve volume and are reversible for any force that is a function of the position.

    Args:
        value_and_grad: function that gives log-densities and gradients.
    """

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = value_and_grad(z)
        value = torch.where(value.isfinite(), value, -torch.inf)
        return value, torch.where(gradient.isfinite(), gradient, 0.0)

    return run

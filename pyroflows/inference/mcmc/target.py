"""What a sampler moves on: a log density and its gradient, both finite or clearly not."""

import torch
from torch import Tensor

from pyroflows.models.log_joint import ValueAndGrad


def where_finite(value_and_grad: ValueAndGrad) -> ValueAndGrad:
    """The same with log density -inf where it is NaN or infinite, and gradient 0 where that is.

    So NaN stays in the proposal that met it, which is then rejected. Any gradient leaves the chains exact: leapfrog
    steps preserve volume and are reversible whatever function of the position the force is.
    """

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = value_and_grad(z)
        value = torch.where(value.isfinite(), value, -torch.inf)
        return value, torch.where(gradient.isfinite(), gradient, 0.0)

    return run

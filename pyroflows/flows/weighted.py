"""The base of a flow whose elements count several times, since each stands for others."""

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class WeightedNormal(TorchDistribution):
    r"""Independent standard normal elements, whose log-density counts each as many times as its weight says,

    .. math:: \sum_j w_j \log N(z_j; 0, 1).

    Args:
        weights: :math:`w_j`, not negative, ``(dim,)``.

    Example:
        >>> law = WeightedNormal(torch.tensor([1.0, 10.0]))
        >>> law.log_prob(torch.zeros(2)) / dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
        tensor(11.)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"weights": constraints.independent(constraints.nonnegative, 1)}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, weights: Tensor, batch_shape: torch.Size = torch.Size(), validate_args: Any = None) -> None:  # noqa: B008
        self.weights = weights
        super().__init__(batch_shape, weights.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "WeightedNormal":
        return WeightedNormal(self.weights, torch.Size(batch_shape), self._validate_args)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return torch.randn(self._extended_shape(sample_shape), dtype=self.weights.dtype, device=self.weights.device)

    def log_prob(self, value: Tensor) -> Tensor:
        return -(self.weights * (value.square() / 2 + math.log(2 * math.pi) / 2)).sum(-1)

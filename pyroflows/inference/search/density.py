"""A log-density in float64, by one function of a fixed number of rows, so that it has to be compiled only once."""

import math

import torch
from torch import Tensor

from pyroflows.models.log_joint import ValueAndGrad

# The squares of larger values would come near to overflow.
LARGEST_VALUE = 1e60


class Density:
    """The log-density of any number of vectors in float64; where it is not finite, it is -inf with gradient zero.

    Args:
        value_and_grad: vectors ``(num_rows, D)`` to log-densities ``(num_rows,)`` and gradients ``(num_rows, D)``.
        num_rows: the number of vectors in one call of this function.
        starts: a tensor of the dtype and the device that the function takes.

    Attributes:
        num_calls: the number of calls of the function, which are what a search costs.
    """

    def __init__(self, value_and_grad: ValueAndGrad, num_rows: int, starts: Tensor) -> None:
        self.value_and_grad = value_and_grad
        self.num_calls = 0
        self.num_rows = num_rows
        self.starts = starts
        self.eps = torch.finfo(starts.dtype).eps

    def __call__(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Map vectors ``(..., D)`` to values ``(...)`` and gradients ``(..., D)``."""
        flat = vectors.reshape(-1, vectors.shape[-1])
        padding = flat[-1:].expand(-len(flat) % self.num_rows, -1)
        rows = torch.cat([flat, padding]).to(self.starts)
        parts = rows.split(self.num_rows)
        self.num_calls += len(parts)
        values, grads = zip(*[self.value_and_grad(part) for part in parts], strict=True)
        value = torch.cat(values)[: len(flat)].detach().double()
        grad = torch.cat(grads)[: len(flat)].detach().double()
        finite = (value.abs() < LARGEST_VALUE) & (grad.abs() < LARGEST_VALUE).all(-1)
        value, grad = value.where(finite, -torch.inf), grad.where(finite[:, None], 0.0)
        return value.reshape(vectors.shape[:-1]), grad.reshape(vectors.shape)

    def log_weights(self, loc: Tensor, root: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Give log p - log q at the draws that the noise ``(..., M, D)`` makes, and the gradients of log p there."""
        value, grad = self(loc[..., None, :] + noise @ root.mT)
        return value - _log_normal(noise) + torch.linalg.slogdet(root)[1][..., None], grad


def antithetic(num_draws: int, like: Tensor) -> Tensor:
    """Standard normal draws and their negatives, ``(num_draws, D)`` in float64."""
    noise = torch.randn((num_draws + 1) // 2, like.shape[-1], dtype=torch.float64, device=like.device)
    return torch.cat([noise, -noise])[:num_draws]


def _log_normal(noise: Tensor) -> Tensor:
    return -0.5 * noise.square().sum(-1) - 0.5 * noise.shape[-1] * math.log(2 * math.pi)

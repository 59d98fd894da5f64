"""Products of Householder reflections."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.transforms.linear.products import multiply
from pyroflows.transforms.linear.solves import solve


class Reflections(NamedTuple):
    r"""The product :math:`Q = H_1 \cdots H_K` of the reflections :math:`H_k = I - 2 v_k v_k^\top`, in the compact WY
    form (Schreiber and Van Loan 1989, doi:10.1137/0910005).

    .. math:: Q = I - V S^{-1} V^\top, \qquad S = \tfrac12 I + \text{the part of } V^\top V \text{ above the diagonal}

    V has the columns :math:`v_k`, and S is inverted by a triangular solve (Joffrain et al. 2006,
    doi:10.1145/1141885.1141886). To multiply N vectors takes two products with V of O(N D K) and a solve of
    O(N K^2), beside the O(D K^2) of S, rather than K reflections one after the other.

    Args:
        v: the unit vectors as rows, ``(..., K, D)``; a zero vector reflects nothing.
        s: S, ``(..., K, K)``.

    Example:
        >>> q = reflections(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> q.times(torch.tensor([1.0, 2.0])).round(decimals=4).tolist()  # the second one swaps, up to signs
        [2.0, -1.0]
    """

    v: Tensor
    s: Tensor

    def times(self, z: Tensor) -> Tensor:
        """Return ``Q z`` for vectors ``(..., D)``."""
        return z - multiply(self.v.mT, solve(self.s, multiply(self.v, z), upper=True))

    def transpose_times(self, x: Tensor) -> Tensor:
        """Return ``Q^T x``, which is ``Q^-1 x``, for vectors ``(..., D)``."""
        return x - multiply(self.v.mT, solve(self.s.mT, multiply(self.v, x), upper=False))

    def leading_rows(self, count: int) -> Tensor:
        """Return the first columns of Q as rows, ``(..., count, D)``, which are orthonormal."""
        leading = self.v[..., :count]
        dtype = torch.promote_types(leading.dtype, torch.float32)  # there is no solve in half precision
        solved = torch.linalg.solve_triangular(self.s.to(dtype), leading.to(dtype), upper=True).to(leading.dtype)
        identity = torch.eye(count, self.v.shape[-1], dtype=leading.dtype, device=leading.device)
        return identity - solved.mT @ self.v


def reflections(raw: Tensor) -> Reflections:
    """Return the product of the reflections along the rows of a matrix ``(..., K, D)``, of any length."""
    v = unit_vectors(raw)
    half = 0.5 * torch.eye(v.shape[-2], dtype=v.dtype, device=v.device)
    return Reflections(v, (v @ v.mT).triu(1) + half)


def unit_vectors(raw: Tensor) -> Tensor:
    """Return vectors scaled to length one; zero stays zero. They are scaled twice, since small squares underflow."""
    tiny = torch.finfo(raw.dtype).tiny
    return F.normalize(raw / raw.detach().abs().amax(-1, keepdim=True).clamp_min(tiny), dim=-1, eps=tiny)


def paired_directions(count: int, dim: int) -> Tensor:
    """Return random vectors ``(count, dim)`` in equal pairs, whose reflections undo each other.

    A pair turns the plane of its two vectors once they differ; so the product starts at the identity, and any pair can
    leave it.
    """
    return torch.randn(count // 2, dim).repeat_interleave(2, 0)

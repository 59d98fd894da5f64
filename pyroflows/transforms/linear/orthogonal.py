"""Orthogonal layers: products of reflections, the matrix exponential and the Cayley map."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.nets import Parameters
from pyroflows.options import checked_int
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.linear.products import multiply
from pyroflows.transforms.linear.reflections import Reflections, paired_directions, reflections

# Up to D = 64 they can be any rotation; beyond, a call costs less than with the dense matrix of one.
MAX_DEFAULT_REFLECTIONS = 64


class Orthogonal(FlowTransform):
    r"""The rotation :math:`x = Q z` with an orthogonal matrix Q of determinant one, which preserves volume.

    Its parametrisation is one of

    * "householder": :math:`Q = H_1 \cdots H_K`, a product of an even number of Householder reflections
      :math:`H_k = I - 2 v_k v_k^\top / |v_k|^2` (Tomczak and Welling 2016, arXiv:1611.09630, eq. 6), in the compact WY
      form of :class:`pyroflows.transforms.linear.reflections.Reflections`. Both directions take N vectors in
      O(N D K + D K^2). D of them, or D - 1 if D is odd, can be any rotation; fewer turn a subspace of K dimensions;
    * "matrix_exp": :math:`Q = e^{A - A^\top}`, any rotation, in O(D^3 + N D^2);
    * "cayley": :math:`Q = (I + A - A^\top)^{-1} (I - A + A^\top)`, any rotation but half turns, in O(D^3 + N D^2).

    Both directions are parallel. The layer starts at the identity: reflections start in random pairs that undo each
    other.

    Args:
        dim: the event size D.
        num_reflections: K, an even number; None for as many as can be any rotation, but at most 64.
        parametrization: "householder", "matrix_exp" or "cayley".
        context_dim: size of the context that Q depends on, 0 for none.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if the number of reflections is odd or given for another parametrisation, or the parametrisation is
            unknown.

    Example:
        >>> t = Orthogonal(5)
        >>> z = torch.randn(7, 5)
        >>> x, ladj = t.forward_and_ladj(z)
        >>> torch.allclose(x.norm(dim=-1), z.norm(dim=-1)), torch.allclose(t.inv(x), z, atol=1e-5), ladj.abs().max()
        (True, True, tensor(0.))
    """

    def __init__(
        self,
        dim: int,
        num_reflections: int | None = None,
        parametrization: str = "householder",
        context_dim: int = 0,
    ) -> None:
        super().__init__(checked_int("dim", dim), context_dim)
        if parametrization not in _ROTATIONS:
            raise OptionError(f"parametrization must be one of {sorted(_ROTATIONS)}, got {parametrization!r}")
        self.parametrization = parametrization
        if parametrization == "householder":
            value = paired_directions(checked_reflections(num_reflections, dim), dim)
        elif num_reflections is None:
            value = torch.zeros(dim, dim)
        else:
            raise OptionError(f'num_reflections is an option of parametrization="householder", not {parametrization!r}')
        self.parameters_of = Parameters(value, context_dim)

    def _rotation(self, context: Tensor | None) -> "Reflections | Rotation":
        return _ROTATIONS[self.parametrization](self.parameters_of(context))

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._rotation(context).times(z), z.new_zeros(z.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self._rotation(context).transpose_times(x), x.new_zeros(x.shape[:-1])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        rotation = self._rotation(context)
        with torch.no_grad():
            score = rotation.times(score)  # J^-T = Q
        return rotation.times(z), z.new_zeros(z.shape[:-1]), score

    def extra_repr(self) -> str:
        if self.parametrization != "householder":
            return f"{super().extra_repr()}, parametrization={self.parametrization!r}"
        return f"{super().extra_repr()}, num_reflections={len(self.parameters_of.value)}"


class Rotation(NamedTuple):
    """A rotation as a dense matrix.

    Args:
        q: the matrix, ``(..., D, D)``.
    """

    q: Tensor

    def times(self, z: Tensor) -> Tensor:
        return multiply(self.q, z)

    def transpose_times(self, x: Tensor) -> Tensor:
        return multiply(self.q.mT, x)


def exponential(raw: Tensor) -> Rotation:
    """Return the exponential of the skew-symmetric part of matrices ``(..., D, D)``."""
    # There is no matrix exponential in half precision.
    skew = (raw - raw.mT).to(torch.promote_types(raw.dtype, torch.float32))
    return Rotation(torch.linalg.matrix_exp(skew).to(raw.dtype))


def cayley(raw: Tensor) -> Rotation:
    """Return the Cayley transform of the skew-symmetric part of matrices ``(..., D, D)``."""
    skew = (raw - raw.mT).to(torch.promote_types(raw.dtype, torch.float32))
    identity = torch.eye(raw.shape[-1], dtype=skew.dtype, device=skew.device)
    # The system is well conditioned: the singular values of I + S are at least one.
    return Rotation(torch.linalg.solve(identity + skew, identity - skew).to(raw.dtype))


_ROTATIONS: dict[str, Callable[[Tensor], Reflections | Rotation]] = {
    "householder": reflections,
    "matrix_exp": exponential,
    "cayley": cayley,
}


def checked_reflections(num_reflections: int | None, dim: int) -> int:
    """Return a number of reflections if it is even; by default the least that can be any rotation, but at most 64.

    Raises:
        OptionError: if it is not.
    """
    if num_reflections is None:
        return max(2, min(dim - dim % 2, MAX_DEFAULT_REFLECTIONS))
    count = checked_int("num_reflections", num_reflections, least=2)
    if count % 2:
        raise OptionError(
            f"num_reflections must be even, got {count}: an odd number of reflections has determinant -1, and so could "
            "not start at the identity"
        )
    return count

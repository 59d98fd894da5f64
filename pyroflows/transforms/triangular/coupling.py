"""Coupling structure: one part of the dimensions passes unchanged and parametrises the rest."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError
from pyroflows.nets import MLP, Parameters, ResidualMLP
from pyroflows.nets.checks import checked_conditioner
from pyroflows.transforms.base import FlowTransform, Pair, Triple, elementwise_score, pull_back
from pyroflows.transforms.triangular.masks import half
from pyroflows.transforms.univariate import Univariate, univariate_named

Conditioner = Callable[..., nn.Module]
_CONDITIONERS: dict[str, Conditioner] = {"mlp": MLP, "residual": ResidualMLP}


class Coupling(FlowTransform):
    r""":math:`x_A = z_A, \; x_B = T(z_B; \theta(z_A, c))`: the dimensions A, where the mask is true, pass unchanged.

    Both directions are parallel, at one pass of the conditioner each. With the additive map this is a layer of NICE
    (Dinh et al. 2015, arXiv:1410.8516), with the affine map one of RealNVP (Dinh et al. 2017, arXiv:1605.08803).

    Args:
        dim: the event size D.
        univariate: the map T, a name or an instance.
        mask: ``dim`` booleans, true for what passes, see :mod:`pyroflows.transforms.masks`; by default the first half
            of the dimensions passes, and at one dimension, which is then transformed, nothing does.
        conditioner: "mlp", "residual", or a factory called as ``factory(in_dim, out_dim, hidden_dims)`` whose module
            maps ``(..., in_dim)``, that is z_A and the context one after the other, to ``(..., out_dim)``. Where there
            is neither, the parameters are held without a network.
        hidden_dims: widths of the conditioner's hidden layers.
        context_dim: size of the context c.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if the mask does not fit or leaves nothing to pass or to transform, if a name is unknown, or if the
            conditioner contains dropout or batch normalisation.

    Example:
        >>> t = Coupling(4, mask=[True, False, True, False])
        >>> z = torch.randn(5, 4)
        >>> x = t(z)
        >>> torch.equal(x[:, ::2], z[:, ::2]), torch.allclose(t.inv(x), z, atol=1e-5)
        (True, True)
    """

    passing: Tensor
    transformed: Tensor
    place: Tensor

    def __init__(
        self,
        dim: int,
        univariate: str | Univariate = "affine",
        mask: Sequence[bool] | Tensor | None = None,
        conditioner: str | Conditioner = "mlp",
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
    ) -> None:
        super().__init__(dim, context_dim)
        if isinstance(conditioner, str) and conditioner not in _CONDITIONERS:
            raise OptionError(f"conditioner must be one of {sorted(_CONDITIONERS)} or a factory, got {conditioner!r}")
        factory = _CONDITIONERS[conditioner] if isinstance(conditioner, str) else conditioner
        self.univariate = univariate_named(univariate)
        self.mask = _checked_mask(half(dim) if mask is None else torch.as_tensor(mask), dim)
        mask = torch.tensor(self.mask)
        # These follow from the constructor's arguments, so they do not belong in a state_dict.
        self.register_buffer("passing", mask.nonzero().squeeze(-1), persistent=False)
        self.register_buffer("transformed", (~mask).nonzero().squeeze(-1), persistent=False)
        self.register_buffer("place", torch.cat([self.passing, self.transformed]).argsort(), persistent=False)
        self.num_blocks = 1 + sum(a != b for a, b in pairwise(self.mask))

        in_dim = len(self.passing) + context_dim
        out_dim = len(self.transformed) * self.univariate.num_params
        self.conditioner = (
            checked_conditioner(factory(in_dim, out_dim, hidden_dims)) if in_dim else Parameters(torch.zeros(out_dim))
        )

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        z_a, z_b = self._split(z)
        x_b, ladj = self.univariate.forward_and_ladj(z_b, self._theta(z_a, context))
        return self._join(z_a, x_b), ladj.sum(-1)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        x_a, x_b = self._split(x)
        z_b, ladj = self.univariate.inverse_and_ladj(x_b, self._theta(x_a, context))
        return self._join(x_a, z_b), ladj.sum(-1)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        z_a, z_b = self._split(z)
        x_b, ladj = self.univariate.forward_and_ladj(z_b, self._theta(z_a, context))
        score_a, score_b = self._split(score)
        score_b = elementwise_score(z_b, ladj, score_b)
        # What z_A does to log q through x_B and through the log-determinant, by one pass back through the conditioner.
        (through_b,) = pull_back((x_b, ladj), (score_b, torch.ones_like(ladj)), (z_a,))
        return self._join(z_a, x_b), ladj.sum(-1), self._join(score_a - through_b, score_b)

    def _theta(self, z_a: Tensor, context: Tensor | None) -> Tensor:
        if context is not None:
            theta = self.conditioner(torch.cat([z_a, context.expand(*z_a.shape[:-1], self.context_dim)], -1))
        else:
            theta = self.conditioner(z_a) if self.dim > 1 else self.conditioner()
        # Parameter-major in memory, so that each parameter is one contiguous block over the dimensions.
        return theta.unflatten(-1, (self.univariate.num_params, len(self.transformed))).transpose(-1, -2)

    # Where A and B are a block each, splitting and joining take half the time that they take by index.
    def _split(self, z: Tensor) -> Pair:
        if self.num_blocks > 2:
            return z.index_select(-1, self.passing), z.index_select(-1, self.transformed)
        sizes = [len(self.passing), len(self.transformed)]
        if self.mask[0]:
            z_a, z_b = z.split(sizes, -1)
        else:
            z_b, z_a = z.split(sizes[::-1], -1)
        return z_a, z_b

    def _join(self, z_a: Tensor, x_b: Tensor) -> Tensor:
        if self.num_blocks > 2:
            return torch.cat([z_a, x_b], -1).index_select(-1, self.place)
        return torch.cat([z_a, x_b] if self.mask[0] else [x_b, z_a], -1)


def _checked_mask(mask: Tensor, dim: int) -> list[bool]:
    """The mask as a list, if it is one of ``dim`` booleans that leaves something to pass and something to transform."""
    values = mask.tolist()
    if mask.dtype != torch.bool or mask.shape != (dim,):
        raise OptionError(f"mask must be {dim} booleans, true for the dimensions that pass unchanged, got {values}")
    if all(values):
        raise OptionError("a mask that is true everywhere transforms nothing: make it false for some dimensions")
    if dim > 1 and not any(values):
        raise OptionError(
            "a mask that is false everywhere leaves nothing to condition on: make it true for some dimensions, "
            "or use Elementwise"
        )
    return values

"""The coupling structure of discrete layers."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError, ShapeError
from pyroflows.nets import MLP, Conv, DilatedConv, Parameters, ResidualConv, ResidualMLP
from pyroflows.nets.categories import Embedding
from pyroflows.nets.checks import ConditionerFactory, checked_conditioner, checked_factory
from pyroflows.nets.constants import Constants
from pyroflows.shapes import described
from pyroflows.transforms.discrete.base import DiscreteTransform
from pyroflows.transforms.discrete.maps import MAPS, MapFactory, Sorting
from pyroflows.transforms.triangular import masks

VECTOR_NETS: dict[str, ConditionerFactory] = {"mlp": MLP, "residual": ResidualMLP}
SEQUENCE_NETS: dict[str, ConditionerFactory] = {
    "conv": Conv,
    "dilated_conv": DilatedConv,
    "residual_conv": ResidualConv,
}


class DiscreteCoupling(Constants, DiscreteTransform):
    r"""The discrete coupling :math:`x_A = z_A, \; x_B = T(z_B; \theta(z_A, c))` of categories (Tran et al. 2019,
    arXiv:1905.10347, "bipartite"), where the mask marks the places A and T is a bijection of 0 to K - 1.

    Both directions are parallel and cost one pass of the conditioner each.

    Args:
        length: number of places of a sequence.
        num_categories: number of categories K, at least 2.
        univariate: the map T, "additive" or "affine" as in :class:`DiscreteAutoregressive`; or "permutation" for the
            category of rank z among learned scores of all categories.
        mask: one boolean for each place, true for those that pass, see :mod:`pyroflows.transforms.masks`; None lets
            every second pass.
        conditioner: "mlp" or "residual", networks of all places that pass; or "conv", "residual_conv" or
            "dilated_conv", convolutions along the sequence, for long ones, of which the last sees farthest. Or a
            factory of such convolutions, which is called as ``factory(in_dim, out_dim, hidden_dims)`` and maps ``(N,
            in_dim, length)`` to ``(N, out_dim, length)``.
        hidden_dims: widths of the conditioner's hidden layers.
        context_dim: size of the context c, 0 for none; with convolutions also ``(context_channels, length)``.
        embedding_dim: size of the vectors, learned, as which the network sees categories; None for one-hot vectors.
        temperature: the temperature at which relaxations start, see :class:`DiscreteTransform`.

    Shapes: z and x are ``(..., length)``, a context is ``(..., *context_shape)``.

    Raises:
        OptionError: if the mask does not fit or leaves nothing to pass or to transform, a name is unknown, a size or
            the temperature is not positive, or the conditioner takes no context of this shape or has dropout.
        DataError: at a call, if a value is none of the categories, where values are validated.
        ShapeError: at a call, if the conditioner gives parameters of another shape.

    Example:
        >>> t = DiscreteCoupling(4, num_categories=6, mask=[True, True, False, False])
        >>> z = torch.randint(6, (5, 4))
        >>> x = t(z)
        >>> torch.equal(x[:, :2], z[:, :2]), torch.equal(t.inv(x), z)
        (True, True)
    """

    # In the direction of density the permutation is then that of ranks, which learns by the gradient that fits best.
    maps: ClassVar[dict[str, MapFactory]] = {**MAPS, "permutation": Sorting}
    passing: Tensor
    transformed: Tensor
    passes: Tensor

    def __init__(
        self,
        length: int,
        num_categories: int,
        univariate: str = "affine",
        mask: Sequence[bool] | Tensor | None = None,
        conditioner: str | ConditionerFactory = "mlp",
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int | Sequence[int] = 0,
        embedding_dim: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(length, num_categories, univariate, context_dim, temperature)
        self.mask = _checked_mask(masks.alternating(self.dim) if mask is None else mask, self.dim)
        self.register_constants()
        self.embedding = Embedding(self.num_categories, embedding_dim)
        self.sees_sequence = not (isinstance(conditioner, str) and conditioner in VECTOR_NETS)
        self.conditioner = checked_conditioner(self._network(conditioner, hidden_dims))

    def _network(self, conditioner: str | ConditionerFactory, hidden_dims: Sequence[int]) -> nn.Module:
        size, num_params, context_shape = self.embedding.dim, self.univariate.num_params, self.context_shape
        is_sequence = len(context_shape) > 1
        if is_sequence and not (self.sees_sequence and context_shape[1:] == (self.dim,)):
            raise OptionError(
                f"DiscreteCoupling takes a context vector or, with convolutions, (channels, {self.dim}), but got a "
                f"context of {described(context_shape)}"
            )
        if self.sees_sequence:
            # A channel marks the places that pass.
            sizes = size + 1 + sum(context_shape[:1]), num_params, hidden_dims
            if not isinstance(conditioner, str):
                return checked_factory(conditioner)(*sizes)
            if conditioner not in SEQUENCE_NETS:
                names = sorted([*VECTOR_NETS, *SEQUENCE_NETS])
                raise OptionError(f"conditioner must be one of {names} or a factory, got {conditioner!r}")
            return SEQUENCE_NETS[conditioner](*sizes, 1)
        in_dim, out_dim = len(self.passing) * size + self.context_dim, len(self.transformed) * num_params
        if not in_dim:
            return Parameters(torch.zeros(out_dim))
        return VECTOR_NETS[str(conditioner)](in_dim, out_dim, hidden_dims)

    def constants(self) -> dict[str, Tensor | None]:
        mask = torch.tensor(self.mask)
        return {
            "passing": mask.nonzero().squeeze(-1),
            "transformed": (~mask).nonzero().squeeze(-1),
            "passes": mask.to(torch.get_default_dtype()),
        }

    def _theta(self, one_hot: Tensor, context: Tensor | None) -> Tensor:
        """Return the parameters ``(..., number of transformed places, num_params)``."""
        theta = (
            self._theta_of_sequence(one_hot, context) if self.sees_sequence else self._theta_of_vector(one_hot, context)
        )
        return theta.expand(*one_hot.shape[:-2], *theta.shape[-2:])

    def _theta_of_vector(self, one_hot: Tensor, context: Tensor | None) -> Tensor:
        seen = self.embedding(one_hot.index_select(-2, self.passing)).flatten(-2)
        if context is not None:
            seen = torch.cat([seen, context.expand(*seen.shape[:-1], -1)], -1)
        theta = self.conditioner(seen) if seen.shape[-1] else self.conditioner()
        return theta.unflatten(-1, (-1, self.univariate.num_params))

    def _theta_of_sequence(self, one_hot: Tensor, context: Tensor | None) -> Tensor:
        seen = self.embedding(one_hot).mT * self.passes
        parts = [seen, self.passes.expand(*seen.shape[:-2], 1, -1)]
        if context is not None:
            context = context if len(self.context_shape) > 1 else context[..., None]
            parts.append(context.expand(*seen.shape[:-2], -1, self.dim))
        inputs = torch.cat(parts, -2)
        inputs = inputs.reshape(-1, *inputs.shape[-2:])
        theta = self.conditioner(inputs)
        expected = (len(inputs), self.univariate.num_params, self.dim)
        if theta.shape != expected:
            raise ShapeError(
                f"the conditioner of DiscreteCoupling must map {tuple(inputs.shape)} to {expected}, but gave "
                f"{tuple(theta.shape)}"
            )
        theta = theta.index_select(-1, self.transformed).mT
        return theta.reshape(*seen.shape[:-2], *theta.shape[1:])

    def _forward_categories(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._of_categories(self.univariate.forward, z, context)

    def _inverse_categories(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self._of_categories(self.univariate.inverse, x, context)

    def _of_categories(self, function: Callable[..., Tensor], value: Tensor, context: Tensor | None) -> Tensor:
        part = function(value.index_select(-1, self.transformed), self._theta(self.one_hot(value), context))
        return value.index_copy(-1, self.transformed, part)

    def _forward_one_hot(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._of_one_hot(self.univariate.one_hot_forward, z, context)

    def _inverse_one_hot(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self._of_one_hot(self.univariate.one_hot_inverse, x, context)

    def _of_one_hot(self, function: Callable[..., Tensor], value: Tensor, context: Tensor | None) -> Tensor:
        theta = self._theta(self._seen(value), context)
        part = function(value.index_select(-2, self.transformed), theta, self.temperature)
        return value.index_copy(-2, self.transformed, part)


def _checked_mask(mask: Sequence[bool] | Tensor, length: int) -> list[bool]:
    """Return the mask as a list if it has a boolean for each place, and lets some pass, but not all."""
    given = torch.as_tensor(mask)
    if given.dtype != torch.bool or given.shape != (length,):
        raise OptionError(
            f"the mask of DiscreteCoupling must be {length} booleans, true for places that pass, got {mask}"
        )
    if given.all() or (length > 1 and not given.any()):
        what = "transforms nothing" if given.all() else "leaves nothing to condition on"
        raise OptionError(f"the mask of DiscreteCoupling is the same at all places, which {what}")
    values: list[bool] = given.tolist()
    return values

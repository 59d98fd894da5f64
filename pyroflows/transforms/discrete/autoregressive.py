"""The autoregressive structure of discrete layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.compiling.eager import runs_in_python
from pyroflows.errors import OptionError
from pyroflows.nets import MADE, CausalConv, ResMADE
from pyroflows.nets.categories import OnCategories
from pyroflows.nets.checks import ConditionerFactory, checked_factory
from pyroflows.options import as_int
from pyroflows.shapes import as_given, described
from pyroflows.transforms.discrete.base import DiscreteTransform

CONDITIONERS: dict[str, ConditionerFactory] = {"made": MADE, "residual": ResMADE, "causal_conv": CausalConv}


class DiscreteAutoregressive(DiscreteTransform):
    r"""The autoregressive discrete layer :math:`x_j = T(z_j; \theta_j(z_{<j}, c))` of categories (Tran et al. 2019,
    arXiv:1905.10347), where T is a bijection of 0 to K - 1 and one network computes all :math:`\theta_j`.

    The forward direction is parallel; the inverse computes one place after the other, for about the cost of two passes
    if the conditioner can be evaluated place by place (:class:`pyroflows.nets.Incremental`), and of a pass for each
    place otherwise. The inverse of this layer scores in one pass, and :class:`pyroflows.flows.DiscreteAutoregressive`
    stacks inverses.

    Args:
        length: number of places of a sequence.
        num_categories: number of categories K, at least 2.
        univariate: the map T: "additive" for :math:`(\mu + z) \bmod K`, "affine" for :math:`(\mu + \sigma z) \bmod K`
            with units :math:`\sigma` modulo K, or "permutation" for the rank of z among learned scores of all
            categories, which can be any permutation. See :mod:`pyroflows.transforms.discrete.maps`.
        order: a permutation of ``range(length)``; ``order[i]`` is the index at place i. None for ascending order.
        conditioner: "made", "residual" or "causal_conv"; or a factory, see
            :class:`pyroflows.transforms.Autoregressive`, which gets ``channels=``, the size of an embedding.
        hidden_dims: widths of the conditioner's hidden layers.
        context_dim: size of the context c, 0 for none; with "causal_conv" or a factory also ``(context_channels,
            length)``.
        embedding_dim: size of the vectors, learned, as which the network sees categories; None for one-hot vectors.
        temperature: the temperature at which relaxations start, see :class:`DiscreteTransform`.

    Shapes: z and x are ``(..., length)``, a context is ``(..., *context_shape)``.

    Raises:
        OptionError: if ``order`` is not a permutation, a name is unknown, a size or the temperature is not positive,
            or the conditioner takes no context of this shape or has dropout.
        DataError: at a call, if a value is none of the categories, where values are validated.
        ShapeError: at a call, if the conditioner gives parameters of another shape.

    Example:
        >>> t = DiscreteAutoregressive(4, num_categories=6)
        >>> z = torch.randint(6, (5, 4))
        >>> torch.equal(t.inv(t(z)), z)
        True
    """

    def __init__(
        self,
        length: int,
        num_categories: int,
        univariate: str = "affine",
        order: Sequence[int] | None = None,
        conditioner: str | ConditionerFactory = "made",
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int | Sequence[int] = 0,
        embedding_dim: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(length, num_categories, univariate, context_dim, temperature)
        self.order = checked_order(order, self.dim, type(self).__name__)
        factory = conditioner_named(conditioner, self.context_shape, type(self).__name__)
        size, context = self.univariate.num_params, as_given(self.context_shape)
        self.conditioner = OnCategories(
            factory, self.order, self.num_categories, size, hidden_dims, context, embedding_dim
        )

    def _forward_categories(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.univariate(z, self.conditioner(self.one_hot(z), context))

    def _inverse_categories(self, x: Tensor, context: Tensor | None) -> Tensor:
        rows = x.reshape(-1, self.dim)
        invert = self.univariate.inverse
        z = self.conditioner.by_place(rows, self._context_rows(x, context), invert).reshape(x.shape)
        if not runs_in_python():
            return z
        # Steps and passes round differently, which decides where two parameters are nearly equal. The parameters of a
        # pass are those that count; they depend on earlier places, so that values settle, nearly always at once.
        for _ in self.order:
            last, z = z, invert(x, self.conditioner(self.one_hot(z), context))
            if torch.equal(z, last):
                break
        return z

    def _forward_one_hot(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.univariate.one_hot_forward(z, self.conditioner(self._seen(z), context), self.temperature)

    def _inverse_one_hot(self, x: Tensor, context: Tensor | None) -> Tensor:
        # One pass of the network for each place; parameters at a place do not depend on those that are not known yet.
        columns = [torch.zeros_like(x[..., 0, :])] * self.dim
        for j in self.order:
            theta = self.conditioner(self._seen(torch.stack(columns, -2)), context)[..., j, :]
            columns[j] = self.univariate.one_hot_inverse(x[..., j, :], theta, self.temperature)
        return torch.stack(columns, -2)

    def _context_rows(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """Return the contexts of all rows of x, ``(N, *context_shape)``."""
        if context is None:
            return None
        return context.expand(*x.shape[:-1], *self.context_shape).reshape(-1, *self.context_shape)


def checked_order(order: Sequence[int] | None, length: int, name: str) -> list[int]:
    """Return an order as a list; None stands for the ascending one.

    Raises:
        OptionError: if it is no permutation of ``range(length)``.
    """
    given = range(length) if order is None else list(order)
    found = [place for place in map(as_int, given) if place is not None]
    if len(given) != length or sorted(found) != list(range(length)):
        raise OptionError(f"the order of {name} must be a permutation of 0 to {length - 1}, got {order}")
    return found


def conditioner_named(
    conditioner: str | ConditionerFactory, context_shape: torch.Size, owner: str
) -> ConditionerFactory:
    """Return the factory of autoregressive networks of this name, or the user's own.

    Args:
        conditioner: the name or the factory.
        context_shape: the shape of the context that the network is to take, empty for none.
        owner: the name of what owns the network, for messages.

    Raises:
        OptionError: if the name is unknown, or these networks take no context of this shape.
    """
    if not isinstance(conditioner, str):
        return checked_factory(conditioner)
    if conditioner not in CONDITIONERS:
        raise OptionError(f"conditioner must be one of {sorted(CONDITIONERS)} or a factory, got {conditioner!r}")
    if conditioner in ("made", "residual") and len(context_shape) > 1:
        raise OptionError(
            f"{owner} with conditioner={conditioner!r} takes a context vector, but got a context of "
            f'{described(context_shape)}: use "causal_conv" for sequences, or a factory'
        )
    return CONDITIONERS[conditioner]

"""Factories of the triangular layers that recipes stack; :class:`pyroflows.flows.stacking.StackedFlow` calls them."""

from collections.abc import Sequence

from pyroflows.flows.stacking import Conditioner, LayerFactory
from pyroflows.options import checked_int
from pyroflows.transforms import Autoregressive, BlockAutoregressive, Coupling, FlowTransform, masks
from pyroflows.transforms.univariate import Univariate


def autoregressive(
    dim: int,
    univariate: str | Univariate,
    hidden_dims: Sequence[int],
    conditioner: Conditioner,
    order: Sequence[int] | None,
) -> LayerFactory:
    """Return a factory of autoregressive layers, of this order or ascending and descending by turns."""
    dim = checked_int("dim", dim)
    return lambda is_turned, context_dim: Autoregressive(
        dim, univariate, _turned(dim, order, is_turned), conditioner, hidden_dims, context_dim
    )


def inverse_autoregressive(
    dim: int,
    univariate: str | Univariate,
    hidden_dims: Sequence[int],
    conditioner: Conditioner,
    order: Sequence[int] | None,
) -> LayerFactory:
    """Return a factory of inverses of the layers of :func:`autoregressive`."""
    layer = autoregressive(dim, univariate, hidden_dims, conditioner, order)
    return lambda is_turned, context_dim: layer(is_turned, context_dim).inv


def inverse_block_autoregressive(dim: int, hidden_dims: Sequence[int], order: Sequence[int] | None) -> LayerFactory:
    """Return a factory of inverses of block autoregressive layers, of this order or ascending and descending by turns."""
    dim = checked_int("dim", dim)
    return lambda is_turned, context_dim: (
        BlockAutoregressive(dim, _turned(dim, order, is_turned), hidden_dims, context_dim).inv
    )


def _turned(dim: int, order: Sequence[int] | None, is_turned: bool) -> Sequence[int]:
    """Return the order that all layers have, if there is one, or the ascending or descending one."""
    return range(dim)[:: -1 if is_turned else 1] if order is None else order


def coupling(
    dim: int, univariate: str | Univariate, hidden_dims: Sequence[int], conditioner: Conditioner
) -> LayerFactory:
    """Return a factory of couplings, which transform one half of the dimensions and the other by turns."""
    dim = checked_int("dim", dim)
    half = masks.half(dim)

    def layer(is_turned: bool, context_dim: int) -> FlowTransform:
        # A single dimension has no other half.
        mask = ~half if is_turned and dim > 1 else half
        return Coupling(dim, univariate, mask, conditioner, hidden_dims, context_dim)

    return layer

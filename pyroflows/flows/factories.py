"""Factories of the layers that recipes stack; :class:`pyroflows.flows.stacking.StackedFlow` calls them."""

from collections.abc import Sequence

from pyroflows.errors import OptionError
from pyroflows.flows.stacking import Conditioner, LayerFactory
from pyroflows.options import checked_int
from pyroflows.transforms import (
    Autoregressive,
    BlockAutoregressive,
    Compose,
    Coupling,
    Elementwise,
    FlowTransform,
    Residual,
    masks,
)
from pyroflows.transforms.residual.log_det import LogDet
from pyroflows.transforms.univariate import Affine, Univariate

# Up to so many dimensions a step with the exact log-determinant takes at most about 1.3 times as long as one with the
# estimate, with one hidden layer of 64 units, and has no noise; in twice as many it takes three times as long.
MAX_EXACT_DIM = 16


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
    """Return a factory of inverses of block autoregressive layers; orders are those of :func:`autoregressive`."""
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


def residual_block(
    dim: int,
    hidden_dims: Sequence[int],
    coefficient: float,
    activation: str,
    log_det: str | LogDet | None,
    parallel: str,
) -> LayerFactory:
    """Return a factory of residual layers, each with a location and scale of each dimension at its data end."""
    dim = checked_int("dim", dim)
    if parallel not in ("sampling", "scoring"):
        raise OptionError(f'parallel must be "sampling" or "scoring", got {parallel!r}')
    if log_det is None:
        log_det = "exact" if dim <= MAX_EXACT_DIM else "roulette"

    def layer(_: bool, context_dim: int) -> FlowTransform:
        residual = Residual(dim, hidden_dims, coefficient, context_dim, activation, log_det)
        affine = Elementwise(dim, Affine(None, None), context_dim)
        return Compose([residual if parallel == "sampling" else residual.inv, affine])

    return layer

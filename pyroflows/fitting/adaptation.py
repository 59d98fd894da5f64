"""Read and divide the data of a fit, and let the flow learn from them what it learns before training."""

from torch import Tensor

from pyroflows.arrays import ArrayLike
from pyroflows.fitting.dequantization import adapt_to_integers
from pyroflows.flows import Flow
from pyroflows.training.data import Data, DataLike, load
from pyroflows.training.ill_posed import check_density
from pyroflows.training.shuffling import split


def adapted_to(
    flow: Flow,
    x: DataLike,
    context: ArrayLike | None,
    weights: ArrayLike | None,
    validation: float,
    are_integers: bool,
) -> tuple[Data, Tensor, Tensor]:
    """Return the data, and the indices of training rows ``(n,)`` and validation rows ``(m,)``, to which a flow adapts.

    The first fit stores location and scale of the training rows in the flow; a further fit goes on from there.

    Args:
        flow: the flow to be fitted.
        x: rows, as for :func:`pyroflows.fit_density`.
        context: rows of contexts, or None.
        weights: weights of the rows, or None.
        validation: the fraction of the rows to validate with.
        are_integers: whether the rows are integers that the flow sees with noise.

    Raises:
        ShapeError: if numbers of rows or columns do not fit.
        DataError: if values cannot be used; the message names the row or the columns.

    Example:
        >>> flow = pf.flows.MAF(2)
        >>> data, training, held_out = adapted_to(flow, torch.randn(100, 2), None, None, 0.1, are_integers=False)
        >>> len(training), len(held_out), flow.is_adapted
        (90, 10, True)
    """
    data = load(flow, x, context, weights, are_integers)
    training, held_out = split(data.rows, validation, may_be_constant=flow.support.is_discrete)
    check_density(flow, data.rows, training, data.are_integers)
    if data.are_integers:
        adapt_to_integers(flow, data.rows[training])
    elif not flow.is_adapted:
        rows = data.rows[training]
        flow.adapt(rows.x, rows.context, rows.weights)
    return data, training, held_out

"""Read the data of a fit as rows of numbers in the dtype and on the device of a flow."""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from pyroflows.arrays import ArrayLike, as_numbers, floating_tensor, labels_of, require_one_index, require_values
from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.flows import Flow
from pyroflows.shapes import counted, described
from pyroflows.training.integers import dequantized, refuse_fractions, uniform_noise
from pyroflows.training.refusals import refuse, refuse_lost_digits, refuse_outside
from pyroflows.transforms.discrete.stacks import maps_categories
from pyroflows.transforms.wild import wild_elements_among

DataLike: TypeAlias = ArrayLike | Dataset
# Elements that are hashed at once, so that little memory is needed; and an odd number whose bits are as if at random.
NUM_HASHED, MULTIPLIER = 1_000_000, 0x1E3779B97F4A7C15


@dataclass(frozen=True)
class Rows:
    """Rows are n events with their contexts and weights; an index of rows gives the rows there.

    Args:
        x: events ``(n, *event_shape)``; of integers it is the integers plus noise between 0 and 1.
        context: contexts ``(n, *context_shape)``, or None.
        weights: ``(n,)``, not negative.
        is_wild: which rows ``(n,)`` have a wild element in x or in their context, see
            :func:`pyroflows.transforms.wild.wild_elements`.
        group: numbers ``(n,)`` that are the same for rows of equal x and context, see :func:`equal_rows`.
    """

    x: Tensor
    context: Tensor | None
    weights: Tensor
    is_wild: Tensor
    group: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> "Rows":
        context = None if self.context is None else self.context[index]
        return Rows(self.x[index], context, self.weights[index], self.is_wild[index], self.group[index])


@dataclass(frozen=True)
class Data:
    """Data hold all rows as they were read first, and the Dataset from which they are read again, if there is one.

    Args:
        rows: all rows.
        dataset: the Dataset that training batches are read from, so that an augmentation is drawn afresh; None to take
            them from ``rows``.
        are_integers: whether x are integers, to which each batch has noise of its own.
    """

    rows: Rows
    dataset: Dataset | None
    are_integers: bool = False

    def batch(self, index: Tensor) -> Rows:
        """Return the rows at an index ``(B,)`` to train on."""
        rows = self.rows[index]
        if self.dataset is not None:
            x, context = _read(self.dataset, index)
            rows = replace(rows, x=x.to(rows.x), context=None if context is None else context.to(rows.x))
        if self.are_integers:
            integers = rows.x.floor()
            rows = replace(rows, x=dequantized(integers, uniform_noise(integers)))
        return rows


def load(
    flow: Flow,
    x: DataLike,
    context: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    are_integers: bool = False,
) -> Data:
    """Read data for a flow, and check each row.

    Args:
        flow: the flow to be fitted.
        x: rows ``(n, *event_shape)``, n at least 2, or a Dataset whose items are ``x`` or ``(x, context)``.
        context: rows ``(n, *context_shape)`` if the flow takes a context and ``x`` is not a Dataset.
        weights: weights of the rows ``(n,)``, not negative; None for equal weights.
        are_integers: whether x are integers that the flow sees with uniform noise between 0 and 1.

    Raises:
        ShapeError: if numbers of rows or columns do not fit.
        DataError: if values cannot be used; the message names the row and the column. Also if frames have different
            indices.
        OptionError: if ``x`` is a Dataset and ``context`` is given, or the flow is on the meta device.

    Example:
        >>> data = load(pf.flows.MAF(2), np.zeros((3, 2)))
        >>> data.rows.x.shape, data.rows.weights
        (torch.Size([3, 2]), tensor([1., 1., 1.]))
    """
    require_values(flow)
    dataset = x if isinstance(x, Dataset) and not isinstance(x, TensorDataset) else None
    if isinstance(x, Dataset):
        if context is not None:
            raise OptionError("the context of a Dataset comes with its items, (x, context), not as an argument")
        x, context = _read_all(x)
    require_one_index(x=x, context=context, weights=weights)
    values = _rows("x", x, flow.event_shape, flow)
    if len(values) < 2:
        raise DataError(f"x has {counted(len(values), 'row')}: a density needs more, at least 2 rows")
    contexts, masses = contexts_of(context, len(values), flow), _weights(weights, len(values), flow)
    if are_integers:
        refuse_fractions(values, labels_of(x))
        y = dequantized(values, uniform_noise(values))
        refuse_outside(flow.support, y, labels_of(x), "x plus noise between 0 and 1")
        # Noise would give a spread to columns in which nearly all integers agree, and make the others wild.
        is_wild = _wild_rows(values, masses, is_by_channel(flow))
    else:
        y = values
        refuse_outside(flow.support, y, labels_of(x))
        # Of x as the layer of location and scale takes it: a value of a bounded support is far out only on that scale.
        # The number of a category says nothing of how far out it is.
        is_wild = (
            torch.zeros(len(y), dtype=torch.bool, device=y.device)
            if maps_categories(flow)
            else _wild_rows(flow.before_support(y), masses, is_by_channel(flow))
        )
    if contexts is not None:
        is_wild = is_wild | _wild_rows(contexts, masses)
    # Equal rows of a discrete law are draws of one value, not repetitions of one draw. Images are too large for that.
    is_discrete = flow.support.is_discrete or (are_integers and len(flow.event_shape) == 1)
    group = torch.arange(len(y)).to(y.device) if is_discrete else equal_rows(values, contexts)
    return Data(Rows(y, contexts, masses, is_wild, group), dataset, are_integers)


def is_by_channel(flow: Flow) -> bool:
    """Tell whether a flow, or each component of a mixture, has one location and scale for all places of a channel."""
    layers = [part.standardization for part in flow.components]
    return all(layer is not None and layer.by_channel for layer in layers)


def equal_rows(x: Tensor, context: Tensor | None = None) -> Tensor:
    """Return numbers ``(n,)``, from 0 on, that are the same for equal rows, and different for others.

    Rows are compared by a hash of 64 bits, since a sort of many whole rows takes ten times as long.

    Args:
        x: rows ``(n, *event_shape)``.
        context: rows ``(n, *context_shape)``, or None.

    Example:
        >>> equal_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]))[[0, 2]].diff()
        tensor([0])
    """
    rows = x.flatten(1) if context is None else torch.cat([x.flatten(1), context.flatten(1)], 1)
    factors = torch.randint(2**62, rows.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 + 1
    hashes = []
    for part in rows.split(max(1, NUM_HASHED // max(1, rows.shape[1]))):
        # The sum gives -0.0 and 0.0 the same bits; shifts bring the leading bits, in which numbers differ, to others.
        bits = (part.cpu().double() + 0.0).view(torch.int64)
        bits = (bits ^ (bits >> 32)) * MULTIPLIER
        hashes.append(((bits ^ (bits >> 29)) * factors).sum(1))
    return torch.cat(hashes).unique(return_inverse=True)[1].to(x.device)


def _read_all(dataset: Dataset) -> tuple[Any, Any]:
    if isinstance(dataset, TensorDataset):
        return _x_and_context(dataset.tensors)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError("a Dataset must have a length and items by index, for the split and the shuffling")
    return _read(dataset, torch.arange(len(dataset)))


def _read(dataset: Dataset, index: Tensor) -> tuple[Any, Any]:
    items = [dataset[i] for i in index.tolist()]
    try:
        return _x_and_context(default_collate(items))
    except (RuntimeError, TypeError) as error:
        raise DataError(f"items of the Dataset cannot be stacked: {error}") from error


def _x_and_context(batch: Any) -> tuple[Any, Any]:
    parts = batch if isinstance(batch, list | tuple) else [batch]
    if len(parts) not in (1, 2) or not all(isinstance(part, Tensor) for part in parts):
        raise DataError("items of a Dataset must be x or (x, context), each a tensor or an array")
    return parts[0], parts[1] if len(parts) == 2 else None


def _rows(name: str, values: Any, shape: torch.Size, flow: Flow) -> Tensor:
    """Return values as a tensor ``(n, *shape)`` that is checked; messages call the elements of a row columns."""
    is_series, labels = hasattr(values, "to_frame"), labels_of(values)
    given = as_numbers(name, values).detach()
    values = _cast(given, flow)
    if values.dim() == 2 and len(shape) == 1 and values.shape[1:] != shape:
        raise ShapeError(f"{name} has {values.shape[1]} columns, but the flow has {shape[0]} of {name}")
    if values.dim() == 0 or values.shape[1:] != shape:
        column = f"{name}.to_frame()" if is_series else f"{name}[:, None]"
        hint = f": give {column}" if values.dim() == 1 and shape == (1,) else ""
        if name == "x" and maps_categories(flow):
            hint = ": give integers, which one_hot.argmax(-1) are, or make the flow with one_hot=True"
            if len(shape) > 1:
                hint = ": give one-hot vectors, which torch.nn.functional.one_hot makes, or make the flow of integers"
        if name == "context" and not given.is_floating_point():
            hint = ": classes are one-hot vectors, which torch.nn.functional.one_hot makes"
        expected = ", ".join(map(str, shape))
        raise ShapeError(f"{name} must have shape (rows, {expected}), got {tuple(values.shape)}{hint}")
    refuse(~given.isfinite(), given, name, "NaN or infinite values", labels)
    refuse(~values.isfinite(), given, name, f"values beyond the range of {values.dtype}", labels)
    refuse_lost_digits(name, given, values)
    return values


def event_rows(x: Any, flow: Flow) -> Tensor:
    """Read events ``(n, *event_shape)`` for a flow, and check that they are finite numbers.

    Args:
        x: a tensor, an array or a frame of these rows.
        flow: the flow.

    Raises:
        ShapeError: if the shape of the events does not fit.
        DataError: if values cannot be used; the message names the row and the column. Also if they are a Dataset.
    """
    if isinstance(x, Dataset):
        raise DataError(
            f"x is a {type(x).__name__}: give its rows as a tensor, torch.stack([dataset[i][0] for i in "
            "range(len(dataset))]) if its items are tuples"
        )
    return _rows("x", x, flow.event_shape, flow)


def context_rows(context: Any, flow: Flow) -> Tensor:
    """Read contexts ``(n, *context_shape)`` for a flow, and check each row.

    Args:
        context: a tensor or an array of these rows.
        flow: a flow that takes a context.

    Raises:
        ShapeError: if the shape of the contexts does not fit.
        DataError: if values cannot be used; the message names the row and the column.
    """
    return _rows("context", context, flow.context_shape, flow)


def contexts_of(context: Any, num_rows: int, flow: Flow) -> Tensor | None:
    """Read the contexts of so many rows, as :func:`context_rows` does; None for a flow that takes none.

    Raises:
        ShapeError: if the flow needs a context and gets none, or the other way round, or their number does not fit.
        DataError: if values cannot be used; the message names the row and the column.
    """
    if context is None and not flow.context_dim:
        return None
    if context is None:
        raise ShapeError(f"this flow needs a context of {described(flow.context_shape)} for each row, but got none")
    if not flow.context_dim:
        raise ShapeError("this flow takes no context, but got one: make it with context_dim")
    values = context_rows(context, flow)
    if len(values) != num_rows:
        raise ShapeError(f"x has {num_rows} rows, but context has {len(values)}")
    return values


def _weights(weights: Any, num_rows: int, flow: Flow) -> Tensor:
    given = torch.ones(num_rows) if weights is None else as_numbers("weights", weights)
    values = _cast(given.detach(), flow)
    if values.shape != (num_rows,):
        raise ShapeError(f"weights must have shape ({num_rows},), one a row of x, got {tuple(values.shape)}")
    refuse(~(values.isfinite() & (values >= 0)), values, "weights", "negative, NaN or infinite values")
    return values


def _wild_rows(values: Tensor, weights: Tensor, by_channel: bool = False) -> Tensor:
    return wild_elements_among(values, weights > 0, by_channel).flatten(1).any(1)


def _cast(values: Tensor, flow: Flow) -> Tensor:
    like = floating_tensor(flow)
    return values.to(torch.get_default_dtype() if like is None else like)

"""Read numbers in the forms in which users hold them: tensors, NumPy arrays, lists, pandas frames and series."""

import sys
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pyroflows.errors import DataError, OptionError
from pyroflows.shapes import places

# Whatever as_numbers takes; NumPy's type has nested sequences, and frames by the protocol that they share with arrays.
ArrayLike: TypeAlias = Tensor | npt.ArrayLike

# What makes numbers of strings, for messages.
_CODES = "np.unique(x, return_inverse=True)[1].reshape(np.shape(x))"
_OF_CONTEXTS = "and a context one-hot columns"


def as_numbers(name: str, values: Any) -> Tensor:
    """Return values as a tensor of real numbers: a tensor as it is, anything else in float64.

    Args:
        name: what the values are, for the message.
        values: a tensor, a NumPy array, numbers in lists, or a pandas frame or series.

    Raises:
        DataError: if they are no real numbers, or sparse; the message names the column of a frame.

    Example:
        >>> as_numbers("x", [[1, 2], [3, 4]]).dtype
        torch.float64
    """
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(_array(name, values))
    if tensor.layout is not torch.strided:
        raise DataError(f"{name} is a sparse tensor: make it dense by to_dense()")
    if tensor.is_complex():
        raise DataError(f"{name} holds complex numbers: give real and imaginary parts as columns")
    return tensor


def as_tensor(name: str, values: Any, like: Tensor | None) -> Tensor:
    """Return values as a tensor of the dtype and device of another one; one that has them is returned itself.

    Args:
        name: what the values are, for the message.
        values: whatever :func:`as_numbers` takes.
        like: the other tensor; None to keep the dtype and device of a tensor.

    Raises:
        DataError: if the values are no real numbers.

    Example:
        >>> as_tensor("context", np.arange(3), torch.zeros(()))
        tensor([0., 1., 2.])
    """
    if isinstance(values, Tensor) and values.layout is torch.strided and _is_like(values, like):
        return values
    tensor = as_numbers(name, values)
    return tensor if like is None else tensor.to(device=like.device, dtype=like.dtype)


def require_one_index(**frames: Any) -> None:
    """Raise if pandas frames or series of equally many rows have different indices, since rows are paired by position.

    Args:
        frames: the values by name; what is no frame or series has no index.

    Raises:
        DataError: if two indices differ; names the values.

    Example:
        >>> require_one_index(x=np.zeros((2, 3)), context=None)
    """
    pandas = sys.modules.get("pandas")
    if pandas is None:
        return
    named = [(k, v.index) for k, v in frames.items() if isinstance(v, pandas.DataFrame | pandas.Series)]
    for name, index in named[1:]:
        first, expected = named[0]
        if len(index) == len(expected) and not index.equals(expected):
            raise DataError(
                f"{first} and {name} have different indices, but rows are paired by their position: give "
                f"{name}.loc[{first}.index] to pair them by index, or {name}.to_numpy() if their order is the same"
            )


def labels_of(values: Any) -> list[Any] | None:
    """Return the labels of the columns of a pandas frame; None for anything else, and for labels that are positions.

    Example:
        >>> labels_of(np.zeros((2, 3)))
    """
    pandas = sys.modules.get("pandas")
    if pandas is None or not isinstance(values, pandas.DataFrame):
        return None
    labels = list(values.columns)
    return None if labels == list(range(len(labels))) else labels


def _is_like(values: Tensor, like: Tensor | None) -> bool:
    return like is None or (values.dtype == like.dtype and values.device == like.device)


def require_finite(name: str, values: Tensor, num_axes: int) -> None:
    """Raise if values are NaN or infinite; the caller makes sure that Python can read them.

    Args:
        name: what the values are, for the message.
        values: ``(*batch_shape, *shape)``; those on the meta device, which have no values, pass.
        num_axes: the number of axes of ``shape``.

    Raises:
        DataError: if a value is NaN or infinite; the message names the first row that has one.

    Example:
        >>> require_finite("context", torch.tensor([[0.0], [torch.nan]]), 1)
        Traceback (most recent call last):
        pyroflows.errors.DataError: context has NaN or infinite values in 1 of 2 rows, the first of which is row 1
    """
    if values.is_meta or (is_finite := values.isfinite()).all():
        return
    is_bad = ~is_finite.flatten(values.dim() - num_axes).all(-1) if num_axes else ~is_finite
    rows = places(is_bad)
    where = f" in {len(rows)} of {is_bad.numel()} rows, the first of which is row {rows[0]}" if is_bad.dim() else ""
    raise DataError(f"{name} has NaN or infinite values{where}")


def floating_tensor(module: nn.Module) -> Tensor | None:
    """Return a floating-point parameter or buffer of a module, which has its dtype and device; None if it has none."""
    # It looks at as few modules as possible, since every log_prob asks for it: parameters() takes ten times as long.
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None and tensor.is_floating_point():
                return tensor
    for part in module._modules.values():
        if part is not None and (found := floating_tensor(part)) is not None:
            return found
    return None


def require_values(flow: nn.Module) -> None:
    """Raise if a flow is on the meta device.

    Raises:
        OptionError: if it is there.

    Example:
        >>> require_values(pf.flows.MAF(2).to("meta"))
        Traceback (most recent call last):
        pyroflows.errors.OptionError: this flow is on the meta device, where tensors have no values: ...
    """
    if (tensor := floating_tensor(flow)) is not None and tensor.is_meta:
        raise OptionError(
            "this flow is on the meta device, where tensors have no values: call flow.to_empty(device=...) and load a "
            "state into it first"
        )


def _array(name: str, values: Any) -> np.ndarray:
    """Return values as a float64 or complex128 array, which torch takes: it refuses other byte orders and strides."""
    sparse = sys.modules.get("scipy.sparse")
    if sparse is not None and sparse.issparse(values):
        raise DataError(f"{name} is a sparse matrix: make it dense by toarray()")
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(values, pandas.DataFrame | pandas.Series):
        values = _from_pandas(name, values, pandas)
    array = np.zeros(0)
    try:
        if np.ma.isMaskedArray(values):
            values = np.ma.filled(values.astype(float), np.nan)
        array = np.asarray(values)
        if array.dtype.kind not in "biufcO":
            raise TypeError(f"its values are of type {array.dtype}")
        return array.astype(complex if np.iscomplexobj(array) else float)
    except (TypeError, ValueError, RuntimeError) as error:
        is_text = array.dtype.kind in "USO" and any(isinstance(value, str | bytes) for value in array.flat)
        advice = f": a flow of categories takes integer codes of strings, such as {_CODES}, {_OF_CONTEXTS}"
        raise DataError(f"{name} is no array of numbers: {error}{advice if is_text else ''}") from error


def _from_pandas(name: str, values: Any, pandas: Any) -> np.ndarray:
    """Return the numbers of a frame or series, with NaN where a value is missing."""
    columns = values.items() if isinstance(values, pandas.DataFrame) else [(values.name, values)]
    for label, column in columns:
        kind = pandas.api.types.infer_dtype(column, skipna=True)
        if kind not in ("integer", "floating", "mixed-integer-float", "boolean", "decimal", "empty"):
            given = f"{name}[{label!r}]" if isinstance(values, pandas.DataFrame) else name
            codes = f"{given}.cat.codes" if kind == "categorical" else _CODES
            advice = f"a flow of categories takes their codes, {codes}, {_OF_CONTEXTS}"
            if "date" in kind or "time" in kind:
                advice = "dates can be differences from an origin"
            raise DataError(
                f"column {label!r} of {name} holds values of kind {kind!r}, which are no numbers: leave it out, or "
                f"give numbers: {advice}"
            )
    # A nullable column would otherwise become one of objects.
    return values.to_numpy(dtype=float, na_value=np.nan)

"""Observed values: numbers in whatever form become tensors that their distributions can score."""

import numbers
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pyroflows.constraints import without_events
from pyroflows.errors import DataError


def as_tensor(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Convert numbers to a tensor: a Python or NumPy scalar, a NumPy array, pandas data, or nested lists of numbers.

    Args:
        value: anything.
        dtype: the dtype of floating numbers; None for torch's default dtype. Integers and booleans keep their kind.

    Returns:
        A tensor that shares no memory with the value; or the value itself, if it is a tensor or holds no numbers.

    Example:
        >>> as_tensor([[1, 2]]), as_tensor(np.array([0.5])).dtype, as_tensor("text")
        (tensor([[1, 2]]), torch.float32, 'text')
    """
    array = _as_numbers(value)
    if array is None:
        return value
    tensor = torch.as_tensor(array)
    return tensor.to(dtype or torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _as_numbers(value: Any) -> np.ndarray | None:
    """The numbers of a value as an array of float64, int64 or bool; None if it holds anything else."""
    if is_array(value):
        value = value.to_numpy() if hasattr(value, "to_numpy") else value
    elif not isinstance(value, list | tuple | range | numbers.Real):
        return None
    try:
        array = np.asarray(value) if is_array(value) or _is_nested(value, numbers.Real) else None
    except ValueError:  # lists of different lengths
        return None
    if array is None:
        return None
    if array.dtype.kind == "O" and all(isinstance(entry, numbers.Real) for entry in array.flat):
        array = array.astype(np.float64)
    kinds = {"f": np.float64, "i": np.int64, "u": np.int64, "b": np.bool_}
    kind = kinds.get(array.dtype.kind)
    return None if kind is None else np.array(array, dtype=kind, order="C")


def is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy, or a series or table, such as those of pandas."""
    return isinstance(value, np.ndarray | np.generic) or hasattr(value, "to_numpy")


def _is_nested(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, or lists of such values."""
    if isinstance(value, list | tuple | range):
        return len(value) > 0 and all(_is_nested(entry, kind) for entry in value)
    return isinstance(value, kind)


def is_list(value: Any) -> bool:
    """Whether a value is a list of numbers or words, or of such lists."""
    return type(value) in (list, tuple, range) and _is_nested(value, numbers.Real | str)


def observe_tensor(msg: Any) -> None:
    """Make the observed value of a site a tensor that its distribution can score.

    Numbers that are no tensor get dtype and device of the distribution. Booleans become floating numbers, and so
    do integers where the support is that of a Bernoulli distribution, since torch cannot score them otherwise.

    Args:
        msg: the message of a site that is being sampled.

    Raises:
        DataError: if the value is a list or an array, but holds something other than numbers; names the site.
    """
    value = msg["value"]
    if not msg["is_observed"] or value is None or msg["infer"].get("_deterministic"):
        return
    if isinstance(value, Tensor) and value.is_floating_point():
        return
    parameter = _parameter(msg["fn"])
    if not isinstance(value, Tensor):
        value = as_tensor(value, parameter.dtype)
        value = value.to(parameter.device) if isinstance(value, Tensor) else value
        if isinstance(value, list | tuple | str) or (is_array(value) and not isinstance(value, Tensor)):
            raise DataError(
                f"the value of observed site '{msg['name']}' ({named_type(value)}) holds something other than numbers: "
                "give it numbers, for instance codes for categories"
            )
    if isinstance(value, Tensor) and (value.dtype == torch.bool or _is_boolean(msg["fn"])):
        value = value.to(parameter.dtype)
    msg["value"] = value


class TensorObservations(Messenger):
    """An effect handler that makes the observed values of all sites tensors, see :func:`observe_tensor`."""

    def _pyro_sample(self, msg: Any) -> None:
        observe_tensor(msg)


def _parameter(fn: Any) -> Tensor:
    """A floating parameter of a distribution; zero, with torch's default dtype and device, if it shows none."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    for value in vars(fn).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return torch.zeros(())


def _is_boolean(fn: Any) -> bool:
    try:
        support = fn.support
    except NotImplementedError:
        return False
    return without_events(support) is constraints.boolean


def named_type(value: Any) -> str:
    """The name of a value's type, and its dtype if it has one."""
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ + (f" of dtype {dtype}" if dtype is not None else "")

"""The arguments of a model: arrays become tensors where it needs them, and values that are not finite are found."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import init_to_sample, init_to_value
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_map

from pyroflows.errors import DataError, FlowError, ModelError, OptionError
from pyroflows.models.masks import draw_like, may_hide_nan, without_masked_nan
from pyroflows.models.observations import TensorObservations, as_tensor, is_array, is_list, named_type
from pyroflows.models.signature import named_leaves, signature_of
from pyroflows.models.tracing import Model, latent_init, trace_model
from pyroflows.randomness import seeded

NUM_TRIALS = 2
ADVICE = "drop these rows, or fill them with any finite number and mask them with poutine.mask"


def usable_arguments(model: Model, args: Any, kwargs: Any, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Convert arrays, tables and lists among the arguments to tensors, if the model does not run with them as they are.

    A model may well ask for a NumPy array or a table of pandas. So the arguments stay as they are if the model runs
    with them. Otherwise arrays and tables become tensors; or tables become dictionaries of tensors by column; or lists
    of numbers become tensors too: whatever the model runs with.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        dtype: the dtype of floating numbers that become tensors; None for torch's default dtype.

    Returns:
        The positional and keyword arguments with which the model runs.

    Raises:
        DataError: if the model does not run, and an array or a table holds something other than finite numbers; names
            the argument.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu * y, 1.0).to_event(1), obs=y)
        >>> usable_arguments(model, (np.array([1.0, 2.0]),), {})
        ((tensor([1., 2.]),), {})
    """
    leaves = list(named_leaves(model, args, kwargs))
    if not any(is_array(leaf) or is_list(leaf) for _, leaf in leaves):
        return args, kwargs
    failures = []
    for convert in (_unchanged, _arrays, _columns, _lists):
        converted = _map(partial(convert, dtype=dtype), args, kwargs)
        failure = _failure(model, *converted)
        if failure is None:
            return converted
        explain_failure(model, *converted, error=failure)
        failures.append(failure)
    failure = failures[1]
    for name, leaf in leaves:
        # A list of words may be names; it is at fault only if an operation does not take it.
        is_fault = is_array(leaf) or (is_list(leaf) and isinstance(failure, TypeError))
        if is_fault and as_tensor(leaf) is leaf:
            raise DataError(
                f"argument '{name}' ({named_type(leaf)}) holds something other than numbers, with which the model "
                f"fails ({_first_line(failure)}): give it numbers, for instance codes for categories"
            ) from failure
    for name, leaf in leaves:
        if hasattr(leaf, "columns"):
            raise DataError(
                f"the model does not run with argument '{name}' ({named_type(leaf)}), nor with a tensor or a "
                f"dictionary of columns in its place ({_first_line(failure)}): give it tensors, such as "
                f"torch.tensor({name}['column'].to_numpy())"
            ) from failure
    if any(is_array(leaf) for _, leaf in leaves):
        raise failure
    return args, kwargs


def _unchanged(leaf: Any, dtype: torch.dtype | None) -> Any:
    return leaf


def _arrays(leaf: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(leaf, np.generic):  # it may be a size, which has to be a Python number
        return leaf.item()
    return as_tensor(leaf, dtype) if is_array(leaf) else leaf


def _columns(leaf: Any, dtype: torch.dtype | None) -> Any:
    if hasattr(leaf, "columns"):
        return {name: as_tensor(leaf[name], dtype) for name in leaf.columns}
    return _arrays(leaf, dtype)


def _lists(leaf: Any, dtype: torch.dtype | None) -> Any:
    return as_tensor(leaf, dtype) if is_list(leaf) else _arrays(leaf, dtype)


class _Gradients(Messenger):
    """An effect handler that makes all latents require gradients."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(msg["value"], Tensor) and msg["value"].is_floating_point():
            msg["value"] = msg["value"].detach().requires_grad_().clone()


def _failure(model: Model, args: Any, kwargs: Any) -> Exception | None:
    """The error of runs of a model with gradients, which arithmetic between tensors and arrays may not have.

    The latents are drawn from their priors; if a run succeeds where another fails, the arguments are not at fault.
    """
    handlers = (poutine.block(), TensorObservations(), _Gradients(), InitMessenger(latent_init(init_to_sample)))
    failure = None
    with seeded(0), warnings.catch_warnings(), torch.enable_grad(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        for handler in handlers:
            stack.enter_context(handler)
        for _ in range(NUM_TRIALS):
            try:
                poutine.trace(model).get_trace(*args, **kwargs)
            except Exception as error:  # arguments that a model is not written for may raise anything
                failure = error
            else:
                return None
    return failure


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip(':')}" if lines else type(error).__name__


@contextmanager
def unwritten(model: Model, args: Any, kwargs: Any) -> Iterator[None]:
    """Raise if a run of the model inside of the block writes into its arguments, and give these their values back.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ModelError: if so; names the argument.
    """
    tensors = {name: leaf for name, leaf in named_leaves(model, args, kwargs) if isinstance(leaf, Tensor)}
    before = {name: (tensor._version, tensor.detach().clone()) for name, tensor in tensors.items()}
    failure = None
    try:
        yield
    except Exception as error:  # what fails may do so because of the values that were written
        failure = error
    for name, tensor in tensors.items():
        version, value = before[name]
        if tensor._version != version:
            with torch.no_grad():
                tensor.copy_(value)
            raise ModelError(
                f"the model writes into its argument '{name}', which would change your data; they have their values "
                f"back. Make a copy in the model and write into that: {name} = {name}.clone()"
            ) from failure
    if failure is not None:
        raise failure


def _map(function: Callable[[Any], Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Map the arguments, and what is inside of dictionaries and lists; a list of numbers is one thing."""
    mapped = [tree_map(function, value, is_leaf=is_list) for value in (*args, *kwargs.values())]
    return tuple(mapped[: len(args)]), dict(zip(kwargs, mapped[len(args) :], strict=True))


def in_dtype(model: Model, dtype: torch.dtype | None) -> Model:
    """Make a model run in another floating dtype.

    Floating arguments are cast, and the dtype is torch's default while the model runs.

    Args:
        model: a Pyro model.
        dtype: a floating dtype; None to give the model as it is.

    Example:
        >>> def model():
        ...     return pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> in_dtype(model, torch.float64)().dtype
        torch.float64
    """
    if dtype is None:
        return model

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    def run(*args: Any, **kwargs: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return model(*tree_map(cast, args), **tree_map(cast, kwargs))
        finally:
            torch.set_default_dtype(before)

    run.__dict__["__wrapped__"] = model  # for the names of its arguments
    return run


def require_arguments(model: Model, args: Any, kwargs: Any) -> None:
    """Raise if a model cannot be called with arguments, as far as it shows their names.

    Raises:
        OptionError: if so; says which argument is the matter, and what the model takes.

    Example:
        >>> try:
        ...     require_arguments(lambda x, y=None: None, (1,), {"z": 2})
        ... except pf.FlowError as error:
        ...     print(error)
        the model does not take these arguments (got an unexpected keyword argument 'z'): it takes (x, y=None)
    """
    try:
        signature = signature_of(model)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise OptionError(f"the model does not take these arguments ({error}): it takes {signature}") from None


def require_own_options(is_set: Mapping[str, bool], model: Model, args: Any) -> None:
    """Raise if an option of a function with a model's arguments could be meant for the model.

    Args:
        is_set: whether options have another value than by default, by name.
        model: a Pyro model.
        args: its positional arguments.

    Raises:
        OptionError: if the model has an argument of the name of such an option, which is not among those by position.
    """
    try:
        signature = signature_of(model)
        bound = signature.bind_partial(*args).arguments
    except (TypeError, ValueError):
        return
    for name, is_given in is_set.items():
        if is_given and name in signature.parameters and name not in bound:
            raise OptionError(
                f"{name} is an option here and also an argument of the model: give the model its arguments by "
                f"position, up to {name}"
            )


def non_finite(model: Model, args: Any, kwargs: Any) -> list[str]:
    """Say which arguments hold NaN or infinite values, how many, and where the first is.

    Example:
        >>> non_finite(lambda x: None, (torch.tensor([[0.0, 1.0], [torch.nan, 2.0]]),), {})
        ["argument 'x' has 1 NaN of 4 values, the first at [1, 0]"]
    """
    found = []
    for name, leaf in named_leaves(model, args, kwargs):
        value = as_tensor(leaf)
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            for what, where in (("NaN", value.isnan()), ("infinite", value.isinf())):
                if where.any():
                    first = f", the first at {where.nonzero()[0].tolist()}" if value.dim() else ""
                    found.append(f"argument '{name}' has {where.sum()} {what} of {value.numel()} values{first}")
    return found


def require_finite(model: Model, args: Any, kwargs: Any, trace: Trace) -> None:
    """Raise if the log-density of a site is not finite because an argument holds NaN or infinite values.

    Values that are not finite are no fault where nothing follows from them, for instance in masked rows. So the
    argument is at fault only if the log-density becomes finite once they are replaced by zero.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        trace: one run of it.

    Raises:
        DataError: if so; names argument, position and site.
    """
    found = non_finite(model, args, kwargs)
    if not found:
        return
    bad = [name for name, log_prob in _log_probs(trace).items() if not log_prob.isfinite().all()]
    if not bad:
        return
    values = {name: node["value"] for name, node in trace.iter_stochastic_nodes()}
    filled = _traced(model, _filled(args, kwargs), values)
    if filled is None:
        return
    log_probs = _log_probs(filled)
    for name in bad:
        if name in log_probs and log_probs[name].isfinite().all():
            raise DataError(f"{'; '.join(found)}, so that the log-density of site '{name}' is not finite: {ADVICE}")


def explain_failure(model: Model, args: Any, kwargs: Any, error: Exception) -> None:
    """Raise another error if a model has failed because an argument holds NaN or infinite values.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        error: what a run of it has raised.

    Raises:
        DataError: if the model runs once these values are replaced by zero; names argument and position.
    """
    if isinstance(error, FlowError):
        return
    found = non_finite(model, args, kwargs)
    if found and _failure(model, *_filled(args, kwargs)) is None:
        raise DataError(f"{'; '.join(found)}, with which the model fails ({_first_line(error)}): {ADVICE}") from error


def _filled(args: Any, kwargs: Any) -> tuple[Any, Any]:
    def fill(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.where(leaf.isfinite(), leaf, 0.0) if leaf.is_floating_point() else leaf
        if hasattr(leaf, "fillna"):
            return leaf.fillna(0.0)
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f":
            return np.where(np.isfinite(leaf), leaf, 0.0)
        return leaf

    return _map(fill, args, kwargs)


def _traced(model: Model, arguments: tuple[Any, Any], values: dict[str, Tensor]) -> Trace | None:
    """One run of a model at given values of its latents; None if it fails."""
    with seeded(0):
        try:
            return trace_model(model, *arguments, init_fn=init_to_value(values=values))
        except Exception:
            return None


def _log_probs(trace: Trace) -> dict[str, Tensor]:
    """The log-densities of the sites of a run, masked; a site that refuses its own value counts as NaN.

    NaN in masked entries of an observed value are replaced, as in all runs for batches of draws.
    """
    log_probs = {}
    with torch.no_grad():
        for name, node in trace.nodes.items():
            if node["type"] == "sample" and not node["infer"].get("_deterministic"):
                value = node["value"]
                if node["is_observed"] and may_hide_nan(node):
                    value = without_masked_nan(node, draw_like(node["fn"], value))
                try:
                    log_prob = torch.as_tensor(node["fn"].log_prob(value, *node["args"], **node["kwargs"]))
                except (ValueError, RuntimeError):
                    log_prob = torch.tensor(torch.nan)
                log_probs[name] = scale_and_mask(log_prob, mask=node["mask"])
    return log_probs

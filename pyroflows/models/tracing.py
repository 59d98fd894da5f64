"""One run of a model as Pyro's trace, with initial values at which every site has a value."""

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from pyroflows.compiling.singular import is_singular, nan_where_singular
from pyroflows.errors import FlowError, ModelError
from pyroflows.models.observations import TensorObservations

Model = Callable[..., Any]
InitFn = Callable[..., Any]


def trace_model(model: Model, args: Any, kwargs: Any, init_fn: InitFn | None = None) -> Trace:
    """Run a model once without gradients and trace it, with latents from ``init_fn``, or drawn from their priors.

    Handlers may replace or reshape sites, so shapes are those of the finished trace. ``poutine.reparam`` asks for the
    value of a site before the plates around it have given the site its shape. Values that lack dimensions for this
    reason are broadcast, and the model is run once more with them.

    Raises:
        ModelError: if a latent's initial value has another shape than its distribution, and cannot be broadcast; or if
            the model changes the value of a latent in place.
    """
    with torch.no_grad():
        trace = _run(InitMessenger(latent_init(init_fn or _drawn))(model), args, kwargs)
        values = {node["name"]: _broadcast_value(node) for node in latent_nodes(trace)}
        if all(value.shape == trace.nodes[name]["value"].shape for name, value in values.items()):
            return trace
        for name, value in values.items():
            trace.nodes[name]["value"] = value
        return _run(poutine.replay(model, trace=trace), args, kwargs)


def _run(model: Model, args: Any, kwargs: Any) -> Trace:
    tracer, versions = poutine.trace(model), _Versions((args, kwargs))
    try:
        with poutine.block(), TensorObservations(), versions:
            trace = tracer.get_trace(*args, **kwargs)
        versions.require_unchanged()
        return trace
    except Exception:
        versions.require_unchanged()
        # A value of a wrong shape fails where the model uses it, with an error that does not name the site.
        for node in latent_nodes(tracer.trace):
            _broadcast_value(node)
        raise


class _Versions(Messenger):
    """An effect handler that notices whether the model changes arguments, or values of latents, in place."""

    def __init__(self, arguments: Any) -> None:
        super().__init__()
        given = [t for t in tree_leaves(arguments) if isinstance(t, Tensor) and not t.is_inference()]
        self._given = [(tensor, tensor._version) for tensor in given]
        self._seen: list[tuple[str, Tensor, int]] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        is_latent = not msg["is_observed"] and type(msg["fn"]).__name__ != "_Subsample"
        if is_latent and isinstance(value, Tensor) and not value.is_inference():
            self._seen.append((msg["name"], value, value._version))

    def require_unchanged(self) -> None:
        """Raise if a value has changed, since its density is then that of another value, or an argument."""
        for tensor, version in self._given:
            if tensor._version != version:
                raise ModelError(
                    f"the model changes an argument of shape {tuple(tensor.shape)} in place, as by y += b or y[0] = b, "
                    "which changes the data of all later runs: change a copy, as by y = y + b or y.clone()"
                )
        for name, value, version in self._seen:
            if value._version != version:
                raise ModelError(
                    f"the model changes the value of site '{name}' in place, as by x += b or x[0] = b, so that its "
                    "density is that of another value: make a new tensor, as by x = x + b, or change x.clone()"
                )


def _broadcast_value(node: Any) -> Tensor:
    value, shape = node["value"], node["fn"].shape()
    if not _broadcasts_to(value.shape, shape):
        raise ModelError(
            f"the model has dynamic structure, or init_loc_fn is wrong: latent site '{node['name']}' has shape "
            f"{tuple(value.shape)} in one run and {tuple(shape)} in another; a flow needs the same shapes in each run. "
            "Data with other rows of latents need a fit of their own, or posterior.local(...) with an encoder of rows"
        )
    return value.expand(shape)


def _broadcasts_to(shape: torch.Size, wider: torch.Size) -> bool:
    return len(shape) <= len(wider) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(wider), strict=False))


def trace_anywhere(model: Model, args: Any, kwargs: Any, init_fn: InitFn | None) -> Trace:
    """Trace a model also at values where its density is zero, so that validation or a factorisation fails."""
    try:
        return trace_model(model, args, kwargs, init_fn)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, FlowError) or not (isinstance(error, ValueError) or is_singular(error)):
            raise
    with pyro.validation_enabled(False):
        return nan_where_singular(trace_model, model, args, kwargs, init_fn)


def latent_init(init_fn: InitFn) -> InitFn:
    """Complete an init function of Pyro's, so that it gives a value at every site.

    Pyro's init functions fail at priors without a sampler, such as ``dist.ImproperUniform``, and at supports without a
    bijection to the reals. There the value is a feasible point, or else a draw, or else zero. Dimensions of size one
    that a value has on the left of the site's own are dropped.

    Args:
        init_fn: an init function of Pyro's, such as ``init_to_median``.
    """
    return _LatentInit(init_fn)


class _LatentInit:
    # A nested function that returned itself would keep what it holds until Python looks for cycles of references.
    def __init__(self, init_fn: InitFn) -> None:
        self._init_fn = init_fn

    def __call__(self, site: Any = None) -> Any:
        # Pyro's init functions return a configured version of themselves when called without a site.
        if site is None:
            return self
        # An init function may read values; only the model's own reads count.
        with _disable_current_modes():
            value = _initial_value(self._init_fn, site)
        shape = site["fn"].shape()
        num_extra = max(value.dim() - len(shape), 0)
        return value.reshape(shape) if num_extra and value.shape == (1,) * num_extra + shape else value


def _initial_value(init_fn: InitFn, site: Any) -> Tensor:
    for propose in (init_fn, _feasible, _drawn):
        try:
            return propose(site)
        except NotImplementedError:
            continue
    return _not_chosen(torch.zeros(site["fn"].shape()))


def _feasible(site: Any) -> Tensor:
    transform = biject_to(site["fn"].support)
    return _not_chosen(transform(torch.zeros(transform.inverse_shape(site["fn"].shape()))))


def _drawn(site: Any) -> Tensor:
    return _not_chosen(site["fn"].sample())


def _not_chosen(value: Tensor) -> Tensor:
    """Mark a value as none that a user chose, so that ``poutine.reparam`` replaces it without a warning."""
    value._pyro_custom_init = False  # type: ignore[attr-defined]
    return value


def latent_nodes(trace: Trace) -> Iterator[Any]:
    """Iterate over the nodes of the sites that are not observed, in the order of the model."""
    for node in sample_nodes(trace):
        if not node["is_observed"]:
            yield node


def sample_nodes(trace: Trace) -> Iterator[Any]:
    """Iterate over the nodes of all sample sites, observed or not, without those that draw rows of plates."""
    for node in trace.nodes.values():
        if node["type"] == "sample" and type(node["fn"]).__name__ != "_Subsample":
            yield node


def follows_from_others(site: Any) -> bool:
    """Whether the value of a Pyro site follows from other sites: ``pyro.deterministic``, and what handlers replace.

    ``poutine.reparam`` turns a latent into an observed ``Delta`` at the value that it has computed.
    """
    fn = site["fn"]
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return bool(site["infer"].get("_deterministic")) or (site["is_observed"] and isinstance(fn, dist.Delta))

"""The structure of a Pyro model: what one run shows of its sites and plates, whether or not a flow can fit it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from pyroflows.compiling.singular import is_singular, nan_where_singular
from pyroflows.errors import FlowError, ModelError
from pyroflows.models.bijections import Bijection, bijection_of
from pyroflows.models.value_reads import ValueReads

Model = Callable[..., Any]
InitFn = Callable[..., Any]


@dataclass(frozen=True)
class Plate:
    """A ``pyro.plate`` of a model.

    Args:
        name: the name of the plate.
        size: the number of its rows.
        subsample_size: the number of rows that one run of the model sees, at most ``size``.
        dim: its batch dimension, negative, counted from the right; None for a sequential plate, and for a plate without
            sites.

    Example:
        >>> Plate("rows", size=100, subsample_size=10, dim=-1).is_subsampled
        True
    """

    name: str
    size: int
    subsample_size: int
    dim: int | None = None

    @property
    def is_subsampled(self) -> bool:
        """Whether a run sees only a part of the rows."""
        return self.subsample_size < self.size


@dataclass(frozen=True, eq=False)
class Site:
    """A ``pyro.sample`` or ``pyro.deterministic`` site of one run.

    Args:
        name: the name of the site.
        family: the name of the class of its distribution.
        shape: the shape of its value.
        event_dim: the number of its event dimensions; 0 for a deterministic site.
        support: the support of its distribution; None if the distribution declares none.
        plates: the plates around it, from the outermost to the innermost, sequential ones included.
        masks: the mask of the effect handlers around it, then those of its distribution; booleans, or tensors of them.
        scale: the factor by which its log-density is multiplied, positive.
        is_discrete: whether its support is discrete.
        is_enumerable: whether its distribution can enumerate its support.
        is_flat: whether its density is constant, by ``ImproperUniform`` or by a mask, so that it cannot be drawn.
        num_nan: the number of NaN in its value.
        bijection: the map from the reals to the support of a latent; None if there is none, and for sites that are not
            latent.
    """

    name: str
    family: str
    shape: torch.Size
    event_dim: int
    support: constraints.Constraint | None
    plates: tuple[Plate, ...]
    masks: tuple[bool | Tensor, ...]
    scale: float | Tensor
    is_discrete: bool
    is_enumerable: bool
    is_flat: bool
    num_nan: int
    bijection: Bijection | None = None

    @property
    def unconstrained_shape(self) -> torch.Size | None:
        """The shape of a latent's value before the bijection to its support; None without a bijection."""
        return None if self.bijection is None else self.bijection.unconstrained_shape

    @property
    def is_masked_in_part(self) -> bool:
        """Whether a mask hides some of the entries; the mask ``False`` hides all of them."""
        return any(isinstance(mask, Tensor) and not mask.all() for mask in self.masks)

    @property
    def plate_names(self) -> tuple[str | None, ...]:
        """The names of the plates of the batch dimensions, from left to right; None for a dimension without a plate."""
        batch_shape = self.shape[: len(self.shape) - self.event_dim]
        names: list[str | None] = [None] * len(batch_shape)
        for plate in self.plates:
            dim = plate.dim
            if dim is not None and -dim <= len(batch_shape) and batch_shape[dim] == plate.subsample_size:
                names[dim] = plate.name
        return tuple(names)


@dataclass(frozen=True, eq=False)
class ModelStructure:
    """The sites, plates and parameters that one run of a model shows; made by :func:`describe`.

    Args:
        latents: the sites that are not observed, in the order of the model.
        observed: the observed sites, without ``pyro.factor`` statements.
        deterministic: the ``pyro.deterministic`` sites.
        plates: the plates by name.
        parameters: the names of the ``pyro.param`` statements, including those of ``pyro.module``.
        max_plate_nesting: the largest number of batch dimensions of a site.
        dtype: the widest floating dtype of the latents; torch's default dtype if none of them is floating.
        reads_values: whether the model's code read the value of a tensor, so that other values may lead to other sites.
    """

    latents: tuple[Site, ...]
    observed: tuple[Site, ...]
    deterministic: tuple[Site, ...]
    plates: Mapping[str, Plate]
    parameters: tuple[str, ...]
    max_plate_nesting: int
    dtype: torch.dtype
    reads_values: bool

    @property
    def subsampled(self) -> tuple[Plate, ...]:
        """The plates of which a run sees only a part."""
        return tuple(plate for plate in self.plates.values() if plate.is_subsampled)


def describe(model: Model, args: Any, kwargs: Any, init_fn: InitFn | None = None) -> ModelStructure:
    """Describe a model by one run of it. Any model that runs can be described, whether or not a flow can fit it.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        init_fn: initial values of the latents, by site; None to draw them from their priors.

    Raises:
        ModelError: if ``init_fn`` gives a latent a value of another shape than its distribution has.

    Example:
        >>> def model(y):
        ...     k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(1.0 * k, 1.0), obs=y)
        >>> structure = describe(model, (torch.zeros(5),), {})
        >>> [(site.name, site.is_enumerable, site.unconstrained_shape) for site in structure.latents]
        [('k', True, None)]
        >>> structure.observed[0].plate_names
        ('rows',)
    """
    return describe_run(model, args, kwargs, init_fn)[0]


def describe_run(model: Model, args: Any, kwargs: Any, init_fn: InitFn | None = None) -> tuple[ModelStructure, Trace]:
    """Describe a model as :func:`describe` does, and also give the trace of the run."""
    with ValueReads() as reads:
        trace = _traced_anywhere(model, args, kwargs, init_fn)
    return _structure_of(trace, reads.any), trace


def _traced_anywhere(model: Model, args: Any, kwargs: Any, init_fn: InitFn | None) -> Trace:
    """Trace a model also at values where its density is zero, so that validation or a factorisation fails."""
    try:
        return trace_model(model, args, kwargs, init_fn)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, FlowError) or not (isinstance(error, ValueError) or is_singular(error)):
            raise
    with pyro.validation_enabled(False):
        return nan_where_singular(trace_model, model, args, kwargs, init_fn)


def trace_model(model: Model, args: Any, kwargs: Any, init_fn: InitFn | None = None) -> Trace:
    """Run a model once without gradients and trace it, with latents from ``init_fn``, or drawn from their priors."""
    init = InitMessenger(latent_init(init_fn or _drawn))
    with torch.no_grad():
        return poutine.block(poutine.trace(init(model)).get_trace)(*args, **kwargs)


def model_parameters(
    structure: ModelStructure, model: Model, args: Any, kwargs: Any, init_fn: InitFn | None = None
) -> dict[str, Tensor]:
    """Find the parameters of a model, those of its ``pyro.param`` and ``pyro.module`` statements, by one more run.

    Args:
        structure: the structure of the model; if it shows no parameters, the model does not run.
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        init_fn: initial values of the latents, by site; None to draw them from their priors.

    Returns:
        The unconstrained tensors by name.
    """
    if not structure.parameters:
        return {}
    trace = trace_model(model, args, kwargs, init_fn)
    values = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "param"}
    # With Pyro's module-local parameters, those of plain modules have no unconstrained tensor behind them.
    return {name: value.unconstrained() if hasattr(value, "unconstrained") else value for name, value in values.items()}


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

    return run


def latent_init(init_fn: InitFn) -> InitFn:
    """Complete an init function of Pyro's, so that it gives a value at every site.

    Pyro's init functions fail at priors without a sampler, such as ``dist.ImproperUniform``, and at supports without a
    bijection to the reals. There the value is a feasible point, or else a draw, or else zero.

    Args:
        init_fn: an init function of Pyro's, such as ``init_to_median``.

    Raises:
        ModelError: if the result is called and ``init_fn`` gives a value of another shape than the site's distribution.
    """

    def init(site: Any = None) -> Any:
        # Pyro's init functions return a configured version of themselves when called without a site.
        if site is None:
            return init
        # An init function may read values; only the model's own reads count.
        with _disable_current_modes():
            value = _initial_value(init_fn, site)
        if value.shape != site["fn"].shape():
            raise ModelError(
                f"the model has dynamic structure, or init_loc_fn is wrong: latent site '{site['name']}' has shape "
                f"{tuple(value.shape)} in one run and {tuple(site['fn'].shape())} in another; a flow needs the "
                "same shapes in every run"
            )
        return value

    return init


def _initial_value(init_fn: InitFn, site: Any) -> Tensor:
    for propose in (init_fn, _feasible, _drawn):
        try:
            return propose(site)
        except NotImplementedError:
            continue
    return torch.zeros(site["fn"].shape())


def _feasible(site: Any) -> Tensor:
    transform = biject_to(site["fn"].support)
    value = transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))
    value._pyro_custom_init = False
    return value


def _drawn(site: Any) -> Tensor:
    return site["fn"].sample()


def _structure_of(trace: Trace, reads_values: bool) -> ModelStructure:
    latents, observed, deterministic = [], [], []
    nesting = 0
    for node in _sample_nodes(trace):
        frames = [-frame.dim for frame in node["cond_indep_stack"] if frame.vectorized]
        nesting = max([nesting, len(node["fn"].batch_shape), *frames])
        site = _site(node)
        if node["infer"].get("_deterministic"):
            # Pyro counts all dimensions of a deterministic site as event dimensions, and masks its density.
            deterministic.append(replace(site, event_dim=0, masks=(), is_flat=False))
        elif not node["is_observed"]:
            latents.append(replace(site, bijection=bijection_of(node["fn"], site.shape)))
        elif not isinstance(node["fn"], dist.Unit):
            observed.append(site)
    dtypes = [trace.nodes[site.name]["value"].dtype for site in latents]
    floating = [dtype for dtype in dtypes if dtype.is_floating_point] or [torch.get_default_dtype()]
    return ModelStructure(
        latents=tuple(latents),
        observed=tuple(observed),
        deterministic=tuple(deterministic),
        plates=_plates(trace),
        parameters=tuple(name for name, node in trace.nodes.items() if node["type"] == "param"),
        max_plate_nesting=nesting,
        dtype=reduce(torch.promote_types, floating),
        reads_values=reads_values,
    )


def _sample_nodes(trace: Trace) -> Iterator[Any]:
    for node in trace.nodes.values():
        if node["type"] == "sample" and type(node["fn"]).__name__ != "_Subsample":
            yield node


def _plates(trace: Trace) -> dict[str, Plate]:
    """The plates by name: those around sites, even if their own statements are blocked, and those without sites."""
    plates = {
        name: Plate(name, node["fn"].size, len(node["value"]))
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and type(node["fn"]).__name__ == "_Subsample"
    }
    return plates | {plate.name: plate for node in _sample_nodes(trace) for plate in _stack(node)}


def _stack(node: Any) -> tuple[Plate, ...]:
    return tuple(
        Plate(frame.name, frame.full_size or frame.size, frame.size, frame.dim if frame.vectorized else None)
        for frame in node["cond_indep_stack"]
    )


def _site(node: Any) -> Site:
    fn, value = node["fn"], torch.as_tensor(node["value"])
    support = _support(fn)
    masks = _masks(node)
    return Site(
        name=node["name"],
        family=type(fn).__name__,
        shape=value.shape,
        event_dim=fn.event_dim,
        support=support,
        plates=_stack(node),
        masks=masks,
        scale=node["scale"],
        is_discrete=support is not None and support.is_discrete,
        is_enumerable=fn.has_enumerate_support,
        is_flat=_is_improper(fn) or any(mask is False for mask in masks),
        num_nan=int(torch.isnan(value).sum()),
    )


def _support(fn: Any) -> constraints.Constraint | None:
    try:
        return fn.support
    except NotImplementedError:
        return None


def _is_improper(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.ImproperUniform)


def _masks(node: Any) -> tuple[bool | Tensor, ...]:
    """The masks of a site, and of the distributions that its distribution wraps."""
    fn, masks = node["fn"], [node["mask"]]
    while hasattr(fn, "base_dist"):
        masks.append(getattr(fn, "_mask", None))
        fn = fn.base_dist
    return tuple(mask for mask in masks if mask is not None)

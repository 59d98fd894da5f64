"""The structure of a Pyro model: what one run shows of its sites and plates, whether or not a flow can fit it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import constraints

from pyroflows.models.bijections import Bijection, bijection_of
from pyroflows.models.masks import dependent_entries, entry_mask, innermost, to_rank
from pyroflows.models.supports import simplified, support_of
from pyroflows.models.tracing import InitFn, Model, follows_from_others, sample_nodes, trace_anywhere, trace_model
from pyroflows.models.value_reads import ValueReads

# From so many discrete sites on it pays to look for operations that are done several times.
MANY = 8


@dataclass(frozen=True)
class Plate:
    """A ``pyro.plate`` of a model.

    Args:
        name: the name of the plate.
        size: the number of its rows; -1 for a plate without a size, which takes those of the values in it.
        subsample_size: the number of rows that one run of the model sees, at most ``size``; -1 without a size.
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

    def fits(self, length: int) -> bool:
        """Whether a dimension of this length can be that of the plate."""
        return length == self.subsample_size or (self.size == -1 and length > 1)


@dataclass(frozen=True, eq=False)
class Site:
    """A ``pyro.sample`` or ``pyro.deterministic`` site of one run.

    Args:
        name: the name of the site.
        family: the name of the class of its distribution.
        shape: the shape of its value.
        event_dim: the number of its event dimensions; 0 for a deterministic site.
        support: the support of its distribution, see :func:`pyroflows.models.supports.support_of`; None if the
            distribution declares none, or if it is not known.
        plates: the plates around it, from the outermost to the innermost, sequential ones included.
        mask: where its log-density counts, booleans over leading dimensions of its value, see
            :func:`pyroflows.models.masks.entry_mask`; None without a mask.
        scale: the factor by which its log-density is multiplied, positive.
        is_discrete: whether its support is discrete.
        is_enumerable: whether its distribution can enumerate its support.
        is_flat: whether its density is constant, by ``ImproperUniform`` or by a mask, so that it cannot be drawn.
        nan_at: the indices of the NaN in an observed value that make its log-density NaN, ``(n, dimensions)``.
        mask_shape: the shape of the mask of the effect handlers around it; without dimensions if that is no tensor.
        law_shape: the batch and event shape of its distribution, which differs from ``shape`` where an observed value
            is broadcast, or has further dimensions.
        bijection: the map from the reals to the support of a latent; None if there is none, and for sites that are not
            latent.
        kept: the entries of a latent that belong to the posterior, booleans of the shape of ``mask``; the others are
            masked, and nothing depends on them. None if all do.
        is_in_chain: whether it stands in ``pyro.markov``.
    """

    name: str
    family: str
    shape: torch.Size
    event_dim: int
    support: constraints.Constraint | None
    plates: tuple[Plate, ...]
    mask: Tensor | None
    scale: float | Tensor
    is_discrete: bool
    is_enumerable: bool
    is_flat: bool
    nan_at: Tensor
    mask_shape: torch.Size
    law_shape: torch.Size
    bijection: Bijection | None = None
    kept: Tensor | None = None
    is_in_chain: bool = False

    @property
    def unconstrained_shape(self) -> torch.Size | None:
        """The shape of a latent's value before the bijection to its support; None without a bijection."""
        return None if self.bijection is None else self.bijection.unconstrained_shape

    @property
    def full_shape(self) -> torch.Size:
        """The shape of its draws; that of its value, unless an observed value counts for several entries."""
        try:
            return torch.broadcast_shapes(self.shape, self.law_shape)
        except RuntimeError:  # such as a series of another length, for which a distribution has its own rules
            return self.shape

    @property
    def plate_scale(self) -> float:
        """The number of rows for which each one stands, where plates are subsampled."""
        return prod(plate.size / plate.subsample_size for plate in self.plates if plate.is_subsampled)

    @property
    def plate_names(self) -> tuple[str | None, ...]:
        """The names of the plates of the batch dimensions, from left to right; None for a dimension without a plate."""
        shape = self.full_shape
        batch_shape = shape[: len(shape) - self.event_dim]
        names: list[str | None] = [None] * len(batch_shape)
        for plate in self.plates:
            dim = plate.dim
            if dim is not None and -dim <= len(batch_shape) and plate.fits(batch_shape[dim]):
                names[dim] = plate.name
        return tuple(names)


@dataclass(frozen=True)
class Enumeration:
    """The latents of a model that are summed out.

    Args:
        names: their names.
        nesting: the largest number of batch dimensions of a site without enumeration.
        shares_results: whether operations on the same tensors are done once, see
            :class:`pyroflows.models.shared_results.SharedResults`.
        is_drawn: whether they are drawn given all other sites, instead of summed out.
        unscored: further sites without a value, which are drawn and do not count, such as data that are to be
            predicted.
    """

    names: frozenset[str]
    nesting: int
    shares_results: bool
    is_drawn: bool = False
    unscored: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class ModelStructure:
    """The sites, plates and parameters that one run of a model shows; made by :func:`describe`.

    Args:
        latents: the sites that are not observed, in the order of the model.
        enumerated: the latents that are summed out of the log joint, which are not among ``latents`` then; none as
            long as :meth:`summed_out` does not set them apart.
        enumeration: what runs need to know to sum them out; None if there are none.
        observed: the observed sites, without ``pyro.factor`` statements.
        factors: the ``pyro.factor`` statements.
        deterministic: the ``pyro.deterministic`` sites, and those that ``poutine.reparam`` has replaced.
        plates: the plates by name.
        parameters: the names of the ``pyro.param`` statements, including those of ``pyro.module``.
        max_plate_nesting: the largest number of batch dimensions of a site.
        dtype: the widest floating dtype of the latents; torch's default dtype if none of them is floating.
        reads_values: whether the model's code read the value of a tensor, so that other values may lead to other sites.
    """

    latents: tuple[Site, ...]
    observed: tuple[Site, ...]
    factors: tuple[Site, ...]
    deterministic: tuple[Site, ...]
    plates: Mapping[str, Plate]
    parameters: tuple[str, ...]
    max_plate_nesting: int
    dtype: torch.dtype
    reads_values: bool
    enumerated: tuple[Site, ...] = ()
    enumeration: Enumeration | None = None

    def summed_out(self) -> "ModelStructure":
        """The same structure, with the latents whose supports can be enumerated set apart."""
        enumerated = tuple(site for site in self.latents if site.is_enumerable)
        if not enumerated:
            return self
        names = frozenset(site.name for site in enumerated)
        return replace(
            self,
            latents=tuple(site for site in self.latents if site.name not in names),
            enumerated=enumerated,
            enumeration=Enumeration(names, self.max_plate_nesting, shares_results=len(names) >= MANY),
        )

    @property
    def local(self) -> frozenset[str]:
        """The enumerated sites that belong to rows of data: those in a plate of data, and in a chain."""
        plates = {plate.name for site in self.observed for plate in site.plates}
        return frozenset(
            site.name for site in self.enumerated if site.is_in_chain or any(p.name in plates for p in site.plates)
        )

    @property
    def kept(self) -> dict[str, Tensor]:
        """The entries that belong to the posterior, by latent that has others too, broadcast with its value."""
        return {s.name: to_rank(s.kept, len(s.shape)) for s in self.latents if s.kept is not None}

    @property
    def subsampled(self) -> tuple[Plate, ...]:
        """The plates of which a run sees only a part."""
        return tuple(plate for plate in self.plates.values() if plate.is_subsampled)

    @property
    def has_data(self) -> bool:
        """Whether anything but priors counts: an observed value or a factor. Without it the posterior is the prior."""
        counted = [site for site in self.observed if site.shape.numel()] + list(self.factors)
        return any(not site.is_flat for site in counted)


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
        trace = trace_anywhere(model, args, kwargs, init_fn)
    structure = _structure_of(trace, reads.any)
    masks = {s.name: s.mask for s in structure.latents if s.mask is not None and not s.mask.all() and not s.is_discrete}
    if masks:
        depends = dependent_entries(model, args, kwargs, masks)
        latents = [_with_kept(site, trace, depends.get(site.name)) for site in structure.latents]
        structure = replace(structure, latents=tuple(latents))
    return structure, trace


def _with_kept(site: Site, trace: Trace, depends: Tensor | None) -> Site:
    """Note which entries of a masked latent belong to the posterior, given those on which the log joint depends."""
    if site.mask is None or depends is None:
        return site
    # A block may hide the data of a model, and what depends on a site with it: then a mask of False is a flat prior.
    has_data = any(node["is_observed"] and not follows_from_others(node) for node in sample_nodes(trace))
    if not site.mask.any() and not has_data:
        return site
    kept = site.mask | depends
    fn = innermost(trace.nodes[site.name]["fn"], kept.dim())
    return replace(
        site,
        kept=None if kept.all() else kept,
        is_flat=_is_improper(fn) or bool((kept & ~site.mask).any()),
        bijection=site.bijection and bijection_of(fn, site.shape, simplified(support_of(fn))),
    )


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


def _structure_of(trace: Trace, reads_values: bool) -> ModelStructure:
    latents, observed, factors, deterministic = [], [], [], []
    nesting = 0
    for node in sample_nodes(trace):
        frames = [-frame.dim for frame in node["cond_indep_stack"] if frame.vectorized]
        nesting = max([nesting, len(node["fn"].batch_shape), *frames])
        site = _site(node)
        if not node["infer"].get("_deterministic"):
            # Data may have more batch dimensions than their distribution.
            nesting = max(nesting, len(site.shape) - site.event_dim)
        if follows_from_others(node):
            # Pyro counts all dimensions of pyro.deterministic as event dimensions, which plates then expand, and masks
            # its density.
            event_dim = 0 if node["infer"].get("_deterministic") else site.event_dim
            deterministic.append(replace(site, event_dim=event_dim, mask=None, is_flat=False, law_shape=site.shape))
        elif not node["is_observed"]:
            latents.append(replace(site, bijection=bijection_of(node["fn"], site.shape, site.support)))
        elif isinstance(node["fn"], dist.Unit):
            factors.append(site)
        else:
            observed.append(site)
    dtypes = [trace.nodes[site.name]["value"].dtype for site in latents]
    floating = [dtype for dtype in dtypes if dtype.is_floating_point] or [torch.get_default_dtype()]
    return ModelStructure(
        latents=tuple(latents),
        observed=tuple(observed),
        factors=tuple(factors),
        deterministic=tuple(deterministic),
        plates=_plates(trace),
        parameters=tuple(name for name, node in trace.nodes.items() if node["type"] == "param"),
        max_plate_nesting=nesting,
        dtype=reduce(torch.promote_types, floating),
        reads_values=reads_values,
    )


def _plates(trace: Trace) -> dict[str, Plate]:
    """The plates by name: those around sites, even if their own statements are blocked, and those without sites."""
    plates = {
        name: Plate(name, node["fn"].size, len(node["value"]))
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and type(node["fn"]).__name__ == "_Subsample"
    }
    return plates | {plate.name: plate for node in sample_nodes(trace) for plate in _stack(node)}


def _stack(node: Any) -> tuple[Plate, ...]:
    return tuple(
        Plate(frame.name, frame.full_size or frame.size, frame.size, frame.dim if frame.vectorized else None)
        for frame in node["cond_indep_stack"]
    )


def _site(node: Any) -> Site:
    fn, value = node["fn"], torch.as_tensor(node["value"])
    support = simplified(support_of(fn))
    mask = entry_mask(fn, node["mask"], value.shape)
    return Site(
        name=node["name"],
        family=type(fn).__name__,
        shape=value.shape,
        event_dim=fn.event_dim,
        support=support,
        plates=_stack(node),
        mask=mask,
        scale=node["scale"],
        is_discrete=support is not None and support.is_discrete,
        is_enumerable=fn.has_enumerate_support,
        is_flat=_is_improper(fn) or (mask is not None and not mask.any()),
        nan_at=_nan_at(node, value, mask) if node["is_observed"] else torch.zeros(0, value.dim()),
        mask_shape=node["mask"].shape if isinstance(node["mask"], Tensor) else torch.Size(),
        law_shape=fn.shape(),
        is_in_chain="_markov_depth" in node["infer"],
    )


def _nan_at(node: Any, value: Tensor, mask: Tensor | None) -> Tensor:
    """The indices of the NaN in an observed value that make its log-density NaN."""
    fn, is_nan = node["fn"], value.isnan()
    if mask is not None:
        is_nan = is_nan & to_rank(mask, value.dim())
    if is_nan.any():
        try:
            is_bad = scale_and_mask(fn.log_prob(value), mask=node["mask"]).isnan()
            is_nan = is_nan & to_rank(is_bad, is_bad.dim() + fn.event_dim)
        except ValueError:  # by the validation of the distribution
            pass
    return is_nan.nonzero()


def _is_improper(fn: Any) -> bool:
    """Whether a distribution has no density of its own, or one that is masked before it is transformed."""
    is_transformed = False
    while hasattr(fn, "base_dist"):
        is_transformed |= isinstance(fn, dist.TransformedDistribution)
        if is_transformed and getattr(fn, "_mask", None) is False:
            return True
        fn = fn.base_dist
    return isinstance(fn, dist.ImproperUniform)

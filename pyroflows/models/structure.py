"""A Pyro model as data: its sites, supports and plates, and all latents packed into one unconstrained vector."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.utils._pytree import tree_map

from pyroflows.errors import DataError, ModelError, ShapeError

Model = Callable[..., Any]
InitFn = Callable[..., Any]


@dataclass(frozen=True)
class Plate:
    """A ``pyro.plate``: how many rows there are, and how many one run of the model sees."""

    name: str
    size: int
    subsample_size: int


@dataclass(frozen=True)
class Site:
    """A site of one run. ``plates`` names its batch dimensions from left to right, None where no plate stands."""

    name: str
    shape: torch.Size
    event_dim: int
    plates: tuple[str | None, ...]


@dataclass(frozen=True)
class Latent(Site):
    """A continuous latent site, its place in the packed unconstrained vector, and whether its prior is improper."""

    support: constraints.Constraint
    unconstrained_shape: torch.Size
    start: int
    is_flat: bool

    @property
    def stop(self) -> int:
        return self.start + self.unconstrained_shape.numel()


@dataclass(frozen=True)
class ModelStructure:
    """What one run of a model shows of it.

    Args:
        latents: continuous latent sites, in the order of the model, which is the order of packing.
        observed: observed sites, without factors.
        deterministic: ``pyro.deterministic`` sites.
        plates: plates by name.
        max_plate_nesting: number of batch dimensions that any site uses.
        dtype: the dtype of the packed vector.
    """

    latents: tuple[Latent, ...]
    observed: tuple[Site, ...]
    deterministic: tuple[Site, ...]
    plates: Mapping[str, Plate]
    max_plate_nesting: int
    dtype: torch.dtype

    @cached_property
    def dim(self) -> int:
        """Size of the packed unconstrained vector."""
        return self.latents[-1].stop

    @cached_property
    def subsampled(self) -> tuple[Plate, ...]:
        """The plates of which a run sees only a part."""
        return tuple(p for p in self.plates.values() if p.subsample_size < p.size)

    def constrain(self, vector: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Values of all sites ``(*batch, *site.shape)`` of ``(*batch, dim)``, and the log-determinant ``(*batch,)``."""
        batch_shape = vector.shape[:-1]
        values = {}
        ladj = vector.new_zeros(batch_shape)
        for site in self.latents:
            unconstrained = vector[..., site.start : site.stop].reshape(batch_shape + site.unconstrained_shape)
            transform = biject_to(site.support)
            value = transform(unconstrained)
            site_ladj = transform.log_abs_det_jacobian(unconstrained, value)
            ladj = ladj + sum_rightmost(site_ladj, site_ladj.dim() - len(batch_shape))
            values[site.name] = value.reshape(batch_shape + site.shape)
        return values, ladj

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The packed vector ``(*batch, dim)`` of values ``(*batch, *site.shape)``."""
        parts = []
        for site in self.latents:
            value = torch.as_tensor(values[site.name], dtype=self.dtype)
            batch_shape = value.shape[: value.dim() - len(site.shape)]
            parts.append(biject_to(site.support).inv(value).reshape((*batch_shape, -1)))
        return torch.cat(parts, -1)

    def check_draws(self, draws: Mapping[str, Tensor]) -> None:
        """Raise if draws ``(S, *site.shape)`` are not those of all latent sites.

        Raises:
            ShapeError: if a latent site is missing or has another shape.
            DataError: if a value is outside of its site's support.
        """
        num_draws = None
        for site in self.latents:
            value = draws.get(site.name)
            got = None if value is None else tuple(value.shape)
            num_draws = got[0] if num_draws is None and got else num_draws
            if value is None or got != (num_draws, *site.shape):
                expected = "".join(f", {size}" for size in site.shape) or ","
                raise ShapeError(
                    f"draws of site '{site.name}' must have shape (S{expected}), got {got}, with S={num_draws}"
                )
            if not site.support.check(value).all():
                raise DataError(f"draws of site '{site.name}' are not all in its support, {site.support}")

    def require_full_plates(self, advice: str) -> None:
        """Raise if a plate is subsampled: importance weights, k-hat and evidence need all rows.

        Raises:
            ModelError: names the plate.
        """
        for plate in self.subsampled:
            raise ModelError(
                f"plate '{plate.name}' is subsampled ({plate.subsample_size} of {plate.size} rows), and weights, k-hat "
                f"and evidence mean nothing on a part of the data: {advice}"
            )


def inspect_model(model: Model, args: Any, kwargs: Any, init_fn: InitFn | None = None) -> ModelStructure:
    """The structure of a model, from one run with the latents at their initial values.

    Raises:
        ModelError: for a model without latents, with discrete latents, with a support that has no bijection to the
            reals, with sequential plates, or with local latents in a subsampled plate; names the site.
        DataError: if observed values are NaN.
    """
    return structure_of(trace_model(model, args, kwargs, init_fn))


def trace_model(model: Model, args: Any, kwargs: Any, init_fn: InitFn | None = None) -> Trace:
    """One run of the model with latents at ``init_fn``, or drawn from the prior where that can be drawn."""
    init = InitMessenger(latent_init(init_fn or (lambda site: site["fn"].sample())))
    with torch.no_grad():
        return poutine.block(poutine.trace(init(model)).get_trace)(*args, **kwargs)


def structure_of(trace: Trace) -> ModelStructure:
    """The structure that a trace of a whole model shows."""
    plates = {
        name: Plate(name, node["fn"].size, len(node["value"]))
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and type(node["fn"]).__name__ == "_Subsample"
    }
    latents, observed, deterministic = [], [], []
    nesting, start = 0, 0
    for name, node in _sample_nodes(trace):
        nesting = max(
            [nesting, len(node["fn"].batch_shape)] + [-f.dim for f in node["cond_indep_stack"] if f.vectorized]
        )
        if node["infer"].get("_deterministic"):
            deterministic.append(_deterministic_site(node))
        elif node["is_observed"]:
            _check_observed(name, node)
            if not isinstance(node["fn"], dist.Unit):
                observed.append(_site(node))
        else:
            latents.append(_latent(node, start))
            start = latents[-1].stop
    if not latents:
        raise ModelError(
            "the model has no latent variables, so there is no posterior to fit: at least one pyro.sample site must "
            "have no obs"
        )
    dtypes = [trace.nodes[site.name]["value"].dtype for site in latents]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return ModelStructure(tuple(latents), tuple(observed), tuple(deterministic), plates, nesting, dtype)


def check_static(structure: ModelStructure, other: ModelStructure) -> None:
    """Two runs with other values must show the same latents.

    Raises:
        ModelError: if they do not; names the site.
    """
    first = {site.name: site for site in structure.latents}
    second = {site.name: site for site in other.latents}
    for name in sorted(first.keys() ^ second.keys()):
        raise ModelError(
            f"the model has dynamic structure: latent site '{name}' appears in one run and not in another; a flow "
            "needs the same latents in every run"
        )
    for name, site in first.items():
        if site.shape != second[name].shape or site.unconstrained_shape != second[name].unconstrained_shape:
            raise ModelError(
                f"the model has dynamic structure: latent site '{name}' has shape {tuple(site.shape)} in one run and "
                f"{tuple(second[name].shape)} in another; a flow needs the same shapes in every run"
            )


def model_parameters(model: Model, args: Any, kwargs: Any, init_fn: InitFn | None = None) -> dict[str, Tensor]:
    """The unconstrained tensors behind the ``pyro.param`` and ``pyro.module`` statements of a model."""
    trace = trace_model(model, args, kwargs, init_fn)
    values = {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "param"}
    # With module-local parameters those of plain modules come as they are.
    return {name: value.unconstrained() if hasattr(value, "unconstrained") else value for name, value in values.items()}


def in_dtype(model: Model, dtype: torch.dtype | None) -> Model:
    """The model as it runs in another floating dtype: arguments are cast, and numbers become tensors of that dtype."""
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
    """``init_fn`` for the latents of a flow.

    Sites that no flow can cover raise, naming the site, before ``init_fn`` fails at them in its own words. Priors
    without a sampler start at a feasible point, whatever ``init_fn`` says: ``dist.ImproperUniform`` has none, and
    Pyro's init functions all sample.
    """

    def init(site: Any = None) -> Any:
        # Pyro's init functions return a configured version of themselves when called without a site.
        if site is None:
            return init
        _check_support(site["name"], site["fn"])
        fn = site["fn"]
        try:
            value = init_fn(site)
        except NotImplementedError:
            transform = biject_to(fn.support)
            value = transform(torch.zeros(transform.inverse_shape(fn.shape())))
            value._pyro_custom_init = False
        if value.shape != fn.shape():
            raise ModelError(
                f"the model has dynamic structure, or init_loc_fn is wrong: latent site '{site['name']}' has shape "
                f"{tuple(value.shape)} in one run and {tuple(fn.shape())} in another; a flow needs the "
                "same shapes in every run"
            )
        return value

    return init


def _check_support(name: str, fn: Any) -> None:
    if fn.has_enumerate_support or fn.support.is_discrete:
        raise ModelError(
            f"latent site '{name}' is discrete ({type(fn).__name__}): a flow needs continuous latents. Sum it out with "
            "dist.MixtureSameFamily or dist.DiscreteHMM; or use AutoFlow(poutine.block(model, hide="
            f"['{name}'])) with SVI and TraceEnum_ELBO, the site marked infer={{'enumerate': 'parallel'}}"
        )
    try:
        biject_to(fn.support)
    except NotImplementedError:
        raise ModelError(
            f"latent site '{name}' has support {fn.support}, which has no bijection to the reals: reparametrise it"
        ) from None


def _sample_nodes(trace: Trace) -> Iterator[tuple[str, Any]]:
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and type(node["fn"]).__name__ != "_Subsample":
            yield name, node


def _site(node: Any) -> Site:
    shape = node["value"].shape
    event_dim = node["fn"].event_dim
    return Site(node["name"], shape, event_dim, _plate_names(node, len(shape) - event_dim))


def _deterministic_site(node: Any) -> Site:
    """By default Pyro counts all dimensions of such a site as event; plates of its own size still name them."""
    shape = node["value"].shape
    names: list[str | None] = [None] * len(shape)
    for frame in node["cond_indep_stack"]:
        if frame.vectorized and -frame.dim <= len(shape) and shape[frame.dim] == frame.size:
            names[frame.dim] = frame.name
    return Site(node["name"], shape, 0, tuple(names))


def _plate_names(node: Any, batch_dim: int) -> tuple[str | None, ...]:
    names: list[str | None] = [None] * batch_dim
    for frame in node["cond_indep_stack"]:
        if frame.vectorized and -frame.dim <= batch_dim:
            names[frame.dim] = frame.name
    return tuple(names)


def _latent(node: Any, start: int) -> Latent:
    name, fn = node["name"], node["fn"]
    for frame in node["cond_indep_stack"]:
        if not frame.vectorized:
            raise ModelError(
                f"latent site '{name}' stands in the sequential plate '{frame.name}': use 'with pyro.plate(...)' "
                "instead of 'for ... in pyro.plate(...)'"
            )
        if frame.full_size is not None and frame.size < frame.full_size:
            raise ModelError(
                f"latent site '{name}' is local to plate '{frame.name}', which is subsampled ({frame.size} of "
                f"{frame.full_size} rows): one flow would use the same dimensions for whichever rows are drawn. Run "
                "the plate with all its rows"
            )
    if any(isinstance(mask, Tensor) and not mask.all() for mask in _masks(node)):
        raise ModelError(
            f"latent site '{name}' is masked in part, and where it is masked it has no density, hence no posterior: "
            "give it only the entries that count, instead of mask or obs_mask"
        )
    unconstrained = biject_to(fn.support).inv(node["value"])
    site = _site(node)
    return Latent(
        site.name, site.shape, site.event_dim, site.plates, fn.support, unconstrained.shape, start, _is_flat(node)
    )


def _is_flat(node: Any) -> bool:
    """Whether a prior is constant, by ``ImproperUniform`` or by a mask, so that there is nothing to draw from."""
    fn = node["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.ImproperUniform) or any(mask is False for mask in _masks(node))


def _masks(node: Any) -> list[Any]:
    """Of the site itself and of the distributions that its distribution wraps."""
    fn, masks = node["fn"], [node["mask"]]
    while hasattr(fn, "base_dist"):
        masks.append(getattr(fn, "_mask", None))
        fn = fn.base_dist
    return masks


def _check_observed(name: str, node: Any) -> None:
    value = node["value"]
    if isinstance(value, Tensor) and torch.isnan(value).any():
        raise DataError(
            f"observed site '{name}' has {int(torch.isnan(value).sum())} NaN of {value.numel()} values: drop these "
            "rows, or fill them with any number and mask them with poutine.mask"
        )

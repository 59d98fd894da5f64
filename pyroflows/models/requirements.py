"""The requirements on a model that a flow can fit; each error names the site, and says what to do."""

from typing import Any

import torch
from pyro.distributions import constraints
from pyro.poutine import Trace

from pyroflows.constraints import without_events
from pyroflows.errors import DataError, FlowError, ModelError, OptionError
from pyroflows.models.arguments import explain_failure, non_finite, require_finite
from pyroflows.models.masks import require_same_mask
from pyroflows.models.structure import ModelStructure, Site, describe_run
from pyroflows.models.summable import checked_summable
from pyroflows.models.tracing import InitFn, Model

HALF_PRECISION = (torch.float16, torch.bfloat16)


def describe_for_flow(
    model: Model, args: Any, kwargs: Any, init_fn: InitFn | None = None
) -> tuple[ModelStructure, Trace]:
    """Describe a model by one run, as ``describe_run`` does, and raise if a flow cannot be its posterior.

    Discrete latents whose values can be enumerated are set apart from the others; a flow leaves them out.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        init_fn: initial values of the latents, by site; None to draw them from their priors.

    Raises:
        ModelError: as :func:`require_flow` does.
        DataError: if observed values are NaN, or if the model fails or its log-density is not finite because an
            argument holds NaN or infinite values; names the site, the argument and the position.
    """
    try:
        structure, trace = describe_run(model, args, kwargs, init_fn)
    except FlowError as error:
        # Pyro adds a table of shapes to errors that pass through a trace.
        raise type(error)(str(error).partition("\nTrace Shapes")[0]) from None
    except (ValueError, RuntimeError) as error:
        explain_failure(model, args, kwargs, error)
        raise
    structure = structure.summed_out()
    try:
        require_flow(structure)
    except DataError as error:
        found = non_finite(model, args, kwargs)
        if not found:
            raise
        raise DataError(f"{error} ({'; '.join(found)})") from None
    require_finite(model, args, kwargs, trace)
    return checked_summable(structure, model, args, kwargs, trace), trace


def require_flow(structure: ModelStructure) -> None:
    """Raise if one flow over all latents cannot be the posterior of a model.

    Args:
        structure: the structure of the model.

    Raises:
        ModelError: if the model has no continuous latents, or a latent that is not enumerated is discrete, has a
            support without a bijection to the reals, or stands in a sequential plate; if all latents are masked and
            nothing depends on them; or if a site's value is broadcast along dimensions that no plate declares; names
            the site.
        DataError: if observed values are NaN, and with them their log-densities.

    Example:
        >>> from pyroflows.models.structure import describe
        >>> def model():
        ...     pyro.sample("k", dist.Poisson(3.0))
        >>> require_flow(describe(model, (), {}))
        Traceback (most recent call last):
        pyroflows.errors.ModelError: latent site 'k' is discrete (Poisson), and cannot be summed out: ...
    """
    for site in structure.latents:
        _require_continuous(site)
        _require_bijection(site)
        _require_parallel_plates(site)
    for site in structure.observed:
        _require_no_nan(site)
    for site in (*structure.latents, *structure.enumerated, *structure.observed, *structure.factors):
        _require_declared_shape(site)
    if structure.latents and structure.dtype in HALF_PRECISION:
        raise ModelError(
            f"the latents, such as site '{structure.latents[0].name}', have dtype {_name(structure.dtype)}, which is "
            "too coarse for log-densities: use float32 or float64 for the model's priors and data"
        )
    if not structure.latents and structure.enumerated:
        raise ModelError(
            f"all latents are discrete, such as site '{structure.enumerated[0].name}', so that there is nothing to fit "
            "for a flow: infer_discrete of pyro.infer draws from their exact posterior"
        )
    if not structure.latents:
        raise ModelError(
            "the model has no latent variables, so there is no posterior to fit: at least one pyro.sample site must "
            "have no obs"
        )
    if all(site.kept is not None and not site.kept.any() for site in structure.latents):
        raise ModelError(
            f"all latents are masked, and nothing depends on them ({', '.join(s.name for s in structure.latents)}), so "
            "that there is no posterior to fit: is a mask False that should be True?"
        )


def require_local_rows(structure: ModelStructure) -> None:
    """Raise if a latent is local to a subsampled plate, so that each run shows other latents.

    Raises:
        ModelError: if so; names the site and the plate.
    """
    for site in structure.latents:
        for plate in site.plates:
            if plate.is_subsampled:
                raise ModelError(
                    f"latent site '{site.name}' is local to plate '{plate.name}', which is subsampled "
                    f"({plate.subsample_size} of {plate.size} rows): one flow would use the same dimensions for "
                    "whichever rows are drawn. Run the plate with all its rows, or use AutoStructuredFlow"
                )


def require_full_plates(structure: ModelStructure, advice: str) -> None:
    """Raise if a plate is subsampled, since importance weights, k-hat and evidence need all rows.

    Args:
        structure: the structure of the model.
        advice: the end of the message, which says what to do.

    Raises:
        ModelError: if a plate is subsampled; names the plate.
    """
    for plate in structure.subsampled:
        raise ModelError(
            f"plate '{plate.name}' is subsampled ({plate.subsample_size} of {plate.size} rows), and weights, k-hat "
            f"and evidence mean nothing on a part of the data: {advice}"
        )


def check_static(structure: ModelStructure, other: ModelStructure) -> None:
    """Raise if two runs of a model, at different values, do not show the same latents.

    Args:
        structure: what the first run shows.
        other: what the second run shows.

    Raises:
        ModelError: if a latent appears in one run alone, or has different shapes or masks; names the site.
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
        require_same_mask(name, site.mask, second[name].mask)
        require_same_mask(name, site.kept, second[name].kept)


def require_dtype(dtype: torch.dtype | None) -> None:
    """Raise if a dtype cannot be that of a flow and its model.

    Args:
        dtype: the dtype that a user has chosen; None for no choice.

    Raises:
        OptionError: if the dtype is not floating, or of half precision.

    Example:
        >>> require_dtype(torch.float16)
        Traceback (most recent call last):
        pyroflows.errors.OptionError: dtype must be torch.float32 or torch.float64, got torch.float16
    """
    if dtype is not None and dtype not in (torch.float32, torch.float64):
        raise OptionError(f"dtype must be torch.float32 or torch.float64, got {dtype}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_declared_shape(site: Site) -> None:
    """Raise if a value counts several times along a dimension that is no plate, since shapes do not fit.

    Batch dimensions without a plate are no fault by themselves, unlike for Pyro's own ELBO.
    """
    is_factor = site.family == "Unit"
    law_batch = site.law_shape[: len(site.law_shape) - site.event_dim]
    event_shape = torch.Size() if is_factor else site.law_shape[len(law_batch) :]
    value_shape = law_batch if is_factor else site.shape
    # A mask of the distribution itself has given the distribution its shape.
    outside = [shape for shape in (site.mask_shape, torch.as_tensor(site.scale).shape) if shape]
    plates = {plate.dim: plate for plate in site.plates if plate.dim is not None}
    around = "".join(f" in plate '{plate.name}' of size {plate.subsample_size}" for plate in plates.values())
    kind = "latent" if site.bijection else "observed"
    law = f"batch shape {tuple(law_batch)}" + (f" and event shape {tuple(event_shape)}" if event_shape else "")
    shapes = f"{kind} site '{site.name}'{around} has a value of shape {tuple(value_shape)} and a distribution of {law}"
    if is_factor:
        shapes = f"factor '{site.name}'{around} has shape {tuple(law_batch)}"
    try:
        full = torch.broadcast_shapes(torch.broadcast_shapes(law_batch, *outside) + event_shape, value_shape)
    except RuntimeError:
        if site.family != "Independent" and value_shape[len(value_shape) - len(event_shape) :] != event_shape:
            return  # such as a series of another length, for which a distribution has its own rules
        raise ModelError(f"{shapes}, which do not fit: {_repair(site)}") from None
    batch = full[: len(full) - len(event_shape)]
    undeclared = any(dim not in plates and batch[dim] > 1 for dim in range(-len(batch), 0))
    if is_factor and plates and undeclared:
        raise ModelError(f"{shapes}, where a dimension is no plate: {_repair(site)}")
    # Other distributions than independent ones may have events of any length.
    widens_event = site.family == "Independent" and full[len(batch) :] != event_shape
    is_repeated = value_shape.numel() not in (1, full.numel())
    if not is_factor and is_repeated and (undeclared or widens_event):
        within = ", with mask and scale," if outside else ""
        raise ModelError(
            f"{shapes}, which broadcast{within} to {tuple(full)}, so that values count several times: {_repair(site)}"
        )


def _repair(site: Site) -> str:
    if site.shape[-1:] == (1,) and site.law_shape[-1:] != (1,):
        return "drop the last dimension of the data, for instance by y.squeeze(-1)"
    return (
        "bring data and parameters to the same shape, for instance by x.squeeze(-1), and declare every dimension by a "
        "plate, or as part of one value by .to_event(1)"
    )


def _require_continuous(site: Site) -> None:
    if not site.is_discrete:
        return
    if site.name.endswith("_unobserved"):
        raise ModelError(
            f"latent site '{site.name}', made by obs_mask, is discrete ({site.family}), and cannot be summed out: mask "
            "the rows without a value instead, by poutine.mask(mask=...) around a site without obs_mask"
        )
    way_out = (
        "cut its support off, as dist.Categorical(logits=fn.log_prob(torch.arange(100.0))) does with a law fn; or sum "
        "it out by hand, as dist.GammaPoisson, dist.ZeroInflatedPoisson and dist.DirichletMultinomial do"
    )
    if site.family == "Independent":
        way_out = "give each of its entries values of its own, by 'with pyro.plate(...)' in place of .to_event(1)"
    raise ModelError(
        f"latent site '{site.name}' is discrete ({site.family}), and cannot be summed out: a flow needs continuous "
        "latents, beside discrete ones whose values can be enumerated, such as those of Bernoulli, Categorical and "
        f"Binomial laws: {way_out}"
    )


def _require_bijection(site: Site) -> None:
    if site.support is None:
        raise ModelError(
            f"the support of latent site '{site.name}' ({site.family}) is not known, since it is that of an angle, a "
            "simplex or entries with different bounds behind a transform, or is not declared: draw the base "
            f"distribution at a site of its own, and transform its value by pyro.deterministic('{site.name}', ...)"
        )
    if site.unconstrained_shape is None:
        way_out = "reparametrise it"
        if _is_sphere(site.support):
            draw_it = "" if site.family == "ProjectedNormal" else "draw it as dist.ProjectedNormal, and "
            way_out = (
                f"{draw_it}use poutine.reparam(model, config={{'{site.name}': ProjectedNormalReparam()}}) of "
                "pyro.infer.reparam"
            )
        raise ModelError(
            f"latent site '{site.name}' has support {site.support}, which has no bijection to the reals: {way_out}"
        )


def _is_sphere(support: constraints.Constraint | None) -> bool:
    return support is not None and without_events(support) is constraints.sphere


def _require_parallel_plates(site: Site) -> None:
    for plate in site.plates:
        if plate.dim is None:
            raise ModelError(
                f"latent site '{site.name}' stands in the sequential plate '{plate.name}': use 'with pyro.plate(...)' "
                "instead of 'for ... in pyro.plate(...)'"
            )


def _require_no_nan(site: Site) -> None:
    if len(site.nan_at):
        first = ", ".join(str(tuple(index)) for index in site.nan_at[:3].tolist())
        more = ", ..." if len(site.nan_at) > 3 else ""
        raise DataError(
            f"observed site '{site.name}' has {len(site.nan_at)} NaN of {site.shape.numel()} values, at {first}{more}: "
            "drop these rows; or fill them with any number, and mask them with poutine.mask, or with "
            "obs_mask=~y.isnan(), so that they are imputed"
        )

"""The requirements on a model that a flow can fit; each error names the site, and says what to do."""

from pyro.distributions import constraints

from pyroflows.errors import DataError, ModelError
from pyroflows.models.structure import ModelStructure, Site


def require_flow(structure: ModelStructure) -> None:
    """Raise if one flow over all latents cannot be the posterior of a model.

    Args:
        structure: the structure of the model.

    Raises:
        ModelError: if the model has no latents, or a latent is discrete, has a support without a bijection to the
            reals, stands in a sequential plate, is local to a subsampled plate, or is masked in part; names the site.
        DataError: if observed values are NaN.

    Example:
        >>> from pyroflows.models.structure import describe
        >>> def model():
        ...     pyro.sample("k", dist.Poisson(3.0))
        >>> require_flow(describe(model, (), {}))
        Traceback (most recent call last):
        pyroflows.errors.ModelError: latent site 'k' is discrete (Poisson): a flow needs continuous latents. ...
    """
    for site in structure.latents:
        _require_continuous(site)
        _require_bijection(site)
        _require_parallel_plates(site)
        _require_all_rows(site)
        _require_density(site)
    for site in structure.observed:
        _require_no_nan(site)
    if not structure.latents:
        raise ModelError(
            "the model has no latent variables, so there is no posterior to fit: at least one pyro.sample site must "
            "have no obs"
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
        ModelError: if a latent appears in one run alone, or has different shapes; names the site.
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


def _require_continuous(site: Site) -> None:
    if site.is_enumerable or site.is_discrete:
        raise ModelError(
            f"latent site '{site.name}' is discrete ({site.family}): a flow needs continuous latents. Sum it out with "
            "dist.MixtureSameFamily or dist.DiscreteHMM; or use enumeration, by AutoFlow(poutine.block(model, hide="
            f"['{site.name}'])) with SVI and TraceEnum_ELBO, the site marked infer={{'enumerate': 'parallel'}}"
        )


def _require_bijection(site: Site) -> None:
    if site.unconstrained_shape is None:
        way_out = "reparametrise it"
        if _is_sphere(site.support):
            way_out = (
                "draw it as dist.ProjectedNormal, and use poutine.reparam(model, config="
                f"{{'{site.name}': ProjectedNormalReparam()}})"
            )
        raise ModelError(
            f"latent site '{site.name}' has support {site.support}, which has no bijection to the reals: {way_out}"
        )


def _is_sphere(support: constraints.Constraint | None) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.sphere


def _require_parallel_plates(site: Site) -> None:
    for plate in site.plates:
        if plate.dim is None:
            raise ModelError(
                f"latent site '{site.name}' stands in the sequential plate '{plate.name}': use 'with pyro.plate(...)' "
                "instead of 'for ... in pyro.plate(...)'"
            )


def _require_all_rows(site: Site) -> None:
    for plate in site.plates:
        if plate.is_subsampled:
            raise ModelError(
                f"latent site '{site.name}' is local to plate '{plate.name}', which is subsampled "
                f"({plate.subsample_size} of {plate.size} rows): one flow would use the same dimensions for whichever "
                "rows are drawn. Run the plate with all its rows"
            )


def _require_density(site: Site) -> None:
    if site.is_masked_in_part:
        raise ModelError(
            f"latent site '{site.name}' is masked in part, and where it is masked it has no density, hence no "
            "posterior: give it only the entries that count, instead of mask or obs_mask"
        )


def _require_no_nan(site: Site) -> None:
    if site.num_nan:
        raise DataError(
            f"observed site '{site.name}' has {site.num_nan} NaN of {site.shape.numel()} values: drop these rows, or "
            "fill them with any number and mask them with poutine.mask"
        )

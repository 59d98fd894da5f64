"""Latent sites as records that a file can hold, from which they are rebuilt without the model, and their comparison."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.flows.encoding import decode, encode
from pyroflows.models.bijections import bijection_to
from pyroflows.models.masks import to_rank
from pyroflows.models.structure import ModelStructure, Plate, Site
from pyroflows.models.supports import is_same_support

# What Pyro adds to the name of a site with ``obs_mask``, to name the two sites that it makes of it.
OBSERVED, UNOBSERVED = "_observed", "_unobserved"
_KEPT_AS_IT_IS = ("name", "family", "shape", "event_dim", "support", "mask", "kept", "is_flat")
_PLATE = ("name", "size", "subsample_size", "dim")


def encode_sites(sites: Sequence[Site]) -> tuple[Any, dict[str, Tensor]]:
    """Return JSON and tensors from which :func:`decode_sites` rebuilds latents.

    Args:
        sites: latents with bijections to the reals.

    Returns:
        The JSON, and the tensors by name; None and no tensors if a site has a support of a class of the user's, which
        only the model can rebuild.
    """
    try:
        return encode([_record(site) for site in sites])
    except OptionError:
        return None, {}


def decode_sites(code: Any, tensors: dict[str, Tensor]) -> tuple[Site, ...] | None:
    """Rebuild what :func:`encode_sites` wrote. The densities of the sites are unknown.

    Raises:
        ValueError: if a site makes no sense; other errors of Python and torch, if something has another type.

    Example:
        >>> from pyroflows.models.structure import describe
        >>> latents = describe(lambda: pyro.sample("s", dist.HalfNormal(torch.ones(3)).to_event(1)), (), {}).latents
        >>> (site,) = decode_sites(*encode_sites(latents))
        >>> site.name, site.bijection.constrain(torch.zeros(3))
        ('s', (tensor([1., 1., 1.]), tensor(0.)))
    """
    return None if code is None else tuple(_site(record) for record in decode(code, tensors))


def _record(site: Site) -> dict[str, Any]:
    assert site.bijection is not None
    return {
        **{name: getattr(site, name) for name in _KEPT_AS_IT_IS},
        "plates": [[getattr(plate, name) for name in _PLATE] for plate in site.plates],
        "bijection": {"support": site.bijection.support, "event_dim": site.bijection.event_dim},
    }


def _site(record: Mapping[str, Any]) -> Site:
    fields = {name: record[name] for name in _KEPT_AS_IT_IS}
    name, shape, kept = fields["name"], torch.Size(fields["shape"]), fields["kept"]
    bijection = bijection_to(record["bijection"]["support"], shape, record["bijection"]["event_dim"])
    if bijection is None or not isinstance(name, str):
        raise ValueError(f"latent site {name!r} has no bijection to the reals")
    if kept is not None and kept.shape != shape[: kept.dim()]:
        raise ValueError(f"latent site '{name}' of shape {tuple(shape)} has a mask of another shape")
    site = Site(
        **{**fields, "shape": shape},
        plates=tuple(Plate(*plate) for plate in record["plates"]),
        scale=1.0,
        is_discrete=False,
        is_enumerable=False,
        nan_at=torch.zeros(0, len(shape)),
        mask_shape=torch.Size(),
        law_shape=shape,
        bijection=bijection,
    )
    # What makes no sense raises here, and not at the first draw.
    value, _ = bijection.constrain(torch.zeros(bijection.unconstrained_shape))
    if not bool(fields["support"].check(value).all()):
        raise ValueError(f"latent site '{name}' has two supports")
    tuple(site.plate_names)
    return site


def structure_of(latents: Sequence[Site], dtype: torch.dtype) -> ModelStructure:
    """The structure of a model of which nothing but the latents is known.

    Args:
        latents: the latents, in the order of the model.
        dtype: the dtype of their values.
    """
    plates = {plate.name: plate for site in latents for plate in site.plates}
    nesting = max((len(site.shape) - site.event_dim for site in latents), default=0)
    return ModelStructure(
        latents=tuple(latents),
        observed=(),
        factors=(),
        deterministic=(),
        plates=plates,
        parameters=(),
        max_plate_nesting=nesting,
        dtype=dtype,
        reads_values=False,
    )


def difference(saved: Sequence[Site], found: Sequence[Site]) -> str | None:
    """Say in words which latent differs between two models in its support, or in its entries that have a posterior.

    Args:
        saved: the latents of the one model.
        found: the latents of the other, of the same names and shapes in the same order.

    Returns:
        A clause; None if all are the same.
    """
    if other := other_support(saved, found):
        return other
    for site, other_site in zip(saved, found, strict=True):
        # A flow has no numbers for the entries that are left out, so that those of others would stand in their place.
        differs = _is_kept(site) != _is_kept(other_site)
        if differs.any():
            index = differs.nonzero()[0]
            verb, other_verb = ("has a", "has none") if _is_kept(site)[tuple(index)] else ("has no", "has one")
            return (
                f"where entry {index.tolist()} of latent site '{site.name}' {verb} posterior, but in this one it "
                f"{other_verb}: give the mask, or the missing values, of the fit"
            )
    return None


def other_support(saved: Sequence[Site], found: Sequence[Site]) -> str | None:
    """Say in words which latent has another support in one model than in another; None if all have the same.

    Args:
        saved: the latents of the one model.
        found: the latents of the other, of the same names in the same order.
    """
    for site, other in zip(saved, found, strict=True):
        if not is_same_support(site.support, other.support):
            return (
                f"where latent site '{site.name}' has the support {site.support}, but in this one it has "
                f"{other.support}"
            )
    return None


def names_without_values(data: Collection[str], latents: Collection[str]) -> frozenset[str]:
    """The names of the latents that a model has in place of its data, where they have no value.

    Pyro makes two sites ``y_observed`` and ``y_unobserved`` of a site ``y`` with ``obs_mask``. A model that gives
    neither values nor a mask has ``y``.

    Args:
        data: the names of the observed sites and of the factors.
        latents: the names of the latents with these data.

    Example:
        >>> sorted(names_without_values(["y_observed", "z"], ["mu", "y_unobserved"]))
        ['y', 'y_observed', 'z']
    """
    bases = [name.removesuffix(OBSERVED) for name in data if name.endswith(OBSERVED)]
    return frozenset(data) | {base for base in bases if base + UNOBSERVED in latents}


def difference_without_data(saved: Sequence[Site], found: Sequence[Site], without_values: frozenset[str]) -> str | None:
    """Say in words how the latents of a model that runs without its data differ from those that it had with them.

    Shapes are not compared, nor is what follows from masks.

    Args:
        saved: the latents with the data.
        found: the latents without them.
        without_values: the names by :func:`names_without_values`.

    Returns:
        A clause; None if all are the same.
    """
    missing = {base + UNOBSERVED for base in without_values} - {site.name for site in found}
    saved = [site for site in saved if site.name not in missing]
    found = [site for site in found if site.name not in without_values]
    names, other_names = [site.name for site in saved], [site.name for site in found]
    if names != other_names:
        return f"with latent sites {names}, but this one has {other_names}"
    pairs = [(site, other) for site, other in zip(saved, found, strict=True) if site.shape == other.shape]
    return other_support([site for site, _ in pairs], [other for _, other in pairs])


def _is_kept(site: Site) -> Tensor:
    """Which entries of a latent belong to the posterior, in the shape of its value."""
    kept = torch.tensor(True) if site.kept is None else to_rank(site.kept.cpu(), len(site.shape))
    return kept.expand(site.shape)

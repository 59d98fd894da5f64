"""Requirements of a model that serves as a simulator: draws of its sites must follow its joint distribution."""

from collections.abc import Collection

import torch

from pyroflows.errors import ModelError
from pyroflows.models.requirements import require_full_plates
from pyroflows.models.structure import ModelStructure


def require_drawable(structure: ModelStructure, data: Collection[str]) -> None:
    """Raise if draws of a model's sites do not follow the joint distribution that its posterior follows from.

    Args:
        structure: the structure of the model.
        data: the names of the sites that are data. Their entries may be masked; those of latents may not be flat.

    Raises:
        ModelError: if a plate is subsampled, a factor or a scale changes the density, or a prior is flat; names it.

    Example:
        >>> from pyroflows.models.structure import describe
        >>> def model():
        ...     mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        ...     pyro.sample("y", dist.Normal(mu, 1.0))
        >>> require_drawable(describe(model, (), {}), ["y"])
        Traceback (most recent call last):
        pyroflows.errors.ModelError: the prior of site 'mu' is flat and cannot be drawn from: give it a proper one
    """
    require_full_plates(structure, "give arguments for which the model simulates all rows")
    for factor in structure.factors:
        raise ModelError(
            f"the factor '{factor.name}' changes the law of the latents, and no simulation shows it: draw from that "
            "law by pyro.sample, or leave the factor out"
        )
    for site in structure.latents:
        if site.is_flat and site.mask is None:
            raise ModelError(f"the prior of site '{site.name}' is flat and cannot be drawn from: give it a proper one")
        if site.is_flat and site.name not in data:
            raise ModelError(
                f"the prior of site '{site.name}' is flat where it is masked, while simulations draw from it: leave "
                "the mask out"
            )
    for site in (*structure.latents, *structure.observed):
        if (torch.as_tensor(site.scale) != 1).any():
            raise ModelError(
                f"site '{site.name}' has a scale, which simulations do not follow: leave poutine.scale out"
            )


def require_continuous(structure: ModelStructure, left_out: Collection[str]) -> None:
    """Raise if a latent is discrete, apart from data and latents that are not inferred.

    Args:
        structure: the structure of the model.
        left_out: the names of these sites.

    Raises:
        ModelError: if so; names the site.
    """
    for site in structure.latents:
        if site.name not in left_out and (site.is_discrete or site.is_enumerable):
            raise ModelError(
                f"latent site '{site.name}' is discrete ({site.family}), and only continuous ones can be inferred: "
                "name the ones to infer by latents=[...], which makes the others part of the simulator; or sum it out"
            )

"""How far the sites of a hierarchical model are centred, chosen by a first Gaussian before modes are sought."""

import torch
from torch import Tensor

from pyroflows.guides.centering import Centering
from pyroflows.inference.search.density import Density, antithetic
from pyroflows.inference.search.gaussians import Approximation, refine
from pyroflows.inference.search.pathfinder import approximations

# The centredness is chosen anew as often as this, while it changes by more than this anywhere.
MAX_ROUNDS, LEAST_CHANGE = 2, 0.1
NUM_DRAWS = 512


def recentred(density: Density, centering: Centering, starts: Tensor) -> Tensor:
    """Choose the centredness of a layer, so that the density before it is near to a Gaussian.

    In the non-centred form the prior of a component has variance 1. Where the data inform it, its posterior has less,
    and the centred form is nearer to a Gaussian: the centredness becomes 1 less the variance, as long as the Gaussian
    is better for it.

    Args:
        density: the log-density before the layer, which it reads anew at each call.
        centering: the layer, non-centred; its centredness is changed in place.
        starts: vectors before the layer, ``(S, dim)``.

    Returns:
        The same vectors before the changed layer, the first of which is the mean of the Gaussian.

    Raises:
        ValueError: if the density is not finite at the first start.
    """
    non_centred = centering.at(torch.zeros_like(centering.centredness))
    best = approximations(density, starts[:1])[0]
    for _ in range(MAX_ROUNDS):
        old = centering.at(centering.centredness)
        new = centering.at(_centredness(centering, non_centred, best))
        if (new.centredness - old.centredness)[centering.changed].abs().max() < LEAST_CHANGE:
            break
        _set(centering, new)
        found = refine(density, _moved(best, old, new), [])
        if not found.elbo > best.elbo:
            _set(centering, old)
            break
        best = found
    with torch.no_grad():
        starts = centering.base_value(non_centred(starts))
    return torch.cat([best.loc.to(starts)[None], starts[1:]])


@torch.no_grad()
def _centredness(centering: Centering, non_centred: Centering, q: Approximation) -> Tensor:
    """One less the variances of the non-centred components under a Gaussian before the layer, between 0 and 1."""
    draws = (q.loc + antithetic(NUM_DRAWS, q.loc) @ q.root.mT).to(centering.centredness)
    variances = non_centred.base_value(centering(draws)).var(0)
    return (1 - variances.nan_to_num(nan=1.0)).clamp(0, 1)


@torch.no_grad()
def _set(centering: Centering, other: Centering) -> None:
    centering.centredness.copy_(other.centredness)


def _moved(q: Approximation, old: Centering, new: Centering) -> Approximation:
    """Map a Gaussian from before one layer to before another, by the Jacobian of the map at its mean."""
    dim = len(q.loc)
    with torch.enable_grad():
        rows = q.loc.to(old.centredness).expand(dim, dim).clone().requires_grad_()
        image = new.base_value(old(rows))
        (jacobian,) = torch.autograd.grad(image.diagonal().sum(), rows)
    return Approximation(image[0].detach().to(q.loc), jacobian.to(q.root) @ q.root, q.elbo)

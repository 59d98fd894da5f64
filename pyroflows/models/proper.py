"""The requirement that the posterior of a model with flat priors can be normalised."""

import pyro
import torch
from torch import Tensor

from pyroflows.errors import ModelError
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import Site


def require_proper(log_joint: LogJoint, vector: Tensor) -> None:
    """Raise if a flat prior over an unbounded support leaves a posterior that cannot be normalised.

    That is so if nothing is observed, and if nothing depends on the site: the log-densities of all sites have gradient
    exactly zero, and stay the same however far the value moves.

    Args:
        log_joint: the log joint of the model.
        vector: an unconstrained vector ``(dim,)`` at which it is finite.

    Raises:
        ModelError: if so; names the site.
    """
    layout, structure = log_joint.layout, log_joint.structure
    for site in structure.latents:
        if not site.is_flat or _is_bounded(site, vector):
            continue
        free = torch.zeros_like(vector, dtype=torch.bool)
        free[layout.slices[site.name]] = True
        if structure.has_data:
            free &= _gradient_of_log_probs(log_joint, vector) == 0
        if free.any() and (not structure.has_data or _is_constant(log_joint, vector, free)):
            raise ModelError(
                f"the prior of site '{site.name}' is flat and nothing observed depends on it, so that the posterior "
                "cannot be normalised: give the site a proper prior, or use it"
            )


def _is_bounded(site: Site, like: Tensor) -> bool:
    """Whether no value of a site is large, however far the unconstrained value goes."""
    assert site.bijection is not None
    shape, far = site.bijection.unconstrained_shape, torch.finfo(like.dtype).max ** 0.5
    ends = [site.bijection.constrain(like.new_full(shape, end))[0] for end in (far, -far)]
    # Values of a half line stop at the largest number instead of becoming infinite.
    return all(bool((end.abs() < far).all()) for end in ends)


def _log_probs(log_joint: LogJoint, vectors: Tensor) -> Tensor:
    """The sum of the log-densities of all sites ``(S,)``, without the Jacobian of the bijections."""
    values, _ = log_joint.layout.constrain(vectors)
    log_probs = log_joint.batched(values, len(vectors), log_joint.draw_subsample()).log_probs
    return torch.stack([log_prob.reshape(len(vectors), -1).sum(-1) for log_prob in log_probs.values()]).sum(0)


def _gradient_of_log_probs(log_joint: LogJoint, vector: Tensor) -> Tensor:
    leaf = vector.detach()[None].requires_grad_()
    total = _log_probs(log_joint, leaf).sum()
    if not total.requires_grad:
        return torch.zeros_like(vector)
    return torch.autograd.grad(total, leaf)[0][0]


@torch.no_grad()
def _is_constant(log_joint: LogJoint, vector: Tensor, free: Tensor) -> bool:
    """Whether log-densities stay exactly the same if the free components of a vector move, near and far."""
    moves = torch.tensor([0.0, 1.0, -1.0, 10.0, -10.0]).to(vector)[:, None]
    with pyro.validation_enabled(False):
        totals = _log_probs(log_joint, vector + moves * free)
    return bool((totals == totals[0]).all())

"""Angles: where to cut circles, so that a flow on the real line can fit the posterior, and angles on a line."""

import math

import torch
from torch import Tensor

from pyroflows.constraints import wrapped
from pyroflows.errors import ModelError
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.supports import is_real

NUM_ANGLES = 32
NUM_SWEEPS = 2
# With more evaluations of the log joint than this in a sweep, the directions of the priors decide.
MAX_EVALUATIONS = 10_000


@torch.no_grad()
def find_centers(log_joint: LogJoint, center: Tensor) -> dict[str, Tensor]:
    """Choose the angles at the origin of the unconstrained space, opposite to where the log joint is lowest.

    A circle is cut at the point opposite to its center, and a mode that the cut divides would be two, at infinity. So
    the log joint is evaluated around each circle, the other latents held where they are, all circles in one batch; then
    every angle goes to its best value, and the search is repeated.

    Args:
        log_joint: the log joint of a model.
        center: the unconstrained vector at which the search starts, ``(dim,)``.

    Returns:
        Angles by site on circles; empty if there is none, or if there are too many for a search.
    """
    values = {name: value[0] for name, value in log_joint.layout.constrain(center[None])[0].items()}
    components = [(name, i) for name, c in log_joint.layout.centers.items() for i in range(c.numel())]
    num_rows = len(components) * NUM_ANGLES
    if not 0 < num_rows <= MAX_EVALUATIONS:
        return {}
    angles = torch.arange(NUM_ANGLES).to(center) * (2 * math.pi / NUM_ANGLES) - math.pi
    lowest = {name: torch.zeros_like(values[name]) for name in log_joint.layout.centers}
    for _ in range(NUM_SWEEPS):
        rows = {name: value.expand(num_rows, *value.shape).clone() for name, value in values.items()}
        for k, (name, i) in enumerate(components):
            rows[name].reshape(num_rows, -1)[k * NUM_ANGLES : (k + 1) * NUM_ANGLES, i] = angles
        log_probs = log_joint.batched.in_chunks(rows, num_rows).log_probs.values()
        total = torch.stack([log_prob.reshape(num_rows, -1).sum(-1) for log_prob in log_probs]).sum(0)
        profile = total.nan_to_num(nan=-torch.inf).reshape(-1, NUM_ANGLES)
        for k, (name, i) in enumerate(components):
            values[name].view(-1)[i] = angles[profile[k].argmax()]
            lowest[name].view(-1)[i] = angles[profile[k].argmin()]
    return {name: wrapped(angle + math.pi) for name, angle in lowest.items()}


@torch.no_grad()
def require_no_flat_angles(log_joint: LogJoint, center: Tensor) -> None:
    """Raise if a latent with a flat prior on the real line is an angle, so that its posterior has infinite mass.

    Args:
        log_joint: the log joint of a model.
        center: an unconstrained vector at which it is finite, ``(dim,)``.

    Raises:
        ModelError: if the log joint has a period of one turn in such a latent; names the site.
    """
    sites = [site for site in log_joint.structure.latents if site.is_flat and is_real(site.support)]
    for site in sites:
        for i in range(*log_joint.layout.slices[site.name].indices(len(center))):
            moved = center.repeat(4, 1)
            moved[1:, i] += torch.tensor([2 * math.pi, 4 * math.pi, 1.0]).to(center)
            value, turned, turned_twice, other = log_joint.in_chunks(moved).double().tolist()
            tolerance = 1e-4 * (1 + abs(value))
            if max(abs(turned - value), abs(turned_twice - value)) < tolerance < 0.1 * abs(other - value):
                raise ModelError(
                    f"latent site '{site.name}' has a flat prior on the real line, but the log joint has a period of "
                    "one turn in it, so that the posterior has infinite mass: draw the angle from "
                    "dist.VonMises(torch.tensor(0.), torch.tensor(1.)).mask(False), which is flat on one period"
                )

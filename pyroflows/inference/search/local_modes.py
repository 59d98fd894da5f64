"""Modes of local latents that a search among the global ones cannot see, since it settles the local ones at one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.flows import Flow
from pyroflows.inference.search.marginal import GlobalMarginal
from pyroflows.inference.search.symmetries import find_symmetries
from pyroflows.models.log_joint import LogJoint

NUM_DRAWS = 6  # at which symmetries are tested
# An image of a draw is in another mode where the flows have a density that is smaller by so many nats.
MUCH_SMALLER = 4.0
# Rows are in another mode if they settle so many standard deviations away, and have more than this share of the mass.
FAR, LEAST_SHARE = 5.0, 0.01
MAX_SLOPE = 0.01  # in nats, of rows that have settled
MAX_ROWS = 64


@torch.no_grad()
def has_images(log_joint: LogJoint, flows: Sequence[Flow]) -> bool:
    """Whether sign changes or exchanges of latents map the modes of a search to modes that it has not found.

    Args:
        log_joint: the log joint of the model.
        flows: the Gaussians of all latents at the modes that the search has found.
    """
    draws = flows[0]().sample((NUM_DRAWS,))
    draws = draws[log_joint(draws).isfinite()]
    if not len(draws):
        return False
    density = _log_density(flows, draws)
    for symmetry in find_symmetries(log_joint.layout, log_joint, draws):
        if (density - _log_density(flows, symmetry(draws))).median() > MUCH_SMALLER:
            return True
    return False


def _log_density(flows: Sequence[Flow], x: Tensor) -> Tensor:
    """The largest log-density of the flows at vectors."""
    return torch.stack([flow().log_prob(x) for flow in flows]).amax(0)


@torch.no_grad()
def has_other_rows(marginal: GlobalMarginal, loc: Tensor, points: Tensor) -> bool:
    """Whether rows settle at other modes from other points, at fixed global latents.

    Args:
        marginal: the marginal density of the global latents.
        loc: the global latents, ``(D_0,)``.
        points: vectors of all latents from which rows are settled, ``(num_rows, D)``, before the layer of the marginal
            where it has one.
    """
    at_globals = loc.expand(len(points), -1)
    mode, found = marginal.settled(at_globals), marginal.settled(at_globals, points)
    laws, others = marginal.conditionals(mode), marginal.conditionals(found)
    slopes = marginal.slopes(found)
    at_mode = marginal.value(mode[:1])
    for level, precision, other in zip(marginal.levels, laws.precisions, others.precisions, strict=True):
        moved = (found - mode)[:, level.places].double()
        distance = torch.einsum("srd,srde,sre->sr", moved, precision, moved)
        is_settled = found[:, level.places].isfinite().all(-1) & (slopes[:, level.places].amax(-1) < MAX_SLOPE)
        draws, rows = ((distance > FAR**2) & is_settled).nonzero()[:MAX_ROWS].mT
        if not len(draws):
            continue
        swapped = mode[:1].repeat(len(draws), 1)
        swapped[torch.arange(len(draws))[:, None], level.places[rows]] = found[draws[:, None], level.places[rows]]
        gain = marginal.value(swapped) - at_mode
        gain = gain + 0.5 * (precision[0, rows].logdet() - other[draws, rows].logdet())
        if bool((gain > math.log(LEAST_SHARE)).any()):
            return True
    return False

"""A block of local latents that depend on one another: a random walk, a Gaussian process, regression coefficients.

Such a block has no independent rows, but given a few global latents it is close to a Gaussian, whose precision the
Hessian of the log joint shows, be it sparse or dense.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.models.layout import Layout
from pyroflows.models.levels import SiteLevel, TimesHessian
from pyroflows.models.structure import Site

# Matrices of a block are dense, so that its size is bounded; and smaller ones are left to a flow over all latents.
MIN_BLOCK, MAX_BLOCK, MAX_GLOBAL = 30, 400, 12
# Latents that the Hessian links with more than this share of all are global.
SHARE_OF_HUBS = 0.5


@dataclass(frozen=True, eq=False)
class Block:
    """A split of the latents of a model.

    Args:
        levels: the global level, and one of a single row, the block.
        pattern: which elements of the block the Hessian links, booleans ``(d, d)``.
    """

    levels: tuple[SiteLevel, SiteLevel]
    pattern: Tensor

    @property
    def is_dense(self) -> bool:
        """Whether more than half of the pairs are linked."""
        return bool(self.pattern.double().mean() > SHARE_OF_HUBS)

    def dense(self) -> "Block":
        """The same block with all pairs linked."""
        return Block(self.levels, torch.ones_like(self.pattern))


def dependent_block(
    layout: Layout, times_hessian: TimesHessian, points: Tensor, hierarchical: Collection[str]
) -> Block | None:
    r"""Find a block of local latents that depend on one another, given a few global ones.

    The Hessian of the log joint links a global latent, such as the scale of a random walk, with most others, and an
    element of the block with its neighbours. Where the block is dense all latents are linked with most others, and
    those are local whose priors have a location or a scale from the others.

    Args:
        layout: the layout of the latents.
        times_hessian: a function that multiplies the Hessians at points ``(S, dim)`` by vectors ``(S, dim)``.
        points: unconstrained vectors ``(S, dim)``, of which a few tell.
        hierarchical: the sites whose priors have a location or a scale that depends on other latents.

    Returns:
        None where no block is found, or it is small or large, or more than a few latents are global.
    """
    dim = layout.dim
    if not MIN_BLOCK < dim <= MAX_BLOCK:
        return None
    linked = torch.zeros(dim, dim, dtype=torch.bool)
    for point in points:
        hessian = times_hessian(point.repeat(dim, 1), torch.eye(dim).to(point)).abs()
        scale = hessian.diagonal().sqrt()
        linked |= (hessian > torch.finfo(point.dtype).eps * scale * scale[:, None]) | hessian.isnan()
    linked = linked | linked.mT | torch.eye(dim, dtype=torch.bool)
    hubs = linked.double().mean(-1) > SHARE_OF_HUBS
    sites = layout.structure.latents
    local = [site for site in sites if not bool(hubs[layout.slices[site.name]].any())]
    if 2 * sum(_size(layout, site) for site in local) < dim:
        local = [site for site in sites if site.name in hierarchical]
    num_local = sum(_size(layout, site) for site in local)
    if num_local < MIN_BLOCK or not 0 < dim - num_local <= MAX_GLOBAL:
        return None
    levels = tuple(_level(layout, part) for part in ([site for site in sites if site not in local], local))
    places = levels[1].places[0]
    return Block((levels[0], levels[1]), linked[places][:, places])


def _size(layout: Layout, site: Site) -> int:
    part = layout.slices[site.name]
    return int(part.stop - part.start)


def _level(layout: Layout, sites: list[Site]) -> SiteLevel:
    parts = [torch.arange(layout.dim)[layout.slices[site.name]] for site in sites]
    return SiteLevel((), tuple(sites), torch.cat(parts)[None], torch.zeros(1, 0, dtype=torch.long))


def filled(pattern: Tensor) -> Tensor:
    """Which entries of the Cholesky factor of a matrix of this pattern are not zero, booleans ``(d, d)``."""
    found = pattern.tril().clone()
    for j in range(len(found)):
        below = found[:, j].clone()
        below[: j + 1] = False
        found |= below[:, None] & below & torch.ones_like(found).tril()
    return found


def colors(pattern: Tensor) -> Tensor:
    """Give columns of a matrix of this pattern a color each, ``(d,)``, so that none of two of a color share a row."""
    found = torch.full((len(pattern),), -1)
    taken = torch.zeros(0, len(pattern), dtype=torch.bool)  # the rows that each color has
    for j, column in enumerate(pattern.mT):
        free = (~(taken & column).any(-1)).nonzero().flatten()
        if not len(free):
            taken = torch.cat([taken, torch.zeros_like(column)[None]])
            free = torch.tensor([len(taken) - 1])
        found[j] = free[0]
        taken[free[0]] |= column
    return found

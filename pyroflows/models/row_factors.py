"""The factors of a log joint by the rows of a plate in which they stand."""

from collections.abc import Mapping, Sequence

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyroflows.errors import ModelError
from pyroflows.models.levels import SiteLevel
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import ModelStructure, Site


def all_sites(structure: ModelStructure) -> tuple[Site, ...]:
    """All sites that may have a log-density."""
    return (*structure.latents, *structure.observed, *structure.factors, *structure.deterministic)


def by_row(log_probs: Mapping[str, Tensor], structure: ModelStructure, level: SiteLevel) -> Tensor:
    """Add up the log-densities of all sites in each row of a level, ``(S, *sizes of its plates)``.

    Args:
        log_probs: log-densities ``(S, *batch shape)`` by site; sites outside of the level's plates are ignored.
        structure: the structure of the model.
        level: the level.
    """
    total = torch.zeros(())
    for site in all_sites(structure):
        if site.name in log_probs and set(level.plates) <= set(site.plates):
            log_prob = log_probs[site.name]
            axes = [plate.dim or 0 for plate in level.plates]
            rows = log_prob.movedim(axes, list(range(1, len(axes) + 1)))
            total = total + sum_rightmost(rows, rows.dim() - 1 - len(axes))
    return total


def rows_of_elements(levels: Sequence[SiteLevel], level: SiteLevel, dim: int) -> Tensor:
    """The row of a level in which each element of the packed vector lies, ``(dim,)``; -1 for those outside."""
    rows = torch.full((dim,), -1)
    for other in levels:
        if set(level.plates) <= set(other.plates):
            rows[other.places] = other.row_of(level)[:, None]
    return rows


def require_own_factors(log_joint: LogJoint, levels: Sequence[SiteLevel], level: SiteLevel, vectors: Tensor) -> None:
    """Raise unless the latents of each row of a level enter the factors in this row, and no others.

    Args:
        log_joint: the log joint of the model.
        levels: the levels of its latents.
        level: the level.
        vectors: unconstrained vectors ``(S, dim)`` at which that is tested; one or two tell.

    Raises:
        ModelError: if not; names the site outside, if there is one.
    """
    structure, layout = log_joint.structure, log_joint.layout
    rows_at = rows_of_elements(levels, level, layout.dim)
    is_local = rows_at >= 0
    with torch.enable_grad():
        leaf = vectors.detach().requires_grad_()
        values, _ = layout.constrain(leaf)
        log_probs = log_joint.batched(values, len(leaf), None, layout.logs(leaf)).log_probs
        rows = by_row(log_probs, structure, level)
        # Factors of row r are multiplied by a number of its own, so that their gradient at its latents is too.
        factors = 1 + torch.rand(rows.shape[1:]).to(rows)
        (plain,) = torch.autograd.grad(rows.sum(), leaf, retain_graph=True)
        (multiplied,) = torch.autograd.grad((rows * factors).sum(), leaf, retain_graph=True)
        flat = factors[tuple(level.rows.T)][rows_at.clamp(min=0)]
        limit = torch.finfo(leaf.dtype).eps ** 0.5 * plain.abs().amax()
        if bool(((multiplied - flat * plain).abs()[:, is_local] > limit).any()):
            raise ModelError(
                f"the rows of plate '{level.name}' are not independent given the global latents: a factor in one row "
                "depends on latents of another, so that no row can be judged by itself; posterior.diagnose() judges all"
            )
        for site in all_sites(structure):
            if site.name in log_probs and not set(level.plates) <= set(site.plates):
                total = log_probs[site.name].sum()
                if total.requires_grad:
                    (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
                    if bool((gradient[:, is_local].abs() > limit).any()):
                        raise ModelError(
                            f"site '{site.name}' depends on latents in plate '{level.name}' and stands outside of it, "
                            "so that what it says of a row cannot be told: put it into the plate, with as many "
                            "columns as the largest row has, and a mask for the others"
                        )

"""The posterior of the latents of rows, of the fit's own or of others, given the globals of a structured flow."""

from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyroflows.compiling.check import Compiler
from pyroflows.errors import ModelError, OptionError
from pyroflows.guides.encoders import require_finite_features
from pyroflows.guides.packed import AutoFlow
from pyroflows.guides.structured import AutoStructuredFlow
from pyroflows.inference.component_labels import ComponentLabels
from pyroflows.inference.local_draws import LocalDraws
from pyroflows.models.batching import NUM_EXAMPLES
from pyroflows.models.layout import Layout
from pyroflows.models.levels import SiteLevel, flat_places, levels_of
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.requirements import describe_for_flow
from pyroflows.models.row_factors import by_row, require_own_factors
from pyroflows.models.structure import describe
from pyroflows.models.tracing import Model
from pyroflows.options import checked_int
from pyroflows.transforms.hierarchy import Hierarchy

# The data of a row of the fit have entered the globals already, and must not weight these again. So many draws of the
# row share their globals, and their weights count against one another alone.
NUM_SHARED = 20


def require_structured(guide: AutoFlow) -> AutoStructuredFlow:
    """The guide, if it has flows for the rows of plates.

    Raises:
        OptionError: if it has none.
    """
    if not isinstance(guide, AutoStructuredFlow) or not guide.levels[1:]:
        raise OptionError(
            "the flow of this posterior has no rows: local draws need a guide with flows for the rows of a plate with "
            "latents, as in FlowVI(model, guide=AutoStructuredFlow(model, encoder=...))"
        )
    return guide


def log_joint_of_rows(model: Model, guide: AutoStructuredFlow, args: Any, kwargs: Any) -> LogJoint:
    """The log joint of a model at rows that the guide has not seen.

    Args:
        model: the model with all rows of its plates, in the dtype of the guide.
        guide: the guide, built.
        args: the model's arguments.
        kwargs: the model's keyword arguments.

    Raises:
        OptionError: if rows have parameters of their own, so that others have none.
        ModelError: if the model has other globals, or other latents in a row.
        DataError: if an encoder gives NaN or infinite features.
    """
    layer: Any = guide._built().transform.layers[0]
    for level, part in zip(guide.levels[1:], layer.levels, strict=True):
        if part.embedding is not None:
            raise OptionError(
                f"each row of plate '{level.name}' has parameters of its own in this guide, and rows that were never "
                "seen have none: fit with an encoder, as in AutoStructuredFlow(model, encoder=...), and without "
                "learned_rows"
            )
    assert guide.layout is not None
    structure, _ = describe_for_flow(model, args, kwargs)
    layout = Layout(structure).at_centers(guide.layout.centers)
    levels = levels_like(guide, layout)
    for ours, theirs in zip(levels, guide.levels, strict=True):
        found, fitted = ([site.name for site in level.sites] for level in (ours, theirs))
        if found != fitted or ours.places.shape[1] != theirs.places.shape[1]:
            where = f"in a row of plate '{theirs.name}'" if theirs.plates else "outside of plates"
            raise ModelError(
                f"the model has other latents {where} at these arguments ({found} with {ours.places.shape[1]} "
                f"elements) than in the fit ({fitted} with {theirs.places.shape[1]})"
            )
    with torch.no_grad():
        view = guide.hierarchy_at(levels, {}, args, kwargs)
        require_finite_features(view.rows)
        examples, _ = view.forward_and_ladj(torch.randn(NUM_EXAMPLES, layout.dim).to(next(view.parameters())))
    return LogJoint(model, args, kwargs, layout, examples, Compiler("none"))


def levels_like(guide: AutoStructuredFlow, layout: Layout) -> tuple[SiteLevel, ...]:
    """The levels of a layout, with latents local to the plates that have rows in a guide."""
    levels = levels_of(layout, {plate.name for level in guide.levels for plate in level.plates})
    if len(levels) != len(guide.levels):
        raise ModelError(
            "the model has latents in other plates at these arguments than in the fit: "
            f"{[level.name for level in levels[1:]]} instead of {[level.name for level in guide.levels[1:]]}"
        )
    return levels


@torch.no_grad()
def draw_locals(
    guide: AutoStructuredFlow,
    args: Any,
    kwargs: Any,
    log_joint: LogJoint,
    labels: ComponentLabels,
    num_samples: int,
    is_own: bool,
) -> LocalDraws:
    """Draw globals as they were fitted, and latents of all rows given these, and weight the latents of each row.

    Args:
        guide: the guide, built.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        log_joint: the log joint of the model with these arguments.
        labels: the labels of components.
        num_samples: the number of draws.
        is_own: whether the rows are those of the fit.

    Raises:
        OptionError: if ``num_samples`` is not a positive integer.
        ModelError: if the rows are not independent given the globals.
    """
    layout = log_joint.layout
    levels = levels_like(guide, layout)
    level = _outermost(levels)
    view = guide.hierarchy_at(levels, {}, args, kwargs).exact()
    num_shared = NUM_SHARED if is_own else 1
    number = -(-checked_int("num_samples", num_samples) // num_shared)
    z = torch.randn(number * num_shared, layout.dim).to(next(view.parameters()))
    z[:, view.places] = z[:number, view.places].repeat_interleave(num_shared, 0)
    examples, _ = view.forward_and_ladj(z[:2])
    require_own_factors(log_joint, levels, level, examples)
    parts = [_weighted(log_joint, view, levels, level, part) for part in z.split(log_joint.batched.chunk_size)]
    draws = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
    raw = torch.cat([weights for _, weights in parts])
    return LocalDraws.weighted(draws, raw, num_shared, layout.structure, level, labels.updated(layout.structure))


@torch.no_grad()
def draw_amortized(
    model: Model, guide: AutoFlow, args: Any, kwargs: Any, num_samples: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Draw all latents for other data, which an encoder reads, and say which entries belong to the posterior.

    Args:
        model: the model with all rows of its plates, in the dtype of the guide.
        guide: the guide, built.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        num_samples: the number of draws.

    Returns:
        Values ``(S, *site shape)`` and entries by site; None if the guide has no encoder for all rows, or if the model
        observes nothing at these arguments, so that there is nothing to encode.
    """
    if not isinstance(guide, AutoStructuredFlow) or not guide.is_amortized:
        return None
    if not describe(model, args, kwargs).observed:
        return None
    log_joint = log_joint_of_rows(model, guide, args, kwargs)
    layout = log_joint.layout
    view = guide.hierarchy_at(levels_like(guide, layout), {}, args, kwargs).exact()
    x, _ = view.forward_and_ladj(torch.randn(num_samples, layout.dim).to(next(view.parameters())))
    return layout.constrain(x)[0], layout.structure.kept


def _outermost(levels: tuple[SiteLevel, ...]) -> SiteLevel:
    outermost = [level for level in levels[1:] if not level.parents]
    if len(outermost) > 1:
        raise ModelError(
            f"plates {' and '.join(repr(level.name) for level in outermost)} both have latents, and neither lies "
            "within the other: local draws need one plate that holds all latents but the global ones"
        )
    return outermost[0]


def _weighted(
    log_joint: LogJoint, view: Hierarchy, levels: tuple[SiteLevel, ...], level: SiteLevel, z: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The draws by site at base values ``(S, dim)``, and the raw log weights of the rows, ``(S, *rows)`` on the CPU."""
    layout, structure = log_joint.layout, log_joint.structure
    x, _ = view.forward_and_ladj(z)
    values, ladjs = layout.constrain_sites(x)
    record = log_joint.batched(values, len(z), None, layout.logs(x))
    log_p = by_row(record.log_probs, structure, level)
    for site in structure.latents:
        # A mask may tell apart event dimensions too.
        num_extra = ladjs[site.name].dim() - 1 - len(site.shape) + site.event_dim
        ladj = {site.name: sum_rightmost(ladjs[site.name], num_extra)}
        log_p = log_p + by_row(ladj, structure, level)
    sizes = log_p.shape[1:]
    log_q = log_p.new_zeros(len(z), sizes.numel())
    index = flat_places(level.rows, sizes)
    for other, log_probs in zip(levels[1:], view.row_log_probs(x), strict=True):
        log_q.index_add_(1, index[other.row_of(level)], log_probs.to(log_q))
    drawn = record.values
    if structure.kept:
        drawn = log_joint.batched.filling(values, structure.kept)(values, len(z)).values
    names = [site.name for site in (*structure.latents, *structure.deterministic)]
    return {name: drawn[name] for name in names}, (log_p - log_q.reshape(log_p.shape)).cpu()

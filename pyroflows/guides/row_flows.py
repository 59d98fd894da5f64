"""The flow of a structured guide: one for the global latents, and one for the rows of each level, in one vector."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyroflows.flows import Flow
from pyroflows.guides.encoders import Arguments, EncodedRows
from pyroflows.guides.hierarchical import global_layers
from pyroflows.guides.packed import FlowFn
from pyroflows.models.levels import SiteLevel
from pyroflows.transforms import Autoregressive, Elementwise, FlowTransform
from pyroflows.transforms.hierarchy import Hierarchy, Level, Rows
from pyroflows.transforms.local_affine import LocalAffine
from pyroflows.transforms.univariate import Affine, SinhArcsinh

LocalFlowFn = Callable[[int, int], FlowTransform]
EMBEDDING_DIM = 4


def default_local_flow(dim: int, context_dim: int) -> FlowTransform:
    """The flow that rows share by default, one autoregressive layer of sinh-arcsinh maps."""
    return Autoregressive(dim, SinhArcsinh(), context_dim=context_dim, hidden_dims=(32, 32))


def viewed(layer: Hierarchy, levels: Sequence[SiteLevel], rows: Sequence[Rows]) -> Flow:
    """A flow with the parameters of a layer, for other rows."""
    return Flow([layer.at(levels[0].places[0], rows)], standardize=False).to(next(layer.parameters()))


def rows_of(
    levels: Sequence[SiteLevel],
    subsample: Mapping[str, Tensor],
    encoders: Sequence[nn.Module | None],
    arguments: Arguments,
    kept: Sequence[Tensor | None],
) -> list[Rows]:
    """The rows of all levels but the global one in the packed vector of a run.

    Args:
        levels: the levels of the run.
        subsample: the indices of the rows that the run sees, by subsampled plate.
        encoders: the encoder of each level that is not global, or None.
        arguments: the arguments of the model.
        kept: which rows of the full plates have latents, by level that is not global; None for all.
    """
    found = []
    for level, encoder, is_kept in zip(levels[1:], encoders, kept, strict=True):
        parents = tuple(level.row_of(levels[1 + parent]) for parent in level.parents)
        ids = level.ids(subsample)
        weight: float | Tensor = level.weight
        # Of a part of the rows, those that a mask leaves out have places, and count nowhere.
        if level.is_subsampled and is_kept is not None:
            weight = weight * is_kept[ids]
        place = level.places, parents, ids, weight
        if encoder is None:
            found.append(Rows(*place))
        else:
            found.append(EncodedRows(Rows(*place), encoder, level, subsample, arguments))
    return found


def given_scale(levels: Sequence[SiteLevel], level: SiteLevel, num_read: int) -> Tensor:
    r"""The factors of the elements on which the rows of a level depend, ``(p,)``.

    The n rows below an element determine it to about :math:`n^{-1/2}`, so that their laws hardly change over its
    posterior: by about :math:`n^{-1/2}` of their own width. Noise in the n dependences adds up, and would make the
    element too narrow. Hence rows get the element times :math:`n^{-1/2}`, so that a step of training changes a
    dependence by as little.

    Args:
        levels: the levels of the hierarchy.
        level: the level of the rows.
        num_read: the number of global elements on which they depend.
    """
    factors = [torch.full((num_read,), level.num_rows**-0.5)]
    for parent in level.parents:
        above = levels[1 + parent]
        factors.append(torch.full((above.places.shape[1],), (above.num_rows / level.num_rows) ** 0.5))
    return torch.cat(factors)


def hierarchical_flow(
    levels: Sequence[SiteLevel],
    rows: Sequence[Rows],
    reads: Sequence[Tensor],
    flow_fn: FlowFn,
    local_flow_fn: LocalFlowFn,
    loc: Tensor,
    scale: Tensor,
    learned_rows: bool | None,
) -> Flow:
    """Build the flow of a hierarchy, which starts close to a diagonal Gaussian."""
    places = levels[0].places[0]
    inner = last = None
    if len(places):
        inner = global_layers(flow_fn, len(places))
        last = Elementwise(len(places), Affine(None, None), init=torch.stack([loc[places], scale[places].log()], -1))
    parts = []
    for level, own, read in zip(levels[1:], rows, reads, strict=True):
        dim = level.places.shape[1]
        given_dim = len(read) + sum(levels[1 + parent].places.shape[1] for parent in level.parents)
        features_dim = own.features.shape[-1] if isinstance(own, EncodedRows) else 0
        is_learned = not features_dim if learned_rows is None else learned_rows
        start, spread = loc[level.places].median(0, keepdim=True).values, scale[level.places[:1]]
        if is_learned and not level.is_subsampled:
            # Rows that a mask leaves out have a place in tables, with the values of any other row.
            at = level.places[:1].expand(level.num_rows, -1).index_copy(0, level.ids({}), level.places)
            start, spread = loc[at], scale[at]
        affine = LocalAffine(
            dim,
            given_dim,
            level.num_rows if is_learned else None,
            features_dim,
            loc=start,
            scale_tril=torch.diag_embed(spread),
        )
        embedding = torch.randn(level.num_rows, EMBEDDING_DIM) if is_learned else None
        flow = local_flow_fn(dim, given_dim + (EMBEDDING_DIM if is_learned else 0) + features_dim)
        # Each step sees few rows of a table, which would learn their dependences too slowly at this scale.
        factors = None if is_learned else given_scale(levels, level, len(read))
        parts.append(Level(flow, affine, level.parents, read, embedding, factors))
        parts[-1].encoder = own.encoder if isinstance(own, EncodedRows) else None
    return Flow([Hierarchy(inner, last, places, parts, rows)], standardize=False).to(loc)

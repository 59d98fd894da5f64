"""The flow that starts at a Gaussian of a hierarchy, whose rows are independent given the levels above them."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.flows import Flow
from pyroflows.flows.conversion import as_flow
from pyroflows.flows.without_data import require_no_statistics
from pyroflows.guides.centering import Centering
from pyroflows.transforms import Autoregressive, Compose, FlowTransform, Triangular
from pyroflows.transforms.hierarchy import Hierarchy, Level, Rows
from pyroflows.transforms.local_affine import LocalAffine
from pyroflows.transforms.markov_affine import MarkovAffine
from pyroflows.transforms.univariate import SOS

HIDDEN_DIMS = (32, 32)
NUM_FEATURES_OF_BLOCKS = 256
# In draws of a thousand rows some row lies in a tail that training has hardly seen. Polynomials go on there as they do
# where draws are; splines would return to the identity.
ROW_MAP = SOS(num_polynomials=2, degree=2, bound=6.0)


@dataclass(frozen=True, eq=False)
class LocalGaussian:
    r"""The Gaussian laws of the R rows of a level given h, the whitened elements of the levels above them.

    .. math:: x_r \mid h \sim N(\mu_r + C_r h + m_r(h), \; S_r M_r(h) M_r(h)^\top S_r^\top)

    C is the regression on the rows that enclose them. m and M are curved in the global elements, see
    :class:`pyroflows.transforms.local_affine.LocalAffine`.

    Args:
        places: the indices of the elements in the packed vector, ``(R, d)``.
        parents: the indices of the levels that enclose this one, from the outermost on.
        rows: for each of them, the row that encloses each row, ``(R,)``.
        loc: :math:`\mu`, ``(R, d)``.
        regression: C, ``(R, d, p)`` for the p elements of the rows that enclose these.
        scale_tril: S, lower triangular ``(R, d, d)``.
        curves: the coefficients of m and M, ``(R, 2 d + d (d - 1) / 2, q)``.
        features: what tells by how much the law of a row differs from a Gaussian, ``(R, F)``.
    """

    places: Tensor
    parents: tuple[int, ...]
    rows: tuple[Tensor, ...]
    loc: Tensor
    regression: Tensor
    scale_tril: Tensor
    curves: Tensor
    features: Tensor


@dataclass(frozen=True, eq=False)
class BlockGaussian:
    r"""The Gaussian law of a block of d elements that depend on one another, given h, the whitened global elements.

    .. math:: x_t = \mu_t + \sigma_t y_t, \qquad
        y_t \mid y_{\mathrm{pa}(t)}, h \sim N\Big(m_t(h) + \sum_{k \in \mathrm{pa}(t)} \rho_{tk}(h) (y_k - m_k(h)), \;
        e^{2 s_t(h)}\Big)

    Args:
        places: the indices of the elements in the packed vector, ``(d,)``.
        edges: the pairs (t, k) of an element and a later one on which it depends, ``(2, E)``.
        loc: :math:`\mu`, ``(d,)``.
        scale: :math:`\sigma`, ``(d,)``.
        given: values of h, ``(N, p)``.
        coefficients: m, s and :math:`\rho` at these values, ``(N, 2 d + E)``.
    """

    places: Tensor
    edges: Tensor
    loc: Tensor
    scale: Tensor
    given: Tensor
    coefficients: Tensor


@dataclass(frozen=True, eq=False)
class HierarchicalGaussian:
    """A law of all latents of a hierarchy: a Gaussian of the global ones, and of local ones given these.

    Args:
        places: the indices of the global elements in the packed vector, ``(D_0,)``.
        loc: the mean of the global elements, ``(D_0,)``.
        scale_tril: the Cholesky factor of their covariance, ``(D_0, D_0)``.
        locals: the laws of the other levels, each after those that enclose it; or that of one block.
        elbo: an estimate of its ELBO, in nats.
        centering: the layer that maps its vectors to those of the model; None where they are the same.
    """

    places: Tensor
    loc: Tensor
    scale_tril: Tensor
    locals: tuple[LocalGaussian, ...] | tuple[BlockGaussian]
    elbo: float
    centering: Centering | None = None


def global_layers(flow_fn: Callable[[int], object], dim: int) -> Compose:
    """Make the layers of the global latents of a hierarchy.

    Args:
        flow_fn: ``latent_dim -> flow``.
        dim: the number of global latents.

    Raises:
        OptionError: if a layer keeps running statistics of data, or the base of the flow is not standard normal.
        ShapeError: if the flow has another dimension.
    """
    flow = as_flow(flow_fn(dim), dim)
    require_no_statistics(flow, "a guide")
    probe = torch.linspace(-3.0, 3.0, dim).to(next(flow.parameters()))
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(probe).sum()
    if flow.base_shape != (dim,) or not torch.isclose(flow.base().log_prob(probe), expected):
        raise OptionError("the flow of the global latents of a hierarchy needs a standard normal base: leave base out")
    flow.adapt_to_draws()
    return Compose(flow.layers)


def hierarchy_near(start: HierarchicalGaussian, flow_fn: Callable[[int], object], has_local_flow: bool) -> Flow:
    """Build a flow over the global latents, and one that the rows of each level share, close to a Gaussian.

    Args:
        start: the Gaussian.
        flow_fn: the function that makes the flow of the global latents.
        has_local_flow: whether rows have a flow; otherwise they stay Gaussian given what is above them.
    """
    dim = len(start.places)
    levels, rows = [], []
    for law in start.locals:
        level, part = _block(law, dim) if isinstance(law, BlockGaussian) else _level(law, dim, has_local_flow)
        levels.append(level)
        rows.append(part)
    last = Triangular(dim, loc=start.loc, scale_tril=start.scale_tril)
    hierarchy = Hierarchy(global_layers(flow_fn, dim), last, start.places, levels, rows)
    layers = [hierarchy, *([] if start.centering is None else [copy.deepcopy(start.centering)])]
    return Flow(layers, standardize=False).to(start.loc)


def _level(law: LocalGaussian, num_global: int, has_flow: bool) -> tuple[Level, Rows]:
    num_rows, row_dim, num_above = law.regression.shape
    given_dim = num_global + num_above
    affine = LocalAffine(
        row_dim,
        given_dim,
        loc=law.loc,
        regression=law.regression if num_above else None,
        scale_tril=law.scale_tril,
        curves=law.curves,
        num_curved=num_global,
    )
    flow = local_flow(row_dim, given_dim + law.features.shape[1]) if has_flow else None
    rows = Rows(law.places, law.rows, torch.arange(num_rows), features=law.features)
    return Level(flow, affine, law.parents, torch.arange(num_global)), rows


def _block(law: BlockGaussian, num_global: int) -> tuple[Level, Rows]:
    dim = len(law.places)
    affine = LocalAffine(dim, num_global, loc=law.loc[None], scale_tril=torch.diag_embed(law.scale)[None])
    along = MarkovAffine(dim, law.edges, num_global, (NUM_FEATURES_OF_BLOCKS,))
    if len(law.given):
        along.fit(law.given, law.coefficients)
    return Level(along, affine, (), torch.arange(num_global)), Rows(law.places[None], (), torch.arange(1))


def hierarchical_layer(flow: Flow) -> Hierarchy | None:
    """The layer of a flow that maps a hierarchy, before the one that centres it; None if there is none."""
    layer = next((part for part in reversed(list(flow.layers)) if not isinstance(part, Centering)), None)
    return layer if isinstance(layer, Hierarchy) else None


def has_block(flow: Flow) -> bool:
    """Whether a flow has a block of local latents that depend on one another."""
    layer = hierarchical_layer(flow)
    return layer is not None and any(isinstance(level.flow, MarkovAffine) for level in layer.levels)


def facts_of(flow: Flow) -> dict[str, Any] | None:
    """What tells how :func:`hierarchy_near` built a flow, as JSON; None for other flows."""
    hierarchy = hierarchical_layer(flow)
    if hierarchy is None:
        return None
    if isinstance(along := hierarchy.levels[0].flow, MarkovAffine):
        return {"num_global": len(hierarchy.places), "block": along.dim, "edges": along.edges.tolist()}
    levels = [
        {
            "shape": list(rows.places.shape),
            "num_above": level.affine.given_dim - level.affine.num_curved,
            "num_curves": 0 if level.affine.curves is None else level.affine.curves.shape[-1],
            "num_features": 0 if rows.features is None else rows.features.shape[1],
            "parents": list(level.parents),
        }
        for level, rows in zip(hierarchy.levels, hierarchy.rows, strict=True)
    ]
    has_local_flow = any(level.flow is not None for level in hierarchy.levels)
    return {"num_global": len(hierarchy.places), "levels": levels, "has_local_flow": has_local_flow}


def hierarchy_of(
    facts: Mapping[str, Any], flow_fn: Callable[[int], object], like: Tensor, centering: Centering | None = None
) -> Flow:
    """Build a flow of given facts, which takes its values from a state dict.

    Args:
        facts: what :func:`facts_of` gave.
        flow_fn: the function that makes the flow of the global latents.
        like: a tensor of the dtype and device of the flow.
        centering: the layer that follows; None for none.
    """
    if "block" in facts:
        return _block_of(facts, flow_fn, like, centering)
    start, laws = facts["num_global"], []
    for level in facts["levels"]:
        num_rows, dim = level["shape"]
        places = torch.arange(start, start + num_rows * dim).reshape(num_rows, dim)
        start += num_rows * dim
        index = tuple(torch.zeros(num_rows, dtype=torch.long) for _ in level["parents"])
        regression = torch.zeros(num_rows, dim, level["num_above"])
        curves = torch.zeros(num_rows, 2 * dim + dim * (dim - 1) // 2, level["num_curves"])
        scale_tril = torch.eye(dim).expand(num_rows, dim, dim)
        features = torch.zeros(num_rows, level["num_features"])
        parents = tuple(level["parents"])
        loc = torch.zeros(num_rows, dim)
        laws.append(LocalGaussian(places, parents, index, loc, regression, scale_tril, curves, features))
    num_global = facts["num_global"]
    loc = torch.zeros(num_global).to(like)
    gaussian = HierarchicalGaussian(torch.arange(num_global), loc, torch.eye(num_global).to(like), tuple(laws), 0.0)
    return hierarchy_near(gaussian, flow_fn, facts["has_local_flow"]).to(like)


def _block_of(
    facts: Mapping[str, Any], flow_fn: Callable[[int], object], like: Tensor, centering: Centering | None
) -> Flow:
    num_global, dim = facts["num_global"], facts["block"]
    places = torch.arange(num_global + dim)
    edges = torch.tensor(facts["edges"], dtype=torch.long).reshape(2, -1)
    none = torch.zeros(0, num_global)
    law = BlockGaussian(places[num_global:], edges, torch.zeros(dim), torch.ones(dim), none, none)
    loc, root = torch.zeros(num_global).to(like), torch.eye(num_global).to(like)
    gaussian = HierarchicalGaussian(places[:num_global], loc, root, (law,), 0.0, centering)
    return hierarchy_near(gaussian, flow_fn, has_local_flow=True).to(like)


def local_flow(dim: int, context_dim: int) -> FlowTransform:
    """The flow that the rows of a level share: an autoregressive layer of polynomials."""
    return Autoregressive(dim, ROW_MAP, context_dim=context_dim, hidden_dims=HIDDEN_DIMS)

"""The flow that starts at a Gaussian of a hierarchy, whose rows are independent given the levels above them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.flows import Flow
from pyroflows.flows.conversion import as_flow
from pyroflows.flows.without_data import require_no_statistics
from pyroflows.transforms import Autoregressive, Compose, FlowTransform, Triangular
from pyroflows.transforms.hierarchy import Hierarchy, Level, Rows
from pyroflows.transforms.local_affine import LocalAffine
from pyroflows.transforms.univariate import SOS

HIDDEN_DIMS = (32, 32)
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
class HierarchicalGaussian:
    """A law of all latents of a hierarchy: a Gaussian of the global ones, and of local ones given these.

    Args:
        places: the indices of the global elements in the packed vector, ``(D_0,)``.
        loc: the mean of the global elements, ``(D_0,)``.
        scale_tril: the Cholesky factor of their covariance, ``(D_0, D_0)``.
        locals: the laws of the other levels, each after those that enclose it.
        elbo: an estimate of its ELBO, in nats.
    """

    places: Tensor
    loc: Tensor
    scale_tril: Tensor
    locals: tuple[LocalGaussian, ...]
    elbo: float


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
        num_rows, row_dim, num_above = law.regression.shape
        given_dim = dim + num_above
        affine = LocalAffine(
            row_dim,
            given_dim,
            loc=law.loc,
            regression=law.regression if num_above else None,
            scale_tril=law.scale_tril,
            curves=law.curves,
            num_curved=dim,
        )
        flow = local_flow(row_dim, given_dim + law.features.shape[1]) if has_local_flow else None
        levels.append(Level(flow, affine, law.parents, torch.arange(dim)))
        rows.append(Rows(law.places, law.rows, torch.arange(num_rows), features=law.features))
    last = Triangular(dim, loc=start.loc, scale_tril=start.scale_tril)
    hierarchy = Hierarchy(global_layers(flow_fn, dim), last, start.places, levels, rows)
    return Flow([hierarchy], standardize=False).to(start.loc)


def facts_of(flow: Flow) -> dict[str, Any] | None:
    """What tells how :func:`hierarchy_near` built a flow, as JSON; None for other flows."""
    hierarchy = flow.layers[-1]
    if not isinstance(hierarchy, Hierarchy):
        return None
    levels = [
        {
            "shape": list(rows.places.shape),
            "num_above": level.affine.given_dim - level.affine.num_curved,
            "num_curves": level.affine.curves.shape[-1],
            "num_features": 0 if rows.features is None else rows.features.shape[1],
            "parents": list(level.parents),
        }
        for level, rows in zip(hierarchy.levels, hierarchy.rows, strict=True)
    ]
    has_local_flow = any(level.flow is not None for level in hierarchy.levels)
    return {"num_global": len(hierarchy.places), "levels": levels, "has_local_flow": has_local_flow}


def hierarchy_of(facts: Mapping[str, Any], flow_fn: Callable[[int], object], like: Tensor) -> Flow:
    """Build a flow of given facts, which takes its values from a state dict.

    Args:
        facts: what :func:`facts_of` gave.
        flow_fn: the function that makes the flow of the global latents.
        like: a tensor of the dtype and device of the flow.
    """
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


def local_flow(dim: int, context_dim: int) -> FlowTransform:
    """The flow that the rows of a level share: an autoregressive layer of polynomials."""
    return Autoregressive(dim, ROW_MAP, context_dim=context_dim, hidden_dims=HIDDEN_DIMS)

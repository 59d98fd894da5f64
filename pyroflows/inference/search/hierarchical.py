"""From a Gaussian of the global latents of a hierarchy to a law of all latents."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pyroflows.guides.centering import Centering
from pyroflows.guides.hierarchical import BlockGaussian, HierarchicalGaussian, LocalGaussian
from pyroflows.inference.search.arrow import Conditionals, places_of_parents
from pyroflows.inference.search.blocks import MIN_BLOCK, dependent_block, filled
from pyroflows.inference.search.density import antithetic
from pyroflows.inference.search.gaussians import GaussianApproximation
from pyroflows.inference.search.marginal import GlobalMarginal, times_hessian
from pyroflows.models.levels import NUM_HALVES, TimesHessian, independent_levels
from pyroflows.models.log_joint import LogJoint
from pyroflows.transforms.local_affine import curved, num_curves

SPREAD = 0.3  # of the points at which independence is tested
# Below this number of local latents a search among all latents is as quick, and a flow over all of them closer.
MIN_LOCAL = 150
# The Hessian is looked at in so many points; the Gaussian of a block is known at so many, of so many times the standard
# deviation of the global latents.
NUM_LOOKS, NUM_POINTS, POINT_SPREAD = 2, 640, 1.5
# Networks see standardised derivatives up to this size.
LARGEST_FEATURE = 5.0
# The laws of rows depend on products of so many global latents at most, since there are many products.
MAX_GLOBALS_OF_CUBICS, MAX_GLOBALS_OF_PAIRS = 12, 40
# How these laws depend on the global latents is fitted to so many draws for each function of these, which are wider by
# this factor than those of the global latents, so that the fit holds in the tails of these too.
DRAWS_A_CURVE, LEAST_DRAWS, WIDER = 3, 256, 1.6
# A call of the marginal density has about so many local latents in all its rows.
MAX_NUMBERS, LEAST_ROWS, MOST_ROWS = 2**17, 8, 16


def global_marginal(log_joint: LogJoint, center: Tensor, centering: Centering | None = None) -> GlobalMarginal | None:
    """Make the marginal density of the global latents of a model; None where few latents are local, or all are.

    Args:
        log_joint: the log joint of the model.
        center: an unconstrained vector ``(dim,)`` at which it is finite.
        centering: the layer of the sites whose priors depend on other latents, non-centred; None if there are none.
    """
    if len(center) < MIN_BLOCK or log_joint.batched.mode == "loop":
        return None
    points = center + (SPREAD * torch.randn(NUM_HALVES, len(center))).to(center)
    product = hessian_product(log_joint)
    try:
        levels = independent_levels(log_joint.layout, product, points)
        num_local = sum(level.places.numel() for level in levels[1:])
        if not num_local:
            marginal = _marginal_of_block(log_joint, product, points, center, centering)
            if marginal is None:
                return None
        elif num_local < MIN_LOCAL or not levels[0].sites:
            return None
        else:
            num_rows = max(LEAST_ROWS, min(MOST_ROWS, MAX_NUMBERS // num_local))
            marginal = GlobalMarginal(log_joint, levels, center, num_rows)
        at_center = center[marginal.places].expand(marginal.num_rows, -1)
        value, gradient = marginal.value_and_grad(at_center)(at_center)
    except RuntimeError:  # not all operations have higher derivatives
        return None
    return marginal if bool(value.isfinite().all() and gradient.isfinite().all()) else None


def _marginal_of_block(
    log_joint: LogJoint, product: TimesHessian, points: Tensor, center: Tensor, centering: Centering | None
) -> GlobalMarginal | None:
    """The marginal density of the global latents where the local ones depend on one another."""
    names = () if centering is None else centering.names
    block = dependent_block(log_joint.layout, product, points[:NUM_LOOKS], names)
    if block is None:
        return None
    if not block.is_dense or centering is None:
        return GlobalMarginal(log_joint, block.levels, center, MOST_ROWS, block.pattern)
    # A dense precision of the prior is far from one that a network could follow; before the layer it is one.
    with torch.no_grad():
        center = centering.base_value(center)
    return GlobalMarginal(log_joint, block.levels, center, MOST_ROWS, block.dense().pattern, centering)


def hessian_product(log_joint: LogJoint) -> TimesHessian:
    """The function that multiplies the Hessians of a log joint by vectors."""

    def product(x: Tensor, vectors: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_joint(leaf).sum(), leaf, create_graph=True)
            return times_hessian(gradient, leaf, vectors).detach()

    return product


def with_locals(marginal: GlobalMarginal, q: GaussianApproximation) -> HierarchicalGaussian:
    """Extend a Gaussian of the global latents by Gaussian laws of the local ones given them.

    Locations and scales are those of the curvature at the mode of the local latents. How they depend on the global
    ones is a least-squares fit to draws of these, see :func:`pyroflows.transforms.local_affine.curved`; how rows depend
    on those that enclose them is the curvature at the mean of the global latents. Features of a row are standardised
    third and fourth derivatives of its log-density, :math:`s^3 f^{(3)}` and :math:`s^4 f^{(4)}`, by differences.

    Args:
        marginal: the marginal density of the global latents.
        q: a Gaussian close to it.
    """
    if marginal.is_block:
        return _with_block(marginal, q)
    loc, root = q.loc.double(), q.scale_tril.double()
    num_global = len(loc)
    center = _settled(marginal, loc[None])[0]
    laws, _ = marginal.with_globals(center)
    roots = [_root(precision) for precision in laws.precisions]
    regressions = _whitened(laws, root, roots)
    features = _features(marginal, center, roots)
    num = num_curves(num_global, 1 + (num_global <= MAX_GLOBALS_OF_PAIRS) + (num_global <= MAX_GLOBALS_OF_CUBICS))
    h = WIDER * antithetic(max(LEAST_DRAWS, DRAWS_A_CURVE * num), loc)
    x = _settled(marginal, loc + h @ root.mT)
    relative = _relative_laws(marginal, center, x, roots)
    locals_ = []
    for i, level in enumerate(marginal.levels):
        parts = (
            regressions[i][..., num_global:],
            roots[i],
            _curves(curved(h, num), relative[i], level.places.shape[1]),
            features[i].nan_to_num(0.0).clamp(-LARGEST_FEATURE, LARGEST_FEATURE),
        )
        locals_.append(
            LocalGaussian(level.places, level.parents, level.rows, center[level.places], *(p.to(x) for p in parts))
        )
    return HierarchicalGaussian(marginal.places, q.loc, q.scale_tril, tuple(locals_), q.elbo)


def _with_block(marginal: GlobalMarginal, q: GaussianApproximation) -> HierarchicalGaussian:
    """Extend a Gaussian of the global latents by the Gaussian of the block at each of many points around its mean."""
    (level,) = marginal.levels
    assert level.pattern is not None
    places = level.places[0]
    edges = filled(level.pattern).tril(-1).nonzero().mT.flip(0)
    noise = POINT_SPREAD * torch.randn(NUM_POINTS, len(q.loc), dtype=torch.float64)
    noise[0] = 0.0
    x, precisions = [], []
    for part, num in _padded(q.loc.double() + noise @ q.scale_tril.double().mT, marginal.num_rows):
        settled = marginal.settled(part.to(q.loc))
        x.append(settled[:num].double())
        precisions.append(marginal.conditionals(settled).precisions[0][:num, 0])
    modes, precision = torch.cat(x)[:, places], torch.cat(precisions)
    root, info = torch.linalg.cholesky_ex(precision)
    is_good = (info == 0) & modes.isfinite().all(-1) & root.isfinite().all(-1).all(-1)
    scales = root.diagonal(dim1=-2, dim2=-1)
    loc, scale = modes[0], 1 / scales[0]
    # Column t of the root holds the coefficients of x_t on later elements.
    rho = -root[:, edges[1], edges[0]] / scales[:, edges[0]] * scale[edges[1]] / scale[edges[0]]
    coefficients = torch.cat([(modes - loc) / scale, -scales.log() - scale.log(), rho], -1)
    law = BlockGaussian(
        places, edges, *(part.to(q.loc) for part in (loc, scale, noise[is_good], coefficients[is_good]))
    )
    return HierarchicalGaussian(marginal.places, q.loc, q.scale_tril, (law,), q.elbo, marginal.centering)


def _settled(marginal: GlobalMarginal, vectors: Tensor) -> Tensor:
    """Settle the local elements at any number of vectors of global ones."""
    return torch.cat([marginal.settled(part)[:n] for part, n in _padded(vectors, marginal.num_rows)])


def _padded(vectors: Tensor, num_rows: int) -> Iterator[tuple[Tensor, int]]:
    """Cut vectors into parts of a number of rows, of which the last one is filled up by its last row."""
    for part in vectors.split(num_rows):
        yield torch.cat([part, part[-1:].expand(num_rows - len(part), -1)]), len(part)


def _root(precision: Tensor) -> Tensor:
    """The Cholesky factor of the inverse of matrices ``(..., d, d)``."""
    if precision.shape[-1] == 1:
        return precision.rsqrt()
    factor, error = torch.linalg.cholesky_ex(torch.linalg.inv_ex(precision)[0])
    return factor.where((error == 0)[..., None, None], torch.nan)


def _whitened(laws: Conditionals, root: Tensor, roots: list[Tensor]) -> list[Tensor]:
    """The regressions of levels on whitened elements above them, whose own regressions these contain."""
    num_global = laws.num_global
    found: list[Tensor] = []
    for i, (level, regression) in enumerate(zip(laws.levels, laws.regressions, strict=True)):
        places = places_of_parents(laws.levels, i, num_global)
        # On the elements above, in the order of whitened ones: the change of these elements by those.
        total = torch.zeros_like(regression)
        total[..., :num_global] = regression[..., :num_global] @ root
        for parent, rows, here in zip(level.parents, level.rows, places, strict=True):
            of_parent = found[parent][rows]
            total[..., : of_parent.shape[-1]] += regression[..., here] @ of_parent
            total[..., here] += regression[..., here] @ roots[parent][rows]
        found.append(total)
    return found


def _relative_laws(marginal: GlobalMarginal, center: Tensor, x: Tensor, roots: list[Tensor]) -> list[Tensor]:
    """What changes in the laws of rows from those at the center, ``(S, R, 2 d + d (d - 1) / 2)`` by level.

    These are the locations, and of the scales relative to the given ones the logarithms of the diagonal and the rows
    below it.
    """
    found: list[list[Tensor]] = [[] for _ in roots]
    for part, num in _padded(x, marginal.num_rows):
        precisions = marginal.conditionals(part).precisions
        for level, root, precision, parts in zip(marginal.levels, roots, precisions, found, strict=True):
            scale = torch.linalg.solve_triangular(root, _root(precision[:num]), upper=False)
            below = torch.tril_indices(root.shape[-2], root.shape[-1], -1)
            logs = scale.diagonal(dim1=-2, dim2=-1).log()
            moved = (part[:num] - center)[:, level.places].double()
            parts.append(torch.cat([moved, logs, scale[..., below[0], below[1]]], -1))
    return [torch.cat(parts) for parts in found]


def _curves(functions: Tensor, values: Tensor, dim: int) -> Tensor:
    """The coefficients ``(R, n, q)`` of functions ``(S, q)`` that come nearest to values ``(S, R, n)``.

    The values are those of :func:`_relative_laws` for rows of d elements. Distances of locations are in units of the
    scale of the rows at each draw.
    """
    finite = values.flatten(1).isfinite().all(-1)
    functions, values = functions[finite], values[finite]
    weights = (-values[..., dim : 2 * dim].mean(1)).exp()
    parts = [_nearest(weights[:, k, None] * functions, weights[:, k, None] * values[..., k]) for k in range(dim)]
    others = _nearest(functions, values[..., dim:].flatten(1)).unflatten(0, (values.shape[1], -1))
    return torch.cat([torch.stack(parts, 1), others], 1)


def _nearest(functions: Tensor, values: Tensor) -> Tensor:
    """The coefficients ``(m, q)`` of functions ``(S, q)`` by least squares from values ``(S, m)``."""
    return torch.linalg.lstsq(functions, values, driver="gels").solution.mT


def _features(marginal: GlobalMarginal, x: Tensor, roots: list[Tensor]) -> list[Tensor]:
    """Standardised third and fourth derivatives of the log-densities of rows by each element, ``(R, 2 d)``."""
    found = []
    for i, (level, root) in enumerate(zip(marginal.levels, roots, strict=True)):
        # One standard deviation of an element given all others, on either side, for all rows at once.
        num = level.places.shape[1]
        points = x.repeat(2 * num + 1, 1)
        for k in range(num):
            step = root[:, k, k].to(x)
            points[k, level.places[:, k]] += step
            points[num + k, level.places[:, k]] -= step
        curvatures = torch.cat(
            [marginal.conditionals(part).precisions[i][:n] for part, n in _padded(points, marginal.num_rows)]
        ).diagonal(dim1=-2, dim2=-1)
        ups, downs, here = curvatures[:num], curvatures[num : 2 * num], curvatures[-1]
        up, down = (ends.diagonal(dim1=0, dim2=2) for ends in (ups, downs))
        variance = 1 / here
        found.append(torch.cat([(down - up) / 2 * variance, (2 * here - up - down) * variance], -1))
    return found

r"""Fit Gaussians to a log-density at its modes, in one to three hundred evaluations.

A search for modes from several starts at once gives a first Gaussian for each, as in Pathfinder (Zhang, Carpenter,
Gelman and Vehtari 2022, arXiv:2108.03782). Variational steps then bring it to the Gaussian of the least KL divergence.
The density is evaluated by one function with a fixed number of rows, so that it has to be compiled only once.
"""

import torch
from torch import Tensor

from pyroflows.fitting.estimators import filled
from pyroflows.inference.search.bfgs import Search
from pyroflows.inference.search.density import Density, antithetic
from pyroflows.inference.search.gaussians import Approximation, GaussianApproximation, as_gaussian, containing, refine
from pyroflows.models.log_joint import ValueAndGrad

PLAIN_SCALE = 0.1
# Constants of the search on the paths, whose Gaussians need only be near enough for the variational steps.
NUM_FIRST, THINNING, PATIENCE = 12, 3, 20


def pathfinder(
    value_and_grad: ValueAndGrad, starts: Tensor, *, num_rows: int = 64, max_iterations: int = 150
) -> list[GaussianApproximation]:
    r"""Search from each start for the Gaussian :math:`q = N(m, J J^\top)` of the largest ELBO.

    From all starts at once, BFGS climbs the log-density p, keeping a square root J of the inverse Hessian. Of the
    Gaussians :math:`N(u + J J^\top g, J J^\top)` at its iterates u with gradients g, and of the plain
    :math:`N(u_0, 0.1^2 I)`, that of the best ELBO is each start's first; the mode itself may be useless, as for a
    funnel. Then natural gradient steps raise its ELBO: in :math:`z = J^{-1}(u - m)`, the score's regression on draws
    of q, :math:`\nabla_z \log p \approx b - A z`, estimates :math:`b = E_q[\nabla_z \log p]` and
    :math:`A = -E_q[\nabla_z^2 \log p]`, and with a rate :math:`\rho` falling from 1 as the ELBO settles

    .. math:: P = (1 - \rho) I + \rho A, \quad m \leftarrow m + \rho J P^{-1} b, \quad J \leftarrow J P^{-1/2}

    within a trust region (Salimans and Knowles 2013, arXiv:1206.6679; Khan and Rue 2023, arXiv:2107.04562). For a
    Gaussian p one full step is exact.

    Args:
        value_and_grad: vectors ``(num_rows, D)`` in the dtype of the starts to log-densities ``(num_rows,)``, up to a
            constant, and gradients ``(num_rows, D)``. Never called with another number of rows. Where one of them is
            not finite, the density is taken as zero.
        starts: ``(S, D)``, S at most ``num_rows``; they should be few, since they share the rows of a call.
        num_rows: number of vectors in one call, which are draws, or trial steps of all starts together.
        max_iterations: number of iterations of the search for modes, with at most two calls each.

    Returns:
        A Gaussian for each start with a finite density, the best ELBO first, in the dtype of the starts. A start that
        ends inside another's Gaussian shares that object, if the variance of its log weights is below 0.5.

    Raises:
        ValueError: if the starts do not fit the rows, or none has a finite density.

    Draws come from torch's global generator. Time and memory are :math:`O(S D^2)` an iteration and :math:`O(D^3)` a
    variational step, which takes ``4 D`` rows or one call.

    Example:
        >>> precision = torch.tensor([[2.0, 1.9], [1.9, 2.0]])
        >>> def value_and_grad(u):
        ...     return -0.5 * ((u @ precision) * u).sum(-1), -u @ precision
        >>> best, *_ = pathfinder(value_and_grad, torch.rand(4, 2))
        >>> torch.allclose(best.scale_tril @ best.scale_tril.T, precision.inverse(), rtol=1e-3)
        True
    """
    if starts.ndim != 2 or not 1 <= len(starts) <= num_rows:
        raise ValueError(f"starts must be (S, D) with 1 <= S <= num_rows = {num_rows}, got {tuple(starts.shape)}")
    found = approximations(Density(value_and_grad, num_rows, starts), starts, max_iterations)
    results = {id(q): as_gaussian(q, starts) for q in found}
    return [results[id(q)] for q in found]


def approximations(density: Density, starts: Tensor, max_iterations: int = 150) -> list[Approximation]:
    """Search as :func:`pathfinder` does; the Gaussians stay in float64, with the variances of their log weights."""
    search = Search(density, starts.double())
    if not search.active.any():
        raise ValueError("the log-density or its gradient is finite at none of the starts")
    finite = search.active.nonzero()[:, 0].tolist()
    firsts = _best_on_paths(density, search, max_iterations)
    found: list[Approximation] = []
    shared = []
    for i in sorted(finite, key=lambda i: firsts[i].elbo, reverse=True):
        q = containing(search.loc[i], found) or refine(density, firsts[i], found)
        if all(q is not other for other in found):
            found.append(q)
        shared.append(q)
    return sorted(shared, key=lambda q: q.elbo, reverse=True)


def _best_on_paths(density: Density, search: Search, max_iterations: int) -> list[Approximation]:
    """Choose on the path of each start the Gaussian of the best ELBO, estimated from few draws."""
    num_starts, dim = search.loc.shape
    noise = antithetic(density.num_rows // num_starts, search.loc)
    identity = torch.eye(dim).to(search.loc)
    loc, root = search.loc, PLAIN_SCALE * identity.expand(num_starts, dim, dim)
    elbo = filled(density.log_weights(loc, root, noise)[0]).mean(-1)
    last_gain = torch.zeros_like(elbo)
    for i in range(max_iterations):
        if not search.active.any():
            break
        search.advance()
        if i >= NUM_FIRST and i % THINNING and search.active.any():
            continue
        new_loc, new_root = search.gaussians()
        new_elbo = filled(density.log_weights(new_loc, new_root, noise)[0]).mean(-1)
        better = new_elbo > elbo
        elbo = new_elbo.where(better, elbo)
        loc = new_loc.where(better[:, None], loc)
        root = new_root.where(better[:, None, None], root)
        last_gain = torch.where(better, i, last_gain)
        # Towards the neck of a funnel the density grows without bound while the Gaussians get worse.
        search.active = search.active & (i - last_gain < PATIENCE)
    return [Approximation(loc[i], root[i], elbo[i].item()) for i in range(num_starts)]

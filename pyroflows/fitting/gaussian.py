"""Fit a Gaussian in closed form, to compare a fitted flow with."""

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyroflows.constraints import angles_in
from pyroflows.flows import Flow
from pyroflows.training.data import Rows

# More dimensions or rows would take too much time and memory for a figure to compare with.
MAX_DIM, MAX_ROWS = 500, 100_000
# A column whose residual, given those before it, is smaller than this fraction of its size depends on them linearly.
MIN_RESIDUAL = 1e-6


@torch.no_grad()
def gaussian_log_prob(flow: Flow, training: Rows, held_out: Rows) -> float | None:
    r"""Compute the mean log-density that a Gaussian of full covariance gives to held-out rows.

    Its moments are the weighted ones of the training rows, the maximum-likelihood estimates. If there are contexts c,
    it is :math:`x \sim N(A c + b, \Sigma)`, where A and b come from weighted least squares. Where the flow has a
    bijection onto a bounded support, it is the image of a Gaussian under this bijection.

    Args:
        flow: the flow to compare with; only its support counts.
        training: rows to fit the Gaussian to, in random order, of which the first 100,000 count.
        held_out: rows to score.

    Returns:
        The weighted mean in nats a row; None if the covariance is singular, as with fewer training rows than
        dimensions, or events are discrete, have more than 500 dimensions, or hold angles, whose density at one
        side of the cut must be that at the other.

    Example:
        >>> from pyroflows.training.data import load
        >>> flow = pf.flows.MAF(2)
        >>> rows = load(flow, torch.randn(20_000, 2)).rows
        >>> gaussian_log_prob(flow, rows[:10_000], rows[10_000:])
        -2.8...
    """
    if flow.dim > MAX_DIM or flow.support.is_discrete or any(angles_in(flow.support, flow.event_shape[-1])):
        return None
    training = training[:MAX_ROWS]
    weights = (training.weights / training.weights.sum()).cpu().double().sqrt()[:, None]
    y, _ = _unbounded(flow, training)
    design = _design(training)
    coefficients = torch.linalg.lstsq(weights * design, weights * y, driver="gelsd").solution
    residual = weights * (y - design @ coefficients)
    factor, info = torch.linalg.cholesky_ex(residual.mT @ residual)
    if info or (factor.diagonal() < MIN_RESIDUAL * factor.norm(dim=-1)).any():
        return None
    y, ladj = _unbounded(flow, held_out)
    log_prob = MultivariateNormal(_design(held_out) @ coefficients, scale_tril=factor).log_prob(y) + ladj
    mean = torch.dot(held_out.weights.cpu().double(), log_prob).item() / held_out.weights.sum().item()
    return mean if math.isfinite(mean) else None


def _unbounded(flow: Flow, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return rows as vectors in the space where the flow standardises them, and the log-determinant of that map."""
    x, ladj = rows.x, rows.x.new_zeros(len(rows))
    layers = list(flow.transform.layers)
    if flow.standardization in layers:
        for layer in reversed(layers[layers.index(flow.standardization) + 1 :]):
            x, change = layer.inverse_and_ladj(x)
            ladj = ladj + change
    return x.flatten(1).cpu().double(), ladj.cpu().double()


def _design(rows: Rows) -> Tensor:
    """Return the regressors ``(n, 1 + context size)``, of which the first is constant."""
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    return ones if rows.context is None else torch.cat([ones, rows.context.flatten(1).cpu().double()], -1)

"""Fit another guide to a posterior: one that is quicker to sample, or one that covers more."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyroflows.fitting import DensityFit, Distillation, MatchingFit, distill, fit_density
from pyroflows.fitting.methods import fit_method, require_options
from pyroflows.flows import Flow, Recipe
from pyroflows.guides import AutoFlow
from pyroflows.guides.packed import FlowFn
from pyroflows.interruption import keeping
from pyroflows.models.tracing import Model
from pyroflows.randomness import seeded

NUM_CORRELATION_DRAWS = 4000
PATIENCE = 5

T = TypeVar("T")


def distilled(
    make: Callable[[AutoFlow, Distillation], T],
    model: Model,
    teacher: AutoFlow,
    flow_fn: FlowFn | None,
    args: Any,
    kwargs: Any,
    options: Mapping[str, Any],
) -> T:
    """Make a guide of the model, and distill the flow of another guide into its flow.

    Args:
        make: a function from the guide and the distillation to the result, also if the fit is interrupted.
        model: the Pyro model.
        teacher: the guide whose flow is distilled.
        flow_fn: ``latent_dim -> flow``; None for the default recipe.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        options: options of :func:`pyroflows.distill`.
    """
    flow: Any = teacher.flow
    # The student starts at random too.
    with seeded(options.get("seed")):
        with torch.no_grad():
            draws = flow().sample((NUM_CORRELATION_DRAWS,))
        guide = _guide_like(teacher, model, flow_fn)
        student = _start_near(guide, draws, torch.ones_like(draws[:, 0]), args, kwargs)
    with keeping("the fit", lambda found: found and make(guide, found), "a student in training"):
        return make(guide, distill(student, flow, **options))


def weighted(
    make: Callable[[AutoFlow, DensityFit | MatchingFit], T],
    model: Model,
    proposal: AutoFlow,
    flow_fn: FlowFn | None,
    latents: Tensor,
    weights: Tensor,
    args: Any,
    kwargs: Any,
    method: str,
    options: Mapping[str, Any],
) -> T:
    """Make a guide of the model, and fit its flow to weighted draws.

    Args:
        make: a function from the guide and the fit to the result, also if the fit is interrupted.
        model: the Pyro model.
        proposal: the guide from which the draws are.
        flow_fn: ``latent_dim -> flow``; None for a MAF, or a spline for a single latent.
        latents: unconstrained draws ``(S, dim)``.
        weights: their weights ``(S,)``.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        method: how the flow is fitted, see :func:`pyroflows.fitting.methods.fit_method`.
        options: options of that fit.
    """
    # Beyond its bounds a spline is the identity, while an affine map goes on and covers tails with few draws.
    default = Recipe("MAF" if latents.shape[1] > 1 else "NSF")
    guide = _guide_like(proposal, model, flow_fn or default)
    flow = _start_near(guide, latents, weights, args, kwargs)
    last = flow.transform.layers[-1]
    # Flow matching trains a continuous layer alone, in the coordinates that the last layer gives it.
    last.requires_grad_(False)
    with keeping("the fit", lambda found: found and make(guide, found), "a flow in training"):
        try:
            fit = fit_method(flow, method)
            require_options(fit, options)
            if fit is fit_density:
                last.requires_grad_(True)
                options = {"patience": PATIENCE, **options}
            found = fit(flow, latents, weights=weights, **options)
        finally:
            last.requires_grad_(True)
        return make(guide, found)


def _guide_like(other: AutoFlow, model: Model, flow_fn: FlowFn | None) -> AutoFlow:
    """Make a guide whose unconstrained vectors mean the same as those of another guide of the model."""
    guide = AutoFlow(model, flow_fn, dtype=other.dtype)
    assert other.layout is not None
    guide.center_at(other.layout.centers)
    return guide


def _start_near(guide: AutoFlow, latents: Tensor, weights: Tensor, args: Any, kwargs: Any) -> Flow:
    """Build the flow of a guide at the mean and the covariance of weighted latents ``(n, dim)``."""
    dim = latents.shape[1]
    mean = (weights / weights.sum()).double() @ latents.double()
    covariance = torch.cov(latents.T.double(), aweights=weights.double()).reshape(dim, dim)
    sd = covariance.diagonal().sqrt()
    num_effective = weights.sum() ** 2 / (weights**2).sum()
    # The covariance of fewer draws than dimensions is singular.
    shrinkage = dim / (dim + num_effective.double())
    correlation = torch.lerp(covariance / sd / sd[:, None], torch.eye(dim).to(covariance), shrinkage)
    guide.start_at(mean, sd[:, None] * torch.linalg.cholesky(correlation), *args, **kwargs)
    assert guide.flow is not None
    return guide.flow

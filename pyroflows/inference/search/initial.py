"""Find initial values at which the log joint of a model is finite."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyroflows.compiling.singular import is_singular
from pyroflows.errors import DataError, FlowError, ModelError
from pyroflows.models.arguments import non_finite
from pyroflows.models.layout import Layout
from pyroflows.models.once import run_once
from pyroflows.models.one_draw import CopiedReads
from pyroflows.models.tracing import Model, trace_model
from pyroflows.randomness import seeded

# As many points as Pyro's MCMC tries.
NUM_TRIES = 100
# Half of them are uniform in a cube of the unconstrained space, which grows from this size to that one.
LEAST_RADIUS, LARGEST_RADIUS = 2.0, 10.0
ADVICE = "Give a guide with init_loc_fn=init_to_value(values={...}), with values where it is finite"


class _NotFiniteError(Exception):
    """The log joint is not finite at a point; the message says where and why."""


def finite_center(model: Model, args: Any, kwargs: Any, layout: Layout, center: Tensor) -> Tensor:
    """Give initial values at which the log joint and its gradient are finite.

    Where they are not at the given ones, as with a hard constraint, draws of the prior and points around zero are
    tried, and the first good one is taken, as in Pyro's MCMC.

    Args:
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        layout: the layout of its latents.
        center: the initial values, packed, ``(dim,)``.

    Raises:
        ModelError: if there is no such point among all that are tried; names the site.
        DataError: if there is none, and an argument holds NaN or infinite values; names argument and position.
    """
    log_joint = partial(_log_joint_at, model, args, kwargs, layout)
    try:
        return _with_gradient(log_joint, center)
    except _NotFiniteError as error:
        first_error = error
    for point in _other_points(model, args, kwargs, layout, center):
        try:
            return _with_gradient(log_joint, point)
        except _NotFiniteError:
            continue
    if found := non_finite(model, args, kwargs):
        raise DataError(
            f"{'; '.join(found)}, and the log joint is not finite at the initial values: {first_error}. Fill these "
            "entries with any finite number, for instance by x.nan_to_num(), even where a mask hides them"
        )
    raise ModelError(
        f"the log joint is not finite at the initial values: {first_error}; nor is it at any of {NUM_TRIES} other "
        f"points. {ADVICE}; a narrower prior or dtype=torch.float64 may also help"
    ) from first_error.__cause__


@torch.no_grad()
def require_finite(model: Model, args: Any, kwargs: Any, layout: Layout, center: Tensor) -> None:
    """Raise if the log joint is not finite at the initial values of a guide.

    Args:
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        layout: the layout of its latents.
        center: the initial values, packed, ``(dim,)``.

    Raises:
        ModelError: if the log joint is not finite there; names the site.
    """
    try:
        _log_joint_at(model, args, kwargs, layout, center)
    except _NotFiniteError as error:
        raise ModelError(f"the log joint is not finite at the initial values: {error}. {ADVICE}") from error.__cause__


def _log_joint_at(model: Model, args: Any, kwargs: Any, layout: Layout, vector: Tensor) -> Tensor:
    """Compute the log joint at one vector, by a run with validation, which knows the supports of observed sites."""
    values, ladj = layout.constrain(vector)
    try:
        with seeded(0):  # rows of a subsampled plate are drawn
            log_probs = run_once(model, args, kwargs, values, layout.structure.enumeration).log_probs
    except (ValueError, RuntimeError) as error:
        if isinstance(error, FlowError) or not (isinstance(error, ValueError) or is_singular(error)):
            raise
        raise _NotFiniteError(" ".join(str(error).split())) from error
    for name, log_prob in log_probs.items():
        if not log_prob.isfinite().all():
            raise _NotFiniteError(f"site '{name}' has log-density {log_prob.sum().item()}")
    return ladj + sum(log_prob.sum() for log_prob in log_probs.values())


def _with_gradient(log_joint: Any, vector: Tensor) -> Tensor:
    """Return the vector if the log joint and its gradient are finite there."""
    with torch.enable_grad():
        leaf = vector.detach().requires_grad_()
        try:
            (gradient,) = torch.autograd.grad(log_joint(leaf), leaf)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            with CopiedReads():
                value = log_joint(leaf)
            (gradient,) = torch.autograd.grad(value, leaf)
    if not gradient.isfinite().all():
        raise _NotFiniteError("its gradient is not finite")
    return vector


def _other_points(model: Model, args: Any, kwargs: Any, layout: Layout, center: Tensor) -> Iterator[Tensor]:
    """Iterate over points uniform around zero, and draws of the prior where it has one, in turn."""
    flat = [layout.slices[site.name] for site in layout.structure.latents if site.is_flat]
    for i in range(NUM_TRIES):
        radius = LEAST_RADIUS + (LARGEST_RADIUS - LEAST_RADIUS) * i / NUM_TRIES
        point = radius * (2 * torch.rand(layout.dim).to(center) - 1)
        if i % 2:
            drawn = prior_draw(model, args, kwargs, layout)
            if drawn is None:
                continue
            drawn = drawn.to(center)
            for part in flat:
                drawn[part] = point[part]
            point = drawn
        yield point


def prior_draw(model: Model, args: Any, kwargs: Any, layout: Layout) -> Tensor | None:
    """Draw an unconstrained vector ``(dim,)`` from the prior; None where a matrix of the model is singular.

    At an extreme draw from a vague prior a scale may underflow, so that validation would fail. At flat priors the draw
    is a feasible value, the same each time.

    Args:
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        layout: the layout of its latents.
    """
    try:
        with pyro.validation_enabled(False):
            trace = trace_model(model, args, kwargs)
    except RuntimeError as error:
        if not is_singular(error):
            raise
        return None
    return layout.unconstrain({name: trace.nodes[name]["value"] for name in layout.slices})

"""What a fit needs of a model before it starts: the log joint, and initial values where it is finite."""

import time
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.compiling.check import Compiler
from pyroflows.compiling.singular import is_singular
from pyroflows.errors import warn
from pyroflows.guides import AutoFlow
from pyroflows.inference.search.circles import find_centers, require_no_flat_angles
from pyroflows.inference.search.initial import finite_center, require_finite
from pyroflows.models.batching import NUM_EXAMPLES, NUM_FAR
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.proper import require_proper
from pyroflows.models.requirements import check_static
from pyroflows.models.signature import bound_arguments
from pyroflows.models.structure import describe
from pyroflows.models.tracing import InitFn, Model
from pyroflows.randomness import seeded

# A model whose code reads values runs at this many others, within this time, to see whether its sites stay the same.
NUM_LOOKS = 16
MAX_SECONDS_OF_LOOKS = 0.5


def prepared(
    model: Model, guide: AutoFlow, args: Any, kwargs: Any, compile: str, may_move: bool
) -> tuple[LogJoint, Tensor]:
    """Make the log joint of a model in the unconstrained space of a guide, and find initial values.

    Args:
        model: the Pyro model, in the dtype of the guide.
        guide: a flow guide of the model, built.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        compile: how the log joint is compiled, as for :class:`pyroflows.FlowVI`.
        may_move: whether other initial values than the guide's may be taken, and other angles put at the origin of the
            guide's space.

    Returns:
        The log joint, and the initial values as an unconstrained vector ``(dim,)``.

    Raises:
        ModelError: if the log joint is finite at no initial values, if a posterior cannot be normalised, or if the
            latents are not the same in every run; names the site.
        DataError: if the log joint is not finite since an argument holds NaN or infinite values; names the argument.
    """
    assert guide.layout is not None
    layout = guide.layout
    if not layout.structure.has_data:
        _warn_of_missing(model, args, kwargs)
    center = guide._init_loc().to(guide.dtype or layout.dtype)
    if may_move:
        center = finite_center(model, args, kwargs, layout, center)
    else:
        require_finite(model, args, kwargs, layout, center)
    log_joint = log_joint_at(model, args, kwargs, layout, center, compile)
    require_no_flat_angles(log_joint, center)
    return _cut_circles(guide, log_joint, center) if layout.centers and may_move else (log_joint, center)


def init_at(layout: Layout, vector: Tensor) -> InitFn:
    """An init function of Pyro's that gives the values of an unconstrained vector."""
    return init_to_value(values=layout.constrain(vector)[0])


def log_joint_at(model: Model, args: Any, kwargs: Any, layout: Layout, center: Tensor, compile: str) -> LogJoint:
    """Make the log joint, after checks that the latents are the same in all runs."""
    if layout.structure.reads_values:
        _check_static_around(layout, center, model, args, kwargs)
    with seeded(0):
        examples = center + 0.1 * torch.randn((NUM_EXAMPLES, layout.dim)).to(center)
        examples[0] = center
        # Opposite points with other scales, since code may take one branch for all draws of a batch that lie close.
        steps = torch.linspace(1, 3, NUM_FAR // 2)[:, None] * torch.randn((NUM_FAR // 2, layout.dim))
        examples = torch.cat([examples, center + torch.cat([steps, -steps]).to(center)])
    log_joint = LogJoint(model, args, kwargs, layout, examples, Compiler(compile))
    if log_joint.batched.mode == "loop" and not layout.structure.reads_values:
        # Code that reads values through numpy goes unnoticed, but neither a plate nor vmap can run it.
        _check_static_around(layout, center, model, args, kwargs)
    require_proper(log_joint, center)
    return log_joint


def _check_static_around(layout: Layout, center: Tensor, model: Model, args: Any, kwargs: Any) -> None:
    """Raise if a model whose code reads values shows other latents at values around the center."""
    end = time.perf_counter() + MAX_SECONDS_OF_LOOKS
    with pyro.validation_enabled(False):
        for _ in range(NUM_LOOKS):
            init_fn = init_at(layout, center + torch.randn_like(center))
            try:
                check_static(layout.structure, describe(model, args, kwargs, init_fn).summed_out())
            except RuntimeError as error:
                if not is_singular(error):
                    raise
            if time.perf_counter() > end:
                break


def _cut_circles(guide: AutoFlow, log_joint: LogJoint, center: Tensor) -> tuple[LogJoint, Tensor]:
    """Cut the circles of a guide where the log joint is low; give the log joint and the center in the new layout."""
    values, _ = log_joint.layout.constrain(center)
    guide.center_at(find_centers(log_joint, center))
    assert guide.layout is not None
    return log_joint.in_layout(guide.layout), guide.layout.unconstrain(values).to(center)


def _warn_of_missing(model: Model, args: Any, kwargs: Any) -> None:
    """Warn if nothing is observed, and an argument without a value may be the reason."""
    missing = [name for name, value in bound_arguments(model, args, kwargs).items() if value is None]
    if missing:
        warn(
            f"nothing is observed, so that the posterior is the prior: was argument '{missing[0]}' to be given? It is "
            "None",
        )

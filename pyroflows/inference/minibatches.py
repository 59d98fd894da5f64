"""The objective of a fit whose steps see a part of the rows of a model's plates, or a batch of its data."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyroflows.flows import Flow, FlowDistribution
from pyroflows.guides import AutoFlow
from pyroflows.guides.structured import AutoStructuredFlow
from pyroflows.inference.batches import Batches, FixedArguments
from pyroflows.inference.elbo import MinibatchELBO, ModelELBO, Part
from pyroflows.inference.preparation import log_joint_at
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.requirements import check_static
from pyroflows.models.subsampling import Calls
from pyroflows.models.tracing import Model


def elbo_of(
    guide: AutoFlow, model: Model, arguments: FixedArguments | Batches, log_joint: LogJoint, center: Tensor
) -> Callable[..., ModelELBO]:
    """A function from a flow, and the further arguments of :class:`ModelELBO`, to the objective of its training.

    Args:
        guide: the guide of the fit, built.
        model: the Pyro model, which may see a part of the rows.
        arguments: the model's arguments.
        log_joint: the log joint of the model at the latents of the guide.
        center: the initial values as an unconstrained vector, of the latents of the guide.
    """
    assert guide.layout is not None
    mode = log_joint.compiler.mode
    if isinstance(guide, AutoStructuredFlow):
        if isinstance(arguments, FixedArguments) and not guide.call(*arguments.first).partial:
            return lambda flow, *options: ModelELBO(flow, log_joint, *options)
        part_of = partial(_part_of_rows, guide, model, center, mode)
        return lambda flow, *options: MinibatchELBO(flow, partial(_law_of_rows, guide), arguments, part_of, *options)
    if isinstance(arguments, FixedArguments):
        return lambda flow, *options: ModelELBO(flow, log_joint, *options)
    part_of = partial(_part, guide, model, Calls(model), center, mode)
    return lambda flow, *options: MinibatchELBO(flow, partial(_law, flow), arguments, part_of, *options)


def _law(flow: Flow, part: Part, rows: Mapping[str, Tensor], args: Any, kwargs: Any) -> FlowDistribution:
    return flow().estimated()


def _part(guide: AutoFlow, model: Model, calls: Calls, center: Tensor, mode: str, args: Any, kwargs: Any) -> Part:
    """The log joint of the latents of a guide with one flow, which are the same in all batches."""
    assert guide.layout is not None
    call = calls.kind(args, kwargs)
    check_static(guide.layout.structure, call.layout.structure)
    layout = call.layout.at_centers(guide.layout.centers)
    return Part(log_joint_at(model, args, kwargs, layout, center, mode), call)


def _law_of_rows(
    guide: AutoStructuredFlow, part: Part, drawn: Mapping[str, Tensor], args: Any, kwargs: Any
) -> FlowDistribution:
    rows = {**drawn, **guide.given_rows(part.call, args, kwargs)}
    return guide.law_at(part.call.levels, rows, args, kwargs).estimated()


def _part_of_rows(guide: AutoStructuredFlow, model: Model, center: Tensor, mode: str, args: Any, kwargs: Any) -> Part:
    """The log joint of the latents of some rows, whose initial values are those of as many others."""
    call = guide.call(args, kwargs)
    first = torch.zeros(call.layout.dim).to(center)
    for ours, others in zip(call.levels, guide.levels, strict=True):
        first[ours.places] = center[others.places[torch.arange(len(ours.places)) % len(others.places)]]
    log_joint = log_joint_at(model, args, kwargs, call.layout, first, mode)
    is_global = torch.zeros(call.layout.dim, dtype=torch.bool, device=center.device)
    is_global[call.levels[0].places[0]] = True
    return Part(log_joint, call, partial(guide.counted, call.levels), is_global)

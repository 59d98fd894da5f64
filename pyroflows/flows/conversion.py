"""Make a flow of what users of other libraries hold."""

import sys
from typing import Any

import torch
from pyro import distributions as dist
from torch.distributions import Distribution, Transform

from pyroflows.constraints import angles_in
from pyroflows.errors import OptionError, ShapeError
from pyroflows.flows.assembly import flattened
from pyroflows.flows.base import standard_normal
from pyroflows.flows.discrete.refusal import require_real
from pyroflows.flows.flow import Flow
from pyroflows.shapes import described
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.foreign import Zuko


def as_flow(flow: Any, dim: int) -> Flow:
    """Return a :class:`Flow` made of a flow, a transform, a list of transforms, or a Zuko flow.

    Args:
        flow: any of these, without a context.
        dim: the event size D that it must have.

    Raises:
        OptionError: if it is none of these.
        ShapeError: if it has another event size, or takes a context.

    Example:
        >>> as_flow(torch.distributions.transforms.ExpTransform(), dim=2)().sample().shape
        torch.Size([2])
    """
    zuko = sys.modules.get("zuko")
    if zuko is not None and isinstance(flow, zuko.lazy.Flow):
        flow = _from_zuko(flow)
    elif not isinstance(flow, Flow):
        parts = list(flattened([flow] if isinstance(flow, Transform) else flow))
        is_sized = any(isinstance(part, FlowTransform) for part in parts)
        flow = Flow(parts, base=None if is_sized else standard_normal(torch.Size([dim])), standardize=False)
    if flow.event_shape != (dim,) or flow.context_dim:
        raise ShapeError(
            f"a flow of {dim} dimensions without a context is needed, but this one has events of "
            f"{described(flow.event_shape)} and context {described(flow.context_shape)}"
        )
    require_real(flow, "a guide", "latents that are categories are enumerated, by pyro.infer.TraceEnum_ELBO")
    if any(angles_in(flow.support, dim)):
        raise OptionError("a flow of real numbers is needed, but this one is of angles: guides map angles themselves")
    # Transforms of other libraries do not know their sizes, so a draw has to show whether they fit.
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            flow().sample()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ShapeError(f"this flow does not map vectors of dim={dim}, or needs a context: {error}") from error
    return flow


def _from_zuko(flow: Any) -> Flow:
    # The import of Zuko switches off argument validation in the whole process; this restores the setting of Pyro.
    Distribution.set_default_validate_args(bool(dist.is_validation_enabled()))
    return Flow(Zuko(flow.transform, flow.base().event_shape[-1]), base=flow.base, standardize=False)

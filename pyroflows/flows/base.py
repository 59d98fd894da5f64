"""A flow: transforms stacked on a base distribution."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Distribution, Transform
from torch.nn import functional as F

from pyroflows.errors import OptionError, ShapeError
from pyroflows.flows.distribution import DistributionModule, FlowDistribution, checked_event
from pyroflows.transforms.base import Compose, FlowTransform, drop_param_store_references
from pyroflows.transforms.foreign import Foreign, Zuko

Base = Distribution | nn.Module | str | None


class Flow(nn.Module):
    """A normalizing flow: a stack of transforms on a base distribution. A call makes its distribution.

    Args:
        transforms: layers from base to data, the first next to the base: layers of this library, or any torch or Pyro
            transforms.
        base: a torch or Pyro distribution of event shape ``(dim,)``, whose tensors become buffers; None for a standard
            normal; "student_t" for independent Student-t variables with learned degrees of freedom; or a module
            whose call returns a distribution.

    Shapes: ``flow()`` has event shape ``(dim,)``; ``flow(context)`` the context's batch shape as well.

    Raises:
        ShapeError: if sizes of layers, base or context do not agree.
        OptionError: if the base is unknown.

    Example:
        >>> flow = Flow([Planar(2), Planar(2)])
        >>> x, log_q = flow().rsample_and_log_prob((100,))
        >>> x.shape, log_q.shape
        (torch.Size([100, 2]), torch.Size([100]))
    """

    def __init__(self, transforms: Transform | Sequence[Transform], base: Base = None) -> None:
        super().__init__()
        parts = list(_flattened([transforms] if isinstance(transforms, Transform) else transforms))
        dims = [part.dim for part in parts if isinstance(part, FlowTransform)]
        if isinstance(base, Distribution):
            dims += list(base.event_shape[-1:])
        if not dims:
            raise ShapeError("the event size of a flow is unknown: none of its transforms has one, so give it a base")
        self.dim = dims[0]
        layers = [part if isinstance(part, FlowTransform) else Foreign(part, self.dim) for part in parts]
        self.transform = Compose(layers)
        self.base = _base_module(base, self.dim)

    def __getstate__(self) -> dict[str, Any]:
        drop_param_store_references(self)
        return self.__dict__

    @property
    def context_dim(self) -> int:
        """Size of the context, 0 for none."""
        return self.transform.context_dim

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The distribution, at a context ``(..., context_dim)`` if the flow takes one."""
        expected = (self.context_dim,) if self.context_dim else None
        if (None if context is None else context.shape[-1:]) != expected:
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ShapeError(f"this flow has context size {self.context_dim}, but got {got}")
        return FlowDistribution(self.base(), self.transform, context)


class StudentT(nn.Module):
    r"""Independent standard Student-t variables with learned degrees of freedom :math:`\nu = 1 + \mathrm{softplus}`.

    Args:
        dim: the event size D.
        df: initial degrees of freedom, above 1.
    """

    def __init__(self, dim: int, df: float = 10.0) -> None:
        super().__init__()
        self.raw_df = nn.Parameter(torch.full((dim,), df - 1.0).expm1().log())

    def forward(self) -> Distribution:
        return dist.StudentT(1 + F.softplus(self.raw_df)).to_event(1)


def as_flow(flow: Any, dim: int) -> Flow:
    """A :class:`Flow` of ``dim`` dimensions from a flow, a transform, a list of transforms, or a Zuko flow.

    Raises:
        OptionError: if it is none of these.
        ShapeError: if it is not a flow of ``dim`` dimensions without a context.
    """
    zuko = sys.modules.get("zuko")
    if zuko is not None and isinstance(flow, zuko.lazy.Flow):
        flow = _from_zuko(flow)
    elif not isinstance(flow, Flow):
        parts = list(_flattened([flow] if isinstance(flow, Transform) else flow))
        flow = Flow(parts, base=_standard_normal(dim))
    if flow.dim != dim or flow.context_dim:
        raise ShapeError(
            f"a flow of {dim} dimensions without a context is needed, but this one has {flow.dim} dimensions and "
            f"context size {flow.context_dim}"
        )
    # Transforms of other libraries do not tell their sizes.
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            flow().sample()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ShapeError(f"this flow does not map vectors of dim={dim}, or needs a context: {error}") from error
    return flow


def _from_zuko(flow: Any) -> Flow:
    # Zuko's import switches off argument validation for all distributions of the process; what Pyro was told stands.
    Distribution.set_default_validate_args(bool(dist.is_validation_enabled()))
    return Flow(Zuko(flow.transform, flow.base().event_shape[-1]), base=flow.base)


def _flattened(transforms: Any) -> Iterable[Transform]:
    if not isinstance(transforms, Iterable):
        raise OptionError(f"a flow is made of transforms, but got {type(transforms).__name__}")
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _flattened(transform.parts)
        elif isinstance(transform, Transform):
            yield transform
        else:
            raise OptionError(f"a flow is made of transforms, but got {type(transform).__name__}")


def _standard_normal(dim: int) -> Distribution:
    return dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)


def _base_module(base: Base, dim: int) -> nn.Module:
    if base is None:
        base = _standard_normal(dim)
    if isinstance(base, Distribution):
        return DistributionModule(checked_event(base, dim))
    if isinstance(base, nn.Module):
        checked_event(base(), dim)
        return base
    if base == "student_t":
        return StudentT(dim)
    raise OptionError(f'base must be a distribution, a module that returns one, "student_t" or None, got {base!r}')

"""A flow: transforms stacked on a base distribution."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Distribution, Transform, biject_to, constraints
from torch.nn import functional as F

from pyroflows.errors import DataError, FlowError, OptionError, ShapeError
from pyroflows.flows.distribution import DistributionModule, FlowDistribution, checked_event
from pyroflows.shapes import as_given, described, places, shape_of
from pyroflows.transforms.base import FlowTransform, drop_param_store_references
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.foreign import Foreign, Zuko, on_events
from pyroflows.transforms.normalization import Standardize

Base = Distribution | nn.Module | str | None


class Flow(nn.Module):
    """A normalizing flow: a stack of transforms on a base distribution. A call makes its distribution.

    Args:
        transforms: layers from base to data, the first next to the base: layers of this library, or any torch or Pyro
            transforms.
        base: a torch or Pyro distribution of the layers' event shape, whose tensors become buffers; None for a standard
            normal; "student_t" for independent Student-t variables with learned degrees of freedom; or a module
            whose call returns a distribution.
        support: where the data lie, a torch constraint such as ``constraints.positive``; Pyro's ``biject_to`` of it
            follows the transforms. For one constraint a column, ``constraints.cat([...], dim=-1)``.

    Shapes: ``flow()`` has the event shape of its layers, ``(dim,)`` for vectors; ``flow(context)`` the context's batch
    shape as well, which is its shape without the axes of ``context_shape``.

    Attributes:
        event_shape: that of all layers.
        dim: the number of elements of an event.

    Raises:
        ShapeError: if sizes of layers, base or context do not agree.
        OptionError: if the base is unknown, or there is no bijection onto the support.

    Example:
        >>> flow = Flow([Planar(2), Planar(2)])
        >>> x, log_q = flow().rsample_and_log_prob((100,))
        >>> x.shape, log_q.shape
        (torch.Size([100, 2]), torch.Size([100]))
    """

    def __init__(
        self,
        transforms: Transform | Sequence[Transform],
        base: Base = None,
        support: constraints.Constraint | None = None,
    ) -> None:
        super().__init__()
        parts = list(_flattened([transforms] if isinstance(transforms, Transform) else transforms))
        shapes = [part.event_shape for part in parts if isinstance(part, FlowTransform)]
        if isinstance(base, Distribution) and base.event_shape:
            shapes.append(base.event_shape)
        if not shapes:
            raise ShapeError("the event size of a flow is unknown: none of its transforms has one, so give it a base")
        self.event_shape = shapes[0]
        self.dim = self.event_shape.numel()
        layers = [part if isinstance(part, FlowTransform) else Foreign(part, self.event_shape) for part in parts]
        if support is not None and not _is_unbounded(support):
            layers.append(_layer_onto(support, layers, self.event_shape))
        self.transform = Compose(layers)
        self.base = _base_module(base, self.event_shape)

    def __getstate__(self) -> dict[str, Any]:
        drop_param_store_references(self)
        return self.__dict__

    @property
    def context_dim(self) -> int:
        """Number of elements of the context, 0 for none."""
        return self.transform.context_dim

    @property
    def context_shape(self) -> torch.Size:
        """Shape of the context, ``(context_dim,)`` for vectors; empty for none."""
        return self.transform.context_shape

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The distribution, at a context ``(..., *context_shape)`` if the flow takes one."""
        shape = self.context_shape
        if (None if context is None else context.shape[context.dim() - len(shape) :]) != (shape or None):
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ShapeError(f"this flow has context {described(shape)}, but got {got}")
        if isinstance(self, PyroModule):
            _state_parameters(self)
        return FlowDistribution(self.base(), self.transform, context)

    def before_step(self) -> None:
        """Run before each step of training, outside of what is traced."""

    @property
    def is_standardized(self) -> bool:
        """Whether the flow holds location and scale of data, see :meth:`standardize`."""
        unbounded, _ = self._layers()
        return bool(unbounded) and isinstance(unbounded[-1], Standardize)

    @torch.no_grad()
    def standardize(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Take location and scale of data into the flow, so that its layers meet data of mean 0 and variance 1.

        They become a layer :class:`pyroflows.transforms.Standardize` at the data end, before the map onto a bounded
        support; ``log_prob`` is that of the data as they are. It stands in the state dict, and a flow made with the
        same arguments loads it. A second call replaces the layer of the first.

        Args:
            x: rows of data ``(n, *event_shape)``; each element of an event has its own location and scale.
            weights: of the rows, ``(n,)``.

        Raises:
            DataError: if a column, an element of the event, does not vary, or holds values on the boundary of the
                support or outside it.
        """
        u = self.unconstrain(x).cpu().double()
        weights = u.new_ones(len(u)) if weights is None else weights.cpu().double()
        weights = (weights / weights.sum()).reshape(-1, *[1] * len(self.event_shape))
        mean = (weights * u).sum(0)
        deviation = (weights * (u - mean) ** 2).sum(0).sqrt()
        loc, scale = mean.to(self._like()), deviation.to(self._like())
        is_bad = ~(loc.isfinite() & scale.isfinite() & (scale > 0))
        if is_bad.any():
            raise DataError(
                f"columns {places(is_bad)} of x have no positive finite standard deviation: leave "
                "out what is constant, and use units in which the numbers are of ordinary size"
            )
        self._standardize_by(Standardize(loc, scale))

    def standardize_like(self, other: "Flow") -> None:
        """Take location and scale from another flow of the same events that is standardised."""
        layer = other._layers()[0][-1]
        self._standardize_by(Standardize(layer.loc, layer.scale))

    def unconstrain(self, x: Tensor) -> Tensor:
        """Data before the map onto a bounded support."""
        for layer in reversed(self._layers()[1]):
            x, _ = layer.inverse_and_ladj(x)
        return x

    def _layers(self) -> tuple[list[FlowTransform], list[FlowTransform]]:
        """The layers up to the first whose values are bounded, and those from there on."""
        layers = list(self.transform.layers)
        count = next((i for i, layer in enumerate(layers) if not _is_unbounded(layer.codomain)), len(layers))
        return layers[:count], layers[count:]

    def _standardize_by(self, layer: Standardize | None) -> None:
        # In a new composition: distributions that exist keep the law they had.
        unbounded, bounded = self._layers()
        kept = unbounded[:-1] if self.is_standardized else unbounded
        self.transform = Compose([*kept, *([layer] if layer else []), *bounded])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # The state tells whether a flow is standardised, be it into a fresh flow or back to the start.
        place = len(self._layers()[0]) - self.is_standardized
        is_in_state = f"{prefix}transform.layers.{place}.loc" in state_dict
        if is_in_state != self.is_standardized:
            layer = Standardize(torch.zeros(self.event_shape), torch.ones(self.event_shape)).to(self._like())
            self._standardize_by(layer if is_in_state else None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _like(self) -> Tensor:
        return next(self.parameters(), torch.zeros(()))


def _state_parameters(flow: nn.Module) -> None:
    """Read all parameters of a flow that ``to_pyro_module_`` has converted, which makes them part of the program.

    Its networks read them only when a density is computed, and that is after the program has run.
    """
    for module in flow.modules():
        if isinstance(module, PyroModule):
            if module._pyro_samples:
                raise OptionError(
                    f"{type(module).__name__} in this flow has priors on {sorted(module._pyro_samples)}, but the "
                    "parameters of a flow cannot be sample sites: set them as nn.Parameter"
                )
            for name in module._parameters:
                getattr(module, name)


class StudentT(nn.Module):
    r"""Independent standard Student-t variables with learned degrees of freedom :math:`\nu = 1 + \mathrm{softplus}`.

    Args:
        dim: the event size D, or the event shape.
        df: initial degrees of freedom, above 1.
    """

    def __init__(self, dim: int | Sequence[int], df: float = 10.0) -> None:
        super().__init__()
        self.raw_df = nn.Parameter(torch.full(shape_of(dim), df - 1.0).expm1().log())

    def forward(self) -> Distribution:
        return dist.StudentT(1 + F.softplus(self.raw_df)).to_event(self.raw_df.dim())


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
        flow = Flow(parts, base=_standard_normal(torch.Size([dim])))
    if flow.event_shape != (dim,) or flow.context_dim:
        raise ShapeError(
            f"a flow of {dim} dimensions without a context is needed, but this one has {as_given(flow.event_shape)} "
            f"dimensions and context {described(flow.context_shape)}"
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


def _is_unbounded(constraint: constraints.Constraint) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))


def _layer_onto(support: constraints.Constraint, layers: Sequence[FlowTransform], shape: torch.Size) -> FlowTransform:
    """The bijection of events of that shape onto a support."""
    if not all(_is_unbounded(layer.codomain) for layer in layers):
        raise OptionError("a flow whose transforms are bounded themselves cannot have a support besides")
    try:
        layer = Foreign(biject_to(support), shape)
        # More rows than columns, so that parts along the wrong axis do not fit.
        layer.forward_and_ladj(torch.zeros(shape.numel() + 1, *shape))
    except NotImplementedError:
        raise OptionError(f"support must be a constraint onto which biject_to has a bijection, got {support}") from None
    except (FlowError, AssertionError, RuntimeError):
        raise ShapeError(
            f"there is no bijection of R^{as_given(shape)} onto the support {support}: give one constraint for all "
            "columns, or constraints.cat([...], dim=-1) with one for each"
        ) from None
    # The bijection's own codomain is that of its last part.
    layer.codomain = on_events(support, len(shape))
    return layer


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


def _standard_normal(shape: torch.Size) -> Distribution:
    return dist.Normal(torch.zeros(shape), torch.ones(shape)).to_event(len(shape))


def _base_module(base: Base, shape: torch.Size) -> nn.Module:
    if base is None:
        base = _standard_normal(shape)
    if isinstance(base, Distribution):
        return DistributionModule(checked_event(base, shape))
    if isinstance(base, nn.Module):
        checked_event(base(), shape)
        return base
    if base == "student_t":
        return StudentT(shape)
    raise OptionError(f'base must be a distribution, a module that returns one, "student_t" or None, got {base!r}')

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
from pyroflows.transforms.base import Compose, FlowTransform, drop_param_store_references
from pyroflows.transforms.foreign import Foreign, Zuko
from pyroflows.transforms.normalization import Standardize

Base = Distribution | nn.Module | str | None


class Flow(nn.Module):
    """A normalizing flow: a stack of transforms on a base distribution. A call makes its distribution.

    Args:
        transforms: layers from base to data, the first next to the base: layers of this library, or any torch or Pyro
            transforms.
        base: a torch or Pyro distribution of event shape ``(dim,)``, whose tensors become buffers; None for a standard
            normal; "student_t" for independent Student-t variables with learned degrees of freedom; or a module
            whose call returns a distribution.
        support: where the data lie, a torch constraint such as ``constraints.positive``; Pyro's ``biject_to`` of it
            follows the transforms. For one constraint a column, ``constraints.cat([...], dim=-1)``.

    Shapes: ``flow()`` has event shape ``(dim,)``; ``flow(context)`` the context's batch shape as well.

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
        dims = [part.dim for part in parts if isinstance(part, FlowTransform)]
        if isinstance(base, Distribution):
            dims += list(base.event_shape[-1:])
        if not dims:
            raise ShapeError("the event size of a flow is unknown: none of its transforms has one, so give it a base")
        self.dim = dims[0]
        layers = [part if isinstance(part, FlowTransform) else Foreign(part, self.dim) for part in parts]
        if support is not None and not _is_unbounded(support):
            layers.append(_layer_onto(support, layers, self.dim))
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
        if isinstance(self, PyroModule):
            _state_parameters(self)
        return FlowDistribution(self.base(), self.transform, context)

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
            x: rows of data ``(n, dim)``.
            weights: of the rows, ``(n,)``.

        Raises:
            DataError: if a column does not vary, or holds values on the boundary of the support or outside it.
        """
        u = self.unconstrain(x).cpu().double()
        weights = u.new_ones(len(u)) if weights is None else weights.cpu().double()
        weights = (weights / weights.sum())[:, None]
        mean = (weights * u).sum(0)
        deviation = (weights * (u - mean) ** 2).sum(0).sqrt()
        loc, scale = mean.to(self._like()), deviation.to(self._like())
        is_bad = ~(loc.isfinite() & scale.isfinite() & (scale > 0))
        if is_bad.any():
            raise DataError(
                f"columns {is_bad.nonzero().flatten().tolist()} of x have no positive finite standard deviation: leave "
                "out what is constant, and use units in which the numbers are of ordinary size"
            )
        self._standardize_by(Standardize(loc, scale))

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
            layer = Standardize(torch.zeros(self.dim), torch.ones(self.dim)).to(self._like())
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


def _is_unbounded(constraint: constraints.Constraint) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return isinstance(constraint, type(constraints.real))


def _layer_onto(support: constraints.Constraint, layers: Sequence[FlowTransform], dim: int) -> FlowTransform:
    """The bijection of R^D onto a support."""
    if not all(_is_unbounded(layer.codomain) for layer in layers):
        raise OptionError("a flow whose transforms are bounded themselves cannot have a support besides")
    try:
        layer = Foreign(biject_to(support), dim)
        # More rows than columns, so that parts along the wrong axis do not fit.
        layer.forward_and_ladj(torch.zeros(dim + 1, dim))
    except NotImplementedError:
        raise OptionError(f"support must be a constraint onto which biject_to has a bijection, got {support}") from None
    except (FlowError, AssertionError, RuntimeError):
        raise ShapeError(
            f"there is no bijection of R^{dim} onto the support {support}: give one constraint for all columns, or "
            "constraints.cat([...], dim=-1) with one for each"
        ) from None
    # The bijection's own codomain is that of its last part.
    layer.codomain = support if support.event_dim else constraints.independent(support, 1)
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

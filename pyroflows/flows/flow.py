"""A flow: layers stacked on a base distribution."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Distribution, Transform, biject_to, constraints

from pyroflows.constraints import angles_and_reals, angles_in, without_angles
from pyroflows.errors import FlowError, OptionError, ShapeError
from pyroflows.flows.angles import angles_of, check_base_of_angles
from pyroflows.flows.base import Base, base_module, is_validated, standard_normal
from pyroflows.flows.columns import standard_base
from pyroflows.flows.distribution import FlowDistribution
from pyroflows.shapes import as_given, described
from pyroflows.transforms.base import FlowTransform, drop_param_store_references
from pyroflows.transforms.circle import WholeTurns
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.foreign import Foreign, Zuko, on_events
from pyroflows.transforms.normalization import Standardize


class Flow(nn.Module):
    r"""A normalizing flow: a stack of layers on a base distribution, whose call returns its distribution.

    .. math:: x = \mu + \sigma \odot t(z), \quad z \sim p, \qquad
        \log q(x) = \log p(z) - \log\left|\det \frac{\partial x}{\partial z}\right|

    The location :math:`\mu` and scale :math:`\sigma` of the data belong to a layer
    :class:`pyroflows.transforms.Standardize` at the data end, before the map onto a bounded support. It is the identity
    until :meth:`adapt` sets it, which :func:`pyroflows.fit_density` does, so that the other layers see data of mean 0
    and variance 1.

    Layers with the univariate map "circular_spline" make a flow of angles in radians, or of angles in some columns. It
    takes whole turns out of them at both ends, and leaves their location and scale alone.

    Args:
        transforms: layers from base to data, the first next to the base: layers of this library, or any torch or Pyro
            transforms.
        base: a torch or Pyro distribution of the first layer's ``base_shape``, whose tensors become buffers; None for a
            standard normal, and the uniform law for angles; "student_t" for independent Student-t variables with
            learned degrees of freedom; or a module whose call returns a distribution.
        support: where the data lie, a torch constraint such as ``constraints.positive``; the bijection that
            ``biject_to`` has for it follows the transforms. With one constraint for each column it is
            ``constraints.cat([...], dim=-1)``, with ``pf.constraints.circular`` for angles. None if the transforms map
            onto the support themselves.
        standardize: whether the flow has the layer of location and scale. It never has if a transform is a
            ``Standardize`` itself or if events are discrete.

    Shapes: ``flow()`` has the event shape of the last layer, ``(dim,)`` for vectors; ``flow(context)`` also has the
    batch shape of the context, which is its shape without the axes of ``context_shape``.

    Attributes:
        event_shape: the shape of an event x.
        base_shape: the shape of its base value z.
        dim: the number of elements of an event.

    Raises:
        ShapeError: if the shapes of layers, base, support or context do not agree, or the event size is unknown.
        OptionError: if the base or a transform is none of these, or there is no bijection onto the support; or if only
            some layers, or the base, treat a column as angles.

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
        standardize: bool = True,
    ) -> None:
        super().__init__()
        parts = list(_flattened([transforms] if isinstance(transforms, Transform) else transforms))
        layers = list(_as_layers(parts, base))
        base_shape, event_shape = layers[0].base_shape, layers[-1].event_shape
        angles_at_base, angles = angles_of(layers)
        rest = support if support is None else _beside_angles(support, angles)
        if rest is not None and not _is_unbounded(rest):
            layers.append(_layer_onto(rest, layers, event_shape))
        self._standardize_at = _place_of_standardize(layers) if standardize else None
        if self._standardize_at is not None:
            before = layers[: self._standardize_at]
            shape = before[-1].event_shape if before else base_shape
            layers.insert(self._standardize_at, Standardize(shape, angles=angles_of(before)[1] if before else None))
        if any(angles_at_base):
            layers.insert(0, WholeTurns(base_shape, angles_and_reals(angles_at_base, len(base_shape))))
            self._standardize_at = None if self._standardize_at is None else self._standardize_at + 1
        if any(angles):
            on_circles = angles_and_reals(angles, len(event_shape))
            layers.append(WholeTurns(event_shape, on_events(support or on_circles, len(event_shape))))
        self.transform = Compose(layers)
        self.base = base_module(standard_base(base_shape, angles_at_base) if base is None else base, base_shape)
        if any(angles_at_base):
            check_base_of_angles(self.base, angles_at_base)
        self._stateful = [
            layer
            for layer in self.modules()
            if isinstance(layer, FlowTransform) and type(layer).before_step is not FlowTransform.before_step
        ]

    def __getstate__(self) -> dict[str, Any]:
        drop_param_store_references(self)
        return self.__dict__

    @property
    def event_shape(self) -> torch.Size:
        """The shape of an event x, ``(dim,)`` for vectors."""
        return self.transform.event_shape

    @property
    def base_shape(self) -> torch.Size:
        """The shape of a base value z."""
        return self.transform.base_shape

    @property
    def dim(self) -> int:
        """The number of elements of an event."""
        return self.transform.dim

    @property
    def context_dim(self) -> int:
        """The number of elements of the context, 0 for none."""
        return self.transform.context_dim

    @property
    def context_shape(self) -> torch.Size:
        """The shape of the context, ``(context_dim,)`` for vectors and empty for none."""
        return self.transform.context_shape

    @property
    def standardization(self) -> Standardize | None:
        """The layer of location and scale that the flow itself added at the data end, or None."""
        return None if self._standardize_at is None else self.transform.layers[self._standardize_at]

    @property
    def layers(self) -> list[FlowTransform]:
        """All layers from base to data, without the one of location and scale as long as that is the identity."""
        unused = self.standardization
        if unused is None or unused.is_adapted:
            return list(self.transform.layers)
        return [layer for layer in self.transform.layers if layer is not unused]

    @property
    def components(self) -> Sequence["Flow"]:
        """The flows of which this one is a mixture; a plain flow is its only component."""
        return (self,)

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """Return the distribution.

        Args:
            context: ``(..., *context_shape)``, if the flow takes one.

        Raises:
            ShapeError: if the context has another shape, or is missing.
        """
        shape = self.context_shape
        if (None if context is None else context.shape[context.dim() - len(shape) :]) != (shape or None):
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ShapeError(f"this flow has context {described(shape)}, but got {got}")
        if isinstance(self, PyroModule):
            _register_parameters(self)
        return FlowDistribution(self.base(), self.transform, context, is_validated())

    @property
    def adapts(self) -> bool:
        """Whether a layer learns from data before training."""
        return self.transform.adapts

    @property
    def is_adapted(self) -> bool:
        """Whether all layers that learn from data before training have done so; a state that is loaded counts."""
        return self.transform.is_adapted

    def adapt(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Let the layers learn from data before training, such as their location and scale, going from data to base.

        Only values of buffers and parameters change. ``log_prob`` scores the data as they are, before standardisation.
        Layers that have adapted before stay as they are while others have not; if all have, they start anew.

        Args:
            x: rows of data ``(n, *event_shape)``.
            context: their contexts ``(n, *context_shape)``, if the flow takes one.
            weights: weights of the rows ``(n,)``, not negative; None for equal weights.

        Raises:
            ShapeError: if the rows or their contexts have another shape.
            DataError: if a column, that is one element of the event, is constant or contains values on the boundary of
                the support or outside it.

        Example:
            >>> flow = pf.flows.MAF(2)
            >>> flow.adapt(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
            >>> flow.standardization.loc
            tensor([1., 3.])
        """
        self.transform.adapt(x, context, weights)

    def before_step(self) -> None:
        """Bring the state of all layers that keep one up to date. The trainer calls it before each step."""
        for layer in self._stateful:
            layer.before_step()


def _register_parameters(flow: nn.Module) -> None:
    """Read all parameters of a flow that ``to_pyro_module_`` has converted, which registers them with the Pyro program.

    The networks of the flow would read them only when a density is computed, and that is after the program has run.
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


def _as_layers(parts: Sequence[Transform], base: Base) -> Iterator[FlowTransform]:
    """Yield the transforms as layers; one of another library takes events of the shape that the layer before gives."""
    first = next((part for part in parts if isinstance(part, FlowTransform)), None)
    if isinstance(base, Distribution) and base.event_shape:
        shape = base.event_shape
    elif first is not None:
        shape = first.base_shape
    else:
        raise ShapeError("the event size of a flow is unknown: none of its transforms has one, so give it a base")
    for part in parts:
        layer = part if isinstance(part, FlowTransform) else Foreign(part, shape)
        shape = layer.event_shape
        yield layer


def _place_of_standardize(layers: Sequence[FlowTransform]) -> int | None:
    """Return the place before the first layer whose values are bounded, or None if no layer is to be added."""
    is_discrete = any(layer.domain.is_discrete or layer.codomain.is_discrete for layer in layers)
    if is_discrete or any(isinstance(layer, Standardize) or _is_all_angles(layer) for layer in layers):
        return None
    return next((i for i, layer in enumerate(layers) if _is_bounding(layer)), len(layers))


def _is_all_angles(layer: FlowTransform) -> bool:
    return all(angles_in(layer.domain, layer.base_shape[-1]))


def _is_bounding(layer: FlowTransform) -> bool:
    """Return whether the values of a layer are bounded, other than by being angles at both of its ends."""
    size = layer.event_shape[-1]
    is_on_circles = angles_in(layer.domain, layer.base_shape[-1]) == angles_in(layer.codomain, size)
    return not _is_unbounded(without_angles(layer.codomain) if is_on_circles else layer.codomain)


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
        parts = list(_flattened([flow] if isinstance(flow, Transform) else flow))
        is_sized = any(isinstance(part, FlowTransform) for part in parts)
        flow = Flow(parts, base=None if is_sized else standard_normal(torch.Size([dim])))
    if flow.event_shape != (dim,) or flow.context_dim:
        raise ShapeError(
            f"a flow of {dim} dimensions without a context is needed, but this one has {as_given(flow.event_shape)} "
            f"dimensions and context {described(flow.context_shape)}"
        )
    if any(angles_in(flow.transform.codomain, dim)):
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
    return Flow(Zuko(flow.transform, flow.base().event_shape[-1]), base=flow.base)


def _beside_angles(support: constraints.Constraint, angles: Sequence[bool]) -> constraints.Constraint:
    """Return the support without that of the columns which the layers make angles."""
    if not any(angles):
        return support
    if angles_in(support, len(angles)) != list(angles):
        columns = [i for i, is_angle in enumerate(angles) if is_angle]
        raise OptionError(
            f"the layers make angles of columns {columns}, but the support is {support}: give it "
            "pf.constraints.circular in these columns, and in no others"
        )
    return without_angles(support)


def _is_unbounded(constraint: constraints.Constraint) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    if isinstance(constraint, constraints.cat):
        return all(_is_unbounded(part) for part in constraint.cseq)
    return isinstance(constraint, type(constraints.real))


def _layer_onto(support: constraints.Constraint, layers: Sequence[FlowTransform], shape: torch.Size) -> FlowTransform:
    """Return the bijection of events of this shape onto a support."""
    if any(_is_bounding(layer) for layer in layers):
        raise OptionError("a flow whose transforms are bounded themselves cannot have a support as well: leave one out")
    try:
        layer = Foreign(biject_to(support), shape)
        # There are more rows than columns, so that the parts of a constraint along the wrong axis do not fit.
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

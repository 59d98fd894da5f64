"""A flow: layers stacked on a base distribution."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Distribution, Transform, biject_to, constraints

from pyroflows.archive import write_archive
from pyroflows.arrays import ArrayLike, as_tensor, floating_tensor, require_finite, require_values
from pyroflows.compiling.eager import runs_in_python
from pyroflows.constraints import angles_and_reals, angles_in, num_axes_of, of_scalars, without_angles
from pyroflows.errors import FlowError, NotCalledError, OptionError, ShapeError, StateError
from pyroflows.flows.angles import angles_of, check_base_of_angles
from pyroflows.flows.base import Base, base_module, standard_normal
from pyroflows.flows.columns import standard_base
from pyroflows.flows.distribution import FlowDistribution
from pyroflows.flows.encoding import FORMAT, encode
from pyroflows.flows.facts import Facts, facts_of, json_from_tensor, json_to_tensor, require_same
from pyroflows.flows.subvector import SubvectorDistribution, subvector
from pyroflows.options import kind
from pyroflows.shapes import as_given, described
from pyroflows.transforms.base import FlowTransform, drop_param_store_references
from pyroflows.transforms.binding import Places
from pyroflows.transforms.circle import WholeTurns
from pyroflows.transforms.codomain import is_unbounded
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.foreign import Foreign, Zuko, on_events
from pyroflows.transforms.held import is_validated
from pyroflows.transforms.normalization import ContextScale, Standardize

# What a flow is asked for by users who take it for its distribution.
_OF_DISTRIBUTIONS = frozenset(name for name in dir(FlowDistribution) if not name.startswith("_")) - {
    *dir(nn.Module),
    "base",
    "transform",
}


class Flow(nn.Module):
    r"""A normalizing flow: a stack of layers on a base distribution, whose call returns its distribution.

    .. math:: x = \mu + \sigma \odot t(z), \quad z \sim p, \qquad
        \log q(x) = \log p(z) - \log\left|\det \frac{\partial x}{\partial z}\right|

    The location :math:`\mu` and scale :math:`\sigma` of the data belong to a layer
    :class:`pyroflows.transforms.Standardize` at the data end, before the map onto a bounded support. It is the identity
    until :meth:`adapt` sets it, which :func:`pyroflows.fit_density` does, so that the other layers see data of mean 0
    and variance 1. Contexts lose their location and scale in the same way.

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
        standardize: whether the flow has the layer of location and scale, and one for contexts. It never has the
            first if a transform is a ``Standardize`` itself or if events are discrete.

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
        if rest is not None and not is_unbounded(rest):
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
        takes_context = any(layer.context_dim for layer in layers)
        context_shape = next((layer.context_shape for layer in layers if layer.context_dim), torch.Size())
        self.transform = Compose(layers, ContextScale(context_shape) if standardize and takes_context else None)
        self.base = base_module(standard_base(base_shape, angles_at_base) if base is None else base, base_shape)
        if any(angles_at_base):
            check_base_of_angles(self.base, angles_at_base)
        self._places: Places | None = None
        self._stateful = [
            layer
            for layer in self.modules()
            if isinstance(layer, FlowTransform) and type(layer).before_step is not FlowTransform.before_step
        ]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in _OF_DISTRIBUTIONS:
                raise
            context = "context" if self.context_dim else ""
            raise NotCalledError(
                f"a flow has no {name!r}, but its distribution has, which a call returns: flow({context}).{name}"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        drop_param_store_references(self)
        return {**self.__dict__, "_places": None}

    def save(self, path: str | Path) -> None:
        """Write the flow to a safetensors file, from which :func:`pyroflows.load_flow` reads it without any argument.

        The file holds the layers, base and support with their options, and the values of all parameters and buffers. It
        takes the place of an older file only once it is complete.

        Args:
            path: the path of the file.

        Raises:
            OptionError: if the flow holds what no file can rebuild, such as a layer or a network of a class of the
                user's; names the place. Or if the flow is on the meta device.
            CheckpointError: if the file cannot be written.
        """
        require_values(self)
        code, tensors = encode(self)
        write_archive(path, "flow", FORMAT, {"flow": code}, tensors)

    def get_extra_state(self) -> Tensor:
        """Note in the state dict what no tensor of the flow shows, such as masks, bounds and the kinds of layers."""
        return json_to_tensor(facts_of(self))

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a state is one of a flow like this; ``load_state_dict`` does so before it changes a value.

        Args:
            state: what :meth:`get_extra_state` gave.

        Raises:
            StateError: if it is the state of another flow; names the first difference.
        """
        try:
            saved: Facts = json_from_tensor(state)
        except (ValueError, OverflowError) as error:
            raise StateError(
                "this state does not say of which flow it is, since its entry _extra_state cannot be read: leave the "
                "entry out to load the tensors alone"
            ) from error
        require_same(saved, facts_of(self))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # A state without the entry, such as one of parameters and buffers only, is taken as it is.
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

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
        if unused is None or not unused.is_identity:
            return list(self.transform.layers)
        return [layer for layer in self.transform.layers if layer is not unused]

    @property
    def support(self) -> constraints.Constraint:
        """The constraint that holds where the density is positive."""
        return self.transform.codomain

    @property
    def components(self) -> Sequence["Flow"]:
        """The flows of which this one is a mixture; a plain flow is its only component."""
        return (self,)

    def forward(self, context: ArrayLike | None = None) -> FlowDistribution:
        """Return the distribution.

        Args:
            context: ``(..., *context_shape)``, if the flow takes one; it is brought to the flow's dtype and device.

        Raises:
            ShapeError: if the context has another shape, or is missing.
            DataError: if the context has NaN or infinite values, where values are validated; names the row.
        """
        shape = self.context_shape
        if context is not None:
            context = as_tensor("context", context, floating_tensor(self))
        if (None if context is None else context.shape[context.dim() - len(shape) :]) != (shape or None):
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ShapeError(f"this flow has context {described(shape)}, but got {got}")
        if context is not None and is_validated() and runs_in_python():
            require_finite("context", context, len(shape))
        if isinstance(self, PyroModule):
            _register_parameters(self)
        return self._law(context)

    def _law(self, context: Tensor | None) -> Any:
        transform, base = self.transform, self.base
        if self._places is None or not self._places.are_current:
            self._places = Places(transform, base)
        return FlowDistribution(base, transform, context, is_validated(), places=self._places)

    def conditional(
        self, given: Tensor, context: Tensor | None = None, columns: Sequence[int] | None = None
    ) -> SubvectorDistribution:
        r"""Return the law of the columns that are not given, exactly, for a flow whose layers have one order.

        These are autoregressive flows with an ``order``, and flows of elementwise or triangular layers. For all others,
        and for columns that do not come first in the order, there is :func:`pyroflows.sample_conditional`.

        Args:
            given: values ``(..., k)`` of k columns, 0 < k < dim.
            context: ``(..., *context_shape)``, if the flow takes one.
            columns: the given columns, in the order of the values; None for the first k of the flow's order.

        Raises:
            OptionError: if the law is not known in closed form, for example since the layers have different orders.
            ShapeError: if the number of values does not fit.

        Example:
            >>> flow = pf.flows.MAF(3, order=[2, 0, 1])
            >>> rest = flow.conditional(torch.tensor([1.5]))  # column 2 is 1.5
            >>> rest.columns, rest.sample((5,)).shape, rest.log_prob(torch.zeros(2)).shape
            ([0, 1], torch.Size([5, 2]), torch.Size([]))
        """
        return subvector(self(context), None, columns, as_tensor("given", given, floating_tensor(self)))

    def marginal(self, columns: Sequence[int], context: Tensor | None = None) -> SubvectorDistribution:
        """Return the law of some columns alone, exactly, for a flow whose layers have one order.

        With all columns it is the law of x, which has the distribution function of each column given those before it,
        by :meth:`pyroflows.flows.SubvectorDistribution.conditional_cdf`.

        Args:
            columns: columns that come first in the flow's order.
            context: ``(..., *context_shape)``, if the flow takes one.

        Raises:
            OptionError: if the law is not known in closed form, for example since the layers have different orders.

        Example:
            >>> flow = pf.flows.NSF(3, autoregressive=True, order=[0, 1, 2])
            >>> flow.marginal([0, 1]).sample((5,)).shape
            torch.Size([5, 2])
        """
        return subvector(self(context), columns, [], torch.zeros(0).to(floating_tensor(self)))

    @property
    def adapts(self) -> bool:
        """Whether a layer learns from data before training."""
        return self.transform.adapts

    @property
    def is_adapted(self) -> bool:
        """Whether all layers that learn from data before training have done so; a state that is loaded counts."""
        require_values(self)
        return self.transform.is_adapted

    def adapt(self, x: ArrayLike, context: ArrayLike | None = None, weights: ArrayLike | None = None) -> None:
        """Let the layers learn from data before training, such as their location and scale, going from data to base.

        Only values of buffers and parameters change. ``log_prob`` scores the data as they are, before standardisation.
        Layers that have adapted before stay as they are while others have not; if all have, they start anew.

        Args:
            x: rows of data ``(n, *event_shape)``.
            context: their contexts ``(n, *context_shape)``, if the flow takes one.
            weights: weights of the rows ``(n,)``, not negative; None for equal weights.

        Raises:
            ShapeError: if the rows or their contexts have another shape.
            OptionError: if the flow is on the meta device, where tensors have no values.
            DataError: if a column, that is one element of the event, is constant or contains values on the boundary of
                the support or outside it.

        Example:
            >>> flow = pf.flows.MAF(2)
            >>> flow.adapt(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
            >>> flow.standardization.loc
            tensor([1., 3.])
        """
        require_values(self)
        like = floating_tensor(self)
        x = as_tensor("x", x, like)
        context = None if context is None else as_tensor("context", context, like)
        weights = None if weights is None else as_tensor("weights", weights, like)
        self._adapt(x, context, weights)

    def _adapt(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        self.transform.adapt(x, context, weights)

    @torch.no_grad()
    def before_support(self, x: Tensor) -> Tensor:
        """Return rows ``(n, *shape)`` where location and scale act on them, before the map onto a bounded support.

        Args:
            x: rows of data ``(n, *event_shape)``.
        """
        layers = self.transform.layers
        for layer in reversed(layers[len(layers) if self._standardize_at is None else self._standardize_at + 1 :]):
            x = layer.inverse_and_ladj(x)[0]
        return x

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
    return next((i for i, layer in enumerate(layers) if layer.is_bounding), len(layers))


def _is_all_angles(layer: FlowTransform) -> bool:
    return all(angles_in(layer.domain, layer.base_shape[-1]))


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
        flow = Flow(parts, base=None if is_sized else standard_normal(torch.Size([dim])), standardize=False)
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
    return Flow(Zuko(flow.transform, flow.base().event_shape[-1]), base=flow.base, standardize=False)


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


def _layer_onto(support: constraints.Constraint, layers: Sequence[FlowTransform], shape: torch.Size) -> FlowTransform:
    """Return the bijection of events of this shape onto a support."""
    if any(layer.is_bounding for layer in layers):
        raise OptionError("a flow whose transforms are bounded themselves cannot have a support as well: leave one out")
    try:
        support = of_scalars(support)
        layer = Foreign(biject_to(support), shape, codomain=support)
        # There are more rows than columns, so that the parts of a constraint along the wrong axis do not fit.
        x, _ = layer.forward_and_ladj(torch.zeros(shape.numel() + 1, *shape))
        layer.codomain.check(x)
    except NotImplementedError:
        given = kind(support) if isinstance(support, type) else str(support)
        raise OptionError(f"support must be a constraint onto which biject_to has a bijection, got {given}") from None
    except (FlowError, AssertionError, RuntimeError):
        _refuse_dependent(support, shape)
        raise ShapeError(
            f"there is no bijection of R^{as_given(shape)} onto the support {support}: give one constraint for all "
            "columns, or constraints.cat([...], dim=-1) with one for each"
        ) from None
    return layer


def _refuse_dependent(support: constraints.Constraint, shape: torch.Size) -> None:
    """Raise if columns on a support depend on each other, as those of a simplex do, the last of which is the rest."""
    if isinstance(support, constraints.cat):
        for part, length in zip(support.cseq, support.lengths, strict=True):
            _refuse_dependent(part, torch.Size([length]))
            if num_axes_of(part):
                raise OptionError(
                    f"{part} constrains whole vectors, so that torch cannot check it as a part of constraints.cat: map "
                    "its columns by the inverse of torch.distributions.biject_to, and give constraints.real for them"
                ) from None
    if num_axes_of(support) > len(shape):
        raise ShapeError(
            f"the support {support} is one of matrices, but this flow has events of {described(shape)}: map the "
            "matrices by torch.distributions.biject_to(support).inv, and give the vectors that result to a flow "
            "without this support; TransformedDistribution(flow(), biject_to(support)) of pyro.distributions is then "
            "the law of the matrices"
        ) from None
    try:
        free = torch.Size(biject_to(support).inverse_shape(shape)).numel()
    except (ValueError, RuntimeError, NotImplementedError):
        return
    if free < shape.numel():
        raise ShapeError(
            f"{shape.numel()} columns on the support {support} have only {free} free dimensions, so that they have no "
            f"density in R^{shape.numel()}: map these columns by torch.distributions.biject_to(support).inv, and give "
            f"the {free} that result to a flow without this support; TransformedDistribution(flow(), "
            "biject_to(support)) of pyro.distributions is then the law of the columns themselves"
        ) from None


def _flattened(transforms: Any) -> Iterable[Transform]:
    if not isinstance(transforms, Iterable):
        raise OptionError(f"a flow is made of transforms, but got {kind(transforms)}")
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _flattened(transform.parts)
        elif isinstance(transform, Transform):
            yield transform
        else:
            raise OptionError(f"a flow is made of transforms, but got {kind(transform)}")

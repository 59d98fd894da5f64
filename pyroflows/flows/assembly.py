"""The layers of a flow: its transforms, and what standardises, maps onto a support, and takes whole turns out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributions import ComposeTransform, Distribution, Transform, biject_to, constraints

from pyroflows.constraints import angles_and_reals, angles_in, num_axes_of, of_scalars, on_events, without_angles
from pyroflows.errors import FlowError, OptionError, ShapeError
from pyroflows.flows.angles import angles_at_ends, angles_of
from pyroflows.flows.base import Base
from pyroflows.flows.discrete.checks import check_layers_of_categories, require_integer_base
from pyroflows.options import kind
from pyroflows.shapes import as_given, described
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.circle import WholeTurns
from pyroflows.transforms.codomain import is_unbounded
from pyroflows.transforms.discrete.stacks import maps_categories
from pyroflows.transforms.foreign import Foreign
from pyroflows.transforms.normalization import Standardize
from pyroflows.transforms.views import Inverse


class Stack(NamedTuple):
    """The layers of a flow.

    Attributes:
        layers: from base to data.
        standardize_at: the place of the layer of location and scale at the data end, or None.
        angles_at_base: which indices along the last axis are angles at the base end.
    """

    layers: list[FlowTransform]
    standardize_at: int | None
    angles_at_base: list[bool]


def assemble(
    transforms: Transform | Sequence[Transform], base: Base, support: constraints.Constraint | None, standardize: bool
) -> Stack:
    """Make the layers of a flow; the arguments are those of :class:`pyroflows.Flow`.

    Example:
        >>> stack = assemble([Planar(2)], base=None, support=constraints.positive, standardize=True)
        >>> [type(layer).__name__ for layer in stack.layers]
        ['Planar', 'Standardize', 'Foreign']
    """
    parts = list(flattened([transforms] if isinstance(transforms, Transform) else transforms))
    layers = list(_as_layers(parts, base))
    if any(maps_categories(layer) for layer in layers):
        check_layers_of_categories(layers, support)
        require_integer_base(base)
        return Stack(layers, None, [])
    base_shape, event_shape = layers[0].base_shape, layers[-1].event_shape
    angles_at_base, angles = angles_of(layers)
    rest = support if support is None else _beside_angles(support, angles)
    if rest is not None and not is_unbounded(rest):
        layers.append(_layer_onto(rest, layers, event_shape))
    place = _insert_standardize(layers, base_shape) if standardize else None
    if any(angles_at_base):
        layers.insert(0, WholeTurns(base_shape, angles_and_reals(angles_at_base, len(base_shape))))
        place = None if place is None else place + 1
    if any(angles):
        on_circles = angles_and_reals(angles, len(event_shape))
        layers.append(WholeTurns(event_shape, on_events(support or on_circles, len(event_shape))))
    return Stack(layers, place, angles_at_base)


def flattened(transforms: Any) -> Iterator[Transform]:
    """Yield the transforms of which a flow is made, with the parts of compositions in their place.

    Raises:
        OptionError: if one of them is no transform.
    """
    if not isinstance(transforms, Iterable):
        raise OptionError(f"a flow is made of transforms, but got {kind(transforms)}")
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from flattened(transform.parts)
        elif isinstance(transform, Transform):
            yield transform
        else:
            raise OptionError(f"a flow is made of transforms, but got {kind(transform)}")


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
        _refuse_turned_statistics(layer)
        yield layer


def _refuse_turned_statistics(layer: FlowTransform) -> None:
    """Raise if a layer keeps statistics of data at an end where no data arrive as they are."""
    for part in layer.modules():
        if isinstance(part, Inverse) and part.layer.observes:
            name = type(part.layer).__name__
            raise OptionError(
                f"{name}.inv in a flow would never learn, since the running statistics of {name} are those of its data "
                f"end: take {name} itself, or ActNorm, which learns at either end"
            )


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


def _insert_standardize(layers: list[FlowTransform], base_shape: torch.Size) -> int | None:
    """Insert the layer of location and scale before the first layer whose values are bounded.

    A ``Standardize`` that stands there already and has no location and scale yet takes its part.

    Returns:
        The place of the layer, or None if there is to be none.
    """
    place = next((i for i, layer in enumerate(layers) if layer.is_bounding), len(layers))
    before = layers[:place]
    if before and isinstance(before[-1], Standardize) and not before[-1].is_adapted:
        return place - 1
    is_discrete = any(layer.domain.is_discrete or layer.codomain.is_discrete for layer in layers)
    if is_discrete or any(isinstance(layer, Standardize) or _is_all_angles(layer) for layer in layers):
        return None
    shape = before[-1].event_shape if before else base_shape
    layers.insert(place, Standardize(shape, angles=angles_of(before)[1] if before else None))
    return place


def _is_all_angles(layer: FlowTransform) -> bool:
    return all(angles_at_ends(layer)[0])

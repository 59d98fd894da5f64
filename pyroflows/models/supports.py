"""The supports of distributions, where the declared one is too large: on circles, and behind monotone transforms."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import (
    ComposeTransform,
    Independent,
    IndependentTransform,
    MixtureSameFamily,
    Transform,
    TransformedDistribution,
    constraints,
)
from torch.distributions.transforms import _InverseTransform

from pyroflows.constraints import circular, is_angular, on_events, without_events

CIRCULAR_FAMILIES = (torch.distributions.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)

# An end of an interval: a number, perhaps infinite, or a tensor of numbers.
End = float | Tensor


def support_of(fn: Any) -> constraints.Constraint | None:
    r"""Find the set of the values that a distribution can have.

    Where the declared support is larger, it is not followed. Distributions of angles, such as von Mises, declare the
    real line, on which their periodic density would be counted in every period. ``TransformedDistribution`` declares
    the codomain of its last transform, whatever the base's support is: minus a ``HalfNormal`` would be real. Here the
    ends of the base's support are pushed through the transforms.

    Args:
        fn: a distribution.

    Returns:
        A constraint; None if none is declared, or if the support behind a transform is not known.

    Example:
        >>> flip = torch.distributions.AffineTransform(0.0, -1.0)
        >>> support_of(dist.TransformedDistribution(dist.HalfNormal(1.0), [flip]))
        LessThan(upper_bound=0.0)
        >>> support_of(dist.VonMises(torch.zeros(2), 1.0).to_event(1))
        IndependentConstraint(Circular(), 1)
    """
    if is_circular(fn):
        return on_events(circular, fn.event_dim)
    if isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        support = support_of(fn.base_dist)
        return support and on_events(support, support.event_dim + getattr(fn, "reinterpreted_batch_ndims", 0))
    if isinstance(fn, MixtureSameFamily):
        support = support_of(fn.component_distribution)
        # Where components have bounds of their own, the mixture's density is zero between them.
        return fn.support if support is None or any(isinstance(end, Tensor) for end in bounds(support)) else support
    if type(fn).support is TransformedDistribution.support:
        support = _image(support_of(fn.base_dist), fn.transforms)
        return support and on_events(support, fn.event_dim)
    try:
        support = fn.support
    except NotImplementedError:
        return None
    return support


def is_circular(fn: Any) -> bool:
    """Whether the values of a distribution are angles, each on a circle of its own."""
    while isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution | MixtureSameFamily):
        fn = fn.component_distribution if isinstance(fn, MixtureSameFamily) else fn.base_dist
    return isinstance(fn, CIRCULAR_FAMILIES)


def has_declared_support(fn: Any) -> bool:
    """Whether the support of a distribution is certainly the one that it declares."""
    while isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    return not is_circular(fn) and type(fn).support is not TransformedDistribution.support


def is_real(support: constraints.Constraint | None) -> bool:
    """Whether a support is the real line, for each entry."""
    return support is not None and isinstance(without_events(support), type(constraints.real))


def bounds(support: constraints.Constraint) -> Iterator[End]:
    """The numbers that a support is made of, such as the ends of an interval."""
    for value in vars(support).values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, constraints.Constraint):
                yield from bounds(part)
            elif isinstance(part, Tensor | float):
                yield part


# Supports of these kinds differ by an end that no number is.
_LIKE = {
    type(constraints.nonnegative): type(constraints.positive),
    type(constraints.half_open_interval(0.0, 1.0)): type(constraints.unit_interval),
}
# The ends of supports on two machines agree up to the rounding of float32.
_TOLERANCE = 1e-6


def is_same_support(support: constraints.Constraint | None, other: constraints.Constraint | None) -> bool:
    """Whether two supports are the same set, up to an end that belongs to one of them.

    Example:
        >>> is_same_support(dist.Gamma(1.0, 1.0).support, dist.LogNormal(0.0, 1.0).support)
        True
        >>> is_same_support(dist.Uniform(0.0, 1.0).support, dist.Uniform(0.0, 2.0).support)
        False
    """
    if support is None or other is None:
        return support is other
    kinds, other_kinds = list(_kinds(support)), list(_kinds(other))
    ends, other_ends = list(bounds(support)), list(bounds(other))
    return (
        kinds == other_kinds
        and len(ends) == len(other_ends)
        and all(_is_close(a, b) for a, b in zip(ends, other_ends, strict=True))
    )


def _kinds(support: constraints.Constraint) -> Iterator[Any]:
    """The kinds of the constraints that a support is made of, and the lengths of its parts."""
    support = without_events(support)
    yield _LIKE.get(type(support), type(support))
    for value in vars(support).values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, constraints.Constraint):
                yield from _kinds(part)
            elif not isinstance(part, Tensor | float):
                yield part


def _is_close(a: End, b: End) -> bool:
    try:
        return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=_TOLERANCE, atol=0.0)
    except RuntimeError:  # of shapes that do not broadcast
        return False


def simplified(support: constraints.Constraint | None) -> constraints.Constraint | None:
    """Name an interval whose ends are infinite by its kind; None if only some entries of an end are infinite.

    Example:
        >>> simplified(constraints.interval(torch.zeros(2), torch.tensor([torch.inf, torch.inf])))
        GreaterThan(lower_bound=tensor([0., 0.]))
    """
    if support is None or type(inner := without_events(support)) is not constraints.interval:
        return support
    is_open = [torch.as_tensor(end).isinf() for end in (inner.lower_bound, inner.upper_bound)]
    if any(part.any() and not part.all() for part in is_open):
        return None
    lower = -math.inf if is_open[0].all() else inner.lower_bound
    upper = math.inf if is_open[1].all() else inner.upper_bound
    return on_events(_between(lower, upper), support.event_dim)


def _image(support: constraints.Constraint | None, transforms: list[Transform]) -> constraints.Constraint | None:
    """The image of a support under transforms, one after the other."""
    for transform in _parts(transforms):
        if support is None:
            return None
        ends, domain = _ends(support), _ends(transform.domain)
        if domain is None or _ends(transform.codomain) is None or transform.domain.event_dim or not transform.bijective:
            # A part of the domain of vectors may have any image.
            support = transform.codomain if ends == domain or ends is None else None
        elif ends is None:
            # A simplex or an angle, moved or scaled, has no name among the constraints.
            return None
        elif _is_whole(ends, domain):
            support = transform.codomain
        else:
            support = _between(*_moved(ends, transform))
    return support


def _parts(transforms: list[Transform]) -> Iterator[Transform]:
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _parts(transform.parts)
        elif isinstance(transform, IndependentTransform):
            yield from _parts([transform.base_transform])
        else:
            yield transform


def _ends(support: constraints.Constraint) -> tuple[End, End] | None:
    """The ends of an interval of numbers, infinite where it has none; None for another support."""
    support = without_events(support)
    if support.event_dim or support.is_discrete or is_angular(support):
        return None
    if isinstance(support, type(constraints.real)):
        return -math.inf, math.inf
    if hasattr(support, "lower_bound") or hasattr(support, "upper_bound"):
        return getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    return None


def _is_whole(ends: tuple[End, End], domain: tuple[End, End]) -> bool:
    return not any(isinstance(end, Tensor) for end in (*ends, *domain)) and ends == domain


def _moved(ends: tuple[End, End], transform: Transform) -> tuple[End, End]:
    """The ends of the image of an interval under a monotone transform of numbers."""
    domain, codomain = _ends(transform.domain), _ends(transform.codomain)
    assert domain is not None
    assert codomain is not None
    sign = transform.sign
    if isinstance(sign, Tensor):
        rising = [_limit(transform, *pair) for pair in zip(ends, domain, codomain, strict=True)]
        falling = [_limit(transform, *pair) for pair in zip(ends, domain, codomain[::-1], strict=True)]
        lower, upper = (
            torch.where(sign > 0, *(torch.as_tensor(end, dtype=sign.dtype).to(sign.device) for end in pair))
            for pair in zip(rising, falling[::-1], strict=True)
        )
        return lower, upper
    if sign > 0:
        lower, upper = (_limit(transform, *pair) for pair in zip(ends, domain, codomain, strict=True))
    else:
        upper, lower = (_limit(transform, *pair) for pair in zip(ends, domain, codomain[::-1], strict=True))
    return lower, upper


def _limit(transform: Transform, end: End, of_domain: End, of_codomain: End) -> End:
    """The limit of a transform at an end; at the end of its domain this is the end of its codomain."""
    if isinstance(end, Tensor):
        limit = torch.as_tensor(of_codomain, dtype=end.dtype, device=end.device)
        return torch.where(end == of_domain, limit, transform(end))
    if not isinstance(of_domain, Tensor) and end == of_domain:
        return of_codomain
    tensors = [v for v in vars(_forward(transform)).values() if isinstance(v, Tensor)]
    if tensors:
        return transform(torch.as_tensor(end, dtype=tensors[0].dtype, device=tensors[0].device))
    return transform(torch.tensor(end, dtype=torch.float64)).item()


def _forward(transform: Transform) -> Transform:
    return transform.inv if isinstance(transform, _InverseTransform) else transform


def _between(lower: End, upper: End) -> constraints.Constraint:
    if isinstance(lower, float) and math.isinf(lower) and isinstance(upper, float) and math.isinf(upper):
        return constraints.real
    if isinstance(upper, float) and math.isinf(upper):
        return constraints.greater_than(lower)
    if isinstance(lower, float) and math.isinf(lower):
        return constraints.less_than(upper)
    return constraints.interval(lower, upper)

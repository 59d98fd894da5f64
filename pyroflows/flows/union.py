"""Unions of supports, such as those of the components of a mixture."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.constraints import on_events, without_events
from pyroflows.transforms.codomain import is_unbounded

Ends = tuple[Tensor, Tensor]


class Union(constraints.Constraint):
    """The values that meet at least one of several constraints on events.

    It has no bijection from the reals, since it may consist of separate parts. :func:`union_of` makes it where no
    constraint contains the others.

    Args:
        parts: constraints of one ``event_dim``.

    Example:
        >>> interval = torch.distributions.constraints.interval
        >>> Union([interval(0.0, 1.0), interval(2.0, 3.0)]).check(torch.tensor([0.5, 1.5, 2.5]))
        tensor([ True, False,  True])
    """

    def __init__(self, parts: Sequence[constraints.Constraint]) -> None:
        self.parts = list(parts)
        super().__init__()

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return self.parts[0].event_dim

    def check(self, value: Tensor) -> Tensor:
        """Check whether values are in one of the parts."""
        return torch.stack([part.check(value) for part in self.parts]).any(0)

    def __repr__(self) -> str:
        return " or ".join(map(str, self.parts))


def union_of(supports: Sequence[constraints.Constraint], event_shape: torch.Size) -> constraints.Constraint:
    """Return the union of supports, without those that others contain.

    Args:
        supports: constraints on events of one shape, or on their elements.
        event_shape: this shape.

    Example:
        >>> constraints = torch.distributions.constraints
        >>> union_of([constraints.positive, constraints.unit_interval], torch.Size())
        GreaterThan(lower_bound=0.0)
    """
    kept: list[constraints.Constraint] = []
    for support in supports:
        support = on_events(support, len(event_shape))
        parts = support.parts if isinstance(support, Union) else [support]
        for part in parts:
            if not any(_contains(other, part, event_shape) for other in kept):
                kept = [other for other in kept if not _contains(part, other, event_shape)] + [part]
    return kept[0] if len(kept) == 1 else Union(kept)


def _contains(outer: constraints.Constraint, inner: constraints.Constraint, event_shape: torch.Size) -> bool:
    if _is_same(outer, inner) or (is_unbounded(outer) and not inner.is_discrete):
        return True
    ends, inner_ends = _ends(outer, event_shape), _ends(inner, event_shape)
    if ends is None or inner_ends is None:
        return False
    return bool((ends[0] <= inner_ends[0]).all() and (ends[1] >= inner_ends[1]).all())


def _is_same(a: object, b: object) -> bool:
    """Tell whether two constraints, or values that they are made of, are equal."""
    if isinstance(a, constraints.Constraint):
        return type(a) is type(b) and _is_same(sorted(vars(a)), sorted(vars(b))) and _is_same(*map(_values, (a, b)))
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def _values(constraint: object) -> list[object]:
    return [value for _, value in sorted(vars(constraint).items())]


def _ends(support: constraints.Constraint, event_shape: torch.Size) -> Ends | None:
    """Return the ends of a box, each of the event's shape and infinite where it has none; None for another support."""
    support = without_events(support)
    if isinstance(support, constraints.cat):
        if not event_shape or support.dim != -1:
            return None
        lengths = support.lengths
        parts = [_ends(part, torch.Size([*event_shape[:-1], n])) for part, n in zip(support.cseq, lengths, strict=True)]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return torch.cat([lower for lower, _ in known], -1), torch.cat([upper for _, upper in known], -1)
    is_real = isinstance(support, type(constraints.real))
    if support.is_discrete or not (is_real or hasattr(support, "lower_bound") or hasattr(support, "upper_bound")):
        return None
    lower, upper = getattr(support, "lower_bound", -torch.inf), getattr(support, "upper_bound", torch.inf)
    return torch.as_tensor(lower).expand(event_shape), torch.as_tensor(upper).expand(event_shape)

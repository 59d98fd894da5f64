"""What a flow of categories needs of its layers, its support and its base."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.constraints import without_events
from pyroflows.errors import OptionError, ShapeError
from pyroflows.flows.base import example_of
from pyroflows.flows.temperature import innermost
from pyroflows.shapes import described
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.discrete import DiscreteTransform, OneHot
from pyroflows.transforms.discrete.base import require_categories
from pyroflows.transforms.discrete.one_hot import require_one_hot
from pyroflows.transforms.views import Cached, Conditioned, Inverse


def check_layers_of_categories(layers: Sequence[FlowTransform], support: constraints.Constraint | None) -> None:
    """Raise if discrete layers stand beside others, map different categories, or a support is given besides.

    Args:
        layers: the layers of a flow, from base to data, at least one of which is discrete.
        support: the support that the user gave, or None.

    Raises:
        OptionError: if so; names the layer.

    Example:
        >>> t = pf.transforms
        >>> check_layers_of_categories([t.DiscreteCoupling(3, 4), t.OneHot(3, 4)], None)
        >>> check_layers_of_categories([t.DiscreteCoupling(3, 4), t.Coupling(3)], None)
        Traceback (most recent call last):
        pyroflows.errors.OptionError: layer 1 (Coupling) maps real numbers, but layer 0 (DiscreteCoupling) maps ...
    """
    layers = list(_parts_of(layers))
    parts: list[Any] = [_without_views(layer) for layer in layers]
    names = [f"layer {place} ({type(part).__name__})" for place, part in enumerate(parts)]
    first = next(place for place, part in enumerate(parts) if isinstance(part, DiscreteTransform | OneHot))
    for place, (layer, part) in enumerate(zip(layers, parts, strict=True)):
        if not isinstance(part, DiscreteTransform | OneHot):
            raise OptionError(
                f"{names[place]} maps real numbers, but {names[first]} maps categories: stack discrete layers alone. "
                "The places of a sequence are permuted by the order of DiscreteAutoregressive and the mask of "
                "DiscreteCoupling"
            )
        if part.num_categories != parts[first].num_categories:
            raise OptionError(
                f"the layers of a flow must map the same categories, but {names[first]} has "
                f"{parts[first].num_categories} and {names[place]} has {part.num_categories}"
            )
        if isinstance(part, OneHot) and (layer is not part or place < len(layers) - 1):
            raise OptionError("OneHot stands at the data end of a flow: give it as the last layer, and not its inverse")
    if support is not None:
        raise OptionError(
            f"a flow of categories has the support of its layers, 0 to {parts[0].num_categories - 1} at each place: "
            "leave support out"
        )


def _parts_of(layers: Iterable[FlowTransform]) -> Iterator[FlowTransform]:
    """Yield layers with those of compositions in their place."""
    for layer in layers:
        inner: Any = _without_views(layer)
        yield from _parts_of(inner.layers) if isinstance(inner, Compose) else [layer]


def _without_views(layer: FlowTransform) -> FlowTransform:
    """Return the layer of which another one is a view."""
    while isinstance(layer, Inverse | Conditioned | Cached):
        layer = layer.layer
    return layer


@torch.no_grad()
def check_base_of_categories(base: nn.Module, num_categories: int) -> None:
    """Raise if the support of a base is not that of the categories 0 to K - 1, so far as the base says what it is.

    Args:
        base: a module whose call returns the base.
        num_categories: the number K of categories of the layers.

    Raises:
        OptionError: if it is another support.

    Example:
        >>> check_base_of_categories(pf.flows.FactorizedCategorical(3, 5), 4)
        Traceback (most recent call last):
        pyroflows.errors.OptionError: the base of a flow of 4 categories must be a law of the numbers 0 to 3 at each ...
    """
    law: Any = example_of(base)
    try:
        support: constraints.Constraint = law.support
    except NotImplementedError:  # A law of the user's own need not say where its values lie.
        return
    shape = torch.Size([*law.batch_shape, *law.event_shape])
    device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), None)
    # One number below the categories, the categories, and one above.
    numbers = torch.arange(-1, num_categories + 1, device=device)
    is_in = support.check(numbers.reshape(-1, *[1] * len(shape)).expand(-1, *shape))[..., None].flatten(1)
    if is_in.is_meta or (is_in[1:-1].all() and not is_in[[0, -1]].any()):
        return
    raise OptionError(
        f"the base of a flow of {num_categories} categories must be a law of the numbers 0 to {num_categories - 1} at "
        f"each place, but the support of {type(law).__name__} is {without_events(support)}: give "
        "pf.flows.FactorizedCategorical, pf.flows.AutoregressiveCategorical, or a distribution such as "
        f"dist.Categorical with {num_categories} categories"
    )


def validate_event(
    validate: Callable[[Tensor], None], value: Tensor, event_shape: torch.Size, num_categories: int
) -> None:
    """Let torch validate a value that a flow of categories is to score, and say what is wrong, and where.

    Args:
        validate: torch's own check, whose message would show all values.
        value: the value, ``(..., *event_shape)``.
        event_shape: ``(length,)`` for integers, ``(length, K)`` for one-hot vectors.
        num_categories: the number K of categories.

    Raises:
        ShapeError: if it has another shape.
        DataError: if it has a number that is no category, or a vector that is not one-hot.
        ValueError: from torch, if it is wrong in another way.

    Example:
        >>> q = dist.Categorical(torch.ones(2, 4)).to_event(1)
        >>> validate_event(q._validate_sample, torch.tensor([0, 4]), q.event_shape, num_categories=4)
        Traceback (most recent call last):
        pyroflows.errors.DataError: this flow takes categories 0 to 3, but got 4 at [1]: the largest is 4, ...
    """
    try:
        validate(value)
        return
    except ValueError as error:
        refusal = error
    if value.shape[max(value.dim() - len(event_shape), 0) :] != event_shape:
        raise ShapeError(
            f"this flow has events of {described(event_shape)}, but got a tensor of shape {tuple(value.shape)}"
        )
    if len(event_shape) > 1:
        require_one_hot(value, "this flow")
    else:
        require_categories(value, num_categories, "this flow")
    raise refusal


def require_integer_base(base: Any) -> None:
    """Raise if the base of a flow of categories is a law of one-hot vectors.

    Args:
        base: a base, as :class:`pyroflows.Flow` takes it.

    Raises:
        OptionError: if so.

    Example:
        >>> require_integer_base(dist.OneHotCategorical(torch.ones(3, 4)).to_event(1))
        Traceback (most recent call last):
        pyroflows.errors.OptionError: the base of a flow of categories gives integers, but OneHotCategorical gives ...
    """
    try:
        support = getattr(base, "support", None)
    except NotImplementedError:  # A law of the user's own need not say where its values lie.
        return
    if isinstance(support, constraints.Constraint) and without_events(support) is constraints.one_hot:
        name = type(innermost(base)).__name__
        raise OptionError(
            f"the base of a flow of categories gives integers, but {name} gives one-hot vectors: give "
            "dist.Categorical(...).to_event(1), or a flow without one_hot=True"
        )

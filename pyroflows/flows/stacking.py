"""The base class of the recipes: a stack of layers of one kind, with layers between them that mix the dimensions."""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypedDict, TypeVar

import torch
from torch.distributions import constraints

from pyroflows.errors import OptionError
from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.nets.checks import ConditionerFactory
from pyroflows.options import checked_int
from pyroflows.transforms import LU, FlowTransform, Permutation

Conditioner = str | ConditionerFactory
# It is called as ``factory(is_turned, context_dim)``, see StackedFlow.
LayerFactory = Callable[[bool, int], FlowTransform]
Init = TypeVar("Init", bound=Callable[..., None])

_MIXING: dict[str, Callable[[list[int]], FlowTransform]] = {
    "permutation": Permutation,
    "lu": lambda order: LU(len(order), order),
}


class StackOptions(TypedDict, total=False):
    """The options that all recipes share; :class:`StackedFlow` describes them and has their defaults."""

    context_dim: int
    base: Base
    support: constraints.Constraint | None
    mixing: str | None


class StackedFlow(Flow):
    """The base class of the recipes: a stack of layers of one kind. Each recipe says which layer it stacks.

    Every recipe takes the arguments below, except that ``hidden_dims`` and ``conditioner`` exist only for layers with
    networks, and ``order`` only for autoregressive ones.

    Args:
        dim: the event size D.
        num_layers: number of layers, at least 1, not counting those that mix.
        hidden_dims: widths of the hidden layers of each layer's network.
        conditioner: the network of each layer, "mlp", "scaled_mlp" or "residual" in couplings, "made",
            "scaled_made" or "residual" in autoregressive layers; or a factory, see
            :class:`pyroflows.transforms.Coupling` and :class:`pyroflows.transforms.Autoregressive`.
        order: the order of all autoregressive layers, a permutation of ``range(dim)``, which makes
            :meth:`pyroflows.Flow.conditional` exact; None for layers that are ascending and descending by turns.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`pyroflows.Flow`.
        support: the constraint that the data meet, see :class:`pyroflows.Flow`.
        mixing: the kind of layer that mixes the dimensions between two layers, and between two pairs of couplings, so
            that one pair alone has none: "permutation" for a fixed random permutation, "lu" for a
            :class:`pyroflows.transforms.LU` layer that starts as one, or None. Without mixing and ``order``, every
            second autoregressive layer has the reverse order.

    Shapes: ``flow()`` has event shape ``(dim,)``; for a context ``(..., context_dim)``, ``flow(context)`` has batch
    shape ``(...)``.

    Raises:
        OptionError: if there is no layer, or a name is unknown.
        TypeError: if an argument is one that the recipe does not take.

    Example:
        >>> flow = pf.flows.MAF(3, num_layers=2, mixing="lu", base="student_t")
        >>> len(flow.layers), flow().event_shape
        (3, torch.Size([3]))
    """

    def __init__(
        self,
        layer: LayerFactory,
        num_layers: int,
        between: int = 1,
        last: Sequence[FlowTransform] = (),
        /,
        *,
        context_dim: int = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
        mixing: str | None = None,
    ) -> None:
        # A recipe gives ``layer``, a factory that is called as layer(is_turned, context_dim), the number of layers
        # between two that mix, and the layers at the data end. Every second layer is turned: it transforms the other
        # half, or has the reverse order. If dimensions are mixed after each layer, no layer is turned.
        num_layers = checked_int("num_layers", num_layers)
        if mixing is not None and mixing not in _MIXING:
            raise OptionError(f"mixing must be None or one of {sorted(_MIXING)}, got {mixing!r}")
        stack: list[FlowTransform] = []
        for i in range(num_layers):
            if mixing is not None and i and i % between == 0:
                stack.append(_MIXING[mixing](_random_cycle(stack[0].dim, seed=i)))
            stack.append(layer(i % 2 == 1 and (mixing is None or between > 1), context_dim))
        super().__init__([*stack, *last], base, support)


def spell_out_options(init: Init) -> Init:
    """Put the options of :class:`StackedFlow` into the signature of an ``__init__`` that passes ``**options`` to it.

    Then ``help``, ``inspect.signature`` and completion show all arguments of a recipe, with their defaults, and an
    argument that the recipe does not take is an error that names the recipe.
    """
    own = inspect.signature(init)
    *parameters, _ = own.parameters.values()
    options = [p for p in inspect.signature(StackedFlow.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    signature = own.replace(parameters=[*parameters, *options])

    @wraps(init)
    def checked(self: Flow, *args: Any, **kwargs: Any) -> None:
        unknown = [name for name in kwargs if name not in signature.parameters]
        if unknown:
            names = ", ".join([*signature.parameters][1:])
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}: its arguments are {names}")
        init(self, *args, **kwargs)

    described: Any = checked
    described.__doc__ = "Make the flow; the arguments are described at :class:`pyroflows.flows.stacking.StackedFlow`."
    described.__signature__ = signature
    return described


def _random_cycle(dim: int, seed: int) -> list[int]:
    """Return a random permutation of one cycle, which moves every index; flows of equal arguments get equal ones."""
    path = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))
    return path.roll(1)[path.argsort()].tolist()

"""What the recipes have in common: a stack of layers of one kind, and what mixes the dimensions between them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar

import torch
from torch import nn
from torch.distributions import constraints

from pyroflows.errors import OptionError
from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.transforms import LU, FlowTransform, Permutation

Conditioner = str | Callable[..., nn.Module]
Init = TypeVar("Init", bound=Callable[..., None])

_MIXING: dict[str, Callable[[list[int]], FlowTransform]] = {
    "permutation": Permutation,
    "lu": lambda order: LU(len(order), order),
}


class StackOptions(TypedDict, total=False):
    """The options that all recipes share, with the types that :class:`StackedFlow` gives them."""

    context_dim: int
    base: Base
    support: constraints.Constraint | None
    mixing: str | None


class StackedFlow(Flow):
    """A stack of layers of one kind, the common ground of the recipes; each recipe says which layer it stacks.

    Every recipe takes the arguments below; ``hidden_dims`` and ``conditioner`` only where its layers have networks.

    Args:
        dim: the event size D.
        num_layers: number of layers, at least 1, without those that mix.
        hidden_dims: widths of the hidden layers of each layer's network.
        conditioner: the network of each layer, "mlp" or "residual" in couplings, "made" or "residual" in autoregressive
            layers; or a factory, see :class:`pyroflows.transforms.Coupling` and
            :class:`pyroflows.transforms.Autoregressive`.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`pyroflows.Flow`.
        support: where the data lie, see :class:`pyroflows.Flow`.
        mixing: what mixes the dimensions between two layers, between two pairs of couplings: "permutation" for a fixed
            random permutation; "lu" for a :class:`pyroflows.transforms.LU` layer that starts as one; or None. Without
            mixing, the order of autoregressive layers turns from one to the next.

    Raises:
        OptionError: if there is no layer, or a name is unknown.
        TypeError: for an argument that the recipe does not take.
    """

    def __init__(
        self,
        layer: Callable[[bool, int], FlowTransform],
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
        # Stacks what layer(is_turned, context_dim) makes, mixes after every ``between`` layers, and ends with ``last``.
        # Every second layer is turned: it transforms the other half, or takes the dimensions in the reverse order.
        # Where dimensions are mixed after each layer, none is.
        if num_layers < 1:
            raise OptionError(f"a flow needs num_layers >= 1, got {num_layers}")
        if mixing is not None and mixing not in _MIXING:
            raise OptionError(f"mixing must be None or one of {sorted(_MIXING)}, got {mixing!r}")
        stack: list[FlowTransform] = []
        for i in range(num_layers):
            if mixing is not None and i and i % between == 0:
                stack.append(_MIXING[mixing](_random_cycle(stack[0].dim, seed=i)))
            stack.append(layer(i % 2 == 1 and (mixing is None or between > 1), context_dim))
        super().__init__([*stack, *last], base, support)


def spell_out_options(init: Init) -> Init:
    """Name the options of :class:`StackedFlow` in the signature of an ``__init__`` that passes ``**options`` to it.

    So ``help``, ``inspect.signature`` and completion show all arguments of a recipe, with their defaults.
    """
    own = inspect.signature(init)
    *parameters, _ = own.parameters.values()
    options = [p for p in inspect.signature(StackedFlow.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    described: Any = init
    described.__signature__ = own.replace(parameters=[*parameters, *options])
    return init


def _random_cycle(dim: int, seed: int) -> list[int]:
    """A permutation that leaves nothing in its place; the seed makes flows of the same arguments agree."""
    path = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))
    return path.roll(1)[path.argsort()].tolist()

"""How recipes stack their layers, and what mixes the dimensions between them."""

from collections.abc import Callable, Sequence

import torch

from pyroflows.errors import OptionError
from pyroflows.transforms import LU, Autoregressive, Coupling, FlowTransform, Permutation, masks
from pyroflows.transforms.univariate import Univariate

_MIXING: dict[str, Callable[[list[int]], FlowTransform]] = {
    "permutation": Permutation,
    "lu": lambda order: LU(len(order), order),
}


def coupling_layers(
    dim: int,
    univariate: str | Univariate,
    num_layers: int,
    hidden_dims: Sequence[int],
    context_dim: int,
    mixing: str | None,
    conditioner: str,
) -> list[FlowTransform]:
    """Couplings of which two in a row transform one half and then the other; what mixes comes after each such pair."""
    half = masks.half(dim)
    layers = [
        # There is no other half of one dimension.
        Coupling(dim, univariate, ~half if i % 2 and dim > 1 else half, conditioner, hidden_dims, context_dim)
        for i in range(num_layers)
    ]
    return _mixed(layers, mixing, every=2)


def autoregressive_layers(
    dim: int,
    univariate: str | Univariate,
    num_layers: int,
    hidden_dims: Sequence[int],
    context_dim: int,
    mixing: str | None,
    conditioner: str,
) -> list[FlowTransform]:
    """Autoregressive layers; without mixing their order turns, so that every dimension comes early somewhere."""
    layers = [
        Autoregressive(
            dim, univariate, range(dim)[:: -1 if i % 2 and mixing is None else 1], conditioner, hidden_dims, context_dim
        )
        for i in range(num_layers)
    ]
    return _mixed(layers, mixing, every=1)


def inverses(layers: Sequence[FlowTransform]) -> list[FlowTransform]:
    """Each layer inverted, in the same order: parallel where the layers are not."""
    return [layer.inv for layer in layers]


def _mixed(layers: Sequence[FlowTransform], mixing: str | None, every: int) -> list[FlowTransform]:
    """The layers, with one that mixes the dimensions after each ``every`` of them."""
    if not layers:
        raise OptionError("a flow needs num_layers >= 1")
    if mixing is not None and mixing not in _MIXING:
        raise OptionError(f"mixing must be None or one of {sorted(_MIXING)}, got {mixing!r}")
    stack: list[FlowTransform] = []
    for i, layer in enumerate(layers):
        if mixing is not None and i and i % every == 0:
            stack.append(_MIXING[mixing](_random_cycle(layer.dim, seed=i)))
        stack.append(layer)
    return stack


def _random_cycle(dim: int, seed: int) -> list[int]:
    """A permutation that leaves nothing in its place; the seed makes flows of the same arguments agree."""
    path = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))
    return path.roll(1)[path.argsort()].tolist()

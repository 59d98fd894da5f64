"""The discrete layers that the battery of laws runs over. A new one enters by one line in ``STRUCTURES``, or in
``LAYERS`` if it does not take every map."""

from collections.abc import Callable
from functools import partial
from itertools import cycle, product

import pytest
import torch
from torch import Tensor, nn

from pyroflows.nets.mlp import zero_initialized
from pyroflows.transforms import Compose, DiscreteAutoregressive, DiscreteCoupling, FlowTransform

# Length, number of categories and size of the context give a layer.
Factory = Callable[[int, int, int], FlowTransform]

LENGTH, SIZE, CONTEXT_DIM = 4, 6, 2
MAPS = ("additive", "affine", "permutation")


class Running(nn.Module):
    """A conditioner of one's own, without steps: parameters are linear in the sums of earlier embeddings."""

    def __init__(self, order, num_params, hidden_dims, context_dim, channels):
        super().__init__()
        assert order == list(range(len(order)))
        self.linear = zero_initialized(nn.Linear(channels + context_dim, channels * num_params))
        self.num_params = num_params

    def forward(self, z, context=None):
        earlier = (z.cumsum(-1) - z).mT
        if context is not None:
            earlier = torch.cat([earlier, context[..., None, :].expand(*earlier.shape[:-1], -1)], -1)
        return self.linear(earlier).unflatten(-1, (-1, self.num_params)).transpose(-3, -2)


def wide_convolution(in_dim, out_dim, hidden_dims):
    """A conditioner of one's own along a sequence, each of whose parameters depends on all places nearby."""
    first, last = nn.Conv1d(in_dim, *hidden_dims, 5, padding=2), nn.Conv1d(*hidden_dims, out_dim, 3, padding=1)
    return nn.Sequential(first, nn.SiLU(), zero_initialized(last))


def _made(structure: Callable[..., FlowTransform], order: bool = False, half: bool = False, **options) -> Callable:
    def make(univariate: str, length: int, size: int, context_dim: int) -> FlowTransform:
        values = dict(options)
        if order:
            values["order"] = torch.randperm(length, generator=torch.Generator().manual_seed(1)).tolist()
        if half:
            values["mask"] = torch.arange(length) < length // 2
        return structure(length, size, univariate, context_dim=context_dim, **values)

    return make


_autoregressive, _coupling = partial(_made, DiscreteAutoregressive), partial(_made, DiscreteCoupling)

# A new layer enters by a line.
STRUCTURES: dict[str, Callable[..., FlowTransform]] = {
    "autoregressive": _autoregressive(hidden_dims=(8, 8)),
    "autoregressive-shuffled": _autoregressive(order=True, hidden_dims=(8,), embedding_dim=3),
    "autoregressive-residual": _autoregressive(order=True, conditioner="residual", hidden_dims=(8,)),
    "autoregressive-causal-conv": _autoregressive(order=True, conditioner="causal_conv", hidden_dims=(5, 4)),
    "autoregressive-causal-conv-embedded": _autoregressive(
        conditioner="causal_conv", hidden_dims=(5,), embedding_dim=2
    ),
    "autoregressive-of-ones-own": _autoregressive(conditioner=Running),
    "coupling": _coupling(hidden_dims=(8, 8)),
    "coupling-residual-of-half": _coupling(half=True, conditioner="residual", hidden_dims=(8,), embedding_dim=3),
    "coupling-conv": _coupling(conditioner="conv", hidden_dims=(6,)),
    "coupling-residual-conv": _coupling(half=True, conditioner="residual_conv", hidden_dims=(6,), embedding_dim=2),
    "coupling-dilated-conv": _coupling(conditioner="dilated_conv", hidden_dims=(6, 6), embedding_dim=2),
    "coupling-of-ones-own": _coupling(conditioner=wide_convolution, hidden_dims=(6,)),
}


def stack(structure: str, univariate: str, length: int, size: int, context_dim: int = 0) -> Compose:
    """Five layers; those with a mask and an order change their roles in turns."""
    layers: list[FlowTransform] = []
    for i in range(5):
        if structure == "coupling":
            mask = torch.arange(length) % 2 == i % 2 if length > 1 else None
            layer = DiscreteCoupling(length, size, univariate, mask, hidden_dims=(6,), context_dim=context_dim)
        else:
            order = range(length)[:: -1 if i % 2 else 1]
            layer = DiscreteAutoregressive(length, size, univariate, order, hidden_dims=(6,), context_dim=context_dim)
        layers.append(layer.inv if i == 2 else layer)
    return Compose(layers)


LAYERS: dict[str, Factory] = {
    **{f"{name}-{map_}": partial(STRUCTURES[name], map_) for name, map_ in product(STRUCTURES, MAPS)},
    "stack-of-couplings": partial(stack, "coupling", "permutation"),
    "stack-of-autoregressive-layers": partial(stack, "autoregressive", "affine"),
}
# The quick run tries each structure and each map, and all pairs of the two plainest structures.
_ONE_EACH = {f"{name}-{map_}" for name, map_ in zip(STRUCTURES, cycle(MAPS), strict=False)}
_PLAIN = {f"{name}-{map_}" for name, map_ in product(("autoregressive", "coupling"), MAPS)}
_SLOW = {name for name in LAYERS if not name.startswith("stack")} - _ONE_EACH - _PLAIN

NAMES = [pytest.param(name, marks=pytest.mark.slow if name in _SLOW else ()) for name in LAYERS]
CASES = [
    pytest.param(
        name,
        context_dim,
        id=name + ("-context" if context_dim else ""),
        marks=pytest.mark.slow if name in _SLOW else (),
    )
    for name, context_dim in product(LAYERS, (0, CONTEXT_DIM))
]


def made(name: str, length: int = LENGTH, size: int = SIZE, context_dim: int = 0) -> FlowTransform:
    """A new layer in float64."""
    return LAYERS[name](length, size, context_dim).double()


def layer(name: str, length: int = LENGTH, size: int = SIZE, context_dim: int = 0) -> FlowTransform:
    """A layer with parameters far from the identity."""
    return randomized(made(name, length, size, context_dim))


def randomized(t: FlowTransform) -> FlowTransform:
    """Draw all parameters anew; weights are larger than biases, so that categories depend on each other."""
    with torch.no_grad():
        for parameter in t.parameters():
            parameter.normal_(std=4 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1.0)
    return t


def conditioned(name: str, context_dim: int, batch_shape: tuple[int, ...] = (), **sizes: int) -> FlowTransform:
    """A layer with random parameters, at a random context if it takes one."""
    t = layer(name, context_dim=context_dim, **sizes)
    return t.condition(torch.randn(*batch_shape, context_dim, dtype=torch.float64)) if context_dim else t


def all_sequences(length: int, size: int) -> Tensor:
    """The whole support, ``(size ** length, length)``."""
    return torch.cartesian_prod(*[torch.arange(size)] * length).reshape(-1, length)


def some_sequences(*batch_shape: int, length: int = LENGTH, size: int = SIZE) -> Tensor:
    """Random sequences."""
    return torch.randint(size, (*batch_shape, length))


def one_hots(categories: Tensor, size: int = SIZE) -> Tensor:
    """One-hot vectors of categories."""
    return torch.eye(size, dtype=torch.float64)[categories]

"""The layers that the battery of laws runs over. A new layer enters by one line in ``LAYERS``."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.transforms import (
    LU,
    Autoregressive,
    Compose,
    Coupling,
    Elementwise,
    FlowTransform,
    Permutation,
    Planar,
    Radial,
    Standardize,
    Sylvester,
    Triangular,
    masks,
)

Factory = Callable[[int, int], FlowTransform]

CONTEXT_DIM = 3
DIMS = (1, 2, 5, 50)
BATCH_SHAPES = ((), (7,), (3, 2, 7), (0,))


def _shuffled(dim: int) -> list[int]:
    return torch.randperm(dim, generator=torch.Generator().manual_seed(1)).tolist()


_coupling: Callable[..., FlowTransform] = partial(Coupling, hidden_dims=(16, 16))
_autoregressive: Callable[..., FlowTransform] = partial(Autoregressive, hidden_dims=(16, 16))

STRUCTURES = {"elementwise": Elementwise, "coupling": _coupling, "autoregressive": _autoregressive}
UNIVARIATES = ("additive", "affine", "spline", "sos", "monotone")
TRIANGULAR = [f"{structure}-{univariate}" for structure, univariate in product(STRUCTURES, UNIVARIATES)]


def _factory(structure: Callable[..., FlowTransform], **options: Any) -> Factory:
    """Of a layer with these options; one that is a function is called with the dimension."""

    def make(dim: int, context_dim: int) -> FlowTransform:
        values = {name: option(dim) if callable(option) else option for name, option in options.items()}
        return structure(dim, context_dim=context_dim, **values)

    return make


def _other_half(dim: int) -> Tensor:
    return ~masks.half(dim) if dim > 1 else masks.half(dim)


def _location(dim: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, dim)


def _cholesky_factor(dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(dim, dim, generator=generator).tril(-1) / dim + torch.diag(torch.linspace(0.5, 2.0, dim))


def _compose(dim: int, context_dim: int) -> Compose:
    """Every kind of layer; the permutation is undone, so that the stack starts at the identity."""
    shuffle = Permutation(_shuffled(dim))
    return Compose(
        [
            Planar(dim, context_dim),
            shuffle,
            _autoregressive(dim, context_dim=context_dim).inv,
            shuffle.inv,
            Elementwise(dim, context_dim=context_dim),
            _coupling(dim, context_dim=context_dim),
            LU(dim, context_dim=context_dim),
            Radial(dim, context_dim),
            Sylvester(dim, min(dim, 3), context_dim),
        ]
    )


# Name to factory(dim, context_dim). At initialisation a layer must be the identity, unless it is named below.
LAYERS: dict[str, Factory] = {
    "planar": Planar,
    "radial": Radial,
    "sylvester": lambda dim, context_dim: Sylvester(dim, min(dim, 3), context_dim),
    "permutation": lambda dim, context_dim: Permutation(_shuffled(dim)),
    **{name: _factory(STRUCTURES[name.split("-")[0]], univariate=name.split("-")[1]) for name in TRIANGULAR},
    "coupling-other-half": _factory(_coupling, mask=_other_half),
    "coupling-alternating": _factory(_coupling, mask=masks.alternating),
    "coupling-random": _factory(_coupling, mask=lambda dim: masks.random(dim, seed=1)),
    "coupling-residual": _factory(_coupling, conditioner="residual"),
    "autoregressive-reversed": _factory(_autoregressive, order=lambda dim: range(dim)[::-1]),
    "autoregressive-narrow": _factory(Autoregressive, hidden_dims=(3, 2)),
    "autoregressive-residual": _factory(_autoregressive, conditioner="residual"),
    "autoregressive-causal-conv": _factory(_autoregressive, conditioner="causal_conv", order=_shuffled),
    "autoregressive-inverse": lambda dim, context_dim: _autoregressive(dim, context_dim=context_dim).inv,
    "lu": _factory(LU),
    "lu-permuted": _factory(LU, order=_shuffled),
    "triangular": _factory(Triangular),
    "triangular-whitening": _factory(Triangular, loc=_location, scale_tril=_cholesky_factor),
    "standardize": lambda dim, context_dim: Standardize(
        dim, torch.linspace(-1.0, 2.0, dim), torch.linspace(0.5, 2.0, dim)
    ),
    "compose": _compose,
}
TAKES_NO_CONTEXT = {"permutation", "standardize"}
NOT_IDENTITY_AT_START = {"permutation", "lu-permuted", "standardize", "triangular-whitening"}
WITHOUT_PARAMETERS = {"permutation", "standardize"}
# The log-determinant is zero whatever the parameters are.
VOLUME_PRESERVING = {"permutation", *(name for name in TRIANGULAR if name.endswith("-additive"))}

LEARNABLE = [name for name in LAYERS if name not in WITHOUT_PARAMETERS]
CONDITIONAL = [name for name in LAYERS if name not in TAKES_NO_CONTEXT]
# All pairs (name, context_dim), for parametrisation.
CASES = [(name, 0) for name in LAYERS] + [(name, CONTEXT_DIM) for name in CONDITIONAL]
CASE_IDS = [name + ("-context" if context_dim else "") for name, context_dim in CASES]


def layer(name: str, dim: int, context_dim: int = 0, dtype: torch.dtype = torch.float64) -> FlowTransform:
    """A layer with perturbed parameters."""
    return perturb(LAYERS[name](dim, context_dim).to(dtype))


def conditioned(
    name: str, dim: int, context_dim: int, batch_shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
) -> FlowTransform:
    """A layer with perturbed parameters, at a random context if it takes one."""
    t = layer(name, dim, context_dim, dtype)
    return t.condition(torch.randn(*batch_shape, context_dim, dtype=dtype)) if context_dim else t


def perturb(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Add noise to all parameters: unit normal to vectors, and such that outputs stay of order one to matrices."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.add_(scale / math.sqrt(fan_in) * torch.randn_like(parameter))
    return module


def points(batch_shape: tuple[int, ...], dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Points with ``|z_j| <= 10``, many of them near zero, where the layers bend most."""
    return 10 * (2 * torch.rand(*batch_shape, dim, dtype=dtype) - 1) * torch.rand(*batch_shape, 1, dtype=dtype) ** 2


def jacobian(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """``(..., D, D)``, row i the gradient of output i. Points of a batch do not mix, so one batched pass gives all."""
    z = z.detach().requires_grad_()
    x = function(z)
    dim = z.shape[-1]
    rows = torch.eye(dim, dtype=z.dtype).reshape(dim, *[1] * (z.dim() - 1), dim).expand(dim, *z.shape)
    return torch.autograd.grad(x, z, rows, is_grads_batched=True)[0].movedim(0, -2)

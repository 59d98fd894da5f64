"""The layers that the battery of laws runs over. A new layer enters by one line in ``LAYERS``."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import ReshapeTransform

from pyroflows.shapes import shape_of
from pyroflows.transforms import (
    LU,
    QR,
    ActNorm,
    Adaptive,
    Autoregressive,
    BatchNorm,
    BlockAutoregressive,
    Compose,
    Continuous,
    Conv1x1,
    Coupling,
    Diagonal,
    Elementwise,
    EmergingConv,
    FixedSteps,
    FlowTransform,
    LeakyReLU,
    LowRank,
    Multiscale,
    Orthogonal,
    Permutation,
    Planar,
    Radial,
    Residual,
    Squeeze,
    Standardize,
    Sylvester,
    Triangular,
    masks,
)
from pyroflows.transforms.foreign import Foreign
from pyroflows.transforms.hierarchy import Hierarchy, Level, Rows
from pyroflows.transforms.image.normalized_conv import NormalizedConv1x1
from pyroflows.transforms.local_affine import LocalAffine, num_curves
from pyroflows.transforms.markov_affine import MarkovAffine
from tests.transforms.examples import EstimatedScale
from tests.transforms.networks import Plain, Running, Stepwise, Velocity, convolution

Shape = tuple[int, ...]
Factory = Callable[[Any, Any], FlowTransform]

CONTEXT_DIM = 3
VECTORS = ((1,), (2,), (5,), (50,))
# To which continuous layers are solved, in float64.
TOLERANCE = 1e-6
BATCH_SHAPES = ((), (7,), (3, 2, 7), (0,))
DTYPES = (torch.float64, torch.float32)


def _shuffled(dim: int) -> list[int]:
    return torch.randperm(dim, generator=torch.Generator().manual_seed(1)).tolist()


_coupling: Callable[..., FlowTransform] = partial(Coupling, hidden_dims=(16, 16))
_autoregressive: Callable[..., FlowTransform] = partial(Autoregressive, hidden_dims=(16, 16))
_residual: Callable[..., FlowTransform] = partial(Residual, hidden_dims=(16, 16))
_causal_conv: Callable[..., FlowTransform] = partial(Autoregressive, conditioner="causal_conv", hidden_dims=(8, 6, 7))

_continuous: Callable[..., FlowTransform] = partial(
    Continuous, hidden_dims=(6, 5), solver=Adaptive(TOLERANCE, TOLERANCE), exact_solver=Adaptive(TOLERANCE, TOLERANCE)
)

STRUCTURES = {"elementwise": Elementwise, "coupling": _coupling, "autoregressive": _autoregressive}
UNIVARIATES = (
    "additive",
    "scale",
    "affine",
    "leaky_relu",
    "sinh_arcsinh",
    "spline",
    "circular_spline",
    "sos",
    "monotone",
)
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


def _hierarchy(dim: int, _: int) -> Hierarchy:
    """A global level, one of rows of two elements, and one of rows within these, in shuffled places."""
    num_rows = dim // 5
    places = torch.tensor(_shuffled(dim))
    of_outer, of_inner = places[: 2 * num_rows].reshape(-1, 2), places[2 * num_rows : 4 * num_rows].reshape(-1, 1)
    of_globals = places[4 * num_rows :]
    num_global = len(of_globals)
    inner_parents = (torch.arange(len(of_inner)) % max(1, num_rows),)
    levels, rows = [], []
    for part, parents, given in (
        (of_outer, (), num_global),
        (of_inner, inner_parents, num_global + 2),
    ):
        if not part.numel():
            continue
        num, size = part.shape
        generator = torch.Generator().manual_seed(3)
        num_functions = num_curves(num_global, degree=2 + len(levels))
        affine = LocalAffine(
            size,
            given,
            num,
            loc=torch.randn(num, size, generator=generator),
            regression=torch.randn(num, size, given - num_global, generator=generator) / given if parents else None,
            scale_tril=_cholesky_factor(size).expand(num, size, size),
            curves=torch.randn(num, 2 * size + size * (size - 1) // 2, num_functions, generator=generator)
            / (4 * given),
            num_curved=num_global,
        )
        features = torch.randn(num, 2, generator=generator)
        flow = _autoregressive(size, univariate="sinh_arcsinh", context_dim=given + 2)
        levels.append(Level(flow, affine, (0,) if parents else (), torch.arange(num_global)))
        rows.append(Rows(part, parents, torch.arange(num), features=features))
    return Hierarchy(_autoregressive(num_global), Triangular(num_global), of_globals, levels, rows)


def _markov_affine(dim: int, context_dim: int) -> MarkovAffine:
    """Each element depends on the next one, and on the last one."""
    pairs = sorted({(t, k) for t in range(dim - 1) for k in (t + 1, dim - 1)})
    return MarkovAffine(dim, torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).mT, context_dim, hidden_dims=(16,))


def _angles_and_reals(dim: int) -> list[str]:
    """Angles and real numbers in turns, some of them neighbours."""
    return ["circular_spline" if j % 3 else "spline" for j in range(dim)]


def _shuffled_times(shape: Shape) -> list[int]:
    return _shuffled(shape[-1])


def _ordered(shape: Shape, axis: int, conditioner: Any = Stepwise, **options: Any) -> Autoregressive:
    """Autoregressive over an axis in shuffled order."""
    return Autoregressive(shape, conditioner=conditioner, order=_shuffled(shape[axis]), axis=axis, **options)


def _checkerboard(shape: Shape, **options: Any) -> Coupling:
    mask = masks.checkerboard(*shape[1:])
    return Coupling(shape, mask=mask, conditioner="conv", hidden_dims=(8,), **options)


def _compose_images(shape: Shape, context_dim: int) -> Compose:
    return Compose(
        [
            _ordered(shape, 1, context_dim=context_dim),
            _coupling(shape, context_dim=context_dim),
            _ordered(shape, 0).inv,
        ]
    )


def _multiscale(shape: Shape, context_dim: int) -> Multiscale:
    """Two levels, with a permutation of channels and a coupling at each."""
    levels = []
    for _ in range(2):
        squeeze = Squeeze(shape)
        mixing = Conv1x1(squeeze.base_shape, order=_shuffled(squeeze.base_shape[0]), context_dim=context_dim)
        coupling = Coupling(squeeze.base_shape, conditioner="conv", hidden_dims=(4,), context_dim=context_dim)
        levels.append(Compose([coupling, mixing, squeeze]))
        shape = (squeeze.base_shape[0] // 2, *squeeze.base_shape[1:])
    return Multiscale(levels[::-1], context_dim)


@dataclass(frozen=True)
class Entry:
    """A layer of the battery.

    Args:
        make: called with an event shape (a number for vectors) and the size or shape of the context.
        shapes: event shapes that it is tried on; the laws that need one take ``usual``.
        usual: the shape where one is enough.
        context: the size or shape of a context that its parameters can depend on, 0 if they cannot.
        is_identity_at_start: whether a new layer is the identity.
        has_parameters: whether there is something to train.
        preserves_volume: whether the log-determinant is zero whatever the parameters are.
        is_exact: whether its own log-determinant is exact; the laws ask for the exact view in any case.
        bends_all: whether its parameters move each event, unlike rectifiers, which let positive numbers pass.
        is_random: whether estimates of its log-determinant are random.
        tolerance: to which it solves for its values, 0 for rounding.
        is_slow: whether only the slow run of the tests tries it.
    """

    make: Callable[[Any, int], FlowTransform]
    shapes: tuple[Shape, ...] = VECTORS
    usual: Shape = (5,)
    context: int | Shape = CONTEXT_DIM
    is_identity_at_start: bool = True
    has_parameters: bool = True
    preserves_volume: bool = False
    is_exact: bool = True
    bends_all: bool = True
    is_random: bool = True
    tolerance: float = 0.0
    is_slow: bool = False


SEQUENCES = ((1, 1), (3, 2), (2, 5))
IMAGES = ((1, 4, 2), (3, 1, 2), (3, 4, 2))
sequences = partial(Entry, shapes=SEQUENCES, usual=(2, 3))
images = partial(Entry, shapes=IMAGES, usual=(3, 2, 2))
fixed = partial(Entry, context=0, has_parameters=False)
continuous = partial(Entry, tolerance=TOLERANCE, is_slow=True)

# A new layer enters by a line.
LAYERS: dict[str, Entry] = {
    "planar": Entry(Planar),
    "radial": Entry(Radial),
    "sylvester": Entry(lambda dim, context_dim: Sylvester(dim, min(dim, 3), context_dim)),
    "permutation": fixed(lambda dim, _: Permutation(_shuffled(dim)), is_identity_at_start=False, preserves_volume=True),
    **{
        name: Entry(
            _factory(STRUCTURES[name.split("-")[0]], univariate=name.split("-")[1]),
            preserves_volume=name.endswith("-additive"),
            bends_all=not name.endswith("-leaky_relu"),
        )
        for name in TRIANGULAR
    },
    "coupling-other-half": Entry(_factory(_coupling, mask=_other_half)),
    "coupling-alternating": Entry(_factory(_coupling, mask=masks.alternating)),
    "coupling-random": Entry(_factory(_coupling, mask=lambda dim: masks.random(dim, seed=1))),
    "coupling-residual": Entry(_factory(_coupling, conditioner="residual")),
    "autoregressive-reversed": Entry(_factory(_autoregressive, order=lambda dim: range(dim)[::-1])),
    "autoregressive-narrow": Entry(_factory(Autoregressive, hidden_dims=(3, 2))),
    "autoregressive-residual": Entry(_factory(_autoregressive, conditioner="residual")),
    "autoregressive-causal-conv": Entry(_factory(_autoregressive, conditioner="causal_conv", order=_shuffled)),
    "autoregressive-inverse": Entry(lambda dim, context_dim: _autoregressive(dim, context_dim=context_dim).inv),
    "elementwise-by-column": Entry(_factory(Elementwise, univariate=_angles_and_reals)),
    "coupling-by-column": Entry(_factory(_coupling, univariate=_angles_and_reals, mask=masks.alternating)),
    "autoregressive-by-column": Entry(_factory(_autoregressive, univariate=_angles_and_reals, order=_shuffled)),
    "block-autoregressive": Entry(_factory(BlockAutoregressive, hidden_dims=(5, 4))),
    "block-autoregressive-shuffled": Entry(_factory(BlockAutoregressive, order=_shuffled, hidden_dims=(6,))),
    "lu": Entry(_factory(LU)),
    "lu-permuted": Entry(_factory(LU, order=_shuffled), is_identity_at_start=False),
    "triangular": Entry(_factory(Triangular)),
    "diagonal": Entry(Diagonal),
    "diagonal-of-images": images(Diagonal),
    "leaky-relu": Entry(LeakyReLU, bends_all=False),
    "orthogonal": Entry(_factory(Orthogonal), preserves_volume=True),
    "orthogonal-of-two-reflections": Entry(_factory(Orthogonal, num_reflections=2), preserves_volume=True),
    "orthogonal-matrix-exp": Entry(_factory(Orthogonal, parametrization="matrix_exp"), preserves_volume=True),
    "orthogonal-cayley": Entry(_factory(Orthogonal, parametrization="cayley"), preserves_volume=True),
    "qr": Entry(_factory(QR)),
    "low-rank": Entry(lambda dim, context_dim: LowRank(dim, min(dim, 3), context_dim)),
    "markov-affine": Entry(_markov_affine),
    "triangular-whitening": Entry(
        _factory(Triangular, loc=_location, scale_tril=_cholesky_factor), is_identity_at_start=False
    ),
    "standardize": fixed(
        lambda dim, _: Standardize(dim, torch.linspace(-1.0, 2.0, dim), torch.linspace(0.5, 2.0, dim)),
        is_identity_at_start=False,
    ),
    "standardize-of-sequences": fixed(lambda shape, _: Standardize(shape), shapes=SEQUENCES, usual=(2, 3)),
    "act-norm": Entry(ActNorm),
    "act-norm-of-images": images(ActNorm),
    "batch-norm": Entry(_factory(BatchNorm)),
    "batch-norm-of-images": images(_factory(BatchNorm)),
    "reshape": fixed(
        lambda shape, _: Foreign(ReshapeTransform((math.prod(shape),), shape), math.prod(shape)),
        shapes=SEQUENCES,
        usual=(2, 3),
        is_identity_at_start=False,
        preserves_volume=True,
    ),
    "estimated": Entry(lambda dim, _: EstimatedScale(dim), context=0, is_exact=False),
    "compose-estimated": Entry(lambda dim, _: Compose([Planar(dim), EstimatedScale(dim)]), context=0, is_exact=False),
    "residual": Entry(_factory(_residual), is_exact=False),
    "residual-exact-deep": Entry(_factory(_residual, hidden_dims=(8, 3, 8), activation="sine", log_det="exact")),
    "residual-linear": Entry(_factory(_residual, hidden_dims=()), is_exact=False),
    "continuous": continuous(_factory(_continuous), shapes=VECTORS[:-1], is_slow=False),
    "continuous-deep": continuous(_factory(_continuous, hidden_dims=(6, 5, 4)), shapes=VECTORS[:-1], context=0),
    "continuous-fixed-steps": continuous(
        _factory(_continuous, solver=FixedSteps(2)), shapes=((5,),), context=0, is_exact=False, is_random=False
    ),
    "continuous-of-ones-own": continuous(
        _factory(_continuous, net=lambda _: Velocity), shapes=((2,), (5,)), usual=(5,)
    ),
    "compose": Entry(_compose),
    "hierarchy": Entry(_hierarchy, shapes=((1,), (5,), (50,)), context=0, is_identity_at_start=False),
    # Events are sequences (channels, length).
    "elementwise-of-sequences": sequences(_factory(Elementwise, univariate="spline")),
    "causal-conv": sequences(_factory(_causal_conv)),
    "causal-conv-spline-shuffled": sequences(_factory(_causal_conv, univariate="spline", order=_shuffled_times)),
    "causal-conv-circular": sequences(_factory(_causal_conv, univariate="circular_spline", order=_shuffled_times)),
    "causal-conv-of-conditioning-sequence": Entry(
        _factory(_causal_conv), shapes=((1, 5), (3, 5)), usual=(2, 5), context=(2, 5)
    ),
    "conditioner-of-ones-own": sequences(_factory(Autoregressive, conditioner=lambda _: Running), context=0),
    # Events are images (channels, height, width), or the axis of masks and orders is not the usual one.
    "coupling-of-channels": images(_factory(_coupling, univariate="spline")),
    "coupling-of-channels-circular": images(_factory(_coupling, univariate="circular_spline")),
    "coupling-of-rows": images(_factory(_coupling, axis=1, mask=lambda shape: masks.alternating(shape[1]))),
    "coupling-of-columns": images(_factory(_coupling, axis=-1)),
    "coupling-convolution": images(
        _factory(Coupling, conditioner=lambda _: convolution, hidden_dims=(8,)), shapes=((2, 1, 3), (3, 4, 2))
    ),
    "coupling-conv": images(_factory(Coupling, conditioner="conv", hidden_dims=(8, 8)), shapes=IMAGES[1:]),
    "coupling-residual-conv-of-image": images(
        _factory(Coupling, conditioner="residual_conv", hidden_dims=(8,)),
        shapes=((3, 4, 2),),
        usual=(3, 4, 2),
        context=(2, 4, 2),
    ),
    "coupling-of-places": images(_factory(_checkerboard, univariate="spline")),
    "coupling-of-places-circular": images(_factory(_checkerboard, univariate="circular_spline"), shapes=((1, 3, 2),)),
    "coupling-of-image": images(_factory(_checkerboard), shapes=((2, 3, 2),), usual=(2, 3, 2), context=(1, 3, 2)),
    "coupling-of-sequence": sequences(
        _factory(_coupling, conditioner="conv"), shapes=((2, 5),), usual=(2, 5), context=(3, 5)
    ),
    "squeeze": fixed(
        lambda shape, _: Squeeze(shape),
        shapes=((1, 2, 4), (3, 4, 2)),
        usual=(2, 2, 4),
        is_identity_at_start=False,
        preserves_volume=True,
    ),
    "squeeze-by-three": fixed(
        lambda shape, _: Squeeze(shape, factor=3),
        shapes=((1, 3, 6),),
        usual=(2, 3, 3),
        is_identity_at_start=False,
        preserves_volume=True,
    ),
    "conv1x1": images(_factory(Conv1x1)),
    "conv1x1-permuted": images(
        _factory(Conv1x1, order=lambda shape: _shuffled(shape[0])), shapes=((5, 2, 3),), is_identity_at_start=False
    ),
    "normalized-conv1x1": images(
        lambda shape, context_dim: NormalizedConv1x1(Conv1x1(shape, _shuffled(shape[0]), context_dim)),
        is_identity_at_start=False,
    ),
    "multiscale": images(_multiscale, shapes=((1, 4, 8), (2, 4, 4)), usual=(1, 4, 8), is_identity_at_start=False),
    "autoregressive-of-columns": images(_factory(_ordered, axis=-1)),
    "autoregressive-of-rows-by-passes": images(_factory(_ordered, axis=-2, conditioner=lambda _: Plain)),
    "autoregressive-of-columns-circular": images(_factory(_ordered, axis=-1, univariate="circular_spline")),
    "autoregressive-of-rows-circular-by-passes": images(
        _factory(_ordered, axis=-2, univariate="circular_spline", conditioner=lambda _: Plain)
    ),
    "autoregressive-residual-circular": Entry(
        _factory(_autoregressive, conditioner="residual", univariate="circular_spline")
    ),
    "autoregressive-causal-conv-by-column": Entry(
        _factory(_autoregressive, conditioner="causal_conv", order=_shuffled, univariate=_angles_and_reals),
        shapes=VECTORS[:-1],  # in 50 dimensions scores of random splines overflow
    ),
    "autoregressive-of-channels-spline": images(_factory(_ordered, axis=0, univariate="spline")),
    "causal-conv-time-first": sequences(_factory(_causal_conv, axis=0)),
    "emerging": images(lambda shape, context_dim: EmergingConv(shape, 3, context_dim)),
    "emerging-wide": images(lambda shape, context_dim: EmergingConv(shape, 5, context_dim)),
    "emerging-of-one-pixel": images(lambda shape, context_dim: EmergingConv(shape, 1, context_dim)),
    "compose-of-images": images(_compose_images),
    "residual-of-images": images(_factory(Residual, hidden_dims=(6, 5)), is_exact=False),
    "residual-of-image-given-image": images(
        _factory(Residual, hidden_dims=(6,)), shapes=((3, 4, 2),), usual=(3, 4, 2), context=(2, 4, 2), is_exact=False
    ),
    "continuous-of-images": images(
        _factory(_continuous, hidden_dims=(4,), solver=Adaptive()),
        shapes=((2, 3, 2),),
        usual=(2, 3, 2),
        context=0,
        is_exact=False,
        tolerance=TOLERANCE,
        is_slow=True,
    ),
    "continuous-of-sequence-given-sequence": sequences(
        _factory(_continuous, hidden_dims=(4, 3), trace="exact"),
        shapes=((2, 3),),
        context=(1, 3),
        tolerance=TOLERANCE,
        is_slow=True,
    ),
    "residual-of-sequences": sequences(_factory(Residual, hidden_dims=(6, 5)), is_exact=False),
}

LEARNABLE = [name for name, entry in LAYERS.items() if entry.has_parameters]
CONDITIONAL = [name for name, entry in LAYERS.items() if entry.context]
# All pairs (name, context_dim), for parametrisation.
CASES = [(name, 0) for name in LAYERS] + [(name, LAYERS[name].context) for name in CONDITIONAL]
CASE_IDS = [name + ("-context" if context_dim else "") for name, context_dim in CASES]


def made(name: str, shape: Shape, context_dim: int | Shape = 0) -> FlowTransform:
    """A new layer; those of vectors are made with a number."""
    return LAYERS[name].make(shape[0] if len(shape) == 1 else shape, context_dim).exact()


def layer(
    name: str, shape: Shape | None = None, context_dim: int | Shape = 0, dtype: torch.dtype = torch.float64
) -> FlowTransform:
    """A layer with perturbed parameters."""
    return perturb(made(name, LAYERS[name].usual if shape is None else shape, context_dim).to(dtype))


def conditional(name: str, shape: Shape | None = None) -> FlowTransform:
    """A layer with perturbed parameters that depend on a context."""
    return layer(name, shape, LAYERS[name].context)


def conditioned(
    name: str,
    context_dim: int | Shape,
    shape: Shape | None = None,
    batch_shape: Shape = (),
    dtype: torch.dtype = torch.float64,
) -> FlowTransform:
    """A layer with perturbed parameters, at a random context if it takes one."""
    t = layer(name, shape, context_dim, dtype)
    return t.condition(context_for(t, batch_shape, dtype)) if context_dim else t


def context_for(t: FlowTransform, batch_shape: Shape = (), dtype: torch.dtype = torch.float64) -> Tensor:
    """A random context of the shape that the layer takes."""
    return torch.randn((*batch_shape, *t.context_shape), dtype=dtype)


def grid(name: str, context_dim: int | Shape, full: bool) -> list[tuple[Shape, Shape, torch.dtype]]:
    """Event shapes, batch shapes and dtypes for a case.

    Every pair of values of two of the four occurs; with ``full`` every combination does.
    """
    shapes, k = LAYERS[name].shapes, CASES.index((name, context_dim))
    if full:
        return list(product(shapes, BATCH_SHAPES, DTYPES))
    size = max(len(shapes), len(BATCH_SHAPES))
    return [
        (shapes[i % len(shapes)], BATCH_SHAPES[(i + k) % len(BATCH_SHAPES)], DTYPES[(i + k // 2) % 2])
        for i in range(size)
    ]


def perturb(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Add noise to all parameters: unit normal to vectors, and such that outputs stay of order one to matrices."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.add_(scale / math.sqrt(fan_in) * torch.randn_like(parameter))
    return module


def points(batch_shape: Shape, shape: int | Shape, dtype: torch.dtype = torch.float64) -> Tensor:
    """Points with ``|z_j| <= 10``, many of them near zero, where the layers bend most."""
    shape = shape_of(shape)
    radius = torch.rand(*batch_shape, *[1] * len(shape), dtype=dtype) ** 2
    return 10 * (2 * torch.rand(*batch_shape, *shape, dtype=dtype) - 1) * radius


def jacobian(function: Callable[[Tensor], Tensor], z: Tensor, num_axes: int = 1) -> Tensor:
    """``(..., D, D)`` for events with that many axes, row i the gradient of output i.

    Points of a batch do not mix, so one batched pass gives all.
    """
    z = z.detach().requires_grad_()
    x = function(z)
    batch_shape = z.shape[: z.dim() - num_axes]
    dim = z.shape[len(batch_shape) :].numel()
    rows = torch.eye(dim, dtype=z.dtype).reshape(dim, *[1] * len(batch_shape), *x.shape[len(batch_shape) :])
    found = torch.autograd.grad(x, z, rows.expand(dim, *x.shape), is_grads_batched=True)[0]
    return found.flatten(len(batch_shape) + 1).movedim(0, -2)

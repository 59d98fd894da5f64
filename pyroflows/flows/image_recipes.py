"""The recipes of flows of images, events of shape (channels, height, width)."""

from collections.abc import Callable, Sequence

import torch
from torch.distributions import constraints

from pyroflows.errors import OptionError
from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.stacking import Conditioner
from pyroflows.options import checked_int
from pyroflows.shapes import counted
from pyroflows.transforms import (
    ActNorm,
    Compose,
    Conv1x1,
    Coupling,
    EmergingConv,
    FlowTransform,
    Multiscale,
    Residual,
    Squeeze,
    Standardize,
    masks,
)
from pyroflows.transforms.image.normalized_conv import NormalizedConv1x1
from pyroflows.transforms.image.shape import image_shape
from pyroflows.transforms.univariate import Affine

# The scales of many couplings multiply. With wider bounds, flows of patches of photographs had a few draws, or latents
# of held-out images, that were larger than others by many orders of magnitude, and training could run away; Glow's
# densities were no better.
_AFFINE = Affine(max_contraction=1.0, max_expansion=1.0)

# It makes the layers of a level, from data to base, and is called with the shape of its images and the level's number.
LevelFactory = Callable[[torch.Size, int], list[FlowTransform]]


class MultiscaleFlow(Flow):
    """The base class of the recipes for images: a flow of several levels, of which each sees half as many rows and
    columns as the one before and half of its channels, see :class:`pyroflows.transforms.Multiscale`.

    A coupling stretches or shrinks by e at most, since the scales of all couplings multiply. Every recipe takes the
    arguments below.

    Args:
        shape: the shape (C, H, W) of an image.
        num_levels: number of levels; height and width must be multiples of ``2**num_levels``.
        num_steps: number of steps of each level.
        hidden_dims: widths of the hidden layers of each coupling's network.
        conditioner: the network of each coupling, "conv" or "residual_conv"; or a factory, see
            :class:`pyroflows.transforms.Coupling`.
        context_dim: size of the context, 0 for none; classes are one-hot vectors.
        base: base distribution of vectors with ``C * H * W`` elements, see :class:`pyroflows.Flow`.
        support: the constraint that the data meet, see :class:`pyroflows.Flow`.

    Shapes: ``flow()`` has the event shape ``(C, H, W)``; for a context ``(..., context_dim)``, ``flow(context)`` has
    batch shape ``(...)``. A base value is a vector ``(C * H * W,)``, which ``flow.multiscale.split`` divides into the
    latents of the levels.

    Raises:
        OptionError: if the shape is not that of an image, or its height or width cannot be halved ``num_levels`` times.

    Example:
        >>> flow = pf.flows.Glow((1, 8, 12), num_levels=2, num_steps=1, hidden_dims=(8,))
        >>> [latents.shape for latents in flow.multiscale.split(flow().latent(torch.randn(5, 1, 8, 12)))]
        [torch.Size([5, 8, 2, 3]), torch.Size([5, 2, 4, 6])]
    """

    def __init__(
        self,
        shape: Sequence[int],
        level: LevelFactory,
        num_levels: int,
        context_dim: int,
        base: Base,
        support: constraints.Constraint | None,
    ) -> None:
        shape = self._checked_shape(shape, num_levels)
        standardize = Standardize(shape, by_channel=True)
        levels: list[FlowTransform] = []
        for i in range(num_levels):
            layers = level(shape, i)
            levels.append(Compose(layers[::-1]))
            channels, height, width = layers[-1].base_shape
            shape = torch.Size((channels // 2, height, width))
        super().__init__([Multiscale(levels[::-1], context_dim), standardize], base, support)

    def _checked_shape(self, shape: Sequence[int], num_levels: int) -> torch.Size:
        """Return the shape of images that can be halved as often as there are levels."""
        name = type(self).__name__
        sizes = image_shape(shape, name)
        num_levels = checked_int("num_levels", num_levels)
        most = min(_times_halved(size) for size in sizes[1:])
        if num_levels > most:
            height, width = (size // 2**most for size in sizes[1:])
            use = f"use num_levels={most}, or pad the images" if most else "pad the images"
            after = f"after {counted(most, 'level')} they" if most else "they"
            raise OptionError(
                f"{name} with images of shape {tuple(sizes)} cannot have {counted(num_levels, 'level')}: Squeeze "
                f"halves height and width at each, and {after} are {height} and {width}; {use}"
            )
        return sizes

    @property
    def multiscale(self) -> Multiscale:
        """The layer of all levels, which splits base values into the latents of each."""
        return next(layer for layer in self.layers if isinstance(layer, Multiscale))


class Glow(MultiscaleFlow):
    r"""The flow of images of Kingma and Dhariwal (2018, arXiv:1807.03039): steps of activation normalisation, an
    invertible convolution and an affine coupling of the channels.

    With ``convolution="emerging"`` the convolutions see the neighbouring pixels as well (Hoogeboom et al. 2019,
    arXiv:1901.11137), by a :class:`pyroflows.transforms.EmergingConv` after each 1 x 1 convolution.

    The first 1 x 1 convolution of each level starts at the Haar wavelets of blocks of 2 x 2 pixels, since neighbouring
    pixels are much alike. The others start at random rotations, the same for all flows of equal arguments.

    Sampling and scoring are parallel; emerging convolutions sample along diagonals, one after the other. The other
    arguments are those of
    :class:`pyroflows.flows.image_recipes.MultiscaleFlow`.

    Args:
        num_steps: number of steps of each level.
        convolution: "1x1" or "emerging".

    Example:
        >>> flow = Glow((3, 8, 8), num_levels=2, num_steps=2, hidden_dims=(16, 16), context_dim=10)
        >>> digits = torch.nn.functional.one_hot(torch.arange(10), 10)
        >>> flow(digits).sample().shape, flow(digits).log_prob(torch.zeros(3, 8, 8)).shape
        (torch.Size([10, 3, 8, 8]), torch.Size([10]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_levels: int = 2,
        num_steps: int = 8,
        hidden_dims: Sequence[int] = (64, 64),
        conditioner: Conditioner = "conv",
        convolution: str = "1x1",
        *,
        context_dim: int = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
    ) -> None:
        if convolution not in ("1x1", "emerging"):
            raise OptionError(f'convolution must be "1x1" or "emerging", got {convolution!r}')
        num_steps = checked_int("num_steps", num_steps)

        def level(shape: torch.Size, number: int) -> list[FlowTransform]:
            layers: list[FlowTransform] = [Squeeze(shape)]
            shape = layers[0].base_shape
            mask = masks.half(shape[0])
            for i in range(num_steps):
                mixing = _rotation(shape[0], seed=number * num_steps + i) if i else _haar(shape[0])
                layers.append(NormalizedConv1x1(Conv1x1.starting_at(mixing, shape)))
                if convolution == "emerging":
                    layers.append(EmergingConv(shape))
                layers.append(Coupling(shape, _AFFINE, mask, conditioner, hidden_dims, context_dim))
            return layers

        super().__init__(shape, level, num_levels, context_dim, base, support)


class MultiscaleRealNVP(MultiscaleFlow):
    r"""The real-valued non-volume-preserving flow of images (Dinh et al. 2017, arXiv:1605.08803): affine couplings of
    the squares of a checkerboard, then of the channels, each after activation normalisation.

    Each coupling transforms the half that the one before passed unchanged. Sampling and scoring are parallel. The other
    arguments are those of :class:`pyroflows.flows.image_recipes.MultiscaleFlow`. The paper has batch normalisation in
    place of activation normalisation.

    Args:
        num_steps: number of couplings of each kind at each level.

    Example:
        >>> MultiscaleRealNVP((1, 8, 12), num_steps=2, hidden_dims=(8,))().sample((5,)).shape
        torch.Size([5, 1, 8, 12])
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_levels: int = 2,
        num_steps: int = 4,
        hidden_dims: Sequence[int] = (32, 32),
        conditioner: Conditioner = "residual_conv",
        *,
        context_dim: int = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
    ) -> None:
        num_steps = checked_int("num_steps", num_steps)

        def steps(shape: torch.Size, mask: torch.Tensor) -> list[FlowTransform]:
            layers: list[FlowTransform] = []
            for i in range(num_steps):
                turned = mask if i % 2 == 0 else ~mask
                coupling = Coupling(shape, _AFFINE, turned, conditioner, hidden_dims, context_dim)
                layers += [ActNorm(shape), coupling]
            return layers

        def level(shape: torch.Size, number: int) -> list[FlowTransform]:
            squeeze = Squeeze(shape)
            of_squares = steps(shape, masks.checkerboard(*shape[1:]))
            return [*of_squares, squeeze, *steps(squeeze.base_shape, masks.half(squeeze.base_shape[0]))]

        super().__init__(shape, level, num_levels, context_dim, base, support)


class MultiscaleResidual(MultiscaleFlow):
    r"""The residual flow of images (Chen et al. 2019, arXiv:1906.02735): steps of activation normalisation and a
    residual layer, whose convolutions change all channels of all places at once.

    Each level starts at the Haar wavelets of blocks of 2 x 2 pixels, as that of :class:`Glow` does, since a residual
    layer stretches along no direction by more than ``1 + coefficient``.

    Scoring is parallel, sampling inverts each residual layer by iteration. Training uses unbiased estimates of the
    log-determinants; all that is reported, and the scores of held-out images, use exact ones, at a cost that grows with
    the cube of the number of elements of a level. The other arguments are those of
    :class:`pyroflows.flows.image_recipes.MultiscaleFlow`.

    Args:
        num_steps: number of residual layers of each level.
        coefficient: the bound of the slope of each residual layer's network, between 0 and 1.

    Example:
        >>> flow = MultiscaleResidual((1, 4, 8), num_steps=2, hidden_dims=(8, 8))
        >>> flow().log_prob(torch.randn(5, 1, 4, 8)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_levels: int = 2,
        num_steps: int = 4,
        hidden_dims: Sequence[int] = (64, 64),
        coefficient: float = 0.97,
        *,
        context_dim: int = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
    ) -> None:
        num_steps = checked_int("num_steps", num_steps)

        def level(shape: torch.Size, number: int) -> list[FlowTransform]:
            squeeze = Squeeze(shape)
            shape = squeeze.base_shape
            layers: list[FlowTransform] = [squeeze, Conv1x1.starting_at(_haar(shape[0]), shape)]
            for _ in range(num_steps):
                layers += [ActNorm(shape), Residual(shape, hidden_dims, coefficient, context_dim).inv]
            return layers

        super().__init__(shape, level, num_levels, context_dim, base, support)


def _rotation(channels: int, seed: int) -> torch.Tensor:
    """Return a random orthogonal matrix; torch's own random state is neither read nor changed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(channels, channels, generator=generator, dtype=torch.float64))[0]


def _haar(channels: int) -> torch.Tensor:
    """Return the orthogonal matrix that takes squeezed blocks of 2 x 2 pixels to their Haar wavelets.

    The means of all blocks come first, then the differences of columns, of rows, and across.

    Example:
        >>> (2 * _haar(4)).round().int().tolist()
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    wavelets = torch.kron(pair, pair)
    # Squeeze has the four pixels of a block side by side.
    return torch.einsum("bp,cd->bcdp", wavelets, torch.eye(channels // 4)).reshape(channels, channels)


def _times_halved(size: int) -> int:
    """Return how often a number can be halved.

    Example:
        >>> [_times_halved(size) for size in (7, 12, 32)]
        [0, 2, 5]
    """
    return (size & -size).bit_length() - 1

"""The multi-scale architecture of flows of images."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import ReshapeTransform

from pyroflows.constraints import angles_in
from pyroflows.errors import OptionError, ShapeError
from pyroflows.shapes import expanded_to_context, listed
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.foreign import Foreign
from pyroflows.transforms.image.beside import Beside
from pyroflows.transforms.triangular import Coupling, Elementwise


class Multiscale(Compose):
    r"""Levels of layers of images, each of which factors out a part of the channels (Dinh et al. 2017,
    arXiv:1605.08803).

    From data to base, each level maps an image to one of fewer places with more channels. Its first channels,
    :math:`h_1`, go on to the next level, and the others, :math:`h_2`, become latents by a Gaussian of their own, whose
    location and scale are computed from those that go on,

    .. math:: z_2 = (h_2 - \mu(h_1, c)) / \sigma(h_1, c),

    by a convolution that starts at zero (Kingma and Dhariwal 2018, arXiv:1807.03039). At the last level all channels
    become latents, and each element has a location and a scale of its own. Where levels are parallel, both directions
    are.

    Args:
        levels: the layers of each level, as one layer, from base to data: the coarsest images first. The first axis of
            their shapes are channels. The next level makes as many channels as it takes beside its own.
        context_dim: size of the context c that locations and scales of latents depend on, 0 for none.

    Shapes: z is a vector ``(..., D)`` with the latents of the coarsest level first; x is ``(..., C, H, W)``, a context
    is ``(..., context_dim)``.

    Attributes:
        latent_shapes: the shape of the latents of each level, ``(channels, height, width)``, the coarsest first.

    Raises:
        OptionError: if there is no level, or one is a map of angles.
        ShapeError: if the shapes of two levels in a row do not fit, or a level factors out no channel.

    Example:
        >>> t = Multiscale([Squeeze((2, 4, 2)), Squeeze((1, 8, 4))])
        >>> z = t.inv(torch.randn(5, 1, 8, 4))
        >>> z.shape, [latents.shape for latents in t.split(z)]
        (torch.Size([5, 32]), [torch.Size([5, 8, 2, 1]), torch.Size([5, 2, 4, 2])])
    """

    def __init__(self, levels: Sequence[FlowTransform], context_dim: int = 0) -> None:
        if not levels:
            raise OptionError("Multiscale needs at least one level")
        if any(any(angles_in(level.codomain, level.event_shape[-1])) for level in levels):
            raise OptionError("the latents of Multiscale are real numbers, so that its levels cannot be maps of angles")
        coarsest, *finer = levels
        shape = coarsest.base_shape
        self.latent_shapes = [list(shape)]
        layers: list[FlowTransform] = [
            Foreign(ReshapeTransform(torch.Size((shape.numel(),)), shape), shape.numel()),
            Elementwise(shape, context_dim=context_dim),
            coarsest,
        ]
        for place, level in enumerate(finer, start=1):
            num_kept, shape = _kept_channels(place, layers[-1], level), level.base_shape
            self.latent_shapes.append([shape[0] - num_kept, *shape[1:]])
            mask = torch.arange(shape[0]) < num_kept
            gaussian = Coupling(shape, mask=mask, conditioner="conv", hidden_dims=(), context_dim=context_dim)
            layers = [Beside(Compose(layers), shape[0]), gaussian, level]
        super().__init__(layers)

    def split(self, z: Tensor) -> list[Tensor]:
        """Return the latents of each level, ``(..., channels, height, width)``, the coarsest first.

        Args:
            z: base values ``(..., D)``.

        Raises:
            ShapeError: if they have another size.
        """
        expanded_to_context(z, None, self.base_shape, torch.Size(), "Multiscale")
        shapes = [torch.Size(shape) for shape in self.latent_shapes]
        parts = z.split([shape.numel() for shape in shapes], -1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def join(self, latents: Sequence[Tensor]) -> Tensor:
        """Return the base values ``(..., D)`` whose latents these are.

        Args:
            latents: the latents of each level, as :meth:`split` returns them; their batch shapes broadcast.

        Raises:
            ShapeError: if they are not those of all levels.

        Example:
            >>> t = Multiscale([Squeeze((2, 4, 2)), Squeeze((1, 8, 4))])
            >>> coarse, fine = t.split(torch.randn(32))
            >>> t(t.join([coarse, torch.zeros(5, *fine.shape)])).shape  # without what is fine
            torch.Size([5, 1, 8, 4])
        """
        shapes = [list(part.shape[-3:]) for part in latents]
        if shapes != self.latent_shapes:
            raise ShapeError(
                f"Multiscale with images of shape {tuple(self.event_shape)} joins latents of the shapes "
                f"{listed(self.latent_shapes)}, the coarsest first, got {listed(shapes)}"
            )
        batch_shape = torch.broadcast_shapes(*(part.shape[:-3] for part in latents))
        return torch.cat([part.flatten(-3).expand(*batch_shape, -1) for part in latents], -1)


def _kept_channels(place: int, before: FlowTransform, level: FlowTransform) -> int:
    """Return the number of channels that a level passes to the one before it, next to the base."""
    made, taken = before.event_shape, level.base_shape
    if len(made) != 3 or len(taken) != 3 or made[1:] != taken[1:] or made[0] >= taken[0]:
        raise ShapeError(
            f"the shapes of levels in a row must agree, but level {place - 1} of Multiscale gives images of shape "
            f"{tuple(made)}, and level {place} takes images of shape {tuple(taken)}: these must have as many rows and "
            "columns, and more channels"
        )
    return made[0]

"""Squeezes, which turn blocks of an image's pixels into channels."""

from collections.abc import Callable, Sequence

from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.options import checked_int
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.image.shape import image_shape


class Squeeze(FlowTransform):
    r"""The layer whose base end has the blocks of r x r pixels of an image as channels (Dinh et al. 2017,
    arXiv:1605.08803).

    .. math:: z_{c r^2 + a r + b,\, i,\, j} = x_{c,\, r i + a,\, r j + b}, \qquad 0 \le a, b < r

    From data to base it squeezes images, so that layers next to the base see fewer places with more channels; from base
    to data it takes the blocks apart again, and so does ``t.inv`` the other way round. It has no parameters, and its
    log-determinant is zero.

    Args:
        shape: the shape (C, H, W) of x.
        factor: r, a divisor of H and W.

    Shapes: z is ``(..., C * factor**2, H / factor, W / factor)``, x is ``(..., C, H, W)``.

    Raises:
        OptionError: if the shape is not that of an image, or the height or the width is no multiple of the factor.

    Example:
        >>> t = Squeeze((1, 2, 4))
        >>> x = torch.arange(8.0).reshape(1, 2, 4)
        >>> t.inv(x).shape, t.inv(x)[:, 0, 0]
        (torch.Size([4, 1, 2]), tensor([0., 1., 4., 5.]))
    """

    def __init__(self, shape: Sequence[int], factor: int = 2) -> None:
        channels, height, width = image_shape(shape, "Squeeze")
        self.factor = checked_int("factor", factor)
        if height % factor or width % factor:
            raise OptionError(
                f"Squeeze cannot divide images of shape {(channels, height, width)} into blocks of {factor} x {factor} "
                f"pixels: their height and width must be multiples of {factor}; pad the images"
            )
        super().__init__((channels, height, width), base_dim=(channels * factor**2, height // factor, width // factor))

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return _in_order(self._taken_apart, z), z.new_zeros(z.shape[:-3])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return _in_order(self._squeezed, x), x.new_zeros(x.shape[:-3])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return *self._forward_and_ladj(z, context), _in_order(self._taken_apart, score)

    def _squeezed(self, x: Tensor, first: int) -> Tensor:
        """Return the squeezed image whose channels are at the axis ``first``."""
        r = self.factor
        blocks = x.unflatten(first + 2, (-1, r)).unflatten(first + 1, (-1, r))  # (C, H / r, r, W / r, r)
        return blocks.movedim((first + 2, first + 4), (first + 1, first + 2)).flatten(first, first + 2)

    def _taken_apart(self, z: Tensor, first: int) -> Tensor:
        """Return the image whose blocks are the channels at the axis ``first``."""
        # Torch's own pixel_shuffle leaves an empty batch as it is.
        blocks = z.unflatten(first, (self.event_shape[0], self.factor, self.factor))
        blocks = blocks.movedim((first + 1, first + 2), (first + 2, first + 4))
        return blocks.flatten(first + 3, first + 4).flatten(first + 1, first + 2)


def _in_order(function: Callable[[Tensor, int], Tensor], images: Tensor) -> Tensor:
    """Call a function of images ``(..., C, H, W)`` so that the batch stays last in memory if it is."""
    num_axes = images.dim() - 3
    if not num_axes or images.stride(num_axes - 1) > images.stride(num_axes):
        return function(images, num_axes)
    batch, last = tuple(range(num_axes)), tuple(range(-num_axes, 0))
    return function(images.movedim(batch, last), 0).movedim(last, batch)

"""Emerging convolutions: invertible convolutions made of two autoregressive ones."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.options import as_int
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.image.causal_solve import solve_causal
from pyroflows.transforms.image.shape import image_shape
from pyroflows.transforms.linear.lu import lu_factors, lu_inverse
from pyroflows.transforms.linear.matrix_parameters import MatrixParameters
from pyroflows.transforms.linear.positive_diagonal import positive_diagonal


class EmergingConv(FlowTransform):
    r"""An invertible d x d convolution, as two masked ones in opposite orders (Hoogeboom et al. 2019,
    arXiv:1901.11137, section 3.1).

    From data to base it is :math:`z = (I + B)\, L U\, (I + A)\, x`. With :math:`k = (d + 1) / 2`, a k x k convolution
    A reads the pixels above and to the left of each pixel, and B those below and to the right,

    .. math:: (A x)_{ij} = \sum_{(a, b) \ne (0, 0)} A_{ab}\, x_{i-a,\, j-b}, \qquad
        (B x)_{ij} = \sum_{(a, b) \ne (0, 0)} B_{ab}\, x_{i+a,\, j+b}, \qquad 0 \le a, b < k,

    where images are zero outside of their borders. Together they read exactly the d x d pixels around each pixel. The
    triangular matrices L and U, as those of :class:`~pyroflows.transforms.LU`, mix the channels of a pixel: the paper
    has them as the central taps of the two convolutions. A and B start at zero, and L and U at I.

    The inverse of an autoregressive convolution can grow exponentially with H + W, and rounding errors with it. So the
    taps of A and of B come from parameters R as :math:`R / (1 + \sum |R|)`, with the sum over all taps that give one
    channel. Since the sizes of these taps sum to less than one, the inverses of :math:`I + A` and :math:`I + B` enlarge
    an image's largest value by at most the factor :math:`1 + \max \sum |R|`, whatever H and W are.

    Both Jacobians, of :math:`I + A` and :math:`I + B`, are triangular with ones on their diagonals, in opposite orders
    of the pixels. So the log-determinant of data to base is :math:`H W \sum_c \log u_c`.

    From data to base the layer is parallel, two convolutions. From base to data it takes H + W - 1 steps for each of
    the two, one for each anti-diagonal of the image, whose pixels are found together.

    Args:
        shape: the event shape ``(C, H, W)``.
        kernel_size: the odd number d; 1 gives a 1 x 1 convolution.
        context_dim: size of the context that the convolutions depend on, 0 for none.

    Shapes: z and x are ``(..., C, H, W)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if the shape is not that of an image, or ``kernel_size`` is not a positive odd number.

    Example:
        >>> t = EmergingConv((3, 8, 6))
        >>> x = torch.randn(5, 3, 8, 6)
        >>> t.inv(x).shape, torch.allclose(t(t.inv(x)), x, atol=1e-5)
        (torch.Size([5, 3, 8, 6]), True)
    """

    def __init__(self, shape: Sequence[int], kernel_size: int = 3, context_dim: int = 0) -> None:
        super().__init__(image_shape(shape, "EmergingConv"), context_dim)
        size = as_int(kernel_size)
        if size is None or size < 1 or size % 2 == 0:
            raise OptionError(
                f"EmergingConv needs an odd kernel_size, since its pixels lie around a central one, got {kernel_size!r}"
            )
        self.kernel_size = size
        self.num_taps = (size + 1) ** 2 // 4 - 1
        channels = self.event_shape[0]
        # The first matrix holds L and U, and the others the taps of A and then of B, each by the order of a
        # convolution's weight, from the farthest pixel to the nearest one, before they are bounded.
        self.matrices_of = MatrixParameters(torch.zeros(1 + 2 * self.num_taps, channels, channels), context_dim)

    def _matrices(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the matrix that holds L and U, and the taps of A and of B."""
        raw = self.matrices_of(context)
        a, b = _bounded(raw[..., 1 : 1 + self.num_taps, :, :]), _bounded(raw[..., 1 + self.num_taps :, :, :])
        return raw[..., 0, :, :], a, b

    def _ladj(self, scale: Tensor, images: Tensor) -> Tensor:
        """Return the log-determinant from data to base from the diagonal of U."""
        return (self.event_shape[1:].numel() * scale.log().sum(-1)).expand(images.shape[:-3])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        core, a, b = self._matrices(context)
        lower, upper, scale = lu_factors(core)
        center = (lower @ upper)[..., None, :, :]
        z = self._convolved(self._convolved(x, center @ _with_center(a)), _with_center(b), is_turned=True)
        return z, self._ladj(scale, x)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        core, a, b = self._matrices(context)
        scale = positive_diagonal(core)
        return self._solved(z, lu_inverse(core, scale), a, b), -self._ladj(scale, z)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        """The map is linear, so the score is multiplied by the transpose of the map from data to base."""
        core, a, b = self._matrices(context)
        lower, upper, scale = lu_factors(core)
        with torch.no_grad():
            center = (lower @ upper)[..., None, :, :]
            score = self._convolved(score, _with_center(b).mT)
            score = self._convolved(score, (center @ _with_center(a)).mT, is_turned=True)
        return self._solved(z, lu_inverse(core, scale), a, b), -self._ladj(scale, z), score

    def _convolved(self, x: Tensor, taps: Tensor, is_turned: bool = False) -> Tensor:
        """Return the convolution with these taps, the central one last; turned, it reads below and to the right."""
        size = math.isqrt(taps.shape[-3])
        margin = (0, size - 1, 0, size - 1) if is_turned else (size - 1, 0, size - 1, 0)
        weight = (taps.flip(-3) if is_turned else taps).movedim(-3, -1)
        images = F.pad(x.reshape(-1, *self.event_shape), margin)
        if taps.dim() == 3:
            return F.conv2d(images, weight.unflatten(-1, (size, size))).reshape(x.shape)
        # Each image has its own taps.
        weight = weight.flatten(-2).expand(*x.shape[:-3], -1, -1).flatten(0, -3)
        return (weight @ F.unfold(images, size)).reshape(x.shape)

    def _solved(self, z: Tensor, center: Tensor, a: Tensor, b: Tensor) -> Tensor:
        r"""Return :math:`(I + A)^{-1} U^{-1} L^{-1} (I + B)^{-1} z`, where ``center`` is :math:`U^{-1} L^{-1}`."""
        batch_shape, is_shared = z.shape[:-3], a.dim() == 3
        # There is no triangular solve in half precision.
        dtype = torch.promote_types(z.dtype, torch.float32)
        # Images that share their matrices are one group, whose images stand in the last axis.
        rows = z.reshape(-1, self.dim).to(dtype)
        rows = rows.T.contiguous()[None] if is_shared else rows[..., None]
        center, a, b = (
            value[None] if is_shared else value.expand(*batch_shape, *value.shape[-num_axes:]).flatten(0, -1 - num_axes)
            for value, num_axes in ((center.to(dtype), 2), (a.to(dtype), 3), (b.to(dtype), 3))
        )
        images = rows.unflatten(1, self.event_shape)
        y = solve_causal(images.flip(2, 3), b).flip(2, 3).flatten(2)
        # The matrices are small, and pixels are many: one product is several times as fast as solves for the pixels.
        x = solve_causal((center @ y).reshape(images.shape), a).flatten(1, 3)
        return (x[0].T if is_shared else x).reshape(z.shape).to(z.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel_size={self.kernel_size}"


def _bounded(raw: Tensor) -> Tensor:
    r"""Return taps ``(..., k^2 - 1, C, C)`` whose sizes sum to less than one for each channel that they give."""
    return raw / (1 + raw.abs().sum((-3, -1), keepdim=True))


def _with_center(taps: Tensor) -> Tensor:
    """Return taps ``(..., k^2 - 1, C, C)`` with the identity as the central one."""
    channels = taps.shape[-1]
    center = torch.eye(channels, dtype=taps.dtype, device=taps.device)
    return torch.cat([taps, center.expand(*taps.shape[:-3], 1, channels, channels)], -3)

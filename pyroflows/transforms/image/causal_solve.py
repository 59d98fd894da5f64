"""The solve of a causal convolution for its input, along the anti-diagonals of the image."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.compiling.eager import is_transformed
from pyroflows.nets.gradients import is_batch


def solve_causal(y: Tensor, taps: Tensor) -> Tensor:
    r"""Return the x with

    .. math:: x_{ij} + \sum_{(a, b) \ne (0, 0)} K_{ab}\, x_{i-a,\, j-b} = y_{ij}, \qquad 0 \le a, b < k,

    where x is zero outside of the image.

    A pixel depends on pixels of earlier anti-diagonals :math:`s = i + j` only. All pixels of one anti-diagonal are
    found together, by one product of matrices, so that an image takes H + W - 1 steps. Under transformations of
    ``torch.func`` and in recorded programs, the fixed-point iteration :math:`x \leftarrow y - K * x` takes their place:
    it finds the same x, one anti-diagonal in each of H + W - 1 convolutions of the whole image.

    Args:
        y: ``(G, C, H, W, N)``, where the N images of each group share one kernel.
        taps: the matrices K of each group, ``(G, k^2 - 1, C, C)``, in the order of a convolution's weight: the last one
            has (a, b) = (0, 1), the first one (k - 1, k - 1).

    Example:
        >>> y, taps = torch.ones(1, 1, 2, 3, 1), torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
        >>> solve_causal(y, taps).flatten(1, 2)[0, ..., 0]
        tensor([[1., 0., 1.],
                [1., 0., 1.]])
    """
    if taps.shape[1] == 0 or y.numel() == 0:
        return y
    # A batch of gradients, by is_grads_batched=True, is another kind of transformation.
    if is_transformed() or is_batch(y):
        return _iterated(y, taps)
    return _Solve.apply(y, taps)


def offsets(num_taps: int) -> list[tuple[int, int]]:
    """Return the (a, b) of each tap.

    Example:
        >>> offsets(3)
        [(1, 1), (1, 0), (0, 1)]
    """
    size = math.isqrt(num_taps + 1)
    return [divmod(index, size) for index in range(num_taps, 0, -1)]


class _Solve(torch.autograd.Function):
    r"""The solve and its gradient, by the solve of the transposed system.

    With :math:`A x = y`, the gradients are :math:`g_y = A^{-\top} g_x` and, since :math:`dA\, x = -A\, dx`,

    .. math:: g_{K_{ab}} = -\sum_{ij} (g_y)_{ij}\, x_{i-a,\, j-b}^\top.

    The transpose of a causal convolution runs from the last pixel to the first, with transposed taps. It is a causal
    convolution of the image turned by 180 degrees. Second derivatives are those of these operations.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, taps: Tensor) -> Tensor:
        x = _by_diagonals(y, taps)
        ctx.save_for_backward(x, taps)
        return x

    @staticmethod
    def backward(ctx: Any, g_x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, taps = ctx.saved_tensors
        g_y = solve_causal(g_x.flip(2, 3), taps.mT).flip(2, 3)
        if not ctx.needs_input_grad[1]:
            return g_y, None
        return g_y, -torch.stack([_product(g_y, x, a, b) for a, b in offsets(taps.shape[1])], 1)


def _product(g: Tensor, x: Tensor, a: int, b: int) -> Tensor:
    """Return the sum of :math:`g_{ij} x_{i-a, j-b}^T` over pixels and images, a matrix for each group."""
    num_groups, channels, height, width, num_images = x.shape
    size = max(height - a, 0) * max(width - b, 0) * num_images
    g = g[:, :, a:, b:].reshape(num_groups, channels, size)
    x = x[:, :, : max(height - a, 0), : max(width - b, 0)].reshape(num_groups, channels, size)
    return g @ x.mT


def _by_diagonals(y: Tensor, taps: Tensor) -> Tensor:
    """Return the solution, one anti-diagonal after the other.

    Memory holds the image, with k - 1 rows of zeros above it and as many columns to its left, as a block of C rows for
    each anti-diagonal. The columns of a block are the image rows (and in each the images of the group). So what the
    pixels of an anti-diagonal read in the image rows that lie a above their own is one slice of neighbouring blocks.
    """
    num_groups, channels, height, width, num_images = y.shape
    size = math.isqrt(taps.shape[1] + 1)
    num_above, num_before, num_diagonals = size - 1, 2 * size - 2, height + width - 1
    blocks = y.new_empty(num_groups, num_before + num_diagonals, channels, (num_above + height) * num_images)
    per_group, per_diagonal, per_channel, _ = blocks.stride()
    # Nothing reads the rest of the memory.
    padded = blocks.as_strided(
        (num_groups, channels, num_above + height, num_above + width, num_images),
        (per_group, per_channel, per_diagonal + num_images, per_diagonal, 1),
    )
    padded[:, :, :num_above] = 0
    padded[:, :, :, :num_above] = 0
    image = padded[:, :, num_above:, num_above:]
    image.copy_(y)
    # A product of two matrices takes less time to start than a batch of one, and a view by strides less than a slice.
    batch, strides = ((num_groups,), (per_group, per_channel, 1)) if num_groups > 1 else ((), (per_channel, 1))
    weights = taps.transpose(1, 2).reshape(*batch, channels, -1)
    subtract_product = partial(torch.baddbmm if num_groups > 1 else torch.addmm, alpha=-1)
    # The taps of each shift a, the largest one first, and how many places before a pixel they start to read.
    by_shift = [
        (weight, weight.shape[-1], (a + num_above) * per_diagonal + a * num_images)
        for a, weight in zip(range(num_above, -1, -1), weights.split(size * channels, -1), strict=True)
    ]
    for s in range(num_diagonals):
        first, last = max(0, s - width + 1), min(height, s + 1)
        length = (last - first) * num_images
        here = (s + num_before) * per_diagonal + (first + num_above) * num_images
        x = blocks.as_strided((*batch, channels, length), strides, here)
        for weight, num_rows, distance in by_shift:
            before = blocks.as_strided((*batch, num_rows, length), strides, here - distance)
            subtract_product(x, weight, before, out=x)
    return image.contiguous()


def _iterated(y: Tensor, taps: Tensor) -> Tensor:
    """Return the solution by fixed-point iteration, in operations that can be recorded and batched."""
    num_groups, channels, height, width, num_images = y.shape
    size = math.isqrt(taps.shape[1] + 1)
    weight = F.pad(taps, (0, 0, 0, 0, 0, 1)).permute(0, 2, 3, 1)  # with a zero as the central tap
    weight = weight.reshape(num_groups * channels, channels, size, size)
    y = y.permute(4, 0, 1, 2, 3).reshape(num_images, num_groups * channels, height, width)
    x = y
    for _ in range(height + width - 2):
        x = y - F.conv2d(F.pad(x, (size - 1, 0, size - 1, 0)), weight, groups=num_groups)
    return x.reshape(num_images, num_groups, channels, height, width).permute(1, 2, 3, 4, 0)

"""Upper bounds of the norms of matrices and convolutions, and weights scaled down to a bound."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyroflows.compiling.eager import is_transformed
from pyroflows.nets.gradients import is_batch, recorded_gradients
from pyroflows.nets.products import product

# How far above the norm of a matrix its bound may lie, relative to it.
_SLACK = 0.005
# How many frequencies along an axis suffice for a convolution, for each place that its taps reach to one side.
_FREQUENCIES = 20


def norm_bound(matrix: Tensor) -> Tensor:
    r"""Return an upper bound of the spectral norm, the largest singular value, at most 0.5 % above it.

    The bound is the Schatten norm of an order p that follows from the number r of singular values,

    .. math:: \|V\| \le \|V\|_{S_p} = \Big(\sum_i \sigma_i^p\Big)^{1/p} \le r^{1/p} \|V\|, \qquad
        \|V\|_{S_p}^p = \operatorname{tr} G^{2^j} V V^H, \quad G = V V^H, \quad p = 2^{j + 1} + 2,

    which j squarings give (Delattre et al. 2023, arXiv:2305.16173). Unlike a power iteration it has no state, bounds
    the norm from above, and has a gradient where singular values coincide. That of a zero matrix is zero.

    Args:
        matrix: ``(..., m, n)``, real or complex, of any magnitude.

    Shapes: the bound is real, ``(...)``.

    Example:
        >>> norm_bound(torch.diag(torch.tensor([3.0, 1.0])))
        tensor(3.)
    """
    if is_transformed():
        return _recorded_bound(matrix)
    return _Bound.apply(matrix)


def conv_norm_bound(kernel: Tensor, size: Sequence[int]) -> Tensor:
    r"""Return an upper bound of the operator norm of a convolution of images with zeros beyond their borders.

    Let the taps t of the kernel :math:`K_t` reach d places to each side along an axis of n places. A torus of
    :math:`n + d` places, on which an image and zeros lie, convolves it in the same way. So the map is a part of the
    convolution on the torus, whose norm is that of the largest of its symbols, one for each frequency,

    .. math:: F(\theta) = \sum_t K_t e^{i \theta^\top t}, \qquad \theta = 2 \pi k / (n + d).

    Each is bounded as in :func:`norm_bound`. On large images N = 20 d frequencies along an axis stand for all, and the
    bound is multiplied by :math:`1 / \cos(\pi d / N)`, which is 1.0125. For where F has its largest norm M, of singular
    vectors u and v, the trigonometric polynomial :math:`\operatorname{Re} u^H F(\theta)\, v` of degree d has its
    maximum M over the axis, hence is at least :math:`M \cos(d \delta)` at a distance :math:`\delta \le \pi / d` (M.
    Riesz), and a frequency of the grid is within :math:`\pi / N`. The axes follow one after the other.

    Borders make the norm smaller than this, by an amount that decreases as :math:`(d / n)^2`. For random kernels with
    three taps along two axes it is about 12 % of the norm at 4 x 4 places, 4 % at 8 x 8 and 1 % at 16 x 16. Where each
    symbol is a large matrix, such as 64 x 64, the bound costs as much as convolving some hundreds of images.

    Args:
        kernel: ``(out, in, *taps)``, real, with odd numbers of taps.
        size: the number of places along each axis.

    Shapes: the bound is ``()``.

    Example:
        >>> conv_norm_bound(torch.tensor([[[1.0, 2.0, 1.0]]]), (10,))
        tensor(4.)
    """
    reaches = [min(taps // 2, n - 1) for taps, n in zip(kernel.shape[2:], size, strict=True)]
    for axis, reach in enumerate(reaches, 2):  # Taps farther away than an image is long meet zeros only.
        kernel = kernel.narrow(axis, kernel.shape[axis] // 2 - reach, 2 * reach + 1)
    if not any(reaches):
        return norm_bound(kernel.flatten(1))
    counts = [min(n + reach, max(1, _FREQUENCIES * reach)) for n, reach in zip(size, reaches, strict=True)]
    correction = 1.0
    for n, reach, count in zip(size, reaches, counts, strict=True):
        correction /= math.cos(math.pi * reach / count) if count < n + reach else 1.0
    waves = _waves(kernel, reaches, counts)
    bound = _recorded_conv_bound(kernel, waves) if is_transformed() else _ConvBound.apply(kernel, waves)
    return bound * correction if correction > 1 else bound


def normalized_conv(kernel: Tensor, size: Sequence[int], bound: float) -> Tensor:
    """Return a kernel scaled down so that its convolution has an operator norm of at most a bound.

    Args:
        kernel: ``(out, in, *taps)``, as in :func:`conv_norm_bound`.
        size: the number of places along each axis.
        bound: positive; a kernel whose norm is well below it remains as it is.

    Example:
        >>> normalized_conv(torch.tensor([[[1.0, 2.0, 1.0]]]), (10,), 1.0)
        tensor([[[0.2500, 0.5000, 0.2500]]])
    """
    # There is no complex arithmetic in half precision.
    norm = conv_norm_bound(kernel.to(torch.promote_types(kernel.dtype, torch.float32)), size)
    return kernel * (bound / norm.to(kernel.dtype).clamp_min(bound))


class _Schatten(NamedTuple):
    """The Schatten norms of matrices V, and what their gradients are made of."""

    norm: Tensor  # (..., 1, 1)
    largest: Tensor  # the largest real or imaginary part of V, (..., 1, 1)
    scaled: Tensor  # A = V divided by it, (..., m, n)
    power: Tensor  # a multiple of (A A^H)^(2^j), or of (A^H A)^(2^j) if V is tall, (..., r, r)
    trace: Tensor  # its inner product with A A^H or A^H A, (..., 1, 1)

    def gradient(self) -> Tensor:
        """Return the gradient of the norm, a multiple of the product of A and its power."""
        is_wide = self.scaled.shape[-2] <= self.scaled.shape[-1]
        factors = (self.power, self.scaled) if is_wide else (self.scaled, self.power)
        tiny = torch.finfo(self.norm.dtype).tiny
        return _product(*factors) / self.trace * (self.norm / self.largest.clamp_min(tiny))


def _schatten(matrix: Tensor, times: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> _Schatten:
    """Return the Schatten norms of matrices by operations that autograd records if the products do.

    Gram matrices are divided by their norms every few squarings, so that their largest eigenvalues stay in range. The
    result does not depend on these scales, hence derivatives treat them as numbers.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    norm = largest = _reals(matrix.detach()).abs().amax((-2, -1), keepdim=True)
    scaled = _divided(matrix, largest.clamp_min(tiny))
    gram = times(scaled, scaled.mH) if matrix.shape[-2] <= matrix.shape[-1] else times(scaled.mH, scaled)
    squarings = _num_squarings(gram.shape[-1])
    order = 2 ** (squarings + 1) + 2
    # The largest eigenvalue of a matrix of norm 1 is r^(-1/2) or more. After so many squarings it is a normal number
    # still, and after one fewer its square is, which the next norm needs.
    at_once = max(2, int(math.log2(-1.6 * math.log(tiny) / math.log(max(2, gram.shape[-1])))))
    power = gram
    while squarings:
        scale = torch.linalg.vector_norm(_reals(power.detach()), dim=(-2, -1), keepdim=True).clamp_min(tiny)
        norm = norm * scale ** (2**squarings / order)
        power = _divided(power, scale)
        for _ in range(squarings if squarings <= at_once else at_once - 1):
            power = times(power, power)
            squarings -= 1
    trace = _inner_product(power, gram).clamp_min(tiny)
    return _Schatten(norm * trace ** (1 / order), largest, scaled, power, trace)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of matrices whose gradients nobody records."""
    return product(a, b) if a.dim() == 2 else a @ b


def _reals(matrix: Tensor) -> Tensor:
    """Return the real and imaginary parts of a matrix side by side, since reductions of complex numbers are slow."""
    return torch.cat([matrix.real, matrix.imag], -1) if matrix.is_complex() else matrix


def _inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the real inner product of matrices, ``(..., 1, 1)``."""
    return (_reals(a) * _reals(b)).sum((-2, -1), keepdim=True)


def _divided(matrix: Tensor, scale: Tensor) -> Tensor:
    """Return a matrix divided by a real number; a complex one is multiplied, which takes a seventh of the time."""
    return matrix * scale.reciprocal() if matrix.is_complex() else matrix / scale


def _num_squarings(size: int) -> int:
    """Return the j with which the Schatten norm of so many singular values exceeds the largest by 0.5 % at most."""
    order = math.log(size) / math.log1p(_SLACK)
    return max(0, math.ceil(math.log2(max(1, order / 2 - 1))))


def _recorded_bound(matrix: Tensor) -> Tensor:
    return _schatten(matrix).norm[..., 0, 0]


class _Bound(torch.autograd.Function):
    r"""The Schatten norm with its gradient written out, which is

    .. math:: \nabla_V \|V\|_{S_p} = \frac{G^{2^j} V}{\|V\|_{S_p}^{p - 1}}
        = \|A\|_{S_p} \frac{P}{\langle A, P \rangle}

    for P, any multiple of :math:`(A A^H)^{2^j} A`, and A, one of V. Second derivatives are those of the recorded
    operations.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        parts = _schatten(matrix, _product)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(matrix, parts.gradient())
        return parts.norm[..., 0, 0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        matrix, slope = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed() or is_batch(gradient):  # the first by create_graph=True
            return recorded_gradients(_recorded_bound, [matrix], [gradient])[0]
        return slope * gradient[..., None, None]


def _waves(kernel: Tensor, reaches: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return the real and imaginary parts of the waves of all frequencies at all taps, ``(2, F, taps)``.

    Opposite frequencies have conjugate symbols, hence half of them along the last axis are left out.
    """
    exact: Any = {"dtype": torch.float64, "device": kernel.device}
    angles = torch.zeros(1, 1, **exact)
    for axis, (reach, count) in enumerate(zip(reaches, counts, strict=True), 1):
        frequencies = torch.arange(count if axis < len(counts) else count // 2 + 1, **exact)
        along = torch.outer(frequencies * (2 * math.pi / count), torch.arange(-reach, reach + 1, **exact))
        angles = (angles[:, None, :, None] + along[None, :, None, :]).flatten(2).flatten(0, 1)
    return torch.stack([angles.cos(), angles.sin()]).to(kernel.dtype)


def _symbols(kernel: Tensor, waves: Tensor) -> Tensor:
    """Return the symbols of a kernel, ``(F, out, in)``."""
    parts = waves @ kernel.flatten(2).permute(2, 0, 1).flatten(1)
    return torch.complex(*parts.unbind()).unflatten(-1, kernel.shape[:2])


def _recorded_conv_bound(kernel: Tensor, waves: Tensor) -> Tensor:
    return _recorded_bound(_symbols(kernel, waves)).amax()


class _ConvBound(torch.autograd.Function):
    r"""The largest of the Schatten norms of the symbols, with its gradient written out.

    Let U be the gradient of the norm of the largest symbol, at :math:`\theta`. That by the tap t is
    :math:`\operatorname{Re} U e^{-i \theta^\top t}`. Second derivatives are those of the recorded operations.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, waves: Tensor) -> Tensor:
        parts = _schatten(_symbols(kernel, waves), _product)
        norm, index = parts.norm.flatten().max(0)
        if ctx.needs_input_grad[0]:
            largest = _Schatten(*(part.index_select(0, index.view(1)) for part in parts))
            ctx.save_for_backward(kernel, waves, largest.gradient(), waves.index_select(1, index.view(1)))
        return norm

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        kernel, waves, slope, wave = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed() or is_batch(gradient):  # the first by create_graph=True
            return recorded_gradients(lambda k: _recorded_conv_bound(k, waves), [kernel], [gradient])[0], None
        parts = torch.view_as_real(slope[0]) * gradient  # (out, in, 2)
        return (parts @ wave[:, 0]).view_as(kernel), None

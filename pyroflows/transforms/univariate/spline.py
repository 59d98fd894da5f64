"""The monotone rational-quadratic spline."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.compiling.eager import is_transformed
from pyroflows.errors import OptionError
from pyroflows.transforms.univariate.base import Pair

MIN_WIDTH = 1e-3  # of a bin, in units of the whole interval
MIN_DERIVATIVE = 1e-3
_SHIFT = math.log(math.expm1(1 - MIN_DERIVATIVE))  # makes the derivative of a raw 0 one


class Spline:
    r"""Monotone rational-quadratic spline on :math:`[-B, B]`, the identity outside (Durkan et al. 2019,
    arXiv:1906.04032).

    Between knots :math:`(x_k, y_k)` and :math:`(x_{k+1}, y_{k+1})` with derivatives :math:`d_k, d_{k+1}`, width w,
    height h, slope :math:`s = h / w` and :math:`\xi = (z - x_k) / w`,

    .. math:: x = y_k + \frac{h (s \xi^2 + d_k \xi (1 - \xi))}{s + (d_k + d_{k+1} - 2 s) \xi (1 - \xi)}.

    The parameters are unnormalised widths and heights, K each, and K - 1 derivatives at the inner knots; at the bounds
    the derivative is 1.

    Args:
        bins: K, the number of bins, 2 or more.
        bound: B > 0.

    Raises:
        OptionError: if ``bins`` or ``bound`` is outside its range.

    Example:
        >>> spline = Spline(bins=4, bound=3.0)
        >>> z, theta = torch.linspace(-4, 4, 9), torch.randn(9, spline.num_params)
        >>> x, ladj = spline.forward_and_ladj(z, theta)
        >>> torch.allclose(spline.inverse_and_ladj(x, theta)[0], z, atol=1e-3), (x[0] == z[0]).item()
        (True, True)
    """

    def __init__(self, bins: int = 8, bound: float = 5.0) -> None:
        if not 2 <= bins < 1 / MIN_WIDTH or not 0 < bound < math.inf:
            raise OptionError(f"a spline needs 2 to 999 bins and a positive finite bound, got {bins} and {bound}")
        self.bins = bins
        self.bound = bound
        self.num_params = 3 * bins - 1

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        return self._map(_forward, z, theta)

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        return self._map(_inverse, x, theta)

    def __repr__(self) -> str:
        return f"Spline(bins={self.bins}, bound={self.bound})"

    def _map(self, direction: "Direction", value: Tensor, theta: Tensor) -> Pair:
        if theta.shape[:-1] != value.shape:
            theta = theta.expand(*value.shape, self.num_params)
        # Function transforms differentiate the formula itself.
        if not is_transformed() or torch.compiler.is_compiling():
            return _Analytic.apply(direction, value, theta, self.bins, self.bound)
        return _evaluate(direction, value, theta, self.bins, self.bound)[0]


class _Bin(NamedTuple):
    """What a value needs to know of its bin, each of the value's shape, and how it came out of theta."""

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    d0: Tensor
    d1: Tensor
    raw_derivatives: Tensor  # (2, ...), before the softplus
    shares: Tensor  # (2, K, ...), the normalised widths and heights of all bins
    share: Tensor  # (2, ...), those of the bin
    below: Tensor  # (2, ...), the sums of those of the bins before it
    number: Tensor  # (1, ...), from 0 to K - 1


class _Point(NamedTuple):
    """Where in its bin a value lies, and the parts of the formula there."""

    xi: Tensor
    slope: Tensor
    ratio: Tensor
    numerator: Tensor
    denominator: Tensor


Direction = Callable[[Tensor, _Bin], tuple[Tensor, Tensor, _Point]]


def _evaluate(
    direction: Direction, value: Tensor, theta: Tensor, bins: int, bound: float
) -> tuple[Pair, Tensor, _Bin, _Point]:
    inside = value.abs() < bound
    # What is computed outside must stay finite, so that it gives a zero, and no NaN, to the gradient.
    clamped = value.clamp(-bound, bound)
    bin = _bin_of(clamped, theta, bins, bound, axis=0 if direction is _forward else 1)
    result, ladj, point = direction(clamped, bin)
    return (torch.where(inside, result, value), ladj * inside), inside, bin, point


def _bin_of(value: Tensor, theta: Tensor, bins: int, bound: float, axis: int) -> _Bin:
    # Parameters first: what runs over them then vectorises over the values. Large tensors, of all bins, cost most.
    raw = theta.movedim(-1, 0)
    shares = torch.softmax(raw[: 2 * bins].unflatten(0, (2, bins)), 1)
    sums = shares.cumsum(1)
    smallest, rest = 2 * bound * MIN_WIDTH, 2 * bound * (1 - bins * MIN_WIDTH)
    offsets = torch.linspace(
        smallest - bound, (bins - 1) * smallest - bound, bins - 1, dtype=value.dtype, device=value.device
    )
    inner_knots = torch.add(offsets.view(-1, *[1] * value.dim()), sums[axis, :-1], alpha=rest)
    number = (value >= inner_knots).sum(0, keepdim=True)
    both = number.expand(2, *number.shape)
    share = shares.gather(1, both)[:, 0]
    below = sums.gather(1, both)[:, 0] - share
    width, height = share * rest + smallest
    left, bottom = torch.add(number.to(value.dtype) * smallest - bound, below, alpha=rest)
    # At the bounds the derivative is 1, which belongs to a raw 0.
    zeros = torch.zeros_like(raw[:1])
    raw_derivatives = torch.cat([zeros, raw[2 * bins :], zeros]).gather(0, torch.cat([number, number + 1])) + _SHIFT
    d0, d1 = F.softplus(raw_derivatives) + MIN_DERIVATIVE
    return _Bin(left, width, bottom, height, d0, d1, raw_derivatives, shares, share, below, number)


def _forward(z: Tensor, bin: _Bin) -> tuple[Tensor, Tensor, _Point]:
    """The image of z, and the log-derivative."""
    point = _point_at(((z - bin.left) / bin.width).clamp(0, 1), bin.height / bin.width, bin)
    return torch.addcmul(bin.bottom, bin.height, point.ratio), _log_derivative(point), point


def _inverse(x: Tensor, bin: _Bin) -> tuple[Tensor, Tensor, _Point]:
    """The preimage of x, where xi is the root of a xi^2 + b xi + c (eq. 6 to 8), and the inverse's log-derivative."""
    slope = bin.height / bin.width
    rise = x - bin.bottom
    bend = bin.d0 + bin.d1 - 2 * slope
    a = bin.height * (slope - bin.d0) + rise * bend
    b = bin.height * bin.d0 - rise * bend
    minus_c = slope * rise
    # Rounding must not take the discriminant below 0, nor its root to where that has no derivative.
    q = b.abs() + (b**2 + 4 * a * minus_c).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    # The two forms of the root: either cancels where b has the wrong sign.
    negative = b < 0
    xi = (torch.where(negative, q, 2 * minus_c) / torch.where(negative, 2 * a, q)).clamp(0, 1)
    point = _point_at(xi, slope, bin)
    return torch.addcmul(bin.left, bin.width, xi), -_log_derivative(point), point


def _point_at(xi: Tensor, slope: Tensor, bin: _Bin) -> _Point:
    """With x = bottom + height * ratio, and dx/dz = numerator * (slope / denominator)^2."""
    xi_squared = xi * xi
    eta = xi - xi_squared
    denominator = torch.addcmul(slope, torch.sub(bin.d0 + bin.d1, slope, alpha=2), eta)
    ratio = torch.addcmul(slope * xi_squared, bin.d0, eta) / denominator
    numerator = torch.addcmul(bin.d1 * xi_squared, slope, eta, value=2)
    numerator = torch.addcmul(numerator, bin.d0, (1 - xi) ** 2)
    return _Point(xi, slope, ratio, numerator, denominator)


def _log_derivative(point: _Point) -> Tensor:
    return torch.log(point.numerator * (point.slope / point.denominator) ** 2)


class _Analytic(torch.autograd.Function):
    """The map with the derivative of its formula written out, which costs a third of what recording it does."""

    @staticmethod
    def forward(ctx: Any, direction: Direction, value: Tensor, theta: Tensor, bins: int, bound: float) -> Pair:
        (result, ladj), inside, bin, point = _evaluate(direction, value, theta, bins, bound)
        ctx.save_for_backward(value, theta, inside, ladj, *bin, *point)
        ctx.arguments = direction, bins, bound
        return result, ladj

    @staticmethod
    def backward(ctx: Any, g_result: Tensor, g_ladj: Tensor) -> tuple[Any, ...]:
        value, theta, inside, ladj, *fields = ctx.saved_tensors
        direction, bins, bound = ctx.arguments
        if torch.is_grad_enabled():  # second derivatives are asked for
            outputs, *_ = _evaluate(direction, value, theta, bins, bound)
            gradients = torch.autograd.grad(outputs, (value, theta), (g_result, g_ladj), create_graph=True)
            return None, *gradients, None, None
        bin, point = _Bin(*fields[: len(_Bin._fields)]), _Point(*fields[len(_Bin._fields) :])
        g_outside = g_result
        g_result, g_ladj = g_result * inside, g_ladj * inside

        xi, slope, d0, d1, ratio = point.xi, point.slope, bin.d0, bin.d1, point.ratio
        over_numerator, over_denominator = point.numerator.reciprocal(), point.denominator.reciprocal()
        rest_xi = 1 - xi
        eta, twist = xi * rest_xi, rest_xi - xi
        bend = torch.sub(d0 + d1, slope, alpha=2)
        # Half of the derivative of the log-derivative by xi.
        ladj_xi = torch.addcmul(torch.addcmul(d1 * xi, slope, twist), d0, rest_xi, value=-1) * over_numerator
        ladj_xi = torch.addcmul(ladj_xi, bend * twist, over_denominator, value=-1)
        if direction is _inverse:
            # With u = T^-1(x): du = (dx - dT) / T', so the gradient of theta is that of the forward direction with
            # these two in place of the gradients of x and of the log-derivative.
            g_ladj = -g_ladj
            g_result = -(g_result + 2 * g_ladj * ladj_xi / bin.width) * torch.exp(ladj)
        g_rise = g_result * bin.height
        g_ratio = g_rise * over_denominator
        twice_g_ladj = 2 * g_ladj
        g_numerator, g_denominator = g_ladj * over_numerator, twice_g_ladj * over_denominator
        g_denominator = torch.addcmul(g_denominator, g_ratio, ratio)  # up to its sign
        g_xi = g_ratio * slope * point.numerator * over_denominator
        g_xi = torch.addcmul(g_xi, twice_g_ladj, ladj_xi)
        xi_squared = xi * xi
        g_slope = torch.addcmul(g_ratio * xi_squared, g_denominator, 2 * eta - 1)
        g_slope = torch.addcmul(torch.addcdiv(g_slope, twice_g_ladj, slope), g_numerator, eta, value=2)
        g_d0 = torch.addcmul((g_ratio - g_denominator) * eta, g_numerator, rest_xi * rest_xi)
        g_d1 = torch.addcmul(g_numerator * xi_squared, g_denominator, eta, value=-1)
        g_z, g_slope = g_xi / bin.width, g_slope / bin.width
        g_width = -torch.addcmul(xi * g_z, slope, g_slope)
        g_height = torch.addcmul(g_slope, g_result, ratio)

        starts, sizes = torch.stack([-g_z, g_result]), torch.stack([g_width, g_height])
        g_theta = _gradient_of_theta(bin, starts, sizes, torch.stack([g_d0, g_d1]), bins, bound)
        g_value = g_z if direction is _forward else -g_result
        return None, torch.where(inside, g_value, g_outside), g_theta, None, None


def _gradient_of_theta(bin: _Bin, g_starts: Tensor, g_sizes: Tensor, g_ds: Tensor, bins: int, bound: float) -> Tensor:
    """From the gradients of left end and bottom, of width and height, and of both derivatives, each ``(2, ...)``."""
    rest = 2 * bound * (1 - bins * MIN_WIDTH)
    # All bins below the value's own add to its start. sum_k share_k g_k, for the softmax, needs no sum over bins.
    g_starts, g_sizes = rest * g_starts, rest * g_sizes
    mean = torch.addcmul(bin.below * g_starts, bin.share, g_sizes)
    numbers = torch.arange(bins, dtype=mean.dtype, device=mean.device).view(-1, *[1] * (mean.dim() - 1))
    is_below = (bin.number - numbers).clamp_(0, 1)
    g_shares = torch.addcmul(-mean[:, None], is_below, g_starts[:, None])
    g_shares.scatter_(1, bin.number.expand(2, *bin.number.shape), (g_sizes - mean)[:, None])
    g_shares *= bin.shares
    g_derivatives = mean.new_zeros(bins + 1, *mean.shape[1:])
    ends = torch.cat([bin.number, bin.number + 1])
    g_derivatives.scatter_(0, ends, torch.sigmoid(bin.raw_derivatives) * g_ds)
    # Reshaped, not flattened, so that batches of gradients, as for a Jacobian, work.
    return torch.cat([g_shares.reshape(2 * bins, *mean.shape[1:]), g_derivatives[1:-1]]).movedim(0, -1)

"""The monotone rational-quadratic spline."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.transforms.root import runs_in_python
from pyroflows.transforms.univariate.base import Pair

MIN_WIDTH = 1e-3  # of a bin, in units of the whole interval
MIN_DERIVATIVE = 1e-3
SOFTPLUS_OF_ONE = math.log(math.e - 1)  # where softplus is 1


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

    Example:
        >>> x, ladj = Spline(bins=4).forward_and_ladj(torch.tensor(2.0), torch.zeros(11))
        >>> x, ladj
        (tensor(2.0000), tensor(0.))
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
        theta = theta.expand(*value.shape, self.num_params)
        # Function transforms differentiate the formula itself.
        if runs_in_python() or torch.compiler.is_compiling():
            return _Analytic.apply(direction, value, theta, self.bins, self.bound)
        return _evaluate(direction, value, theta, self.bins, self.bound)[:2]


class _Bin(NamedTuple):
    """What a value needs to know of its bin, each of the value's shape, and how it came out of theta."""

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    d0: Tensor
    d1: Tensor
    raw_derivatives: Tensor  # (2, ...)
    shares: Tensor  # (2, K, ...), the normalised widths and heights
    number: Tensor  # (1, ...), from 0 to K - 1


Direction = Callable[[Tensor, _Bin], tuple[Tensor, Tensor, Tensor]]


def _evaluate(direction: Direction, value: Tensor, theta: Tensor, bins: int, bound: float) -> tuple[Any, ...]:
    inside = value.abs() < bound
    # What is computed outside must stay finite, so that it gives a zero, and no NaN, to the gradient.
    clamped = value.clamp(-bound, bound)
    bin = _bin_of(clamped, theta, bins, bound, axis=0 if direction is _forward else 1)
    result, ladj, xi = direction(clamped, bin)
    return torch.where(inside, result, value), ladj * inside, inside, bin, xi


def _bin_of(value: Tensor, theta: Tensor, bins: int, bound: float, axis: int) -> _Bin:
    # Parameters first: what runs over them then vectorises over the values. Large tensors, of all bins, cost most.
    raw = theta.movedim(-1, 0)
    shares = torch.softmax(raw[: 2 * bins].unflatten(0, (2, bins)), 1)
    sums = shares.cumsum(1)
    smallest, rest = 2 * bound * MIN_WIDTH, 2 * bound * (1 - bins * MIN_WIDTH)
    numbers = torch.arange(1, bins, dtype=value.dtype, device=value.device).view(-1, *[1] * value.dim())
    inner_knots = torch.add(smallest * numbers - bound, sums[axis, :-1], alpha=rest)
    number = (value >= inner_knots).sum(0, keepdim=True)
    both = number.expand(2, *number.shape)
    share, share_sum = shares.gather(1, both)[:, 0], sums.gather(1, both)[:, 0]
    width, height = smallest + rest * share
    left, bottom = smallest * number.to(value.dtype) + rest * (share_sum - share) - bound
    # At the bounds the derivative is 1, which belongs to a raw 0.
    zeros = torch.zeros_like(raw[:1])
    raw_derivatives = torch.cat([zeros, raw[2 * bins :], zeros]).gather(0, torch.cat([number, number + 1]))
    d0, d1 = MIN_DERIVATIVE + (1 - MIN_DERIVATIVE) * F.softplus(raw_derivatives + SOFTPLUS_OF_ONE)
    return _Bin(left, width, bottom, height, d0, d1, raw_derivatives, shares, number)


def _forward(z: Tensor, bin: _Bin) -> tuple[Tensor, Tensor, Tensor]:
    """The image of z, the log-derivative, and xi."""
    xi = ((z - bin.left) / bin.width).clamp(0, 1)
    slope = bin.height / bin.width
    eta = xi * (1 - xi)
    denominator = slope + (bin.d0 + bin.d1 - 2 * slope) * eta
    x = bin.bottom + bin.height * (slope * xi**2 + bin.d0 * eta) / denominator
    return x, _log_derivative(xi, eta, slope, denominator, bin), xi


def _inverse(x: Tensor, bin: _Bin) -> tuple[Tensor, Tensor, Tensor]:
    """The preimage of x, the log-derivative of the inverse, and xi, the root of a xi^2 + b xi + c (eq. 6 to 8)."""
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
    eta = xi * (1 - xi)
    ladj = _log_derivative(xi, eta, slope, slope + bend * eta, bin)
    return bin.left + xi * bin.width, -ladj, xi


def _log_derivative(xi: Tensor, eta: Tensor, slope: Tensor, denominator: Tensor, bin: _Bin) -> Tensor:
    numerator = bin.d1 * xi**2 + 2 * slope * eta + bin.d0 * (1 - xi) ** 2
    return 2 * torch.log(slope / denominator) + torch.log(numerator)


class _Analytic(torch.autograd.Function):
    """The map with the derivative of its formula written out, which costs a third of what recording it does."""

    @staticmethod
    def forward(ctx: Any, direction: Direction, value: Tensor, theta: Tensor, bins: int, bound: float) -> Pair:
        result, ladj, inside, bin, xi = _evaluate(direction, value, theta, bins, bound)
        ctx.save_for_backward(value, theta, inside, xi, ladj, *bin)
        ctx.arguments = direction, bins, bound
        return result, ladj

    @staticmethod
    def backward(ctx: Any, g_result: Tensor, g_ladj: Tensor) -> tuple[Any, ...]:
        value, theta, inside, xi, ladj, *fields = ctx.saved_tensors
        direction, bins, bound = ctx.arguments
        if torch.is_grad_enabled():  # second derivatives are asked for
            outputs = _evaluate(direction, value, theta, bins, bound)[:2]
            gradients = torch.autograd.grad(outputs, (value, theta), (g_result, g_ladj), create_graph=True)
            return None, *gradients, None, None
        bin = _Bin(*fields)
        g_outside = g_result
        g_result, g_ladj = g_result * inside, g_ladj * inside

        width, height, d0, d1 = bin.width, bin.height, bin.d0, bin.d1
        slope = height / width
        one_minus_xi = 1 - xi
        eta = xi * one_minus_xi
        twist = 1 - 2 * xi
        bend = d0 + d1 - 2 * slope
        # x = bottom + height * ratio, log-derivative = 2 log slope + log numerator - 2 log denominator.
        over_denominator = 1 / (slope + bend * eta)
        ratio = (slope * xi**2 + d0 * eta) * over_denominator
        numerator = d1 * xi**2 + 2 * slope * eta + d0 * one_minus_xi**2
        over_numerator = 1 / numerator
        ratio_xi = slope * numerator * over_denominator**2
        ladj_xi = 2 * ((d1 * xi + slope * twist - d0 * one_minus_xi) * over_numerator - bend * twist * over_denominator)
        if direction is _inverse:
            # With u = T^-1(x): du = (dx - dT) / T', so the gradient of theta is that of the forward direction with
            # these two in place of the gradients of x and of the log-derivative.
            g_ladj = -g_ladj
            g_result = -(g_result + g_ladj * ladj_xi / width) * torch.exp(ladj)
        g_ratio = g_result * height * over_denominator
        g_xi = g_result * height * ratio_xi + g_ladj * ladj_xi
        two_eta = 2 * eta
        over = g_ladj * over_numerator
        less = g_ladj * 2 * over_denominator
        g_slope = g_ratio * (xi**2 - ratio * (1 - two_eta)) + g_ladj * 2 / slope + over * two_eta - less * (1 - two_eta)
        g_d0 = g_ratio * eta * (1 - ratio) + over * one_minus_xi**2 - less * eta
        g_d1 = over * xi**2 - (g_ratio * ratio + less) * eta
        g_z = g_xi / width
        g_width = -xi * g_z - g_slope * slope / width
        g_height = g_result * ratio + g_slope / width

        starts, sizes = torch.stack([-g_z, g_result]), torch.stack([g_width, g_height])
        g_theta = _gradient_of_theta(bin, starts, sizes, torch.stack([g_d0, g_d1]), bins, bound)
        g_value = g_z if direction is _forward else -g_result
        return None, torch.where(inside, g_value, g_outside), g_theta, None, None


def _gradient_of_theta(bin: _Bin, g_starts: Tensor, g_sizes: Tensor, g_ds: Tensor, bins: int, bound: float) -> Tensor:
    """From the gradients of left end and bottom, of width and height, and of both derivatives, each ``(2, ...)``."""
    rest = 2 * bound * (1 - bins * MIN_WIDTH)
    # All bins below the value's own add to its start. sum_k share_k g_k, for the softmax, needs no sum over bins.
    smallest = 2 * bound * MIN_WIDTH
    own = (torch.stack([bin.width, bin.height]) - smallest) / rest
    below = (torch.stack([bin.left, bin.bottom]) + bound - smallest * bin.number.to(bin.left.dtype)) / rest
    mean = below * g_starts + own * g_sizes
    numbers = torch.arange(bins, dtype=own.dtype, device=own.device).view(-1, *[1] * (own.dim() - 1))
    is_below = (bin.number - numbers).clamp_(0, 1)
    g_shares = torch.addcmul(-mean[:, None], is_below, g_starts[:, None])
    g_shares.scatter_(1, bin.number.expand(2, *bin.number.shape), (g_sizes - mean)[:, None])
    g_shares *= bin.shares
    g_shares *= rest
    slopes = (1 - MIN_DERIVATIVE) * torch.sigmoid(bin.raw_derivatives + SOFTPLUS_OF_ONE)
    g_derivatives = own.new_zeros(bins + 1, *own.shape[1:])
    # Not in place, and reshaped, not flattened, so that batches of gradients, as for a Jacobian, work.
    g_derivatives = g_derivatives.scatter(0, torch.cat([bin.number, bin.number + 1]), slopes * g_ds)
    return torch.cat([g_shares.reshape(2 * bins, *own.shape[1:]), g_derivatives[1:-1]]).movedim(0, -1)

"""The monotone rational-quadratic spline."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.compiling.eager import is_transformed
from pyroflows.errors import OptionError
from pyroflows.nets.gradients import recorded_gradients
from pyroflows.options import checked_int
from pyroflows.transforms.univariate.base import Pair
from pyroflows.transforms.univariate.layout import memory_order, restored

MIN_WIDTH = 1e-3  # the least width and height of a bin, in units of the whole interval
MIN_DERIVATIVE = 1e-3
_SHIFT = math.log(math.expm1(1 - MIN_DERIVATIVE))  # where the raw parameter is 0, the derivative is 1


class Spline:
    r"""The monotone rational-quadratic spline on :math:`[-B, B]`, which is the identity outside (Durkan et al. 2019,
    arXiv:1906.04032).

    Between two knots :math:`(x_k, y_k)` and :math:`(x_{k+1}, y_{k+1})` with derivatives :math:`d_k` and
    :math:`d_{k+1}` there, let w be the width and h the height of the bin, :math:`s = h / w` its slope, and
    :math:`\xi = (z - x_k) / w \in [0, 1]`. With :math:`\eta = \xi (1 - \xi)` the map and its derivative are (eq. 4, 5)

    .. math::
        x = y_k + h\, r, \quad r = \frac{s \xi^2 + d_k \eta}{q}, \quad q = s + (d_k + d_{k+1} - 2 s)\, \eta,
        \qquad
        \frac{dx}{dz} = \frac{s^2 p}{q^2}, \quad p = d_{k+1} \xi^2 + 2 s \eta + d_k (1 - \xi)^2.

    The inverse is in closed form, since r = (x - y_k) / h is a quadratic equation in :math:`\xi` (eq. 6 to 8).

    The parameters :math:`\theta` are K raw widths, K raw heights, and K - 1 raw derivatives at the inner knots. Widths
    and heights are :math:`2B(\epsilon + (1 - K \epsilon) \operatorname{softmax})`, derivatives
    :math:`\epsilon + \operatorname{softplus}`, shifted so that zero gives 1, with :math:`\epsilon = 10^{-3}`. At
    :math:`\pm B` the derivative is 1, so that dx/dz is continuous there.

    Gradients of both directions are computed by formula, not by recording the operations; the docstring of
    ``_Analytic`` in this file derives them.

    Args:
        bins: K, the number of bins, from 2 to 999.
        bound: B, positive and finite, in units of z.

    Shapes: z and x are ``(...)``, theta is ``(..., 3 K - 1)``; batch dimensions that theta lacks on the left broadcast.

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
        bins = checked_int("bins", bins, 2)
        if not bins < 1 / MIN_WIDTH or not 0 < bound < math.inf:
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
            theta = theta.expand(*value.shape, theta.shape[-1])
        # The transforms of torch.func cannot see into the analytic derivative: they differentiate the formula itself.
        if not is_transformed() or torch.compiler.is_compiling():
            return _Analytic.apply(direction, value, theta, self.bins, self.bound)
        return _evaluate(direction, value, theta, self.bins, self.bound)[0]


class _Bin(NamedTuple):
    """The bin of each value, in tensors of the value's shape, and the quantities by which theta determines it."""

    left: Tensor
    width: Tensor
    bottom: Tensor
    height: Tensor
    d0: Tensor
    d1: Tensor
    raw_derivatives: Tensor  # (2, ...), the arguments of the softplus at the two knots
    shares: Tensor  # (2, K, ...), the normalised widths and heights of all bins
    share: Tensor  # (2, ...), the normalised width and height of the bin
    below: Tensor  # (2, ...), the sums of the shares of all bins before it
    number: Tensor  # (1, ...), the number of the bin, from 0 to K - 1


class _Point(NamedTuple):
    """The place xi of each value in its bin, and s, r, p and q of the formula of :class:`Spline` there."""

    xi: Tensor
    slope: Tensor
    ratio: Tensor
    numerator: Tensor
    denominator: Tensor


Direction = Callable[[Tensor, _Bin], tuple[Tensor, Tensor, _Point]]


def _evaluate(
    direction: Direction, value: Tensor, theta: Tensor, bins: int, bound: float
) -> tuple[Pair, Tensor, _Bin, _Point]:
    """Return the map's value and log-derivative, where the value is inside the bounds, its bin and its place there."""
    inside = torch.ones_like(value, dtype=torch.bool) if _is_periodic(theta, bins) else value.abs() < bound
    # Outside the bounds the formula must stay finite, so that its gradient there is zero rather than NaN.
    clamped = value.clamp(-bound, bound)
    bin = _bin_of(clamped, theta, bins, bound, axis=0 if direction is _forward else 1)
    result, ladj, point = direction(clamped, bin)
    return (torch.where(inside, result, value), ladj * inside), inside, bin, point


def _bin_of(value: Tensor, theta: Tensor, bins: int, bound: float, axis: int) -> _Bin:
    """Return the bin of each value, found by its left end (axis 0) or by its bottom (axis 1)."""
    # Parameters come first, so that sums over them vectorise over the values. Tensors over all bins cost most.
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
    raw_derivatives = _at_all_knots(theta, bins).gather(0, torch.cat([number, number + 1])) + _SHIFT
    d0, d1 = F.softplus(raw_derivatives) + MIN_DERIVATIVE
    return _Bin(left, width, bottom, height, d0, d1, raw_derivatives, shares, share, below, number)


def _is_periodic(theta: Tensor, bins: int) -> bool:
    """Return whether the derivatives at both ends are one parameter of theta, as on the circle, rather than 1.

    All values of such a spline are inside its bounds.
    """
    return theta.shape[-1] == 3 * bins


def _at_all_knots(theta: Tensor, bins: int) -> Tensor:
    """Return the raw derivatives at all K + 1 knots, which come first."""
    raw = theta.movedim(-1, 0)[2 * bins :]
    if _is_periodic(theta, bins):
        return torch.cat([raw, raw[:1]])
    # At the bounds the derivative is 1, which a raw 0 gives.
    zeros = raw.new_zeros(1, *raw.shape[1:])
    return torch.cat([zeros, raw, zeros])


def _forward(z: Tensor, bin: _Bin) -> tuple[Tensor, Tensor, _Point]:
    """Return x, the log-derivative, and the place of z in its bin."""
    point = _point_at(((z - bin.left) / bin.width).clamp(0, 1), bin.height / bin.width, bin)
    return torch.addcmul(bin.bottom, bin.height, point.ratio), _log_derivative(point), point


def _inverse(x: Tensor, bin: _Bin) -> tuple[Tensor, Tensor, _Point]:
    """Return z, the log-derivative of the inverse, and z's place xi, the root of a xi^2 + b xi + c (eq. 6 to 8)."""
    slope = bin.height / bin.width
    rise = x - bin.bottom
    bend = bin.d0 + bin.d1 - 2 * slope
    a = bin.height * (slope - bin.d0) + rise * bend
    b = bin.height * bin.d0 - rise * bend
    minus_c = slope * rise
    # Rounding must not take the discriminant to 0 or below, where its square root has no derivative.
    q = b.abs() + (b**2 + 4 * a * minus_c).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    # There are two forms of the root; each loses digits by cancellation for one sign of b.
    negative = b < 0
    xi = (torch.where(negative, q, 2 * minus_c) / torch.where(negative, 2 * a, q)).clamp(0, 1)
    point = _point_at(xi, slope, bin)
    return torch.addcmul(bin.left, bin.width, xi), -_log_derivative(point), point


def _point_at(xi: Tensor, slope: Tensor, bin: _Bin) -> _Point:
    """Return the parts of x = bottom + height * ratio and of dx/dz = numerator * (slope / denominator)^2."""
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
    r"""The map with its gradient written out, which costs a third of what recording the operations does.

    In the symbols of :class:`Spline`, with :math:`\delta = d_k + d_{k+1} - 2s`, a value depends on
    :math:`(z, x_k, y_k, w, h, d_k, d_{k+1})` only, by :math:`\xi = (z - x_k)/w`, :math:`s = h/w` and

    .. math::
        x = y_k + h\, r(\xi, s, d_k, d_{k+1}), \qquad
        \ell = \log\frac{dx}{dz} = \log p + 2 \log s - 2 \log q.

    **Forward.** Let :math:`G` and :math:`L` be the gradients of the loss by x and :math:`\ell`. The gradients by p and
    q are :math:`L / p` and :math:`-Q`, with :math:`Q = (G h r + 2 L) / q`. Since
    :math:`\partial_\xi r = s p / q^2` and :math:`\partial_\xi \eta = 1 - 2\xi`, the chain rule gives

    .. math::
        g_\xi &= G h\, s p / q^2 + L\, \ell_\xi, \qquad
        \tfrac12 \ell_\xi = \frac{d_{k+1} \xi + s (1 - 2 \xi) - d_k (1 - \xi)}{p} - \frac{\delta (1 - 2 \xi)}{q}, \\
        g_s &= G h\, \xi^2 / q - (1 - 2 \eta)\, Q + 2 L / s + 2 \eta\, L / p, \\
        g_{d_k} &= G h\, \eta / q - \eta\, Q + (1 - \xi)^2 L / p, \qquad
        g_{d_{k+1}} = -\eta\, Q + \xi^2 L / p,

    and, through :math:`\xi` and s,

    .. math::
        g_z = -g_{x_k} = g_\xi / w, \quad g_{y_k} = G, \quad
        g_w = -(\xi g_\xi + s g_s) / w, \quad g_h = G r + g_s / w.

    **Inverse.** Let now G and L be the gradients by :math:`z = T^{-1}(x; \theta)` and by its log-derivative
    :math:`-\ell(z, \theta)`. From :math:`x = T(z; \theta)` follows
    :math:`dz = (dx - \partial_\theta T\, d\theta) / T'`, so that

    .. math::
        G\, dz - L\, (\partial_z \ell\, dz + \partial_\theta \ell\, d\theta)
        = -G'\, dx + (G'\, \partial_\theta T + L'\, \partial_\theta \ell)\, d\theta, \qquad
        L' = -L, \quad G' = -(G + L'\, \partial_z \ell) / T'.

    Hence :math:`\theta` gets the forward gradient at z with G' and L' in place of G and L, and x gets :math:`-G'`.

    **Outside** the bounds the map is the identity: G passes, and :math:`\theta` gets zero.
    :func:`_gradient_of_theta` leads from the bin to :math:`\theta`. Second derivatives are those of the formula,
    recorded.
    """

    @staticmethod
    def forward(ctx: Any, direction: Direction, value: Tensor, theta: Tensor, bins: int, bound: float) -> Pair:
        order = memory_order(theta, theta.dim() - 1)
        arguments = value.permute(order).contiguous(), theta.permute(*order, -1), bins, bound
        (result, ladj), inside, bin, point = _evaluate(direction, *arguments)
        ctx.save_for_backward(value, theta, inside, ladj, *bin, *point)
        ctx.arguments = direction, bins, bound, order
        return restored(result, order), restored(ladj, order)

    @staticmethod
    def backward(ctx: Any, g_result: Tensor, g_ladj: Tensor) -> tuple[Any, ...]:
        value, theta, inside, ladj, *fields = ctx.saved_tensors
        direction, bins, bound, order = ctx.arguments
        if torch.is_grad_enabled():  # by create_graph=True: the caller wants second derivatives
            gradients = recorded_gradients(
                lambda value, theta: _evaluate(direction, value, theta, bins, bound)[0],
                (value, theta),
                (g_result, g_ladj),
            )
            return None, *gradients, None, None
        bin, point = _Bin(*fields[: len(_Bin._fields)]), _Point(*fields[len(_Bin._fields) :])
        g_outside = g_result.permute(order)
        g_result, g_ladj = g_outside * inside, g_ladj.permute(order) * inside

        xi, slope, d0, d1, ratio = point.xi, point.slope, bin.d0, bin.d1, point.ratio
        over_numerator, over_denominator = point.numerator.reciprocal(), point.denominator.reciprocal()
        rest_xi = 1 - xi
        eta, twist = xi * rest_xi, rest_xi - xi
        bend = torch.sub(d0 + d1, slope, alpha=2)
        # This is half of the derivative of the log-derivative by xi.
        ladj_xi = torch.addcmul(torch.addcmul(d1 * xi, slope, twist), d0, rest_xi, value=-1) * over_numerator
        ladj_xi = torch.addcmul(ladj_xi, bend * twist, over_denominator, value=-1)
        if direction is _inverse:
            # From here on they are L' and G', which the forward formulas take in place of L and G. ladj is -log T'.
            g_ladj = -g_ladj
            g_result = -(g_result + 2 * g_ladj * ladj_xi / bin.width) * torch.exp(ladj)
        g_rise = g_result * bin.height
        g_ratio = g_rise * over_denominator
        twice_g_ladj = 2 * g_ladj
        g_numerator, g_denominator = g_ladj * over_numerator, twice_g_ladj * over_denominator
        g_denominator = torch.addcmul(g_denominator, g_ratio, ratio)  # this is Q, minus the gradient by q
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
        is_periodic = _is_periodic(theta, bins)
        g_theta = _gradient_of_theta(bin, starts, sizes, torch.stack([g_d0, g_d1]), bins, bound, is_periodic)
        g_value = g_z if direction is _forward else -g_result
        g_value = restored(torch.where(inside, g_value, g_outside), order)
        return None, g_value, restored(g_theta, order), None, None


def _gradient_of_theta(
    bin: _Bin, g_starts: Tensor, g_sizes: Tensor, g_ds: Tensor, bins: int, bound: float, is_periodic: bool
) -> Tensor:
    r"""Return the gradient by theta, given those by the quantities of the bin, each ``(2, ...)``.

    With :math:`\pi = \operatorname{softmax}` of the raw widths and :math:`\rho = 2B (1 - K \epsilon)`, bin k has width
    :math:`2B\epsilon + \rho \pi_k` and starts at :math:`-B + 2B\epsilon k + \rho \sum_{i<k} \pi_i`. So the gradient by
    :math:`\pi_i` is :math:`a_i = \rho\, g_\mathrm{start}` for i < k, :math:`a_k = \rho\, g_\mathrm{size}`, and zero for
    i > k; and that by raw width i is :math:`\pi_i (a_i - \sum_j \pi_j a_j)`, where the sum is
    :math:`\rho (g_\mathrm{start} \sum_{j<k} \pi_j + g_\mathrm{size} \pi_k)`. Heights are the same. A raw
    derivative gets the gradient by :math:`d_k` or :math:`d_{k+1}` times a sigmoid, the derivative of the softplus.

    Args:
        bin: the bin of each value.
        g_starts: gradients by its left end and bottom.
        g_sizes: gradients by its width and height.
        g_ds: gradients by the derivatives at its two knots.
        bins: K.
        bound: B.
        is_periodic: whether the derivatives at both ends are one parameter, rather than 1.
    """
    rest = 2 * bound * (1 - bins * MIN_WIDTH)
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
    at_ends = [g_derivatives[:1] + g_derivatives[-1:]] if is_periodic else []
    # A reshape, unlike flatten, works for batches of gradients, as those of a Jacobian.
    return torch.cat([g_shares.reshape(2 * bins, *mean.shape[1:]), *at_ends, g_derivatives[1:-1]]).movedim(0, -1)

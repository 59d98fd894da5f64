r"""Planar, radial and Sylvester layers are invertible for any real parameters, extremes included.

The bound on the residual :math:`|t(t^{-1}(x)) - x|`. Let e be the machine epsilon. Each layer is :math:`x = z + g(z)`,
and its inverse finds a scalar s such that :math:`z = x - g`, where g is computed from s. Applied to z, the layer
computes s' = s + ds from z, and returns :math:`x' = z + g(s')`, so that

.. math:: |x' - x| \le |g'| \, |ds| + O(e) (|x| + |g|).

- planar: :math:`g = \hat u \tanh(s)` and :math:`s = w^\top z + b`. Both s and s' are sums of terms of size
  :math:`|w| (|x| + |u|) + |b|`, so :math:`|ds| = O(e)` of that, and :math:`|g'| \le |\hat u|`. Here u is the parameter
  before its component along w is constrained: :math:`\hat u` may be a small difference of large numbers.
- Sylvester: the same with :math:`w = \tilde R Q^\top`, :math:`u = Q R`.
- radial: s is the distance r from the centre, found from a quadratic equation with coefficients of size
  :math:`\alpha + |\beta| + |x - z_0|`, and computed again from :math:`z - z_0`, whose rounding is that of z and z0; the
  map r -> |x - z0| has slope at most :math:`1 + |\beta| / \alpha`.

No condition number of the inverse enters: a badly conditioned z is wrong, but its image is right.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyroflows.transforms import Planar, Radial, Sylvester
from pyroflows.transforms.planar import EPS, above_minus_one

# Beyond these a product of two parameters leaves no digits for the value itself.
EXTREME = {torch.float64: 1e4, torch.float32: 1e2}
SAFETY = 16  # stands for the constants in O(e): a few operations for each of at most 4 dimensions

any_parameters = settings(derandomize=True, max_examples=200, deadline=None)
both_dtypes = pytest.mark.parametrize("dtype", EXTREME, ids=str)


@st.composite
def layers(draw, factory, dtype):
    """A layer with any parameters, and points of all magnitudes."""
    dim = draw(st.integers(1, 4))
    layer = factory(dim, draw(st.integers(1, dim))).to(dtype)
    value = layer.parameters_of.value
    with torch.no_grad():
        value.copy_(draw(_vectors(value.numel(), dtype)))
    return layer, draw(_vectors(2 * dim, dtype)).reshape(2, dim)


def _vectors(size, dtype):
    largest = EXTREME[dtype]
    special = [0.0, 1e-30, -1e-30, 1e-8, -1e-8, 1.0, -1.0, largest, -largest]
    numbers = st.one_of(
        st.sampled_from(special),
        st.floats(-3, 3, width=32),
        st.floats(-largest, largest, width=32),
    )
    return st.lists(numbers, min_size=size, max_size=size).map(lambda numbers: torch.tensor(numbers, dtype=dtype))


def strategy(factory):
    return st.sampled_from(sorted(EXTREME, key=str)).flatmap(lambda dtype: layers(factory, dtype))


def _planar(dim, _):
    return Planar(dim)


def _radial(dim, _):
    return Radial(dim)


def _split(planar):
    """u, w, b as they are before the constraint."""
    return planar.parameters_of.value.split([planar.dim, planar.dim, 1])


def assert_inverts(layer, x, size_of_g, change_of_g):
    """``change_of_g`` is what ``|g'| |ds|`` is at most, without its e."""
    z, ladj = layer.inverse_and_ladj(x)
    again, ladj_of_z = layer.forward_and_ladj(z)
    assert z.isfinite().all()
    assert ladj.isfinite().all()
    assert ladj_of_z.isfinite().all()
    bound = torch.finfo(x.dtype).eps * (x.norm(dim=-1) + size_of_g + change_of_g)
    assert ((again - x).norm(dim=-1) <= SAFETY * bound).all()


@any_parameters
@given(strategy(_planar))
def test_planar(drawn):
    layer, x = drawn
    raw_u, _, _ = _split(layer)
    u, w, b, wu = layer._constrained(None)
    assert wu >= -1 + EPS - 4 * torch.finfo(x.dtype).eps
    size = u.norm() + raw_u.norm()
    assert_inverts(layer, x, size, u.norm() * (w.norm() * (x.norm(dim=-1) + size) + b.abs()))


@any_parameters
@given(strategy(Sylvester))
def test_sylvester(drawn):
    layer, x = drawn
    _, r, r_tilde, b, product = layer._constrained(None)
    assert (product >= -1 + EPS - 4 * torch.finfo(x.dtype).eps).all()
    size = r.norm() * layer.rank**0.5
    assert_inverts(layer, x, size, r.norm() * (r_tilde.norm() * (x.norm(dim=-1) + size) + b.norm()))


@any_parameters
@given(strategy(_radial))
def test_radial(drawn):
    layer, x = drawn
    center, alpha, beta = layer._constrained(None)
    assert beta > -alpha
    distance = (x - center).norm(dim=-1)
    rounding = center.norm() + distance + alpha + beta.abs()
    assert_inverts(layer, x, beta.abs(), (1 + beta.abs() / alpha) * rounding)


@any_parameters
@given(strategy(_planar), st.sampled_from([1e-30, 1e-12, 1e-8]))
def test_planar_of_tiny_w_is_a_shift(drawn, tiny):
    """The constraint divides by |w|^2: what it adds to u must not blow up where w almost vanishes."""
    layer, _ = drawn
    with torch.no_grad():
        _split(layer)[1].fill_(tiny)
    raw_u, _, _ = _split(layer)
    u, _, _, _ = layer._constrained(None)
    # w.u of order e rounds to 0 or e in the constraint, so the component along w is right to its own size only.
    assert u.norm() <= 4 * raw_u.norm()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e18])
@both_dtypes
def test_sylvester_reflects_at_vectors_of_any_size(size, dtype):
    """Only their directions matter, although their squares leave the range of a float."""
    layer = Sylvester(3, 2).to(dtype)
    with torch.no_grad():
        layer.parameters_of.value[6:].normal_()
        layer.parameters_of.value[:6].mul_(size)
    x = torch.randn(7, 3, dtype=dtype)
    torch.testing.assert_close(layer(layer.inv(x)), x)


@pytest.mark.parametrize("factory", [_planar, _radial, Sylvester])
@pytest.mark.parametrize("dim", [1, 2, 5])
@both_dtypes
def test_zero_parameters_are_the_identity(factory, dim, dtype):
    layer = factory(dim, 1).to(dtype)
    with torch.no_grad():
        layer.parameters_of.value.zero_()
    x = torch.randn(7, dim, dtype=dtype)
    for result, ladj in (layer.forward_and_ladj(x), layer.inverse_and_ladj(x)):
        # R = 0 leaves Sylvester's x + Q 0 exact, too.
        torch.testing.assert_close(result, x)
        torch.testing.assert_close(ladj, torch.zeros(7, dtype=dtype))


@both_dtypes
def test_constraint(dtype):
    s = torch.cat([-torch.logspace(-30, 10, 101), torch.zeros(1), torch.logspace(-30, 10, 101)]).to(dtype)
    m = above_minus_one(s)
    assert (m >= -1 + EPS - 2 * torch.finfo(dtype).eps).all()
    assert m[101] == 0
    assert (m.diff()[101:] >= 0).all() and (m.diff()[:100] <= 0).all()


def test_radial_at_its_centre():
    """The distance has no gradient at zero, but the map has a Jacobian there: (1 + beta / alpha) times the identity."""
    layer = Radial(3).double()
    with torch.no_grad():
        layer.parameters_of.value.copy_(torch.tensor([1.0, -2.0, 0.5, 0.3, 2.0]))
    center, alpha, beta = (p.detach() for p in layer._constrained(None))
    for pair, slope in ((layer.forward_and_ladj, 1 + beta / alpha), (layer.inverse_and_ladj, 1 / (1 + beta / alpha))):
        matrix = torch.autograd.functional.jacobian(lambda z, pair=pair: pair(z)[0], center)
        torch.testing.assert_close(matrix, slope * torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(pair(center)[1], 3 * slope.log().squeeze())


@pytest.mark.parametrize("rank", [0, 4])
def test_wrong_rank_raises(rank):
    with pytest.raises(ValueError, match="rank from 1 to dim=3|rank must be at least 1"):
        Sylvester(3, rank)

"""Rotations, QR and low-rank layers against their matrices."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

import pyroflows as pf
from pyroflows.errors import OptionError, StateError
from pyroflows.transforms import QR, LowRank, Orthogonal
from pyroflows.transforms.linear.positive_diagonal import MIN_SCALE
from pyroflows.transforms.linear.reflections import reflections
from tests.transforms.registry import CONTEXT_DIM, jacobian, perturb, points

ROTATIONS = {
    "householder": lambda dim, **options: Orthogonal(dim, **options),
    "two reflections": lambda dim, **options: Orthogonal(dim, 2, **options),
    "matrix_exp": lambda dim, **options: Orthogonal(dim, parametrization="matrix_exp", **options),
    "cayley": lambda dim, **options: Orthogonal(dim, parametrization="cayley", **options),
}
all_rotations = pytest.mark.parametrize("rotation", ROTATIONS)


def householder(vectors):
    """The product of the reflections along these vectors, one after the other."""
    q = torch.eye(vectors.shape[-1], dtype=vectors.dtype)
    for v in vectors:
        q = q @ (torch.eye(len(v), dtype=v.dtype) - 2 * torch.outer(v, v) / v.dot(v))
    return q


def triangle(raw):
    """The upper triangular factor N diag(u), as the docstrings have it."""
    scale = MIN_SCALE + F.softplus(raw.diagonal() + math.log(math.expm1(1 - MIN_SCALE)))
    return (raw.triu(1) + torch.eye(len(raw), dtype=raw.dtype)) @ scale.diag()


def matrix_of(t):
    return jacobian(t, torch.zeros(t.dim, dtype=torch.float64))


# Products of reflections


@pytest.mark.parametrize(("count", "dim"), [(1, 4), (4, 4), (7, 4), (3, 10)])
def test_compact_form_is_the_product_of_reflections(count, dim):
    vectors = torch.randn(count, dim, dtype=torch.float64)
    z, q = torch.randn(5, dim, dtype=torch.float64), householder(vectors)
    found = reflections(vectors)
    torch.testing.assert_close(found.times(z), z @ q.T)
    torch.testing.assert_close(found.transpose_times(z), z @ q)
    torch.testing.assert_close(found.leading_rows(3), q[:, :3].T)


def test_vectors_of_all_lengths_reflect_alike_and_zero_reflects_nothing():
    vectors = torch.randn(2, 5)
    expected = reflections(vectors).times(torch.ones(5))
    for length in (1e-30, 1e30):
        torch.testing.assert_close(reflections(length * vectors).times(torch.ones(5)), expected)
    with_zero = torch.stack([vectors[0], torch.zeros(5), vectors[1]]).requires_grad_()
    found = reflections(with_zero).times(torch.ones(5))
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.square().sum() + found[0], with_zero)
    assert gradient.isfinite().all()


def test_many_parallel_reflections_stay_orthogonal_in_float32():
    """The triangular system of the compact form must not lose digits where vectors are nearly equal."""
    for spread in (0.0, 1e-6, 1e-3, 1.0):
        vectors = torch.randn(1, 100) + spread * torch.randn(64, 100)
        q = reflections(vectors).times(torch.eye(100))
        assert (q @ q.T - torch.eye(100)).abs().max() < 2e-5


# Rotations


@all_rotations
@pytest.mark.parametrize("dim", [2, 5, 6])
def test_is_a_rotation(rotation, dim):
    t = ROTATIONS[rotation](dim).double()
    with torch.no_grad():
        t.parameters_of.value.normal_()
    q = matrix_of(t)
    torch.testing.assert_close(q @ q.T, torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.det(q), torch.ones((), dtype=torch.float64))
    assert (q - torch.eye(dim)).abs().max() > 0.1
    z = points((7,), dim)
    torch.testing.assert_close(t.inv(z), z @ q)
    assert t.forward_and_ladj(z)[1].eq(0).all()


def test_the_formulas_of_the_parametrisations():
    a = torch.randn(4, 4, dtype=torch.float64)
    skew, identity = a - a.T, torch.eye(4, dtype=torch.float64)
    expected = {
        "householder": householder(a),
        "matrix_exp": torch.linalg.matrix_exp(skew),
        "cayley": torch.linalg.inv(identity + skew) @ (identity - skew),
    }
    for name, q in expected.items():
        t = Orthogonal(4, parametrization=name).double()
        with torch.no_grad():
            t.parameters_of.value.copy_(a)
        torch.testing.assert_close(matrix_of(t), q)


@pytest.mark.parametrize("rotation", ["householder", "matrix_exp", "cayley"])
@pytest.mark.parametrize("dim", [2, 3, 6])
def test_training_finds_any_rotation(rotation, dim):
    """From the identity, which is where reflections start in pairs that undo each other."""
    generator = torch.Generator().manual_seed(dim)
    q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
    target = q * r.diagonal().sign()
    target[:, 0] *= torch.linalg.det(target)
    torch.manual_seed(0)
    t = ROTATIONS[rotation](dim).double()
    optimiser = torch.optim.LBFGS(t.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss():
        optimiser.zero_grad()
        value = (t(torch.eye(dim, dtype=torch.float64)) - target.T).square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    assert loss().item() < 1e-6


def test_numbers_of_reflections():
    assert [len(Orthogonal(dim).parameters_of.value) for dim in (1, 2, 5, 64, 1000)] == [2, 2, 4, 64, 64]
    assert len(QR(1000, num_reflections=10).directions_of.value) == 10


@pytest.mark.parametrize("layer", [Orthogonal, QR])
@pytest.mark.parametrize("count", [0, 3, 2.5, True])
def test_wrong_numbers_of_reflections_raise(layer, count):
    with pytest.raises(OptionError, match="num_reflections must be"):
        layer(4, num_reflections=count)


def test_wrong_parametrisations_raise():
    with pytest.raises(OptionError, match=r"'cayley', 'householder', 'matrix_exp'.*got 'givens'"):
        Orthogonal(4, parametrization="givens")
    with pytest.raises(OptionError, match="num_reflections is an option of"):
        Orthogonal(4, 2, parametrization="cayley")


# QR


def test_qr_is_the_product_of_its_factors():
    t = perturb(QR(4).double())
    expected = householder(t.directions_of.value.detach()) @ triangle(t.triangle_of.value.detach())
    torch.testing.assert_close(matrix_of(t), expected)
    z = points((7,), 4)
    torch.testing.assert_close(t.inv(z), z @ torch.linalg.inv(expected).T)
    torch.testing.assert_close(t.forward_and_ladj(z)[1], torch.linalg.slogdet(expected).logabsdet.expand(7))


def test_qr_depends_on_its_context():
    t = perturb(QR(4, context_dim=CONTEXT_DIM).double())
    context = torch.randn(CONTEXT_DIM, dtype=torch.float64)
    q = householder((t.directions_of.value + t.directions_of.net(context).reshape(4, 4)).detach())
    r = triangle((t.triangle_of.value + t.triangle_of.net(context).reshape(4, 4) / 2).detach())
    torch.testing.assert_close(matrix_of(t.condition(context)), q @ r)


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_qr_and_low_rank_stay_invertible(value):
    """However far the parameters of the diagonal go."""
    for t in (QR(4).double(), LowRank(4, 2).double()):
        matrix = (t.triangle_of if isinstance(t, QR) else t.core_of).value
        with torch.no_grad():
            matrix.diagonal().fill_(value)
        z = torch.randn(7, 4, dtype=torch.float64)
        x, ladj = t.forward_and_ladj(z)
        torch.testing.assert_close(t.inv(x), z)
        assert (ladj >= len(matrix) * math.log(MIN_SCALE) * (1 + 1e-12)).all()


@pytest.mark.parametrize("layer", [QR, pf.transforms.LU, lambda dim: Orthogonal(dim, 32), lambda dim: LowRank(dim, 24)])
def test_large_products_and_their_gradients(layer):
    """Large matrices in float32 are multiplied by another library, with gradients that are written out."""
    torch.manual_seed(0)
    t = layer(300)
    with torch.no_grad():
        for parameter in t.parameters():
            parameter.add_(0.3 / 300**0.5 * torch.randn_like(parameter))
    z = torch.randn(2, 200, 300)
    found, expected = [], []
    for results, view, value in ((found, t, z), (expected, copy.deepcopy(t).double(), z.double())):
        value.requires_grad_()
        x = view(value)
        results += [x, view.inv(value)]
        leaves = [value, *view.parameters()]
        results += torch.autograd.grad(x.sin().sum() + x.cos().mean(), leaves, create_graph=True)
        results += torch.autograd.grad(results[2].square().sum(), leaves, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * (1 + b.norm())


# Low rank


@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (4, 1), (6, 3), (4, 4)])
def test_low_rank_is_its_formula(dim, rank):
    t = perturb(LowRank(dim, rank).double())
    q = householder(t.directions_of.value.detach())[:, :rank]
    raw = t.core_of.value.detach()
    m = (raw.tril(-1) + torch.eye(rank)) @ triangle(raw)
    p = t.shear_of.value.detach().T
    p = p - q @ q.T @ p
    w = q @ (m - torch.eye(rank)).T + p
    identity = torch.eye(dim, dtype=torch.float64)
    expected = identity + q @ w.T
    torch.testing.assert_close(matrix_of(t), expected)
    z = points((7,), dim)
    torch.testing.assert_close(t.inv(z), z @ torch.linalg.inv(expected).T)
    torch.testing.assert_close(t.forward_and_ladj(z)[1], torch.linalg.slogdet(expected).logabsdet.expand(7))
    assert torch.linalg.matrix_rank(expected - identity) == rank


def test_low_rank_in_many_dimensions_keeps_its_digits():
    t = perturb(LowRank(2000, 8))
    z = torch.randn(5, 2000)
    torch.testing.assert_close(t.inv(t(z)), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 5])
def test_wrong_ranks_raise(rank):
    with pytest.raises(OptionError, match="rank"):
        LowRank(4, rank)


# In flows


def test_trains_towards_a_correlated_normal_and_is_saved(tmp_path):
    torch.manual_seed(0)
    factor = torch.tensor([[1.0, 0.0, 0.0], [-0.9, 0.5, 0.0], [0.4, 0.3, 0.2]])
    x = torch.randn(2000, 3) @ factor.T + 1
    entropy = torch.distributions.MultivariateNormal(torch.ones(3), scale_tril=factor).log_prob(x).mean()
    layers = [LowRank(3, 2), pf.transforms.Diagonal(3), Orthogonal(3), QR(3), pf.transforms.LeakyReLU(3)]
    flow = pf.Flow(layers)
    fit = pf.fit_density(flow, x, max_epochs=30, seed=0, progress_bar=False)
    # On 200 held-out rows the mean log-density of the true law has a standard error of sqrt(3 / 2 / 200).
    assert fit.best_log_prob > entropy - 4 * math.sqrt(1.5 / 200)
    flow.save(tmp_path / "flow.safetensors")
    again = pf.load_flow(tmp_path / "flow.safetensors")
    assert torch.equal(again().log_prob(x), flow().log_prob(x))


def test_states_of_other_parametrisations_are_refused():
    flow, other = (pf.Flow([Orthogonal(4, parametrization=name)]) for name in ("matrix_exp", "cayley"))
    with pytest.raises(StateError, match="parametrization of layer 0"):
        other.load_state_dict(flow.state_dict())

"""Log-determinants of residual layers: exact, within a bound, or right in the mean, with their gradients."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from scipy import stats
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyroflows as pf
from pyroflows.compiling.program import compiled
from pyroflows.errors import OptionError
from pyroflows.nets.lipschitz.contraction import Contraction, Linearized, transposed_times
from pyroflows.nets.lipschitz.dense import LipschitzMLP
from pyroflows.transforms import Compose, Planar
from pyroflows.transforms.residual import Exact, Residual, RussianRoulette, TruncatedSeries, exact, roulette
from pyroflows.transforms.residual.exact import cyclic_jacobian

DIMS = (2, 8, 32)


def network(dim, hidden_dims=(16, 16), coefficient=0.9, activation="tanh"):
    """A network whose weights are large, so that their norms are at the bound."""
    net = LipschitzMLP(dim, hidden_dims, coefficient, 0, activation)
    for layer in net.layers:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias, std=0.1)
    return net


def trained(dim, seed):
    """A network after steps that contract or expand, and the values that it was trained at."""
    torch.manual_seed(seed)
    net = network(dim, (16,))
    z = 0.5 * torch.randn(4, dim)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(30):
        optimiser.zero_grad()
        ((-1) ** seed * Exact()(net.at(None).linearized(z), 1).mean()).backward()
        optimiser.step()
    return net, z


def linear(matrix, num_rows=1):
    """A linear map as a network without hidden layers, at zero."""
    return Linearized(matrix.new_zeros(num_rows, len(matrix)), [matrix], [])


def leaves(at):
    """The same Jacobian with tensors that record gradients."""
    held = at.held()
    return Linearized(
        held.value,
        [w.clone().requires_grad_() for w in held.weights],
        [s.clone().requires_grad_() for s in held.slopes],
    )


def gradients(log_det, at, **options):
    return torch.autograd.grad(log_det(at, 1).sum(), [*at.weights, *at.slopes], **options)


def of_contraction(g, z, num_axes):
    """The reference: log-determinants of Jacobians that torch.func computes."""
    rows = z.reshape(-1, *z.shape[z.dim() - num_axes :])
    dim = rows[0].numel()
    jacobian = torch.func.vmap(torch.func.jacrev(g))(rows).reshape(-1, dim, dim)
    return torch.linalg.slogdet(torch.eye(dim).to(z) + jacobian).logabsdet.reshape(z.shape[: z.dim() - num_axes])


# The exact log-determinant


@pytest.mark.parametrize("batch_shape", [(), (7,), (3, 2, 7), (0,)], ids=str)
@pytest.mark.parametrize("hidden_dims", [(), (3,), (16, 16), (3, 16), (16, 3), (16, 2, 16), (4, 4, 4)], ids=str)
def test_exact_is_that_of_the_jacobian(hidden_dims, batch_shape):
    """Through narrow layers too, wherever they stand, and for any number of rows."""
    for dim in (1, 2, 5):
        net = network(dim, hidden_dims).double()
        z = torch.randn(*batch_shape, dim, dtype=torch.float64)
        g = net.at(None)
        found = Exact()(g.linearized(z), 1)
        assert found.shape == batch_shape
        if z.numel():
            torch.testing.assert_close(found, of_contraction(g, z, 1), rtol=0, atol=1e-12)
            assert cyclic_jacobian(g.linearized(z), 1).shape[-1] == min(dim, *hidden_dims, 99)


@pytest.mark.parametrize("num_rows", [3, 100])
def test_gradients_of_exact(num_rows):
    """Of first and second order, whichever way the first products are computed."""
    net = network(3, (5, 4)).double()
    z = torch.randn(num_rows, 3, dtype=torch.float64)

    def gradient(function):
        loss = function(net.at(None)).square().sum()
        first = torch.autograd.grad(loss, [*net.parameters()], create_graph=True, materialize_grads=True)
        norm = sum(g.square().sum() for g in first)
        return [*first, *torch.autograd.grad(norm, [*net.parameters()], materialize_grads=True)]

    expected = gradient(lambda g: of_contraction(g, z, 1))
    for found, reference in zip(gradient(lambda g: Exact()(g.linearized(z), 1)), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("channels", [(2, 5, 2), (2, 1, 2), (2, 3, 3, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3), (0,)], ids=str)
def test_exact_of_images(channels, batch_shape):
    torch.manual_seed(0)
    kernels = [0.2 * torch.randn(b, a, 3, 3, dtype=torch.float64) for a, b in pairwise(channels)]
    biases = [torch.randn(b, 1, 1, dtype=torch.float64) for b in channels[1:]]
    g = Contraction(kernels, biases, "lipswish")
    z = torch.randn(*batch_shape, channels[0], 3, 4, dtype=torch.float64)
    found = Exact()(g.linearized(z), 3)
    assert found.shape == batch_shape
    if z.numel():
        torch.testing.assert_close(found, of_contraction(g, z, 3), rtol=0, atol=1e-12)


def test_large_jacobians_are_computed_some_rows_at_a_time(monkeypatch):
    at = leaves(network(5, (16, 16)).at(None).linearized(torch.randn(3, 11, 5)))
    value, expected = Exact()(at, 1), gradients(Exact(), at)
    sizes = []

    def counted(at, num_axes):
        found = cyclic_jacobian(at, num_axes)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(exact, "MAX_ELEMENTS", 5 * 5 * 16)
    monkeypatch.setattr(exact, "cyclic_jacobian", counted)
    torch.testing.assert_close(Exact()(at, 1), value, rtol=0, atol=1e-6)
    assert sizes == [5] * 6 + [3]
    for found, reference in zip(gradients(Exact(), at), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-6)


def test_exact_is_stable_in_float32():
    """At norms of the bound itself, where I + J is worst conditioned."""
    for sign in (-1, 1):
        matrix = sign * 0.99 * torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64))[0]
        in_double, in_single = (leaves(linear(matrix.to(dtype))) for dtype in (torch.float64, torch.float32))
        torch.testing.assert_close(Exact()(in_single, 1).double(), Exact()(in_double, 1), rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients(Exact(), in_single), gradients(Exact(), in_double), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)


# The truncated series


@pytest.mark.parametrize("coefficient", [0.3, 0.7, 0.95])
def test_truncated_series_stays_within_its_bound(coefficient):
    for dim in DIMS:
        q = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0]
        identity = torch.eye(dim, dtype=torch.float64)
        matrices = [
            coefficient * m for m in (identity, -identity, q, q @ torch.randn(dim).sign().double().diag() @ q.T)
        ]
        nets = [network(dim, hidden, coefficient, a).double() for hidden in [(), (16,)] for a in ("tanh", "sine")]
        z = torch.randn(10, dim, dtype=torch.float64)
        for at in [*(linear(m) for m in matrices), *(net.at(None).linearized(z) for net in nets)]:
            for n in (1, 2, 5, 20):
                series = TruncatedSeries(n)
                error = (series(at, 1) - Exact()(at, 1)).abs().max().item()
                assert error <= series.bound(dim, coefficient) * (1 + 1e-12) + 1e-12
        worst = linear(matrices[1])
        error = (series(worst, 1) - Exact()(worst, 1)).abs().item()
        assert error == pytest.approx(series.bound(dim, coefficient), rel=1e-8)


@pytest.mark.parametrize("tolerance", [1.0, 1e-2, 1e-8])
@pytest.mark.parametrize("coefficient", [0.1, 0.9, 0.99])
def test_shortest_series_within_a_tolerance(coefficient, tolerance):
    series = TruncatedSeries.within(tolerance, 8, coefficient)
    assert series.bound(8, coefficient) <= tolerance * (1 + 1e-5)
    assert series.num_terms == 1 or TruncatedSeries(series.num_terms - 1).bound(8, coefficient) > tolerance


@pytest.mark.parametrize("hidden_dims", [(16,), (3,)], ids=str)
def test_terms_of_the_series_and_their_gradients(hidden_dims):
    """Exact traces give powers of the Jacobian, and the gradient of the same terms; so do probes in the mean."""
    at = leaves(network(5, hidden_dims).double().at(None).linearized(torch.randn(4, 5, dtype=torch.float64)))
    jacobian = at.times(torch.eye(5, dtype=torch.float64)[:, None].expand(5, 4, 5)).permute(1, 2, 0)
    for n in (1, 2, 3, 4, 7):
        terms = [(-1) ** (k + 1) / k * torch.linalg.matrix_power(jacobian, k) for k in range(1, n + 1)]
        expected = sum(terms).diagonal(dim1=1, dim2=2).sum(-1)
        torch.testing.assert_close(TruncatedSeries(n)(at, 1), expected, rtol=1e-10, atol=1e-12)
        wanted = torch.autograd.grad(expected.sum(), [*at.weights, *at.slopes], retain_graph=True)
        for found, reference in zip(gradients(TruncatedSeries(n), at), wanted, strict=True):
            torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-10)


def test_probes_of_a_narrow_basis_are_exact():
    """In one dimension a sign is a basis vector, so that probes give the traces themselves, gradients included."""
    at = leaves(network(1, (16,)).double().at(None).linearized(torch.randn(4, 1, dtype=torch.float64)))
    for n in (1, 2, 3, 8):
        torch.testing.assert_close(TruncatedSeries(n, 3)(at, 1), TruncatedSeries(n)(at, 1))
        found, expected = gradients(TruncatedSeries(n, 3), at), gradients(TruncatedSeries(n), at)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


# The mean of the estimates


@dataclass(frozen=True)
class Shifted:
    """A long series whose terms are divided by k + shift instead of k, differentiated by autograd."""

    shift: int
    num_probes: int

    def __call__(self, at, num_axes):
        v = torch.randn(self.num_probes, *at.value.shape).sign()
        u, total = v, 0.0
        for k in range(1, 80):
            u = at.transposed_times(u)
            total = total + (-1) ** (k + 1) / max(1, k + self.shift) * (u * v).sum(-1)
        return total.mean(0)


NUM_GROUPS = 40
# So many probes a group make the standard error of the whole gradient at most 2 % of its norm.
NUM_PROBES = {2: 200, 8: 300, 32: 650}


def errors(estimator, networks):
    """Compare the mean of estimates with the determinant, in value and parameter gradient, over trained networks.

    Args:
        estimator: makes a log-determinant from a number of probes.
        networks: pairs of a dimension and a seed.

    Returns:
        The errors in standard errors of the value and of the gradient's part in a random direction, ``(2, networks)``;
        and the squared errors of the whole gradients, relative to the sum of the squared standard errors.
    """
    in_standard_errors, of_vectors = [], []
    for dim, seed in networks:
        net, z = trained(dim, seed)
        at = net.at(None).linearized(z)
        parameters = [*net.parameters()]

        def value_and_gradient(log_det, at=at, parameters=parameters):
            value = log_det(at, 1).mean()
            found = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
            return torch.cat([value.detach()[None], *(g.flatten() for g in found)])

        exactly = value_and_gradient(Exact())
        groups = torch.stack([value_and_gradient(estimator(NUM_PROBES[dim])) for _ in range(NUM_GROUPS)])
        error, square = groups.mean(0) - exactly, groups.var(0) / NUM_GROUPS
        # A direction that is random alone is almost orthogonal to the gradient, whose part there is then no measure.
        gradient = exactly[1:]
        direction = gradient / gradient.norm() + torch.randn_like(gradient) / len(gradient) ** 0.5
        along, exactly_along = groups[:, 1:] @ direction, gradient @ direction
        standard_error = torch.stack([square[0].sqrt(), along.std() / NUM_GROUPS**0.5])
        # The measure is at least as fine as is asked for.
        assert (standard_error <= 0.02 * torch.stack([exactly[0], exactly_along]).abs()).all()
        assert square[1:].sum().sqrt() <= 0.02 * gradient.norm()
        in_standard_errors.append(torch.stack([error[0], along.mean() - exactly_along]) / standard_error)
        of_vectors.append(error[1:].square().sum() / square[1:].sum())
    return torch.stack(in_standard_errors, 1), torch.stack(of_vectors)


def findings(in_standard_errors, of_vectors):
    """Say in what respect the means are not those of the determinant; each has a chance below 0.1 % if they are."""
    count = in_standard_errors.shape[1]
    # The standard errors are themselves known from groups.
    law = stats.t(NUM_GROUPS - 1)
    found = []
    for name, z in zip(("value", "gradient"), in_standard_errors, strict=True):
        # Of many numbers some are beyond 3 standard errors by chance.
        if (z.abs() > 3).sum() > stats.binom(count, 2 * law.sf(3)).ppf(0.9995):
            found.append(f"{name} beyond 3 standard errors")
        if z.mean().abs() * count**0.5 > 3.5 * law.std():
            found.append(f"{name} on one side")
        if z.abs().max() > law.isf(0.0005 / count / 2):
            found.append(f"{name} far out")
    # Of the squared error of a vector, relative to what is expected, mean and variance are 1 and at most 2.
    if of_vectors.mean() > 1 + 4 * (2 / count) ** 0.5:
        found.append("gradient as a vector")
    return found


def networks(count):
    return [(dim, seed) for dim in DIMS for seed in range(count)]


def test_estimates_are_unbiased():
    torch.manual_seed(0)
    assert not findings(*errors(lambda n: RussianRoulette(num_probes=n), networks(3)))
    # All but the first term rest on the roulette.
    assert not findings(*errors(lambda n: RussianRoulette(1.0, n), networks(2)))


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_wrong_weights_are_found(shift):
    """The test above has the power to see the mistakes that are made: here it is given them, and the right weights."""
    found = findings(*errors(lambda n: Shifted(shift, n), [(2, 0), (8, 1)]))
    assert {*found} >= {"value far out", "gradient far out", "gradient as a vector"} if shift else not found


def test_estimates_of_single_rows_are_unbiased():
    """Where a batch is one row, every decision is about all that is left."""
    torch.manual_seed(0)
    at = large(3, 1, 0.7)
    probes = torch.randn(4000, 1, 1, 3).sign()
    draws = [torch.ops.pyroflows.roulette(v, at.times(v), at.weights, [], 1.0) for v in probes]
    values, w = (torch.stack(parts).flatten(0, 2) for parts in zip(*draws, strict=True))
    # The gradient by J is the transposed inverse of I + J.
    estimates = torch.cat([values[:, None], (w[:, :, None] * probes[:, 0, 0, None]).flatten(1)], 1)
    inverse = torch.linalg.inv(torch.eye(3) + at.weights[0])
    expected = torch.cat([Exact()(at, 1), inverse.T.flatten()])
    z = (estimates.mean(0) - expected) / (estimates.std(0) / 4000**0.5)
    assert z.abs().max() < stats.norm.isf(0.001 / 20)


@pytest.mark.slow
def test_estimates_of_fifty_networks_are_unbiased():
    torch.manual_seed(0)
    assert not findings(*errors(lambda n: RussianRoulette(num_probes=n), networks(50)))


# The roulette


def large(dim=8, num_rows=6, norm=0.8):
    """A Jacobian that keeps the length of vectors up to a factor, so that many terms matter."""
    return linear(norm * torch.linalg.qr(torch.randn(dim, dim))[0], num_rows)


def count_products(monkeypatch):
    """Count the rows that go on, at each product of the roulette."""
    counts = []

    def counted(u, weights, slopes):
        counts.append(int(u.flatten(1).any(1).sum()))
        return transposed_times(u, weights, slopes)

    monkeypatch.setattr(roulette, "_transposed_times", counted)
    return counts


@pytest.mark.parametrize("norm", [0.3, 0.7, 0.95])
def test_number_of_products_is_as_stated(norm, monkeypatch):
    counts = count_products(monkeypatch)
    RussianRoulette()(large(norm=norm, num_rows=2000), 1)
    # Terms that are sure, the one that ends them, and those that each follow with the probability of the norm.
    sure = math.floor(math.log(0.3) / math.log(norm))
    mean = sure + 1 + (norm ** (sure + 1) / 0.3) / (1 - norm)
    assert mean <= math.log(0.3) / math.log(norm) + 1 + 1 / (1 - norm)
    standard_error = norm**0.5 / (1 - norm) / 2000**0.5
    # The last quarter of the rows takes some more products between decisions.
    assert -4 * standard_error < sum(counts) / 2000 - mean < 0.5 + 4 * standard_error
    assert counts[: sure + 1] == [2000] * (sure + 1)


@pytest.mark.parametrize("norm", [0.3, 0.7, 0.95])
def test_the_roulette_adds_little_variance(norm):
    """Less than a fifth of what the probes have, in the vectors that give the gradient, and in the value."""
    torch.manual_seed(0)
    at = large(norm=norm, num_rows=1)
    v = torch.randn(20_000, 1, 8).sign()
    value, w = torch.ops.pyroflows.roulette(v, at.times(v), at.weights, [], 0.3)
    sure_value, sure_w = torch.ops.pyroflows.roulette(v, at.times(v), at.weights, [], 1e-6)
    assert (value - sure_value).var() < 0.2 * sure_value.var()
    gradient, sure_gradient = w[:, 0, :, None] * v[:, 0, None], sure_w[:, 0, :, None] * v[:, 0, None]
    assert (gradient - sure_gradient).var(0).sum() < 0.2 * sure_gradient.var(0).sum()


def test_value_is_the_same_with_and_without_gradients():
    at = leaves(network(8).at(None).linearized(torch.randn(3, 2, 8)))
    for log_det in (RussianRoulette(), RussianRoulette(0.1, 3), TruncatedSeries(5, 2), TruncatedSeries(5), Exact()):
        values = []
        for is_recorded in (True, False):
            torch.manual_seed(0)
            with torch.set_grad_enabled(is_recorded):
                values.append(log_det(at, 1))
        assert values[0].shape == (3, 2) and values[0].requires_grad and not values[1].requires_grad
        assert torch.equal(values[0], values[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch_shape", [(), (7,), (3, 2, 7), (0,)], ids=str)
def test_shapes_and_dtypes(batch_shape, dtype):
    for hidden_dims in ((), (16, 16)):
        net = network(4, hidden_dims, 0.5)
        at = net.at(None).linearized(torch.randn(*batch_shape, 4))
        at = leaves(Linearized(at.value.to(dtype), [w.to(dtype) for w in at.weights], [s.to(dtype) for s in at.slopes]))
        for log_det in (RussianRoulette(), RussianRoulette(0.1, 3), TruncatedSeries(5, 2), TruncatedSeries(3), Exact()):
            value = log_det(at, 1)
            assert value.shape == batch_shape and value.dtype == dtype
            assert all(g.isfinite().all() and g.dtype == dtype for g in gradients(log_det, at))


def test_estimates_of_images():
    """Kernels in the place of matrices: the mean is right, and shapes are those of the batch."""
    torch.manual_seed(0)
    kernels = [0.15 * torch.randn(4, 2, 3, 3), 0.15 * torch.randn(2, 4, 3, 3)]
    g = Contraction(kernels, [torch.randn(4, 1, 1), torch.randn(2, 1, 1)], "lipswish")
    at = g.linearized(torch.randn(2, 3, 2, 4, 4))
    for log_det, expected in (
        (RussianRoulette(1.0, 2000), Exact()(at, 3)),
        (TruncatedSeries(3, 2000), TruncatedSeries(3)(at, 3)),
    ):
        estimates = torch.stack([log_det(at, 3) for _ in range(10)])
        assert estimates.shape == (10, 2, 3)
        z = (estimates.mean(0) - expected) / (estimates.std(0) / 10**0.5)
        assert z.abs().max() < stats.t(9).isf(0.001 / 12)


def test_rows_without_a_value_leave_the_others_alone():
    """NaN, and a row that would multiply its vector by 1e30 each time: the others are what they are without them."""
    at = network(8).at(None).linearized(torch.randn(200, 8))
    slopes = [slope.clone() for slope in at.slopes]
    slopes[0][3], slopes[1][5] = torch.nan, 1e30
    broken = leaves(Linearized(at.value, at.weights, slopes))
    for log_det in (RussianRoulette(num_probes=50), TruncatedSeries(60, 50), TruncatedSeries(60)):
        value = log_det(broken, 1)
        is_bad = torch.arange(200)[:, None].eq(torch.tensor([3, 5])).any(1)
        assert not value[is_bad].isfinite().any()
        assert torch.isnan(value[3])
        z = (value - Exact()(at, 1))[~is_bad]
        assert z.abs().mean() < 0.3


def test_an_outlier_does_not_cost_the_others(monkeypatch):
    """A row near the bound goes on alone."""
    at = network(8, coefficient=0.1).at(None).linearized(torch.randn(200, 8))
    slopes = [slope.clone() for slope in at.slopes]
    slopes[0][3] *= 8
    counts = count_products(monkeypatch)
    RussianRoulette(0.01)(Linearized(at.value, at.weights, slopes), 1)
    assert sum(counts) < 4 * 200


@pytest.mark.parametrize("norm", [1.0, 1.01, 3.0])
def test_no_contraction_has_no_value(norm, monkeypatch):
    """It ends, with NaN, whether the vectors grow or only do not shrink."""
    monkeypatch.setattr(roulette, "MAX_TERMS", 500)
    at = leaves(linear(norm * torch.eye(2), 3))
    value = RussianRoulette()(at, 1)
    assert not value.isfinite().any()
    assert not torch.autograd.grad(value.sum(), at.weights)[0].isfinite().any()


@pytest.mark.parametrize("log_det", [RussianRoulette(), TruncatedSeries(4, 1)], ids=str)
def test_second_derivatives_are_those_of_what_is_estimated(log_det):
    """One draw gives no estimate of them: they are computed without probes instead."""
    reference = Exact() if isinstance(log_det, RussianRoulette) else TruncatedSeries(4)
    at = leaves(network(3, (5,)).double().at(None).linearized(torch.randn(4, 3, dtype=torch.float64)))

    def derivatives(log_det):
        first = gradients(log_det, at, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [*at.weights, *at.slopes])]

    for found, expected in zip(derivatives(log_det), derivatives(reference), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_in_batches():
    """By ``is_grads_batched``, as vectorised Jacobians ask for them."""
    at = leaves(network(3, (5,)).at(None).linearized(torch.randn(4, 3)))
    value = RussianRoulette()(at, 1)
    tensors = [*at.weights, *at.slopes]
    together = torch.autograd.grad(value, tensors, torch.eye(4), is_grads_batched=True, retain_graph=True)
    for i in range(4):
        alone = torch.autograd.grad(value, tensors, torch.eye(4)[i], retain_graph=True)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b)


@pytest.mark.parametrize("log_det", [RussianRoulette(), TruncatedSeries(4, 1)], ids=str)
def test_under_func_there_are_no_probes(log_det):
    reference = Exact() if isinstance(log_det, RussianRoulette) else TruncatedSeries(4)
    layer = Residual(3, (5,), log_det=log_det)
    for part in layer.net.layers:
        nn.init.normal_(part.weight)
    z = torch.randn(6, 3)
    parameters = dict(layer.named_parameters())
    expected = reference(layer.net.at(None).linearized(z), 1)

    def ladj(parameters, z):
        return torch.func.functional_call(_Ladj(layer), {f"layer.{k}": v for k, v in parameters.items()}, (z,))

    torch.testing.assert_close(torch.func.vmap(ladj, (None, 0))(parameters, z), expected)
    found = torch.func.vmap(torch.func.grad(ladj), (None, 0))(parameters, z)
    rows = [torch.autograd.grad(row, layer.net.layers[0].weight, retain_graph=True)[0] for row in expected]
    torch.testing.assert_close(found["net.layers.0.weight"], torch.stack(rows))


class _Ladj(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z):
        return self.layer.forward_and_ladj(z)[1]


# Recorded


def value_and_gradient(log_det, at):
    """A function of tensors alone, that gives the values with the gradients of their sum."""

    def function(*tensors):
        weights, slopes = tensors[: len(at.weights)], tensors[len(at.weights) :]
        with torch.enable_grad():
            again = leaves(Linearized(at.value, weights, slopes))
            value = log_det(again, 1)
            return [value.detach(), *torch.autograd.grad(value.sum(), [*again.weights, *again.slopes])]

    return function


@pytest.mark.parametrize(
    "log_det", [RussianRoulette(num_probes=2), TruncatedSeries(4, 1), TruncatedSeries(4), Exact()], ids=str
)
def test_recorded_programs(log_det):
    """They draw anew at each run, and what the function draws at the same seed, whatever the number of terms."""
    at, other = (network(8).at(None).linearized(torch.randn(20, 8)).held() for _ in range(2))
    function = value_and_gradient(log_det, at)
    examples, others = ([*part.weights, *part.slopes] for part in (at, other))
    traced = make_fx(function)(*examples)
    for program in (compiled(function, examples), traced):
        torch.manual_seed(1)
        first, second = program(*others), program(*others)
        torch.manual_seed(1)
        for found, expected in zip(first, function(*others), strict=True):
            torch.testing.assert_close(found, expected)
        is_random = isinstance(log_det, RussianRoulette) or getattr(log_det, "num_probes", None) is not None
        assert torch.equal(first[0], second[0]) != is_random


def test_the_loop_is_one_operator():
    at = network(8).at(None).linearized(torch.randn(20, 8)).held()
    with torch.no_grad():
        graph = make_fx(lambda: RussianRoulette()(at, 1))().graph
    assert [node.target for node in graph.nodes].count(torch.ops.pyroflows.roulette.default) == 1
    assert len(graph.nodes) < 60
    # Whoever reorders or merges operations must leave it as it is.
    assert torch.Tag.nondeterministic_seeded in torch.ops.pyroflows.roulette.default.tags
    v = torch.randn(1, 20, 8).sign()
    torch.library.opcheck(
        torch.ops.pyroflows.roulette.default,
        (v, v, at.weights, at.slopes, 0.3),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("log_det", [RussianRoulette(), Exact()], ids=str)
def test_compiled_in_one_graph(log_det):
    at = network(8).at(None).linearized(torch.randn(20, 8)).held()

    def loss(*weights):
        return log_det(Linearized(at.value, weights, at.slopes), 1).sum()

    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled_loss(*(w.clone().requires_grad_() for w in at.weights))
    results = []
    for function in (loss, compiled_loss):
        torch.manual_seed(0)
        weights = [w.clone().requires_grad_() for w in at.weights]
        results.append([value := function(*weights), *torch.autograd.grad(value, weights)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*deprecated:DeprecationWarning")
def test_traced_by_torch_jit():
    at = network(8).at(None).linearized(torch.randn(20, 8)).held()
    traced = torch.jit.trace(
        lambda slope: RussianRoulette()(Linearized(at.value, at.weights, [slope, at.slopes[1]]), 1),
        (at.slopes[0],),
        check_trace=False,
    )
    assert not torch.equal(traced(at.slopes[0]), traced(at.slopes[0]))


# In a layer


@pytest.mark.parametrize("log_det", ["exact", "roulette", RussianRoulette(0.1, 2), TruncatedSeries(3)], ids=str)
def test_what_is_reported_is_exact(log_det):
    """Through inverses and compositions; what trains is the estimate."""
    torch.manual_seed(0)
    layer = Residual(4, (8, 8), log_det=log_det)
    for part in layer.net.layers:
        nn.init.normal_(part.weight)
    is_exact = log_det == "exact"
    z = torch.randn(5, 4)
    expected = Exact()(layer.net.at(None).linearized(z), 1)
    assert layer.ladj_is_exact == layer.inv.ladj_is_exact == Compose([layer, Planar(4)]).ladj_is_exact == is_exact
    x, ladj = layer.exact().forward_and_ladj(z)
    torch.testing.assert_close(ladj, expected)
    for view in (layer.inv.exact(), layer.exact().inv, Compose([layer.inv]).exact()):
        assert view.ladj_is_exact
        torch.testing.assert_close(view.inverse_and_ladj(z)[1], expected)
        torch.testing.assert_close(view.forward_and_ladj(x)[1], -expected, rtol=1e-4, atol=1e-4)
    law = pf.Flow([layer.inv])()
    log_prob = law.log_prob(z)
    torch.testing.assert_close(log_prob, torch.distributions.Normal(0, 1).log_prob(x).sum(-1) + expected)
    assert torch.equal(law.estimated().log_prob(z), log_prob) == is_exact


@pytest.mark.parametrize("log_det", ["exact", "roulette", RussianRoulette(0.1, 2), TruncatedSeries(3, 1)], ids=str)
def test_files_hold_the_log_determinant(log_det, tmp_path):
    layer = Residual(4, (8, 8), log_det=log_det)
    pf.Flow([layer]).save(tmp_path / "flow")
    assert pf.load_flow(tmp_path / "flow").transform.layers[0].log_det == layer.log_det


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RussianRoulette(0.0), "threshold must be a number above 0 and finite, got 0.0"),
        (lambda: RussianRoulette(math.nan), "threshold must be a number above 0 and finite, got nan"),
        (lambda: RussianRoulette(math.inf), "threshold must be a number above 0 and finite, got inf"),
        (lambda: RussianRoulette("a"), "threshold must be a number above 0 and finite, got str"),
        (lambda: RussianRoulette(num_probes=0), "num_probes must be at least 1, got 0"),
        (lambda: RussianRoulette(num_probes=1.5), "num_probes must be an integer of at least 1, got 1.5"),
        (lambda: TruncatedSeries(0), "num_terms must be at least 1, got 0"),
        (lambda: TruncatedSeries("3"), "num_terms must be an integer of at least 1, got '3'"),
        (lambda: TruncatedSeries(3, 0), "num_probes must be at least 1, got 0"),
        (lambda: TruncatedSeries(3).bound(2, 1.0), "coefficient must be a number above 0 and below 1, got 1.0"),
        (lambda: TruncatedSeries(3).bound(-2, 0.5), "dim must be at least 1, got -2"),
        (lambda: TruncatedSeries.within(0.1, 2, 1.5), "coefficient must be a number above 0 and below 1, got 1.5"),
        (lambda: TruncatedSeries.within("a", 2, 0.5), "tolerance must be a number above 0 and finite, got str"),
        (lambda: TruncatedSeries.within(1e-12, 2, 0.5), "at least 1e-10"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(OptionError, match=message):
        make()


# Value and estimate in one pass


def layer_with_weights(activation="sine", context_dim=0, **options):
    """A layer whose weights are large, in double precision."""
    layer = Residual(3, (6, 5), context_dim=context_dim, activation=activation, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("batch_shape", [(), (7,), (3, 2, 7), (0,)], ids=str)
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("activation", ["sine", "tanh", "lipswish"])
def test_gradients_of_value_and_estimate(activation, context_dim, batch_shape):
    """In eager mode both are one function; they are what each is by itself, with the same random numbers."""
    layer = layer_with_weights(activation, context_dim)
    z = torch.randn(*batch_shape, 3, dtype=torch.float64, requires_grad=True)
    context = torch.randn(*batch_shape[1:], 2, dtype=torch.float64) if context_dim else None
    by_value = torch.randn_like(z)

    def function(by_parts):
        torch.manual_seed(0)
        if by_parts:
            at = layer.net.at(context).linearized(z)
            value, ladj = z + at.value, layer.log_det(at, 1)
        else:
            value, ladj = layer.forward_and_ladj(z, context)
        loss = (value * by_value).sum() + (ladj * ladj.detach().sin()).sum()
        return [value, ladj, *torch.autograd.grad(loss, [z, *layer.parameters()])]

    for found, expected in zip(function(False), function(True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_second_derivatives_of_value_and_estimate():
    layer = layer_with_weights()
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    tensors = [z, *layer.parameters()]

    def derivatives(layer):
        value, ladj = layer.forward_and_ladj(z)
        first = torch.autograd.grad((value.square().sum(-1) + ladj).sum(), tensors, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), tensors)]

    for found, expected in zip(derivatives(layer), derivatives(layer.exact()), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_of_value_and_estimate_in_batches():
    layer = layer_with_weights()
    value, ladj = layer.forward_and_ladj(torch.randn(4, 3, dtype=torch.float64))
    parameters = [*layer.parameters()]
    gradients = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    together = torch.autograd.grad((value, ladj), parameters, gradients, is_grads_batched=True, retain_graph=True)
    for i in range(5):
        alone = torch.autograd.grad((value, ladj), parameters, [g[i] for g in gradients], retain_graph=True)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b)
    for output, gradient in zip((value, ladj), gradients, strict=True):  # each by itself, too
        together = torch.autograd.grad(output, parameters, gradient, is_grads_batched=True, retain_graph=True)
        alone = torch.autograd.grad(output, parameters, gradient[2], retain_graph=True)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[2], b)

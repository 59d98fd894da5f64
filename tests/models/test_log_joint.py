"""The log joint with its gradient, compiled: values by hand, also behind a transform and beside singular matrices."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from scipy import stats
from torch.distributions import constraints

from pyroflows.compiling.check import Compiler
from pyroflows.compiling.singular import is_singular
from pyroflows.flows import IAF
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe
from tests.inference.test_elbo import Y, correlation, hierarchy, subsampled

both = pytest.mark.parametrize("mode", ["trace", "none"])


def make(model, mode="trace", *args):
    layout = Layout(describe(model, args, {}))
    return LogJoint(model, args, {}, layout, 0.1 * torch.randn(5, layout.dim), Compiler(mode))


def by_autograd(function, vectors):
    leaf = vectors.clone().requires_grad_()
    value = function(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def assert_both_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def density_by_hand(u):
    """Of the hierarchy: a scale by its logarithm, then a mean."""
    scale, mean = u[..., 0].exp(), u[..., 1]
    log_prior = dist.HalfNormal(2.0).log_prob(scale) + u[..., 0] + dist.Normal(0.0, 3.0).log_prob(mean)
    return log_prior + dist.Normal(mean[..., None], scale[..., None]).log_prob(Y).sum(-1)


@both
@pytest.mark.parametrize("num_vectors", [8, 3])
def test_value_and_gradient(mode, num_vectors):
    """Also of another number of vectors than the program was made for."""
    value_and_grad = make(hierarchy, mode).value_and_grad(torch.zeros(8, 2))
    u = torch.randn(num_vectors, 2)
    assert_both_close(value_and_grad(u), by_autograd(density_by_hand, u))


@both
def test_behind_a_transform(mode):
    """The Jacobian of the transform counts, in the value and in the gradient."""
    transform = IAF(2, num_layers=2, hidden_dims=(8,)).transform
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    value_and_grad = make(hierarchy, mode).value_and_grad(torch.zeros(8, 2), transform.forward_and_ladj)
    z = torch.randn(8, 2)

    def expected(z):
        _, ladj = transform.forward_and_ladj(z)
        assert ladj.abs().max() > 0.05
        return density_by_hand(transform.forward_and_ladj(z)[0]) + ladj

    assert_both_close(value_and_grad(z), by_autograd(expected, z))


def test_rows_of_the_data_are_drawn_once():
    value_and_grad = make(subsampled).value_and_grad(torch.zeros(4, 2))
    u = torch.randn(4, 2)
    assert all(map(torch.equal, value_and_grad(u), value_and_grad(u)))


@both
@pytest.mark.parametrize("num_rows", [8, 5])
def test_only_the_vector_of_a_singular_matrix_notices(mode, num_rows):
    value_and_grad = make(correlation, mode).value_and_grad(torch.zeros(8, 1))
    u = torch.tensor([0.1, 2.0, -0.5, 0.3, -3.0, 0.9, 0.0, 1.5])[:num_rows, None]
    is_good = u[:, 0].abs() < 1
    value, gradient = value_and_grad(u)
    assert not value[~is_good].isfinite().any()

    def expected(r):
        covariance = torch.stack([torch.cat([r**0, r], -1), torch.cat([r, r**0], -1)], -2)
        likelihood = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(torch.tensor([1.0, 0.5]))
        return dist.Normal(0.0, 0.2).log_prob(r[:, 0]) + likelihood

    assert_both_close((value[is_good], gradient[is_good]), by_autograd(expected, u[is_good]))


def test_in_chunks_at_singular_matrices():
    u = torch.tensor([0.1, 2.0, -0.5, 0.3, -3.0, 0.9, 0.0, 1.5])[:, None]
    log_joint = make(correlation, "none")
    found = log_joint.in_chunks(u)
    is_good = u[:, 0].abs() < 1
    assert not found[~is_good].isfinite().any()
    torch.testing.assert_close(found[is_good], log_joint(u[is_good]))


def test_other_errors_pass_on():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        if is_broken:
            raise RuntimeError("out of memory")

    is_broken = False
    value_and_grad = make(model, "none").value_and_grad(torch.zeros(4, 1))
    is_broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        value_and_grad(torch.zeros(4, 1))


@pytest.mark.parametrize(
    "function", [torch.linalg.cholesky, torch.linalg.inv, lambda matrix: torch.linalg.solve(matrix, torch.ones(2))]
)
def test_errors_of_singular_matrices_are_known(function):
    with pytest.raises(RuntimeError) as caught:
        function(-torch.ones(2, 2))
    assert is_singular(caught.value)
    assert not is_singular(RuntimeError("shape mismatch"))


def test_sites_that_are_not_finite_are_counted() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("positive", torch.where(x > 0, 0.0, -torch.inf))

    layout = Layout(describe(model, (), {}))
    log_joint = LogJoint(model, (), {}, layout, examples=torch.ones(1, 1))
    assert log_joint.non_finite_sites(torch.tensor([[1.0], [-1.0], [-2.0]])) == {"positive": 2}


def test_draws_of_the_prior_have_its_density():
    """Scale and data do not belong to it; the scale of the first is log-normal in the unconstrained space."""

    def model():
        with pyro.poutine.scale(scale=3.0):
            a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(1.0))

    torch.manual_seed(0)
    vectors, log_prior = make(model, "none").draw_prior(4000)
    assert stats.kstest(vectors[:, 0].numpy(), "norm").pvalue > 0.01
    torch.testing.assert_close(log_prior, dist.Normal(0.0, 1.0).log_prob(vectors[:, 0]))


def test_flat_priors_cannot_be_drawn():
    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    assert make(model, "none").draw_prior(10) is None

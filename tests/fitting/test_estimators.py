"""Gradient estimators: against slow references at fixed noise, unbiased, and exact where the flow is."""

import copy
import math
from functools import partial

import pyro
import pytest
import torch
from torch.distributions import Independent, Laplace, MultivariateNormal, ReshapeTransform
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflows.compiling.program import compiled
from pyroflows.fitting.estimators import ESTIMATORS
from pyroflows.flows import IAF, MAF, Flow, Planar, Radial, RealNVP, Sylvester
from pyroflows.transforms import Elementwise
from pyroflows.transforms.univariate import Affine

ALL = pytest.mark.parametrize("name", ESTIMATORS)
# Those of the Kullback-Leibler divergence itself, and those whose variance vanishes at the optimum.
OF_KL = ["total", "path", "vargrad"]
LANDING = ["path", "dreg", "vargrad"]
# By independent components of a gradient; chosen once, the seeds being fixed.
MAX_Z = 4.5

FLOWS = {
    "planar": partial(Planar, num_layers=3),
    "radial": partial(Radial, num_layers=3),
    "sylvester": partial(Sylvester, num_layers=2),
    "iaf": partial(IAF, num_layers=2, hidden_dims=(8,)),
    "maf": partial(MAF, num_layers=2, hidden_dims=(8,)),
    "realnvp": partial(RealNVP, num_layers=2, hidden_dims=(8,)),
}
FLOW = pytest.mark.parametrize("flow_fn", FLOWS.values(), ids=FLOWS)
BASE = pytest.mark.parametrize("base", [None, "student_t"], ids=["normal", "student_t"])


def perturbed(flow, scale=0.4):
    """A flow away from the identity, in float64."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return flow.double()


def affine_flow(mean, log_sd):
    layer = Elementwise(len(mean), Affine(None, None), init=torch.stack([mean, log_sd], -1))
    return Flow([layer], standardize=False).double()


def target(x):
    """No Gaussian: the tails of the draws matter."""
    return Independent(Laplace(torch.full((x.shape[-1],), 0.3, dtype=x.dtype), 1.3), 1).log_prob(x)


def vector(gradients):
    return torch.cat([part.reshape(-1) for part in gradients])


def gradient_of(loss, flow):
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return vector(torch.autograd.grad(loss, list(flow.parameters()), **options))


def gradient(name, flow, log_joint, num_particles):
    """All parameters' gradients in one vector, at draws of the base's own."""
    q = flow()
    return gradient_of(ESTIMATORS[name](q, log_joint, q.base.rsample((num_particles,)))[0], flow)


def at_seed(seed, function, *args):
    torch.manual_seed(seed)
    return function(*args)


def assert_mean(draws, expected, name=None):
    standard_error = draws.std(0) / math.sqrt(len(draws))
    z = (draws.mean(0) - expected) / standard_error.clamp_min(1e-12)
    assert z.abs().max() < MAX_Z, (name, z)


# Slow references, by definition: log q through the inverse, one draw's Jacobian at a time


def score_and_parameter_gradients(flow, x):
    """For each draw, the gradients of log q at x with respect to x, and to the parameters at fixed x."""
    by_x, by_parameters = [], []
    for x_i in x.detach():
        x_i.requires_grad_()
        log_q = flow().log_prob(x_i)
        by_x.append(torch.autograd.grad(log_q, x_i, retain_graph=True)[0])
        by_parameters.append(gradient_of(log_q, flow))
    return torch.stack(by_x), torch.stack(by_parameters)


def reference(name, flow, log_joint, seed, num_particles):
    """Value and gradient by the estimator's formula."""
    x = at_seed(seed, flow().rsample, (num_particles,))
    score, by_parameters = score_and_parameter_gradients(flow, x)
    at = x.detach().requires_grad_()
    log_p = log_joint(at)
    (slope,) = torch.autograd.grad(log_p.sum(), at)
    log_weights = (log_p - flow().log_prob(x.detach())).detach()
    weights = torch.softmax(log_weights, 0)
    bound = torch.logsumexp(log_weights, 0) - math.log(num_particles)
    # Of minus log w: along the path of a draw, and in total.
    path = torch.stack([gradient_of((x_i * g).sum(), flow) for x_i, g in zip(x, score - slope, strict=True)])
    total = path + by_parameters
    centered = log_weights - log_weights.mean()
    return {
        "total": (-log_weights.mean(), total.mean(0)),
        "path": (-log_weights.mean(), path.mean(0)),
        "iwae": (-bound, (weights[:, None] * total).sum(0)),
        "dreg": (-bound, (weights[:, None] ** 2 * path).sum(0)),
        "vargrad": (log_weights.var() / 2, -(centered[:, None] * by_parameters).sum(0) / (num_particles - 1)),
    }[name]


# As `rsample` of a base with learned parameters is differentiable, draws carry gradients in these tests.
@ALL
@BASE
@FLOW
def test_value_and_gradient_are_those_of_the_formula(name, flow_fn, base):
    flow = perturbed(flow_fn(3, base=base))

    def estimate():
        q = flow()
        return ESTIMATORS[name](q, target, q.base.rsample((6,)))

    loss, log_weights = at_seed(0, estimate)
    value, expected = reference(name, flow, target, 0, 6)
    assert loss.item() == pytest.approx(value.item(), rel=1e-7)
    torch.testing.assert_close(gradient_of(loss, flow), expected, rtol=1e-6, atol=1e-8)
    x = at_seed(0, flow().rsample, (6,)).detach()
    assert not log_weights.requires_grad
    torch.testing.assert_close(log_weights, (target(x) - flow().log_prob(x)).detach(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("name", "same"), [("iwae", "total"), ("dreg", "path")])
def test_one_draw_is_the_estimator_of_the_elbo(name, same):
    flow = perturbed(IAF(3, num_layers=2, hidden_dims=(8,)))
    expected = at_seed(0, gradient, same, flow, target, 1)
    torch.testing.assert_close(at_seed(0, gradient, name, flow, target, 1), expected)


# The exact gradient of the Kullback-Leibler divergence


@pytest.mark.parametrize("name", OF_KL)
def test_unbiased_for_a_gaussian_target(name):
    """KL of Normal(mu, diag(sigma^2)) from Normal(m, inverse of L) has gradients L (mu - m) and sigma^2 diag(L) - 1."""
    mean, log_sd = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.2, -0.7]).double()
    precision = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    gaussian = MultivariateNormal(torch.tensor([-0.3, 0.4]).double(), precision_matrix=precision)
    flow = affine_flow(mean, log_sd)
    draws = torch.stack([gradient(name, flow, gaussian.log_prob, 40) for _ in range(100)])
    by_mean = precision @ (mean - gaussian.mean)
    by_log_sd = (2 * log_sd).exp() * precision.diagonal() - 1
    assert_mean(draws, torch.stack([by_mean, by_log_sd], -1).reshape(-1))


@FLOW
def test_unbiased_for_a_flow(flow_fn):
    """Against -ELBO by quadrature over the base, differentiated."""
    flow = perturbed(flow_fn(2))
    axis = torch.linspace(-7, 7, 201, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    log_base = flow.base().log_prob(z)
    x, ladj = flow.transform.forward_and_ladj(z)
    area = (axis[1] - axis[0]) ** 2
    expected = gradient_of((log_base.exp() * (log_base - ladj - target(x))).sum() * area, flow)
    for name in OF_KL:
        draws = torch.stack([gradient(name, flow, target, 512) for _ in range(50)])
        assert_mean(draws, expected, name)


@pytest.mark.parametrize("base", [None, pytest.param("student_t", marks=pytest.mark.slow)])
def test_doubly_reparametrised_gradient_has_the_mean_of_the_bound_s(base):
    flow = perturbed(IAF(3, num_layers=2, hidden_dims=(8,), base=base), scale=0.2)

    def difference(seed):
        return at_seed(seed, gradient, "iwae", flow, target, 32) - at_seed(seed, gradient, "dreg", flow, target, 32)

    draws = torch.stack([difference(seed) for seed in range(150)])
    assert draws.abs().max() > 1e-3
    assert_mean(draws, torch.zeros(draws.shape[-1]).double())


# At the optimum


@BASE
@FLOW
def test_gradients_vanish_where_the_flow_is_exact(flow_fn, base):
    flow = perturbed(flow_fn(3, base=base))
    exact = copy.deepcopy(flow).requires_grad_(False)
    for name in LANDING:
        assert gradient(name, flow, lambda x: exact().log_prob(x), 32).abs().max() < 1e-9
    for name in ("total", "iwae"):
        assert gradient(name, flow, lambda x: exact().log_prob(x), 32).abs().max() > 1e-2


@ALL
@FLOW
def test_log_weights_are_constant_where_the_flow_is_exact(name, flow_fn):
    flow = perturbed(flow_fn(3))
    exact = copy.deepcopy(flow).requires_grad_(False)
    q = flow()
    _, log_weights = ESTIMATORS[name](q, lambda x: exact().log_prob(x) + 3.0, q.base.sample((32,)))
    assert (log_weights - 3.0).abs().max() < 1e-9


# Parameters of the model


@ALL
def test_parameters_of_the_model_have_the_gradient_of_the_bound(name):
    flow = perturbed(Planar(2, num_layers=2))
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z = flow().base.sample((20,))
    loss, log_weights = ESTIMATORS[name](flow(), lambda x: -scale * x.square().sum(-1), z)
    loss.backward()
    weights = torch.softmax(log_weights, 0) if name in ("iwae", "dreg") else torch.full_like(log_weights, 1 / 20)
    x, _ = flow().transport(z)
    assert scale.grad.item() == pytest.approx((weights * x.square().sum(-1)).sum().item(), rel=1e-10)


@ALL
def test_parameters_that_do_not_train(name):
    flow = perturbed(Planar(2, num_layers=2, base="student_t"))
    flow.base.raw_df.requires_grad_(False)
    q = flow()
    ESTIMATORS[name](q, target, q.base.rsample((4,)))[0].backward()
    assert flow.base.raw_df.grad is None
    assert all(p.requires_grad and p.grad is not None for p in flow.transform.parameters())


# Traced


@ALL
@pytest.mark.parametrize("flow_fn", [FLOWS["iaf"], FLOWS["realnvp"]], ids=["iaf", "realnvp"])
def test_traced_gradients_equal_eager_ones(name, flow_fn):
    flow = perturbed(flow_fn(3))

    def step(z):
        loss, log_weights = ESTIMATORS[name](flow(), target, z)
        return loss.detach(), log_weights, *torch.autograd.grad(loss, list(flow.parameters()))

    z, other = torch.randn(2, 8, 3, dtype=torch.float64)
    with pyro.validation_enabled(False):
        graph = make_fx(step)(z)
    with torch.no_grad():
        results = graph(other)
    torch.testing.assert_close(list(results), list(step(other)))


def test_names():
    assert list(ESTIMATORS) == ["total", "path", "iwae", "dreg", "vargrad"]


@ALL
@pytest.mark.parametrize("num_particles", [2, 7])
def test_events_with_more_axes(name, num_particles):
    """The gradients are those of the same events as vectors."""
    layers = perturbed(IAF(6, num_layers=2, hidden_dims=(8,))).layers
    flat, folded = (Flow([*layers, *more]) for more in ([], [ReshapeTransform(torch.Size([6]), torch.Size([2, 3]))]))
    z = torch.randn(num_particles, 6, dtype=torch.float64)
    expected = ESTIMATORS[name](flat.double()(), target, z)
    found = ESTIMATORS[name](folded.double()(), lambda x: target(x.flatten(-2)), z)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient_of(found[0], folded), gradient_of(expected[0], flat))


# Where the density is zero, or a gradient is not finite


def cut(log_p, x, outside):
    """A log-density that is not finite where the first component of x is above 0.3."""
    return torch.where(x[..., 0] < 0.3, log_p, torch.tensor(outside, dtype=log_p.dtype))


def nan_gradient(x):
    """The root of a negative number: NaN, and so is its gradient."""
    return (0.3 - x[..., 0]).sqrt()


OUTSIDE = {
    "-inf": lambda x: cut(target(x), x, -math.inf),
    "nan": lambda x: cut(target(x), x, math.nan),
    "nan gradient": lambda x: target(x) + 0.0 * nan_gradient(x),
}


@ALL
@pytest.mark.parametrize("log_joint", OUTSIDE.values(), ids=OUTSIDE)
def test_a_draw_of_density_zero_leaves_the_estimate(name, log_joint):
    flow = perturbed(IAF(3, num_layers=2, hidden_dims=(8,)))
    z = torch.randn(40, 3, dtype=torch.float64)
    x, _ = flow().transport(z)
    inside = x[:, 0] < 0.3
    assert 5 < inside.sum() < 35
    loss, log_weights = ESTIMATORS[name](flow(), log_joint, z)
    assert torch.equal(log_weights.isfinite(), inside)
    found = gradient_of(loss, flow)
    assert loss.isfinite() and found.isfinite().all()
    of_others = ESTIMATORS[name](flow(), target, z[inside])[0]
    if name in ("total", "iwae"):
        share = inside.double().mean().log()
        torch.testing.assert_close(loss, of_others - share)
        torch.testing.assert_close(found, gradient_of(of_others, flow))


@pytest.mark.parametrize("name", ["path", "dreg", "vargrad"])
def test_draws_outside_have_a_price(name):
    """The shape of q is that of p where p is positive, so that the rest of the gradient is that of the share."""
    flow = affine_flow(torch.zeros(1).double(), torch.zeros(1).double())
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)

    def half(x):
        return torch.where(x[..., 0] > 0, normal.log_prob(x[..., 0]), -math.inf)

    draws = torch.stack([gradient(name, flow, half, 64) for _ in range(200)])
    # The mean of the flow is the first parameter. The logarithm of the share grows by phi(0) / q(A) = 2 phi(0), at a
    # price of one nat; the covariance of "vargrad" has it times q(A).
    expected = -2 * normal.log_prob(torch.zeros(())).exp() * (0.5 if name == "vargrad" else 1.0)
    assert_mean(draws[:, :1], expected)


def test_a_gradient_that_is_not_finite_leaves_the_path_gradient():
    """A finite value does not help: such a draw would push the flow as if its density were constant."""

    def trap(x):  # torch.where passes NaN on
        return torch.where(x[..., 0] < 0.3, (0.3 - x[..., 0]).sqrt(), -1.0) - x.square().sum(-1)

    flow = perturbed(IAF(3, num_layers=2, hidden_dims=(8,)))
    z = torch.randn(40, 3, dtype=torch.float64)
    x, _, _ = flow().transport_and_score(z)
    inside = x[:, 0] < 0.3
    found = gradient_of(ESTIMATORS["path"](flow(), trap, z)[0], flow)
    expected = gradient_of(ESTIMATORS["path"](flow(), trap, z[inside])[0], flow) * inside.double().mean()
    torch.testing.assert_close(found, expected)


@ALL
@pytest.mark.parametrize("log_joint", OUTSIDE.values(), ids=OUTSIDE)
def test_traced_gradients_of_a_cut_density(name, log_joint):
    flow = perturbed(IAF(3, num_layers=2, hidden_dims=(8,)))

    def step(z):
        loss, log_weights = ESTIMATORS[name](flow(), log_joint, z)
        return loss.detach(), log_weights, *torch.autograd.grad(loss, list(flow.parameters()))

    z, other = torch.randn(2, 20, 3, dtype=torch.float64)
    found = compiled(step, [z])(other)
    torch.testing.assert_close(list(found), list(step(other)), equal_nan=True)


def test_without_a_finite_draw_the_loss_is_not_finite():
    for estimator in ESTIMATORS.values():
        loss, _ = estimator(
            affine_flow(torch.zeros(1), torch.zeros(1))(), lambda x: x.sum(-1) - math.inf, torch.ones(4, 1).double()
        )
        assert not loss.isfinite()

"""Gradient estimators: unbiased, and the path gradient exact where the flow is."""

import copy
import math
from functools import partial

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyroflows.flows import IAF, MAF, Flow, Planar, Radial, Sylvester
from pyroflows.inference.estimators import ESTIMATORS, frozen, path_gradient, total_gradient
from pyroflows.transforms import Elementwise
from pyroflows.transforms.univariate import Affine

ESTIMATOR = pytest.mark.parametrize("estimator", [total_gradient, path_gradient])
# By independent components of a gradient; chosen once, the seeds being fixed.
MAX_Z = 4.5

FLOWS = {
    "planar": partial(Planar, num_layers=3),
    "radial": partial(Radial, num_layers=3),
    "sylvester": partial(Sylvester, num_layers=2),
    "iaf": partial(IAF, num_layers=2, hidden_dims=(8,)),
    "maf": partial(MAF, num_layers=2, hidden_dims=(8,)),
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
    return Flow([Elementwise(len(mean), Affine(None, None), init=torch.stack([mean, log_sd], -1))]).double()


def gradient(estimator, flow, log_joint, num_particles):
    """All parameters' gradients in one vector."""
    loss, _ = estimator(flow, log_joint, num_particles)
    parts = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def assert_mean(draws, expected):
    standard_error = draws.std(0) / math.sqrt(len(draws))
    z = (draws.mean(0) - expected) / standard_error.clamp_min(1e-12)
    assert z.abs().max() < MAX_Z, z


# The exact gradient of the Kullback-Leibler divergence


@ESTIMATOR
def test_unbiased_for_a_gaussian_target(estimator):
    """KL of Normal(mu, diag(sigma^2)) from Normal(m, inverse of L) has gradients L (mu - m) and sigma^2 diag(L) - 1."""
    mean, log_sd = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.2, -0.7]).double()
    precision = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    target = MultivariateNormal(torch.tensor([-0.3, 0.4]).double(), precision_matrix=precision)
    flow = affine_flow(mean, log_sd)
    draws = torch.stack([gradient(estimator, flow, target.log_prob, 8) for _ in range(1500)])
    by_mean = precision @ (mean - target.mean)
    by_log_sd = (2 * log_sd).exp() * precision.diagonal() - 1
    assert_mean(draws, torch.stack([by_mean, by_log_sd], -1).reshape(-1))


@ESTIMATOR
@FLOW
def test_unbiased_for_a_flow(estimator, flow_fn):
    """Against -ELBO by quadrature over the base, differentiated."""
    flow = perturbed(flow_fn(2))
    # No Gaussian: the tails of the draws matter.
    log_joint = torch.distributions.Independent(torch.distributions.Laplace(torch.zeros(2).double(), 1.3), 1).log_prob

    axis = torch.linspace(-7, 7, 401, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    log_base = flow.base().log_prob(z)
    x, ladj = flow.transform.forward_and_ladj(z)
    area = (axis[1] - axis[0]) ** 2
    negative_elbo = (log_base.exp() * (log_base - ladj - log_joint(x))).sum() * area
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(negative_elbo, list(flow.parameters()))])

    draws = torch.stack([gradient(estimator, flow, log_joint, 256) for _ in range(100)])
    assert_mean(draws, expected)


@BASE
@FLOW
def test_both_have_the_same_mean(flow_fn, base):
    """At the same draws they differ by the score, whose mean is zero."""
    flow = perturbed(flow_fn(3, base=base), scale=0.2)
    target = MultivariateNormal(torch.ones(3).double(), 2 * torch.eye(3).double())

    def difference(seed):
        pair = []
        for estimator in (total_gradient, path_gradient):
            torch.manual_seed(seed)
            pair.append(gradient(estimator, flow, target.log_prob, 256))
        return pair[0] - pair[1]

    draws = torch.stack([difference(seed) for seed in range(60)])
    assert draws.abs().max() > 1e-3
    assert_mean(draws, torch.zeros(draws.shape[-1]).double())


# At the optimum


@BASE
@FLOW
def test_path_gradient_vanishes_where_the_flow_is_exact(flow_fn, base):
    flow = perturbed(flow_fn(3, base=base))
    target = copy.deepcopy(flow).requires_grad_(False)
    path = gradient(path_gradient, flow, lambda x: target().log_prob(x), 32)
    total = gradient(total_gradient, flow, lambda x: target().log_prob(x), 32)
    assert path.abs().max() < 1e-9
    assert total.abs().max() > 1e-2


@ESTIMATOR
@FLOW
def test_log_weights_are_constant_where_the_flow_is_exact(estimator, flow_fn):
    flow = perturbed(flow_fn(3))
    target = copy.deepcopy(flow).requires_grad_(False)
    _, log_weights = estimator(flow, lambda x: target().log_prob(x) + 3.0, 32)
    assert (log_weights - 3.0).abs().max() < 1e-9


# What they return


@ESTIMATOR
@FLOW
def test_value(estimator, flow_fn):
    """Minus the mean of log p - log q, at the flow's own draws."""
    flow = perturbed(flow_fn(2))
    seen = []

    def log_joint(x):
        seen.append(x)
        return -x.square().sum(-1)

    loss, log_weights = estimator(flow, log_joint, 50)
    assert log_weights.shape == (50,)
    assert not log_weights.requires_grad
    assert loss.requires_grad
    assert loss.item() == pytest.approx(-log_weights.mean().item(), rel=1e-12)
    (x,) = seen
    assert x.requires_grad
    expected = -x.square().sum(-1) - flow().log_prob(x.detach())
    assert log_weights.tolist() == pytest.approx(expected.tolist(), abs=1e-8)


@ESTIMATOR
def test_the_model_s_own_parameters_have_gradients(estimator):
    flow = perturbed(Planar(2, num_layers=2))
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    x = flow().sample((20,))
    torch.manual_seed(1)
    loss, _ = estimator(flow, lambda x: -scale * x.square().sum(-1), 20)
    loss.backward()
    assert scale.grad.item() == pytest.approx(x.square().sum(-1).mean().item(), rel=1e-10)


@ESTIMATOR
def test_parameters_stay_trainable(estimator):
    flow = perturbed(Planar(2, num_layers=2, base="student_t"))
    flow.base.raw_df.requires_grad_(False)
    estimator(flow, lambda x: -x.square().sum(-1), 4)[0].backward()
    assert not flow.base.raw_df.requires_grad
    assert all(p.requires_grad and p.grad is not None for p in flow.transform.parameters())


def test_names():
    assert set(ESTIMATORS) == {"total", "path"}


# Freezing


def test_frozen_gives_no_gradient_and_restores():
    layer = torch.nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    x = torch.ones(2, requires_grad=True)
    with frozen(layer):
        y = layer(x)
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad
    y.backward()
    assert layer.weight.grad is None
    assert x.grad.tolist() == layer.weight[0].tolist()


def test_frozen_restores_after_an_exception():
    layer = torch.nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="of the model"), frozen(layer):
        raise RuntimeError("of the model")
    assert layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_an_error_in_the_path_gradient_leaves_the_flow_trainable():
    flow = Flow([Elementwise(2)])

    class Broken(Exception):
        pass

    def raising(*args):
        raise Broken

    flow.transform.inverse_and_ladj = raising
    with pytest.raises(Broken):
        path_gradient(flow, lambda x: -x.square().sum(-1), 4)
    assert all(p.requires_grad for p in flow.parameters())

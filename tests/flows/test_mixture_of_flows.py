"""The mixture of flows as a law, as a module, and as what a guide holds."""

import copy
import math
import pickle

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import Predictive

from pyroflows import OptionError, Posterior, ShapeError, load_posterior
from pyroflows.flows import IAF, NSF, Flow, Gaussian, Mixture, Planar, Recipe
from pyroflows.guides import AutoFlow
from pyroflows.training.loop import History
from pyroflows.transforms import Triangular

WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
LOCS = torch.tensor([[-6.0, 0.0], [5.0, 4.0], [5.0, -4.0]], dtype=torch.float64)
TRIL = torch.tensor([[1.0, 0.0], [0.5, 0.7]], dtype=torch.float64)


def gaussians():
    """Unnormalised weights, as evidences are."""
    parts = [Flow([Triangular(2, loc=loc, scale_tril=TRIL)]).double() for loc in LOCS]
    return Mixture(parts, WEIGHTS.log() + 7.0)


def by_hand():
    parts = dist.MultivariateNormal(LOCS, scale_tril=TRIL)
    return dist.MixtureSameFamily(dist.Categorical(WEIGHTS), parts)


def bent(dtype=torch.float64):
    parts = [IAF(2, num_layers=2, hidden_dims=(8,)), Planar(2, num_layers=3)]
    mixture = Mixture(parts, torch.tensor([0.0, 1.0])).to(dtype)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixture


# The law


def test_log_prob_by_hand():
    x = 5 * torch.randn(4, 50, 2, dtype=torch.float64)
    found = gaussians()().log_prob(x)
    torch.testing.assert_close(found, by_hand().log_prob(x), rtol=1e-9, atol=1e-9)


def test_density_integrates_to_one():
    axis = torch.linspace(-20, 20, 401, dtype=torch.float64)
    log_prob = bent()().log_prob(torch.cartesian_prod(axis, axis))
    assert (log_prob.exp().sum() * 0.1**2).item() == pytest.approx(1.0, abs=1e-4)


def test_draws_have_the_weights_and_moments_of_the_components():
    n = 40_000
    x = gaussians()().sample((n,))
    assert x.shape == (n, 2) and x.dtype == torch.float64
    nearest = torch.cdist(x, LOCS).argmin(-1)
    for k, weight in enumerate(WEIGHTS):
        part = x[nearest == k]
        assert abs(len(part) / n - weight) < 4 * (weight * (1 - weight) / n).sqrt()
        white = torch.linalg.solve_triangular(TRIL, (part - LOCS[k]).mT, upper=False)
        assert white.mean(1).abs().max() < 4 / math.sqrt(len(part)) + 1e-3
        assert (torch.cov(white) - torch.eye(2)).abs().max() < 4 * math.sqrt(2 / len(part)) + 5e-3


def test_order_of_draws_says_nothing():
    """The component of one draw is independent of the next one's."""
    right = (gaussians()().sample((20_000,))[:, 0] > 0).double()
    correlation = torch.corrcoef(torch.stack([right[1:], right[:-1]]))[0, 1]
    assert correlation.abs() < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes(shape, dtype):
    q = bent(dtype)()
    assert (q.batch_shape, q.event_shape) == ((), (2,))
    x, log_q = q.rsample_and_log_prob(shape)
    assert (x.shape, log_q.shape) == ((*shape, 2), shape)
    assert x.dtype == log_q.dtype == dtype
    assert not x.requires_grad
    torch.testing.assert_close(log_q, q.log_prob(x))
    assert q.sample(shape).shape == (*shape, 2)


def test_its_density_has_gradients_in_all_components():
    mixture = bent()
    mixture().log_prob(torch.randn(20, 2, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in mixture.parameters())


# The module


def test_it_is_its_own_base():
    mixture = gaussians()
    x = torch.randn(5, 2, dtype=torch.float64)
    y, ladj = mixture.transform.forward_and_ladj(x)
    assert torch.equal(x, y) and (ladj == 0).all()
    torch.testing.assert_close(mixture.base().log_prob(x), mixture().log_prob(x))
    assert len(mixture.components) == 3


@pytest.mark.parametrize(
    ("flows", "options", "error", "message"),
    [
        ([Gaussian(2), Gaussian(3)], {}, ShapeError, r"one size, but got flows of sizes \[2, 3\]"),
        ([], {}, ShapeError, "one or more flows"),
        ([Gaussian(2)] * 2, {"log_weights": torch.zeros(3)}, ShapeError, r"a log weight for each, got shape \(3,\)"),
        ([Gaussian(2)] * 2, {"log_weights": torch.zeros(2, 1)}, ShapeError, "a log weight for each"),
        ([Gaussian(2)] * 2, {"log_weights": torch.tensor([0.0, math.nan])}, OptionError, "must be numbers"),
        ([Gaussian(2)] * 2, {"log_weights": torch.full((2,), -math.inf)}, OptionError, "one is finite"),
        ([NSF(2, context_dim=3), NSF(2, context_dim=1)], {}, ShapeError, r"one context, but have sizes \[3, 1\]"),
        ([NSF(2, context_dim=3)], {"context_dim": 2}, ShapeError, r"one context, but have sizes \[3, 2\]"),
        ([Gaussian(2), Gaussian(2).double()], {}, OptionError, "float32 on cpu and torch.float64 on cpu"),
        ([Gaussian(2), Gaussian(2)()], {}, OptionError, "made of flows, but got FlowDistribution"),
        ([Gaussian(2), Gaussian], {}, OptionError, "made of flows, but got the class Gaussian"),
    ],
)
def test_what_does_not_fit_raises(flows, options, error, message):
    with pytest.raises(error, match=message):
        Mixture(flows, **options)


def test_a_context_raises():
    with pytest.raises(ShapeError, match=r"has context size 0, but got shape \(3, 1\)"):
        gaussians()(torch.zeros(3, 1))


def loaded(mixture):
    fresh = bent()
    fresh.load_state_dict(mixture.state_dict())
    return fresh


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), loaded])
def test_copies_have_the_same_law_and_share_nothing(copied):
    mixture = bent()
    mixture().log_prob(torch.zeros(2, dtype=torch.float64)).backward()
    other, x = copied(mixture), torch.randn(10, 2, dtype=torch.float64)
    before = mixture().log_prob(x).detach()
    assert torch.equal(other().log_prob(x), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert torch.equal(mixture().log_prob(x), before)


def test_dtype_and_weights_move_along():
    mixture = bent(torch.float32)
    assert mixture.double().gate().dtype == torch.float64
    assert mixture().sample((3,)).dtype == torch.float64


@pytest.mark.parametrize("values", [[[1.0, -6.0]], np.array([[1, -6]]), torch.tensor([[1.0, -6.0]]).double()])
def test_values_are_cast(values):
    mixture = bent(torch.float32)
    x = torch.tensor([[1.0, -6.0]])
    found = mixture().log_prob(values)
    assert found.dtype == torch.float32 and torch.equal(found, mixture().log_prob(x))
    assert torch.equal(mixture().latent(values), x)


# In a guide


def absolute(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    pyro.sample("y", dist.Normal(x.abs(), 1.0).to_event(1), obs=y)


Y = torch.tensor([5.0, 6.0])


def guide_of_a_mixture(flow_fn, triangular=True):
    guide = AutoFlow(absolute, flow_fn)
    scale = torch.tensor([[1.0, 0.0], [0.3, 1.0]]) if triangular else torch.ones(2)
    parts = []
    for sign in (-1.0, 1.0):
        guide.start_at(sign * Y, scale, Y)
        parts.append(guide.flow)
    guide.flow = Mixture(parts, torch.tensor([0.3, 0.7]).log())
    with torch.no_grad():
        for parameter in guide.flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return guide


RECIPES = [None, Recipe("IAF", num_layers=2, hidden_dims=(8,)), lambda dim: Planar(dim, num_layers=2)]
X = torch.tensor([[5.0, 6.0], [-5.0, -6.0], [0.0, 1.0]])


@pytest.mark.parametrize("flow_fn", RECIPES, ids=["default", "recipe", "function"])
@pytest.mark.parametrize("triangular", [True, False])
def test_a_fresh_guide_loads_a_mixture(flow_fn, triangular):
    guide = guide_of_a_mixture(flow_fn, triangular)
    fresh = AutoFlow(absolute, flow_fn)
    fresh.load_state_dict(guide.state_dict())
    assert isinstance(fresh.flow, Mixture)
    expected = guide.get_posterior().log_prob(X)
    assert torch.equal(fresh.get_posterior().log_prob(X), expected)
    fresh(Y)  # with the model
    torch.testing.assert_close(fresh.get_posterior().log_prob(X), expected)
    assert torch.equal(copy.deepcopy(fresh).get_posterior().log_prob(X), fresh.get_posterior().log_prob(X))


@pytest.mark.parametrize("flow_fn", RECIPES, ids=["default", "recipe", "function"])
def test_a_posterior_of_a_mixture_survives_a_file(flow_fn, tmp_path):
    posterior = Posterior(absolute, guide_of_a_mixture(flow_fn), (Y,), {}, History({"elbo": [-1.0]}))
    posterior.save(tmp_path / "mixture.safetensors")
    options = {"flow_fn": flow_fn} if flow_fn is RECIPES[-1] else {}
    loaded = load_posterior(tmp_path / "mixture.safetensors", absolute, Y, **options)
    assert isinstance(loaded.guide.flow, Mixture)
    assert torch.equal(loaded.log_prob({"x": X}), posterior.log_prob({"x": X}))
    assert loaded.elbo == posterior.elbo
    assert loaded.guide.flow_fn == (flow_fn or Recipe("default", scaled=True))


@pytest.mark.parametrize("parallel", [False, True])
def test_a_guide_of_a_mixture_in_predictive(parallel):
    draws = Predictive(absolute, guide=guide_of_a_mixture(None), num_samples=200, parallel=parallel)(Y)
    assert draws["y"].numel() == 400
    draws = guide_of_a_mixture(None).get_posterior().sample((2000,))
    assert (draws[:, 0] > 0).double().mean() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / 2000))

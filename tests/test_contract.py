"""The contract, proved: layers, a conditioner and an objective as a user writes them, by public names alone.

Each of the first four, in under forty lines, works in ``fit_density``, ``FlowVI`` and ``distill``, and is saved and
loaded; the objective trains a flow by ``pf.train``.
"""

import inspect
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows.transforms import Autoregressive, Elementwise, FlowTransform
from tests.transforms.examples import EstimatedScale, ExactScale

DIM = 4
QUIET = {"seed": 0, "progress_bar": False}


class Fold(FlowTransform):
    """Vectors ``(dim,)`` from arrays ``(dim / 2, 2)``: a layer that changes the shape of an event."""

    def __init__(self, dim):
        super().__init__(dim, base_dim=(dim // 2, 2))

    def _forward_and_ladj(self, z, context):
        return z.flatten(-2), z.new_zeros(z.shape[:-2])

    def _inverse_and_ladj(self, x, context):
        return x.unflatten(-1, self.base_shape), x.new_zeros(x.shape[:-1])


class ActNorm(FlowTransform):
    r""":math:`x = b + e^s z`, trained, which starts where the data have mean 0 and variance 1."""

    def __init__(self, dim):
        super().__init__(dim)
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def _adapt(self, x, context, weights):
        self.loc.copy_(x.mean(0))
        self.log_scale.copy_(x.std(0).log())

    def _forward_and_ladj(self, z, context):
        return self.loc + self.log_scale.exp() * z, self.log_scale.sum().expand(z.shape[:-1])

    def _inverse_and_ladj(self, x, context):
        return (x - self.loc) * (-self.log_scale).exp(), -self.log_scale.sum().expand(x.shape[:-1])


class Linear(nn.Module):
    r""":math:`\theta_j = c_j + \sum_{k<j} W_{jk} z_k`: a conditioner that the inverse evaluates place by place."""

    num_steps = 0

    def __init__(self, order, num_params, hidden_dims, context_dim):
        super().__init__()
        self.order = list(order)
        self.weight = nn.Parameter(torch.zeros(num_params, len(self.order), len(self.order)))
        self.bias = nn.Parameter(torch.zeros(num_params, len(self.order)))

    def by_place(self):
        return self.weight.tril(-1), self.bias

    def forward(self, z, context=None):
        weight, bias = self.by_place()
        theta = torch.einsum("pjk,...k->...jp", weight, z[..., self.order]) + bias.T
        return theta[..., torch.tensor(self.order).argsort(), :]

    def incremental(self, num_rows, context=None):
        return LinearSteps(self, num_rows)


class LinearSteps:
    def __init__(self, net, num_rows):
        self.weight, self.bias = net.by_place()
        self.inputs = torch.zeros(len(net.order), num_rows, dtype=net.bias.dtype)

    def parameters_at(self, i):
        Linear.num_steps += 1
        return self.weight[:, i, :i] @ self.inputs[:i] + self.bias[:, i, None]


class ForwardKL(pf.Objective):
    r"""The forward divergence KL(p || q) by self-normalised importance sampling, :math:`-\sum_i w_i \log q(x_i)`."""

    monitor = "neg_log_prob"

    def __init__(self, flow, log_density, num_particles=128):
        super().__init__(flow)
        self.log_density, self.num_particles = log_density, num_particles

    def draw(self):
        return [self.noise(self.num_particles)]

    def loss(self, noise):
        q = self.flow().estimated()
        x = q.transport(self.base_draws(noise))[0].detach()
        log_q = q.log_prob(x)
        weights = torch.softmax((self.log_density(x) - log_q).detach(), 0)
        loss = -(weights * log_q).sum()
        return loss, {"neg_log_prob": loss.detach(), "ess": 1 / (weights**2).sum()}


STACKS = {
    "shape": lambda dim: [Elementwise((dim // 2, 2)), Fold(dim), Autoregressive(dim, hidden_dims=(16,))],
    "estimate": lambda dim: [EstimatedScale(dim), Autoregressive(dim, hidden_dims=(16,))],
    "data": lambda dim: [Autoregressive(dim, hidden_dims=(16,)), ActNorm(dim)],
    "conditioner": lambda dim: [Autoregressive(dim, conditioner=Linear, order=range(dim)[::-1])],
}
stacks = pytest.mark.parametrize("name", STACKS)


def flow_of(name, dim=DIM):
    return pf.Flow(STACKS[name](dim))


def rows(num_rows=1500):
    """Correlated normal rows, and their entropy in nats."""
    factor = torch.tensor([[2.0, 0, 0, 0], [1.0, 1.0, 0, 0], [0, 0.5, 0.5, 0], [1.0, 0, 1.0, 3.0]])
    entropy = DIM / 2 * (1 + math.log(2 * math.pi)) + factor.diagonal().log().sum().item()
    return 5 + torch.randn(num_rows, DIM) @ factor.T, entropy


def model(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x.cumsum(-1), 1.0).to_event(1), obs=y)


Y = torch.tensor([[1.0, 0.0, -1.0, 2.0], [0.5, 1.0, 0.0, 1.0]])


def exact_posterior():
    """Precision I + 2 A'A and mean of the posterior, and the log evidence; A sums up."""
    a = torch.ones(DIM, DIM).tril()
    precision = torch.eye(DIM) + 2 * a.T @ a
    mean = torch.linalg.solve(precision, a.T @ Y.sum(0))
    marginal = torch.block_diag(torch.eye(DIM), torch.eye(DIM)) + (a @ a.T).repeat(2, 2)
    evidence = dist.MultivariateNormal(torch.zeros(2 * DIM), marginal).log_prob(Y.flatten())
    return mean, precision.inverse(), evidence.item()


@pytest.mark.parametrize("written", [Fold, EstimatedScale, ExactScale, ActNorm, Linear, LinearSteps, ForwardKL])
def test_each_is_short(written):
    assert len(inspect.getsource(written).splitlines()) < 40


@stacks
def test_fit_density(name):
    flow, (x, entropy) = flow_of(name), rows()
    if name == "conditioner":
        flow = pf.Flow([layer.inv for layer in flow.layers])
    modules = [key for key, _ in flow.named_modules()]
    fit = pf.fit_density(flow, x, max_epochs=40, **QUIET)
    assert [key for key, _ in flow.named_modules()] == modules and flow.is_adapted
    # 150 validation rows know the mean of the log-density to sqrt(D / 2 / 150) nats.
    assert abs(fit.best_log_prob + entropy) < 4 * math.sqrt(DIM / 2 / 150) + 0.1
    torch.testing.assert_close(flow().log_prob(x), flow().log_prob(x), rtol=0, atol=0)
    fresh = flow_of(name)
    if name == "conditioner":
        fresh = pf.Flow([layer.inv for layer in fresh.layers])
    fresh.load_state_dict(flow.state_dict())
    assert fresh.is_adapted
    torch.testing.assert_close(fresh().log_prob(x), flow().log_prob(x))


@stacks
def test_flow_vi(name, tmp_path):
    mean, covariance, evidence = exact_posterior()
    Linear.num_steps = 0
    posterior = pf.FlowVI(model, STACKS[name], **QUIET).run(Y)
    assert posterior.diagnose().verdict == "good"
    assert abs(posterior.log_evidence - evidence) < 0.02
    draws = posterior.sample(20_000)["x"]
    sd = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < 0.1 * sd).all()
    assert ((draws.std(0) / sd - 1).abs() < 0.1).all()
    chains = posterior.mcmc(50, num_chains=8, num_warmup=50, **QUIET)
    assert chains.draws["x"].shape == (8, 50, DIM)
    path = tmp_path / "posterior.safetensors"
    posterior.save(path)
    loaded = pf.load_posterior(path, model, Y, flow_fn=STACKS[name])
    values = {"x": draws[:50]}
    torch.testing.assert_close(loaded.log_prob(values), posterior.log_prob(values))
    assert name != "conditioner" or Linear.num_steps > 0


@stacks
def test_distill(name):
    x, _ = rows()
    teacher = pf.flows.MAF(DIM, num_layers=1, hidden_dims=(16,))
    pf.fit_density(teacher, x, max_epochs=15, **QUIET)
    student = flow_of(name)
    fit = pf.distill(student, teacher, num_steps=400, warm_start=300, **QUIET)
    assert fit.kl < 0.1 + 4 * fit.kl_se
    assert student.is_adapted


@pytest.mark.parametrize("compile", ["trace", "none"])
def test_an_objective_of_the_users(compile):
    target = dist.MultivariateNormal(torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    flow = pf.flows.RealNVP(2, num_layers=2, hidden_dims=(16,))
    history = pf.train(ForwardKL(flow, target.log_prob), num_steps=400, compile=compile, **QUIET)
    assert sorted(history) == ["ess", "grad_norm", "learning_rate", "neg_log_prob"]
    entropy = target.entropy().item()
    assert abs(history["neg_log_prob"][-100:].mean() - entropy) < 0.1
    assert history["ess"][-100:].mean() > 100
    x = target.sample((5000,))
    assert abs((target.log_prob(x) - flow().log_prob(x)).mean().item()) < 0.05
    fresh = pf.flows.RealNVP(2, num_layers=2, hidden_dims=(16,))
    fresh.load_state_dict(flow.state_dict())
    torch.testing.assert_close(fresh().log_prob(x), flow().log_prob(x))


# Who asks for exact log-densities


def rough_flow():
    """A flow whose own log-determinant is noisy."""
    layer = EstimatedScale(DIM)
    nn.init.normal_(layer.log_scale)
    return pf.Flow([layer])


def test_early_stopping_scores_exactly():
    """Where nothing is trained, all epochs have one score."""
    still = partial(torch.optim.SGD, lr=0.0)
    fit = pf.fit_density(rough_flow(), rows(200)[0], max_epochs=3, optimizer=still, **QUIET)
    scores = fit.history["validation_log_prob"]
    assert len(scores) == 3 and (scores == scores[0]).all()
    assert len(set(fit.history["log_prob"])) == 3


def test_chains_weights_and_neutra_are_exact():
    posterior = pf.FlowVI(model, STACKS["estimate"], num_steps=50, num_starts=1, **QUIET).run(Y)
    chains = posterior.mcmc(4, num_chains=8, num_warmup=4, **QUIET)
    x = chains.draws["x"].flatten(0, 1)
    expected = posterior.log_joint(x).reshape(8, 4)
    torch.testing.assert_close(chains.sample_stats["lp"], expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(posterior.log_prob({"x": x}), posterior.log_prob({"x": x}))
    transform = posterior.guide.get_transform()
    z = torch.randn(5, DIM)
    x = transform(z)
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, x), transform.log_abs_det_jacobian(z.clone(), x))

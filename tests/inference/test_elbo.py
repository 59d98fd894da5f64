"""One step of training: the traced gradient is the estimator's own, of everything that it should depend on."""

from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn
from torch.distributions import constraints

from pyroflows.compiling.check import Compiler
from pyroflows.fitting.estimators import ESTIMATORS
from pyroflows.flows import IAF, Flow, RealNVP
from pyroflows.inference.elbo import Tempering, elbo_step
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe, model_parameters
from pyroflows.training.loop import train
from pyroflows.training.schedules import Plateau
from pyroflows.transforms import Elementwise
from pyroflows.transforms.univariate import Affine

NUM_PARTICLES = 16
Y = torch.tensor([0.5, -1.0, 2.0, 1.0, 3.0, -2.5])
both = pytest.mark.parametrize("mode", ["trace", "none"])


def hierarchy(y=Y):
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def subsampled(y=Y, size=2):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("N", len(y), subsample_size=size) as rows:
        pyro.sample("y", dist.Normal(mean.sum(-1)[..., None], 1.0), obs=y[rows])


def with_parameters(y=Y):
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    net = pyro.module("net", NET)
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("N", len(y)):
        pyro.sample("y", dist.Normal(net(mean), scale), obs=y)


NET = nn.Linear(2, len(Y))
small_iaf = partial(IAF, num_layers=2, hidden_dims=(8,))


def setup(model, mode="trace", flow_fn=small_iaf, estimator="path", tempering=None, num_particles=NUM_PARTICLES):
    layout = Layout(describe(model, (), {}))
    flow = flow_fn(layout.dim)
    if flow_fn is small_iaf:
        disturb(list(flow.parameters()), 0.3)
    log_joint = LogJoint(model, (), {}, layout, 0.1 * torch.randn(5, layout.dim), Compiler(mode))
    own = list(model_parameters(model, (), {}).values())
    step = elbo_step(flow, log_joint, ESTIMATORS[estimator], num_particles, own, tempering)
    return step, flow, log_joint, own


@torch.no_grad()
def disturb(parameters, scale=0.1):
    for parameter in parameters:
        parameter.add_(scale * torch.randn_like(parameter))


def eager(flow, log_joint, own, estimator, seed, num_particles=NUM_PARTICLES):
    """By the estimator as it is, at the draws of a seed."""
    torch.manual_seed(seed)
    z = flow.base().rsample((num_particles,))
    rows = log_joint.draw_subsample()
    loss, log_weights = ESTIMATORS[estimator](flow(), lambda x: log_joint(x, rows), z)
    parameters = [*flow.parameters(), *own]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in gradients]), log_weights


def taken(step, seed):
    torch.manual_seed(seed)
    record = step()
    return torch.cat([p.grad.reshape(-1) for p in step.parameters]), record


def assert_steps_are_eager(step, flow, log_joint, own, estimator, num_particles=NUM_PARTICLES):
    for seed in range(3):
        disturb(step.parameters)
        gradient, record = taken(step, seed)
        expected, log_weights = eager(flow, log_joint, own, estimator, seed, num_particles)
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        torch.testing.assert_close(record["elbo"], log_weights.mean(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(record["log_weight_variance"], log_weights.var(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_gradient_is_the_estimator_s(estimator):
    assert_steps_are_eager(*setup(hierarchy, estimator=estimator), estimator)


@both
def test_of_models_that_run_in_parts(mode):
    """Rows are drawn anew in each step."""
    assert_steps_are_eager(*setup(subsampled, mode), "path")


@both
def test_of_a_base_with_parameters(mode):
    """Its noise is drawn inside, as it depends on them."""
    flow_fn = partial(RealNVP, num_layers=2, hidden_dims=(8,), base="student_t")
    step, flow, log_joint, own = setup(hierarchy, mode, flow_fn)
    assert_steps_are_eager(step, flow, log_joint, own, "path")
    taken(step, 0)
    gradients = step.parameters[0].grad.split([p.numel() for p in flow.parameters()])
    by_df = dict(zip([name for name, _ in flow.named_parameters()], gradients, strict=True))["base.raw_df"]
    assert (by_df != 0).all()


@both
def test_of_parameters_of_the_model(mode):
    step, flow, log_joint, own = setup(with_parameters, mode, estimator="total")
    assert len(own) == 3
    assert_steps_are_eager(step, flow, log_joint, own, "total")


@both
def test_parameters_of_the_model_in_another_dtype(mode):
    def model():
        loc = pyro.param("loc", torch.tensor(1.0, dtype=torch.float64))
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("prior", -((loc.float() - 2.0) ** 2))

    step, *_, (loc,) = setup(model, mode)
    taken(step, 0)
    assert loc.grad.dtype == torch.float64
    assert loc.grad.item() == pytest.approx(-2.0, abs=1e-5)


def test_one_particle():
    step, *_ = setup(hierarchy, num_particles=1)
    _, record = taken(step, 0)
    assert record["elbo"].isfinite() and record["log_weight_variance"].isnan()


def test_rows_of_the_data_are_inputs(monkeypatch):
    """The ELBO of each pair of rows, by hand."""
    step, flow, log_joint, _ = setup(subsampled)
    elbos = []
    for rows in torch.tensor([[0, 1], [4, 5], [5, 2]]):
        monkeypatch.setattr(log_joint, "draw_subsample", lambda rows=rows: {"N": rows})
        _, record = taken(step, 0)
        torch.manual_seed(0)
        x, log_q = flow().transport(flow.base().sample((NUM_PARTICLES,)))
        log_prior = dist.Normal(0.0, 3.0).log_prob(x).sum(-1)
        log_likelihood = dist.Normal(x.sum(-1, keepdim=True), 1.0).log_prob(Y[rows]).sum(-1)
        expected = (log_prior + len(Y) / 2 * log_likelihood - log_q).mean()
        elbos.append(record["elbo"].item())
        assert elbos[-1] == pytest.approx(expected.item(), rel=1e-4)
    assert len({round(elbo, 2) for elbo in elbos}) == 3


# The flat tensor


def test_parameters_are_views_of_one_tensor():
    step, flow, _, own = setup(with_parameters)
    (flat,) = step.parameters
    trained = [*flow.parameters(), *own]
    assert flat.numel() == sum(p.numel() for p in trained)
    assert {p.untyped_storage().data_ptr() for p in trained} == {flat.untyped_storage().data_ptr()}
    with torch.no_grad():
        flat.copy_(torch.arange(flat.numel()))
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in trained]), torch.arange(flat.numel()).float())


def test_parameters_keep_their_values_and_get_their_own_memory_back():
    torch.manual_seed(1)
    flow = small_iaf(2)
    before = [p.detach().clone() for p in flow.parameters()]
    step, *_ = setup(hierarchy, flow_fn=lambda dim: flow)
    assert all(map(torch.equal, flow.parameters(), before))
    step.release()
    assert all(map(torch.equal, flow.parameters(), before))
    storages = [p.untyped_storage() for p in flow.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert all(s.nbytes() == p.numel() * 4 for s, p in zip(storages, flow.parameters(), strict=True))


def test_frozen_parameters_stay():
    flow = small_iaf(2)
    frozen = next(flow.parameters()).requires_grad_(False)
    step, *_ = setup(hierarchy, flow_fn=lambda dim: flow)
    assert step.parameters[0].numel() == sum(p.numel() for p in flow.parameters()) - frozen.numel()
    taken(step, 0)
    assert frozen.grad is None


# Tempering


@pytest.mark.parametrize(("num_steps", "num_tempered"), [(None, 500), (30, 10), (2, 0)])
def test_temperatures(num_steps, num_tempered):
    tempering = Tempering(0.01, num_steps)
    assert tempering.num_steps == num_tempered
    betas = [next(tempering) for _ in range(num_tempered + 5)]
    expected = [0.01 ** (1 - min(1.0, i / max(1, num_tempered))) for i in range(num_tempered + 5)]
    assert betas == pytest.approx(expected)
    assert betas[0] == pytest.approx(0.01) and betas[-1] == 1.0


class Constant(Tempering):
    def __next__(self):
        self._first *= 0.5
        return self._first


@both
def test_the_temperature_is_an_input(mode):
    """It multiplies the log joint, and not log q."""
    tempering = Constant(1.0, 100)
    step, flow, log_joint, _ = setup(hierarchy, mode, tempering=tempering)
    for _ in range(3):
        gradient, record = taken(step, 0)
        beta = tempering._first
        expected, log_weights = eager(flow, lambda_joint(log_joint, beta), [], "path", 0)
        assert record["elbo"].item() == pytest.approx(log_weights.mean().item(), rel=1e-4)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def lambda_joint(log_joint, beta):
    def tempered(x, rows):
        return beta * log_joint(x, rows)

    tempered.draw_subsample = log_joint.draw_subsample
    return tempered


# Singular matrices


def correlation():
    """No covariance where r is beyond 1 in size."""
    r = pyro.sample("r", dist.Normal(0.0, 0.2))
    one = torch.ones_like(r)
    covariance = torch.stack([torch.stack([one, r], -1), torch.stack([r, one], -1)], -2)
    factor = torch.linalg.cholesky(covariance)
    pyro.factor("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor).log_prob(torch.tensor([1.0, 0.5])))


def narrow(dim):
    return Flow([Elementwise(dim, Affine(None, None), init=torch.tensor([[0.0, -4.0]]))])


@both
def test_a_singular_matrix_is_a_step_that_is_left_out(mode):
    step, *_ = setup(correlation, mode, narrow)
    (flat,) = step.parameters
    assert taken(step, 0)[0].isfinite().all()
    with torch.no_grad():
        flat.copy_(torch.tensor([0.0, 1.0]))
    gradient, record = taken(step, 0)
    assert gradient.isnan().any() and record["elbo"].isnan()
    with torch.no_grad():
        flat.copy_(torch.tensor([0.0, -0.7]))  # of 16 draws some
    torch.manual_seed(0)
    history = train(step, step.parameters, Plateau("elbo", 60), progress_bar=False)
    assert 5 < torch.tensor(history["elbo"]).isnan().sum() < 55
    assert flat.isfinite().all()


def test_other_errors_pass_on():
    def broken(*args):
        raise RuntimeError("out of memory")

    step, *_ = setup(hierarchy, "none")
    step._objective = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        step()

"""One step of training: the traced gradient is the estimator's own, of everything that it should depend on."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn
from torch.distributions import constraints

from pyroflows.compiling.check import Compiler
from pyroflows.fitting import ReverseKL
from pyroflows.fitting.estimators import ESTIMATORS
from pyroflows.flows import IAF, Flow, RealNVP
from pyroflows.inference.elbo import ModelELBO, Tempering
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe, model_parameters
from pyroflows.training.history import History
from pyroflows.training.loop import Trainer
from pyroflows.training.objective import trained_parameters
from pyroflows.training.schedules import Plateau
from pyroflows.training.step import Step
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
        disturb(trained_parameters(flow), 0.3)
    log_joint = LogJoint(model, (), {}, layout, 0.1 * torch.randn(5, layout.dim), Compiler(mode))
    own = list(model_parameters(describe(model, (), {}), model, (), {}).values())
    objective = ModelELBO(flow, log_joint, ESTIMATORS[estimator], num_particles, own, tempering)
    return Step(objective, log_joint.compiler), flow, log_joint, own


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
    parameters = [*trained_parameters(flow), *own]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in gradients]), log_weights


def taken(step, seed):
    torch.manual_seed(seed)
    figures = step()
    return torch.cat([p.grad.reshape(-1) for p in step.parameters]), figures


def assert_steps_are_eager(step, flow, log_joint, own, estimator, num_particles=NUM_PARTICLES):
    for seed in range(3):
        disturb([*trained_parameters(flow), *own])
        gradient, figures = taken(step, seed)
        expected, log_weights = eager(flow, log_joint, own, estimator, seed, num_particles)
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        assert figures["elbo"] == pytest.approx(log_weights.mean().item(), rel=1e-4, abs=1e-4)
        assert figures["log_weight_variance"] == pytest.approx(log_weights.var().item(), rel=1e-3, abs=1e-4)


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
    trained = trained_parameters(flow)
    gradients = step.parameters[0].grad.split([p.numel() for p in trained])
    (by_df,) = (g for p, g in zip(trained, gradients, strict=True) if p is flow.base.raw_df)
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
    _, figures = taken(step, 0)
    assert math.isfinite(figures["elbo"]) and math.isnan(figures["log_weight_variance"])


def test_rows_of_the_data_are_inputs(monkeypatch):
    """The ELBO of each pair of rows, by hand."""
    step, flow, log_joint, _ = setup(subsampled)
    elbos = []
    for rows in torch.tensor([[0, 1], [4, 5], [5, 2]]):
        monkeypatch.setattr(log_joint, "draw_subsample", lambda rows=rows: {"N": rows})
        _, figures = taken(step, 0)
        torch.manual_seed(0)
        x, log_q = flow().transport(flow.base().sample((NUM_PARTICLES,)))
        log_prior = dist.Normal(0.0, 3.0).log_prob(x).sum(-1)
        log_likelihood = dist.Normal(x.sum(-1, keepdim=True), 1.0).log_prob(Y[rows]).sum(-1)
        expected = (log_prior + len(Y) / 2 * log_likelihood - log_q).mean()
        elbos.append(figures["elbo"])
        assert elbos[-1] == pytest.approx(expected.item(), rel=1e-4)
    assert len({round(elbo, 2) for elbo in elbos}) == 3


# Tempering


@pytest.mark.parametrize("num_steps", [500, 10, 1])
def test_temperatures_rise_geometrically(num_steps):
    tempering = Tempering(0.01, num_steps)
    betas = [tempering(step) for step in range(num_steps + 5)]
    assert betas[0] == pytest.approx(0.01) and betas[num_steps:] == [1.0] * 5
    ratios = [b / a for a, b in pairwise(betas[: num_steps + 1])]
    assert ratios == pytest.approx([100 ** (1 / num_steps)] * num_steps)


def test_temperatures_of_no_steps():
    assert Tempering(0.01, 0)(1) == 1.0


@both
def test_the_temperature_is_an_input(mode):
    """It multiplies the log joint, and not log q."""
    step, flow, log_joint, _ = setup(hierarchy, mode, tempering=Tempering(1 / 16, 4))
    for beta in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1):
        gradient, figures = taken(step, 0)
        expected, log_weights = eager(flow, tempered(log_joint, beta), [], "path", 0)
        assert figures["elbo"] == pytest.approx(log_weights.mean().item(), rel=1e-4)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def tempered(log_joint, beta):
    def function(x, rows):
        return beta * log_joint(x, rows)

    function.draw_subsample = log_joint.draw_subsample
    return function


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
def test_a_singular_matrix_is_a_draw_that_is_left_out(mode):
    step, flow, log_joint, _ = setup(correlation, mode, narrow)
    set_parameters(flow, [0.0, 0.0])  # of 16 draws some
    for seed in range(3):
        gradient, figures = taken(step, seed)
        torch.manual_seed(seed)
        log_p = log_joint.in_chunks(flow().sample((NUM_PARTICLES,)))
        assert 0 < log_p.isfinite().sum() < NUM_PARTICLES
        assert gradient.isfinite().all() and all(map(math.isfinite, figures.values()))
    set_parameters(flow, [50.0, -4.0])  # all
    _, figures = taken(step, 0)
    assert math.isnan(figures["elbo"])


@both
def test_a_fit_goes_on_beside_singular_matrices(mode):
    _, flow, log_joint, _ = setup(correlation, mode, narrow)
    set_parameters(flow, [0.0, 0.5])
    objective = ModelELBO(flow, log_joint, ESTIMATORS["path"], NUM_PARTICLES)
    torch.manual_seed(0)
    history = Trainer(objective, Plateau("elbo", 200), compile=mode, progress_bar=False).run()
    assert np.isfinite(history["elbo"]).all()
    assert flow().sample((1000,)).abs().lt(1.0).float().mean() > 0.95


@torch.no_grad()
def set_parameters(flow, values):
    (parameter,) = trained_parameters(flow)
    parameter.copy_(torch.tensor([values]))


def test_a_singular_matrix_of_a_density_of_the_user_is_a_step_that_is_left_out():
    """The names of the figures are not known yet at the first step; they are NaN until they are."""

    def log_density(x):
        factor = torch.linalg.cholesky(x[:, :, None].square() - matrices)
        return factor[:, 0, 0].log() - x.square().sum(-1)

    matrices = torch.ones(1, 1)
    step = Step(ReverseKL(narrow(1), log_density, num_particles=NUM_PARTICLES), Compiler("none"))
    history = History()
    history.append(**step())
    assert step.parameters[0].grad.isnan().all()
    matrices = -torch.ones(1, 1)
    history.append(**step())
    assert np.isnan(history["elbo"]).tolist() == np.isnan(history["log_weight_variance"]).tolist() == [True, False]


def test_other_errors_pass_on(monkeypatch):
    def broken(*args):
        raise RuntimeError("out of memory")

    step, *_ = setup(hierarchy, "none")
    monkeypatch.setattr(LogJoint, "__call__", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        step()

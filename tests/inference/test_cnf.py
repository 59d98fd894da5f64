"""A posterior by a continuous flow: fits, verdict, chains of one map, files, and students of it."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows.flows import Recipe
from pyroflows.inference.mcmc.steady import SteadyMap
from tests.transforms.registry import perturb

SMALL = {"hidden_dims": (16, 16), "num_steps": 4}


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.5))


@pytest.fixture(scope="module")
def posterior():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return pf.FlowVI(banana, Recipe("CNF", **SMALL), num_steps=250, seed=0, progress_bar=False).run()


def test_the_posterior_is_close(posterior):
    assert abs(posterior.elbo) < 0.1  # the evidence is 1
    assert posterior.diagnose().verdict != "do not use"


def test_chains_are_recorded_and_right(posterior):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chains = posterior.mcmc(60, num_chains=24, num_warmup=40, seed=0, progress_bar=False)
        bridge = posterior.bridge_sample(1000, num_warmup=40, seed=0, progress_bar=False)
    x, y = chains.draws["x"], chains.draws["y"]
    # Both are standard normal; moments of y itself would need many more draws.
    for normal, name in ((x, "x"), (2 * (y - x**2), "y")):
        ess = min(float(chains.ess[name]), normal.numel())
        assert ess > 200
        assert abs(normal.mean()) < 4 / ess**0.5
        assert abs(normal.var() - 1) < 4 * (2 / ess) ** 0.5
    assert abs(bridge.log_evidence) < 0.05


def test_files_and_arviz(posterior, tmp_path):
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = pf.load_posterior(tmp_path / "posterior.safetensors", banana)
    assert loaded.elbo == posterior.elbo
    x = torch.zeros(3, 2)
    torch.testing.assert_close(loaded.guide.flow().log_prob(x), posterior.guide.flow().log_prob(x))
    assert posterior.to_arviz(100).posterior["x"].shape == (1, 100)


def test_a_steady_map_is_a_function_of_each_row():
    torch.manual_seed(0)
    flow = perturb(pf.flows.CNF(2, **SMALL).double(), 0.5)
    steady = SteadyMap(flow.transform.exact(), flow.base().expand(()))
    z = torch.randn(100, 2, dtype=torch.float64)
    x, ladj = steady(z)
    alone, ladj_alone = steady(z[:1])
    torch.testing.assert_close(alone, x[:1], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ladj_alone, ladj[:1], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ladj, flow.transform.exact().forward_and_ladj(z)[1], atol=1e-2, rtol=0)


@pytest.mark.slow
def test_a_student_that_draws_in_one_pass(posterior):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = pf.flows.NSF(2, num_layers=3, hidden_dims=(32,))
        fit = pf.distill(
            student, posterior.guide.flow, num_steps=80, warm_start=80, seed=0, progress_bar=False, compile="trace"
        )
    assert fit.kl < 0.15
    assert abs(student().sample((2000,))[:, 1].mean() - 1.0) < 0.3


def test_a_continuous_student():
    teacher = dist.MultivariateNormal(torch.ones(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    student = pf.flows.CNF(2, **SMALL)
    fit = pf.distill(student, teacher, num_steps=60, warm_start=1, seed=0, progress_bar=False)
    assert fit.kl < 0.1

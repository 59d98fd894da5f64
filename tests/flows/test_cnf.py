"""The recipe CNF: exact densities and draws beside quick training, supports, bases, images, files, and fits."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.errors import OptionError, StateError, UntraceableError
from pyroflows.flows import CNF, Mixture, Recipe
from tests.flows.test_flow import cell_masses
from tests.transforms.registry import perturb

SMALL = {"hidden_dims": (16, 16)}


def bent(dim=2, noise=0.5, **options):
    """A flow that is far from the identity, in double precision."""
    torch.manual_seed(0)
    return perturb(CNF(dim, **{**SMALL, **options}).double(), noise)


@pytest.mark.parametrize("base", [None, "student_t"])
def test_density_integrates_to_one(base):
    assert (cell_masses(bent(base=base)(), n=200, reach=6.0).sum() - 1).abs() < 1e-3


@pytest.mark.parametrize("num_steps", [2, None])
def test_reported_values_are_adaptive_whatever_training_takes(num_steps):
    """Draws, latents and densities are those of one map, which two steps are not enough for."""
    flow = bent(num_steps=num_steps)
    law = flow()
    z = torch.randn(50, 2, dtype=torch.float64)
    x, log_q = law.transport(z)
    torch.testing.assert_close(law.latent(x), z, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(law.log_prob(x), log_q, atol=1e-3, rtol=1e-3)
    torch.manual_seed(1)
    draws = law.sample((50,))
    torch.manual_seed(1)
    torch.testing.assert_close(law.rsample_and_log_prob((50,))[0], draws, atol=1e-3, rtol=1e-3)
    of_training = law.estimated().transport(z)[0]
    assert ((of_training - x).abs().max() > 0.01) == (num_steps == 2)


def test_options_reach_the_layer():
    flow = CNF(3, (8,), num_steps=5, tolerance=1e-3, trace="hutchinson", kinetic_energy=0.1, jacobian_norm=0.2)
    layer = flow.layers[0]
    assert (layer.solver.num_steps, layer.exact_solver.rtol, layer.exact_solver.atol) == (5, 1e-3, 1e-3)
    assert (layer.trace, layer.kinetic_energy, layer.jacobian_norm) == ("hutchinson", 0.1, 0.2)
    assert CNF(3, num_steps=None, adjoint=True).layers[0].solver.adjoint


@pytest.mark.parametrize(
    "options", [{"num_steps": 0}, {"tolerance": -1.0}, {"trace": "some"}, {"hidden_dims": ()}, {"kinetic_energy": -1}]
)
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        CNF(2, **options)


@pytest.mark.parametrize("support", [constraints.positive, constraints.interval(-1.0, 2.0)])
def test_supports(support):
    law = bent(support=support)()
    x, log_q = law.rsample_and_log_prob((20,))
    assert support.check(x).all()
    torch.testing.assert_close(law.log_prob(x.clone()), log_q, atol=1e-3, rtol=1e-3)


def test_a_conditional_law_in_closed_form_is_refused():
    with pytest.raises(OptionError, match=r"Continuous.*sample_conditional"):
        CNF(2).conditional(torch.zeros(1))


def test_files_and_states(tmp_path):
    flow = bent(context_dim=2, support=constraints.positive)
    flow.save(tmp_path / "flow.safetensors")
    loaded = pf.load_flow(tmp_path / "flow.safetensors")
    x, context = torch.rand(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(loaded(context).log_prob(x), flow(context).log_prob(x))
    assert loaded.layers[0].solver == flow.layers[0].solver
    # How training solves is no part of the law.
    other = bent(noise=0.0, context_dim=2, support=constraints.positive, num_steps=4)
    other.load_state_dict(flow.state_dict())
    torch.testing.assert_close(other(context).log_prob(x), flow(context).log_prob(x))
    with pytest.raises(StateError):
        CNF(2, **SMALL, context_dim=2).load_state_dict(flow.state_dict())


def test_a_recipe_of_json_options():
    recipe = Recipe("CNF", hidden_dims=[8], num_steps=4, kinetic_energy=0.01)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe(3).layers[0].solver.num_steps == 4


def curved(n=400):
    torch.manual_seed(0)
    x = torch.randn(n, 2)
    return torch.stack([x[:, 0], 0.3 * x[:, 1] + x[:, 0] ** 2], 1)


@pytest.mark.parametrize("compile", ["auto", "trace"])
def test_fixed_steps_are_recorded_and_adaptive_ones_are_not(compile):
    data = {"x": curved(), "max_epochs": 40, "compile": compile, "seed": 0, "progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = pf.fit_density(CNF(2, **SMALL, num_steps=4), **data)
        assert fit.flow().log_prob(curved()).mean() > -2.6  # a Gaussian has -3.1
        adaptive = CNF(2, **SMALL, num_steps=None, tolerance=1e-3)
        if compile == "auto":
            pf.fit_density(adaptive, **{**data, "max_epochs": 1})
        else:
            with pytest.raises(UntraceableError, match=r"Continuous.*num_steps="):
                pf.fit_density(adaptive, **data)


def test_penalties_keep_the_field_small():
    def size(**options):
        torch.manual_seed(0)
        flow = CNF(2, **SMALL, num_steps=4, **options)
        pf.fit_density(flow, curved(), max_epochs=8, seed=0, progress_bar=False)
        return sum(p.square().sum() for p in flow.layers[0].net.linear[-1].parameters())

    assert size(kinetic_energy=100.0) < 0.5 * size()


def test_images_and_stacks():
    flow = CNF((1, 4, 4), (8,), context_dim=3)
    assert flow(torch.eye(3)).log_prob(torch.randn(1, 4, 4)).shape == (3,)
    pixels = torch.randint(4, (64, 1, 4, 4))
    options = {"dequantization": "uniform", "max_epochs": 2, "seed": 0, "progress_bar": False}
    fit = pf.fit_density(CNF((1, 4, 4), (4,), num_steps=2), pixels, **options)
    assert 1.5 < pf.bits_per_dim(fit.flow, pixels[:8], levels=4, num_samples=2) < 4  # 2 bits tell 4 levels apart
    t = pf.transforms
    stack = pf.Flow([t.LU(2), t.Continuous(2, (8,), solver=t.FixedSteps(4)), t.Coupling(2, hidden_dims=(8,))])
    x, log_q = stack().rsample_and_log_prob((10,))
    torch.testing.assert_close(stack().log_prob(x.clone()), log_q, atol=1e-3, rtol=1e-3)


def test_a_mixture_of_them_learns():
    x = torch.cat([curved(200), curved(200) + 6.0])
    mixture = Mixture([CNF(2, (8,), num_steps=4), CNF(2, (8,), num_steps=4)])
    pf.fit_density(mixture, x, max_epochs=5, seed=0, progress_bar=False)
    assert mixture().log_prob(x).mean() > -4.5


def test_as_a_proposal():
    def model():
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]])))

    torch.manual_seed(0)
    found = pf.importance_sample(model, CNF(2), num_samples=2000, progress_bar=False)
    assert abs(found.log_evidence) < 0.1

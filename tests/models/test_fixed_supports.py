"""Supports that depend on other latents are refused by name, with the form of the model that works."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TransformedDistribution as Transformed
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, init_to_value
from torch.distributions import AffineTransform

import pyroflows as pf
from pyroflows.errors import ModelError
from pyroflows.models.fixed_supports import ELSEWHERE, require_fixed_supports
from pyroflows.models.structure import describe


def triangle(y=None):
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(0.0, 1.0 - a))
    pyro.sample("y", dist.Normal(b - a, 0.3), obs=y)


def pareto(y=None):
    a = pyro.sample("a", dist.LogNormal(0.0, 0.5))
    b = pyro.sample("b", dist.Pareto(a, 3.0))
    pyro.sample("y", dist.Normal(b, 0.5), obs=y)


def shifted(y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", Transformed(dist.Exponential(1.0), [AffineTransform(a, 1.0)]))
    pyro.sample("y", dist.Normal(b, 0.5), obs=y)


def scaled(y=None):
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    b = pyro.sample("b", Transformed(dist.Beta(2.0, 2.0), [AffineTransform(0.0, a)]))
    pyro.sample("y", dist.Normal(b, 0.5), obs=y)


def truncated(y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    support = torch.distributions.constraints.greater_than(a)
    b = pyro.sample("b", dist.ImproperUniform(support, (), ()))
    pyro.sample("y", dist.Normal(b, 0.5), obs=y)


def in_a_plate(y=None):
    a = pyro.sample("a", dist.Uniform(0.0, 1.0))
    with pyro.plate("n", 3):
        b = pyro.sample("b", dist.Uniform(a, 2.0))
        pyro.sample("y", dist.Normal(b, 0.5), obs=None if y is None else y.expand(3))


MODELS = [triangle, pareto, shifted, scaled, truncated, in_a_plate]
Y = torch.tensor(0.7)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_dependent_support_raises(model, validate):
    with pyro.validation_enabled(validate), pytest.raises(ModelError, match=r"'b'.*depends on other latents") as error:
        pf.FlowVI(model, seed=0, progress_bar=False).run(Y)
    assert error.match("pyro.deterministic\\('b'")


@pytest.mark.parametrize("model", [triangle, pareto, shifted])
def test_dependent_support_raises_everywhere(model):
    svi = SVI(model, pf.guides.AutoFlow(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    calls = [
        lambda: svi.step(Y),
        lambda: pf.guides.AutoFlow(model)(Y),
        lambda: pf.importance_sample(model, pf.guides.AutoFlow(model), Y, num_samples=10, progress_bar=False),
        lambda: pf.importance_sample(model, pf.flows.IAF(2), Y, num_samples=10, progress_bar=False),
    ]
    for call in calls:
        with pytest.raises(ModelError, match="'b'.*depends on other latents"):
            call()


def test_file_cannot_be_read_with_a_dependent_support(tmp_path):
    def fixed(y):
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        b = pyro.sample("b", dist.Uniform(0.0, 1.0))
        pyro.sample("y", dist.Normal(b - a, 0.3), obs=y)

    path = tmp_path / "posterior.safetensors"
    pf.FlowVI(fixed, seed=0, num_steps=1, num_starts=1, progress_bar=False).run(Y).save(path)
    with pytest.raises(ModelError, match="'b'.*depends on other latents"):
        pf.load_posterior(path, triangle, Y)


def test_the_first_bounds_are_not_taken_for_those_of_other_values():
    """Importance sampling with a program, and ArviZ data, need no bijection: they follow the support."""

    def program(y):
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        pyro.sample("b", dist.Uniform(0.0, 1.0 - a))

    with pyro.validation_enabled(False):
        weighted = pf.importance_sample(triangle, program, Y, num_samples=4000, progress_bar=False)
        a, b = weighted.draws["a"], weighted.draws["b"]
        right = dist.Normal(b - a, 0.3).log_prob(Y).double().logsumexp(0) - torch.tensor(4000.0).log()
        assert weighted.log_evidence == pytest.approx(right.item(), abs=1e-4)
        data = pf.to_arviz(weighted.draws, triangle, (Y,), prior=False, posterior_predictive=False)
    assert data["posterior"]["b"].shape == (1, 4000)


def fixed_after_another():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    pyro.sample("c", Transformed(dist.Exponential(1.0), [AffineTransform(torch.tensor(2.0), 1.0)]))


def bounded_by_data(x):
    pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("b", dist.Uniform(0.0, x))


@pytest.mark.parametrize(("model", "args"), [(fixed_after_another, ()), (bounded_by_data, (torch.ones(3),))])
def test_fixed_supports_pass(model, args):
    require_fixed_supports(describe(model, args, {}), model, args, {})


def test_no_second_run_where_no_bound_is_a_tensor():
    runs = []

    def model():
        runs.append(1)
        pyro.sample("a", dist.Uniform(0.0, 1.0))
        pyro.sample("b", dist.HalfNormal(1.0))

    structure = describe(model, (), {})
    require_fixed_supports(structure, model, (), {})
    assert len(runs) == 1


def test_check_leaves_the_generator_as_it_was():
    structure = describe(fixed_after_another, (), {})
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    require_fixed_supports(structure, fixed_after_another, (), {})
    assert torch.rand(()) == expected


def test_rewritten_model_is_right():
    """f3: a posterior on the triangle a + b < 1, against quadrature."""

    def model(y):
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        unit = pyro.sample("b_unit", dist.Uniform(0.0, 1.0))
        b = pyro.deterministic("b", (1.0 - a) * unit)
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(b - a, 0.3), obs=y)

    y = torch.tensor([0.9, 0.7, 0.8])
    posterior = pf.FlowVI(model, seed=0, progress_bar=False).run(y)
    grid = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    a, b = grid[:, None], (1 - grid[:, None]) * grid
    log_p = dist.Normal((b - a)[..., None], 0.3).log_prob(y.double()).sum(-1)
    exact = (log_p.logsumexp((0, 1)) - 2 * torch.tensor(500.0).log()).item()
    assert posterior.log_evidence == pytest.approx(exact, abs=5 * posterior.log_evidence_se + 0.003)
    mean = (log_p.exp() * a).sum() / log_p.exp().sum()
    weighted = posterior.importance_sample(4000).resample(4000)
    assert weighted["a"].mean().item() == pytest.approx(mean.item(), abs=0.01)


def test_guide_of_pyro_is_scored_on_one_period():
    """A Normal on the line proposes angles beyond one period, where the model has no mass."""

    def model():
        pyro.sample("phi", dist.VonMises(0.0, 1.0))

    guide = AutoNormal(model, init_scale=3.0)
    guide()
    weighted = pf.importance_sample(model, guide, num_samples=20_000, progress_bar=False)
    assert abs(weighted.log_evidence) < 5 * weighted.log_evidence_se


def test_packed_guide_of_pyro_means_its_own_values():
    """Pyro's guide over one vector takes it for the angle itself."""

    def model():
        pyro.sample("phi", dist.VonMises(torch.tensor(2.0), 400.0))

    values = {"phi": torch.tensor(2.0)}
    guide = AutoDiagonalNormal(model, init_loc_fn=init_to_value(values=values), init_scale=0.06)
    guide()
    weighted = pf.importance_sample(model, guide, num_samples=4000, progress_bar=False)
    assert abs(weighted.log_evidence) < 5 * weighted.log_evidence_se
    assert weighted.ess > 2000


@pytest.mark.parametrize(
    "fn",
    [
        Transformed(dist.VonMises(0.0, 1.0), [AffineTransform(0.0, 2.0)]),
        Transformed(dist.Dirichlet(torch.ones(3)), [AffineTransform(0.0, 2.0)]),
        Transformed(dist.Exponential(torch.ones(2)), [AffineTransform(0.0, torch.tensor([1.0, -1.0]))]),
    ],
    ids=["angle", "simplex", "both sides"],
)
def test_unknown_support_raises(fn):
    def model():
        pyro.sample("x", fn)

    with pytest.raises(
        ModelError, match=r"support of latent site 'x' \(TransformedDistribution\) is not known.*pyro.d"
    ):
        pf.FlowVI(model, seed=0, progress_bar=False).run()


def test_draws_of_the_prior_serve_a_model_that_refuses_other_values():
    def model():
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        if torch.isclose(a, torch.tensor(ELSEWHERE).sigmoid()):
            raise RuntimeError("not these values")
        pyro.sample("b", dist.Uniform(0.0, a))

    with pytest.raises(ModelError, match="the support of latent site 'b' .* depends on other latents"):
        require_fixed_supports(describe(model, (), {}), model, (), {})

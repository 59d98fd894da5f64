"""Mixtures of flows with supports: unions, values outside of components, and such mixtures as priors."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.errors import ModelError
from pyroflows.flows import NSF, Flow, Mixture
from pyroflows.flows.union import Union, union_of
from pyroflows.transforms import Coupling, Elementwise, Triangular

pyro.enable_validation()  # the default, which other packages change at their import

LOG_WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
# Of the normal laws of the logarithms of two lognormal variables.
LOCS, SCALES = torch.tensor([0.2, 0.7], dtype=torch.float64), torch.tensor([0.5, 0.3], dtype=torch.float64)


def lognormal(loc, scale, support=constraints.positive):
    """A flow of one dimension whose law is lognormal, or a normal one without a support."""
    layer = Triangular(1, loc=torch.tensor([loc]), scale_tril=torch.tensor([[scale]]))
    return Flow([layer], support=support).double()


def lognormals():
    return Mixture([lognormal(*pair) for pair in zip(LOCS.tolist(), SCALES.tolist(), strict=True)], LOG_WEIGHTS)


def both():
    """A lognormal law, and a normal one that also has negative values."""
    return Mixture([lognormal(0.0, 0.4), lognormal(-1.0, 2.0, support=None)], LOG_WEIGHTS)


def apart():
    return Mixture([NSF(2, num_layers=1, support=constraints.interval(a, a + 1.0)) for a in (0.0, 2.0)])


# Supports


def vectors(*parts):
    return constraints.independent(parts[0] if len(parts) == 1 else constraints.cat(parts, dim=-1), 1)


POSITIVE, UNIT, REAL = constraints.positive, constraints.unit_interval, constraints.real
GAP = constraints.interval(2.0, 3.0)


@pytest.mark.parametrize(
    ("supports", "expected"),
    [
        ([vectors(POSITIVE), vectors(POSITIVE)], vectors(POSITIVE)),
        ([vectors(POSITIVE), constraints.real_vector], constraints.real_vector),
        ([vectors(UNIT), vectors(POSITIVE), vectors(GAP)], vectors(POSITIVE)),
        ([vectors(constraints.less_than(1.0)), constraints.independent(constraints.less_than(torch.ones(2)), 1)], None),
        ([vectors(POSITIVE, UNIT), vectors(REAL, POSITIVE)], vectors(REAL, POSITIVE)),
        ([constraints.real_vector, vectors(REAL, UNIT), POSITIVE], constraints.real_vector),
    ],
)
def test_one_support_contains_the_others(supports, expected):
    found = union_of(supports, torch.Size([2]))
    assert str(found) == str(supports[0] if expected is None else expected)
    assert not isinstance(found, Union)


@pytest.mark.parametrize("supports", [[vectors(UNIT), vectors(GAP)], [vectors(UNIT, REAL), vectors(REAL, POSITIVE)]])
def test_supports_that_do_not_contain_each_other(supports):
    found = union_of([*supports, supports[0]], torch.Size([2]))
    assert isinstance(found, Union) and found.event_dim == 1 and len(found.parts) == 2
    x = torch.tensor([[0.5, 0.5], [2.5, 2.5], [0.5, 2.5], [-1.0, -1.0]])
    assert torch.equal(found.check(x), supports[0].check(x) | supports[1].check(x))
    assert str(supports[0]) in str(found)


def test_support_of_mixtures():
    assert lognormals().support.check(torch.tensor([[1.0], [-1.0]])).tolist() == [True, False]
    assert str(lognormals()().support) == str(lognormals().support) == str(lognormal(0.0, 1.0)().support)
    assert both()().support is constraints.real_vector
    nested = Mixture([apart(), apart()])
    assert len(nested().support.parts) == 2
    assert Mixture([nested, NSF(2)])().support is constraints.real_vector


# Densities


def test_a_component_has_no_mass_outside_its_support():
    """Below zero a fixed part of a normal law is left, also in the gradients; above it is the sum by hand."""
    q = both()()
    x = torch.tensor([[-1.0], [-0.1], [0.5], [3.0]], dtype=torch.float64, requires_grad=True)
    normal = LOG_WEIGHTS[1] + dist.Normal(-1.0, 2.0).log_prob(x[:, 0])
    positive = LOG_WEIGHTS[0] + dist.LogNormal(0.0, 0.4).log_prob(x[2:, 0])
    expected = torch.cat([normal[:2], torch.logaddexp(positive, normal[2:])])
    found = q.log_prob(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    slopes = [torch.autograd.grad(value.sum(), x, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-6)


def test_the_density_where_one_of_two_flows_is_bounded():
    torch.manual_seed(0)
    q = Mixture([NSF(2, num_layers=1, support=constraints.positive), NSF(2, num_layers=1)])
    found = q().log_prob(torch.tensor([[-1.0, -1.0]]))
    assert found.item() == pytest.approx(-math.log(2 * math.pi) - 1.0 - math.log(2), abs=1e-4)
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in q.parameters() if p.grad is not None)
    assert q().log_prob(q().sample((1000,))).isfinite().all()


@pytest.mark.parametrize("make", [lambda: apart(), lambda: Mixture([apart(), apart()])], ids=["plain", "nested"])
def test_outside_of_all_components(make):
    mixture = make()
    x = torch.tensor([[0.5, 0.5], [1.5, 0.5], [2.5, 2.5], [0.5, 2.5]], requires_grad=True)
    with pytest.raises(ValueError, match="to be within the support"):
        mixture().log_prob(x)
    with pyro.validation_enabled(False):
        found = mixture().log_prob(x)
    assert (found == -math.inf).tolist() == [False, True, False, True]
    found[found.isfinite()].sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in mixture.parameters() if p.grad is not None)


def test_values_under_vmap():
    x = both()().sample((5,))
    torch.testing.assert_close(torch.func.vmap(both()().log_prob)(x), both()().log_prob(x))


# Draws


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3)])
def test_few_draws(shape):
    """Most components get none."""
    mixture = Mixture([NSF(2, num_layers=1, support=constraints.positive) for _ in range(8)])
    x = mixture().sample(shape)
    assert x.shape == (*shape, 2) and (x > 0).all()


def test_draws_carry_no_gradients():
    assert not both()().has_rsample and not both()().sample().requires_grad
    with pytest.raises(NotImplementedError, match="draws of a mixture carry no gradients"):
        both()().rsample()


def test_a_component_of_no_weight_is_never_drawn():
    mixture = Mixture([lognormal(0.0, 0.4), lognormal(0.0, 1.0, support=None)], torch.tensor([0.0, -math.inf]))
    assert (mixture().sample((10_000,)) > 0).all()


def test_expanded_laws_draw_independently():
    q = lognormals()()
    wide = q.expand((4, 5))
    assert (wide.batch_shape, wide.event_shape) == ((4, 5), (1,))
    x = wide.sample((3,))
    assert x.shape == (3, 4, 5, 1) and len(x.unique()) == 60
    torch.testing.assert_close(wide.log_prob(x), q.log_prob(x))
    assert wide.log_prob(x[0, 0, 0]).shape == (4, 5)
    assert wide.to_event(1).log_prob(x).shape == (3, 4)


@pytest.mark.parametrize("make", [both, lambda: Mixture([apart(), apart()])], ids=["both", "nested"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_modules_and_laws(make, copied):
    mixture = make()
    x = mixture().sample((5,))
    expected = mixture().log_prob(x)
    assert torch.equal(copied(mixture)().log_prob(x), expected)
    assert torch.equal(copied(mixture()).log_prob(x), expected)


def test_arrays():
    mixture = Mixture([Flow([Coupling((2, 3))]), Flow([Elementwise((2, 3))])])
    assert (mixture.event_shape, mixture.dim) == ((2, 3), 6)
    x = mixture().sample((4,))
    assert x.shape == (4, 2, 3)
    expected = dist.Normal(0.0, 1.0).expand((2, 3)).to_event(2).log_prob(x)  # new layers are the identity
    torch.testing.assert_close(mixture().log_prob(x), expected)


# In Pyro programs

Y, NOISE = torch.tensor([0.6], dtype=torch.float64), 0.5


def positive_latent(mixture):
    """The logarithm of the latent is observed; prior and posterior of this logarithm are mixtures of normals."""

    def model():
        z = pyro.sample("z", mixture())
        pyro.sample("y", dist.Normal(z.log(), NOISE).to_event(1), obs=Y)

    terms = LOG_WEIGHTS + dist.Normal(LOCS, (SCALES**2 + NOISE**2).sqrt()).log_prob(Y)
    precision = 1 / SCALES**2 + 1 / NOISE**2
    means = (LOCS / SCALES**2 + Y / NOISE**2) / precision
    shares = terms.softmax(0)
    mean = shares @ means
    variance = shares @ (1 / precision + means**2) - mean**2
    return model, terms.logsumexp(0).item(), mean.item(), variance.sqrt().item()


def test_prior_of_a_positive_latent_in_nuts():
    model, _, mean, sd = positive_latent(lognormals())
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=150, warmup_steps=30, disable_progbar=True)
    mcmc.run()
    z = mcmc.get_samples()["z"]
    assert (z > 0).all()
    assert z.log().mean().item() == pytest.approx(mean, abs=4 * sd / math.sqrt(50))  # a third counts as independent
    assert z.log().std().item() == pytest.approx(sd, rel=4 / math.sqrt(2 * 50))


def test_prior_of_a_positive_latent_in_flow_vi():
    model, log_evidence, mean, sd = positive_latent(lognormals())
    posterior = pf.FlowVI(model, num_steps=100, num_starts=1, seed=0, progress_bar=False).run()
    assert posterior.log_evidence == pytest.approx(log_evidence, abs=4 * posterior.log_evidence_se + 1e-3)
    weighted = posterior.importance_sample(4000).resample(4000)["z"].log()
    assert weighted.mean().item() == pytest.approx(mean, abs=4 * sd / math.sqrt(2000))


def test_prior_of_a_positive_latent_in_auto_normal():
    """The posterior of the logarithm is nearly normal, so that the bound is nearly the evidence."""
    model, log_evidence, *_ = positive_latent(lognormals())
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    guide = AutoNormal(model)
    loss = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.98}), loss)
    losses = [svi.step() for _ in range(100)]
    assert -sum(losses[-20:]) / 20 == pytest.approx(log_evidence, abs=0.05)
    assert (guide()["z"] > 0).all()


def test_a_support_in_separate_parts_has_no_bijection():
    with pytest.raises(ModelError, match=r"site 'z' has support .* or .*, which has no bijection"):
        pf.FlowVI(lambda: pyro.sample("z", apart()()), progress_bar=False).run()


def test_likelihood_in_plates():
    """The log joint is the sum over rows; training raises it, and reaches components and weights."""
    torch.manual_seed(0)
    mixture = both()
    x = both()().sample((4, 100))

    def model():
        pyro.module("mixture", mixture)
        with pyro.plate("columns", 100), pyro.plate("rows", 4):
            pyro.sample("x", mixture(), obs=x)

    trace = pyro.poutine.trace(model).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), mixture().log_prob(x).sum())
    before = copy.deepcopy(mixture.state_dict())
    pyro.clear_param_store()
    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all((mixture.state_dict()[name] != before[name]).any() for name, _ in mixture.named_parameters())


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    def model():
        with pyro.plate("rows", 7):
            pyro.sample("x", lognormals()())

    x = Predictive(model, num_samples=100, parallel=parallel)()["x"]
    assert x.shape == (100, 7, 1) and len(x.unique()) == 700
    share = (x > math.exp(0.6)).double().mean()
    expected = LOG_WEIGHTS.exp() @ (1 - dist.Normal(LOCS, SCALES).cdf(torch.tensor(0.6)))
    assert share.item() == pytest.approx(expected.item(), abs=4 * math.sqrt(0.25 / 700))


def test_the_reals_contain_ordered_vectors():
    parts = [dist.constraints.ordered_vector, dist.constraints.positive_ordered_vector]
    mixture = Mixture([NSF(2, support=support) for support in [*parts, None]])
    assert str(mixture.support) == "IndependentConstraint(Real(), 1)"

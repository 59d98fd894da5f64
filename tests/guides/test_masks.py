"""Guides of models with masked latents, as in Pyro's own tests of its guides, and what an ELBO with them bounds."""

import copy
import pickle

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, init_to_feasible, init_to_mean, init_to_median, init_to_sample
from pyro.infer.reparam import NeuTraReparam

from pyroflows.errors import ModelError
from pyroflows.flows import Recipe
from pyroflows.guides import AutoFlow
from tests.guides.models import all_guides, fit

ELBOS = pytest.mark.parametrize("Elbo", [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO])
INITS = pytest.mark.parametrize("init_loc_fn", [init_to_feasible, init_to_mean, init_to_median, init_to_sample])

ROWS = torch.tensor([True, False, True, True])
CELLS = torch.tensor([[True, False, True, True], [False, False, True, False]])

FAMILIES = {
    "normal": lambda: dist.Normal(0.0, 1.0),
    "half-normal": lambda: dist.HalfNormal(1.0),
    "beta": lambda: dist.Beta(2.0, 2.0),
    "uniform": lambda: dist.Uniform(-1.0, 2.0),
    "pareto": lambda: dist.Pareto(1.0, 4.0),
    "dirichlet": lambda: dist.Dirichlet(torch.ones(3)),
    "vector": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "event": lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
    "cholesky": lambda: dist.LKJCholesky(3, 1.0),
    "log-normal": lambda: dist.LogNormal(0.0, 1.0),
}


def shapes():
    """The sites of Pyro's own test of shapes, the last of which is masked inside of its event."""
    pyro.sample("z1", dist.Normal(0.0, 1.0))
    pyro.sample("z2", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
    with pyro.plate("plate", 3):
        pyro.sample("z3", dist.Normal(torch.zeros(3), torch.ones(3)))
    pyro.sample("z4", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    pyro.sample("z5", dist.Dirichlet(torch.ones(3)))
    pyro.sample("z6", dist.Normal(0, 1).expand((2,)).mask(torch.arange(2) > 0).to_event(1))


def mean_field_loss(Elbo, model, guide, *args):
    options = {} if Elbo is TraceMeanField_ELBO else {"strict_enumeration_warning": False}
    return Elbo(**options).loss(model, guide, *args)


@INITS
@ELBOS
@all_guides
def test_shapes(make, Elbo, init_loc_fn):
    guide = make(shapes, init_loc_fn=init_loc_fn)
    assert torch.tensor(mean_field_loss(Elbo, shapes, guide)).isfinite()
    assert guide.latent_dim == 1 + 2 + 3 + 2 + 2 + 1


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("how", ["handler", "distribution", "nested", "event", "obs_mask"])
def test_every_support_under_every_mask(family, how):
    def model():
        fn = family()
        if how == "handler":
            with pyro.plate("rows", 4), poutine.mask(mask=ROWS):
                pyro.sample("z", fn)
        elif how == "distribution":
            with pyro.plate("rows", 4):
                pyro.sample("z", fn.expand([4]).mask(ROWS))
        elif how == "nested":
            with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 4, dim=-1), poutine.mask(mask=CELLS):
                pyro.sample("z", fn)
        elif how == "event":
            pyro.sample("z", fn.expand([2, 4]).mask(CELLS).to_event(2))
        else:
            with pyro.plate("rows", 4):
                pyro.sample("z", fn, obs=fn.sample((4,)), obs_mask=~ROWS)

    guide = AutoFlow(model, Recipe("Gaussian"))
    assert torch.tensor(fit(model, guide, steps=3)).isfinite().all()
    guide()
    num_kept = int((CELLS if how in {"nested", "event"} else ROWS).sum())
    assert guide.latent_dim % num_kept == 0 and guide.latent_dim // num_kept == size_of(family)
    trace = poutine.trace(guide).get_trace()
    (site,) = guide.structure.latents
    assert trace.nodes[site.name]["fn"].batch_shape == site.shape[: len(site.shape) - site.event_dim]
    assert site.support.check(trace.nodes[site.name]["value"]).all()


def size_of(family):
    """The number of unconstrained entries of one value."""
    guide = AutoFlow(lambda: pyro.sample("z", family()), Recipe("Gaussian"))
    guide()
    return guide.latent_dim


# Right values


Y, SEEN = torch.tensor([1.5, -0.5, 0.0]), torch.tensor([True, True, False])
LOG_EVIDENCE = -3.471


def imputed(y=Y, seen=SEEN):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 3):
        return pyro.sample("y", dist.Normal(a, 1.0), obs=y, obs_mask=seen)


def exact_guide(model=imputed, *args):
    """A guide that holds the posterior: of a, and of the missing y given it."""
    guide = AutoFlow(model, Recipe("Gaussian"))
    cov = torch.tensor([[1 / 3, 1 / 3], [1 / 3, 4 / 3]])
    guide.start_at(torch.tensor([1 / 3, 1 / 3]), torch.linalg.cholesky(cov), *args)
    return guide


@ELBOS
@pytest.mark.parametrize("vectorize", [False, True])
def test_elbo_of_the_posterior_is_the_evidence(Elbo, vectorize):
    """Exactly, particle by particle: nothing is random but rounding."""
    guide = exact_guide()
    options = {"strict_enumeration_warning": False} if Elbo is TraceEnum_ELBO else {}
    elbo = Elbo(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1, **options)
    for _ in range(3):
        assert elbo.loss(imputed, guide) == pytest.approx(-LOG_EVIDENCE, abs=1e-3)


def test_elbo_does_not_grow_with_training():
    """With Pyro's own guides it would: the scale of entries without a density grows without bound."""
    pyro.set_rng_seed(0)
    guide = AutoFlow(imputed, Recipe("Gaussian"))
    losses = torch.tensor(fit(imputed, guide, steps=400, lr=0.05))
    assert losses[-100:].mean() == pytest.approx(-LOG_EVIDENCE, abs=0.15)


def test_guides_draw_entries_without_a_posterior_from_their_prior_given_the_rest():
    pyro.set_rng_seed(0)
    guide = exact_guide()
    with pyro.plate("draws", 2000, dim=-2), torch.no_grad():
        drawn = guide()
    given_a = drawn["y_unobserved"] - drawn["a"]
    assert given_a.shape == (2000, 3)
    torch.testing.assert_close(given_a.mean(0), torch.zeros(3), atol=4 / 2000**0.5, rtol=0)
    torch.testing.assert_close(given_a.std(0), torch.ones(3), atol=4 / 4000**0.5, rtol=0)


def test_imputed_values():
    pyro.set_rng_seed(0)
    predictive = Predictive(imputed, guide=exact_guide(), num_samples=2000, parallel=True)
    y = predictive()["y"].reshape(2000, 3)
    assert (y[:, :2] == Y[:2]).all()
    assert y[:, 2].mean() == pytest.approx(1 / 3, abs=4 * 1.155 / 2000**0.5)
    assert y[:, 2].std() == pytest.approx(1.155, rel=4 / 4000**0.5)


def test_enumeration_beside_masked_latents():
    """A discrete latent of each row is summed out: rows without data add nothing to the evidence."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            with poutine.mask(mask=SEEN):
                pyro.sample("local", dist.Normal(0.0, 1.0))
                # A change of sign keeps the law of y; so the evidence is that of two rows of Normal(a, 1).
                pyro.sample("y", dist.Normal(a * (2 * k - 1), 1.0), obs=torch.zeros(3))

    guide = AutoFlow(poutine.block(model, hide=["k"]), Recipe("Gaussian"))
    guide.start_at(torch.zeros(3), torch.tensor([3**-0.5, 1.0, 1.0]))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    # log N(0; 0, I + 11') of two rows
    expected = -torch.log(torch.tensor(2 * torch.pi)) - 0.5 * torch.log(torch.tensor(3.0))
    assert elbo.loss(model, guide) == pytest.approx(-expected.item(), abs=1e-3)


def test_scales_and_masks_together():
    """A scale weights what the mask leaves; both in model and bound, as Pyro does."""

    def model():
        with pyro.plate("row", 3), poutine.scale(scale=2.0), poutine.mask(mask=SEEN):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    guide = AutoFlow(model, Recipe("Gaussian"))
    guide.start_at(Y[:2] / 2, torch.full((2,), 0.5))
    # The posterior of each row is N(y / 2, 1/4), of squares of densities.
    z, fn = torch.tensor(0.3), dist.Normal(0.0, 1.0)
    rows = [2 * fn.log_prob(z) + 2 * fn.log_prob(y - z) - dist.Normal(y / 2, 0.5).log_prob(z) for y in Y[:2]]
    assert Trace_ELBO().loss(model, guide) == pytest.approx(-sum(rows).item(), abs=1e-3)


@INITS
def test_a_flat_prior_where_the_initial_gradient_is_zero(init_loc_fn):
    """Whether the log joint depends on entries is not judged at initial values, such as zero for a symmetric model."""

    def model():
        with pyro.plate("row", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(SEEN))
            pyro.sample("y", dist.Normal(z**2, 1.0), obs=torch.ones(3))

    guide = AutoFlow(model, init_loc_fn=init_loc_fn)
    guide()
    assert guide.latent_dim == 3


# Later calls


@pytest.mark.parametrize("other", [~SEEN, torch.ones(3, dtype=torch.bool), torch.tensor([True, False, True])])
def test_another_mask_is_refused(other):
    guide = exact_guide(imputed, Y, SEEN)
    guide(Y, SEEN.clone())
    with pytest.raises(ModelError, match="'y_unobserved' is masked at other entries"):
        guide(Y, other)


def test_a_mask_that_comes_later_is_refused():
    def model(mask):
        with pyro.plate("row", 3), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoFlow(model)
    guide(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ModelError, match="'z' is masked at other entries"):
        guide(SEEN)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies(how):
    guide = exact_guide()
    other = copy.deepcopy(guide) if how == "copy" else pickle.loads(pickle.dumps(guide))
    values = other()
    assert values["y_unobserved"].shape == (3,)
    assert Trace_ELBO().loss(imputed, other) == pytest.approx(-LOG_EVIDENCE, abs=1e-3)


def test_guides_of_a_part_of_the_latents():
    guide = AutoGuideList(imputed)
    guide.append(AutoFlow(poutine.block(imputed, hide=["y_unobserved"])))
    guide.append(AutoFlow(poutine.block(imputed, expose=["y_unobserved"])))
    assert torch.tensor(fit(imputed, guide, steps=3)).isfinite().all()
    assert guide[1].latent_dim == 1


def test_neutra():
    """The log joint of the reparametrised model is the base's density plus the evidence."""
    guide = exact_guide()
    guide()
    model = NeuTraReparam(guide).reparam(imputed)
    for _ in range(3):
        trace = poutine.trace(model).get_trace()
        z = trace.nodes["a_shared_latent"]["value"]
        expected = dist.Normal(0.0, 1.0).log_prob(z).sum() + LOG_EVIDENCE
        assert trace.log_prob_sum().item() == pytest.approx(expected.item(), abs=1e-3)

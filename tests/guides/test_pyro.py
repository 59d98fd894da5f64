"""Every guide is a Pyro ``AutoContinuous``: ELBOs, Predictive, AutoGuideList, NeuTra, handlers, initialisation."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, Predictive, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoGuideList,
    AutoNormal,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.reparam import NeuTraReparam

from pyroflows.errors import ModelError, OptionError
from pyroflows.flows import Recipe
from pyroflows.guides import AutoFlow, AutoIAF, AutoPlanar, AutoRadial, AutoRealNVP, AutoSpline, AutoSylvester
from pyroflows.guides.packed import NUM_QUANTILE_SAMPLES
from tests.guides.models import (
    GUIDES,
    Y,
    all_guides,
    built,
    distinct_guides,
    fit,
    gaussian,
    gaussian_posterior,
    groups,
    guides_of_which_quick,
    perturb,
    regression,
    regression_log_joint,
)

ELBOS = {"trace": Trace_ELBO, "graph": TraceGraph_ELBO, "enum": TraceEnum_ELBO, "renyi": RenyiELBO}
# Pyro's own word to those who use TraceEnum_ELBO without need, as a test of every ELBO does.
NOTHING_TO_ENUMERATE = pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites:UserWarning")
NUM_PARTICLES = 3


def gradients(guide):
    return {name: parameter.grad.clone() for name, parameter in guide.named_parameters()}


@all_guides
def test_is_an_auto_continuous(make):
    assert isinstance(make(regression), AutoContinuous)


@pytest.mark.parametrize("name", GUIDES)
def test_latent_site_has_the_name_of_the_guide(name):
    guide = GUIDES[name](regression)
    assert f"_{name}_latent" in poutine.trace(guide).get_trace().nodes


@all_guides
def test_unknown_options_raise(make):
    with pytest.raises(TypeError, match="no_such_option"):
        make(regression, no_such_option=1)


@pytest.mark.parametrize("guide", [AutoPlanar, AutoRadial, AutoSylvester, AutoIAF, AutoRealNVP, AutoSpline])
def test_defaults_of_a_guide_are_those_of_its_flow(guide):
    recipe = guide(regression).flow_fn
    # Networks that plain SVI trains at any ordinary learning rate.
    scaled = {AutoIAF: "scaled_made", AutoRealNVP: "scaled_mlp", AutoSpline: "scaled_mlp"}
    assert recipe == Recipe(recipe.name, **({"conditioner": scaled[guide]} if guide in scaled else {}))


def test_the_default_guide_is_an_iaf():
    assert str(built(AutoFlow, regression).flow) == str(built(AutoIAF, regression).flow)


@all_guides
def test_guide_that_was_never_called_says_so(make):
    with pytest.raises(ModelError, match="call guide"):
        make(regression).get_posterior()


# ELBOs


@NOTHING_TO_ENUMERATE
@pytest.mark.grid(make=GUIDES.values(), elbo=ELBOS, vectorize=[False, True])
def test_loss_and_gradient_equal_those_by_hand(make, elbo, vectorize):
    """The same noise in, so the same loss out, and the same gradient: log p(u, y) - log q(u), differentiated."""
    guide = built(make, regression).double()
    options = {"alpha": 0.0} if elbo == "renyi" else {}
    loss = ELBOS[elbo](num_particles=NUM_PARTICLES, vectorize_particles=vectorize, max_plate_nesting=1, **options)

    def log_weights():
        d = guide.get_posterior()
        pairs = [d.rsample_and_log_prob((NUM_PARTICLES, 1) if vectorize else ()) for _ in range(1 if vectorize else 3)]
        return torch.cat([(regression_log_joint(u) - log_q).reshape(-1) for u, log_q in pairs])

    torch.manual_seed(1)
    value = loss.loss_and_grads(regression, guide)
    results = gradients(guide)

    guide.zero_grad()
    torch.manual_seed(1)
    weights = log_weights()
    expected = -(weights.logsumexp(0) - math.log(NUM_PARTICLES)) if elbo == "renyi" else -weights.mean()
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients(guide).items():
        torch.testing.assert_close(results[name], gradient, rtol=1e-6, atol=1e-8)


@NOTHING_TO_ENUMERATE
@pytest.mark.grid(make=GUIDES.values(), elbo=ELBOS, vectorize=[False, True])
def test_svi_trains_all_parameters(make, elbo, vectorize):
    guide = built(make, regression)
    before = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
    losses = fit(regression, guide, elbo=ELBOS[elbo](num_particles=2, vectorize_particles=vectorize))
    assert all(math.isfinite(loss) for loss in losses)
    # Masked weights of a MADE have no gradient, but every tensor has some that has one.
    for name, parameter in guide.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@guides_of_which_quick("AutoIAF", "AutoPlanar")
def test_training_reaches_the_evidence(make):
    """The model is conjugate, so the ELBO of a good fit is the log evidence, and the draws have the posterior's law."""
    guide = make(gaussian)
    first = sum(fit(gaussian, guide, steps=20, lr=0.0)) / 20
    for lr, steps in ((0.03, 200), (0.005, 120)):
        elbo = Trace_ELBO(num_particles=32, vectorize_particles=True)
        fit(gaussian, guide, steps=steps, lr=lr, elbo=elbo)
    evidence = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 4.0).log_prob(Y).item()
    with torch.no_grad():
        loss = Trace_ELBO(num_particles=4000, vectorize_particles=True).loss(gaussian, guide)
        mu = guide.get_posterior().sample((2000,)).squeeze(-1)
    # KL of a fit that is off by a tenth of a standard deviation in mean and in scale: 0.015.
    assert -0.02 < loss + evidence < 0.03 < first + evidence
    posterior = gaussian_posterior()
    assert mu.mean() == pytest.approx(posterior.mean.item(), abs=0.15 * posterior.stddev.item())
    assert mu.std() == pytest.approx(posterior.stddev.item(), rel=0.15)


def mixture(y, marginal):
    """A mixture of two, with the component's index as a discrete site, or summed out by hand."""
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    probs = torch.stack([weight, 1 - weight], -1)
    with pyro.plate("rows", len(y)):
        if marginal:
            likelihood = dist.MixtureSameFamily(dist.Categorical(probs), dist.Normal(loc, 1.0))
            pyro.sample("y", likelihood, obs=y)
        else:
            index = pyro.sample("index", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(loc[index], 1.0), obs=y)


@all_guides
def test_discrete_site_enumerated_in_the_model(make):
    """The loss is exactly that of the model with the discrete site summed out."""
    guide = make(poutine.block(mixture, hide=["index"]))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    losses = fit(mixture, guide, Y, False, steps=3, elbo=elbo)
    assert all(math.isfinite(loss) for loss in losses)
    perturb(guide)
    torch.manual_seed(1)
    enumerated = elbo.loss(mixture, guide, Y, False)
    torch.manual_seed(1)
    assert enumerated == pytest.approx(Trace_ELBO().loss(mixture, guide, Y, True), rel=1e-5)


def test_elbo_as_a_torch_module():
    """A torch optimiser over ``guide.parameters()``, Pyro's ELBO as a module, and parameters kept out of the store."""
    with pyro.settings.context(module_local_params=True):
        guide = AutoPlanar(regression)
        loss_fn = Trace_ELBO()(regression, guide)
        loss_fn()
        optimiser = torch.optim.Adam(guide.parameters(), lr=0.02)
        before = [parameter.detach().clone() for parameter in guide.parameters()]
        loss_fn().backward()
        optimiser.step()
    assert not list(pyro.get_param_store())
    assert all(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


# Samples


def predictive_model(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, sigma), obs=y)


@distinct_guides
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_has_the_law_of_the_guide(make, parallel):
    """Means and products of the latents, so their dependence too, and predictions at data that nobody observed."""
    x = torch.linspace(-1, 1, 4)
    guide = built(make, predictive_model, x, Y)
    num = 2000 if parallel else 60
    draws = Predictive(predictive_model, guide=guide, num_samples=num, parallel=parallel)(x)
    assert draws["y"].shape == (num, 4)
    slope, sigma = guide.get_posterior().sample((num,)).unbind(-1)
    sigma = sigma.exp()
    y = slope[:, None] * x + sigma[:, None] * torch.randn(num, 4)

    def statistics(slope, sigma, y):
        return torch.stack([slope, sigma, slope * sigma, slope * y[:, 0], y[:, 3]], -1)

    found = statistics(draws["slope"].reshape(num), draws["sigma"].reshape(num), draws["y"])
    expected = statistics(slope, sigma, y)
    se = ((found.var(0) + expected.var(0)) / num).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < 5 * se).all()


@all_guides
def test_posterior_of_several_plated_sites(make):
    """Every site has its shape, lies in its support, and is the bijection of its part of the latent vector."""
    guide = built(make, groups)
    trace = poutine.trace(guide).get_trace()
    (latent,) = (node["value"] for name, node in trace.nodes.items() if name.endswith("_latent"))
    values, _ = guide.layout.constrain(latent)
    for site in guide.structure.latents:
        node = trace.nodes[site.name]
        assert node["value"].shape == site.shape
        assert site.support.check(node["value"]).all()
        torch.testing.assert_close(node["value"], values[site.name])


# Composition with other guides and handlers


@all_guides
@pytest.mark.parametrize("other", [AutoNormal, AutoDelta])
def test_guide_list_with_another_guide(make, other):
    guide = AutoGuideList(groups)
    guide.append(make(poutine.block(groups, expose=["scale", "vector", "local"])))
    guide.append(other(poutine.block(groups, expose=["weights", "rate"])))
    guide()
    before = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
    assert all(math.isfinite(loss) for loss in fit(groups, guide, lr=0.05))
    changed = {name.split(".")[0] for name, p in guide.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"0", "1"}
    trace = poutine.trace(guide).get_trace()
    for name in ("scale", "vector", "local", "weights", "rate"):
        assert trace.nodes[name]["fn"].support is not None
        assert trace.nodes[name]["value"].dtype == torch.float64
    assert guide.median().keys() == {"scale", "vector", "local", "weights", "rate"}


def test_guide_list_of_two_flow_guides_keeps_them_apart():
    guide = AutoGuideList(groups)
    guide.append(AutoPlanar(poutine.block(groups, expose=["scale", "vector"])))
    guide.append(AutoPlanar(poutine.block(groups, expose=["weights", "rate", "local"])))
    guide()
    assert [part.flow.dim for part in guide] == [1 + 6, 2 + 2 + 8]
    before = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
    fit(groups, guide)
    assert all(not torch.equal(p, before[name]) for name, p in guide.named_parameters())


def test_guide_list_with_a_function():
    """The ELBO of a flow over one site and a hand-written guide of the other, both with the same noise, by hand."""

    def sigma_guide():
        pyro.sample("sigma", dist.LogNormal(0.1, 0.2))

    guide = AutoGuideList(regression)
    guide.append(AutoPlanar(poutine.block(regression, hide=["sigma"])))
    guide.append(sigma_guide)
    guide()
    perturb(guide)
    torch.manual_seed(1)
    loss = Trace_ELBO().loss(regression, guide)
    torch.manual_seed(1)
    mu, log_q = guide[0].get_posterior().rsample_and_log_prob()
    sigma = dist.LogNormal(0.1, 0.2).rsample()
    log_p = regression_log_joint(torch.stack([mu.squeeze(-1), sigma.log()])) - sigma.log()
    assert loss == pytest.approx((log_q + dist.LogNormal(0.1, 0.2).log_prob(sigma) - log_p).item(), rel=1e-5)


@all_guides
def test_sum_of_log_probs_of_the_trace_is_the_log_density(make):
    """With the Delta sites, which carry the log-determinants of the supports: log q(u) - log |det dx/du|."""
    guide = built(make, groups)
    trace = poutine.trace(guide).get_trace()
    values = {site.name: trace.nodes[site.name]["value"] for site in guide.structure.latents}
    u = guide.layout.unconstrain(values)
    _, ladj = guide.layout.constrain(u)
    assert ladj.abs() > 0.1
    expected = guide.get_posterior().log_prob(u) - ladj
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-8, atol=1e-8)


def test_blocked_guide_shows_nothing():
    guide = AutoPlanar(regression)
    assert not poutine.trace(poutine.block(guide)).get_trace().stochastic_nodes
    assert not poutine.trace(poutine.block(guide, hide=["mu"])).get_trace().nodes.keys() & {"mu"}


def test_first_call_runs_the_model_unseen_from_outside():
    guide = AutoPlanar(regression)
    trace = poutine.trace(guide).get_trace()
    assert set(trace.stochastic_nodes) == {"_AutoPlanar_latent", "mu", "sigma"}
    assert not trace.observation_nodes


def test_replayed_and_conditioned_guide():
    guide = built(AutoPlanar, regression)
    trace = poutine.trace(guide).get_trace()
    replayed = poutine.trace(poutine.replay(guide, trace=trace)).get_trace()
    torch.testing.assert_close(replayed.nodes["mu"]["value"], trace.nodes["mu"]["value"], rtol=0, atol=0)
    torch.testing.assert_close(replayed.log_prob_sum(), trace.log_prob_sum())
    conditioned = poutine.condition(guide, {"_AutoPlanar_latent": torch.tensor([0.5, -1.0])})()
    assert conditioned["mu"].item() == pytest.approx(0.5)
    assert conditioned["sigma"].item() == pytest.approx(math.exp(-1))


# Parts of the posterior


@all_guides
def test_base_and_transform_make_the_posterior(make):
    guide = built(make, groups)
    base, transform = guide.get_base_dist(), guide.get_transform()
    by_hand = dist.TransformedDistribution(base, [transform])
    posterior = guide.get_posterior()
    u = posterior.sample((5,))
    torch.testing.assert_close(posterior.log_prob(u), by_hand.log_prob(u), rtol=1e-8, atol=1e-8)
    torch.manual_seed(1)
    z = base.sample((5,))
    torch.manual_seed(1)
    torch.testing.assert_close(posterior.sample((5,)), transform(z))
    assert posterior.event_shape == base.event_shape == (guide.layout.dim,)


@all_guides
def test_transform_has_its_jacobian(make):
    guide = built(make, groups)
    transform = guide.get_transform()
    z = guide.get_base_dist().sample()
    jacobian = torch.autograd.functional.jacobian(transform, z)
    ladj = transform.log_abs_det_jacobian(z, transform(z))
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-8, atol=1e-8)


def known_gaussian(**options):
    """A fresh guide is a Gaussian around the initial values, in the unconstrained space."""
    init = init_to_value(values={"mu": torch.tensor(0.5), "sigma": torch.tensor(2.0)})
    return AutoPlanar(regression, init_loc_fn=init, init_scale=0.5, **options)


def quantile_standard_error(normal, levels, num=NUM_QUANTILE_SAMPLES):
    return (levels * (1 - levels) / num).sqrt() / normal.log_prob(normal.icdf(levels)).exp()


def test_quantiles_of_a_known_gaussian():
    levels = torch.tensor([0.05, 0.5, 0.9])
    quantiles = known_gaussian().quantiles(levels.tolist())
    for value, loc in [(quantiles["mu"], 0.5), (quantiles["sigma"].log(), math.log(2.0))]:
        normal = dist.Normal(loc, 0.5)
        assert value.shape == (3,)
        assert ((value - normal.icdf(levels)).abs() < 5 * quantile_standard_error(normal, levels)).all()


def test_quantiles_take_a_tensor():
    assert known_gaussian().quantiles(torch.tensor([0.1, 0.9]))["mu"].shape == (2,)


def test_quantiles_are_marginal_and_have_the_shapes_of_sites():
    guide = built(AutoPlanar, groups)
    quantiles = guide.quantiles([0.1, 0.9])
    for site in guide.structure.latents:
        low, high = quantiles[site.name]
        assert low.shape == site.shape
        assert (low < high).all()
        assert not low.requires_grad


@all_guides
def test_median_of_a_trained_guide(make):
    guide = built(make, regression)
    draws = guide.get_posterior().sample((NUM_QUANTILE_SAMPLES,))
    median = guide.median()
    for value, column in [(median["mu"], draws[:, 0]), (median["sigma"].log(), draws[:, 1])]:
        # The density at the median of these near-normal laws, from their spread; the reference is a sample as well.
        spread = (column.quantile(0.75) - column.quantile(0.25)) / 1.349
        se = math.sqrt(math.pi / 2 / NUM_QUANTILE_SAMPLES) * spread
        assert (value - column.median()).abs() < 5 * math.sqrt(2) * se


# Initialisation


@all_guides
def test_guide_starts_at_the_initial_values(make):
    init = init_to_value(values={"mu": torch.tensor(-3.0), "sigma": torch.tensor(5.0)})
    guide = make(regression, init_loc_fn=init, init_scale=0.01)
    u = guide.quantiles([0.5])
    # Five standard errors of a median of a normal of standard deviation 0.01.
    tolerance = 5 * 0.01 * math.sqrt(math.pi / 2 / NUM_QUANTILE_SAMPLES)
    assert u["mu"].item() == pytest.approx(-3.0, abs=tolerance)
    assert u["sigma"].log().item() == pytest.approx(math.log(5.0), abs=tolerance)


@all_guides
@pytest.mark.parametrize("scale", [0.01, 0.1, 3.0])
def test_guide_starts_with_the_initial_scale(make, scale):
    guide = make(regression, init_scale=scale)
    guide()
    num = 4000
    sd = guide.get_posterior().sample((num,)).std(0)
    assert ((sd / scale - 1).abs() < 5 / math.sqrt(2 * num)).all()


def test_default_initial_scale():
    guide = AutoFlow(regression)
    guide()
    assert guide.get_posterior().sample((4000,)).std(0) == pytest.approx(torch.full((2,), 0.1), rel=5 / math.sqrt(8000))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
@all_guides
def test_bad_initial_scale_raises(make, scale):
    with pytest.raises(OptionError, match="init_scale"):
        make(regression, init_scale=scale)


def initial_latent(model, init):
    # One test makes several guides; an earlier one's parameters in the store are no start for the next.
    pyro.clear_param_store()
    guide = AutoPlanar(model, init_loc_fn=init, init_scale=1e-6)
    guide()
    return guide.get_posterior().sample()


INITS = [init_to_median, init_to_mean, init_to_sample, init_to_feasible, init_to_uniform, init_to_uniform(radius=0.1)]


@pytest.mark.parametrize("init", INITS, ids=["median", "mean", "sample", "feasible", "uniform", "narrow-uniform"])
@pytest.mark.parametrize("model", [regression, groups], ids=["regression", "groups"])
def test_every_init_function_runs(init, model):
    assert torch.isfinite(initial_latent(model, init)).all()


def far(scale=0.5):
    """A prior whose mean, median, and feasible point are far from each other."""
    pyro.sample("x", dist.LogNormal(torch.full((50,), 3.0), scale).to_event(1))


def test_init_functions_act():
    mean = 3 + 0.5**2 / 2
    torch.testing.assert_close(initial_latent(far, init_to_mean), torch.full((50,), mean), rtol=1e-4, atol=0)
    assert initial_latent(far, init_to_feasible).abs().max() < 1e-4
    assert initial_latent(far, init_to_uniform(radius=0.1)).abs().max() < 0.1001
    assert 1 < initial_latent(far, init_to_uniform).abs().max() < 2.001
    sample = initial_latent(far, init_to_sample)
    assert sample.mean() == pytest.approx(3.0, abs=5 * 0.5 / math.sqrt(50))
    assert sample.std() == pytest.approx(0.5, rel=5 / math.sqrt(100))


def test_init_to_median_acts():
    def model():
        with pyro.plate("rows", 50):
            pyro.sample("x", dist.Normal(7.0, 1.0))

    # Medians of 15 draws from the prior.
    assert initial_latent(model, init_to_median).mean() == pytest.approx(7.0, abs=5 * math.sqrt(math.pi / 2 / 15 / 50))


def test_init_to_value_falls_back_for_other_sites():
    init = init_to_value(values={"mu": torch.tensor(-3.0)}, fallback=init_to_feasible)
    torch.testing.assert_close(initial_latent(regression, init), torch.tensor([-3.0, 0.0]), rtol=0, atol=1e-4)


# NeuTra


def neutra_density(guide, model, z, *args):
    """Log-density of the reparametrised model at a value of the shared latent, and the values of its sites."""
    reparametrised = NeuTraReparam(guide).reparam(model)
    first = guide.structure.latents[0].name
    conditioned = poutine.condition(reparametrised, {f"{first}_shared_latent": z})
    trace = poutine.trace(conditioned).get_trace(*args)
    return trace.log_prob_sum(), {site.name: trace.nodes[site.name]["value"] for site in guide.structure.latents}


@all_guides
def test_neutra_density_by_hand(make):
    """log p(x, y) + log |det dx/du| + log |det du/dz| at x = x(u(z)), for several constrained, plated sites."""
    guide = built(make, groups)
    transform = guide.get_transform()
    for z in guide.get_base_dist().sample((3,)):
        value, sites = neutra_density(guide, groups, z)
        u = transform(z)
        flow_ladj = torch.linalg.slogdet(torch.autograd.functional.jacobian(guide.flow.transform, z)).logabsdet
        expected_sites, ladj = guide.layout.constrain(u)
        log_joint = poutine.trace(poutine.condition(groups, expected_sites)).get_trace().log_prob_sum()
        torch.testing.assert_close(value, log_joint + ladj + flow_ladj, rtol=1e-8, atol=1e-8)
        assert min(ladj.abs(), flow_ladj.abs()) > 0.1
        for name, expected in expected_sites.items():
            torch.testing.assert_close(sites[name], expected)


@all_guides
def test_neutra_maps_draws_back_to_sites(make):
    guide = built(make, groups)
    neutra = NeuTraReparam(guide)
    poutine.trace(neutra.reparam(groups)).get_trace()
    # Pyro wants room for the plates to the right of batches.
    z = guide.get_base_dist().sample((5, 1, 1))
    draws = neutra.transform_sample(z)
    expected, _ = guide.layout.constrain(guide.flow.transform(z.reshape(5, -1)))
    for name, value in expected.items():
        torch.testing.assert_close(draws[name].reshape(value.shape), value)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [NUTS, HMC], ids=["nuts", "hmc"])
def test_neutra_posterior_is_exact(kernel):
    """A poor guide still gives the right posterior, here a known one, through MCMC in its space."""
    guide = built(AutoIAF, gaussian, init_scale=0.4)
    neutra = NeuTraReparam(guide)
    options = {"max_tree_depth": 4} if kernel is NUTS else {"num_steps": 3}
    mcmc = MCMC(kernel(neutra.reparam(gaussian), **options), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    (z,) = mcmc.get_samples().values()
    mu = neutra.transform_sample(z)["mu"].reshape(-1).detach()
    posterior = gaussian_posterior()
    z = (mu - posterior.mean) / posterior.stddev
    assert (z[1:] != z[:-1]).float().mean() > 0.5
    # Standard errors from the means of 20 stretches of the chain; 6 of them, since 20 know their spread to a sixth.
    for values, expected in [(z, 0.0), (z**2, 1.0)]:
        means = values.reshape(20, -1).mean(-1)
        assert (means.mean() - expected).abs() < 6 * means.std() / math.sqrt(20)


def test_neutra_with_plated_constrained_sites():
    """pyro issue 2317: NUTS runs, and draws lie in their supports with their shapes."""
    guide = AutoPlanar(groups, num_layers=2)
    fit(groups, guide, steps=20)
    neutra = NeuTraReparam(guide)
    mcmc = MCMC(NUTS(neutra.reparam(groups), max_tree_depth=3), num_samples=20, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    (z,) = mcmc.get_samples().values()
    draws = neutra.transform_sample(z.reshape(20, 1, 1, -1))
    for site in guide.structure.latents:
        value = draws[site.name].reshape(20, *site.shape)
        assert site.support.check(value).all()
        assert (value.std(0) > 0).all()

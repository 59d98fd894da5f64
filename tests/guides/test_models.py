"""The models that a flow guide takes: supports, plates, dtypes, subsampling; and those that it refuses, with a word."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyroflows.errors import DataError, FlowError, ModelError
from pyroflows.guides import AutoFlow, AutoPlanar, AutoSpline
from tests.guides.models import Y, all_guides, built, distinct_guides, fit, groups, perturb, regression

DOUBLE = torch.float64


def elbo_by_hand(model, guide, *args):
    """At one draw of the guide, from the structure alone: log p(x, y) + log |det dx/du| - log q(u)."""
    u, log_q = guide.get_posterior().rsample_and_log_prob()
    values, ladj = guide.layout.constrain(u)
    trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
    return trace.log_prob_sum() + ladj - log_q


def assert_loss_is_right(model, guide, *args):
    torch.manual_seed(1)
    loss = Trace_ELBO().loss(model, guide, *args)
    torch.manual_seed(1)
    assert loss == pytest.approx(-elbo_by_hand(model, guide, *args).item(), rel=1e-5)


def trainable(make, model, *args, **options):
    """A guide whose loss agrees with the one by hand, before and after a few steps that stay finite."""
    guide = built(make, model, *args, **options)
    assert_loss_is_right(model, guide, *args)
    assert all(math.isfinite(loss) for loss in fit(model, guide, *args))
    assert_loss_is_right(model, guide, *args)
    return guide


# Supports


def _scalar(fn):
    def model():
        x = pyro.sample("x", fn)
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(0.3))

    return model


def _ordered(dim):
    base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    return dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()])


# Name to (distribution, unconstrained dimension).
SUPPORTS = {
    "real": (dist.Normal(0.0, 1.0), 1),
    "positive": (dist.Gamma(2.0, 2.0), 1),
    "unit-interval": (dist.Beta(2.0, 3.0), 1),
    "interval": (dist.Uniform(-1.0, 3.0), 1),
    "greater-than": (dist.Pareto(1.5, 3.0), 1),
    "simplex": (dist.Dirichlet(torch.full((4,), 2.0)), 3),
    "correlation-cholesky": (dist.LKJCholesky(3, 2.0), 3),
    "ordered": (_ordered(3), 3),
    "vector": (dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), 3),
    "positive-vector": (dist.HalfCauchy(torch.ones(3)).to_event(1), 3),
    "matrix": (dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), 6),
    "batch-of-simplices": (dist.Dirichlet(torch.full((2, 3), 2.0)).to_event(1), 4),
}


@all_guides
@pytest.mark.parametrize("support", SUPPORTS)
def test_supports(make, support):
    fn, dim = SUPPORTS[support]
    guide = trainable(make, _scalar(fn))
    assert guide.layout.dim == guide.latent_dim == dim
    value = guide()["x"]
    assert value.shape == fn.shape()
    assert fn.support.check(value).all()


@pytest.mark.parametrize("support", SUPPORTS)
def test_quantiles_lie_in_the_hull_of_the_support(support):
    fn, _ = SUPPORTS[support]
    guide = built(AutoPlanar, _scalar(fn))
    low, high = guide.quantiles([0.1, 0.9])["x"]
    assert low.shape == fn.shape()
    assert torch.isfinite(low).all()
    # Entries that no latent moves, such as the zeros of a Cholesky factor, have no spread.
    assert (low <= high).all()
    assert (low < high).any()


@pytest.mark.parametrize("guide_fn", [AutoFlow, AutoPlanar])
def test_scalar_sites_of_several_supports(guide_fn):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.HalfNormal(1.0))
        c = pyro.sample("c", dist.Beta(1.0, 1.0))
        pyro.sample("y", dist.Normal(a * b, c), obs=torch.tensor(0.3))

    guide = trainable(guide_fn, model)
    assert [site.name for site in guide.structure.latents] == ["a", "b", "c"]


# One dimension


@all_guides
def test_one_dimension(make):
    guide = trainable(make, _scalar(dist.Normal(0.0, 1.0)))
    perturb(guide.double(), 1.0)
    # A sum over a grid that is much finer than the density's features, on an interval that holds all of it.
    d = guide.get_posterior()
    draws = d.sample((2000,))
    width = draws.max() - draws.min()
    grid = torch.linspace((draws.min() - width).item(), (draws.max() + width).item(), 20_001, dtype=DOUBLE)
    density = d.log_prob(grid[:, None]).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-4)
    mean = torch.trapezoid(grid * density, grid)
    assert (draws.mean() - mean).abs() < 5 * draws.std() / math.sqrt(2000)


# Plates


def nested(y=None):
    with pyro.plate("a", 3, dim=-2):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("b", 2, dim=-1):
            z = pyro.sample("z", dist.Gamma(2.0, torch.ones(3, 1)))
            v = pyro.sample("v", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(x + v.sum(-1), z), obs=torch.zeros(3, 2))


@all_guides
@pytest.mark.parametrize("vectorize", [False, True])
def test_nested_plates(make, vectorize):
    guide = trainable(make, nested)
    assert {name: value.shape for name, value in guide().items()} == {"x": (3, 1), "z": (3, 2), "v": (3, 2, 4)}
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorize)
    assert all(math.isfinite(loss) for loss in fit(nested, guide, elbo=elbo))


@all_guides
def test_groups(make):
    trainable(make, groups)


def test_plates_of_the_guide_are_those_of_the_model():
    """Under TraceGraph and in scaled or masked programs, the conditional independence of a site must be the model's."""
    trace = poutine.trace(AutoPlanar(groups)).get_trace()
    frames = {name: {f.name for f in trace.nodes[name]["cond_indep_stack"]} for name in ("scale", "rate", "local")}
    assert frames == {"scale": set(), "rate": {"columns"}, "local": {"rows", "columns"}}


# Flat priors

FLAT = {
    "masked": lambda: dist.Normal(0.0, 1.0).mask(False),
    "masked-positive": lambda: dist.HalfNormal(1.0).mask(False),
    "masked-vector": lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(False),
    "improper": lambda: dist.ImproperUniform(dist.constraints.real, (), ()),
    "improper-positive": lambda: dist.ImproperUniform(dist.constraints.positive, (), ()),
    "improper-vector": lambda: dist.ImproperUniform(dist.constraints.real_vector, (), (3,)),
    "improper-ordered": lambda: dist.ImproperUniform(dist.constraints.ordered_vector, (), (3,)),
    "improper-simplex": lambda: dist.ImproperUniform(dist.constraints.simplex, (), (3,)),
    "improper-batch": lambda: dist.ImproperUniform(dist.constraints.positive, (3,), ()).to_event(1),
}


def assert_only_the_likelihood_counts(model, guide, y):
    """The loss of a model of one site "x", flat, with y ~ N(x, 1), by hand: likelihood and log-determinant alone."""
    torch.manual_seed(1)
    loss = Trace_ELBO().loss(model, guide)
    torch.manual_seed(1)
    u, log_q = guide.get_posterior().rsample_and_log_prob()
    values, ladj = guide.layout.constrain(u)
    likelihood = dist.Normal(values["x"], 1.0).log_prob(torch.tensor(y)).sum()
    assert loss == pytest.approx((log_q - ladj - likelihood).item(), rel=1e-5)


@all_guides
@pytest.mark.parametrize("prior", FLAT)
def test_flat_priors(make, prior):
    def model():
        x = pyro.sample("x", FLAT[prior]())
        pyro.sample("y", dist.Normal(x, 1.0).to_event(), obs=torch.full(x.shape, 0.5))

    assert_only_the_likelihood_counts(model, trainable(make, model), 0.5)


def test_mask_by_a_handler_is_a_flat_prior():
    def model():
        with poutine.mask(mask=False):
            x = pyro.sample("x", dist.Normal(0.0, 0.1))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(5.0))

    guide = trainable(AutoPlanar, model)
    assert guide.structure.latents[0].is_flat
    assert_only_the_likelihood_counts(model, guide, 5.0)


@pytest.mark.parametrize("prior", ["improper", "masked"])
def test_initial_value_of_a_flat_prior(prior):
    guide = AutoPlanar(
        _scalar(FLAT[prior]()), init_loc_fn=init_to_value(values={"x": torch.tensor(4.0)}), init_scale=1e-4
    )
    assert guide()["x"].item() == pytest.approx(4.0, abs=1e-3)


def test_flat_prior_in_a_plate():
    def model():
        with pyro.plate("rows", 3):
            x = pyro.sample("x", dist.ImproperUniform(dist.constraints.positive, (), ()))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.ones(3))

    assert trainable(AutoPlanar, model).layout.dim == 3


# Dtypes


def double_model(y=None):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    pyro.sample("y", dist.Normal(mu, torch.ones((), dtype=DOUBLE)), obs=torch.zeros((), dtype=DOUBLE))


def mixed_model(y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.zeros((), dtype=DOUBLE))


@all_guides
@pytest.mark.parametrize(
    ("model", "options", "dtype"),
    [
        (regression, {}, torch.float32),
        (double_model, {}, DOUBLE),
        (mixed_model, {}, DOUBLE),
        (regression, {"dtype": DOUBLE}, DOUBLE),
        (double_model, {"dtype": torch.float32}, torch.float32),
    ],
    ids=["float32", "float64", "mixed", "float32-as-float64", "float64-as-float32"],
)
def test_dtype_of_the_flow(make, model, options, dtype):
    guide = make(model, **options)
    values = guide()
    assert {value.dtype for value in values.values()} == {dtype}
    assert {tensor.dtype for tensor in guide.state_dict().values() if tensor.is_floating_point()} == {dtype}
    fit(model, guide)
    assert {parameter.dtype for parameter in guide.parameters()} == {dtype}
    assert all(math.isfinite(loss) for loss in fit(model, guide))
    assert guide.get_posterior().log_prob(torch.zeros(guide.latent_dim, dtype=dtype)).dtype == dtype
    assert guide.median()[guide.structure.latents[0].name].dtype == dtype


def test_double_guide_is_precise():
    """Initial values pass through no float32 on their way into the flow."""
    value = torch.tensor(1 / 3, dtype=DOUBLE)
    guide = AutoPlanar(double_model, init_loc_fn=init_to_value(values={"mu": value}), init_scale=1e-14)
    assert guide()["mu"].item() == pytest.approx(1 / 3, abs=1e-12)


def test_default_dtype_is_followed():
    torch.set_default_dtype(DOUBLE)
    try:
        guide = AutoFlow(_scalar(dist.Normal(0.0, 1.0)))
        assert guide()["x"].dtype == DOUBLE
    finally:
        torch.set_default_dtype(torch.float32)


# Modules


class Regression(PyroModule):
    """A linear layer with a prior on its weight, a learned bias, and a latent noise scale."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        mean = pyro.deterministic("mean", self.linear(x).squeeze(-1))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, sigma), obs=y)


@all_guides
def test_pyro_module(make):
    model = Regression()
    x, y = torch.randn(5, 3), torch.randn(5)
    guide = make(model)
    bias = model.linear.bias.detach().clone()
    fit(model, guide, x, y)
    assert {site.name: site.shape for site in guide.structure.latents} == {"sigma": (), "linear.weight": (1, 3)}
    assert_loss_is_right(model, guide, x, y)
    assert not torch.equal(model.linear.bias, bias)
    # The model's own parameters are not the guide's.
    assert not {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}
    draws = Predictive(model, guide=guide, num_samples=6)(torch.randn(4, 3))
    assert draws["y"].shape == (6, 4)
    assert draws["mean"].shape == (6, 1, 4)


# Without the training data


def linear(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)


@distinct_guides
def test_inference_without_training_data(make):
    """At other inputs, of another number, without observations: the guide's draws do not depend on its arguments."""
    x = torch.linspace(-1, 1, 20)
    guide = make(linear)
    fit(linear, guide, x, 2 * x, steps=60, lr=0.1)
    new = torch.tensor([1.0, -1.0, 3.0])
    for parallel in (False, True):
        draws = Predictive(linear, guide=guide, num_samples=30, parallel=parallel)(new)
        assert draws["y"].shape == (30, 3)
        # The training is short: this says that predictions come from the posterior and not from the prior.
        torch.testing.assert_close(draws["y"].mean(0), 2 * new, rtol=0, atol=0.6)
    assert guide.median(new)["slope"].item() == pytest.approx(2.0, abs=0.2)
    assert guide(new).keys() == {"slope"}


# Subsampled plates

DATA = torch.linspace(-1, 2, 50)


def subsampled(data, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", len(data), subsample_size=size) as rows:
        pyro.sample("y", dist.Normal(mu, sigma), obs=data[rows])


@distinct_guides
def test_loss_of_subsampled_observations_is_unbiased(make):
    """At one fixed draw of the guide, the mean loss over random rows is the loss of all rows."""
    guide = built(make, subsampled, DATA, 10)
    fixed = poutine.trace(guide).get_trace(DATA, 10)
    replayed = poutine.replay(guide, trace=fixed)
    num = 50
    losses = torch.tensor([Trace_ELBO().loss(subsampled, replayed, DATA, 10) for _ in range(num)])
    full = Trace_ELBO().loss(subsampled, replayed, DATA)
    assert losses.std() > 0.1
    assert (losses.mean() - full).abs() < 5 * losses.std() / math.sqrt(num)


@distinct_guides
def test_training_on_subsampled_observations(make):
    guide = make(subsampled)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
    losses = fit(subsampled, guide, DATA, 10, steps=100, lr=0.05, elbo=elbo)
    assert all(math.isfinite(loss) for loss in losses)
    # The posterior of mu is about N(0.5, 0.13); rows drawn anew each step leave some noise.
    assert guide.median()["mu"].item() == pytest.approx(DATA.mean().item(), abs=0.3)
    # Another subsample size later, or none, is the same guide.
    assert guide(DATA).keys() == guide(DATA, 5).keys() == {"mu", "sigma"}


def local(data, size):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(data), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=data[rows])


@all_guides
def test_local_latent_in_a_subsampled_plate_raises(make):
    with pytest.raises(ModelError, match=r"'z'.*'rows'.*10 of 50 rows"):
        make(local)(DATA, 10)
    assert make(local)(DATA, 50)["z"].shape == (50,)


@pytest.mark.parametrize("view", [{"expose": ["mu", "z"]}, {"hide": ["rows"]}], ids=str)
def test_local_latent_raises_although_its_plate_is_blocked(view):
    """The plate's own site is hidden, as in every part of a guide list, but the plate is still subsampled."""
    with pytest.raises(ModelError, match=r"'z'.*'rows'"):
        AutoPlanar(poutine.block(local, **view))(DATA, 10)


def test_local_latent_in_a_guide_list_raises():
    guide = AutoGuideList(local)
    guide.append(AutoPlanar(poutine.block(local, expose=["z"])))
    guide.append(AutoNormal(poutine.block(local, expose=["mu"])))
    with pytest.raises(ModelError, match=r"'z'.*'rows'"):
        guide(DATA, 10)


def test_global_part_of_a_guide_list_takes_subsampled_observations():
    guide = AutoGuideList(local)
    guide.append(AutoPlanar(poutine.block(local, expose=["mu"])))
    guide.append(AutoNormal(poutine.block(local, expose=["z"]), create_plates=None))
    assert all(math.isfinite(loss) for loss in fit(local, guide, DATA, 50))


# Models that are refused


def refused(model, *args, **kwargs):
    guide = AutoFlow(model)
    with pytest.raises(FlowError) as error:
        guide(*args, **kwargs)
    # Each call says it again: nothing is left half built.
    with pytest.raises(type(error.value)):
        guide(*args, **kwargs)
    return error


def test_sequential_plate_raises():
    def model():
        for i in pyro.plate("rows", 3):
            pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))

    error = refused(model)
    assert error.type is ModelError
    assert error.match(r"'x_0'.*sequential plate 'rows'.*with pyro.plate")


def test_sequential_plate_of_observations_is_fine():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("rows", 3):
            pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=torch.tensor(0.3))

    trainable(AutoPlanar, model)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Poisson(3.0),
        dist.Geometric(0.5),
        dist.Multinomial(4, torch.ones(3)),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_discrete_latent_raises(fn):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("count", fn)

    error = refused(model)
    assert error.type is ModelError
    assert error.match("'count'.*discrete.*cannot be summed out")


def test_discrete_latents_may_be_hidden():
    def model():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("count", dist.Bernoulli(p), infer={"enumerate": "parallel"})

    trainable(AutoFlow, poutine.block(model, hide=["count"]))


@pytest.mark.parametrize("observed", [False, True])
def test_no_latents_raises(observed):
    def model():
        if observed:
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    error = refused(model)
    assert error.type is ModelError
    assert error.match("no latent")


def test_nan_data_raises():
    error = refused(regression, torch.tensor([1.0, math.nan, math.nan]))
    assert error.type is DataError
    assert error.match("'y' has 2 NaN of 3 values")


def test_advice_for_nan_data_works():
    """Rows of missing values are dropped, or filled with any number and masked."""

    def masked(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        observed = ~torch.isnan(y)
        with pyro.plate("rows", len(y)), poutine.mask(mask=observed):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.where(observed, y, 0.0))

    y = torch.tensor([1.0, math.nan, 2.0])
    trainable(AutoPlanar, masked, y)
    trainable(AutoPlanar, regression, y[~torch.isnan(y)])


def test_nan_in_masked_rows_is_for_pyro_to_judge():
    """Pyro's validation refuses it in SVI, so the advice is to fill the rows; the guide itself has no objection."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)), poutine.mask(mask=~torch.isnan(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([1.0, math.nan])
    guide = AutoPlanar(model)
    assert guide(y).keys() == {"mu"}
    with pytest.raises(ValueError, match="within the support"):
        fit(model, guide, y)
    assert refused(regression, y).match("fill them")


NO_BIJECTION = {
    "sphere": lambda: dist.ProjectedNormal(torch.ones(3)),
    "positive-definite": lambda: dist.ImproperUniform(dist.constraints.positive_definite, (), (2, 2)),
    "lower-cholesky": lambda: dist.ImproperUniform(dist.constraints.lower_cholesky, (), (2, 2)),
    "improper-sphere": lambda: dist.ImproperUniform(dist.constraints.sphere, (), (3,)),
    "wishart": lambda: dist.Wishart(torch.tensor(5.0), torch.eye(2)),
}


@pytest.mark.filterwarnings("ignore:Singular sample detected:UserWarning")  # torch's, of its own Wishart draws
@pytest.mark.parametrize("support", NO_BIJECTION)
def test_support_without_bijection_raises(support):
    def model():
        pyro.sample("direction", NO_BIJECTION[support]())

    error = refused(model)
    assert error.type is ModelError
    assert error.match("'direction'.*support.*no bijection")


def test_initial_value_of_a_wrong_shape_raises():
    init = init_to_value(values={"mu": torch.zeros(3)})
    with pytest.raises(ModelError, match=r"'mu'.*\(3,\)"):
        AutoPlanar(regression, init_loc_fn=init)()


def test_observed_site_may_have_any_support():
    def model():
        x = pyro.sample("x", dist.Normal(torch.ones(3), 1.0).to_event(1))
        pyro.sample("y", dist.ProjectedNormal(x), obs=torch.tensor([1.0, 0.0, 0.0]))

    trainable(AutoPlanar, model)


def test_factors_count():
    """``pyro.factor`` is no data and no latent, but part of the log joint."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("likelihood", dist.Normal(x, 0.1).log_prob(torch.tensor(1.0)))

    guide = trainable(AutoPlanar, model)
    assert not guide.structure.observed


def test_a_guide_can_be_retried_with_better_data():
    guide = AutoFlow(regression)
    with pytest.raises(DataError):
        guide(torch.tensor([math.nan]))
    assert guide(Y).keys() == {"mu", "sigma"}


# Recipes


def test_options_reach_the_recipe():
    guide = trainable(AutoSpline, regression, num_layers=3, hidden_dims=(4,), bins=5, bound=2.0)
    *couplings, _ = guide.flow.transform.layers
    assert [(layer.univariate.bins, layer.univariate.bound) for layer in couplings] == [(5, 2.0)] * 3
    assert {layer.conditioner[0].out_features for layer in couplings} == {4}

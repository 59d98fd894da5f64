"""Distributions that vmap refuses give under it what they give for single draws."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import softplus

from pyroflows.models.batching import BatchedModel
from pyroflows.models.vectorized import draw, vectorized
from pyroflows.models.vectorized_methods import METHODS

NUM_DRAWS = 5
MAX_Z = 4.5
NAN = torch.nan
transforms = dist.transforms


class Case(NamedTuple):
    """A distribution as a function of numbers, how many it takes, and a value, which is drawn if it is None."""

    make: Callable[[Tensor], object]
    size: int
    value: list | None = None
    has_sampler: bool = True


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def tril(u):
    return torch.stack([softplus(u[0]), torch.zeros_like(u[0]), u[1], softplus(u[2])]).reshape(2, 2)


def covariance(u):
    return tril(u) @ tril(u).T


def normal(u):
    return dist.MultivariateNormal(u[:2], scale_tril=tril(u))


def ordered(u):
    gaps = softplus(u)
    cutpoints = torch.stack([u[0], u[0] + gaps[1], u[0] + gaps[1] + gaps[2]])
    return dist.OrderedLogistic(torch.linspace(-1, 1, 18).double().reshape(6, 3) @ u, cutpoints)


def discrete_hmm(u, observation):
    return dist.DiscreteHMM(u[:2], u[2:6].reshape(2, 2).log_softmax(-1), observation, duration=7)


def gaussian_hmm(u, observation):
    matrix = torch.eye(2).double() + 0.1 * u[0]
    ones = torch.ones(2, 1).double()
    return dist.GaussianHMM(normal(u), matrix, normal(u), ones, observation, duration=5)


def gaussian_mrf(u):
    transition = dist.MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double() * softplus(u[3]))
    observation = dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double() * softplus(u[2]))
    return dist.GaussianMRF(normal(u), transition, observation)


def sine(u, **kwargs):
    return dist.SineBivariateVonMises(u[0], u[1], 1 + softplus(u[2]), 1 + softplus(u[3]), **kwargs)


def sine_skewed(u):
    return dist.SineSkewed(dist.VonMises(u[:2], softplus(u[2:4])).to_event(1), 0.4 * u[4:].tanh())


def stable(u, alpha, coords="S0"):
    return dist.StableWithLogProb(alpha, u[1].tanh(), softplus(u[2]), u[3], coords=coords)


def wishart(u, **kwargs):
    return dist.Wishart(2 + softplus(u[3]), **kwargs)


SPLINE = transforms.Spline(3, count_bins=4, bound=2.0).double()
QUADRATIC = transforms.Spline(3, count_bins=4, bound=2.0, order="quadratic").double()


def splined(u, spline):
    return dist.TransformedDistribution(dist.Normal(u, 1.0).to_event(1), [spline])


def mixture(u):
    counts = dist.Multinomial(4, logits=u[2:].reshape(2, 2))
    return dist.MixtureSameFamily(dist.Categorical(logits=u[:2]), counts)


SERIES = [[-1.0], [-0.5], [0.0], [0.5], [2.0]]
LEAVES = f64(0.0, 1.5, 2.0, 4.2)
CASES = {
    "ordered logistic": Case(ordered, 3),
    "ordered logistic, expanded": Case(lambda u: ordered(u).expand([2, 6]).to_event(1), 3),
    "multinomial": Case(lambda u: dist.Multinomial(10, u.softmax(-1)), 3),
    "multinomial of logits": Case(lambda u: dist.Multinomial(10, logits=u), 3),
    "multinomial, masked rows": Case(
        lambda u: dist.Multinomial(10, u.softmax(-1)).expand([2]).mask(torch.tensor([True, False])), 3
    ),
    "multinomial, impossible category": Case(
        lambda u: dist.Multinomial(3, logits=torch.cat([u, f64(-torch.inf)])), 2, [1.0, 2.0, 0.0]
    ),
    "poisson, sparse": Case(lambda u: dist.Poisson(softplus(u), is_sparse=True), 4, [0.0, 1.0, 0.0, 3.0]),
    "dirichlet multinomial": Case(lambda u: dist.DirichletMultinomial(softplus(u), 10), 3),
    "dirichlet multinomial, sparse": Case(lambda u: dist.DirichletMultinomial(softplus(u), 10, is_sparse=True), 3),
    "normal with NaN": Case(lambda u: dist.NanMaskedNormal(u[0], softplus(u[1])), 2, [1.0, NAN, 0.0]),
    "multivariate normal with NaN": Case(
        lambda u: dist.NanMaskedMultivariateNormal(u[:2], covariance(u)), 4, [[1.0, NAN], [0.0, 1.0], [NAN, NAN]]
    ),
    "discrete hmm": Case(lambda u: discrete_hmm(u, dist.Normal(u[6:], 1.0)), 8),
    "discrete hmm of categories": Case(lambda u: discrete_hmm(u, dist.Categorical(logits=u[4:].reshape(2, 2))), 8),
    "gaussian hmm": Case(lambda u: gaussian_hmm(u, dist.Normal(u[:1], 1.0).to_event(1)), 4),
    "gaussian mrf": Case(gaussian_mrf, 4, SERIES, has_sampler=False),
    "coalescent times": Case(lambda u: dist.CoalescentTimes(LEAVES, softplus(u[0])), 1),
    "coalescent times with rate": Case(
        lambda u: dist.CoalescentTimesWithRate(LEAVES, softplus(u)), 5, [-1.0, 0.7, 1.1], has_sampler=False
    ),
    "wishart": Case(lambda u: wishart(u, scale_tril=tril(u)), 4),
    "wishart of covariance": Case(lambda u: wishart(u, covariance_matrix=covariance(u)), 4),
    "wishart of precision": Case(lambda u: wishart(u, precision_matrix=covariance(u)), 4),
    "wishart, fixed": Case(lambda u: dist.Wishart(f64(3.0)[0], scale_tril=tril(u)), 3),
    "sine bivariate von mises": Case(lambda u: sine(u, correlation=u[4].tanh()), 5),
    "sine bivariate von mises, weighted": Case(lambda u: sine(u, weighted_correlation=u[4].tanh()), 5),
    "sine skewed": Case(sine_skewed, 6, [0.2, 0.4]),
    "von mises": Case(lambda u: dist.VonMises(u[0], softplus(u[1])), 2),
    "projected normal": Case(dist.ProjectedNormal, 3),
    "stable": Case(lambda u: stable(u, 1.5 + 0.4 * u[0].tanh()), 4, [0.5, 1.0, -3.0]),
    "stable near one": Case(lambda u: stable(u, 1.0 + 0.04 * u[0].tanh()), 4, [0.5, 1.0, -3.0]),
    "one-one matching": Case(
        lambda u: dist.OneOneMatching(u.reshape(3, 3), bp_iters=5), 9, [2, 0, 1], has_sampler=False
    ),
    "one-two matching": Case(
        lambda u: dist.OneTwoMatching(u.reshape(4, 2), bp_iters=5), 8, [1, 0, 0, 1], has_sampler=False
    ),
    "spanning tree": Case(dist.SpanningTree, 6, [[0, 1], [1, 2], [0, 3]]),
    "linear spline": Case(lambda u: splined(u, SPLINE), 3, [0.1, -1.5, 3.0]),
    "quadratic spline": Case(lambda u: splined(u, QUADRATIC), 3, [0.1, -1.5, 3.0]),
    "beta": Case(lambda u: dist.Beta(softplus(u[0]), softplus(u[1])), 2),
    "lkj": Case(lambda u: dist.LKJCholesky(3, softplus(u[0])), 1),
    "student": Case(lambda u: dist.MultivariateStudentT(2 + softplus(u[3]), u[:2], tril(u)), 4),
    "mixture": Case(
        lambda u: dist.MixtureSameFamily(
            dist.Categorical(logits=u[:2]), dist.Multinomial(4, logits=u[2:].reshape(2, 2))
        ),
        6,
        [1.0, 3.0],
    ),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Singular sample detected"),  # of torch, about single draws of a Wishart law
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of torch, about vmap
]


@pytest.fixture(autouse=True)
def without_validation():
    with pyro.validation_enabled(False):
        yield


def under_vmap(function, *tensors):
    def single(number, *rows):
        with vectorized(number):
            return function(*rows)

    return torch.func.vmap(single, randomness="different")(torch.arange(len(tensors[0])), *tensors)


def one_by_one(function, *tensors):
    return torch.stack([function(*row) for row in zip(*tensors, strict=True)])


def parameters_and_values(case):
    u = torch.randn(NUM_DRAWS, case.size, dtype=torch.float64)
    if case.value is None:
        return u, torch.stack([case.make(row).sample().detach() for row in u])
    value = torch.tensor(case.value)
    return u, (value.double() if value.is_floating_point() else value).expand(NUM_DRAWS, *value.shape)


def value_and_gradients(function, tensors, run):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    output = run(function, *leaves)
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float64).reshape(output.shape)
    gradients = torch.autograd.grad((weights * output).sum(), leaves, allow_unused=True, materialize_grads=True)
    return [output, *gradients]


def assert_same(function, *tensors):
    expected = value_and_gradients(function, tensors, one_by_one)
    assert expected[1].abs().max() > 1e-3
    for a, b in zip(value_and_gradients(function, tensors, under_vmap), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


@CASE
def test_log_prob_and_its_gradient(case):
    u, values = parameters_and_values(case)
    assert_same(lambda row: case.make(row).log_prob(values[0]), u)


@CASE
def test_log_prob_of_values_that_differ_by_draw(case):
    u, values = parameters_and_values(case)

    def log_prob(row, value):
        return case.make(row).log_prob(value)

    if case.make(u[0]).support.is_discrete or not values.is_floating_point():  # a count has no gradient of any use
        torch.testing.assert_close(under_vmap(log_prob, u, values), one_by_one(log_prob, u, values))
    else:
        assert_same(log_prob, u, values)


SAMPLED = {name: case for name, case in CASES.items() if case.has_sampler}


@pytest.mark.parametrize("case", SAMPLED.values(), ids=SAMPLED)
def test_each_draw_has_numbers_of_its_own(case):
    """Also where all draws have the same parameters."""
    u = torch.randn(case.size, dtype=torch.float64)
    draws = under_vmap(lambda number: draw(case.make(u)), torch.arange(20))
    assert draws.shape == (20, *case.make(u).sample().shape)
    assert not draws.isinf().any()
    assert len(draws.unique(dim=0)) > 1


def moments(draws):
    """Mean and second moments of vectors, with their standard errors."""
    flat = draws.flatten(1)
    parts = torch.cat([flat, (flat[:, :, None] * flat[:, None, :]).flatten(1)], 1)
    return parts.mean(0), parts.std(0) / len(parts) ** 0.5


MOMENTS = {
    "wishart": lambda u: wishart(u, scale_tril=tril(u)),
    "projected normal": lambda u: dist.ProjectedNormal(u[:3]),
    "von mises": lambda u: dist.VonMises(u[:2], softplus(u[2:])),
    "sine": lambda u: sine(u, correlation=u[0].tanh()),
    "beta": lambda u: dist.Beta(softplus(u[:2]), softplus(u[2:])),
    "multinomial": lambda u: dist.Multinomial(6, logits=u),
    "ordered logistic": lambda u: ordered(u[:3]),
    "stable, tamed": lambda u: dist.TransformedDistribution(
        stable(u, 1.0 + 0.005 * u[:2].tanh()), [transforms.SigmoidTransform()]
    ),
    "coalescent": lambda u: dist.CoalescentTimes(LEAVES, softplus(u[0])),
}


@pytest.mark.parametrize("make", MOMENTS.values(), ids=MOMENTS)
def test_draws_have_the_moments_of_single_runs(make):
    u = torch.tensor([0.3, -0.5, 0.8, 0.1], dtype=torch.float64)
    draws = under_vmap(lambda number: draw(make(u)), torch.arange(4000)).double()
    fn = make(u)
    expected = torch.stack([fn.sample() for _ in range(500)]).double()
    (mean, error), (expected_mean, expected_error) = moments(draws), moments(expected)
    assert ((mean - expected_mean).abs() <= MAX_Z * (error**2 + expected_error**2).sqrt() + 1e-12).all()


# Models as they are written for one draw


def ordinal():
    slopes = pyro.sample("slopes", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    cuts = dist.TransformedDistribution(dist.Normal(0.0, 2.0).expand([2]).to_event(1), transforms.OrderedTransform())
    cutpoints = pyro.sample("cutpoints", cuts)
    with pyro.plate("row", 4):
        x = torch.linspace(-1, 1, 12).reshape(4, 3)
        pyro.sample("y", dist.OrderedLogistic(x @ slopes, cutpoints), obs=torch.tensor([0, 1, 2, 1]))


def states():
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    means = pyro.sample("means", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
    hmm = dist.DiscreteHMM(torch.zeros(2), rows.log(), dist.Normal(means, 1.0), duration=6)
    pyro.sample("y", hmm, obs=torch.linspace(-1, 1, 6))


def scatter():
    freedom = pyro.sample("freedom", dist.Gamma(4.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
    pyro.sample("y", dist.Wishart(2 + freedom, scale_tril=torch.diag(scale)), obs=3 * torch.eye(2))


def directions():
    """A constrained mean and rows of an angle, with priors that have no parameters of their own."""
    start = pyro.sample("start", dist.VonMises(0.0, 1.0))
    weights = pyro.sample("weights", dist.Beta(torch.ones(2), 2.0).to_event(1))
    with pyro.plate("row", 3):
        torus = dist.VonMises(torch.stack([start, 2 * start]), torch.ones(2)).to_event(1)
        pyro.sample("y", dist.SineSkewed(torus, 0.4 * weights), obs=torch.linspace(-1, 1, 6).reshape(3, 2))


def counted_in_a_factor():
    logits = pyro.sample("logits", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    shares = torch.stack([logits[0], logits[1], logits[2]])
    pyro.factor("counts", dist.Multinomial(6, logits=shares).log_prob(torch.tensor([1.0, 2.0, 3.0])))


@pytest.mark.parametrize("model", [ordinal, states, scatter, directions, counted_in_a_factor])
def test_models_run_at_once_and_draw_at_once(model):
    prior = BatchedModel(model, (), {}, {}, draw=True)
    values = prior({}, 6).values
    latents = {name: value for name, value in values.items() if name not in ("y", "counts")}
    assert prior.mode == "vmap"
    assert all(len(value.unique(dim=0)) > 1 for value in values.values())
    batched = BatchedModel(model, (), {}, latents)
    assert batched.mode == "vmap"
    record = batched(latents, 6)
    batched.mode = "loop"
    expected = batched(latents, 6)
    for name, log_prob in expected.log_probs.items():
        torch.testing.assert_close(record.log_probs[name], log_prob, rtol=1e-4, atol=1e-4)


# What is replaced, and for how long


def methods():
    return [vars(owner)[name] for owner, name, _ in METHODS] + [vars(Function)["apply"]]


def test_nothing_stays_replaced():
    before = methods()

    def fails():
        with vectorized(torch.tensor(0)), vectorized(torch.tensor(0)):
            assert not any(a is b for a, b in zip(methods(), before, strict=True))
            raise RuntimeError("a model's error")

    with pytest.raises(RuntimeError, match="a model's error"):
        fails()
    assert all(a is b for a, b in zip(methods(), before, strict=True))


def test_other_threads_see_what_they_saw():
    """Without vmap, Pyro's own methods run, and a new tensor holds no numbers of draws."""
    seen = []

    def other():
        seen.append(draw(dist.OrderedLogistic(torch.zeros(3), torch.tensor([-1.0, 1.0]))).shape)
        seen.append(dist.NanMaskedNormal(0.0, 1.0).log_prob(torch.tensor([0.0, NAN]))[1])

    with vectorized(torch.tensor(0)):
        inside = methods()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert methods() == inside
    assert seen == [torch.Size([3]), torch.tensor(0.0)]


# Functions with a context


class Scaled(Function):
    """Two outputs, of which one is saved, a tensor that is neither input nor output, None, and a number."""

    @staticmethod
    def forward(context, x, factor):
        root = x.sqrt()
        log = x.log()
        context.factor = factor
        context.save_for_backward(x, root, 1 / x, None)
        return root, factor * log

    @staticmethod
    def backward(context, of_root, of_log):
        _, root, inverse, nothing = context.saved_tensors
        assert nothing is None
        gradient = of_root / (2 * root) + context.factor * of_log * inverse
        return (gradient if context.needs_input_grad[0] else None), None


class Hidden(Function):
    @staticmethod
    def forward(context, x):
        context.x = x
        return x**2

    @staticmethod
    def backward(context, gradient):
        return 2 * context.x * gradient


def test_a_function_with_a_context():
    x = 0.5 + torch.rand(NUM_DRAWS, 3, dtype=torch.float64)

    def function(row):
        root, log = Scaled.apply(row, 2.0)
        return (root * log).sum()

    assert_same(function, x)


def test_a_function_whose_context_hides_tensors_is_refused():
    """Its gradient would be wrong, and values alone would not show it."""
    with pytest.raises(RuntimeError, match="Hidden keeps tensors in its context"):
        under_vmap(lambda x: Hidden.apply(x), torch.ones(3))

"""A batch of draws means what single draws mean, whatever the model is made of."""

import random
import warnings
from dataclasses import dataclass

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.transforms import OrderedTransform
from pyro.infer.autoguide import init_to_value
from pyro.infer.reparam import LocScaleReparam
from torch.distributions import biject_to

from pyroflows import ModelError
from pyroflows.models import batching, repeats
from pyroflows.models.batching import BatchedModel
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe

MAX_Z = 4.5


@dataclass(frozen=True)
class Case:
    """A model, the way it is to be run, and the other ways that are right for it, should they be forced."""

    model: object
    mode: str
    also: tuple[str, ...] = ("loop",)


# Models written to broadcast


def hierarchical():
    """Nested plates, constrained sites, sites on the left of other plates only."""
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("groups", 3, dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, scale))
        with pyro.plate("rows", 4, dim=-1):
            shift = pyro.sample("shift", dist.LogNormal(mean, 0.5))
            pyro.sample("y", dist.Normal(shift, 1.0), obs=torch.arange(12.0).reshape(3, 4) / 6)


def regression():
    x = torch.linspace(-1, 1, 15).reshape(5, 3)
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("N", 5):
        pyro.sample("y", dist.Normal((b * x).sum(-1), 0.5), obs=x.sum(-1))


def undeclared_dimension():
    """A batch dimension without a plate."""
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([0.5, 1.0, -1.0]))


def factors():
    x = pyro.sample("x", dist.Gamma(2.0, 1.0))
    pyro.factor("penalty", -3.0 * x**2)
    with pyro.plate("N", 4):
        pyro.factor("penalties", torch.arange(4.0) * x)


def masks():
    """By a handler, by a distribution, and one prior left out."""
    mask = torch.tensor([True, False, True, False])
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(x, 2.0).mask(False))
    with pyro.plate("N", 4), poutine.mask(mask=mask):
        pyro.sample("y", dist.Normal(x * w, 1.0), obs=torch.arange(4.0))
    with pyro.plate("M", 4):
        pyro.sample("v", dist.Normal(w, 1.0).mask(~mask), obs=torch.arange(4.0))


def scales():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.3):
        w = pyro.sample("w", dist.Exponential(1.0))
        with pyro.plate("N", 3), poutine.scale(scale=2.0):
            pyro.sample("y", dist.Normal(x, w), obs=torch.arange(3.0))


def ordered():
    cut = pyro.sample(
        "cut", dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1).to_event(1), [OrderedTransform()])
    )
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("N", 5):
        pyro.sample("y", dist.OrderedLogistic(x, cut), obs=torch.tensor([0, 1, 2, 3, 1]))


def multinomial():
    p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
    pyro.sample("y", dist.Multinomial(10, p), obs=torch.tensor([1.0, 2.0, 3.0, 4.0]))


def correlation():
    """A matrix-valued site, and one whose unconstrained shape is another."""
    chol = pyro.sample("chol", dist.LKJCholesky(3, 2.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0).expand([3]).to_event(1))
    with pyro.plate("N", 6):
        y = torch.linspace(-1, 1, 18).reshape(6, 3)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale[..., None] * chol), obs=y)


def matrix():
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    with pyro.plate("N", 4):
        mean = (w @ x[..., None]).squeeze(-1)
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.ones(4, 2))


def mixture():
    means = pyro.sample("means", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("N", 5):
        mixed = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, 1.0))
        pyro.sample("y", mixed, obs=torch.linspace(-2, 2, 5))


def deterministic_sites():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    double = pyro.deterministic("double", 2 * x)
    with pyro.plate("N", 3):
        mean = pyro.deterministic("mean", double + torch.arange(3.0))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(3))


def flat():
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.positive, (), ()))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


@poutine.reparam(config={"theta": LocScaleReparam(0.0)})
def reparametrised():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("N", 4):
        theta = pyro.sample("theta", dist.Normal(mean, 2.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.arange(4.0))


def in_double():
    x = pyro.sample("x", dist.Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double()))
    with pyro.plate("N", 4):
        pyro.sample("y", dist.Bernoulli(x), obs=torch.tensor([1.0, 0.0, 0.0, 1.0]).double())


def gaussian_hmm():
    """For one draw or many: parameters broadcast."""
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.3))
    eye = torch.eye(2)
    covariance = noise[..., None, None] * eye
    initial = dist.MultivariateNormal(torch.zeros(2), eye)
    transition = dist.MultivariateNormal(torch.zeros(2), covariance).expand(noise.shape)
    observation = dist.MultivariateNormal(torch.zeros(1), torch.eye(1))
    hmm = dist.GaussianHMM(initial, eye, _over_time(transition), torch.ones(2, 1), observation, duration=5)
    pyro.sample("y", hmm, obs=torch.linspace(-1, 1, 5)[:, None])


def _over_time(distribution):
    return dist.MultivariateNormal(distribution.loc[..., None, :], distribution.covariance_matrix[..., None, :, :])


# Models written for one draw


def one_draw():
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x[0] + x[1], 1.0), obs=torch.tensor(1.0))


def one_draw_of_as_many_as_examples():
    """The first dimension of a batch has the size of the site."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([batching.NUM_EXAMPLES]).to_event(1))
    with pyro.plate("N", batching.NUM_EXAMPLES):
        pyro.sample("y", dist.Normal(x.flip(0), 1.0), obs=torch.ones(batching.NUM_EXAMPLES))


def one_draw_regression():
    """Matrix times vector means matrix times matrix for a batch."""
    x = torch.linspace(-1, 1, 15).reshape(5, 3)
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("N", 5):
        pyro.sample("y", dist.Normal(x @ b, 0.5), obs=x.sum(-1))


def no_plate():
    """Data without a plate."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.linspace(-1, 1, batching.NUM_EXAMPLES))


def one_draw_sum():
    """A sum over everything, draws included."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.factor("penalty", -x.square().sum())


def one_draw_gathered():
    effects = pyro.sample("effects", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("N", 4):
        pyro.sample("y", dist.Normal(effects[torch.tensor([0, 2, 1, 0])], 1.0), obs=torch.arange(4.0))


def one_draw_sequential():
    """A Python loop over time, and a sequential plate over data."""
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    state = torch.tensor(0.0)
    for t in range(3):
        state = pyro.sample(f"state_{t}", dist.Normal(phi[0] * state + phi[1], 1.0))
    for t in pyro.plate("T", 3):
        pyro.sample(f"y_{t}", dist.Normal(phi[0], 1.0), obs=torch.tensor(0.1 * t))


def one_draw_covariance():
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), torch.diag(scale) + torch.eye(3)), obs=torch.ones(3))


def one_draw_discrete_hmm():
    logits = pyro.sample("logits", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
    transition = torch.stack([logits[0], logits[1]]).log_softmax(-1)
    hmm = dist.DiscreteHMM(torch.zeros(2), transition, dist.Normal(torch.tensor([-1.0, 1.0]), 1.0), duration=4)
    pyro.sample("y", hmm, obs=torch.linspace(-1, 1, 4))


def one_draw_gaussian_hmm():
    noise = pyro.sample("noise", dist.LogNormal(0.0, 0.3).expand([2]).to_event(1))
    eye = torch.eye(2)
    initial = dist.MultivariateNormal(torch.zeros(2), eye)
    transition = dist.MultivariateNormal(torch.zeros(2), torch.diag(noise))
    observation = dist.MultivariateNormal(torch.zeros(1), torch.eye(1))
    hmm = dist.GaussianHMM(initial, eye, transition, torch.ones(2, 1), observation, duration=5)
    pyro.sample("y", hmm, obs=torch.linspace(-1, 1, 5)[:, None])


def one_draw_ordered():
    gaps = pyro.sample("gaps", dist.Exponential(1.0).expand([3]).to_event(1))
    with pyro.plate("N", 4):
        fn = dist.OrderedLogistic(gaps[0] * torch.arange(4.0), torch.stack([gaps[1], gaps[1] + gaps[2]]))
        pyro.sample("y", fn, obs=torch.tensor([0, 1, 2, 1]))


def one_draw_multinomial():
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    logits = torch.stack([x[0], x[1], x[2]])
    pyro.sample("y", dist.Multinomial(10, logits=logits), obs=torch.tensor([3.0, 3.0, 4.0]))


# Models for which only a loop is right


def item():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0 + abs(x.item())), obs=torch.tensor(1.0))


def branch():
    """A branch that leaves the sites as they are."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    scale = 1.0 if x > 0 else 2.0
    pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(1.0))


def in_place():
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    mean = torch.zeros(3)
    mean[0] = x[0]
    mean[1:] += x[1]
    with pyro.plate("N", 3):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.arange(3.0))


AGES = torch.tensor([1.0, torch.nan, 0.5, torch.nan, -1.0])


def filled():
    """Missing entries of data, filled with latents by a mask that is the same for all draws."""
    u = pyro.sample("u", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    full = AGES.clone()
    full[AGES.isnan()] = u
    with pyro.plate("N", 5):
        pyro.sample("y", dist.Normal(full, 1.0), obs=torch.zeros(5))


def series():
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    states = torch.empty(6, dtype=x.dtype)
    states[0] = x[0]
    for t in range(1, 6):
        states[t] = x[1] * states[t - 1].clone() + 0.1 * t
    with pyro.plate("N", 6):
        pyro.sample("y", dist.Normal(states, 1.0), obs=torch.zeros(6))


def made_in_many_ways():
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    total = torch.zeros(())
    for i in range(3):
        total += x[i].square()
    signs = torch.ones(3, dtype=torch.long)
    signs[x > 0.1] = 2
    matrix = torch.eye(3)
    matrix[torch.arange(2), torch.arange(1, 3)] = x[:2]
    matrix.diagonal().mul_(x.exp())
    row = AGES.new_full((4,), 0.5)
    row[1:].copy_(x)
    row.index_add_(0, torch.tensor([3]), total[None])
    like = torch.zeros_like(AGES)
    like.scatter_(0, torch.tensor([1, 3]), x[:2])
    is_low = torch.zeros(3, dtype=torch.bool)
    is_low |= x < 0
    mean = torch.cat([matrix.sum(-1) * signs, row, like, torch.where(is_low, x, 0.5)])
    with pyro.plate("N", len(mean)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(len(mean)))


def cut_off():
    """By a mask that differs between draws."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    mean = x[0] + x[1] * torch.linspace(-1, 1, 5)
    mean[mean < 0] = 0.0
    pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=torch.ones(5))


def undefined_on_the_other_path():
    """The gradient of the logarithm at zero times zero is NaN."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    mean = (x.relu().sqrt() + x.relu().log()).clamp(min=-10.0) if x > 0 else x
    pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(1.0))


def several_branches():
    """A chain, a nested branch, Python's max, and a condition that a loop asks for again and again."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    if x[0] > 0.5:
        mean = x[0]
    elif x[0] > -0.5 and x[1] > 0:
        mean = 2 * x[1]
    else:
        mean = -x.sum()
    means = [mean + (x[1] if x[0] > 0.5 else t) for t in range(10)]
    pyro.sample("y", dist.Normal(torch.stack(means), 1.0).to_event(1), obs=torch.zeros(10))
    pyro.factor("largest", max(x[0], x[1] - 0.2))


ALL = ("vmap", "loop")
CASES = {
    "hierarchical": Case(hierarchical, "plate", ALL),
    "regression": Case(regression, "plate", ALL),
    "undeclared dimension": Case(undeclared_dimension, "plate", ALL),
    "factors": Case(factors, "plate", ALL),
    "masks": Case(masks, "plate", ALL),
    "scales": Case(scales, "plate", ALL),
    "ordered logistic": Case(ordered, "plate", ALL),
    "multinomial": Case(multinomial, "plate", ALL),
    "correlation": Case(correlation, "plate", ALL),
    "matrix": Case(matrix, "plate", ALL),
    "mixture": Case(mixture, "plate", ALL),
    "deterministic sites": Case(deterministic_sites, "plate", ALL),
    "flat": Case(flat, "plate", ALL),
    "reparametrised": Case(reparametrised, "plate", ALL),
    "float64": Case(in_double, "plate", ALL),
    "gaussian hmm": Case(gaussian_hmm, "plate", ALL),
    "one draw": Case(one_draw, "vmap"),
    "one draw, as many": Case(one_draw_of_as_many_as_examples, "vmap"),
    "one draw, regression": Case(one_draw_regression, "vmap"),
    "no plate": Case(no_plate, "plate", ("vmap", "loop")),
    "one draw, sum": Case(one_draw_sum, "vmap"),
    "one draw, gathered": Case(one_draw_gathered, "vmap"),
    "one draw, sequential": Case(one_draw_sequential, "vmap"),
    "one draw, covariance": Case(one_draw_covariance, "vmap"),
    "item": Case(item, "loop"),
    "branch": Case(branch, "paths"),
    "in place": Case(in_place, "paths"),
    "filled": Case(filled, "paths"),
    "series": Case(series, "paths"),
    "made in many ways": Case(made_in_many_ways, "paths"),
    "cut off": Case(cut_off, "paths"),
    "undefined on the other path": Case(undefined_on_the_other_path, "paths"),
    "several branches": Case(several_branches, "paths"),
    "one draw, discrete hmm": Case(one_draw_discrete_hmm, "vmap"),
    "one draw, gaussian hmm": Case(one_draw_gaussian_hmm, "vmap"),
    "one draw, ordered logistic": Case(one_draw_ordered, "vmap"),
    "one draw, multinomial": Case(one_draw_multinomial, "vmap"),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FORCED = [(case, mode) for case in CASES.values() for mode in (case.mode, *case.also)]
FORCED_IDS = [f"{name}-{mode}" for name, case in CASES.items() for mode in (case.mode, *case.also)]


def around(center):
    """Vectors near one point, at which the ways of running are compared."""
    return center + 0.1 * torch.randn((5, len(center)), dtype=center.dtype)


def log_joint_of(model, center=None, args=()):
    layout = Layout(describe(model, args, {}))
    center = torch.zeros(layout.dim, dtype=layout.dtype) if center is None else center
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model runs draw by draw")
        return LogJoint(model, args, {}, layout, around(center))


def vectors_for(log_joint, num_draws=7):
    """As many as no example and no plate."""
    return 0.7 * torch.randn(num_draws, log_joint.layout.dim, dtype=log_joint.layout.dtype)


def single_log_joint(model, vector, rows=None, args=()):
    """One draw by Pyro's own handlers: the reference."""
    rows = rows or {}
    # Values do not matter here, and a flat prior cannot be drawn from.
    initial, _ = Layout(describe(model, args, {})).constrain(torch.zeros_like(vector))
    conditioned = poutine.condition(model, data=rows)
    shown = poutine.trace(poutine.condition(conditioned, data=initial)).get_trace(*args)
    values, start, log_det = {}, 0, 0.0
    for name in initial:
        fn, value = shown.nodes[name]["fn"], shown.nodes[name]["value"]
        transform = biject_to(fn.support)
        shape = transform.inv(value).shape
        part = vector[start : start + shape.numel()].reshape(shape)
        start += shape.numel()
        values[name] = transform(part)
        log_det = log_det + transform.log_abs_det_jacobian(part, values[name]).sum()
    trace = poutine.trace(poutine.condition(conditioned, data=values)).get_trace(*args)
    return trace.log_prob_sum() + log_det


def tolerance(tensor):
    return {"rel": 1e-10, "abs": 1e-10} if tensor.dtype == torch.float64 else {"rel": 2e-5, "abs": 2e-5}


def same(tensor, expected):
    return tensor.flatten().tolist() == pytest.approx(expected.flatten().tolist(), **tolerance(expected))


# The way that is taken


@CASE
def test_mode(case):
    layout = Layout(describe(case.model, (), {}))
    center = torch.zeros(layout.dim, dtype=layout.dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "There is a performance drop")  # of torch, about vmap
        log_joint = LogJoint(case.model, (), {}, layout, around(center))
    assert log_joint.batched.mode == case.mode
    assert [w.category for w in caught] == ([UserWarning] if case.mode == "loop" else [])


def test_the_warning_of_the_loop_says_why():
    layout = Layout(describe(item, (), {}))
    with pytest.warns(UserWarning, match=r"draw by draw.*slow.*vmap.*test_batching.py:\d+, .*\[.+\].*outer plate.*\["):
        LogJoint(item, (), {}, layout, around(torch.zeros(1)))


def test_the_mode_does_not_depend_on_validation():
    with pyro.validation_enabled(False):
        assert log_joint_of(one_draw).batched.mode == "vmap"
        assert log_joint_of(regression).batched.mode == "plate"


@pytest.mark.parametrize("enabled", [True, False])
def test_validation_is_left_as_it_was(enabled):
    with pyro.validation_enabled(enabled):
        log_joint = log_joint_of(one_draw)
        log_joint(torch.zeros(3, 2))
        assert dist.is_validation_enabled() == enabled
        assert torch.distributions.Distribution._validate_args == enabled


# The log joint


@pytest.mark.parametrize(("case", "mode"), FORCED, ids=FORCED_IDS)
def test_log_joint_is_that_of_single_draws(case, mode):
    log_joint = log_joint_of(case.model)
    log_joint.batched.mode = mode
    vectors = vectors_for(log_joint)
    expected = torch.stack([single_log_joint(case.model, vector) for vector in vectors])
    assert expected.std() > 0.01
    result = log_joint(vectors)
    assert result.shape == (7,)
    assert same(result, expected)


@CASE
def test_gradient_is_that_of_single_draws(case):
    log_joint = log_joint_of(case.model)
    vectors = vectors_for(log_joint).requires_grad_()
    (result,) = torch.autograd.grad(log_joint(vectors).sum(), vectors)
    expected = [torch.autograd.grad(single_log_joint(case.model, v), v) for v in vectors.detach().requires_grad_()]
    assert same(result, torch.stack([gradient for (gradient,) in expected]))


@CASE
@pytest.mark.parametrize("num_draws", [1, 2, batching.NUM_EXAMPLES])
def test_any_number_of_draws(case, num_draws):
    log_joint = log_joint_of(case.model)
    vectors = vectors_for(log_joint)
    assert same(log_joint(vectors[:num_draws]), log_joint(vectors)[:num_draws])


@CASE
def test_chunks(case, monkeypatch):
    log_joint = log_joint_of(case.model)
    vectors = vectors_for(log_joint, 11)
    expected = log_joint(vectors)
    numbers = max(value.numel() for value in log_joint.batched.reference.values.values())
    monkeypatch.setattr(batching, "MAX_NUMBERS", 3 * numbers)
    assert log_joint.batched.chunk_size == 3
    result = log_joint.in_chunks(vectors.requires_grad_())
    assert not result.requires_grad
    assert same(result, expected)


def test_chunks_of_many_small_sites_hold_many_draws(monkeypatch):
    def model():
        for i in range(20):
            pyro.sample(f"x_{i}", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    batched = log_joint_of(model).batched
    monkeypatch.setattr(batching, "MAX_NUMBERS", 300)
    assert batched.chunk_size == 100
    monkeypatch.setattr(batching, "MAX_NUMBERS_OF_ALL", 600)
    assert batched.chunk_size == 10


def test_chunks_hold_at_least_one_draw(monkeypatch):
    monkeypatch.setattr(batching, "MAX_NUMBERS", 1)
    log_joint = log_joint_of(hierarchical)
    assert log_joint.batched.chunk_size == 1
    vectors = vectors_for(log_joint)
    assert same(log_joint.in_chunks(vectors), log_joint(vectors))


def test_chunks_of_records(monkeypatch):
    batched = log_joint_of(deterministic_sites).batched
    x = torch.randn(11)
    whole = batched({"x": x}, 11)
    monkeypatch.setattr(batching, "MAX_NUMBERS", 30)
    parts = batched.in_chunks({"x": x}, 11)
    assert 1 < batched.chunk_size < 11
    for whole_values, part_values in ((whole.values, parts.values), (whole.log_probs, parts.log_probs)):
        assert whole_values.keys() == part_values.keys()
        assert all(torch.equal(whole_values[name], part_values[name]) for name in whole_values)


def test_a_branch_over_all_draws_is_no_broadcasting():
    """It looks at the batch as a whole, and is right wherever all draws are on one side."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0 if (x > 0).all() else 3.0), obs=torch.tensor(1.0))

    log_joint = log_joint_of(model)
    vectors = torch.tensor([[-1.0], [1.0]])
    assert same(log_joint(vectors), torch.stack([single_log_joint(model, vector) for vector in vectors]))


def reads_through_numpy():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    scale = 1.0 if (x.detach().numpy() > -1.0).all() else 5.0
    pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(-1.0))


def catches_a_failed_factor():
    r = pyro.sample("x", dist.Normal(0.0, 1.0))
    matrix = torch.eye(2) + r * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    try:
        factor = torch.linalg.cholesky(matrix)
    except RuntimeError:
        factor = torch.linalg.cholesky(matrix + (r.abs() + 0.1) * torch.eye(2))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("model", [reads_through_numpy, catches_a_failed_factor])
def test_far_examples_show_a_branch_that_one_draw_takes_for_all(model):
    """Near examples all want the same branch, and do not show it."""
    near, far = torch.linspace(-0.1, 0.1, batching.NUM_EXAMPLES), torch.tensor([3.0, -3.0])
    x = torch.cat([near, far])
    with pytest.warns(UserWarning, match="draw by draw"):
        batched = BatchedModel(model, (), {}, {"x": x})
    log_probs = batched({"x": x}, len(x)).log_probs["y"]
    expected = [poutine.trace(poutine.condition(model, {"x": value})).get_trace() for value in x]
    for log_prob, trace in zip(log_probs, expected, strict=True):
        trace.compute_log_prob()
        assert torch.isclose(log_prob, trace.nodes["y"]["log_prob"])


def test_far_examples_without_a_density_tell_nothing():
    """A matrix may be singular there, or the model may raise."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        factor = torch.linalg.cholesky((1 - x**2)[..., None, None] * torch.eye(2))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=torch.ones(2))

    x = torch.cat([torch.linspace(-0.1, 0.1, batching.NUM_EXAMPLES), torch.tensor([3.0, -3.0, 0.9])])
    assert BatchedModel(model, (), {}, {"x": x}).mode == "plate"


# What is recorded


def test_record():
    record = log_joint_of(deterministic_sites).batched({"x": torch.tensor([1.0, -1.0])}, 2)
    assert record.values["x"].tolist() == [1.0, -1.0]
    assert record.values["double"].tolist() == [2.0, -2.0]
    assert record.values["mean"].tolist() == [[2.0, 3.0, 4.0], [-2.0, -1.0, 0.0]]
    assert record.values["y"].tolist() == [[0.0] * 3] * 2
    assert record.log_probs.keys() == {"x", "y"}
    assert same(record.log_probs["x"], dist.Normal(0.0, 1.0).log_prob(torch.tensor([1.0, -1.0])))
    assert same(record.log_probs["y"], dist.Normal(record.values["mean"], 1.0).log_prob(torch.zeros(2, 3)))


def test_record_has_factors_among_log_probs_only():
    record = log_joint_of(factors).batched({"x": torch.tensor([1.0, 2.0])}, 2)
    assert record.values.keys() == {"x"}
    assert record.log_probs["penalty"].tolist() == [-3.0, -12.0]
    assert record.log_probs["penalties"].tolist() == [[0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 4.0, 6.0]]


def test_masked_and_scaled_log_probs():
    masked = log_joint_of(masks).batched({"x": torch.ones(2), "w": torch.ones(2)}, 2).log_probs
    assert masked["w"].abs().sum() == 0
    assert (masked["y"][:, [1, 3]] == 0).all()
    assert (masked["y"][:, [0, 2]] < 0).all()
    assert (masked["v"][:, [0, 2]] == 0).all()
    scaled = log_joint_of(scales).batched({"x": torch.zeros(2), "w": torch.ones(2)}, 2).log_probs
    assert scaled["w"].tolist() == pytest.approx([-0.3, -0.3])
    assert same(scaled["y"][0], 0.6 * dist.Normal(0.0, 1.0).log_prob(torch.arange(3.0)))


# Partially observed sites


# Subsampling


DATA = torch.linspace(-2, 2, 12)


def subsampled(rows=None):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("N", 12, subsample_size=None if rows is not None else 4, subsample=rows) as index:
        pyro.sample("y", dist.Normal(x, 1.0), obs=DATA[index])


def subsampled_one_draw():
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("N", 12, subsample_size=4) as index:
        pyro.sample("y", dist.Normal(x[0] - x[1], 1.0), obs=DATA[index])


@pytest.mark.parametrize(("model", "mode"), [(subsampled, "plate"), (subsampled_one_draw, "vmap")])
def test_subsampling_with_given_rows(model, mode):
    """All draws see the same rows, and the log-likelihood is scaled up."""
    log_joint = log_joint_of(model)
    assert log_joint.batched.mode == mode
    rows = {"N": torch.tensor([7, 0, 3, 11])}
    vectors = vectors_for(log_joint)
    expected = torch.stack([single_log_joint(model, vector, rows) for vector in vectors])
    assert same(log_joint(vectors, rows), expected)


@pytest.mark.parametrize("model", [subsampled, subsampled_one_draw])
def test_subsampling_without_rows(model):
    """Random rows: its mean over rows is the log joint of all."""
    log_joint = log_joint_of(model)
    vectors = torch.full((1, log_joint.layout.dim), 0.7)
    draws = torch.stack([log_joint(vectors)[0] for _ in range(600)])
    values, _ = log_joint.layout.constrain(vectors[0])
    mean = values["x"] if model is subsampled else values["x"][0] - values["x"][1]
    prior = dist.Normal(0.0, 1.0).log_prob(values["x"]).sum()
    expected = prior + dist.Normal(mean, 1.0).log_prob(DATA).sum()
    assert draws.std() > 0.1
    assert abs(draws.mean() - expected) < MAX_Z * draws.std() / 600**0.5


def test_draw_subsample():
    log_joint = log_joint_of(subsampled)
    rows = [log_joint.draw_subsample()["N"] for _ in range(50)]
    assert all(len(set(r.tolist())) == 4 for r in rows)
    assert set(torch.cat(rows).tolist()) == set(range(12))
    assert log_joint_of(regression).draw_subsample() == {}


def test_rows_that_the_model_gives_itself_stay():
    """``subsample=`` in the model is the user's choice of rows, also where the fit draws rows of its own."""
    rows = torch.tensor([1, 2, 5])
    log_joint = log_joint_of(subsampled, args=(rows,))
    vectors = vectors_for(log_joint)
    expected = torch.stack([single_log_joint(subsampled, vector, args=(rows,)) for vector in vectors])
    assert same(log_joint(vectors), expected)
    assert same(log_joint(vectors, log_joint.draw_subsample()), expected)


# Models whose sites change


def test_unknown_site_raises():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ModelError, match=r"dynamic structure.*'z'"):
        BatchedModel(model, (), {}, {"x": torch.zeros(5)})


def test_site_that_appears_later_raises():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 3:
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.warns(UserWarning, match="draw by draw"):
        batched = BatchedModel(model, (), {}, {"x": torch.zeros(5)})
    assert batched.mode == "loop"
    with pytest.raises(ModelError, match=r"dynamic structure.*'z'"):
        batched({"x": torch.tensor([0.0, 4.0])}, 2)


@pytest.mark.parametrize("first", [0.0, 4.0])
def test_site_that_vanishes_later_raises(first):
    """Whichever draw comes first: its sites must not stand for those of all."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x < 3:
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.warns(UserWarning, match="draw by draw"):
        batched = BatchedModel(model, (), {}, {"x": torch.zeros(5), "z": torch.zeros(5)})
    with pytest.raises(ModelError, match=r"dynamic structure.*'z'"):
        batched({"x": torch.tensor([first, 4.0 - first]), "z": torch.zeros(2)}, 2)


def test_a_factor_in_one_branch_counts_zero_in_the_other(monkeypatch):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 2:
            pyro.factor("reward", 3.0 * x)

    with pytest.warns(UserWarning, match="draw by draw"):
        batched = BatchedModel(model, (), {}, {"x": torch.zeros(5)})
    for first in (0.0, 4.0):
        log_probs = batched({"x": torch.tensor([first, 4.0 - first])}, 2).log_probs
        assert log_probs["reward"].tolist() == [3 * first, 3 * (4 - first)]
    monkeypatch.setattr(batching, "MAX_NUMBERS", 2)  # two draws a chunk
    log_probs = batched.in_chunks({"x": torch.tensor([0.0, 1.0, 4.0, 1.0, 5.0])}, 5).log_probs
    assert log_probs["reward"].tolist() == [0.0, 0.0, 12.0, 0.0, 15.0]


@pytest.mark.parametrize("first", [0.0, 4.0])
def test_data_in_one_branch_are_refused(first):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 2:
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    with pytest.warns(UserWarning, match="draw by draw"):
        batched = BatchedModel(model, (), {}, {"x": torch.zeros(5)})
    with pytest.raises(ModelError, match=r"dynamic structure.*'y'"):
        batched({"x": torch.tensor([first, 4.0 - first])}, 2)


@pytest.mark.parametrize("first", [0.0, 4.0])
def test_data_that_a_branch_masks(first):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=bool(x > 2.0)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    x = torch.tensor([first, 4.0 - first])
    batched = BatchedModel(model, (), {}, {"x": torch.linspace(first - 0.1, first + 0.1, 5)})
    log_probs = batched({"x": x}, 2).log_probs
    assert same(log_probs["y"], torch.where(x > 2, dist.Normal(x, 1.0).log_prob(torch.tensor(1.0)), 0.0))


# Drawing


def priors():
    """Most of these samplers fail under vmap as Pyro and torch write them."""
    pyro.sample("beta", dist.Beta(2.0, 3.0))
    pyro.sample("dirichlet", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("student", dist.StudentT(5.0, 1.0, 2.0))
    pyro.sample("exponential", dist.Exponential(2.0))
    pyro.sample("gamma", dist.Gamma(3.0, 2.0))
    pyro.sample("normal", dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])))
    pyro.sample("lkj", dist.LKJCholesky(2, 1.0))
    with pyro.plate("N", 3):
        pyro.sample("poisson", dist.Poisson(torch.tensor([1.0, 2.0, 3.0])))


def priors_one_draw():
    """The same, then something that an outer plate gets wrong."""
    priors()
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(x[0], 1.0), obs=torch.tensor(0.0))


def assert_moments(draws, mean, variance):
    """Mean and variance of independent draws, by their standard errors."""
    count = len(draws)
    mean, variance = torch.as_tensor(mean), torch.as_tensor(variance)
    assert ((draws.mean(0) - mean).abs() < MAX_Z * (variance / count).sqrt()).all()
    squares = (draws - mean).square()
    assert ((squares.mean(0) - variance).abs() < MAX_Z * squares.std(0) / count**0.5).all()


@pytest.mark.parametrize(("model", "mode"), [(priors, "plate"), (priors_one_draw, "vmap")], ids=["plate", "vmap"])
def test_prior_draws(model, mode):
    count = 20_000
    batched = BatchedModel(model, (), {}, {}, draw=True)
    assert batched.mode == mode
    draws = batched.in_chunks({}, count).values
    assert_moments(draws["beta"], 0.4, 0.04)
    assert_moments(draws["dirichlet"], [1 / 6, 2 / 6, 3 / 6], [5 / 252, 8 / 252, 9 / 252])
    assert_moments(draws["student"], 1.0, 4 * 5 / 3)
    assert_moments(draws["exponential"], 0.5, 0.25)
    assert_moments(draws["gamma"], 1.5, 0.75)
    assert_moments(draws["normal"], [1.0, 1.0], [2.0, 1.0])
    assert_moments((draws["normal"] - 1).prod(-1), 0.5, 2.0 * 1.0 + 0.5**2)
    # With concentration 1 a correlation is uniform on [-1, 1].
    assert draws["lkj"].shape == (count, 2, 2)
    assert_moments(draws["lkj"][:, 1, 0], 0.0, 1 / 3)
    assert_moments(draws["poisson"], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert draws["poisson"].shape == (count, 3)
    # Sites and rows are independent of each other.
    assert abs(torch.corrcoef(draws["poisson"].T)[0, 1]) < MAX_Z / count**0.5


def test_draws_under_vmap():
    """Of what vmap can draw."""

    def model():
        x = pyro.sample("x", dist.Uniform(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Poisson(x[0] + x[1]), obs=torch.tensor(9.0))

    batched = BatchedModel(model, (), {}, {}, draw=True)
    assert batched.mode == "vmap"
    draws = batched.in_chunks({}, 20_000).values
    assert_moments(draws["x"], [0.5, 0.5], [1 / 12, 1 / 12])
    # The observed site is drawn as well, from its x.
    assert_moments((draws["y"] - draws["x"].sum(-1)) / draws["x"].sum(-1).sqrt(), 0.0, 1.0)


class Undensity(dist.TorchDistribution):
    """A law of vectors that can be drawn from and has no density."""

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        return self.loc + torch.randn((*sample_shape, *self.loc.shape))


def test_a_site_without_a_density_is_never_drawn_under_a_plate():
    """Under a plate the mean would be that of all draws, and no log-density would show it."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 5.0).to_event(1))
        pyro.sample("y", Undensity(x - x.mean()))

    batched = BatchedModel(model, (), {}, {}, draw=True)
    assert batched.mode == "vmap"
    draws = batched({}, 2000)
    assert sorted(draws.log_probs) == ["x"]
    assert_moments(draws.values["y"] - draws.values["x"] + draws.values["x"].mean(-1, keepdim=True), 0.0, 1.0)


def test_a_site_without_a_density_must_be_drawn():
    with pytest.raises(NotImplementedError):
        BatchedModel(lambda: pyro.sample("y", Undensity(torch.zeros(2))), (), {}, {"y": torch.zeros(1, 2)})


def broadcasting_predictive():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("N", 3):
        pyro.sample("y", dist.Normal(x + torch.arange(3.0), 0.5), obs=torch.full((3,), 100.0))
        pyro.deterministic("twice", 2 * x + torch.zeros(3))


def one_draw_predictive():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    mean = torch.stack([x, x + 1, x + 2])
    with pyro.plate("N", 3):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=torch.full((3,), 100.0))
        pyro.deterministic("twice", 2 * x + torch.zeros(3))


@pytest.mark.filterwarnings("ignore:the model runs draw by draw")
@pytest.mark.parametrize(("model", "count"), [(broadcasting_predictive, 8000), (one_draw_predictive, 2000)])
def test_observed_sites_are_drawn_given_latents(model, count):
    latents = {"x": torch.randn(count)}
    values = BatchedModel(model, (), {}, latents, draw=True).in_chunks(latents, count).values
    assert torch.equal(values["x"], latents["x"])
    residuals = values["y"] - latents["x"][:, None] - torch.arange(3.0)
    assert_moments(residuals, torch.zeros(3), torch.full((3,), 0.25))
    assert (torch.corrcoef(residuals.T) - torch.eye(3)).abs().max() < MAX_Z / count**0.5
    assert torch.equal(values["twice"], 2 * latents["x"][:, None].expand(count, 3))


def test_draws_differ_in_every_mode():
    """Under vmap or a plate one random number for all draws would be silently wrong."""

    def model():
        pyro.sample("x", dist.Uniform(0.0, 1.0))

    batched = BatchedModel(model, (), {}, {}, draw=True)
    for mode in ("plate", "vmap", "loop"):
        batched.mode = mode
        assert len(set(batched({}, 50).values["x"].tolist())) == 50


def test_a_model_with_initial_values_elsewhere():
    """The ways of running are compared where the model is defined."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(x - 1, x + 1), obs=torch.tensor(50.0))

    layout = Layout(describe(model, (), {}, init_to_value(values={"x": torch.tensor(50.0)})))
    log_joint = LogJoint(model, (), {}, layout, around(torch.tensor([50.0])))
    assert log_joint.batched.mode == "plate"
    assert torch.isfinite(log_joint(torch.tensor([[50.5]]))).all()


def test_one_model_scores_and_draws():
    """The way of drawing is found once for each set of given sites, and is that of a model made for drawing."""
    batched = BatchedModel(broadcasting_predictive, (), {}, {"x": torch.zeros(5)})
    latents = {"x": torch.randn(8000)}
    drawing = batched.drawing(latents)
    assert batched.drawing({"x": torch.ones(3)}) is drawing
    residuals = drawing.in_chunks(latents, 8000).values["y"] - latents["x"][:, None] - torch.arange(3.0)
    assert_moments(residuals, torch.zeros(3), torch.full((3,), 0.25))
    prior = batched.drawing({})
    assert prior is not drawing
    assert_moments(prior.in_chunks({}, 8000).values["x"], 0.0, 1.0)


def test_reference_is_the_run_at_the_first_example():
    batched = BatchedModel(broadcasting_predictive, (), {}, {"x": torch.tensor([0.5, 1.0, 2.0])})
    assert batched.reference.values["x"] == 0.5
    assert batched.reference.log_probs["x"].item() == pytest.approx(
        dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)).item()
    )


# Models that draw random numbers outside of pyro.sample


def chosen_rows(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(z, 1.0), obs=x[torch.randperm(len(x))[:3]])


def chosen_rows_by_python(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(z, 1.0), obs=x[random.sample(range(len(x)), 3)])


def chosen_rows_of_a_plate(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), subsample=torch.randperm(len(x))[:3]) as rows:
        pyro.sample("y", dist.Normal(z, 1.0), obs=x[rows])


def noisy(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("y", -((x.sum() - z - torch.randn(())) ** 2))


def seldom(x):
    """Three of four runs are equal."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("y", z * (torch.rand(()) < 0.25))


def dropout(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(z + torch.nn.functional.dropout(x, 0.2), 1.0), obs=x)


RANDOM = [chosen_rows, chosen_rows_by_python, chosen_rows_of_a_plate, noisy, seldom, dropout]


@pytest.mark.parametrize("model", RANDOM, ids=lambda model: model.__name__)
@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_is_random_beyond_its_sites_is_refused(model, seed):
    torch.manual_seed(seed)
    random.seed(seed)
    with pytest.raises(
        ModelError, match=r"no fixed log joint.*'y'.*outside of pyro.sample.*subsample_size.*\.eval\(\)"
    ):
        BatchedModel(model, (torch.arange(1.0, 20.0),), {}, {"z": torch.randn(5)})


def test_a_random_model_can_be_drawn_from():
    """Predictions have no log joint."""
    BatchedModel(noisy, (torch.arange(1.0, 20.0),), {}, {"z": torch.zeros(5)}, draw=True)


@pytest.mark.parametrize("rows", [None, {"rows": torch.tensor([0, 2])}])
def test_subsampled_plates_are_not_random_beyond_their_sites(rows):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 50, subsample_size=2) as i:
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.arange(50.0)[i])

    # Without given rows every run has others, so that no batch agrees with single runs.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        BatchedModel(model, (), {}, {"z": torch.zeros(5)}, subsample=rows)


def test_the_check_leaves_the_generator_as_it_was(monkeypatch):
    """A model that draws numbers without effect runs often, but advances the generator as if it ran once."""
    num_runs = []

    def model():
        num_runs.append(1)
        pyro.sample("z", dist.Normal(0.0, 1.0))
        torch.randn(10)

    states = []
    for count in (10, 1):
        monkeypatch.setattr(repeats, "NUM_REPEATS", count)
        torch.manual_seed(0)
        BatchedModel(model, (), {}, {"z": torch.zeros(5)})
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert len(num_runs) == 2 * (1 + 1 + batching.NUM_EXAMPLES - 1) + 10 + 1


def test_a_model_that_draws_nothing_runs_no_more_than_before():
    num_runs = []

    def model():
        num_runs.append(1)
        pyro.sample("z", dist.Normal(0.0, 1.0))

    BatchedModel(model, (), {}, {"z": torch.zeros(5)})
    assert len(num_runs) == 1 + 1 + (batching.NUM_EXAMPLES - 1)

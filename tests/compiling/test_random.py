"""Draws inside of a function are other ones at each run of its program, of the same law."""

import pytest
import torch
from torch import distributions as dist
from torch.nn import functional as F

from pyroflows.compiling.check import Compiler
from pyroflows.compiling.program import compiled
from pyroflows.errors import UntraceableError

RATES = torch.tensor([0.2, 0.5, 0.7])


def gradient_of(function):
    """The function's value and the gradient of its sum, by the draws' own derivatives where they have any."""

    def with_gradient(x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = function(leaf)
            return [value.detach(), *torch.autograd.grad(value.sum(), leaf)]

    return with_gradient


def unused_draw_before(x):
    torch.randn(3)
    torch.empty(3).uniform_()
    return x * torch.randn(3)


FUNCTIONS = {
    "rand": lambda x: x**2 * torch.rand(3),
    "randn": lambda x: x**2 + x * torch.randn(5, 3),
    "randn_like": lambda x: (x * torch.randn_like(x)).exp(),
    "normal_": lambda x: x * torch.empty(3).normal_(),
    "bernoulli": lambda x: x**2 * torch.bernoulli(RATES),
    "bernoulli of the input": lambda x: x**2 * torch.bernoulli(torch.sigmoid(x)),
    "mask": lambda x: torch.where(torch.rand(3) < 0.5, x**2, x),
    "dropout": lambda x: F.dropout(x**2, 0.5, training=True),
    "randint": lambda x: x**2 * torch.randint(10, (3,)),
    "randperm": lambda x: x[torch.randperm(3)] * x,
    "Rademacher": lambda x: x**2 * (2.0 * torch.randint(2, (3,)) - 1.0),
    "Normal": lambda x: dist.Normal(x, x.exp()).rsample((4,)),
    "Gamma": lambda x: dist.Gamma(x.exp(), 1.0).rsample(),
    "Beta": lambda x: dist.Beta(x.exp(), 2.0).rsample(),
    "Dirichlet": lambda x: dist.Dirichlet(x.exp()).rsample() ** 2,
    "constant Dirichlet": lambda x: x**2 * dist.Dirichlet(RATES).sample() * dist.Dirichlet(RATES).sample(),
    "StudentT": lambda x: dist.StudentT(3.0 + x.exp()).rsample(),
    "Exponential": lambda x: dist.Exponential(x.exp()).rsample(),
    "Laplace": lambda x: dist.Laplace(x, 1.0).rsample(),
    "MultivariateNormal": lambda x: dist.MultivariateNormal(x, torch.eye(3)).rsample(),
    "Categorical": lambda x: x**2 * dist.Categorical(RATES).sample((3,)),
    "Poisson": lambda x: x**2 * dist.Poisson(5.0 * x.exp()).sample(),
    "Binomial": lambda x: x**2 * dist.Binomial(10, RATES).sample(),
    "unused draw before": unused_draw_before,
}


def assert_draws_are_the_functions_own(run, function):
    x = torch.tensor([0.3, -0.8, 1.2])
    for seed in range(2):
        torch.manual_seed(seed)
        expected = function(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(list(run(x)), list(expected), rtol=1e-5, atol=1e-6)
    assert len({run(x)[0].sum().item() for _ in range(20)}) > 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_draws_and_gradients_are_the_functions_own_at_a_seed(name):
    """Also the compiler's own check compares equal draws."""
    function = gradient_of(FUNCTIONS[name])
    run = Compiler("trace")(function, [torch.zeros(3)], [torch.tensor([0.5, -0.2, 1.0])])
    assert_draws_are_the_functions_own(run, function)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_inductor_draws_the_functions_own_at_a_seed():
    names = ["rand", "randn", "bernoulli", "mask", "dropout", "Gamma", "Dirichlet", "unused draw before"]

    def function(x):
        parts = [gradient_of(FUNCTIONS[name])(x) for name in names]
        return [part for pair in parts for part in pair]

    run = Compiler("inductor")(function, [torch.zeros(3)], [torch.tensor([0.5, -0.2, 1.0])])
    assert_draws_are_the_functions_own(run, function)


def test_draws_are_of_the_law():
    run = compiled(lambda x: [dist.Gamma(x, 2.0).sample()], [torch.full((20_000,), 3.0)])
    (draws,) = run(torch.full((20_000,), 4.0))
    assert draws.mean().item() == pytest.approx(2.0, abs=0.03)
    assert draws.var().item() == pytest.approx(1.0, abs=0.05)


def test_draws_of_other_runs_are_independent():
    run = compiled(lambda x: [x + torch.randn(20_000)], [torch.zeros(())])
    (first,), (second,) = run(torch.zeros(())), run(torch.zeros(()))
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.03


def test_a_draw_cannot_decide():
    with pytest.raises(UntraceableError, match="use torch.where"):
        compiled(lambda x: [x if torch.rand(()) < 0.5 else -x], [torch.ones(3)])


def test_recording_draws_nothing():
    """Neither the first, nor the one where the state has another value that decides."""
    sign = torch.tensor(1.0)

    def function(x):
        return [x + (torch.randn(3) if sign > 0 else -torch.randn(3))]

    torch.manual_seed(0)
    expected = torch.get_rng_state()
    run = compiled(function, [torch.ones(3)], state=[sign])
    assert torch.equal(torch.get_rng_state(), expected)
    for value in (1.0, -1.0):
        sign.fill_(value)
        torch.manual_seed(1)
        (found,) = run(torch.ones(3))
        torch.manual_seed(1)
        assert torch.equal(found, function(torch.ones(3))[0])

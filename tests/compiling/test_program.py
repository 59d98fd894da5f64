"""Recorded programs compute what the function computes, gradients included, or say why they cannot."""

import pytest
import torch
from torch import nn

from pyroflows.compiling.program import compiled
from pyroflows.errors import UntraceableError
from pyroflows.nets.products import product

TABLE = torch.linspace(0.0, 1.0, 12).reshape(4, 3)


def gradient_of_square(x):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad((leaf**2 * TABLE).sum(), leaf)


def writes_into_a_buffer(x):
    buffer = torch.zeros(4, 3)
    before = buffer.sum()
    buffer[:, 0] = x[:, 1]
    buffer.add_(TABLE)
    return [buffer, before + buffer.sum()]


def writes_into_a_constant_after_reading_it(x):
    constant, fresh = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    y, z = x + constant, x * fresh
    constant[1:].fill_(2.0)
    fresh += 1.0
    return [y, z, x * constant, x - fresh, constant]


def chunks_and_stacks(x):
    a, b, c = x.unbind(-1)
    return [torch.stack([c, a * b], -1), torch.cat([x, TABLE]).cumsum(0)]


def under_vmap(x):
    return [torch.func.vmap(lambda row: row.sin() @ TABLE.T + row[0])(x)]


def integers(x):
    return [x.argsort(-1), TABLE[x.argmax(-1) % 4] * x]


def reads_constants(x):
    # The value of a constant may be looked at, and decide.
    return [x * (2.0 if TABLE.sum().item() > 1 else 3.0)]


def gradient_of_parts(x):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        a, b, c = leaf.unbind(-1)
        largest, _ = leaf.max(-1)
        return torch.autograd.grad((a.sin() * b + c * largest).sum(), leaf)


def passes_on(x):
    return [x, x.detach(), x.new_ones(3)]


def gradient_of_a_density(x):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        a, b, c = leaf.unbind(-1)
        outer = torch.stack([a, b], -1)[..., None] * torch.stack([b, c], -1)[..., None, :]
        factor = torch.linalg.cholesky(outer @ outer.mT + torch.eye(2))
        value = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - leaf.max(-1).values
        return value.detach(), *torch.autograd.grad(value.sum(), leaf)


def gradient_of_a_convolution(x):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        # The constant filter takes no gradient: not all outputs of the operation are wanted.
        value = torch.nn.functional.conv1d(leaf[:, None], TABLE[:, None, :2]).tanh().sum()
        return torch.autograd.grad(value, leaf)


FUNCTIONS = [
    gradient_of_square,
    gradient_of_parts,
    writes_into_a_buffer,
    writes_into_a_constant_after_reading_it,
    chunks_and_stacks,
    under_vmap,
    integers,
    reads_constants,
    passes_on,
    gradient_of_a_density,
    gradient_of_a_convolution,
]


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # by inductor's imports
@pytest.mark.parametrize("executor", ["trace", "inductor", "none"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_program_computes_what_the_function_does(function, executor):
    if executor == "inductor" and function is not gradient_of_parts:
        pytest.skip("one compilation by inductor is enough, with operations of several results")
    run = compiled(function, [torch.randn(4, 3)], executor)
    x = torch.randn(4, 3)
    for found, expected in zip(run(x), function(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_parameters_among_the_examples_are_inputs():
    net = nn.Linear(3, 2)

    def loss_and_gradient(weight, bias, x):
        loss = net(x).square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, [net.weight, net.bias])]

    x = torch.randn(5, 3)
    run = compiled(loss_and_gradient, [net.weight, net.bias, x])
    before = loss_and_gradient(None, None, x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2).add_(1)
    expected = loss_and_gradient(None, None, x)
    assert not torch.allclose(before[0], expected[0])
    for found, value in zip(run(net.weight.detach(), net.bias.detach(), x), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_what_does_not_depend_on_the_inputs_is_computed_once():
    calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append(1)
            return x.exp()

    run = compiled(lambda x: [x + Counted.apply(TABLE).logsumexp(0)], [torch.randn(4, 3)])
    found = kinds(run, torch.randn(4, 3))
    assert len(calls) == 1
    assert "aten::exp" not in found and "aten::add" in found


def test_draws_are_new_at_each_run():
    run = compiled(lambda x: [x + torch.randn(3)], [torch.zeros(3)])
    assert not torch.equal(run(torch.zeros(3))[0], run(torch.zeros(3))[0])


def test_random_numbers_follow_the_seed():
    run = compiled(lambda x: [x + torch.randn(3)], [torch.zeros(3)])
    torch.manual_seed(3)
    found = run(torch.ones(3))[0]
    torch.manual_seed(3)
    torch.testing.assert_close(found, 1 + torch.randn(3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x if x.sum() > 0 else -x],
        lambda x: [x * float(x.max())],
        lambda x: [x[x > 0]],
        lambda x: [x.nonzero()],
    ],
    ids=["if", "float", "mask", "nonzero"],
)
def test_values_of_inputs_cannot_be_looked_at(function):
    with pytest.raises(UntraceableError, match="use torch.where"):
        compiled(function, [torch.randn(4)])


def test_a_matrix_without_a_cholesky_factor_gives_nan_and_leaves_the_others_alone():
    """The function raises; unchecked, LAPACK's unfinished factor has finite entries."""

    def function(x):
        return [torch.linalg.cholesky(x), torch.linalg.inv(x)]

    good, indefinite, singular = torch.eye(2) * 4, torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match="linalg"):
        function(indefinite)
    factor, inverse = compiled(function, [torch.eye(2).repeat(3, 1, 1)])(torch.stack([good, indefinite, singular]))
    assert torch.equal(factor[0], torch.eye(2) * 2)
    assert factor[1:].isnan().all()
    assert torch.equal(inverse[0], torch.eye(2) / 4)
    assert not inverse[2].isfinite().any()


def test_no_executor_changes_nothing():
    def function(x):
        return [x if x.sum() > 0 else -x]

    assert compiled(function, [torch.ones(2)], "none") is function


def test_tensors_from_outside_cannot_be_written_to():
    table = torch.zeros(3)
    with pytest.raises(UntraceableError, match="writes into a tensor from outside"):
        compiled(lambda x: [table.add_(x)], [torch.ones(3)])


def test_long_loops_are_recorded_quickly():
    def loop(x):
        with torch.enable_grad():
            leaf = y = x.detach().requires_grad_()
            for _ in range(500):
                y = y + 0.01 * torch.sin(y) * y
            return torch.autograd.grad(y.sum(), leaf)

    run = compiled(loop, [torch.ones(3)])
    x = torch.randn(3)
    torch.testing.assert_close(run(x)[0], loop(x)[0])


def test_validation_is_not_repeated():
    """A distribution made outside of the function checks its values, whatever the function switches off."""
    law = torch.distributions.Gamma(2.0, 1.0, validate_args=True)
    run = compiled(lambda x: [law.log_prob(x)], [torch.ones(3)])
    torch.testing.assert_close(run(torch.tensor([0.5, 1.0, 2.0]))[0], law.log_prob(torch.tensor([0.5, 1.0, 2.0])))
    with pytest.raises(ValueError, match="support"):
        compiled(lambda x: [law.log_prob(x)], [-torch.ones(3)])


def test_a_constant_mask_selects():
    mask = torch.tensor([True, False, True])
    run = compiled(lambda x: [x[..., mask], x.masked_select(mask)], [torch.ones(3)])
    for found in run(torch.tensor([1.0, 2.0, 3.0])):
        assert found.tolist() == [1.0, 3.0]


def kinds(run, *inputs):
    run(*inputs)
    return [node.kind() for node in torch._C._last_executed_optimized_graph().nodes()]


def test_what_is_repeated_is_computed_once():
    def function(x):
        # Views, several results and arguments by name among it.
        parts = [x[:2].exp().sum(dim=0) + x.exp().sort(descending=True)[0] for _ in range(2)]
        return [parts[0] * parts[1]]

    run = compiled(function, [torch.ones(3)])
    x = torch.randn(3)
    torch.testing.assert_close(run(x)[0], function(x)[0])
    assert [kinds(run, x).count(kind) for kind in ("aten::exp", "aten::sum", "aten::sort", "aten::add")] == [2, 1, 1, 1]


def test_what_differs_is_not_shared():
    def function(x):
        written = x.exp()
        written.add_(1.0)
        return [
            x.exp() * written,
            x.sum(0) + x.sum(0, keepdim=True),
            x + 1 + (x + 1.0),
            x.add(x, alpha=2) * x.add(x, alpha=3),
        ]

    run = compiled(function, [torch.ones(3)])
    x = torch.tensor([1.0, -2.0, 3.0])
    for found, expected in zip(run(x), function(x), strict=True):
        assert torch.equal(found, expected)


def test_outputs_are_tensors_of_their_own():
    first, second = compiled(lambda x: [x.exp(), x.exp()], [torch.ones(3)])(torch.zeros(3))
    first.add_(1.0)
    assert second.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("executor", ["trace", "inductor"])
def test_constants_that_are_returned_are_the_callers(executor):
    run = compiled(lambda x: [torch.ones(3), x], [torch.zeros(3)], executor)
    run(torch.zeros(3))[0].mul_(5.0)
    assert run(torch.zeros(3))[0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("executor", ["trace", "inductor"])
def test_programs_of_large_products(executor):
    """Which library computes them depends on the processor, and Inductor does not take all that the other has."""
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    run = compiled(lambda a, b: [product(a, b)], [a, b], executor)
    torch.testing.assert_close(run(b, a)[0], b @ a, rtol=1e-4, atol=1e-3)

"""A graph built by hand takes all kinds of arguments that operators of torch do, and runs without the optimiser."""

import pytest
import torch

from pyroflows.compiling.program import compiled

INDEX = torch.tensor([1, 0])


def adds_to_a_list(x):
    """An operation that returns nothing."""
    parts = [x.exp(), x.sin()]
    torch._foreach_add_(parts, 2.0)
    return parts


FUNCTIONS = {
    "no sizes": lambda x: [x.sum().view([]), x.sum().expand(())],
    "memory formats": lambda x: [
        x.clone(memory_format=torch.contiguous_format).reshape(-1),
        x[None, None].contiguous(memory_format=torch.channels_last),
        torch.ones_like(x, memory_format=torch.preserve_format) * x,
    ],
    "signs of zero": lambda x: [(x * 0.0).exp() / 0.0, (x * 0.0).exp() / -0.0, 1 / (x * 0.0 + 1.0) / float("inf")],
    "numbers and truth": lambda x: [x.cumsum(1), x.std(1, keepdim=True), x.sum(1, keepdim=True), x + 1, x + 1.5],
    "truth as a number": lambda x: [x * True, (x > 0) * True, (x > 0) & True, torch.full_like(x > 0, True) | (x > 9)],
    "indices that are missing": lambda x: [x[:, INDEX], x[INDEX], x[..., INDEX, :]],
    "lists of tensors": lambda x: [torch.cat(x.split([1, 2], 1)[::-1], 1), *torch.stack([x, x.exp()]).unbind(0)],
    "dtypes and words": lambda x: [
        x.to(torch.float64),
        torch.div(x, 0.3, rounding_mode="floor"),
        torch.searchsorted(torch.linspace(-1, 1, 9), x, side="right"),
        torch.full_like(x, 2.0, dtype=torch.float64) * x,
    ],
    "no result": adds_to_a_list,
    "transposed twice": lambda x: [x.t().mT.exp(), x.t().sin().t(), x * 1 + 0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments(name):
    function = FUNCTIONS[name]
    run = compiled(function, [torch.randn(2, 3)])
    x = torch.randn(2, 3)
    for found, expected in zip(run(x), function(x), strict=True):
        assert found.dtype == expected.dtype and found.stride() == expected.stride()
        assert torch.equal(found, expected)


def test_the_optimiser_is_off_only_inside():
    """One call of it would cost as much as all that a program saves in a short fit."""
    run = compiled(lambda x: [x.exp() @ x], [torch.ones(3)])
    run(torch.ones(3))
    assert torch._C._get_graph_executor_optimize()
    with pytest.raises(RuntimeError):
        run(torch.ones(2, 2, 2))
    assert torch._C._get_graph_executor_optimize()


def test_double_transposes_are_left_out():
    run = compiled(lambda x: [x.t().t().exp()], [torch.ones(2, 3)])
    run(torch.ones(2, 3))
    kinds = [node.kind() for node in torch._C._last_executed_optimized_graph().nodes()]
    assert "aten::exp" in kinds and "aten::t" not in kinds

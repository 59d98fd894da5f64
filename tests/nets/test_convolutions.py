import pytest
import torch
from torch.func import jacrev, vmap

from pyroflows.nets.convolutions import _recorded, _unfolded, _WrittenOut, convolutions

# Widths whose 3-tap convolutions unfold their input, fold their output, or both; and one convolution alone.
WIDTHS = [(3, 5, 5, 2), (2, 4, 4, 6), (4, 2), (2, 4)]


def network(widths, num_axes, rows=2):
    """An input with sides of 4, 3 and 1, weights and biases; the first and the last convolution have three taps."""
    torch.manual_seed(0)
    taps = [3 if k in (0, len(widths) - 2) else 1 for k in range(len(widths) - 1)]
    weights = [torch.randn(b, a, *[t] * num_axes) for t, a, b in zip(taps, widths, widths[1:], strict=False)]
    x = torch.randn(rows, widths[0], *(4, 3, 1)[:num_axes])
    return [t.double().requires_grad_() for t in (x, *weights, *(torch.randn(b) for b in widths[1:]))]


def split_up(arguments):
    x, *parameters = arguments
    return x, parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]


@pytest.mark.parametrize("num_axes", [1, 2, 3])
@pytest.mark.parametrize("widths", WIDTHS)
def test_gradients_are_those_of_recorded_convolutions(widths, num_axes):
    arguments = network(widths, num_axes)
    output, expected = convolutions(*split_up(arguments)), _recorded(*split_up(arguments))
    assert "_WrittenOut" in output.grad_fn.next_functions[0][0].name()
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(output)
    found = torch.autograd.grad(output, arguments, gradient)
    torch.testing.assert_close(found, torch.autograd.grad(expected, arguments, gradient))


@pytest.mark.parametrize("widths", [(1, 4), (8, 1, 8)])
def test_large_products_with_one_channel(widths):
    """So many rows are multiplied by oneDNN on some processors, which takes no matrix that overlaps itself."""
    assert _unfolded(torch.randn(1, 4, 2)).is_contiguous()
    arguments = [t.detach().float().requires_grad_() for t in network(widths, 1)]
    arguments[0] = torch.randn(30_000, widths[0], 8, requires_grad=True)
    output, expected = convolutions(*split_up(arguments)), _recorded(*split_up(arguments))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    found, right = (torch.autograd.grad(y.square().mean(), arguments) for y in (output, expected))
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)


def test_second_derivatives():
    arguments = network((2, 3, 3, 4), 2)
    assert torch.autograd.gradgradcheck(lambda *given: convolutions(*split_up(given)), arguments)


def test_second_derivatives_where_weights_make_a_bias():
    x, weights, _ = split_up(network((2, 4), 2))
    found, expected = (
        torch.autograd.grad(
            function(x, weights, [weights[0].sum((1, 2, 3))]).square().sum(), weights, create_graph=True
        )
        for function in (convolutions, _recorded)
    )
    torch.testing.assert_close(found, expected)


def test_batches_of_gradients():
    arguments = network((2, 3, 3, 4), 2)
    x, weights, biases = split_up(arguments)
    output = convolutions(x, weights, biases)
    each = torch.eye(output.numel(), dtype=x.dtype).view(-1, *output.shape)
    (found,) = torch.autograd.grad(output, x, each, is_grads_batched=True)
    expected = jacrev(lambda x: _recorded(x, weights, biases))(x)
    torch.testing.assert_close(found.view(*output.shape, *x.shape), expected)


def test_rows_of_vmap_and_no_rows():
    x, weights, biases = split_up(network((2, 3, 3, 4), 2, rows=3))
    each = vmap(lambda row: convolutions(row[None], weights, biases)[0])(x)
    torch.testing.assert_close(each, convolutions(x, weights, biases))
    assert convolutions(x[:0], weights, biases).shape == (0, 4, 4, 3)


def test_the_batch_is_last_in_memory_and_the_input_is_not_written():
    x, weights, biases = split_up(network((2, 3, 3, 4), 2, rows=3))
    with torch.no_grad():
        columns = x.movedim(0, -1).contiguous().movedim(-1, 0)
        before = columns.clone()
        output = convolutions(columns, weights, biases)
    assert output.movedim(0, -1).is_contiguous()
    assert torch.equal(columns, before)


def test_gradients_of_parameters_alone():
    x, weights, biases = split_up(network((2, 3, 3, 4), 2))
    convolutions(x.detach(), weights, biases).sum().backward()
    _recorded(x.detach(), again := [w.detach().requires_grad_() for w in weights], biases).sum().backward()
    torch.testing.assert_close([w.grad for w in weights], [w.grad for w in again])


def test_written_out_is_what_runs_on_processors_only(monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(_WrittenOut, "apply", refuse)
    x, weights, biases = split_up(network((2, 4), 2))
    meta = [[t.to("meta") for t in part] for part in (weights, biases)]
    assert convolutions(x.to("meta"), *meta).shape == (2, 4, 4, 3)

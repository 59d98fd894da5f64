"""A program reads the parameters and buffers of modules at each call: what changes them changes what it gives."""

import pytest
import torch
from torch import nn

from pyroflows.compiling.program import compiled
from pyroflows.errors import UntraceableError


class Layer(nn.Module):
    """``weight * (x + shift.exp()) + inner(x)``, of a parameter, a buffer and a submodule."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("shift", torch.tensor([0.1, 0.2, 0.3]))
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.weight * (x + self.shift.exp()) + self.inner(x)


def value_and_gradient(layer):
    def function(x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = layer(leaf).square().sum()
            return [value.detach(), *torch.autograd.grad(value, leaf)]

    return function


@torch.no_grad()
def change_buffer_in_place(layer):
    layer.shift.mul_(2.0)


def change_buffer_past_its_version(layer):
    layer.shift.data.mul_(2.0)


def replace_buffer(layer):
    layer.shift = layer.shift * 2.0


@torch.no_grad()
def change_parameter_in_place(layer):
    layer.weight.add_(1.0)


def replace_data_of_parameter(layer):
    layer.weight.data = layer.weight.detach() + 1.0


def replace_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() + 1.0)


def load_state(layer):
    layer.load_state_dict({name: tensor + 1.0 for name, tensor in layer.state_dict().items()})


@torch.no_grad()
def change_submodule(layer):
    layer.inner.bias.add_(1.0)


CHANGES = [
    change_buffer_in_place,
    change_buffer_past_its_version,
    replace_buffer,
    change_parameter_in_place,
    replace_data_of_parameter,
    replace_parameter,
    load_state,
    change_submodule,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_changes_is_read_anew(change):
    layer = Layer()
    function = value_and_gradient(layer)
    run = compiled(function, [torch.zeros(3)], state=[layer])
    x = torch.randn(3)
    before = function(x)
    for _ in range(3):
        torch.testing.assert_close(list(run(x)), before)
    change(layer)
    after = function(x)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(list(run(x)), after)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_inductor_reads_anew():
    layer = Layer()
    function = value_and_gradient(layer)
    run = compiled(function, [torch.zeros(3)], "inductor", [layer])
    x = torch.randn(3)
    for change in (change_buffer_in_place, replace_buffer, replace_data_of_parameter):
        change(layer)
        torch.testing.assert_close(list(run(x)), function(x))


def test_tensors_are_state_too():
    scale = torch.tensor(2.0)
    run = compiled(lambda x: [scale.exp() * x], [torch.ones(2)], state=[scale])
    scale.fill_(0.0)
    assert run(torch.tensor([3.0, 4.0]))[0].tolist() == [3.0, 4.0]


def test_without_state_tensors_are_constants():
    scale = torch.tensor(0.0)
    run = compiled(lambda x: [scale.exp() * x], [torch.ones(2)])
    scale.fill_(1.0)
    assert run(torch.tensor([3.0, 4.0]))[0].tolist() == [3.0, 4.0]


def test_examples_are_what_is_given_though_they_are_state():
    layer = Layer()
    run = compiled(lambda weight: [layer(torch.ones(3))], [layer.weight], state=[layer])
    (found,) = run(torch.zeros(3))
    torch.testing.assert_close(found, layer.inner(torch.ones(3)).detach())


def test_the_state_has_no_gradients():
    layer = Layer()
    (found,) = compiled(lambda x: [layer(x)], [torch.ones(3)], state=[layer])(torch.ones(3))
    assert not found.requires_grad


def test_only_what_is_read_is_an_input():
    layer = Layer()
    inputs = []

    def function(x):
        inputs.append(x)
        return [x + layer.shift]

    run = compiled(function, [torch.ones(3)], state=[layer])
    layer.inner = layer.weight = None  # nothing of these is asked for
    torch.testing.assert_close(run(torch.ones(3))[0], 1.0 + layer.shift)
    assert len(inputs) == 1


def test_buffers_that_are_in_no_state_dict_are_constants():
    """They follow from what the module was made of; another dtype is recorded again."""
    layer = Layer()
    layer.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]), persistent=False)
    run = compiled(lambda x: [x * layer.mask + layer.shift], [torch.ones(3)], state=[layer])
    layer.mask = torch.zeros(3)
    torch.testing.assert_close(run(torch.ones(3))[0], layer.shift + torch.tensor([1.0, 0.0, 1.0]))
    layer.mask = torch.tensor([1.0, 0.0, 1.0])
    layer.double()
    x = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(run(x)[0], x * layer.mask + layer.shift)


def test_another_shape_is_recorded_again():
    layer = Layer()
    run = compiled(lambda x: [x.sum() * layer.shift.sum() / layer.shift.numel()], [torch.ones(3)], state=[layer])
    layer.shift = torch.tensor([1.0, 5.0])
    assert run(torch.ones(3))[0].item() == pytest.approx(9.0)
    layer.shift.mul_(2.0)
    assert run(torch.ones(3))[0].item() == pytest.approx(18.0)


def test_the_value_of_the_state_may_decide():
    """Once more if it becomes another."""
    layer, calls = Layer(), []
    layer.register_buffer("mask", torch.tensor([True, False, True]))
    layer.register_buffer("is_negative", torch.tensor(False))

    def function(x):
        calls.append(1)
        return [-x[layer.mask] if layer.is_negative else x[layer.mask]]

    run = compiled(function, [torch.ones(3)], state=[layer])
    x = torch.tensor([1.0, 2.0, 3.0])
    assert run(x)[0].tolist() == [1.0, 3.0]
    assert run(x)[0].tolist() == [1.0, 3.0]
    assert len(calls) == 1
    layer.is_negative.fill_(True)
    assert run(x)[0].tolist() == [-1.0, -3.0]
    layer.mask = torch.tensor([False, True, True])
    assert run(x)[0].tolist() == [-2.0, -3.0]
    assert run(x)[0].tolist() == [-2.0, -3.0]
    assert len(calls) == 3


def test_the_state_beside_an_input_may_not_decide():
    layer = Layer()
    with pytest.raises(UntraceableError, match="use torch.where"):
        compiled(lambda x: [x if (x * layer.shift).sum() > 0 else -x], [torch.ones(3)], state=[layer])
    with pytest.raises(UntraceableError, match="use torch.where"):
        compiled(lambda x: [x if torch.rand(()) > layer.shift[0] else -x], [torch.ones(3)], state=[layer])


@pytest.mark.parametrize("write", [lambda b, x: b.add_(x), lambda b, x: b.add_(1), lambda b, x: b[:1].copy_(x[:1])])
def test_the_state_cannot_be_written_to(write):
    layer = Layer()
    with pytest.raises(UntraceableError, match="writes into a tensor from outside"):
        compiled(lambda x: [write(layer.shift, x).sum() + x], [torch.ones(3)], state=[layer])


def test_inputs_cannot_be_written_to():
    with pytest.raises(UntraceableError, match="writes into a tensor from outside"):
        compiled(lambda x: [x.add_(1)], [torch.ones(3)])


def test_constants_cannot_be_written_to():
    """The write would happen once, at the recording."""
    count = torch.zeros(())
    with pytest.raises(UntraceableError, match="writes into a tensor from outside"):
        compiled(lambda x: [x * count.add_(1)], [torch.ones(3)])


def test_views_made_outside_are_refused():
    """What they show may be replaced."""
    layer = Layer()
    first = layer.shift[:1]
    with pytest.raises(UntraceableError, match="a view made outside"):
        compiled(lambda x: [x * first], [torch.ones(3)], state=[layer])


def test_modules_made_inside_are_refused():
    """Their parameters are drawn into memory that nobody saw become a parameter."""
    with pytest.raises(UntraceableError, match="a module made inside"):
        compiled(lambda x: [nn.Linear(3, 3)(x)], [torch.ones(3)])

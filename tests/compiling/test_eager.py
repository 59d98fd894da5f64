"""Who asks whether Python runs is told so wherever something else stands in a tensor's place."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from pyroflows.compiling.eager import is_transformed, runs_in_python
from pyroflows.compiling.program import compiled
from pyroflows.errors import InversionError
from pyroflows.transforms import Autoregressive
from pyroflows.transforms.root import increasing_root


def answers(run):
    """What the two questions say inside of a function that something runs."""
    found = []

    def function(x):
        found.append((runs_in_python(), is_transformed()))
        return [x * 2]

    run(function)
    return found


def test_eager():
    assert answers(lambda f: f(torch.ones(2))) == [(True, False)]


def test_vmap_and_gradients():
    assert answers(lambda f: torch.func.vmap(f)(torch.ones(2))) == [(False, True)]
    assert answers(lambda f: torch.func.grad(lambda x: f(x)[0].sum())(torch.ones(2))) == [(False, True)]


def test_make_fx():
    assert answers(lambda f: make_fx(f)(torch.ones(2))) == [(False, True)]


def test_while_a_program_is_recorded_values_are_hidden_and_tensors_ordinary():
    assert answers(lambda f: compiled(f, [torch.ones(2)])) == [(False, False)]
    assert runs_in_python()


def test_in_the_backward_pass_of_a_recorded_function():
    found = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            found.append(runs_in_python())
            return gradient

    def function(x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(Asks.apply(leaf).sum(), leaf)

    compiled(function, [torch.ones(2)])
    assert found == [False]


def test_another_dispatch_mode_is_no_recording():
    with FlopCounterMode(display=False):
        assert runs_in_python()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_torch_compile_has_no_graph_breaks():
    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x + 1 if runs_in_python() else x + (2 if is_transformed() else 3)

    assert function(torch.zeros(())).item() == 2.0


def test_a_root_search_raises_in_python_and_gives_nan_in_a_program():
    """The target lies outside of the bracket."""

    def search(target):
        return [increasing_root(lambda a: (a, torch.ones_like(a)), target, -torch.ones(2), torch.ones(2))]

    found, missed = torch.tensor([0.5, -0.5]), torch.tensor([0.5, 3.0])
    run = compiled(search, [found])
    torch.testing.assert_close(run(found)[0], found)
    assert run(missed)[0].isnan().tolist() == [False, True]
    assert compiled(search, [missed])(missed)[0].isnan().tolist() == [False, True]
    with pytest.raises(InversionError):
        search(missed)


@pytest.mark.parametrize("conditioner", ["made", "residual"])
def test_an_autoregressive_layer_in_a_program(conditioner):
    """Its inverse by steps of the network where it has them, and the score, which ends early where Python runs."""
    layer = Autoregressive(4, "affine", conditioner=conditioner, hidden_dims=(8, 8))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))

    def function(x):
        with torch.enable_grad():
            z, ladj = layer.inv.forward_and_ladj(x)
            gradients = torch.autograd.grad(z.square().sum() + ladj.sum(), list(layer.parameters()))
        x, ladj, score = layer.forward_and_score(x, -x)
        return [z.detach(), x.detach(), score.detach(), *gradients]

    run = compiled(function, [torch.zeros(6, 4)], state=[layer])
    x = torch.randn(6, 4)
    torch.testing.assert_close(list(run(x)), function(x), rtol=1e-4, atol=1e-5)

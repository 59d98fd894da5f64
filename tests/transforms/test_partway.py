"""Continuous layers that stop on the way from base to data."""

import pytest
import torch
from torchdiffeq import odeint

import pyroflows as pf
from pyroflows.transforms import Adaptive, Continuous

TIME = 0.4


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = Continuous(2, hidden_dims=(8, 8), context_dim=1, solver=Adaptive(1e-9, 1e-9)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def test_layer_stops_where_the_equation_is_at_that_time(layer):
    z, context = torch.randn(7, 2).double(), torch.randn(7, 1).double()
    _ = layer.inv  # an inverse that exists already must not become that of the new layer
    partway = layer.until(TIME)
    x, ladj = partway.forward_and_ladj(z, context)
    field = layer.net.at(context)
    solved = odeint(field, z, torch.tensor([0.0, TIME]).double(), rtol=1e-10, atol=1e-10)[-1]
    torch.testing.assert_close(x, solved, rtol=1e-7, atol=1e-7)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(partway.condition(c), row) for row, c in zip(z, context, strict=True)]
    )
    torch.testing.assert_close(ladj, jacobian.det().log(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(partway.inverse_and_ladj(x, context)[0], z, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(x, layer.condition(context)(z))


def test_parameters_are_shared_and_times_multiply(layer):
    z, context = torch.randn(7, 2).double(), torch.randn(7, 1).double()
    torch.testing.assert_close(
        layer.until(0.5).until(0.8).condition(context)(z), layer.until(TIME).condition(context)(z)
    )
    torch.testing.assert_close(layer.until(1).condition(context)(z), layer.condition(context)(z))
    assert list(layer.until(TIME).parameters()) == list(layer.parameters())


def test_hutchinson_and_fixed_steps_stop_too():
    layer = Continuous(2, hidden_dims=(8, 8), solver=pf.transforms.FixedSteps(4), trace="hutchinson")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    partway, z = layer.until(TIME), torch.randn(5, 2)
    x, ladj = partway.exact().forward_and_ladj(z)
    torch.testing.assert_close(partway(z), x, rtol=1e-3, atol=1e-3)
    estimates = torch.stack([partway.forward_and_ladj(z)[1] for _ in range(200)])
    error = estimates.std(0) / 200**0.5
    assert ((estimates.mean(0) - ladj).abs() < 5 * error + 1e-3).all()


@pytest.mark.parametrize("time", [0.0, 1.5, float("nan")])
def test_times_outside_of_the_path_are_refused(layer, time):
    with pytest.raises(pf.errors.OptionError, match="time must be above 0 and at most 1"):
        layer.until(time)

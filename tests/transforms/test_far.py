"""Far from the data, log-densities are no NaN and their gradients are finite; so are draws from far base values."""

import pyro
import pytest
import torch

import pyroflows as pf
from pyroflows.transforms import BlockAutoregressive
from pyroflows.transforms.univariate import SOS, Monotone

DIM = 3
FAMILIES = {
    "sos": lambda **options: pf.flows.SOS(DIM, num_layers=2, **options),
    "monotone": lambda **options: pf.flows.NAF(DIM, num_layers=2, **options),
    "block autoregressive": lambda **options: pf.flows.BNAF(DIM, num_layers=2, **options),
    "block autoregressive, scored by its inverse": lambda **options: pf.Flow(
        [BlockAutoregressive(DIM, order, (8, 8), **options) for order in ([0, 1, 2], [2, 1, 0])]
    ),
    "spline": lambda **options: pf.flows.NSF(DIM, num_layers=3, **options),
    "affine": lambda **options: pf.flows.MAF(DIM, num_layers=3, **options),
    "affine coupling": lambda **options: pf.flows.RealNVP(DIM, num_layers=3, **options),
    "additive coupling": lambda **options: pf.flows.NICE(DIM, num_layers=3, **options),
    "planar": lambda **options: pf.flows.Planar(DIM, num_layers=3, **options),
    "radial": lambda **options: pf.flows.Radial(DIM, num_layers=3, **options),
    "sylvester": lambda **options: pf.flows.Sylvester(DIM, num_layers=3, **options),
}
for name in ("sos", "monotone", "sinh_arcsinh"):
    FAMILIES[f"{name} coupling"] = lambda name=name, **options: pf.Flow(
        [pf.transforms.Coupling(DIM, name, mask, **options) for mask in ([True, False, True], [False, True, False])]
    )
    FAMILIES[f"{name}, scored by its inverse"] = lambda name=name, **options: pf.Flow(
        [pf.transforms.Autoregressive(DIM, name, order, **options) for order in ([0, 1, 2], [2, 1, 0])]
    )
    FAMILIES[f"elementwise {name}"] = lambda name=name, **options: pf.Flow(
        [pf.transforms.Elementwise(DIM, name, **options) for _ in range(3)]
    )

# Signs and places of the far values; the others are of order one.
DIRECTIONS = torch.tensor([[1.0, 1, 1], [-1, 1, -1], [1, 0, 0], [0, 0, 1], [0, -1, 0], [-1, -1, 0]])


def made(family, dtype, **options):
    torch.manual_seed(0)
    flow = FAMILIES[family](**options).to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return flow


def rows_at(distance, dtype):
    near = torch.tensor([0.3, -0.2, 0.5], dtype=dtype)
    return torch.where(DIRECTIONS == 0, near, distance * DIRECTIONS.to(dtype))


def are_numbers(tensors):
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def check_density(flow, x, context=None):
    """Check log-densities, and their gradients where they are finite."""
    inputs = [x.requires_grad_(), *([] if context is None else [context.requires_grad_()]), *flow.parameters()]
    with pyro.validation_enabled(False):
        log_q = (flow() if context is None else flow(context)).log_prob(x)
    assert not log_q.isnan().any()
    assert (log_q < torch.inf).all()
    finite = log_q[log_q.isfinite()].sum()
    gradients = torch.autograd.grad(finite, inputs, allow_unused=True, materialize_grads=True)
    assert are_numbers(gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_densities_far_from_the_data(family, dtype):
    flow = made(family, dtype)
    for distance in (1e2, 1e6, 1e12):
        check_density(flow, rows_at(distance, dtype))
    with pyro.validation_enabled(False):  # gradients of an affine map overflow here with the values
        log_q = flow().log_prob(rows_at(1e20, dtype))
    assert not log_q.isnan().any()
    assert (log_q < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if any(kind in name for kind in ("sos", "monotone", "block", "sinh"))]
)
def test_gradients_at_any_distance(family, dtype):
    check_density(made(family, dtype), rows_at(1e20, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_densities_at_large_contexts(family, dtype):
    flow = made(family, dtype, context_dim=2)
    for size in (1e3, 1e6):
        context = torch.tensor([size, -size], dtype=dtype).repeat(len(DIRECTIONS), 1)
        check_density(flow, rows_at(2.0, dtype), context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_draws_from_far_base_values(family, dtype):
    flow = made(family, dtype)
    for distance in (1e3, 1e6, 1e20):
        z = rows_at(distance, dtype).requires_grad_()
        x, ladj = flow.transform.forward_and_ladj(z)
        assert are_numbers([x])
        assert not ladj.isnan().any()
        if distance <= 1e6:
            near = x[x.abs() < 1e3].sum() + ladj.sum()
            assert are_numbers(torch.autograd.grad(near, [z, *flow.parameters()], materialize_grads=True))


@pytest.mark.parametrize("univariate", [SOS(), Monotone()])
@pytest.mark.parametrize("distance", [1e2, 1e4, 1e6])
def test_the_tails_invert(univariate, distance):
    torch.manual_seed(0)
    theta = torch.randn(200, univariate.num_params, dtype=torch.float64)
    z = distance * torch.randn(200, dtype=torch.float64)
    x, ladj = univariate.forward_and_ladj(z, theta)
    again, inverse_ladj = univariate.inverse_and_ladj(x, theta)
    torch.testing.assert_close(again, z, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=1e-6, atol=1e-6)

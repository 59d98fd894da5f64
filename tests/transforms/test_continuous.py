"""Continuous layers: closed forms, tolerances, rows that do not see each other, gradients, and what is reported."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
import torchdiffeq
from torch import nn

import pyroflows as pf
from pyroflows.errors import IntegrationError, OptionError, ShapeError
from pyroflows.nets.velocity import FreeVelocity, VelocityConv, VelocityMLP
from pyroflows.transforms import Adaptive, Continuous, FixedSteps
from pyroflows.transforms.continuous import Evaluations, Penalties
from pyroflows.transforms.continuous.solvers import FIXED_METHODS
from tests.transforms.networks import Velocity
from tests.transforms.registry import jacobian, perturb

FLOAT64 = torch.float64
TIGHT = Adaptive(1e-10, 1e-10)


def continuous(dim=2, hidden_dims=(8, 7), dtype=FLOAT64, **options):
    return perturb(Continuous(dim, hidden_dims, **options).to(dtype))


class Linear(nn.Module):
    """The velocity A z + b, whose flow is a matrix exponential."""

    def __init__(self, *_):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[0.5, -1.0], [0.7, -0.9]], dtype=FLOAT64))
        self.shift = nn.Parameter(torch.tensor([0.3, -0.2], dtype=FLOAT64))

    def forward(self, t, z, context):
        return z @ self.matrix.T + self.shift


class Scripted(nn.Module):
    """A velocity that a function gives."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, t, z, context):
        return self.scale * self.function(t.reshape(-1, *[1] * (z.dim() - 1)), z)


def scripted(function, dim=2, **options):
    return Continuous(dim, net=lambda *_: Scripted(function), **options)


# Networks


@pytest.mark.parametrize("hidden_dims", [(6,), (6, 5), (6, 5, 4), (3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("times", ["one", "each"])
def test_divergence_and_products_of_the_dense_network(hidden_dims, dim, times):
    net = perturb(VelocityMLP(dim, hidden_dims, context_dim=2).double())
    field, z = net.at(torch.randn(5, 2, dtype=FLOAT64)), torch.randn(5, dim, dtype=FLOAT64)
    t = torch.tensor(0.3, dtype=FLOAT64) if times == "one" else torch.rand(5, dtype=FLOAT64)
    assert_derivatives(field, t, z, 1)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2), (1, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("context", ["none", "vector", "places"])
def test_divergence_and_products_of_the_convolutional_network(shape, context):
    shape = torch.Size(shape)
    context_shape = torch.Size({"none": (), "vector": (3,), "places": (2, *shape[1:])}[context])
    net = FreeVelocity(perturb(VelocityConv(shape, (4, 3), context_shape).double()), shape, context_shape)
    field = net.at(torch.randn(5, *context_shape, dtype=FLOAT64) if context_shape else None)
    z = torch.randn(5, *shape, dtype=FLOAT64)
    assert_derivatives(field, torch.rand(5, dtype=FLOAT64), z, len(shape))


def test_divergence_of_a_large_batch_is_taken_in_parts(monkeypatch):
    field = FreeVelocity(perturb(Velocity(5, (8,), 0).double()), torch.Size([5]), torch.Size()).at(None)
    t, z = torch.tensor(0.3, dtype=FLOAT64), torch.randn(7, 5, dtype=FLOAT64)
    expected = field.with_divergence(t, z)[1]
    monkeypatch.setattr("pyroflows.nets.velocity.free.MAX_ELEMENTS", 2 * z.numel())
    torch.testing.assert_close(field.with_divergence(t, z)[1], expected)


def assert_derivatives(field, t, z, num_axes):
    matrix = jacobian(lambda z: field(t, z), z, num_axes)
    velocity, divergence = field.with_divergence(t, z)
    torch.testing.assert_close(velocity, field(t, z))
    torch.testing.assert_close(divergence, matrix.diagonal(dim1=-2, dim2=-1).sum(-1))
    w = torch.randn_like(z)
    velocity, product = field.with_product(t, z, w)
    torch.testing.assert_close(velocity, field(t, z))
    expected = (w.flatten(1).unsqueeze(-2) @ matrix).squeeze(-2)
    torch.testing.assert_close(product.flatten(1), expected)


def test_time_reaches_every_layer():
    for net, z in ((VelocityMLP(2, (4, 4)), torch.zeros(2)), (VelocityConv(torch.Size([1, 3])), torch.zeros(1, 1, 3))):
        net = perturb(net)
        field = net.at(None) if isinstance(net, VelocityMLP) else lambda t, z, net=net: net(t.reshape(1), z, None)
        values = [field(torch.tensor(t), z) for t in (0.0, 0.5, 1.0)]
        assert not torch.allclose(values[0], values[1]) and not torch.allclose(values[0], values[2])


# Values


@pytest.mark.parametrize("solver", [TIGHT, FixedSteps(100)], ids=["adaptive", "fixed"])
def test_linear_equation_is_a_matrix_exponential(solver):
    """A Gaussian goes to a Gaussian: values, log-density and score in closed form."""
    t = Continuous(2, net=Linear, solver=solver, trace="exact")
    a, b = t.net.net.matrix.detach(), t.net.net.shift.detach()
    block = torch.zeros(3, 3, dtype=FLOAT64)
    block[:2, :2], block[:2, 2] = a, b
    power = torch.linalg.matrix_exp(block)
    matrix, loc = power[:2, :2], power[:2, 2]
    z = torch.randn(50, 2, dtype=FLOAT64)
    x, ladj, score = t.forward_and_score(z, -z)
    torch.testing.assert_close(x, z @ matrix.T + loc, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ladj, a.trace().expand(50), rtol=1e-8, atol=1e-8)
    law = torch.distributions.MultivariateNormal(loc, matrix @ matrix.T)
    log_prob = pf.Flow([t], standardize=False).double()().estimated().log_prob(x)
    torch.testing.assert_close(log_prob, law.log_prob(x), rtol=1e-8, atol=1e-8)
    held = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(law.log_prob(held).sum(), held)
    torch.testing.assert_close(score, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [{}, {"hidden_dims": (8, 7, 6)}, {"net": lambda *_: Velocity(2, (8,), 0)}],
    ids=["two-layers", "three-layers", "own-net"],
)
def test_density_integrates_to_one(options):
    flow = pf.Flow([continuous(**options)], standardize=False).double()
    line = torch.linspace(-12, 12, 121, dtype=FLOAT64)
    with torch.no_grad():
        density = flow().log_prob(torch.cartesian_prod(line, line)).exp()
    assert abs(density.sum().item() * (line[1] - line[0]).item() ** 2 - 1) < 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (FLOAT64, 1e-5), (FLOAT64, 1e-9)], ids=str)
def test_round_trip_within_ten_tolerances(dtype, tolerance):
    t = continuous(3, dtype=dtype, solver=Adaptive(tolerance, tolerance))
    z = 3 * torch.randn(100, 3, dtype=dtype)
    with torch.no_grad():
        x, ladj = t.forward_and_ladj(z)
        again, ladj_again = t.inverse_and_ladj(x)
    assert ((again - z).abs() <= 10 * tolerance * (1 + z.abs().amax(-1, keepdim=True))).all()
    assert ((ladj + ladj_again).abs() <= 10 * tolerance * (1 + ladj.abs())).all()


def test_small_tolerances_in_single_precision_end():
    t = continuous(3, dtype=torch.float32, solver=Adaptive(1e-12, 1e-12))
    z = 5 * torch.randn(50, 3)
    with Evaluations() as count, torch.no_grad():
        x, _ = t.forward_and_ladj(z)
    expected = copy.deepcopy(t).double()(z.double())
    assert count.forward < 1000
    torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_field_is_what_a_layer_follows():
    """Close to the base a draw goes along the field; a layer up to a time has the field in units of that time."""
    layer, context = continuous(context_dim=3, solver=TIGHT), torch.randn(5, 3, dtype=FLOAT64)
    z, start, time = torch.randn(5, 2, dtype=FLOAT64), torch.zeros((), dtype=FLOAT64), 1e-4
    velocity = layer.field(context)(start, z)
    moved = (layer.until(time).condition(context)(z) - z) / time
    assert torch.allclose(moved, velocity, rtol=1e-2, atol=1e-3)
    assert torch.allclose(layer.until(0.5).field(context)(start, z), 0.5 * velocity)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"])
def test_field_is_never_evaluated_outside_of_its_time(method, backwards):
    seen = []

    def function(t, z):
        seen.append(t[0].item())
        return 1e-7 * torch.sin(3 * t) * z

    t = scripted(function, solver=Adaptive(1e-3, 1e-3, method))
    with torch.no_grad():
        (t.inverse_and_ladj if backwards else t.forward_and_ladj)(torch.randn(5, 2))
    assert min(seen) >= 0 and max(seen) <= 1 and max(seen) - min(seen) > 0.99


@pytest.mark.parametrize("backwards", [False, True])
def test_adjoint_is_never_evaluated_outside_of_its_time(backwards):
    seen = []

    def function(t, z):
        seen.append(t[0].item())
        return 1e-7 * torch.sin(3 * t) * z

    t = scripted(function, solver=Adaptive(1e-3, 1e-3, adjoint=True))
    x, _ = (t.inverse_and_ladj if backwards else t.forward_and_ladj)(torch.randn(5, 2).requires_grad_())
    seen.clear()
    x.sum().backward()
    assert min(seen) >= 0 and max(seen) <= 1 and max(seen) - min(seen) > 0.99


@pytest.mark.parametrize("method", sorted(FIXED_METHODS))
def test_fixed_steps_are_those_of_the_public_solver(method):
    """They take single steps of torchdiffeq, which are private there and may change."""
    t = continuous(2, solver=FixedSteps(3, method))
    z, times = torch.randn(5, 2, dtype=FLOAT64), torch.linspace(0, 1, 4, dtype=FLOAT64)
    expected = torchdiffeq.odeint(t.net.at(None), z, times, method=method)[-1]
    torch.testing.assert_close(t(z), expected, rtol=1e-12, atol=1e-12)


# Rows


def test_each_row_keeps_the_tolerance_beside_many_that_are_easy():
    """A norm that were a mean over the batch would let the error of this row grow a hundredfold."""
    tolerance = 1e-5
    t = scripted(lambda t, z: z * torch.sin(3 * z), solver=Adaptive(tolerance, tolerance)).double()
    row = torch.tensor([[2.5, -1.7]], dtype=FLOAT64)
    with torch.no_grad():
        expected = copy.deepcopy(t)
        expected.solver = expected.inverse_solver = TIGHT
        expected = expected.forward_and_ladj(row)
        found = t.forward_and_ladj(torch.cat([row, torch.zeros(20_000, 2, dtype=FLOAT64)]))
    for value, right in zip(found, expected, strict=True):
        assert ((value[:1] - right).abs() <= 10 * tolerance * (1 + right.abs())).all()


def test_a_row_does_not_depend_on_its_batch():
    tolerance = 1e-5
    flow = pf.Flow([continuous(3, solver=Adaptive(tolerance, tolerance))], standardize=False).double()
    rows = torch.randn(5, 3, dtype=FLOAT64)
    wild = torch.tensor([[1e6, -1e6, 1e3], [0.0, 0.0, 0.0], [300.0, 2.0, -1e4]], dtype=FLOAT64)
    with torch.no_grad():
        alone = torch.cat([flow().log_prob(row[None]) for row in rows])
        for others in (wild, rows.expand(200, 5, 3).reshape(-1, 3), 1e4 * torch.randn(1000, 3, dtype=FLOAT64)):
            together = flow().log_prob(torch.cat([rows, others]))[:5]
            assert ((together - alone).abs() <= 10 * tolerance * (1 + alone.abs())).all()


@pytest.mark.parametrize("solver", [Adaptive(), FixedSteps(4)], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("place", ["row", "context"])
def test_rows_that_are_not_finite_give_nan_for_themselves(solver, place):
    t = continuous(2, context_dim=2, solver=solver)
    z, context = torch.randn(2, 5, 2, dtype=FLOAT64)
    expected = t.forward_and_ladj(z, context)
    (z if place == "row" else context)[[1, 3], 1] = torch.tensor([torch.nan, torch.inf], dtype=FLOAT64)
    z.requires_grad_()
    found = t.forward_and_ladj(z, context)
    for result, value in zip(found, expected, strict=True):
        assert result[[1, 3]].isnan().all()
        torch.testing.assert_close(result[[0, 2, 4]], value[[0, 2, 4]], rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(sum(result[[0, 2, 4]].sum() for result in found), z)
    assert gradient.isfinite().all()


# Estimates of the trace


@pytest.mark.parametrize("dim", [3, (1, 2, 2)], ids=str)
def test_estimates_of_log_determinant_and_score_are_unbiased(dim):
    shape = (dim,) if isinstance(dim, int) else dim
    t = continuous(dim, (4, 4), trace="hutchinson", solver=FixedSteps(5))
    z = torch.randn(1, *shape, dtype=FLOAT64)
    rows = z.expand(3000, *shape)
    with torch.no_grad():
        _, estimates, scores = t.forward_and_score(rows, -rows)
        _, ladj, score = Continuous.exact(t).forward_and_score(z, -z)
    for found, expected in ((estimates, ladj), (scores.flatten(1), score.flatten(1))):
        assert (found.std(0) > 0).all()
        assert ((found.mean(0) - expected).abs() <= 4 * found.std(0) / len(rows) ** 0.5 + 1e-3).all()


def test_which_trace_is_taken():
    assert Continuous(50).trace == "exact" and Continuous(50).ladj_is_exact
    assert Continuous(50, (8, 8, 8)).trace == "hutchinson" and Continuous(3, (8, 8, 8)).trace == "exact"
    assert Continuous((3, 4, 4)).trace == "hutchinson" and not Continuous((3, 4, 4)).ladj_is_exact
    assert Continuous((3, 4, 4)).exact().ladj_is_exact
    assert not Continuous(2, inverse_solver=FixedSteps()).ladj_is_exact


# Gradients


def test_adjoint_and_direct_gradients_agree():
    """By x, by the context, and by all parameters, of which some are read only through what a context gives."""
    direct = continuous(2, context_dim=3, solver=TIGHT)
    x, context = torch.randn(6, 2, dtype=FLOAT64), torch.randn(6, 3, dtype=FLOAT64)
    gradients = []
    for solver in (Adaptive(1e-8, 1e-8), Adaptive(1e-8, 1e-8, adjoint=True), FixedSteps(40, adjoint=True)):
        t = copy.deepcopy(direct)
        t.solver = t.inverse_solver = solver
        leaves = [x.clone().requires_grad_(), context.clone().requires_grad_(), *t.parameters()]
        z, ladj = t.inverse_and_ladj(*leaves[:2])
        loss = (ladj - z.square().sum(-1) / 2).mean()
        gradients.append(torch.autograd.grad(loss, leaves))
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=1e-4, atol=1e-6)


def test_adjoint_gradients_of_images():
    t = continuous((1, 3, 2), (3,), context_dim=(1, 3, 2), trace="exact", solver=FixedSteps(20))
    z, context = torch.randn(2, 4, 1, 3, 2, dtype=FLOAT64)
    gradients = []
    for adjoint in (False, True):
        t.solver = FixedSteps(10, adjoint=adjoint)
        leaves = [z.clone().requires_grad_(), context.clone().requires_grad_(), *t.parameters()]
        x, ladj = t.forward_and_ladj(*leaves[:2])
        gradients.append(torch.autograd.grad(x.sin().mean() + ladj.mean(), leaves))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", [Adaptive(adjoint=True), FixedSteps(4, adjoint=True)], ids=["adaptive", "fixed"])
def test_second_derivatives_by_the_adjoint_equation_are_refused(solver):
    t = continuous(2, (4, 4), solver=solver)
    z = torch.randn(3, 2, dtype=FLOAT64, requires_grad=True)
    _, ladj = t.forward_and_ladj(z)
    torch.autograd.grad(ladj.sum(), z, retain_graph=True)
    with pytest.raises(OptionError, match="adjoint=False"):
        torch.autograd.grad(ladj.sum(), z, create_graph=True)


def test_second_derivatives():
    t = continuous(2, (4, 4), solver=FixedSteps(5))
    z = torch.randn(3, 2, dtype=FLOAT64, requires_grad=True)
    assert torch.autograd.gradgradcheck(t.forward_and_ladj, z)


def test_no_gradient_flows_through_the_sizes_of_steps():
    """The gradient is that of the steps that were taken, so that the graph has the size of the evaluations."""
    t = continuous(2, solver=Adaptive(1e-4, 1e-4))
    with Evaluations() as count:
        x, _ = t.forward_and_ladj(torch.randn(5, 2, dtype=FLOAT64))
    nodes, todo = set(), [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo += [after for after, _ in node.next_functions]
    names = [type(node).__name__ for node in nodes]
    assert len(names) < 60 * count.forward
    assert not any("Pow" in name or "Max" in name or "Sqrt" in name for name in names)


# Failures


def stiff(t, z):
    return -1e7 * (z - torch.sin(40 * t))


def exploding(t, z):
    return 5 * z**2 + 30


def not_finite(t, z):
    return torch.where(t > 0.5, torch.nan, z)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("function", [stiff, exploding, not_finite])
def test_solves_that_fail_say_so(function, backwards):
    if backwards and function is stiff:
        function = lambda t, z: -stiff(1 - t, z)  # noqa: E731
    t = scripted(function, solver=Adaptive(max_evaluations=500))
    way = "data to base" if backwards else "base to data"
    with pytest.raises(IntegrationError, match=rf"{way} with dopri5 at tolerances rtol=1e-05.*evaluations.*FixedSteps"):
        (t.inverse_and_ladj if backwards else t.forward_and_ladj)(torch.randn(5, 2))


def test_adjoint_that_fails_says_so():
    t = scripted(lambda t, z: 3 * torch.sin(9 * z), solver=Adaptive(adjoint=True, max_evaluations=400))
    x, _ = t.forward_and_ladj(torch.randn(50, 2).requires_grad_())
    object.__setattr__(t.solver, "max_evaluations", 10)
    t.net.net.scale.data.fill_(torch.nan)
    with pytest.raises(IntegrationError, match="the adjoint equation of a continuous flow"):
        x.sum().backward()


def test_fixed_steps_that_overflow_say_so():
    t = scripted(exploding, solver=FixedSteps(8, "euler"))
    with pytest.raises(IntegrationError, match="8 steps of euler gave values that are not finite"):
        t.forward_and_ladj(1e20 * torch.ones(1, 2))


def test_jumps_are_passed():
    """A velocity that jumps at a time needs short steps there, and no more than that."""
    t = scripted(lambda t, z: torch.where(t > 0.3, 1.0, -1.0).expand_as(z), dim=1)
    x, _ = t.forward_and_ladj(torch.zeros(3, 1))
    torch.testing.assert_close(x, torch.full((3, 1), 0.4), rtol=0, atol=5e-3)


@pytest.mark.parametrize("fit", ["fit_density", "train", "flow_vi"])
def test_a_fit_that_fails_goes_back_to_a_good_state(fit):
    """The solves of its last state fail; those of the state that it leaves do not."""
    flow = pf.Flow([Continuous(2, (8, 8), solver=Adaptive(max_evaluations=60))])
    options = {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1.0), "compile": "none", "seed": 0}
    options["progress_bar"] = False

    def model():
        return pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    fits = {
        "fit_density": lambda: pf.fit_density(flow, torch.randn(200, 2), max_epochs=200, **options),
        "train": lambda: pf.train(
            pf.fitting.ReverseKL(flow, lambda x: -100 * (x - 1).square().sum(-1)), 300, **options
        ),
        "flow_vi": lambda: pf.FlowVI(model, pf.guides.AutoFlow(model, lambda _: flow), 300, **options).run(),
    }
    with pytest.raises(IntegrationError, match="more than 60 evaluations"):
        fits[fit]()
    with torch.no_grad():
        z, _ = flow.transform.inverse_and_ladj(torch.randn(50, 2))
    assert z.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adaptive(rtol=0.0), "rtol must be a number above 0"),
        (lambda: Adaptive(atol=-1.0), "atol must be a number above 0"),
        (lambda: Adaptive(method="rk4"), r"method must be one of \['adaptive_heun', 'bosh3'.*got 'rk4'"),
        (lambda: Adaptive(max_evaluations=0), "max_evaluations must be at least 1"),
        (lambda: FixedSteps(0), "num_steps must be at least 1"),
        (lambda: FixedSteps(method="dopri5"), r"method must be one of \['euler'.*got 'dopri5'"),
        (lambda: Continuous(2, solver="dopri5"), "solver must be an instance of Adaptive or FixedSteps"),
        (lambda: Continuous(2, exact_solver=FixedSteps()), "exact_solver must be an Adaptive solver"),
        (lambda: Continuous(2, trace="full"), "trace must be one of"),
        (lambda: Continuous(2, kinetic_energy=-1.0), "kinetic_energy must be a number above 0"),
        (lambda: Continuous(2, hidden_dims=()), "hidden_dims must be one or more positive widths"),
        (lambda: Continuous((1, 2, 2, 2, 2)), "need a network of your own"),
        (lambda: Continuous((1, 4, 4), context_dim=(1, 3, 3)), "is a vector or has the shape"),
        (lambda: Continuous(2, net=nn.Linear(2, 2)), "net must be"),
        (lambda: Continuous(2, net=lambda *_: nn.Dropout(0.5)), "must not contain Dropout"),
    ],
)
def test_bad_options_raise(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_networks_of_another_shape_raise():
    t = scripted(lambda t, z: z[:, :1])
    with pytest.raises(ShapeError, match="must map places of shape"):
        t(torch.zeros(3, 2))


# What solves report


def test_evaluations_are_counted():
    t = scripted(
        lambda t, z: torch.sin(z), solver=FixedSteps(3), inverse_solver=FixedSteps(2, "midpoint", adjoint=True)
    )
    z = torch.randn(5, 2, requires_grad=True)
    with Evaluations() as outer:
        with Evaluations() as count:
            t.forward_and_ladj(z)
            found = t.inverse_and_ladj(z)[0]
        found.sum().backward()
        t(z)
    assert (outer.forward, outer.inverse) == (24, 4)
    assert (count.forward, count.inverse, count.adjoint) == (12, 4, 4)
    assert count.total == 20
    t(z)
    assert outer.total == 32


@pytest.mark.parametrize("dim", [2, (1, 2, 2)], ids=str)
@pytest.mark.parametrize("backwards", [False, True])
def test_penalties_are_integrals_along_the_path(dim, backwards):
    shape = (dim,) if isinstance(dim, int) else dim
    size = torch.Size(shape).numel()
    rate = 0.4
    t = scripted(lambda t, z: rate * z, dim=dim, solver=TIGHT, trace="exact", kinetic_energy=0.5, jacobian_norm=2.0)
    t = t.double()
    start = torch.randn(9, *shape, dtype=FLOAT64)
    z = start * torch.tensor(-rate if backwards else 0.0).exp()
    expected_result = (t.inverse_and_ladj if backwards else t.forward_and_ladj)(start)
    with Penalties() as penalties:
        result = (t.inverse_and_ladj if backwards else t.forward_and_ladj)(start)
    # |v|^2 = rate^2 |z|^2 exp(2 rate t), and |J|^2 = rate^2 D whatever the signs are.
    kinetic = rate / 2 * (torch.tensor(2 * rate).exp() - 1) * z.flatten(1).square().sum(-1).mean()
    torch.testing.assert_close(penalties.total, (0.5 * kinetic + 2.0 * rate**2 * size).detach(), check_dtype=False)
    torch.testing.assert_close(result, expected_result, rtol=0, atol=0)  # steps do not see penalties


def test_penalties_are_means_over_the_finite_rows():
    t = scripted(lambda t, z: 2 * torch.ones_like(z), dim=2, kinetic_energy=1.0)
    z = torch.tensor([[0.0, 0.0], [torch.nan, 0.0]])
    with Penalties() as penalties:
        t.forward_and_ladj(z)
    torch.testing.assert_close(penalties.total.detach(), torch.tensor(8.0))


def test_penalties_enter_fits_and_keep_paths_short():
    x = torch.randn(300, 2) * torch.tensor([1.0, 0.2])
    norms = []
    for coefficient in (0.0, 100.0):
        torch.manual_seed(0)
        t = Continuous(2, (8, 8), solver=FixedSteps(4), kinetic_energy=coefficient, jacobian_norm=coefficient)
        flow = pf.Flow([t], standardize=False)
        fit = pf.fit_density(flow, x, max_epochs=3, seed=0, progress_bar=False)
        assert set(fit.history["evaluations"].tolist()) == {16.0}
        norms.append((t(x) - x).norm().item())
    assert norms[1] < 0.2 * norms[0]


# Flows


@pytest.mark.parametrize(
    "make",
    [
        lambda: Continuous(2, (4, 4), solver=FixedSteps(3), inverse_solver=Adaptive(1e-3, 1e-4, "bosh3")),
        lambda: Continuous((1, 3, 2), (4,), context_dim=2, kinetic_energy=0.1),
    ],
    ids=["vector", "image"],
)
def test_saved_flows_come_back(make, tmp_path):
    flow = pf.Flow([perturb(make())])
    flow.save(tmp_path / "flow")
    again = pf.load_flow(tmp_path / "flow")
    assert repr(again) == repr(flow)
    context = torch.randn(2) if flow.context_dim else None
    x = torch.randn(4, *flow.event_shape)
    torch.testing.assert_close(again(context).log_prob(x), flow(context).log_prob(x), rtol=0, atol=0)


def test_states_go_between_solvers_but_not_between_traces_of_other_networks():
    fixed, adaptive = (pf.Flow([Continuous(2, (4, 4), solver=solver)]) for solver in (FixedSteps(3), Adaptive()))
    adaptive.load_state_dict(fixed.state_dict())
    with pytest.raises(pf.FlowError):
        pf.Flow([Continuous(2, (4, 5))]).load_state_dict(fixed.state_dict())


def test_which_flows_read_values():
    adaptive, fixed = Continuous(2), Continuous(2, solver=FixedSteps())
    assert adaptive.reads_values and not fixed.reads_values and fixed.exact().reads_values
    assert adaptive.inv.reads_values and not fixed.inv.reads_values
    assert pf.Flow([fixed, adaptive]).reads_values and not pf.flows.MAF(2).reads_values
    assert pf.flows.Mixture([pf.flows.MAF(2), pf.Flow([adaptive])]).reads_values


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_fixed_steps_are_the_same_in_programs(trace):
    t = continuous(2, (4, 4), solver=FixedSteps(3), trace=trace)
    z = torch.randn(5, 2, dtype=FLOAT64)
    torch.testing.assert_close(torch.func.vmap(t)(z), t(z))
    if trace == "exact":
        torch.testing.assert_close(torch.func.vmap(t.inverse_and_ladj)(z), t.inverse_and_ladj(z))


def test_adaptive_steps_cannot_be_recorded():
    flow = pf.Flow([Continuous(2, (4, 4))])
    with pytest.raises(pf.errors.UntraceableError, match="FixedSteps"):
        pf.fit_density(flow, torch.randn(50, 2), max_epochs=400, compile="trace", progress_bar=False)


def test_autocast_leaves_a_solve_as_it_is():
    t = continuous(2, dtype=torch.float32)
    z = torch.randn(5, 2)
    expected = t.forward_and_ladj(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(t.forward_and_ladj(z), expected, rtol=0, atol=0)

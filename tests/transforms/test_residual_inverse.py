"""The inverse of residual layers: its precision, its gradients, and where it runs."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import pyroflows as pf
from pyroflows.compiling.program import compiled
from pyroflows.errors import InversionError
from pyroflows.nets.lipschitz.contraction import Contraction
from pyroflows.transforms import Residual
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.residual import extrapolation, fixed_point
from pyroflows.transforms.residual.fixed_point import inverted, solved_transposed


def orthogonal(rows, columns):
    q = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns)).double())[0]
    return q if rows >= columns else q.T


def network(kind, dim, coefficient, dtype=torch.float64, width=16):
    """A network whose Lipschitz constant is about the coefficient, with large biases where it is not linear."""
    if kind == "rotation":
        weights, kind = [-coefficient * orthogonal(dim, dim)], "tanh"
    else:
        share = coefficient ** (1 / 3)
        shapes = [(width, dim), (width, width), (dim, width)]
        weights = [share * orthogonal(*shape) for shape in shapes]
        if kind == "lipswish":  # with hidden units of other scales, which the bound does not see
            weights = [scale * weight for scale, weight in zip((2, 1.5, 1 / 3), weights, strict=True)]
    offsets = [2 * torch.randn(len(weight)) for weight in weights]
    return Contraction(*([t.to(dtype) for t in part] for part in (weights, offsets)), kind)


def convolutional(dtype=torch.float64):
    kernels = [torch.randn(4, 2, 3, 3), torch.randn(2, 4, 3, 3)]
    kernels = [kernel * 0.98 / kernel.flatten(2).abs().sum(-1).sum().sqrt() for kernel in kernels]
    kernels = [0.98 * kernel / kernel.abs().sum((1, 2, 3)).max() for kernel in kernels]
    kernels = [kernel / max(1.0, float(kernel.abs().sum((0, 2, 3)).max())) for kernel in kernels]
    offsets = [torch.randn(4, 1, 1, dtype=dtype), torch.randn(2, 1, 1, dtype=dtype)]
    return Contraction([k.to(dtype) for k in kernels], offsets, "tanh")


def sizes(*vectors):
    return 1 + sum(torch.linalg.vector_norm(v.double(), dim=-1) for v in vectors)


def check_inverse(g, z, num_axes, coefficient):
    x = z + g(z)
    found = inverted(g, x, num_axes)
    rows, target, again = (t.flatten(-num_axes) for t in (found, x, found + g(found)))
    eps, size = torch.finfo(z.dtype).eps, sizes(rows, target)
    residual = torch.linalg.vector_norm((again - target).double(), dim=-1)
    # Rounding of the residual alone ends the iteration of rotations, where it adds up to 1 / (1 - c).
    limit = (4 + 1 / (1 - coefficient)) * eps * size
    assert (residual <= limit).all()
    error = torch.linalg.vector_norm((rows - z.flatten(-num_axes)).double(), dim=-1)
    assert (error <= (limit + 4 * eps * size) / (1 - coefficient)).all()
    return error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coefficient", [0.5, 0.97, 0.99])
@pytest.mark.parametrize("dim", [1, 2, 8, 32])
@pytest.mark.parametrize("kind", ["rotation", "lipswish", "sine", "tanh"])
def test_precision(kind, dim, coefficient, dtype):
    torch.manual_seed(dim)
    g = network(kind, dim, coefficient, dtype)
    error = check_inverse(g, 2 * torch.randn(20, dim, dtype=dtype), 1, coefficient)
    if kind != "rotation":
        assert error.max() < (1e-5 if dtype == torch.float32 else 1e-13)


def test_precision_in_many_dimensions():
    torch.manual_seed(0)
    for kind in ("rotation", "lipswish", "sine"):
        check_inverse(network(kind, 100, 0.97, width=64), torch.randn(3, 100).double(), 1, 0.97)


def test_precision_of_convolutions():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        check_inverse(convolutional(dtype), torch.randn(3, 2, 2, 5, 4, dtype=dtype), 3, 0.97)


@pytest.mark.parametrize("shape", [(), (7,), (3, 2, 7), (0,)])
def test_batch_shapes_and_contexts(shape):
    torch.manual_seed(0)
    t = perturbed(Residual(3, (8,), context_dim=2, log_det="exact"))
    z, context = torch.randn(*shape, 3).double(), torch.randn(*shape, 2).double()
    x, ladj = t.forward_and_ladj(z, context)
    again, inverse_ladj = t.inverse_and_ladj(x, context)
    torch.testing.assert_close(again, z)
    torch.testing.assert_close(inverse_ladj, -ladj)


def perturbed(t, scale=1.0):
    t = t.double()
    with torch.no_grad():
        for parameter in t.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return t


def test_gradients_of_a_linear_map():
    torch.manual_seed(0)
    weight = (0.97 * orthogonal(4, 4)).requires_grad_()
    offset = torch.randn(4).double().requires_grad_()
    x, c = torch.randn(5, 4).double().requires_grad_(), torch.randn(5, 4).double()

    def by_iteration(x, weight, offset):
        return inverted(Contraction([weight], [offset], "tanh"), x, 1)

    def explicitly(x, weight, offset):
        return torch.linalg.solve(torch.eye(4).double() + weight, (x - offset).mT).mT

    results = []
    for function in (by_iteration, explicitly):
        z = function(x, weight, offset)
        first = torch.autograd.grad((c * z**2).sum(), (x, weight, offset), create_graph=True)
        results.append([z, *first, *torch.autograd.grad(sum((f**2).sum() for f in first), (x, weight, offset))])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("max_dense_dim", [32, 0])  # linear systems by matrices, and by iteration
@pytest.mark.parametrize("kind", ["lipswish", "sine"])
def test_gradients_of_first_and_second_order(kind, max_dense_dim, monkeypatch):
    monkeypatch.setattr("pyroflows.transforms.residual.fixed_point.MAX_DENSE_DIM", max_dense_dim)
    torch.manual_seed(0)
    g = network(kind, 2, 0.9, width=3)
    parts = [t.requires_grad_() for t in (torch.randn(3, 2).double(), *g.weights, *g.offsets)]

    def inverse(x, *parts):
        return inverted(Contraction(parts[: len(g.weights)], parts[len(g.weights) :], kind), x, 1)

    assert torch.autograd.gradcheck(inverse, parts)
    assert torch.autograd.gradgradcheck(inverse, parts)


def test_gradients_of_convolutions():
    torch.manual_seed(0)
    g = convolutional()
    x = torch.randn(1, 2, 2, 3).double().requires_grad_()
    weights = [weight.requires_grad_() for weight in g.weights]

    def inverse(x, *weights):
        return inverted(Contraction(weights, g.offsets, "tanh"), x, 3)

    assert torch.autograd.gradcheck(inverse, (x, *weights))
    assert torch.autograd.gradgradcheck(inverse, (x, *weights), fast_mode=True)


def test_second_derivatives_of_the_log_density():
    torch.manual_seed(0)
    t = perturbed(Residual(2, (4,), context_dim=1, log_det="exact"), 0.3)
    inputs = torch.randn(3, 2).double().requires_grad_(), torch.randn(3, 1).double().requires_grad_()

    def log_density(x, context):
        z, ladj = t.inverse_and_ladj(x, context)
        return ladj - z.square().sum(-1) / 2

    assert torch.autograd.gradgradcheck(log_density, inputs)


def test_gradients_cost_one_linearisation_and_keep_no_iterations(monkeypatch):
    torch.manual_seed(0)
    counts, kept = [], []
    linearized = Contraction.linearized
    monkeypatch.setattr(Contraction, "linearized", lambda g, z: counts.append(1) or linearized(g, z))
    for coefficient in (0.1, 0.97):  # the second needs many times the iterations
        g = network("rotation", 32, coefficient)
        x = torch.randn(4, 32).double().requires_grad_()
        g.weights[0].requires_grad_()
        kept.append(0)

        def count(saved):
            kept[-1] += saved.numel()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
            z = inverted(g, x, 1)
        counts.clear()
        z.sum().backward()
        assert len(counts) == 1
    assert kept[0] == kept[1]


def test_many_gradients_at_once():
    torch.manual_seed(0)
    t = perturbed(Residual(3, (8,)))
    x = torch.randn(3).double().requires_grad_()
    z = t.inverse_and_ladj(x)[0]
    rows = torch.autograd.grad(z, x, torch.eye(3).double(), is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(
        rows, torch.stack([torch.autograd.grad(z[i], x, retain_graph=True)[0] for i in range(3)])
    )


def test_solved_transposed():
    torch.manual_seed(0)
    for g, shape in ((network("sine", 5, 0.97), (5,)), (convolutional(), (2, 3, 4))):
        z, right = torch.randn(3, *shape).double(), torch.randn(3, *shape).double()
        at = g.linearized(z)
        u = solved_transposed(at, right, len(shape))
        torch.testing.assert_close(u + at.transposed_times(u), right, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("log_det", ["exact", "roulette"])
def test_the_score_is_that_of_the_inverse(log_det):
    torch.manual_seed(0)
    t = perturbed(Residual(3, (8,), context_dim=2, log_det=log_det)).exact()
    z, score, context = torch.randn(4, 3).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    found = t.forward_and_score(z, score, context)
    with torch.enable_grad():
        expected = FlowTransform._forward_and_score(t, z.requires_grad_(), score, context)
    torch.testing.assert_close(found, expected)


# Where operations are recorded.


def loss_and_gradients(t):
    def function(x):
        z, ladj = t.inverse_and_ladj(x)
        loss = (z.square().sum(-1) / 2 - ladj).mean()
        return [loss.detach(), *torch.autograd.grad(loss, [p for p in t.parameters() if p.requires_grad])]

    return function


def test_a_recorded_step_holds_one_operator():
    torch.manual_seed(0)
    t = perturbed(Residual(33, (8,), activation="lipswish", log_det="exact"))
    function, others = loss_and_gradients(t), 3 * torch.randn(6, 33).double()
    program = compiled(function, [torch.randn(6, 33).double()], state=[t])
    torch.testing.assert_close(list(program(others)), function(others))
    graph = make_fx(function)(torch.randn(6, 33).double())
    torch.testing.assert_close(graph(others), function(others))
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("residual_inverse" in name for name in names) == 1
    assert sum("residual_solve" in name for name in names) == 1


@pytest.mark.slow
def test_compiled_in_full():
    torch.manual_seed(0)
    g = network("lipswish", 3, 0.97)
    parts = [part.requires_grad_() for part in (torch.randn(6, 3).double(), *g.weights, *g.offsets)]

    def loss(x):
        return inverted(g, x, 1).square().mean()

    found, expected = (f(parts[0]) for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, parts) for value in (found, expected)))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_traced_by_torchscript():
    torch.manual_seed(0)
    g = network("lipswish", 3, 0.9)
    trace = torch.jit.trace(lambda x: inverted(g, x, 1), torch.randn(4, 3).double())
    x = torch.randn(4, 3).double()
    torch.testing.assert_close(trace(x), inverted(g, x, 1))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_under_func():
    torch.manual_seed(0)
    g, x = network("lipswish", 3, 0.97), torch.randn(4, 3).double()

    def inverse(x):
        return inverted(g, x, 1)

    torch.testing.assert_close(torch.func.vmap(inverse)(x), inverse(x))
    jacobians = torch.stack([torch.autograd.functional.jacobian(inverse, row) for row in x])
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(torch.func.vmap(transform(inverse))(x), jacobians)
    hessians = torch.stack([torch.autograd.functional.hessian(lambda row: inverse(row).sum(), row) for row in x])
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        hessian = transform(torch.func.jacrev(lambda row: inverse(row).sum()))
        torch.testing.assert_close(torch.func.vmap(hessian)(x), hessians)


@pytest.mark.parametrize("kind", ["rotation", "sine"])
def test_hard_contractions_under_func(kind):
    torch.manual_seed(0)
    g = network(kind, 8, 0.99)
    z = torch.randn(20, 8).double()
    torch.testing.assert_close(torch.func.vmap(lambda x: inverted(g, x, 1))(z + g(z)), z, rtol=1e-10, atol=1e-10)


# Rows that have no solution, or nothing to do with each other.


@pytest.mark.parametrize("kind", ["lipswish", "sine", "tanh"])
def test_rows_that_are_no_numbers_stay_alone(kind):
    torch.manual_seed(0)
    g = network(kind, 3, 0.97)
    x = torch.randn(6, 3).double()
    expected = inverted(g, x, 1)
    bad = x.clone()
    bad[1, 0], bad[4, 2] = torch.nan, torch.inf
    is_bad = torch.tensor([False, True, False, False, True, False])
    recorded = make_fx(lambda x: inverted(g, x, 1))(x)
    for function in (lambda x: inverted(g, x, 1), torch.func.vmap(lambda x: inverted(g, x, 1)), recorded):
        found = function(bad)
        assert found[is_bad].isnan().all()
        torch.testing.assert_close(found[~is_bad], expected[~is_bad])
    assert inverted(g, torch.full_like(x, torch.nan), 1).isnan().all()
    line = network("rotation", 1, 0.5)
    assert inverted(line, torch.full((2, 1), torch.inf).double(), 1).isnan().all()


def test_far_rows():
    torch.manual_seed(0)
    g = network("lipswish", 3, 0.9, torch.float32)
    x = torch.tensor([[1e30, 0.0, 1.0], [1.0, 2.0, 3.0], [-1e12, 1e12, 0.0]])
    z = inverted(g, x, 1)
    assert ((z + g(z) - x).abs().amax(-1) < 1e-5 * x.abs().amax(-1)).all()


def test_rounding_within_the_network_is_tolerated():
    torch.manual_seed(0)
    g = network("sine", 3, 0.97, torch.float32)
    g.offsets[0].mul_(1e4)
    x = torch.randn(100, 3)
    z = inverted(g, x, 1)
    assert ((z + g(z) - x).norm(dim=-1) < 1e-2).all()


def test_a_row_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    g = network("lipswish", 4, 0.97)
    x = torch.randn(64, 4).double() * torch.logspace(-3, 3, 64)[:, None]
    together = inverted(g, x, 1)
    alone = torch.cat([inverted(g, row, 1) for row in x.split(1)])
    assert ((together - alone).norm(dim=-1) <= 64 * torch.finfo(x.dtype).eps * sizes(x)).all()


@pytest.mark.parametrize(("hidden_dims", "broken"), [((), 3.0), ((16, 16), 100.0)])
@pytest.mark.parametrize("dim", [1, 2, 8])
def test_a_broken_bound_raises(dim, hidden_dims, broken):
    torch.manual_seed(0)
    t = perturbed(Residual(dim, hidden_dims, activation="sine", log_det="exact"))
    torch.nn.init.orthogonal_(t.net.layers[-1].weight, gain=10)
    x = 3 * torch.randn(100, dim).double()
    assert t.inverse_and_ladj(x)[0].isfinite().all()
    t.net.coefficient = broken
    with pytest.raises(InversionError, match=r"missed its target by up to .* of 100 rows: .* no contraction"):
        t.inverse_and_ladj(x)
    recorded = compiled(lambda x: [t.inverse_and_ladj(x)[0].detach()], [x], state=[t])
    (z,) = recorded(x)
    assert z.isnan().any()
    assert z.isnan().any(-1).equal(z.isnan().all(-1))


def test_a_fit_that_diverged_gives_nan_for_its_guard():
    t = Residual(2, (8,), log_det="exact")
    with torch.no_grad():
        t.net.layers[0].weight.fill_(torch.nan)
    assert t.inverse_and_ladj(torch.randn(3, 2))[0].isnan().all()


def test_iterations_end(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(extrapolation, "MAX_CYCLES", 5)
    with pytest.raises(InversionError):
        inverted(network("rotation", 32, 0.99), torch.randn(4, 32).double(), 1)
    monkeypatch.setattr(fixed_point, "NUM_NEWTON_STEPS", 1)
    g = network("sine", 8, 0.99)
    assert torch.func.vmap(lambda x: inverted(g, x, 1))(torch.randn(2, 8).double()).isnan().any()


def test_the_inverse_of_a_flow_trains_as_a_density():
    torch.manual_seed(0)
    flow = pf.Flow([Residual(2, (16,), log_det="exact").inv])
    assert flow().log_prob(torch.randn(5, 2)).isfinite().all()
    assert flow().sample((5,)).isfinite().all()


def test_few_evaluations():
    torch.manual_seed(0)

    def num_evaluations(function, x):
        counts = []

        def counted(rows):
            return lambda z: counts.append(1) or (x if rows is None else x[rows]) - function(z)

        z, _, is_solved = extrapolation.fixed_points(counted, x, sizes(x), sizes(x))
        assert is_solved.all()
        torch.testing.assert_close(z + function(z), x)
        return len(counts)

    # Plain steps alone would take 3700, and 1200 in many dimensions.
    for dim in (1, 2, 8):
        matrix = -0.99 * orthogonal(dim, dim)
        assert num_evaluations(lambda z, matrix=matrix: z @ matrix, torch.randn(50, dim).double()) < 150
    axes = orthogonal(32, 32)
    matrix = axes * torch.linspace(-0.97, 0.97, 32).double() @ axes.T
    assert num_evaluations(lambda z: z @ matrix, torch.randn(50, 32).double()) < 250


def test_values_alone_need_no_log_determinant():
    torch.manual_seed(0)
    flow = pf.Flow([perturbed(Residual(2, (8,), context_dim=c, log_det="exact")).inv for c in (0, 3)]).double()
    context, z = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    law = flow(context)
    x = flow.transform.forward_and_ladj(z, context)[0]

    def fails(*_):
        raise AssertionError("a log-determinant is computed")

    fails.is_exact = True
    for layer in flow.modules():
        if isinstance(layer, Residual):
            layer.log_det = fails
    with torch.no_grad():
        bound = flow.transform.condition(context)
        torch.testing.assert_close(bound(z), x)
        torch.testing.assert_close(bound.inv(x), z)
        torch.testing.assert_close(flow.transform.base_value(x, context), z)
        assert law.sample().isfinite().all()
        assert Residual(2, (8,)).exact()(torch.randn(3, 2)).isfinite().all()

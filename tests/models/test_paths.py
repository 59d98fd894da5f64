"""Code for one draw, run for many: what it fills in place, and the paths that it takes."""

import math
from contextlib import nullcontext

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn
from torch.nn import functional as F

from pyroflows import ModelError
from pyroflows.models.batching import BatchedModel
from pyroflows.models.one_draw import CopiedReads, ManyPaths, WritesOutside
from pyroflows.models.paths import MAX_PATHS, DifferentPaths, run_paths


def run(function, inputs, **options):
    """The one result of all draws."""
    (results,) = run_paths(
        lambda x: ({"y": function(x)},), inputs, len(inputs), options.pop("places", set()), **options
    )
    return results["y"]


def singly(function, inputs):
    return torch.stack([function(x) for x in inputs])


# Tensors that are filled


def ways_to_fill():
    mask = torch.tensor([True, False, True])
    first = torch.tensor([0, 2])
    return {
        "entry": lambda y, x: y.__setitem__(0, x[0]),
        "slice": lambda y, x: y.__setitem__(slice(1, 3), x),
        "last": lambda y, x: y.__setitem__((..., -1), x[1]),
        "mask": lambda y, x: y.__setitem__(mask, x),
        "mask of draws": lambda y, x: y.__setitem__(x[0] > torch.arange(3.0) - 1, 2.0),
        "indices": lambda y, x: y.__setitem__(first, x),
        "sum": lambda y, x: y.add_(x.sum()),
        "entry of a view": lambda y, x: y[1:].neg_()[0].sub_(x[0]),
        "product": lambda y, x: y[:2].mul_(x),
        "copy": lambda y, x: y[1:].copy_(x),
        "fill": lambda y, x: y.fill_(x[0]),
        "masked fill": lambda y, x: y.masked_fill_(mask, x[0]),
        "masked scatter": lambda y, x: y.masked_scatter_(mask, x),
        "scatter": lambda y, x: y.scatter_(0, first, x),
        "scatter add": lambda y, x: y.scatter_add_(0, first, x),
        "index add": lambda y, x: y.index_add_(0, first, x),
        "index copy": lambda y, x: y.index_copy_(0, first, x),
        "index fill": lambda y, x: y.index_fill_(0, first, x[1]),
        "index put": lambda y, x: y.index_put_((first,), x, accumulate=True),
        "where": lambda y, x: y.copy_(torch.where(mask, x[0], y)),
        "square": lambda y, x: y.addcmul_(x[0], x[1]),
        "bound": lambda y, x: y.clamp_(min=x[0]),
    }


@pytest.mark.parametrize("fill", ways_to_fill().values(), ids=ways_to_fill())
def test_every_way_to_fill(fill):
    def function(x):
        y = torch.arange(3.0) + 1
        fill(y, x)
        return y

    x = torch.randn(6, 2, requires_grad=True)
    weights = torch.randn(6, 3)
    found, expected = run(function, x), singly(function, x)
    assert torch.allclose(found, expected)
    gradients = [
        torch.autograd.grad((weights * y).sum(), x, materialize_grads=True, allow_unused=True) if y.requires_grad else x
        for y in (found, expected)
    ]
    assert torch.allclose(gradients[0][0], gradients[1][0])


@pytest.mark.parametrize(
    "make",
    [
        lambda like: torch.zeros(3),
        lambda like: torch.ones(3),
        lambda like: torch.full((3,), 2.0),
        lambda like: torch.eye(3)[1],
        lambda like: torch.tensor([1.0, 2.0, 3.0]),
        lambda like: torch.arange(3.0),
        lambda like: torch.linspace(0, 1, 3),
        lambda like: torch.zeros_like(like),
        lambda like: torch.empty_like(like).zero_(),
        lambda like: like.clone(),
        lambda like: like.new_zeros(3),
        lambda like: like * 2,
        lambda like: torch.cat([like, like])[:3],
        lambda like: torch.stack([like, like]).unbind()[0],
        lambda like: like.double(),
        lambda like: like.long(),
        lambda like: like > 1,
    ],
)
def test_every_way_to_make(make):
    like = torch.tensor([0.5, 1.5, 2.5])

    def function(x):
        y = make(like)
        y[1:] = (2 * x).to(y.dtype)
        return y

    x = torch.randn(5, 2)
    assert torch.equal(run(function, x), singly(function, x))
    assert like.tolist() == [0.5, 1.5, 2.5]


def test_gradients_of_entries_that_later_writes_follow():
    """Torch itself refuses this without a clone, since the product keeps the tensor for its gradient."""

    def function(x):
        y = torch.zeros(5)
        y[0] = x[0]
        for t in range(1, 5):
            y[t] = x[1] * y[t - 1] + y[: t - 1].square().sum()
        return y

    def expected(x):
        y = [x[0]]
        for _ in range(1, 5):
            y.append(x[1] * y[-1] + sum(e.square() for e in y[:-1]))
        return torch.stack(y)

    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (run(function, x), singly(expected, x))]
    assert torch.allclose(*gradients)


def ways_to_alias():
    return {
        "float": lambda y: y.float(),
        "type": lambda y: y.type(torch.float32),
        "cpu": lambda y: y.cpu(),
        "as_tensor": torch.as_tensor,
        "asarray": lambda y: torch.asarray(y, requires_grad=y.requires_grad),
        "atleast_2d": lambda y: torch.atleast_2d(y)[0],
        "broadcast_to": lambda y: y.broadcast_to(4),
        "broadcast_tensors": lambda y: torch.broadcast_tensors(y, torch.ones(4))[0],
        "hsplit": lambda y: y.hsplit(2)[0],
        "vsplit": lambda y: torch.vsplit(y.view(4, 1), 2)[0][:, 0],
        "unsafe_chunk": lambda y: y.unsafe_chunk(2)[0],
        "positive": lambda y: +y,
        "resolve_conj": lambda y: y.resolve_conj(),
        "sum_to_size": lambda y: y.sum_to_size(4),
        "meshgrid": lambda y: torch.meshgrid(y, torch.ones(1), indexing="ij")[0][:, 0],
        "dropout": lambda y: F.dropout(y, training=False),
        "copy": lambda y: y.double(),
        "relu": lambda y: F.relu(y, inplace=True),
        "relu by position": lambda y: F.relu(y, True),
        "module": nn.ReLU(inplace=True),
    }


@pytest.mark.parametrize("context", [nullcontext, CopiedReads])
@pytest.mark.parametrize("alias", ways_to_alias().values(), ids=ways_to_alias())
def test_aliases_of_filled_tensors(alias, context):
    """Gradients need copies of what operations read, but what a function returns can be its argument itself."""

    def function(x):
        y = torch.zeros(4)
        y[0] = x[0]
        z = alias(y)
        z[0] += x[1].to(z.dtype)
        z[1] = x[1]
        return y

    x = torch.randn(6, 2)
    expected = singly(function, x)
    x.requires_grad_()
    with context():
        found = run(function, x) if context is nullcontext else singly(function, x)
    assert torch.equal(found, expected)


def test_only_tensors_that_are_filled_differ_between_draws():
    sizes = []

    def function(x):
        y, other = torch.zeros(2), torch.zeros(2)
        y[:] = x
        sizes.append([torch._C._functorch.is_batchedtensor(t) for t in (y, other)])
        return y + other

    places = set()
    for _ in range(2):
        run(function, torch.randn(3, 2), places=places)
    assert len(places) == 1
    assert sizes == [[True, False]] * 2


def test_a_tensor_of_the_user_is_not_changed():
    data = torch.zeros(2)

    def function(x):
        data[:] = x
        return data

    with pytest.raises(WritesOutside, match=r"did not make at test_paths.py:\d+, `data\[:\] = x`.*clone"):
        run(function, torch.ones(3, 2))
    assert data.tolist() == [0.0, 0.0]


def test_a_model_that_writes_into_a_tensor_of_the_user_is_refused():
    data = torch.zeros(3)

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        data[1] = x
        pyro.sample("y", dist.Normal(data, 1.0).to_event(1), obs=torch.zeros(3))

    with pytest.raises(ModelError, match="did not make at test_paths.py"):
        BatchedModel(model, (), {}, {"x": torch.randn(5)})


def test_transformations_inside_of_the_function():
    def function(x):
        y = torch.zeros(3)
        y += x.sum()
        gradient = torch.func.grad(lambda y: y.square().sum())(y)
        return torch.func.vmap(lambda e: e * torch.zeros(2) + x)(y).sum(-1) + gradient

    x = torch.randn(4, 2)
    assert torch.allclose(run(function, x), singly(function, x))


# Branches


def test_gradients_of_the_path_that_is_not_taken_do_not_count():
    """Where it is not taken, its gradients may be NaN."""

    def function(x):
        return x.sqrt() + x.log() if x > 0 else x.square()

    x = torch.tensor([4.0, -2.0, 0.0], requires_grad=True)
    y = run(function, x)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert y.tolist() == pytest.approx([2 + torch.tensor(4.0).log().item(), 4.0, 0.0])
    assert gradient.tolist() == pytest.approx([0.5, -4.0, 0.0])
    assert second.tolist() == pytest.approx([-1 / 32 - 1 / 16, 2.0, 2.0])


def test_paths_through_several_conditions():
    def function(x):
        y = torch.zeros(2)
        y[0] = max(x[0], x[1])
        if not x[0] < x[1] and (x[2] > 0).item():
            y[1] += 3
        elif 0 < x[2] < 1:
            y[1] = x[2]
        return y

    x = torch.randn(50, 3)
    assert torch.equal(run(function, x), singly(function, x))


def test_a_condition_that_was_answered_is_not_asked_again():
    def function(x):
        return sum(x[1] if x[0] > 0 else t * x[2] for t in range(20))

    x = torch.randn(10, 3)
    assert torch.allclose(run(function, x), singly(function, x))


def test_a_condition_on_other_numbers_is_asked_again():
    def function(x):
        y = x.clone()
        first = y[0] > 0
        y[0] = -y[0]
        return torch.stack([y[1] if first else y[2], y[2] if y[0] > 0 else y[1]])

    x = torch.randn(10, 3)
    assert torch.equal(run(function, x), singly(function, x))


def ways_to_change():
    return {
        "and": lambda condition, x: condition.__iand__(x[1] > 0),
        "or": lambda condition, x: condition.__ior__(x[1] > 0),
        "xor": lambda condition, x: condition.__ixor__(x[1] > 0),
        "method": lambda condition, x: condition.logical_and_(x[1] > 0),
        "view": lambda condition, x: condition.view(1).logical_not_(),
        "copy": lambda condition, x: condition.copy_(x[1] > 0),
    }


@pytest.mark.parametrize("change", ways_to_change().values(), ids=ways_to_change())
def test_a_condition_that_was_written_into_is_asked_again(change):
    def function(x):
        condition = x[0] > 0
        first = 1.0 if condition else 2.0
        change(condition, x)
        return torch.tensor([first, 3.0 if condition else 4.0])

    x = torch.randn(20, 2)
    assert torch.equal(run(function, x), singly(function, x))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda x: x[0] > 3, lambda x: x[0].view(torch.int32) > 3),
        (lambda x: torch.gt(x[0], other=x[1]), lambda x: torch.gt(x[0], other=-x[1])),
    ],
    ids=["type", "named operand"],
)
def test_a_comparison_of_other_numbers_is_another_condition(first, second):
    def function(x):
        return torch.tensor([1.0 if first(x) else 2.0, 3.0 if second(x) else 4.0])

    x = torch.randn(20, 2)
    assert torch.equal(run(function, x), singly(function, x))


def test_conditions_on_entries_of_filled_tensors_are_recognised_under_gradients():
    def function(x):
        y = torch.zeros(2)
        y[:] = x
        return sum(x[1] if y[0] > 0 else t * x[1] for t in range(20))

    x = torch.randn(10, 2, requires_grad=True)
    assert torch.allclose(run(function, x), singly(function, x))


def test_conditions_that_all_draws_share_are_none():
    seen = []

    def function(x):
        seen.append(1)
        return x if torch.ones(()) > 0 else -x

    assert run(function, torch.ones(3)).tolist() == [1.0] * 3
    assert len(seen) == 1


def test_all_paths_draw_the_same_numbers():
    def function(x):
        z = torch.randn(())
        sign = 1.0 if z > 0 else -1.0 - 0 * torch.randn(())
        return torch.stack([z, torch.as_tensor(sign)])

    y = run(function, torch.zeros(100), seed=0)
    assert torch.equal(y[:, 0].sign(), y[:, 1])
    assert len(set(y[:, 0].tolist())) == 100


@pytest.mark.parametrize("function", [lambda x: sum(x if x > t else 0 * x for t in range(9)), lambda x: halved(x)])
def test_too_many_paths(function):
    with pytest.raises(ManyPaths, match=f"more than {MAX_PATHS - 1} conditions"):
        run(function, torch.ones(3))


def halved(x):
    while x < 1e9:
        x = x / 2
    return x


def test_too_many_paths_of_few_conditions():
    def function(x):
        return sum(e if e > 0 else -e for e in x)

    with pytest.raises(ManyPaths, match=f"more than {MAX_PATHS} paths"):
        run(function, torch.ones(3, 5))


def test_paths_of_other_shapes():
    with pytest.raises(DifferentPaths):
        run(lambda x: torch.zeros(2) if x > 0 else torch.zeros(3), torch.ones(3))


def choosing():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Normal(3.0 if x > 0 else -3.0, 1.0))
    mean = torch.zeros(2)
    mean[0] = z
    pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=torch.zeros(2))


def test_draws_of_a_model_with_a_branch():
    batched = BatchedModel(choosing, (), {}, {}, draw=True)
    assert batched.mode == "paths"
    torch.manual_seed(0)
    values = batched.in_chunks({}, 4000).values
    x, z, y = values["x"], values["z"], values["y"]
    error = 4.5 / 4000**0.5
    assert abs(x.mean()) < error
    residual = z - 3 * x.sign()
    assert abs(residual.mean()) < error
    assert abs(residual.square().mean() - 1) < error * 2**0.5
    assert abs((y[:, 0] - z).mean()) < 0.5 * error
    assert abs((y[:, 0] - z).square().mean() - 0.25) < 0.25 * error * 2**0.5
    again = batched.in_chunks({}, 4000).values["x"]
    assert not set(x.tolist()) & set(again.tolist())


def test_examples_on_one_side_of_a_branch_over_all_draws():
    """A condition such as ``all`` can be asked of the whole batch, which gives all draws one answer."""

    def model():
        x = pyro.sample("x", dist.Normal(4.0, 1.0))
        pyro.sample("y", dist.Normal(x if (x > 0).all() else -2 * x, 1.0), obs=torch.tensor(1.0))

    batched = BatchedModel(model, (), {}, {"x": torch.linspace(3.0, 5.0, 5)})
    found = batched({"x": torch.tensor([2.0, -3.0])}, 2).log_probs["y"]
    assert torch.equal(found, dist.Normal(torch.tensor([2.0, 6.0]), 1.0).log_prob(torch.tensor(1.0)))


def filled(change):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        y = torch.zeros(4)
        y[0] = x
        y[1] = -x
        z = change(y)
        z[2] = x
        pyro.sample("o", dist.Normal(y, 1.0).to_event(1), obs=torch.tensor([-3.0, 2.0, 0.0, 1.0]))

    return model


@pytest.mark.parametrize("name", ["float", "atleast_2d", "relu", "module"])
def test_the_log_joint_of_filled_tensors_with_and_without_gradients(name):
    batched = BatchedModel(filled(ways_to_alias()[name]), (), {}, {"x": torch.randn(5)})
    assert batched.mode == "paths"
    x = torch.tensor([0.7, -1.0], requires_grad=True)
    found = batched({"x": x}, 2).log_probs["o"]
    with torch.no_grad():
        without = batched({"x": x}, 2).log_probs["o"]
    y = torch.stack([x, -x, x, 0 * x], -1)
    if name in ("relu", "module"):
        y[:, :2] = y[:, :2].relu()
    expected = dist.Normal(y, 1.0).to_event(1).log_prob(torch.tensor([-3.0, 2.0, 0.0, 1.0]))
    assert torch.allclose(found, expected)
    assert torch.allclose(without, expected)
    assert torch.allclose(*[torch.autograd.grad(v.sum(), x)[0] for v in (found, expected)])


@pytest.mark.parametrize("is_right", [True, False])
def test_a_way_that_is_wrong_only_under_gradients_is_not_taken(is_right):
    class Twice(torch.autograd.Function):
        """The gradient of a batch is another than that of a draw."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.is_batch = torch._C._functorch.is_functorch_wrapped_tensor(inputs[0])

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (2 if ctx.is_batch and not is_right else 1)

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("o", dist.Normal(Twice.apply(x) if x > 0 else -x, 1.0), obs=torch.tensor(1.0))

    with nullcontext() if is_right else pytest.warns(UserWarning, match="where gradients are computed"):
        batched = BatchedModel(model, (), {}, {"x": torch.linspace(-1.0, 1.0, 5)})
    assert batched.mode == ("paths" if is_right else "loop")


def test_more_paths_than_the_examples_had():
    """Rows of a minibatch can have more conditions than those of the first run."""
    limits = torch.tensor([0.0] * 3 + [0.1 * i for i in range(12)])

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 15, subsample_size=3) as rows:
            y = sum(x if x > limit else -x for limit in (limits[rows] if rows[0] == 0 else limits[3:]).tolist())
            pyro.sample("o", dist.Normal(y, 1.0), obs=torch.zeros(3))

    batched = BatchedModel(model, (), {}, {"x": torch.randn(5)}, subsample={"rows": torch.arange(3)})
    assert batched.mode == "paths"
    with pytest.warns(UserWarning, match="paths|conditions"):
        found = batched({"x": torch.tensor([0.55, -1.0])}, 2, {"rows": torch.arange(3) + 3}).log_probs["o"]
    y = torch.tensor([0.0, 12.0])
    assert torch.allclose(found, 5 * dist.Normal(y, 1.0).log_prob(torch.tensor(0.0))[:, None].expand(2, 3), atol=1e-4)


def test_random_numbers_in_a_branch_that_no_example_takes():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        y = F.dropout(x * torch.ones(20), 0.1).mean() if x > 5 else x
        pyro.sample("o", dist.Normal(y, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ModelError, match="no fixed log joint.*'o'"):
        BatchedModel(model, (), {}, {"x": torch.linspace(-1.0, 1.0, 5)})


def test_random_numbers_in_a_branch_that_have_no_effect():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 0:
            torch.randn(())
        pyro.sample("o", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    def subsampled():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 50, subsample_size=5) as rows:
            pyro.sample("o", dist.Normal(x if x > 0 else -x, 1.0), obs=torch.arange(50.0)[rows])

    examples = {"x": torch.linspace(-2.0, -1.0, 5)}
    assert BatchedModel(model, (), {}, examples).mode == "paths"
    assert BatchedModel(subsampled, (), {}, examples, subsample={"rows": torch.arange(5)}).mode == "paths"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


@pytest.mark.parametrize("x", [torch.tensor([4.0, -2.0, 0.5]), torch.tensor([-1.0, -2.0, -0.5])], ids=["both", "one"])
@pytest.mark.parametrize("is_read_first", [True, False])
def test_gradients_of_parameters_from_paths_that_are_not_taken(x, is_read_first):
    """They may be NaN, in a path that only some draws take, and in one that none takes."""
    p, q, layers = torch.tensor(1.5, requires_grad=True), torch.tensor([2.0, -3.0], requires_grad=True), net()

    def function(x):
        before = q.exp().sum() if is_read_first else 0.0
        y = (x * p).sqrt() + (x * q[:1]).log().sum() + (q[0] + x).sqrt() if x > 0 else p * x
        z = torch.zeros(2)
        z[0] = p
        z[1] = y
        return layers(z) + before + y * q.prod()

    leaves = [p, q, *layers.parameters()]
    weights = torch.randn(3, 1)
    found, expected = [
        torch.autograd.grad((weights * values).sum(), leaves, allow_unused=True, materialize_grads=True)
        for values in (run(function, x), singly(function, x))
    ]
    assert all(torch.allclose(a, b) and b.isfinite().all() for a, b in zip(found, expected, strict=True))


class LogInContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(p)
        return p.log()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / ctx.saved_tensors[0]


class LogWithRule(LogInContext):
    generate_vmap_rule = True

    @staticmethod
    def forward(p):
        return p.log()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


@pytest.mark.parametrize("log", [LogInContext, LogWithRule])
@pytest.mark.parametrize("is_read_first", [True, False])
def test_gradients_of_parameters_that_functions_of_the_user_read(log, is_read_first):
    p = torch.tensor(0.5, requires_grad=True)

    def function(x):
        before = log.apply(p) if is_read_first else 0.0
        return log.apply(p) * x.log() + before if x > 0 else x * p + before

    y = run(function, torch.tensor([2.0, -1.0]))
    expected = math.log(2.0) / 0.5 - 1.0 + (2 / 0.5 if is_read_first else 0.0)
    assert torch.autograd.grad(y.sum(), p)[0].item() == pytest.approx(expected)


def test_gradients_of_parameters_of_unused_paths_that_no_draw_reaches():
    p = torch.tensor(1.5, requires_grad=True)
    y = run(lambda x: (p - 2).sqrt() if x > 0 else p * x, torch.tensor([-1.0, -2.0]))
    assert torch.autograd.grad(y.sum(), p)[0].item() == -3.0


def test_parameters_of_code_without_branches_are_shared_by_all_draws():
    p, seen = torch.tensor(1.5, requires_grad=True), []

    def function(x):
        y = torch.zeros(2)
        y[0] = x
        seen.append(torch._C._functorch.is_batchedtensor(p * 2))
        return y * p

    run(function, torch.ones(3))
    assert not any(seen)


def test_a_fit_with_parameters_and_branches():
    def model():
        p = pyro.param("p", torch.tensor(1.5), constraint=dist.constraints.positive)
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        m = (x * p).sqrt() if x > 0.05 else p * 0.5
        pyro.sample("o", dist.Normal(m, 1.0), obs=torch.tensor(1.0))

    pyro.clear_param_store()
    batched = BatchedModel(model, (), {}, {"x": torch.linspace(-1.0, 1.0, 5)})
    assert batched.mode == "paths"
    batched({"x": torch.tensor([-1.0, -2.0])}, 2).log_probs["o"].sum().backward()
    # d/dp of -(1 - p / 2)^2 / 2 is (1 - p / 2) / 2, here twice, and times p for its logarithm
    assert pyro.get_param_store().named_parameters()
    (gradient,) = [t.grad for _, t in pyro.get_param_store().named_parameters()]
    assert gradient.item() == pytest.approx(1.5 * 0.25)

"""Outside of its support the density of a flow is zero, or an error where values are validated."""

import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.distributions import transforms as torch_transforms
from torch.func import grad, vmap

import pyroflows as pf
from pyroflows.compiling.record import Recorder
from pyroflows.flows.facts import facts_of
from pyroflows.transforms.codomain import is_inside, is_met, point_inside
from tests.transforms.registry import perturb

cat, stack, interval = constraints.cat, constraints.stack, constraints.interval
INF = math.inf

# A support with a row inside of it, rows outside of it, and rows at a closed end.
SUPPORTS = {
    "positive": (constraints.positive, [0.5, 1.0], [[-1.0, 1.0], [0.0, 1.0]], []),
    "nonnegative": (constraints.nonnegative, [0.5, 1.0], [[-1.0, 1.0]], [[0.0, 1.0], [INF, 1.0]]),
    "at-least": (constraints.greater_than_eq(2.0), [2.5, 3.0], [[1.0, 3.0]], [[2.0, 3.0]]),
    "less-than": (constraints.less_than(1.0), [0.5, -3.0], [[1.0, 0.0], [0.5, 2.0]], []),
    "unit": (constraints.unit_interval, [0.5, 0.2], [[-1.0, 0.5], [0.5, 2.0]], [[0.0, 0.5], [0.5, 1.0]]),
    "interval": (interval(-2.0, 3.0), [0.5, -1.0], [[-3.0, 0.5], [4.0, 4.0]], [[-2.0, 0.5], [3.0, 0.5]]),
    "half-open": (constraints.half_open_interval(0.0, 1.0), [0.5, 0.2], [[1.0, 0.5], [-1.0, 0.5]], [[0.0, 0.5]]),
    "tensors": (
        interval(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])),
        [0.5, 2.5],
        [[2.5, 0.5], [0.5, 3.5]],
        [[1.0, 2.5], [0.5, 2.0]],
    ),
    "cat": (
        cat([constraints.positive, constraints.unit_interval], dim=-1),
        [3.0, 0.3],
        [[-3.0, 0.3], [3.0, 3.0], [0.0, 0.3]],
        [[3.0, 0.0]],
    ),
    "partly-real": (cat([constraints.real, constraints.positive], dim=-1), [-3.0, 0.3], [[-3.0, -3.0]], []),
    "stack": (
        stack([constraints.positive, constraints.unit_interval], dim=-1),
        [3.0, 0.3],
        [[-3.0, 0.3], [3.0, 3.0]],
        [[3.0, 1.0]],
    ),
}
# Constraints on whole vectors.
SUPPORTS |= {
    "ordered": (dist.constraints.ordered_vector, [-0.5, 1.0], [[1.0, 0.5], [0.5, 0.5]], []),
    "positive-ordered": (dist.constraints.positive_ordered_vector, [0.5, 1.0], [[-0.5, 1.0], [1.0, 0.5]], []),
}
all_supports = pytest.mark.parametrize("name", SUPPORTS)


@pytest.fixture(autouse=True)
def _with_validation():
    with pyro.validation_enabled(True):
        yield


def make(name, context_dim=0):
    """A flow, and rows of which the first is inside of its support."""
    support, inside, outside, closed = SUPPORTS[name]
    flow = pf.flows.NSF(len(inside), num_layers=2, hidden_dims=(8,), support=support, context_dim=context_dim)
    return perturb(flow, 0.2), torch.tensor([inside, *outside, *closed])


@all_supports
def test_density_without_validation(name):
    flow, x = make(name)
    with pyro.validation_enabled(False):
        log_q = flow().log_prob(x)
        z = flow().latent(x)
    assert log_q[0].isfinite() and log_q[1:].tolist() == [-INF] * (len(x) - 1)
    assert z[0].isfinite().all() and z[1:].isnan().all()
    assert flow.transform.inv(x)[1:].isnan().all()


@all_supports
def test_density_with_validation(name):
    flow, x = make(name)
    num_outside = len(SUPPORTS[name][2])
    for row in x[1 : 1 + num_outside]:
        for score in (flow().log_prob, flow().latent):
            with pytest.raises(ValueError, match="to be within the support"):
                score(row)
    for row in x[1 + num_outside :]:
        assert flow().log_prob(row) == -INF and flow().latent(row).isnan().all()


@all_supports
def test_gradients_are_those_of_the_rows_inside(name):
    flow, x = make(name)
    parameters = list(flow.parameters())
    with pyro.validation_enabled(False):
        found, expected = (
            torch.autograd.grad(flow().log_prob(rows).sum(), [rows, *parameters])
            for rows in (x.clone().requires_grad_(), x[:1].clone().requires_grad_())
        )
    assert (found[0][1:] == 0).all()
    for one, other in zip([found[0][:1], *found[1:]], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@all_supports
def test_density_under_vmap_needs_no_validation(name):
    flow, x = make(name)
    log_q = vmap(lambda row: flow().log_prob(row))(x)
    assert log_q[0].isfinite() and (log_q[1:] == -INF).all()
    slopes = vmap(grad(lambda row: flow().log_prob(row)))(x)
    assert slopes[0].isfinite().all() and (slopes[1:] == 0).all()


@pytest.mark.parametrize("name", ["ordered_vector", "positive_ordered_vector"])
def test_a_flow_of_ordered_vectors_integrates_to_one_and_is_fitted(name):
    torch.manual_seed(0)
    support = getattr(dist.constraints, name)
    flow = pf.flows.MAF(2, num_layers=1, hidden_dims=(4,), support=support).double()
    x = torch.randn(500, 2).exp().sort(-1).values.double()
    pf.fit_density(flow, x, max_epochs=2, seed=0, progress_bar=False)
    assert support.check(flow().sample((1000,))).all()
    u = torch.linspace(-8.0, 8.0, 801, dtype=torch.float64)
    rows = torch.cartesian_prod(u, u)  # by ladj of biject_to, an integral over the plane
    onto = torch.distributions.biject_to(support)
    log_p = flow().log_prob(onto(rows)) + onto.log_abs_det_jacobian(rows, onto(rows)).reshape(len(rows), -1).sum(-1)
    assert (log_p.exp().sum() * (u[1] - u[0]) ** 2 - 1).abs() < 0.01


def test_supports_of_other_sizes_are_refused():
    for name, words in [
        ("simplex", "3 columns on the support .* only 2 free"),
        ("corr_cholesky", "is one of matrices"),
    ]:
        with pytest.raises(pf.ShapeError, match=words):
            pf.flows.MAF(3, support=getattr(dist.constraints, name))
    with pytest.raises(pf.OptionError, match="has a bijection, got LowerCholesky"):
        pf.flows.MAF(3, support=dist.constraints.lower_cholesky)
    for part in (dist.constraints.ordered_vector, dist.constraints.positive_ordered_vector):
        with pytest.raises(pf.OptionError, match="constrains whole vectors"):
            pf.flows.MAF(3, support=cat([part, constraints.positive], dim=-1, lengths=[2, 1]))


def test_parts_of_a_support_that_are_declared_for_vectors_count_for_their_elements():
    support = cat([constraints.real_vector, constraints.positive], dim=-1, lengths=[2, 1])
    flow = pf.flows.MAF(3, num_layers=1, support=support)
    assert flow().log_prob(torch.tensor([-1.0, -1.0, 1.0])).isfinite()


def test_density_with_a_context_and_of_other_views():
    flow, x = make("unit", context_dim=3)
    with pyro.validation_enabled(False):
        law = flow(torch.randn(len(x), 3))
        expected = flow(law.context).log_prob(x)
        assert expected[0].isfinite() and (expected[1:] == -INF).all()
        for other in (law.expand((2, len(x))), law.estimated()):
            assert ((other.log_prob(x) == -INF) == (expected == -INF)).all()
        by_torch = dist.TransformedDistribution(law.base_dist, law.transforms, validate_args=False).log_prob(x)
    assert by_torch[0].isfinite() and not by_torch[1:].isfinite().any()


def test_density_in_a_recorded_step():
    """A step is recorded where all rows are inside, and runs with others."""
    flow, x = make("positive")
    parameters = list(flow.parameters())
    rows = x[:1].repeat(3, 1)
    recorder = Recorder([rows], parameters)
    with recorder:
        flow().estimated().log_prob(rows)
    with pyro.validation_enabled(False):
        assert (flow().estimated().log_prob(x) == -INF).tolist() == [False, True, True]
    assert any(operation.function is torch.ops.aten.where.self for operation in recorder.varying())


BOUNDED_BASES = {
    "exponential": dist.Exponential(torch.ones(2)).to_event(1),
    "expanded": dist.Exponential(1.0).expand([2]).to_event(1),
    "half-normal": dist.HalfNormal(torch.ones(2)).to_event(1),
    "gamma": dist.Gamma(2 * torch.ones(2), torch.ones(2)).to_event(1),
    "uniform": dist.Uniform(torch.zeros(2), torch.ones(2)).to_event(1),
    "beta": dist.Beta(2 * torch.ones(2), torch.ones(2)).to_event(1),
    "dirichlet": dist.Dirichlet(2 * torch.ones(2)),
    "log-normal": dist.LogNormal(torch.zeros(2), torch.ones(2)).to_event(1),
    "weibull": dist.Weibull(torch.ones(2), torch.ones(2)).to_event(1),
    "kumaraswamy": dist.Kumaraswamy(torch.ones(2), 2 * torch.ones(2)).to_event(1),
    "pareto": dist.Pareto(0.1 * torch.ones(2), torch.ones(2)).to_event(1),
    "mixture": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Uniform(torch.zeros(2, 2), torch.ones(2, 2)).to_event(1)
    ),
}


@pytest.mark.parametrize("name", BOUNDED_BASES)
def test_density_of_a_bounded_base(name):
    base = BOUNDED_BASES[name]
    flow = pf.Flow([pf.transforms.Permutation([1, 0])], base=base)
    flow.standardization.log_scale.data.fill_(math.log(2.0))
    x = torch.tensor([[1.2, 0.8], [-1.0, 0.5], [0.0, 0.5]]).requires_grad_()
    with pyro.validation_enabled(False):
        log_q = flow().log_prob(x)
        torch.testing.assert_close(log_q[0], base.log_prob(x[0].flip(-1) / 2) - 2 * math.log(2))
        assert log_q[1] == -INF and not log_q.isnan().any()
        slopes = torch.autograd.grad((log_q + 0 * x.sum(-1))[:2].sum(), x)[0]
    assert slopes[0].isfinite().all() and (slopes[1] == 0).all()
    with pytest.raises(ValueError, match="to be within the support"):
        flow().log_prob(x[1])


STACKS = {
    "nested": (
        [torch_transforms.ExpTransform(), torch_transforms.AffineTransform(3.0, 2.0), torch_transforms.ExpTransform()],
        [[30.0, 40.0], [5.0, 40.0], [-1.0, 40.0], [0.0, 40.0]],
    ),
    "power": ([torch_transforms.ExpTransform(), torch_transforms.PowerTransform(torch.tensor(2.0))], [[2, 3], [-1, 3]]),
    "scaled": (
        [torch_transforms.SigmoidTransform(), torch_transforms.AffineTransform(-1.0, 2.0)],
        [[-0.5, 0.9], [-1.0, 0.5], [2.0, 0.5]],
    ),
    "tanh": ([torch_transforms.TanhTransform()], [[-0.5, 0.9], [-1.0, 0.5], [2.0, 0.5]]),
}


@pytest.mark.parametrize("name", STACKS)
def test_density_behind_a_bounded_layer(name):
    """The last layer need not be the bounded one."""
    layers, rows = STACKS[name]
    flow = pf.Flow([pf.transforms.Planar(2), *layers])
    x = torch.tensor(rows, dtype=torch.float32).requires_grad_()
    with pyro.validation_enabled(False):
        log_q = flow().log_prob(x)
        expected = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), layers).log_prob(x[0])
        torch.testing.assert_close(log_q[0], expected)
        assert (log_q[1:] == -INF).all() and flow().latent(x)[1:].isnan().all()
    assert (torch.autograd.grad(log_q.sum(), x)[0][1:] == 0).all()


def test_support_of_an_inverse_and_of_a_conditioned_layer():
    layer = pf.Flow([pf.transforms.Planar(1, context_dim=1)], support=constraints.positive).transform
    conditioned = layer.condition(torch.zeros(1))
    assert facts_of(conditioned.codomain) == facts_of(layer.inv.domain) == facts_of(layer.codomain)
    assert facts_of(conditioned.domain) == facts_of(layer.inv.codomain) == facts_of(layer.domain)
    assert facts_of(layer.domain) != facts_of(layer.codomain)
    assert not layer.is_onto_reals and layer.inv.is_onto_reals


def test_data_outside_of_the_support_cannot_be_adapted_to():
    flow, x = make("unit")
    with pytest.raises(pf.errors.DataError):
        flow.adapt(x)


AFTER_IMPORT = """
import pyro.distributions as dist, torch, pyroflows as pf
base = dist.Exponential(torch.ones(1)).to_event(1)
flows = [pf.Flow([pf.transforms.Permutation([0])], base=base), pf.flows.MAF(1, support=dist.constraints.positive)]
def scores():
    found = []
    for flow in flows:
        for value in (1.0, 0.0, -1.0):
            try:
                found.append(flow().log_prob(torch.tensor([value])).item())
            except ValueError:
                found.append("error")
    return found
before = scores()
import zuko
assert before == scores() and before.count("error") == 3, (before, scores())
"""


def test_density_does_not_depend_on_a_later_import_of_zuko():
    pytest.importorskip("zuko")
    subprocess.run([sys.executable, "-W", "ignore", "-c", AFTER_IMPORT], check=True)


# The constraints themselves


def test_insides_of_events_with_several_axes_and_parts():
    x = torch.tensor([[[0.5, 1.0], [2.0, 3.0]], [[0.5, -1.0], [2.0, 3.0]]])
    for constraint in (constraints.positive, constraints.independent(constraints.positive, 2)):
        assert is_inside(constraint, x, num_axes=2).tolist() == [True, False]
        assert is_inside(constraint, x, num_axes=1).tolist() == [[True, True], [False, True]]
    parts = cat([constraints.simplex, constraints.positive], dim=-1, lengths=[2, 1])
    rows = torch.tensor([[0.2, 0.8, 1.0], [0.2, 0.9, 1.0], [0.0, 1.0, 1.0], [0.2, 0.8, -1.0]])
    assert is_inside(parts, rows, num_axes=1).tolist() == [True, False, False, False]
    assert is_met(constraints.simplex, rows[:, :2], num_axes=1).tolist() == [True, False, True, True]
    assert is_inside(constraints.corr_cholesky, torch.eye(2)[None], num_axes=2).tolist() == [True]
    unknown = constraints.dependent_property(lambda self: None)
    assert point_inside(constraints.simplex, rows, num_axes=1).tolist() == pytest.approx([1 / 3] * 3)
    assert point_inside(unknown, rows, num_axes=1) is rows

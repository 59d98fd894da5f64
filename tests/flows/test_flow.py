"""Flows: their densities, their use in Pyro programs, and transforms of other libraries in them."""

import copy
import math
import pickle
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms as pyro_transforms
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from pyro.optim.clipped_adam import ClippedAdam
from torch import nn
from torch.distributions import Distribution, ReshapeTransform, constraints
from torch.distributions import transforms as torch_transforms

from pyroflows import flows
from pyroflows.errors import InexactError, InversionError, OptionError, ShapeError
from pyroflows.flows import Flow, FlowDistribution
from pyroflows.flows.conversion import as_flow
from pyroflows.transforms import Elementwise, FlowTransform, Planar, Standardize
from pyroflows.transforms.memory import Memory
from tests.transforms.examples import EstimatedScale
from tests.transforms.registry import perturb

CONTEXT_DIM = 3
RECIPES = {
    "planar": lambda dim, **options: flows.Planar(dim, num_layers=3, **options),
    "radial": lambda dim, **options: flows.Radial(dim, num_layers=3, **options),
    "sylvester": lambda dim, **options: flows.Sylvester(dim, num_layers=2, rank=min(dim, 2), **options),
    "iaf": lambda dim, **options: flows.IAF(dim, num_layers=2, hidden_dims=(16,), **options),
    "maf": lambda dim, **options: flows.MAF(dim, num_layers=2, hidden_dims=(16,), **options),
    "gaussian": flows.Gaussian,
}


def _multivariate_normal(dim):
    factor = torch.eye(dim) + 0.3 * torch.ones(dim, dim).tril(-1)
    return dist.MultivariateNormal(torch.full((dim,), 0.5), factor @ factor.T)


def _laplace(dim):
    return dist.Laplace(torch.zeros(dim), torch.ones(dim)).to_event(1)


def _mixture(dim):
    component = dist.Normal(torch.tensor([[-2.0], [0.0], [1.5]]).expand(3, dim), torch.ones(3, dim)).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), component)


BASES = {
    "normal": lambda dim: None,
    "student_t": lambda dim: "student_t",
    "multivariate_normal": _multivariate_normal,
    "laplace": _laplace,
    "mixture": _mixture,
}
REPARAMETRISED = [name for name in BASES if name != "mixture"]

all_recipes = pytest.mark.parametrize("recipe", RECIPES)
all_bases = pytest.mark.parametrize("base", BASES)
reparametrised_bases = pytest.mark.parametrize("base", REPARAMETRISED)


def make(recipe="maf", base="normal", dim=2, context_dim=0, dtype=torch.float64, noise=0.6):
    """A flow with perturbed parameters."""
    flow = RECIPES[recipe](dim, context_dim=context_dim, base=BASES[base](dim)).to(dtype)
    return perturb(flow, noise)


def random_context(*batch_shape, dtype=torch.float64):
    return torch.randn(*batch_shape, CONTEXT_DIM, dtype=dtype)


def train(flow, steps=3, optimiser=torch.optim.Adam):
    optimiser = optimiser(flow.parameters(), lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        x = flow().sample((16,))
        (-flow().log_prob(x + 1).mean()).backward()
        optimiser.step()
    return flow


def assert_same_law(flow, other, sample_shape=(7,)):
    x = flow().sample(sample_shape)
    torch.testing.assert_close(other().log_prob(x), flow().log_prob(x), rtol=0, atol=0)
    torch.manual_seed(1)
    expected = flow().sample(sample_shape)
    torch.manual_seed(1)
    torch.testing.assert_close(other().sample(sample_shape), expected, rtol=0, atol=0)


# Densities


# Enough to bend the density well away from its base, and not so much that a grid misses its ridges.
GRID_NOISE = 0.4


def cell_masses(law, n=320, reach=7.0):
    """The masses of n x n cells of the plane, by the midpoint rule in ``t = asinh(x)``, which reaches far tails."""
    width = 2 * reach / n
    t = -reach + width * (torch.arange(n, dtype=torch.float64) + 0.5)
    grid = torch.stack(torch.meshgrid(t, t, indexing="ij"), -1)
    with torch.no_grad():
        return (law.log_prob(grid.sinh()) + grid.cosh().log().sum(-1)).exp() * width**2


@cache
def law_and_masses(recipe, base):
    law = make(recipe, base, noise=GRID_NOISE)()
    return law, cell_masses(law)


@all_recipes
@all_bases
def test_density_integrates_to_one(recipe, base):
    law, masses = law_and_masses(recipe, base)
    mass = masses.sum()
    # What halving the step changed bounds what the step still leaves, save where that changes sign in between.
    grid_error = (mass - cell_masses(law, n=160).sum()).abs()
    assert grid_error < 1e-2
    assert (mass - 1).abs() <= 3 * grid_error + 1e-4


@all_recipes
@all_bases
def test_samples_follow_the_density(recipe, base):
    """Chi-square of the counts in blocks of the plane against the density's integral over them."""
    law, masses = law_and_masses(recipe, base)
    num_samples, n, block, reach = 10_000, len(masses), 8, 7.0
    masses = masses.unfold(0, block, block).unfold(1, block, block).sum((-2, -1)).flatten()

    places = ((law.sample((num_samples,)).asinh() + reach) / (2 * reach / n * block)).floor().long()
    inside = ((places >= 0) & (places < n // block)).all(-1)
    places = places[inside]
    counts = torch.bincount(places[:, 0] * (n // block) + places[:, 1], minlength=len(masses)).double()

    # Blocks of few expected samples, and the rest of the plane, count as one.
    large = masses * num_samples > 10
    observed = torch.cat([counts[large], num_samples - counts[large].sum()[None]])
    expected = torch.cat([masses[large], 1 - masses[large].sum()[None]]).clamp_min(1e-3) * num_samples
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = len(observed) - 1
    assert degrees >= 10
    # Mean k and variance 2 k, if samples and density agree.
    assert statistic <= degrees + 5 * math.sqrt(2 * degrees)


@all_recipes
@reparametrised_bases
@pytest.mark.parametrize("dim", [1, 3])
def test_score_of_a_fresh_sample_is_that_of_the_inverse(recipe, base, dim):
    law = make(recipe, base, dim)()
    x = law.rsample((100,))
    torch.testing.assert_close(law.log_prob(x), law.log_prob(x.clone()))


def test_score_of_a_fresh_sample_is_free(monkeypatch):
    law = make()()
    x = law.rsample((5,))
    monkeypatch.setattr(law.transform, "inverse_and_ladj", None)
    law.log_prob(x)


@all_recipes
@reparametrised_bases
def test_sample_and_score_in_one_pass(recipe, base):
    law = make(recipe, base)()
    x, log_q = law.rsample_and_log_prob((100,))
    assert x.requires_grad
    assert log_q.requires_grad
    torch.testing.assert_close(law.log_prob(x), log_q)


@pytest.mark.grid(recipe=RECIPES, base=BASES, context_dim=[0, CONTEXT_DIM])
def test_latent_is_the_base_value(recipe, base, context_dim):
    flow = make(recipe, base, context_dim=context_dim)
    law = flow(random_context(7)) if context_dim else flow().expand((7,))
    x = law.sample((5,))
    z = law.latent(x)
    assert z.shape == x.shape
    y, ladj = flow.transform.forward_and_ladj(z, law.context)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(flow.base().log_prob(z) - ladj, law.log_prob(x))


def test_untrained_flow_is_its_base():
    x = torch.randn(7, 2)
    for recipe in RECIPES.values():
        expected = _multivariate_normal(2).log_prob(x)
        torch.testing.assert_close(recipe(2, base=_multivariate_normal(2))().log_prob(x), expected)


# Gradients


@all_recipes
@reparametrised_bases
def test_all_parameters_get_gradients_in_both_directions(recipe, base):
    flow = make(recipe, base)
    x, log_q = flow().rsample_and_log_prob((16,))
    for loss in (log_q.sum() + x.square().sum(), flow().log_prob(x.detach()).sum()):
        gradients = torch.autograd.grad(loss, list(flow.parameters()))
        assert all(g.isfinite().all() and (g != 0).any() for g in gradients)


@all_recipes
def test_gradients_reach_the_context(recipe):
    flow = make(recipe, context_dim=CONTEXT_DIM)
    context = random_context(7).requires_grad_()
    x = flow(context).rsample()
    for result in (x, flow(context).log_prob(x.detach())):
        assert (torch.autograd.grad(result.sum(), context)[0] != 0).any(-1).all()


def test_score_of_a_sample_drawn_without_gradients_has_gradients():
    """What a fit on the flow's own draws does: the remembered log-density of a draw under no_grad has no gradient."""
    flow = make()
    law = flow()
    with torch.no_grad():
        x = law.rsample((5,))
    torch.autograd.grad(law.log_prob(x).sum(), list(flow.parameters()))


def test_score_of_a_sample_changed_in_place_is_computed_anew():
    law = make()()
    with torch.no_grad():
        x = law.rsample((5,))
        x += 1
        torch.testing.assert_close(law.log_prob(x), law.log_prob(x.clone()))


def test_density_follows_the_parameters():
    flow = make()
    x = torch.randn(7, 2, dtype=torch.float64)
    before = flow().log_prob(x)
    perturb(flow, 0.1)
    assert (flow().log_prob(x) != before).all()


UPDATES = {
    "in-place": lambda flow: perturb(flow, 0.1),
    "adam": train,
    "adam-fused": lambda flow: train(flow, optimiser=lambda p, lr: torch.optim.Adam(p, lr, fused=True)),
    "pyro-clipped-adam": lambda flow: train(flow, optimiser=ClippedAdam),
}


@pytest.mark.parametrize("update", UPDATES)
def test_remembered_score_does_not_outlive_a_parameter_update(update):
    flow = make()
    law = flow()
    x = law.rsample((5,))
    UPDATES[update](flow)
    torch.testing.assert_close(law.log_prob(x), law.log_prob(x.clone()))


TRAINED_BASES = {
    "parameter of the base": lambda: dist.Normal(nn.Parameter(torch.zeros(2).double()), 1.0).to_event(1),
    "buffer of the base": lambda: dist.Normal(torch.zeros(2).double(), torch.ones(2).double()).to_event(1),
}


@pytest.mark.parametrize("base", TRAINED_BASES)
def test_remembered_score_does_not_outlive_a_change_of_the_base(base):
    flow = Flow([Planar(2)], base=TRAINED_BASES[base]()).double()
    law = flow()
    x = law.rsample((5,))
    with torch.no_grad():
        law.base.base_dist.loc.add_(1.0)
    torch.testing.assert_close(law.log_prob(x), flow().log_prob(x.clone()))


def test_remembered_score_does_not_outlive_a_change_of_a_buffer():
    flow = make(base="normal")
    law = flow()
    x = law.rsample((5,))
    next(flow.base.buffers()).add_(2.0)
    torch.testing.assert_close(law.log_prob(x), flow().log_prob(x.clone()))


def test_a_buffer_that_was_replaced_twice_is_not_taken_for_the_first():
    """The last of three may have the identity of the first, which would be gone."""
    layer = nn.Module()
    layer.register_buffer("shift", torch.zeros(()))
    memory = Memory(layer)
    for _ in range(100):
        memory.keep(torch.zeros(()))
        layer.shift = torch.zeros(())
        layer.shift = torch.ones(())
        assert memory.recall(None) is None


def test_remembered_score_does_not_outlive_a_change_of_the_context():
    flow = make(context_dim=3)
    context = random_context(5)
    law = flow(context)
    x = law.rsample()
    context += 1.0
    torch.testing.assert_close(law.log_prob(x), flow(context).log_prob(x.clone()))


def test_nothing_remembered_outlives_a_change_of_the_context_of_a_layer():
    flow, context = make(context_dim=3), random_context(5)
    layer = flow.transform.condition(context)
    cached, law = layer.with_cache(), FlowDistribution(flow.base(), layer)
    z = torch.randn(5, 2, dtype=torch.float64)
    before, x = cached(z), law.rsample((5,))
    context += 1.0
    assert not torch.equal(cached(z), before)
    torch.testing.assert_close(law.log_prob(x), law.log_prob(x.clone()))


def test_context_of_a_layer_casts_with_it():
    layer = make(context_dim=3, dtype=torch.float32).transform.condition(random_context(5, dtype=torch.float32))
    assert layer.double()(torch.zeros(2).double()).dtype == torch.float64
    assert not [name for name in layer.state_dict() if "context" in name.split(".")[0]]


def test_score_of_a_draw_of_a_frozen_flow_has_gradients_once_they_are_asked_for():
    flow = make()
    flow.requires_grad_(False)
    law = flow()
    x = law.rsample((5,)).requires_grad_()
    found = torch.autograd.grad(law.log_prob(x).sum(), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(flow().log_prob(x).sum(), x)[0])


def test_base_of_transforms_that_refer_to_their_inverses():
    base = dist.TransformedDistribution(
        dist.Normal(torch.zeros(2).double(), 1.0).to_event(1),
        [torch_transforms.AffineTransform(torch.zeros(2).double(), 2.0)],
    )
    base.log_prob(torch.zeros(2).double())
    law = FlowDistribution(base, make().transform)
    x = law.rsample((5,))
    torch.testing.assert_close(law.log_prob(x), law.log_prob(x.clone()))


def _pickled(law):
    return pickle.loads(pickle.dumps(law))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_distribution_can_be_copied_after_a_draw(copied):
    """The remembered draw is part of a graph, which neither would copy."""
    law = make()()
    x = law.rsample((5,))
    torch.testing.assert_close(copied(law).log_prob(x), law.log_prob(x))


def test_twice_backward_through_the_flow():
    flow = make()
    x = flow().rsample((5,)).detach()
    for _ in range(2):
        flow().log_prob(x).sum().backward()


# Shapes and types


@pytest.mark.grid(recipe=RECIPES, sample_shape=[(), (5,), (4, 5)], batch_shape=[(), (7,), (2, 7)], dim=[1, 3])
def test_shapes_with_context(recipe, sample_shape, batch_shape, dim):
    law = make(recipe, dim=dim, context_dim=CONTEXT_DIM)(random_context(*batch_shape))
    assert (law.batch_shape, law.event_shape) == (batch_shape, (dim,))
    x, log_q = law.rsample_and_log_prob(sample_shape)
    assert x.shape == law.sample(sample_shape).shape == (*sample_shape, *batch_shape, dim)
    assert log_q.shape == law.log_prob(x).shape == (*sample_shape, *batch_shape)


@all_bases
@pytest.mark.parametrize("sample_shape", [(), (5,), (4, 5)], ids=str)
def test_shapes_without_context(base, sample_shape):
    law = make(base=base)()
    assert (law.batch_shape, law.event_shape) == ((), (2,))
    x = law.sample(sample_shape)
    assert x.shape == (*sample_shape, 2)
    assert law.log_prob(x).shape == sample_shape


@all_bases
@pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM])
def test_expand(base, context_dim):
    flow = make(base=base, context_dim=context_dim)
    law = flow(random_context(7)) if context_dim else flow()
    wide = law.expand((4, 7))
    assert isinstance(wide, FlowDistribution)
    assert (wide.batch_shape, wide.event_shape) == ((4, 7), (2,))
    assert wide.has_rsample == law.has_rsample
    x = wide.sample((5,))
    assert x.shape == (5, 4, 7, 2)
    assert x.flatten(0, -2).unique(dim=0).shape == (5 * 4 * 7, 2)
    torch.testing.assert_close(wide.log_prob(x), law.log_prob(x))
    # One value at all places.
    assert wide.log_prob(x[0, 0, 0]).shape == (4, 7)


def test_samples_at_different_contexts_are_independent():
    law = make(context_dim=CONTEXT_DIM)(random_context().expand(7, CONTEXT_DIM))
    assert law.rsample().unique(dim=0).shape == (7, 2)


def test_base_with_a_batch_shape():
    law = Flow([Planar(2)], base=dist.Normal(torch.zeros(3, 2), torch.ones(2)).to_event(1))()
    assert law.batch_shape == (3,)
    assert law.sample((5,)).shape == (5, 3, 2)
    assert law.log_prob(torch.zeros(2)).shape == (3,)


@all_recipes
@all_bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtype_is_that_of_the_flow(recipe, base, dtype):
    flow = make(recipe, base, dtype=dtype)
    x = flow().sample((5,))
    assert x.dtype == flow().log_prob(x).dtype == dtype
    if flow().has_rsample:
        assert {result.dtype for result in flow().rsample_and_log_prob((5,))} == {dtype}


@all_recipes
@all_bases
def test_all_tensors_move_to_a_device(recipe, base):
    """On the meta device, which every machine has, an operation with a tensor left on the CPU fails."""
    flow = make(recipe, base).to("meta")
    with pyro.validation_enabled(False):
        assert flow().sample((5,)).device.type == "meta"


@all_bases
def test_has_rsample_is_that_of_the_base(base):
    assert make(base=base)().has_rsample == (base in REPARAMETRISED)


def test_rsample_without_reparametrisation_raises():
    with pytest.raises(NotImplementedError):
        make(base="mixture")().rsample()


# Copies


@all_recipes
@all_bases
def test_copies_of_a_trained_flow_agree(recipe, base):
    flow = train(make(recipe, base))
    fresh = RECIPES[recipe](2, base=BASES[base](2)).double()
    fresh.load_state_dict(flow.state_dict())
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), fresh):
        assert_same_law(flow, other)


@all_recipes
def test_copies_of_a_flow_in_the_param_store_agree(recipe):
    """The store hangs weak references on parameters, which pickle refuses."""
    flow = pyro.module("flow", make(recipe, "student_t"))
    list(pyro.get_param_store().values())
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert_same_law(flow, other)


def test_state_dict_carries_the_base():
    flow = make(base="multivariate_normal")
    other = flows.MAF(2, num_layers=2, hidden_dims=(16,), base=dist.MultivariateNormal(torch.ones(2), torch.eye(2)))
    other.double().load_state_dict(flow.state_dict())
    assert_same_law(flow, other)


# Bases


def test_learned_degrees_of_freedom_get_gradients():
    flow = make(base="student_t")
    x = torch.randn(7, 2, dtype=torch.float64)
    for loss in (flow().log_prob(x).sum(), flow().rsample((7,)).sum()):
        (gradient,) = torch.autograd.grad(loss, flow.base.raw_df)
        assert (gradient != 0).all()


def test_degrees_of_freedom_start_where_told():
    law = flows.Planar(2, base="student_t").base()
    torch.testing.assert_close(law.base_dist.df, torch.full((2,), 10.0))


class LearnedNormal(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(dim))

    def forward(self):
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)


def test_base_by_module():
    flow = flows.Planar(2, base=LearnedNormal(2))
    assert flow.base.loc in set(flow.parameters())
    flow().log_prob(torch.ones(2)).backward()
    torch.testing.assert_close(flow.base.loc.grad, torch.ones(2))
    assert_same_law(flow, copy.deepcopy(flow))


def test_parameter_in_a_base_distribution_is_learned():
    loc = nn.Parameter(torch.zeros(2))
    flow = flows.Planar(2, base=dist.Normal(loc, torch.ones(2)).to_event(1))
    assert any(loc is parameter for parameter in flow.parameters())
    flow().log_prob(torch.ones(2)).backward()
    torch.testing.assert_close(loc.grad, torch.ones(2))
    assert_same_law(flow, copy.deepcopy(flow))


@pytest.mark.parametrize(
    "base",
    [
        lambda p: dist.Normal(p[0], torch.ones(2)).to_event(1),
        lambda p: dist.Normal(torch.zeros(2), p.exp()).to_event(1),
        lambda p: dist.MultivariateNormal(p, torch.eye(2)),
    ],
    ids=["broadcast", "transformed", "multivariate"],
)
def test_tensor_computed_from_parameters_in_a_base_raises(base):
    """Such a parameter could not be found: it would silently not train, and deepcopy would fail."""
    with pytest.raises(OptionError, match="module"):
        flows.Planar(2, base=base(nn.Parameter(torch.zeros(2))))


def test_base_is_not_tied_to_the_users_tensors():
    loc = torch.zeros(2)
    flow = flows.Planar(2, base=dist.Normal(loc, torch.ones(2)).to_event(1))
    before = flow().log_prob(torch.ones(2))
    loc += 1
    torch.testing.assert_close(flow().log_prob(torch.ones(2)), before)


@pytest.mark.parametrize(
    "base",
    [
        dist.Normal(torch.zeros(2), torch.ones(2)),
        dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1),
        dist.Normal(torch.zeros(2, 2), torch.ones(2, 2)).to_event(2),
        dist.Normal(0.0, 1.0),
        LearnedNormal(3),
    ],
    ids=["batch", "size", "matrix", "scalar", "module"],
)
def test_wrong_event_shape_of_the_base_raises(base):
    with pytest.raises(ShapeError, match=r"must have event shape \(2,\).*to_event\(1\)"):
        flows.Planar(2, base=base)


@pytest.mark.parametrize("base", ["cauchy", 3, dist.Normal], ids=str)
def test_unknown_base_raises(base):
    with pytest.raises(OptionError, match="base must be a distribution"):
        flows.Planar(2, base=base)


# Wrong input


@pytest.mark.parametrize("transforms", [[nn.Linear(2, 2)], [Planar(2), "planar"], [Planar], [None]], ids=str)
def test_what_is_no_transform_raises(transforms):
    for build in (Flow, lambda parts: as_flow(parts, 2)):
        with pytest.raises(OptionError, match="made of transforms"):
            build(transforms)


@pytest.mark.parametrize(
    "transform",
    [
        torch_transforms.AbsTransform(),
        torch_transforms.SoftmaxTransform(),
        torch_transforms.LowerCholeskyTransform(),
        torch_transforms.StickBreakingTransform(),
    ],
    ids=repr,
)
def test_what_is_no_bijection_of_vectors_raises(transform):
    with pytest.raises((OptionError, ShapeError)):
        Flow([transform], base=_laplace(2))


@pytest.mark.parametrize("flow", [None, 3, nn.Linear(2, 2), dist.Normal(0.0, 1.0)], ids=repr)
def test_as_flow_of_something_else_raises(flow):
    with pytest.raises(OptionError):
        as_flow(flow, 2)


def test_unknown_event_size_raises():
    with pytest.raises(ShapeError, match="event size of a flow is unknown"):
        Flow([torch_transforms.TanhTransform()])


@pytest.mark.parametrize("recipe", RECIPES)
def test_wrong_context_raises(recipe):
    plain, conditional = RECIPES[recipe](2), RECIPES[recipe](2, context_dim=CONTEXT_DIM)
    for call in (
        lambda: plain(torch.zeros(3)),
        lambda: conditional(),
        lambda: conditional(torch.zeros(4)),
        lambda: conditional(torch.zeros(())),
    ):
        with pytest.raises(ShapeError, match="context size"):
            call()


def test_wrong_event_size_of_a_value_raises():
    for validate in (True, False):
        with pyro.validation_enabled(validate), pytest.raises(ValueError, match=r"event|shape|size"):
            make()().log_prob(torch.zeros(7, 3, dtype=torch.float64))


def test_layers_of_different_sizes_raise():
    with pytest.raises(ShapeError, match="must agree"):
        Flow([Planar(2), Planar(3)])


# In Pyro programs


def data(n=20):
    return torch.randn(n, 2, dtype=torch.float64)


@all_recipes
def test_observed_in_a_plate(recipe):
    flow = make(recipe, context_dim=CONTEXT_DIM)
    x, context = data(), random_context(20)

    def model():
        pyro.module("flow", flow)
        with pyro.plate("data", 20):
            pyro.sample("x", flow(context), obs=x)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], flow(context).log_prob(x))
    assert {f"flow$$${name}" for name, _ in flow.named_parameters()} == set(pyro.get_param_store().keys())


@all_bases
def test_plate_draws_independent_values(base):
    flow = make(base=base)

    def model():
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            return pyro.sample("x", flow())

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    x = trace.nodes["x"]["value"]
    assert x.shape == (3, 4, 2)
    assert x.flatten(0, 1).unique(dim=0).shape == (12, 2)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], flow().log_prob(x.clone()))


def test_subsampling_plate_scales_the_log_density():
    flow, x = make(), data()

    def model():
        with pyro.plate("data", 20, subsample_size=5) as index:
            pyro.sample("x", flow(), obs=x[index])

    trace = poutine.trace(model).get_trace()
    expected = 4 * flow().log_prob(trace.nodes["x"]["value"]).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


class Model(PyroModule):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.flow(), obs=x)


def _function(flow):
    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", flow(), obs=x)

    return model


@pytest.mark.parametrize("build", [Model, _function])
@all_recipes
def test_trains_by_maximum_likelihood(build, recipe):
    flow = make(recipe)
    before = copy.deepcopy(flow.state_dict())
    svi = SVI(build(flow), lambda x: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    x = data() + 1
    losses = [svi.step(x) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all((flow.state_dict()[name] != before[name]).any() for name, _ in flow.named_parameters())


@pytest.mark.parametrize("base", ["normal", "mixture"])
def test_serves_as_a_guide(base):
    """Trace_ELBO draws and scores at once; without reparametrisation it falls back on the score-function estimator."""
    flow = make("iaf", base)

    def model():
        pyro.sample("z", dist.Normal(torch.ones(2, dtype=torch.float64), 1.0).to_event(1))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    loss = Trace_ELBO(num_particles=10).differentiable_loss(model, guide)
    gradients = torch.autograd.grad(loss, list(flow.parameters()))
    assert all((g != 0).any() for g in gradients)


def test_mask():
    law = make()().expand((4,))
    x = data(4)
    masked = law.mask(torch.tensor([True, False, True, False])).log_prob(x)
    assert (masked != 0).tolist() == [True, False, True, False]


# Transforms of other libraries


def _spline():
    return pyro_transforms.spline(2)


def _affine_autoregressive():
    return pyro_transforms.affine_autoregressive(2, hidden_dims=[16])


FOREIGN = {
    "affine": lambda: torch_transforms.AffineTransform(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5])),
    "affine of vectors": lambda: torch_transforms.AffineTransform(torch.ones(2), 2.0, event_dim=1),
    "tanh": torch_transforms.TanhTransform,
    "composition": lambda: torch_transforms.ComposeTransform(
        [torch_transforms.SigmoidTransform(), torch_transforms.AffineTransform(-1.0, 3.0)]
    ),
    "independent": lambda: torch_transforms.IndependentTransform(torch_transforms.ExpTransform(), 1),
    "spline": _spline,
    "affine_autoregressive": _affine_autoregressive,
    "affine_autoregressive inverse": lambda: _affine_autoregressive().inv,
    "affine_coupling": lambda: pyro_transforms.affine_coupling(2, hidden_dims=[16]),
    "spline_coupling": lambda: pyro_transforms.spline_coupling(2, hidden_dims=[16]),
    "spline_autoregressive": lambda: pyro_transforms.spline_autoregressive(2, hidden_dims=[16]),
    "householder": lambda: pyro_transforms.householder(2),
    "permute": lambda: pyro_transforms.permute(2, torch.tensor([1, 0])),
}
LEARNABLE = [
    "spline",
    "affine_autoregressive",
    "affine_autoregressive inverse",
    "affine_coupling",
    "spline_coupling",
    "spline_autoregressive",
    "householder",
]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("with_own_layer", [False, True])
def test_foreign_transform_has_the_density_that_torch_gives_it(name, with_own_layer):
    transform = FOREIGN[name]()
    parts = [perturb(Elementwise(2)), transform] if with_own_layer else [transform]
    law = Flow(parts, base=_multivariate_normal(2))()
    expected = dist.TransformedDistribution(_multivariate_normal(2), parts)
    x, log_q = law.rsample_and_log_prob((7,))
    assert (x.shape, log_q.shape) == ((7, 2), (7,))
    torch.testing.assert_close(law.log_prob(x.detach()), log_q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected.log_prob(x.detach()), log_q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LEARNABLE)
def test_parameters_of_foreign_transforms_are_found_and_train(name):
    transform = FOREIGN[name]()
    owner = transform if isinstance(transform, nn.Module) else transform.inv
    flow = as_flow(transform, 2)
    assert {id(p) for p in flow.parameters()} == {id(p) for p in owner.parameters()} != set()
    before = copy.deepcopy(flow.state_dict())
    train(flow)
    assert any((flow.state_dict()[key] != before[key]).any() for key in before)
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert_same_law(flow, other)


@pytest.mark.parametrize("name", LEARNABLE)
def test_foreign_transform_can_be_copied_after_a_backward_step(name):
    """Pyro's transforms keep tensors of the last graph, which deepcopy refuses."""
    flow = as_flow(FOREIGN[name](), 2)
    for result in (*flow().rsample_and_log_prob((7,)), flow().latent(torch.zeros(7, 2))):
        if result.requires_grad:  # the log-determinant of a reflection is a constant
            result.sum().backward(retain_graph=True)
        copy.deepcopy(flow)


@pytest.mark.parametrize("name", LEARNABLE)
def test_foreign_transform_is_not_stale(name):
    flow = as_flow(FOREIGN[name](), 2)
    x = 0.5 * torch.randn(7, 2)
    for _ in range(2):
        flow().log_prob(x).sum().backward()
    before = flow().log_prob(x)
    perturb(flow, 0.3)
    assert (flow().log_prob(x) != before).any()


def test_pyros_planar_scores_its_samples_only():
    flow = as_flow(pyro_transforms.planar(2), 2)
    x, log_q = flow().rsample_and_log_prob((7,))
    assert log_q.isfinite().all()
    with pytest.raises(InversionError, match="Planar cannot be inverted"):
        flow().log_prob(x.clone())


def test_support_is_that_of_the_last_transform():
    """Else a value outside is scored NaN without a word."""
    law = as_flow(torch_transforms.TanhTransform(), 2)()
    assert law.support.check(torch.tensor([0.5, -0.5]))
    assert not law.support.check(torch.tensor([0.5, -1.5]))
    with pytest.raises(ValueError, match="support"):
        law.log_prob(torch.tensor([0.5, -1.5]))
    assert make()().support.check(torch.tensor([0.5, -1.5]))


# as_flow


def test_as_flow_takes_flows_transforms_and_lists():
    flow = make()
    assert as_flow(flow, 2) is flow
    for parts in (Planar(2), [Planar(2), torch_transforms.TanhTransform()], torch_transforms.TanhTransform()):
        assert as_flow(parts, 2)().event_shape == (2,)


@pytest.mark.parametrize("flow", [flows.Planar(3), flows.Planar(2, context_dim=1)], ids=["size", "context"])
def test_as_flow_of_a_flow_that_does_not_fit_raises(flow):
    with pytest.raises(ShapeError, match="2 dimensions without a context is needed"):
        as_flow(flow, 2)


@pytest.fixture
def zuko():
    """Zuko's import switches validation off in the whole process, here made to happen each time."""
    zuko = pytest.importorskip("zuko")
    Distribution.set_default_validate_args(False)
    yield zuko
    Distribution.set_default_validate_args(True)


ZUKO_FLOWS = ["MAF", "NSF", "NICE"]


@pytest.mark.parametrize("name", ZUKO_FLOWS)
def test_zuko_flow_keeps_its_density(zuko, name):
    theirs = perturb(getattr(zuko.flows, name)(2, transforms=2, hidden_features=(16,)), 0.3)
    flow = as_flow(theirs, 2)
    x, log_q = flow().rsample_and_log_prob((7,))
    torch.testing.assert_close(theirs().log_prob(x), log_q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flow().log_prob(x.clone()), theirs().log_prob(x))
    assert {id(p) for p in flow.parameters()} == {id(p) for p in theirs.parameters()}


@pytest.mark.parametrize("name", ZUKO_FLOWS)
def test_copies_of_a_trained_zuko_flow_agree(zuko, name):
    flow = train(as_flow(getattr(zuko.flows, name)(2, transforms=2, hidden_features=(16,)), 2))
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert_same_law(flow, other)


def test_validation_is_restored_after_zuko(zuko):
    as_flow(zuko.flows.MAF(2, transforms=1), 2)
    with pytest.raises(ValueError, match="scale"):
        torch.distributions.Normal(0.0, -1.0)


def test_validation_stays_off_after_zuko_where_pyro_was_told_so(zuko):
    with pyro.validation_enabled(False):
        as_flow(zuko.flows.MAF(2, transforms=1), 2)
        torch.distributions.Normal(0.0, -1.0)


def test_zuko_flow_of_another_size_raises(zuko):
    with pytest.raises(ShapeError, match="has events of size 3"):
        as_flow(zuko.flows.MAF(3, transforms=1), 2)


def test_zuko_flow_with_a_context_raises(zuko):
    with pytest.raises(ShapeError, match="context"):
        as_flow(zuko.flows.MAF(2, context=3, transforms=1), 2)


# Exactness


def test_a_flow_scores_exactly_and_trains_by_estimates():
    flow = perturb(Flow([EstimatedScale(2), Planar(2)]).double())
    law = flow()
    x, log_q = law.rsample_and_log_prob((5,))
    assert law.is_exact
    torch.testing.assert_close(law.log_prob(x), log_q, rtol=1e-9, atol=1e-9)
    estimate = law.estimated()
    assert not estimate.is_exact and estimate.estimated() is estimate and not estimate.expand((3,)).is_exact
    assert (estimate.log_prob(x) != estimate.log_prob(x)).all()
    noise = estimate.log_prob(x[:1].expand(20_000, 2)) - log_q[:1]
    assert noise.mean().abs() < 4 * noise.std() / len(noise) ** 0.5
    z = law.base.sample((5,))
    assert (estimate.transport(z)[1] != estimate.transport(z)[1]).all()


def test_a_flow_of_exact_layers_is_its_own_estimate():
    law = make()()
    assert law.is_exact and law.estimated() is law


def test_draws_need_no_exact_density():
    class Rough(EstimatedScale):
        _exact = FlowTransform._exact

    law = Flow([Rough(2)])()
    assert law.rsample((3,)).shape == law.sample((3,)).shape == (3, 2)
    with pytest.raises(InexactError, match="log-determinant of Rough is an estimate"):
        law.log_prob(torch.zeros(2))
    assert law.estimated().log_prob(torch.zeros(2)).isfinite()


def test_an_estimate_as_base_is_estimated_too():
    law = Flow([Planar(2)], base=perturb(Flow([EstimatedScale(2)])))()
    assert law.is_exact and not law.estimated().is_exact


# Shapes


def test_distributions_show_their_shapes():
    flow = flows.MAF(3, order=[0, 1, 2], context_dim=2)
    context = torch.zeros(5, 2)
    shown = "FlowDistribution(batch_shape: torch.Size([5]), event_shape: torch.Size([3]))"
    assert str(flow(context)) == shown
    assert str(flow.conditional(torch.zeros(1), context)) == shown.replace("Flow", "Subvector").replace("3", "2")
    assert str(flows.Mixture([flow, flow])(context)) == shown.replace("Flow", "Mixture")
    base = flows.CircularNSF(2).base()
    assert "CircularUniform(batch_shape: torch.Size([2]), event_shape: torch.Size([]))" in str(base)


def test_a_flow_whose_base_has_another_shape():
    fold = ReshapeTransform((6,), (2, 3))
    flow = Flow([Planar(6), fold, Elementwise((2, 3))], support=constraints.positive)
    assert (flow.base_shape, flow.event_shape, flow.dim) == ((6,), (2, 3), 6)
    x, log_q = flow().rsample_and_log_prob((5,))
    assert (x.shape, log_q.shape, flow().latent(x).shape) == ((5, 2, 3), (5,), (5, 6))
    torch.testing.assert_close(flow().log_prob(x.detach()), log_q, rtol=1e-4, atol=1e-4)
    assert flow.standardization.event_shape == (2, 3)
    flow.adapt(torch.rand(50, 2, 3) + 1)
    assert flow.is_adapted
    on_images = Flow([fold.inv], base=dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    assert on_images().sample((4,)).shape == (4, 6)
    with pytest.raises(ShapeError, match=r"base of a flow .* event shape \(6,\)"):
        Flow([Planar(6), fold], base=dist.Normal(torch.zeros(3), 1.0).to_event(1))


# What a guide takes of a flow


def test_layers_leave_out_the_identity_at_the_data_end():
    flow = Flow([Planar(2), Planar(2)])
    assert flow.layers == list(flow.transform.layers)[:2]
    flow.adapt(torch.randn(10, 2))
    assert flow.layers == list(flow.transform.layers)
    assert Flow([Planar(2)], standardize=False).standardization is None
    own = Standardize(2, scale=torch.full((2,), 3.0))
    assert list(Flow([Planar(2), own]).transform.layers)[1:] == [own]
    assert flow.components == (flow,)

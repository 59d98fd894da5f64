"""The data end of a flow: location and scale of the data, and their support."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import biject_to, constraints
from torch.distributions import transforms as torch_transforms

from pyroflows import flows
from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.fitting import fit_density
from pyroflows.flows import Flow
from pyroflows.guides import AutoFlow
from pyroflows.transforms import Compose, Planar
from pyroflows.transforms.normalization import Standardize
from tests.flows.test_flow import GRID_NOISE, all_recipes, assert_same_law, cell_masses, data, make

# Location and scale of data


def raw_data(n=200):
    """Columns of quite different units."""
    return torch.tensor([1000.0, -3.0]) + data(n) * torch.tensor([200.0, 0.01])


def standardized(flow):
    flow.adapt(raw_data())
    return flow


@all_recipes
def test_standardised_flow_has_the_density_of_raw_data(recipe):
    flow, x = make(recipe), raw_data()
    flow.standardization.load_state_dict(Standardize(2).state_dict())
    before = copy.deepcopy(flow)
    flow.adapt(x)
    scale = x.std(0, correction=0)
    expected = before().log_prob((x - x.mean(0)) / scale) - scale.log().sum()
    torch.testing.assert_close(flow().log_prob(x), expected)
    torch.testing.assert_close(flow().latent(x), before().latent((x - x.mean(0)) / scale))


def test_standardised_density_integrates_to_one():
    flow = make("maf", noise=GRID_NOISE)
    flow.adapt(data() * torch.tensor([2.0, 0.5]) + 1)
    torch.testing.assert_close(cell_masses(flow(), n=640).sum().item(), 1.0, rtol=0, atol=2e-3)


def test_untrained_standardised_flow_is_a_normal_of_the_datas_moments():
    x = raw_data()
    flow = flows.MAF(2).double()
    flow.adapt(x)
    expected = dist.Normal(x.mean(0), x.std(0, correction=0)).to_event(1)
    torch.testing.assert_close(flow().log_prob(x), expected.log_prob(x))


def test_weights_count_as_repeated_rows():
    x, weights = raw_data(), torch.randint(0, 4, (200,))
    weighted, repeated = make(), make()
    weighted.adapt(x, weights=weights)
    repeated.adapt(x.repeat_interleave(weights, 0))
    for name, value in weighted.transform.layers[-1].state_dict().items():
        torch.testing.assert_close(value, repeated.transform.layers[-1].state_dict()[name])


def test_a_second_standardisation_replaces_the_first():
    flow, modules = make(), [name for name, _ in make().named_modules()]
    assert not flow.is_adapted
    for x in (data(), raw_data()):
        flow.adapt(x)
        assert flow.is_adapted
        assert [name for name, _ in flow.named_modules()] == modules
        torch.testing.assert_close(flow.standardization.loc, x.mean(0))


def test_layers_that_have_adapted_stay_while_others_adapt():
    loc, scale = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 5.0])
    flow = Flow([Compose([Standardize(2), Planar(2)]), Standardize(2, loc, scale)])
    x = 3.0 * torch.randn(100, 2)
    flow.adapt(x)
    first, last = flow.layers[0].layers[0], flow.layers[1]
    assert torch.equal(last.loc, loc) and torch.equal(last.scale, scale)
    torch.testing.assert_close(first.loc, ((x - loc) / scale).mean(0))
    flow.adapt(x)  # all have adapted now, and start anew
    torch.testing.assert_close(last.loc, x.mean(0))


def test_moments_of_large_numbers_are_exact():
    """In float32 the sum of squares would be off, or infinite."""
    flow = flows.MAF(2)
    x = torch.tensor([[1e30, 4096.0], [3e30, 4096.5]])
    flow.adapt(x)
    torch.testing.assert_close(flow.transform.layers[-1].scale, torch.tensor([1e30, 0.25]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, r"columns \[1\] of x have no positive finite standard deviation"),
        (math.nan, "x has NaN or infinite values in 5 of 5 rows"),
        (math.inf, "x has NaN or infinite values in 5 of 5 rows"),
    ],
)
def test_standardisation_without_a_scale_raises(value, message):
    flow = make()
    with pytest.raises(DataError, match=message):
        flow.adapt(torch.stack([torch.randn(5), torch.full((5,), value)], -1))
    assert not flow.is_adapted


def test_a_remembered_density_does_not_outlive_adaptation():
    flow = make()
    law = flow()
    x = law.rsample((5,))
    before = law.log_prob(x)
    x = law.rsample((5,))
    flow.adapt(raw_data())
    log_q = law.log_prob(x)
    torch.testing.assert_close(log_q, flow().log_prob(x.clone()))
    assert (log_q != before).all()


@pytest.mark.parametrize("support", [None, constraints.positive], ids=["real", "positive"])
@pytest.mark.parametrize(
    "owner", [lambda flow: flow, lambda flow: nn.ModuleDict({"flow": flow})], ids=["own", "module"]
)
def test_state_of_a_standardised_flow_loads_into_a_fresh_one(support, owner):
    flow, fresh = (Flow(make().layers, support=support).double() for _ in range(2))
    start = copy.deepcopy(owner(fresh).state_dict())
    flow.adapt(data().exp())
    owner(fresh).load_state_dict(owner(flow).state_dict())
    for other in (fresh, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert other.is_adapted
        assert_same_law(flow, other)
    owner(fresh).load_state_dict(start)
    assert not fresh.is_adapted


def test_standardised_flow_moves_to_a_device():
    with pyro.validation_enabled(False):
        assert standardized(make()).to("meta")().sample((5,)).device.type == "meta"


def test_guide_of_a_standardised_flow():
    """Its layers become the guide's, whose state loads as ever."""

    def model():
        pyro.sample("z", dist.Normal(torch.ones(2, dtype=torch.float64), 1.0).to_event(1))

    flow = standardized(make("iaf"))
    guide, other = (AutoFlow(model, lambda dim: copy.deepcopy(flow)) for _ in range(2))
    loss = Trace_ELBO().differentiable_loss(model, guide)
    assert loss.isfinite()
    other.load_state_dict(guide.state_dict())
    assert_same_law(guide.flow, other.flow)


@pytest.mark.parametrize(
    ("loc", "scale", "message"),
    [
        (torch.zeros(2), torch.zeros(2), "scale positive"),
        (torch.zeros(2), torch.tensor([1.0, math.nan]), "scale positive"),
        (torch.tensor([0.0, math.inf]), torch.ones(2), "loc must be finite"),
        (torch.zeros(2), torch.ones(3), "must have the event's size 2"),
        (torch.zeros(()), torch.ones(2), "must have the event's size 2"),
    ],
)
def test_location_and_scale_that_make_no_bijection_raise(loc, scale, message):
    with pytest.raises(OptionError, match=message):
        Standardize(2, loc, scale)


# Supports


POSITIVE, REAL, UNIT = constraints.positive, constraints.real, constraints.unit_interval
HALF_LINE, LINE = (0, math.inf), (-math.inf, math.inf)
BOUNDS = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 5.0])
# Name to a support and the bounds of its two columns.
SUPPORTED = {
    "positive": (POSITIVE, [HALF_LINE, HALF_LINE]),
    "interval": (constraints.interval(-1.0, 3.0), [(-1, 3), (-1, 3)]),
    "unit square": (constraints.independent(UNIT, 1), [(0, 1), (0, 1)]),
    "bounds by column": (constraints.interval(*BOUNDS), [(0, 1), (2, 5)]),
    "cat": (constraints.cat([POSITIVE, REAL], dim=-1), [HALF_LINE, LINE]),
    "independent cat": (constraints.independent(constraints.cat([REAL, UNIT], dim=-1), 1), [LINE, (0, 1)]),
}


def supported(name, standardize=True):
    support, bounds = SUPPORTED[name]
    flow = Flow(make(noise=GRID_NOISE).layers, support=support).double()
    if standardize:
        flow.adapt(flow().sample((100,)))
    return flow, torch.tensor(bounds, dtype=torch.float64)


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("standardize", [False, True])
def test_support_is_where_samples_lie_and_what_is_scored(name, standardize):
    flow, bounds = supported(name, standardize)
    law = flow()
    x = law.sample((500,))
    assert ((bounds[:, 0] <= x) & (x <= bounds[:, 1])).all()
    assert law.support.event_dim == 1
    assert law.support.check(x).shape == (500,)
    assert law.support.check(x).all()
    y, log_q = law.rsample_and_log_prob((20,))
    torch.testing.assert_close(law.log_prob(y.detach()), log_q)
    torch.testing.assert_close(flow.transform.forward_and_ladj(law.latent(x))[0], x)
    for column in bounds.isfinite().any(1).nonzero().flatten().tolist():
        outside = x[0].clone()
        outside[column] = bounds[column, 0] - 1
        assert not law.support.check(outside)
        with pytest.raises(ValueError, match="support"):
            law.log_prob(outside)


@pytest.mark.parametrize("name", SUPPORTED)
def test_density_on_a_support_is_that_of_torch(name):
    flow, _ = supported(name, standardize=False)
    support = flow.transform.codomain
    unbounded = Flow(flow.layers[:-1]).double()
    expected = dist.TransformedDistribution(unbounded(), [biject_to(support)])
    x = flow().sample((50,))
    torch.testing.assert_close(flow().log_prob(x), expected.log_prob(x))
    torch.testing.assert_close(flow().latent(x), unbounded().latent(biject_to(support).inv(x)))


@pytest.mark.parametrize("name", ["interval", "bounds by column"])
def test_density_on_a_bounded_support_integrates_to_one(name):
    flow, bounds = supported(name)
    n = 400
    centers = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    grid = torch.stack(torch.meshgrid(centers, centers, indexing="ij"), -1)
    width = bounds[:, 1] - bounds[:, 0]
    mass = flow().log_prob(bounds[:, 0] + grid * width).exp().mean() * width.prod()
    torch.testing.assert_close(mass.item(), 1.0, rtol=0, atol=1e-2)


def test_bounded_data_are_standardised_before_the_map_onto_the_support():
    x = (3 + 0.1 * data(100)).exp()
    for flow in (Flow([Planar(2)], support=constraints.positive), Flow([Planar(2), torch_transforms.ExpTransform()])):
        flow.double().adapt(x)
        standardize = flow.standardization
        assert list(flow.transform.layers).index(standardize) == 1
        torch.testing.assert_close(standardize.loc, x.log().mean(0))
        torch.testing.assert_close(standardize.scale, x.log().std(0, correction=0))
        torch.testing.assert_close(flow().latent(x), (x.log() - standardize.loc) / standardize.scale)


@pytest.mark.parametrize("support", [constraints.real, constraints.real_vector])
def test_the_whole_space_as_a_support_adds_no_layer(support):
    assert len(Flow([Planar(2)], support=support).layers) == 1


@pytest.mark.parametrize(
    ("support", "error", "message"),
    [
        (constraints.nonnegative_integer, OptionError, "biject_to"),
        ("positive", OptionError, "biject_to"),
        (constraints.simplex, ShapeError, r"2 columns on the support Simplex.* only 1 free.*biject_to\(support\).inv"),
        (
            constraints.cat([constraints.simplex, constraints.positive], dim=-1, lengths=[3, 1]),
            ShapeError,
            "3 columns on the support Simplex",
        ),
        (constraints.corr_cholesky, ShapeError, "is one of matrices"),
        (constraints.cat([constraints.positive] * 3, dim=-1), ShapeError, r"no bijection of R.*dim=-1"),
        (constraints.cat([constraints.positive] * 2), ShapeError, r"no bijection of R.*dim=-1"),
        (constraints.interval(torch.zeros(3), torch.ones(3)), ShapeError, "no bijection of R"),
    ],
    ids=["integers", "name", "simplex", "part of a simplex", "matrices", "length", "axis", "bounds"],
)
def test_support_without_a_bijection_raises(support, error, message):
    with pytest.raises(error, match=message):
        Flow([Planar(2)], support=support)


def test_support_of_a_flow_that_is_bounded_anyway_raises():
    with pytest.raises(OptionError, match="bounded themselves"):
        Flow([Planar(2), torch_transforms.TanhTransform()], support=constraints.positive)


def test_the_law_of_a_simplex_is_that_which_the_message_names():
    to_simplex = biject_to(constraints.simplex)
    shares = torch.distributions.Dirichlet(torch.tensor([4.0, 3.0, 2.0])).sample((2000,))
    flow = flows.MAF(2, num_layers=2, hidden_dims=(16,))
    fit_density(flow, to_simplex.inv(shares), max_epochs=30, seed=0, progress_bar=False)
    law = dist.TransformedDistribution(flow(), to_simplex)
    x = law.sample((1000,))
    assert x.shape == (1000, 3)
    assert constraints.simplex.check(x).all()
    # The density is that of the first two columns, as the density of torch's Dirichlet is.
    truth = torch.distributions.Dirichlet(torch.tensor([4.0, 3.0, 2.0])).log_prob(shares)
    assert abs((law.log_prob(shares) - truth).mean()) < 0.1

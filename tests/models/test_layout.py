"""The packing of latents into one unconstrained vector: values, log-determinants, and Pyro's own packing."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal, init_to_median
from pyro.infer.autoguide.guides import AutoContinuous

from pyroflows.guides import AutoFlow
from pyroflows.models.layout import Layout
from pyroflows.models.structure import describe
from pyroflows.models.tracing import latent_init
from tests.models.test_structure import DOUBLE, LATENTS, all_latents, everything


@pytest.fixture(scope="module")
def layout():
    return Layout(describe(everything, (), {}))


def test_latents_are_packed_without_gaps(layout):
    start = 0
    for site in layout.structure.latents:
        stop = start + math.prod(LATENTS[site.name][3])
        assert layout.slices[site.name] == slice(start, stop)
        start = stop
    assert layout.dim == start


def test_one_block_holds_all_latents(layout):
    (block,) = layout.blocks
    assert (block.sites, block.start, block.stop) == (layout.structure.latents, 0, layout.dim)


@pytest.mark.parametrize("dtypes", [(torch.float32, DOUBLE), (DOUBLE, torch.float32), (torch.float32,)], ids=str)
def test_the_vector_has_the_widest_dtype(dtypes):
    def model():
        for i, dtype in enumerate(dtypes):
            pyro.sample(f"x_{i}", dist.Normal(torch.zeros((), dtype=dtype), 1.0))

    values = {f"x_{i}": torch.zeros((), dtype=dtype) for i, dtype in enumerate(dtypes)}
    assert Layout(describe(model, (), {})).unconstrain(values).dtype == (DOUBLE if DOUBLE in dtypes else torch.float32)


def test_layout_can_be_copied_and_pickled(layout):
    """As a guide that has one must be."""
    vector = torch.randn(layout.dim, dtype=DOUBLE)
    expected, _ = layout.constrain(vector)
    for other in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        values, _ = other.constrain(vector)
        assert all(torch.equal(values[name], expected[name]) for name in expected)


all_batches = pytest.mark.parametrize("batch", [(), (7,), (2, 3)], ids=str)


@all_batches
def test_constrained_values(layout, batch):
    values, ladj = layout.constrain(2 * torch.randn(*batch, layout.dim, dtype=DOUBLE))
    assert ladj.shape == batch
    assert list(values) == list(LATENTS)
    for site in layout.structure.latents:
        value = values[site.name]
        assert value.shape == (*batch, *site.shape)
        assert site.support.check(value).all()


@all_batches
def test_round_trip(layout, batch):
    vector = 2 * torch.randn(*batch, layout.dim, dtype=DOUBLE)
    values, _ = layout.constrain(vector)
    torch.testing.assert_close(layout.unconstrain(values), vector, rtol=1e-6, atol=1e-6)


@all_latents
def test_each_site_takes_its_own_part(layout, name):
    """A change of its slice changes this site and no other."""
    vector = torch.randn(layout.dim, dtype=DOUBLE)
    moved = vector.clone()
    moved[layout.slices[name]] += 0.5
    before, after = layout.constrain(vector)[0], layout.constrain(moved)[0]
    assert {n for n in LATENTS if not torch.equal(before[n], after[n])} == {name}


def test_batch_is_its_rows(layout):
    vectors = torch.randn(4, layout.dim, dtype=DOUBLE)
    values, ladj = layout.constrain(vectors)
    for i, vector in enumerate(vectors):
        row, row_ladj = layout.constrain(vector)
        torch.testing.assert_close(ladj[i], row_ladj)
        for name, value in row.items():
            torch.testing.assert_close(values[name][i], value)


def coordinates(name, value):
    """As many free coordinates as the support has dimensions: K - 1 of a simplex, the lower triangle of a factor."""
    if name in {"weights", "mix"}:
        value = value[..., :-1]
    if name == "correlation":
        return value[tuple(torch.tril_indices(3, 3, -1))]
    return value.reshape(-1)


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_log_determinant_is_that_of_the_jacobian(layout, scale):
    vector = scale * torch.randn(layout.dim, dtype=DOUBLE)

    def free(vector):
        values, _ = layout.constrain(vector)
        return torch.cat([coordinates(name, value) for name, value in values.items()])

    jacobian = torch.autograd.functional.jacobian(free, vector)
    assert jacobian.shape == (layout.dim, layout.dim)
    _, ladj = layout.constrain(vector)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-8, atol=1e-8)


def test_density_of_the_unconstrained_vector_is_normalised():
    """Of a Dirichlet and a Beta, on a grid: the log-determinant is with respect to the measure of Pyro's densities."""

    def model():
        pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0], dtype=DOUBLE)))
        pyro.sample("fraction", dist.Beta(torch.tensor(2.0, dtype=DOUBLE), 1.5))

    layout = Layout(describe(model, (), {}))
    axis = torch.linspace(-15, 15, 400, dtype=DOUBLE)
    grid = torch.cartesian_prod(axis, axis)
    values, ladj = layout.constrain(grid)
    prior = dist.Dirichlet(torch.tensor([2.0, 3.0], dtype=DOUBLE)).log_prob(values["weights"])
    prior = prior + dist.Beta(torch.tensor(2.0, dtype=DOUBLE), 1.5).log_prob(values["fraction"])
    total = (prior + ladj).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1.0, abs=1e-5)


def test_gradients_flow_through(layout):
    vector = torch.randn(3, layout.dim, dtype=DOUBLE, requires_grad=True)
    values, ladj = layout.constrain(vector)
    (ladj.sum() + sum(value.square().sum() for value in values.values())).backward()
    assert torch.isfinite(vector.grad).all()
    assert (vector.grad != 0).all()


# Pyro's own packing, which guides inherit, and which ours replaces


class PyroPacking(AutoContinuous):
    """Pyro's methods, with the prototype of a flow guide."""

    def __init__(self, guide):
        super().__init__(everything, init_loc_fn=latent_init(init_to_median))
        with torch.no_grad():
            super()._setup_prototype()
        self.prototype_trace = guide.prototype_trace


@pytest.fixture(scope="module")
def guides():
    guide = AutoFlow(everything)
    guide()
    return guide, PyroPacking(guide)


def test_same_sizes_as_pyro(guides):
    ours, pyros = guides
    assert ours._unconstrained_shapes == pyros._unconstrained_shapes
    assert ours.latent_dim == pyros.latent_dim
    assert ours._cond_indep_stacks.keys() == pyros._cond_indep_stacks.keys()
    assert ours._prototype_frames == pyros._prototype_frames
    torch.testing.assert_close(ours._init_loc(), pyros._init_loc(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch", [(), (4, 1, 1)], ids=str)
def test_same_parts_as_pyro(guides, batch):
    """Also of a batch from plates outside, to the left of the model's own two."""
    ours, pyros = guides
    vector = torch.randn(*batch, ours.latent_dim, dtype=DOUBLE)
    pairs = list(zip(ours._unpack_latent(vector), pyros._unpack_latent(vector), strict=True))
    assert len(pairs) == len(LATENTS)
    for (node, value), (expected_node, expected) in pairs:
        assert node["name"] == expected_node["name"]
        assert value.shape == expected.shape
        assert torch.equal(value, expected)


def test_same_values_as_pyros_guides_site_by_site(layout):
    """At the locations of an AutoNormal, its medians."""
    guide = AutoNormal(everything, init_loc_fn=latent_init(init_to_median))
    guide()
    locs = [getattr(guide.locs, name).detach().reshape(-1) for name in layout.slices]
    values, _ = layout.constrain(torch.cat(locs))
    for name, expected in guide.median().items():
        torch.testing.assert_close(values[name], expected.double())

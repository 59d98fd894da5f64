"""A Pyro model as data: its sites, plates and supports, and the packing of its latents into one vector."""

import copy
import dataclasses
import math
import pickle

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import init_to_sample, init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import biject_to, constraints

from pyroflows.errors import DataError, FlowError, ModelError
from pyroflows.models.structure import (
    Plate,
    check_static,
    in_dtype,
    inspect_model,
    latent_init,
    model_parameters,
    trace_model,
)

DOUBLE = torch.float64


def everything(y=None):
    """Every support that has a bijection, plain, in plates, and in nested plates."""
    one = torch.ones((), dtype=DOUBLE)
    base = dist.Normal(torch.zeros(3, dtype=DOUBLE), one).to_event(1)
    ordered = dist.TransformedDistribution(base, [dist.transforms.OrderedTransform()])
    loc = pyro.sample("loc", dist.Normal(0 * one, one))
    pyro.sample("scale", dist.HalfNormal(one))
    pyro.sample("weights", dist.Dirichlet(2 * torch.ones(4, dtype=DOUBLE)))
    pyro.sample("fraction", dist.Beta(2 * one, 3 * one))
    pyro.sample("bounded", dist.Uniform(-one, 3 * one))
    pyro.sample("tail", dist.Pareto(one, 3 * one))
    pyro.sample("correlation", dist.LKJCholesky(3, 2 * one))
    pyro.sample("cuts", ordered)
    pyro.sample("matrix", dist.Normal(0 * one, one).expand([2, 3]).to_event(2))
    pyro.sample("flat", dist.ImproperUniform(constraints.positive, (), (2,)))
    columns = pyro.plate("columns", 2, dim=-1)
    with columns:
        pyro.sample("vector", dist.Normal(torch.zeros(3, dtype=DOUBLE), one).to_event(1))
        pyro.sample("rate", dist.Gamma(2 * one, one))
    with pyro.plate("rows", 5, dim=-2):
        pyro.sample("per_row", dist.Normal(loc, one).mask(False))
        with columns:
            mix = pyro.sample("mix", dist.Dirichlet(torch.ones(3, dtype=DOUBLE)))
            pyro.deterministic("largest", mix.max(-1).values)
            pyro.sample("y", dist.Normal(loc, one), obs=torch.zeros(5, 2, dtype=DOUBLE) if y is None else y)
    pyro.factor("extra", -(loc**2))
    pyro.deterministic("double", 2 * loc)


# Name to (shape, event_dim, plates, unconstrained shape).
LATENTS = {
    "loc": ((), 0, (), ()),
    "scale": ((), 0, (), ()),
    "weights": ((4,), 1, (), (3,)),
    "fraction": ((), 0, (), ()),
    "bounded": ((), 0, (), ()),
    "tail": ((), 0, (), ()),
    "correlation": ((3, 3), 2, (), (3,)),
    "cuts": ((3,), 1, (), (3,)),
    "matrix": ((2, 3), 2, (), (2, 3)),
    "flat": ((2,), 1, (), (2,)),
    "vector": ((2, 3), 1, ("columns",), (2, 3)),
    "rate": ((2,), 0, ("columns",), (2,)),
    "per_row": ((5, 1), 0, ("rows", None), (5, 1)),
    "mix": ((5, 2, 3), 1, ("rows", "columns"), (5, 2, 2)),
}

all_latents = pytest.mark.parametrize("name", LATENTS)


@pytest.fixture(scope="module")
def structure():
    return inspect_model(everything, (), {})


def latent(structure, name):
    (site,) = (site for site in structure.latents if site.name == name)
    return site


# What is seen


def test_latents_are_in_the_order_of_the_model(structure):
    assert [site.name for site in structure.latents] == list(LATENTS)


@all_latents
def test_latents(structure, name):
    site = latent(structure, name)
    assert (site.shape, site.event_dim, site.plates, site.unconstrained_shape) == LATENTS[name]
    assert site.is_flat == (name in {"flat", "per_row"})
    assert isinstance(site.support, constraints.Constraint)


def test_latents_are_packed_without_gaps(structure):
    start = 0
    for site in structure.latents:
        assert site.start == start
        start += math.prod(LATENTS[site.name][3])
        assert site.stop == start
    assert structure.dim == start


def test_supports_are_those_of_the_priors(structure):
    expected = {"loc": constraints.real, "scale": constraints.nonnegative, "weights": constraints.simplex}
    for name, support in expected.items():
        # Constraints have no equality of their own, but say what they are.
        assert repr(latent(structure, name).support) == repr(support)
    assert latent(structure, "bounded").support.upper_bound == 3


def test_observed_and_deterministic_sites(structure):
    (y,) = structure.observed
    assert (y.name, y.shape, y.event_dim, y.plates) == ("y", (5, 2), 0, ("rows", "columns"))
    largest, double = structure.deterministic
    assert (largest.name, largest.shape, largest.plates) == ("largest", (5, 2), ("rows", "columns"))
    assert (double.name, double.shape, double.plates) == ("double", (), ())


def test_plates(structure):
    assert structure.plates == {"columns": Plate("columns", 2, 2), "rows": Plate("rows", 5, 5)}
    assert structure.max_plate_nesting == 2
    assert structure.subsampled == ()


def test_subsampled_plates():
    def model(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 3):
            pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("rows", len(data), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=data[rows])

    structure = inspect_model(model, (torch.zeros(7),), {})
    assert structure.subsampled == (Plate("rows", 7, 2),)
    assert structure.observed[0].shape == (2,)
    assert structure.observed[0].plates == ("rows",)


@pytest.mark.parametrize(
    ("body", "nesting"),
    [
        (lambda: None, 0),
        (lambda: pyro.sample("y", dist.Normal(torch.zeros(4, 1, 2), 1.0), obs=torch.zeros(4, 1, 2)), 3),
        (lambda: pyro.sample("y", dist.Normal(torch.zeros(4), 1.0).to_event(1), obs=torch.zeros(4)), 0),
    ],
    ids=["none", "batch-without-plates", "event"],
)
def test_nesting_counts_batch_dimensions(body, nesting):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        body()

    assert inspect_model(model, (), {}).max_plate_nesting == nesting


def test_nesting_counts_plates_that_hold_smaller_sites():
    def model():
        with pyro.plate("rows", 3, dim=-4):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    structure = inspect_model(model, (), {})
    assert structure.max_plate_nesting == 4
    assert structure.latents[0].plates == ("rows", None, None, None)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float32,), torch.float32),
        ((DOUBLE,), DOUBLE),
        ((torch.float32, DOUBLE), DOUBLE),
        ((DOUBLE, torch.float32), DOUBLE),
    ],
    ids=str,
)
def test_dtype_is_the_widest_of_the_latents(dtypes, expected):
    def model():
        for i, dtype in enumerate(dtypes):
            pyro.sample(f"x_{i}", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
        pyro.sample("y", dist.Normal(0.0, torch.ones((), dtype=DOUBLE)), obs=torch.tensor(0.0, dtype=DOUBLE))

    structure = inspect_model(model, (), {})
    assert structure.dtype == expected
    values = {f"x_{i}": torch.zeros((), dtype=dtype) for i, dtype in enumerate(dtypes)}
    assert structure.unconstrain(values).dtype == expected


def test_arguments_reach_the_model():
    def model(n, *, scale):
        pyro.sample("x", dist.Normal(torch.zeros(n), scale).to_event(1))

    assert inspect_model(model, (3,), {"scale": 2.0}).dim == 3


def test_pyro_module():
    module = PyroModule[nn.Linear](3, 2)
    module.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    (site,) = inspect_model(module, (torch.zeros(4, 3),), {}).latents
    assert (site.name, site.shape, site.event_dim) == ("weight", (2, 3), 2)


def test_inspection_is_unseen():
    """Neither handlers outside nor gradients notice that the model ran."""
    with poutine.trace() as outer:
        inspect_model(everything, (), {})
    assert not outer.trace.nodes
    assert not trace_model(everything, (), {}).nodes["loc"]["value"].requires_grad


def test_initial_values_are_used():
    init = init_to_value(values={"loc": torch.tensor(3.0, dtype=DOUBLE)}, fallback=init_to_sample)
    trace = trace_model(everything, (), {}, init)
    assert trace.nodes["loc"]["value"] == 3
    assert trace.nodes["double"]["value"] == 6


def test_structure_is_a_value(structure):
    """It cannot be changed, and can be copied and pickled, as a guide that has one must be."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        structure.max_plate_nesting = 1
    vector = torch.randn(structure.dim, dtype=DOUBLE)
    expected, _ = structure.constrain(vector)
    for other in (copy.deepcopy(structure), pickle.loads(pickle.dumps(structure))):
        values, _ = other.constrain(vector)
        assert all(torch.equal(values[name], expected[name]) for name in expected)


# Packing

all_batches = pytest.mark.parametrize("batch", [(), (7,), (2, 3)], ids=str)


@all_batches
def test_constrained_values(structure, batch):
    values, ladj = structure.constrain(2 * torch.randn(*batch, structure.dim, dtype=DOUBLE))
    assert ladj.shape == batch
    assert list(values) == list(LATENTS)
    for site in structure.latents:
        value = values[site.name]
        assert value.shape == (*batch, *site.shape)
        assert site.support.check(value).all()


@all_batches
def test_round_trip(structure, batch):
    vector = 2 * torch.randn(*batch, structure.dim, dtype=DOUBLE)
    values, _ = structure.constrain(vector)
    torch.testing.assert_close(structure.unconstrain(values), vector, rtol=1e-6, atol=1e-6)


@all_latents
def test_each_site_takes_its_own_part(structure, name):
    """A change of its slice changes this site and no other."""
    site = latent(structure, name)
    vector = torch.randn(structure.dim, dtype=DOUBLE)
    moved = vector.clone()
    moved[site.start : site.stop] += 0.5
    before, after = structure.constrain(vector)[0], structure.constrain(moved)[0]
    assert {n for n in LATENTS if not torch.equal(before[n], after[n])} == {name}


def test_batch_is_its_rows(structure):
    vectors = torch.randn(4, structure.dim, dtype=DOUBLE)
    values, ladj = structure.constrain(vectors)
    for i, vector in enumerate(vectors):
        row, row_ladj = structure.constrain(vector)
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
def test_log_determinant_is_that_of_the_jacobian(structure, scale):
    vector = scale * torch.randn(structure.dim, dtype=DOUBLE)

    def free(vector):
        values, _ = structure.constrain(vector)
        return torch.cat([coordinates(name, value) for name, value in values.items()])

    jacobian = torch.autograd.functional.jacobian(free, vector)
    assert jacobian.shape == (structure.dim, structure.dim)
    _, ladj = structure.constrain(vector)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-8, atol=1e-8)


def test_density_of_the_unconstrained_vector_is_normalised():
    """Of a Dirichlet and a Beta, on a grid: the log-determinant is with respect to the measure of Pyro's densities."""

    def model():
        pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0], dtype=DOUBLE)))
        pyro.sample("fraction", dist.Beta(torch.tensor(2.0, dtype=DOUBLE), 1.5))

    structure = inspect_model(model, (), {})
    axis = torch.linspace(-15, 15, 400, dtype=DOUBLE)
    grid = torch.cartesian_prod(axis, axis)
    values, ladj = structure.constrain(grid)
    prior = dist.Dirichlet(torch.tensor([2.0, 3.0], dtype=DOUBLE)).log_prob(values["weights"])
    prior = prior + dist.Beta(torch.tensor(2.0, dtype=DOUBLE), 1.5).log_prob(values["fraction"])
    total = (prior + ladj).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1.0, abs=1e-5)


def test_gradients_flow_through(structure):
    vector = torch.randn(3, structure.dim, dtype=DOUBLE, requires_grad=True)
    values, ladj = structure.constrain(vector)
    (ladj.sum() + sum(value.square().sum() for value in values.values())).backward()
    assert torch.isfinite(vector.grad).all()
    assert (vector.grad != 0).all()


# Dynamic models


def dynamic(extra=False, size=2, name="x"):
    pyro.sample(name, dist.Normal(torch.zeros(size), 1.0).to_event(1))
    if extra:
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def test_same_structure_passes():
    check_static(inspect_model(dynamic, (), {}), inspect_model(dynamic, (), {}))
    check_static(inspect_model(everything, (), {}), inspect_model(everything, (), {}))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"extra": True}, "'extra' appears in one run"),
        ({"size": 3}, r"'x' has shape \(2,\) in one run and \(3,\)"),
        ({"name": "z"}, "'[xz]' appears in one run"),
    ],
    ids=["site", "shape", "name"],
)
def test_dynamic_structure_raises(kwargs, message):
    first, second = inspect_model(dynamic, (), {}), inspect_model(dynamic, (), kwargs)
    for a, b in ((first, second), (second, first)):
        if "size" in kwargs and a is second:
            message = r"'x' has shape \(3,\) in one run and \(2,\)"
        with pytest.raises(ModelError, match=message):
            check_static(a, b)


def test_dynamic_support_raises():
    """The same constrained shape, another number of unconstrained dimensions."""

    def model(simplex):
        fn = dist.Dirichlet(torch.ones(3)) if simplex else dist.Normal(torch.zeros(3), 1.0).to_event(1)
        pyro.sample("x", fn)

    with pytest.raises(ModelError, match="'x'"):
        check_static(inspect_model(model, (True,), {}), inspect_model(model, (False,), {}))


# Models that are refused; the guides' tests have the rest.


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (lambda: None, ModelError, "no latent"),
        (lambda: pyro.sample("n", dist.Poisson(2.0)), ModelError, "'n' is discrete"),
        (lambda: pyro.sample("n", dist.Multinomial(3, torch.ones(2))), ModelError, "'n' is discrete"),
        (lambda: pyro.sample("p", dist.ProjectedNormal(torch.ones(3))), ModelError, "'p'.*bijection"),
        (lambda: [pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0)) for i in pyro.plate("rows", 2)], ModelError, "'rows'"),
        (lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(math.nan)), DataError, "'y' has 1 NaN"),
    ],
    ids=["no-latent", "discrete", "multinomial", "sphere", "sequential", "nan"],
)
def test_refused(body, error, message):
    with pytest.raises(error, match=message) as caught:
        inspect_model(body, (), {})
    assert isinstance(caught.value, FlowError | ValueError)


@pytest.mark.parametrize("block", [None, {"expose": ["z"]}, {"hide": ["rows"]}], ids=str)
def test_local_latents_in_subsampled_plates_are_refused(block):
    def model():
        with pyro.plate("rows", 10, subsample_size=4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match=r"'z'.*'rows'.*4 of 10"):
        inspect_model(poutine.block(model, **block) if block else model, (), {})


# Flat priors


@pytest.mark.parametrize(
    ("fn", "is_flat"),
    [
        (dist.Normal(0.0, 1.0), False),
        (dist.Normal(0.0, 1.0).mask(False), True),
        (dist.Normal(0.0, 1.0).mask(True), False),
        (dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(False), True),
        (dist.Normal(torch.zeros(3), 1.0).mask(False).to_event(1), True),
        (dist.ImproperUniform(constraints.real, (), ()), True),
        (dist.ImproperUniform(constraints.real, (3,), ()).to_event(1), True),
        (dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform()]), False),
    ],
    ids=["proper", "masked", "mask-true", "masked-event", "event-masked", "improper", "improper-event", "transformed"],
)
def test_flat_priors_are_known(fn, is_flat):
    (site,) = inspect_model(lambda: pyro.sample("x", fn), (), {}).latents
    assert site.is_flat == is_flat


@pytest.mark.parametrize("mask", [False, True])
def test_flat_by_a_handler(mask):
    def model():
        with poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    assert inspect_model(model, (), {}).latents[0].is_flat is not mask


# An initial value where there is nothing to draw from


SUPPORTS = [constraints.real, constraints.positive, constraints.simplex, constraints.interval(-1.0, 3.0)]


@pytest.mark.parametrize("support", SUPPORTS, ids=str)
def test_latent_init(support):
    event_shape = (3,) if support is constraints.simplex else ()
    fn = dist.ImproperUniform(support, (2,), event_shape)
    value = latent_init(init_to_sample)({"name": "x", "fn": fn})
    assert value.shape == (2, *event_shape)
    assert support.check(value).all()
    assert (biject_to(support).inv(value).abs() < 1e-6).all()


def test_feasible_leaves_proper_priors_alone():
    site = {"name": "x", "fn": dist.Normal(5.0, 1e-3)}
    assert latent_init(init_to_sample)(site).item() == pytest.approx(5.0, abs=0.01)


def test_feasible_leaves_given_values_alone():
    init = latent_init(init_to_value(values={"x": torch.tensor(4.0)}, fallback=init_to_sample))
    improper = dist.ImproperUniform(constraints.positive, (), ())
    assert init({"name": "x", "fn": improper}) == 4
    assert init({"name": "z", "fn": improper}) == 1


def test_feasible_without_a_site_is_itself():
    init = latent_init(init_to_sample)
    assert init() is init


# Other dtypes


def test_in_dtype():
    """Floating tensors in any argument are cast, and what the model makes of numbers is of the dtype too."""
    seen = {}

    def model(x, data, *, flag):
        seen.update(x=x, data=data, flag=flag)
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    index = torch.arange(3)
    run = in_dtype(model, DOUBLE)
    value = run(torch.zeros(2), {"a": [torch.ones(1), index], "b": "text"}, flag=True)
    assert seen["x"].dtype == seen["data"]["a"][0].dtype == value.dtype == DOUBLE
    assert seen["data"]["a"][1] is index
    assert seen["data"]["b"] == "text"
    assert seen["flag"] is True


def test_in_no_dtype_is_the_model_itself():
    assert in_dtype(everything, None) is everything


def test_in_dtype_restores_the_default():
    def model():
        raise KeyError("stop")

    with pytest.raises(KeyError):
        in_dtype(model, DOUBLE)()
    assert torch.get_default_dtype() == torch.float32


def test_in_dtype_gradients_reach_the_arguments():
    x = torch.ones(2, requires_grad=True)
    in_dtype(lambda x: x.square().sum(), DOUBLE)(x).backward()
    torch.testing.assert_close(x.grad, torch.full((2,), 2.0))


# Parameters of a model


def test_model_parameters():
    """The unconstrained leaf tensors, which an optimiser can train, of both statements."""
    net = nn.Linear(2, 1)

    def model(x):
        pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(net(x).squeeze(-1) + z, 1.0).to_event(1), obs=torch.zeros(len(x)))

    parameters = model_parameters(model, (torch.zeros(3, 2),), {})
    assert parameters.keys() == {"net$$$weight", "net$$$bias", "scale"}
    assert parameters["net$$$weight"] is net.weight
    assert parameters["scale"].item() == pytest.approx(math.log(2.0))
    assert all(p.is_leaf and p.requires_grad for p in parameters.values())


def test_model_without_parameters():
    assert model_parameters(everything, (), {}) == {}

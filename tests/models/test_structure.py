"""A Pyro model as data: its sites, plates and supports, and the packing of its latents into one vector."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import init_to_median
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import constraints

from pyroflows.models.structure import Plate, describe, model_parameters

DOUBLE = torch.float64
MASK = torch.tensor([True, False, True])


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
        per_row = pyro.sample("per_row", dist.Normal(loc, one).mask(False))
        with columns:
            mix = pyro.sample("mix", dist.Dirichlet(torch.ones(3, dtype=DOUBLE)))
            pyro.deterministic("largest", mix.max(-1).values)
            y = torch.zeros(5, 2, dtype=DOUBLE) if y is None else y
            pyro.sample("y", dist.Normal(loc + per_row, one), obs=y)
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
    return describe(everything, (), {})


def latent(structure, name):
    (site,) = (site for site in structure.latents if site.name == name)
    return site


# What is seen


def test_latents_are_in_the_order_of_the_model(structure):
    assert [site.name for site in structure.latents] == list(LATENTS)


@all_latents
def test_latents(structure, name):
    site = latent(structure, name)
    assert (site.shape, site.event_dim, site.plate_names, site.unconstrained_shape) == LATENTS[name]
    assert site.is_flat == (name in {"flat", "per_row"})
    assert isinstance(site.support, constraints.Constraint)


def test_supports_are_those_of_the_priors(structure):
    expected = {"loc": constraints.real, "scale": constraints.nonnegative, "weights": constraints.simplex}
    for name, support in expected.items():
        # Constraints have no equality of their own, but say what they are.
        assert repr(latent(structure, name).support) == repr(support)
    assert latent(structure, "bounded").support.upper_bound == 3


def test_observed_and_deterministic_sites(structure):
    (y,) = structure.observed
    assert (y.name, y.shape, y.event_dim, y.plate_names) == ("y", (5, 2), 0, ("rows", "columns"))
    largest, double = structure.deterministic
    assert (largest.name, largest.shape, largest.plate_names) == ("largest", (5, 2), ("rows", "columns"))
    assert (double.name, double.shape, double.plate_names) == ("double", (), ())


def test_plates(structure):
    assert structure.plates == {"columns": Plate("columns", 2, 2, dim=-1), "rows": Plate("rows", 5, 5, dim=-2)}
    assert structure.max_plate_nesting == 2
    assert structure.subsampled == ()


def test_subsampled_plates():
    def model(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 3):
            pyro.sample("theta", dist.Normal(mu, 1.0))
        with pyro.plate("rows", len(data), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=data[rows])

    structure = describe(model, (torch.zeros(7),), {})
    assert structure.subsampled == (Plate("rows", 7, 2, dim=-1),)
    assert structure.observed[0].shape == (2,)
    assert structure.observed[0].plate_names == ("rows",)


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

    assert describe(model, (), {}).max_plate_nesting == nesting


def test_nesting_counts_plates_that_hold_smaller_sites():
    def model():
        with pyro.plate("rows", 3, dim=-4):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    structure = describe(model, (), {})
    assert structure.max_plate_nesting == 4
    assert structure.latents[0].plate_names == ("rows", None, None, None)


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

    assert describe(model, (), {}).dtype == expected


def test_arguments_reach_the_model():
    def model(n, *, scale):
        pyro.sample("x", dist.Normal(torch.zeros(n), scale).to_event(1))

    assert describe(model, (3,), {"scale": 2.0}).latents[0].shape == (3,)


def test_pyro_module():
    module = PyroModule[nn.Linear](3, 2)
    module.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    (site,) = describe(module, (torch.zeros(4, 3),), {}).latents
    assert (site.name, site.shape, site.event_dim) == ("weight", (2, 3), 2)


def test_structure_is_copied_and_pickled(structure):
    """As a guide that has one must be."""
    for other in (copy.deepcopy(structure), pickle.loads(pickle.dumps(structure))):
        assert other.plates == structure.plates
        assert [site.unconstrained_shape for site in other.latents] == [shape for *_, shape in LATENTS.values()]


# Whatever flows cannot have is described as it is


@config_enumerate
def enumerated():
    k = pyro.sample("k", dist.Categorical(torch.ones(3)))
    pyro.sample("y", dist.Normal(1.0 * k, 1.0), obs=torch.tensor(0.0))


def counts():
    pyro.sample("n", dist.Multinomial(3, torch.ones(2)))


def masked_in_part():
    with pyro.plate("rows", 3), poutine.mask(mask=MASK):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def observed_in_part():
    with pyro.plate("rows", 3):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(3), obs_mask=MASK)


def subsampled_locals():
    with pyro.plate("rows", 10, subsample_size=4):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def sequential():
    for i in pyro.plate("rows", 2):
        pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))


def no_latents():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(2))


def on_a_sphere():
    pyro.sample("p", dist.ProjectedNormal(torch.ones(3)))


def anywhere_on_a_sphere():
    """Nothing to draw from, and no bijection: there is no value but a made-up one."""
    pyro.sample("p", dist.ImproperUniform(dist.constraints.sphere, (), (3,)))


class NoSupport(dist.Normal):
    @property
    def support(self):
        raise NotImplementedError


def without_support():
    pyro.sample("x", NoSupport(0.0, 1.0))


def missing():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(torch.zeros(4), 1.0), obs=torch.tensor([1.0, math.nan, math.nan, 0.0]))


def improper():
    pyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()))


def scaled():
    with poutine.scale(scale=0.5), pyro.plate("rows", 6, subsample_size=2):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(2))


def nested():
    with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 2, dim=-1):
        pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))


# To the facts of the first site, latent or else observed, that are not those of a Normal outside of plates.
ODD = {
    enumerated: {"family": "Categorical", "is_discrete": True, "is_enumerable": True, "unconstrained_shape": None},
    counts: {
        "family": "Multinomial",
        "is_discrete": True,
        "event_dim": 1,
        "shape": (2,),
        "unconstrained_shape": None,
    },
    masked_in_part: {"shape": (3,), "plate_names": ("rows",)},
    observed_in_part: {"shape": (3,), "plate_names": ("rows",)},
    subsampled_locals: {
        "scale": 2.5,
        "shape": (4,),
        "plates": (Plate("rows", 10, 4, dim=-1),),
        "plate_names": ("rows",),
    },
    sequential: {"plates": (Plate("rows", 2, 2),)},
    no_latents: {"shape": (2,), "plate_names": (None,), "unconstrained_shape": None},
    on_a_sphere: {"family": "ProjectedNormal", "event_dim": 1, "shape": (3,), "unconstrained_shape": None},
    anywhere_on_a_sphere: {
        "family": "ImproperUniform",
        "is_flat": True,
        "event_dim": 1,
        "shape": (3,),
        "unconstrained_shape": None,
    },
    without_support: {"family": "NoSupport", "support": None, "unconstrained_shape": None},
    missing: {},
    improper: {"family": "ImproperUniform", "is_flat": True},
    scaled: {"scale": 1.5, "shape": (2,), "plate_names": ("rows",), "unconstrained_shape": None},
    nested: {
        "family": "Independent",
        "shape": (3, 2, 4),
        "event_dim": 1,
        "plates": (Plate("outer", 3, 3, dim=-2), Plate("inner", 2, 2, dim=-1)),
        "plate_names": ("outer", "inner"),
    },
}


@pytest.mark.parametrize("model", ODD, ids=lambda model: model.__name__)
def test_odd_models_are_described(model):
    structure = describe(model, (), {})
    site = [*structure.latents, *structure.observed][0]
    plain = {
        "family": "Normal",
        "shape": (),
        "event_dim": 0,
        "plate_names": (),
        "scale": 1.0,
        "is_discrete": False,
        "is_enumerable": False,
        "is_flat": False,
        "unconstrained_shape": ODD[model].get("shape", ()),
    }
    expected = plain | ODD[model]
    assert {name: getattr(site, name) for name in expected} == expected


def test_further_facts_of_odd_models():
    assert describe(missing, (), {}).observed[0].nan_at.tolist() == [[1], [2]]
    assert describe(no_latents, (), {}).dtype == torch.float32
    assert describe(counts, (), {}).dtype == torch.float32
    assert [site.name for site in describe(observed_in_part, (), {}).latents] == ["x_unobserved"]
    assert describe(nested, (), {}).max_plate_nesting == 2


def test_plates_are_known_where_their_statements_are_blocked():
    structure = describe(poutine.block(subsampled_locals, hide=["rows"]), (), {})
    assert structure.subsampled == (Plate("rows", 10, 4, dim=-1),)


def test_plates_without_sites_are_known():
    def model():
        with pyro.plate("rows", 3):
            pass

    assert describe(model, (), {}).plates == {"rows": Plate("rows", 3, 3)}


def test_parameters_are_named():
    def model():
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    assert describe(model, (), {}).parameters == ("loc",)


@pytest.mark.parametrize(
    ("statement", "reads"),
    [
        (lambda x: x.exp() + x[0] + x[torch.tensor([1, 0])], False),
        (lambda x: dist.Normal(x, x.exp()).log_prob(x), False),
        (lambda x: x if x[0] > 0 else -x, True),
        (lambda x: float(x.sum()), True),
        (lambda x: x[x > 0], True),
        (lambda x: torch.masked_select(x, x > 0), True),
        (lambda x: x.nonzero(), True),
    ],
    ids=["arithmetic", "validation", "if", "float", "mask", "select", "nonzero"],
)
def test_reading_values_is_a_fact(statement, reads):
    def model():
        statement(pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1)))

    assert describe(model, (), {}).reads_values is reads
    # Init functions may look at values themselves: that of the median compares samples.
    assert describe(model, (), {}, init_to_median).reads_values is reads


def test_errors_of_the_model_pass():
    def model():
        raise KeyError("the user's")

    with pytest.raises(KeyError, match="the user's"):
        describe(model, (), {})


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
    (site,) = describe(lambda: pyro.sample("x", fn), (), {}).latents
    assert site.is_flat == is_flat


@pytest.mark.parametrize("mask", [False, True])
def test_flat_by_a_handler(mask):
    def model():
        with poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    assert describe(model, (), {}).latents[0].is_flat is not mask


# Parameters of a model


def test_model_parameters():
    """The unconstrained leaf tensors, which an optimiser can train, of both statements."""
    net = nn.Linear(2, 1)

    def model(x):
        pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(net(x).squeeze(-1) + z, 1.0).to_event(1), obs=torch.zeros(len(x)))

    parameters = model_parameters(describe(model, (torch.zeros(3, 2),), {}), model, (torch.zeros(3, 2),), {})
    assert parameters.keys() == {"net$$$weight", "net$$$bias", "scale"}
    assert parameters["net$$$weight"] is net.weight
    assert parameters["scale"].item() == pytest.approx(math.log(2.0))
    assert all(p.is_leaf and p.requires_grad for p in parameters.values())


def test_model_without_parameters():
    assert model_parameters(describe(everything, (), {}), everything, (), {}) == {}

"""What a flow asks of a model: who is refused, in which words, and who is not."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyroflows.errors import DataError, FlowError, ModelError
from pyroflows.models.requirements import check_static, require_flow, require_full_plates, require_local_rows
from pyroflows.models.structure import describe
from tests.models.test_structure import MASK, everything

# Models that are refused; the guides' tests have the rest.


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (lambda: None, ModelError, "no latent"),
        (lambda: pyro.sample("n", dist.Poisson(2.0)), ModelError, "'n' is discrete"),
        (lambda: pyro.sample("n", dist.Multinomial(3, torch.ones(2))), ModelError, "'n' is discrete"),
        (lambda: pyro.sample("p", dist.ProjectedNormal(torch.ones(3))), ModelError, "'p'.*bijection"),
        (lambda: [pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0)) for i in pyro.plate("rows", 2)], ModelError, "'rows'"),
        (lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(math.nan)), DataError, "'y' has 1 NaN of 1"),
        (
            lambda: pyro.sample("n", dist.Poisson(torch.ones(3)), obs=torch.ones(3), obs_mask=MASK),
            ModelError,
            "'n_unobserved', made by obs_mask.*mask the rows",
        ),
    ],
    ids=["no-latent", "discrete", "multinomial", "sphere", "sequential", "nan", "missing-counts"],
)
def test_refused(body, error, message):
    with pytest.raises(error, match=message) as caught:
        require_flow(describe(body, (), {}))
    assert isinstance(caught.value, FlowError | ValueError)


@pytest.mark.parametrize("block", [None, {"expose": ["z"]}, {"hide": ["rows"]}], ids=str)
def test_local_latents_in_subsampled_plates_are_refused(block):
    def model():
        with pyro.plate("rows", 10, subsample_size=4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ModelError, match=r"'z'.*'rows'.*4 of 10"):
        require_local_rows(describe(poutine.block(model, **block) if block else model, (), {}))


def test_all_that_a_flow_can_have_passes():
    require_flow(describe(everything, (), {}))


def test_what_is_observed_may_be_discrete_and_masked():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3), poutine.mask(mask=MASK):
            pyro.sample("n", dist.Poisson(x.exp()), obs=torch.ones(3))

    require_flow(describe(model, (), {}))


def test_full_plates_are_required_where_they_matter():
    def model(subsample_size):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample_size=subsample_size) as rows:
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(10)[rows])

    require_full_plates(describe(model, (10,), {}), "see there")
    with pytest.raises(ModelError, match=r"'rows' is subsampled \(4 of 10 rows\).*: see there"):
        require_full_plates(describe(model, (4,), {}), "see there")


# Dynamic models


def dynamic(extra=False, size=2, name="x"):
    pyro.sample(name, dist.Normal(torch.zeros(size), 1.0).to_event(1))
    if extra:
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def test_same_structure_passes():
    check_static(describe(dynamic, (), {}), describe(dynamic, (), {}))
    check_static(describe(everything, (), {}), describe(everything, (), {}))


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
    first, second = describe(dynamic, (), {}), describe(dynamic, (), kwargs)
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
        check_static(describe(model, (True,), {}), describe(model, (False,), {}))


# Shapes of log-densities

X, ROWS = torch.arange(6.0), torch.ones(6)


def in_plate(loc, obs, mask=True, scale=1.0, event_dim=0):
    """A model with a plate of six rows."""

    def model():
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6), poutine.mask(mask=mask), poutine.scale(scale=scale):
            pyro.sample("y", dist.Normal(slope * loc, 1.0).to_event(event_dim), obs=obs)

    return model


def bare(loc, obs, event_dim=0):
    """A model without a plate."""

    def model():
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * loc, 1.0).to_event(event_dim), obs=obs)

    return model


def factor_in_plate():
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 6):
        pyro.factor("y", dist.Normal(slope * X[:, None], 1.0).log_prob(ROWS))


def masked_latent():
    with pyro.plate("rows", 6), poutine.mask(mask=torch.ones(6, 1).bool()):
        pyro.sample("y", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (in_plate(X, ROWS[:, None]), r"site 'y' in plate 'rows' of size 6.*\(6, 1\).*\(6, 6\).*y\.squeeze\(-1\)"),
        (in_plate(X[:, None], ROWS), r"'y'.*batch shape \(6, 6\).*x\.squeeze\(-1\).*\.to_event\(1\)"),
        (in_plate(X[:, None], ROWS, event_dim=1), r"'y'.*event shape \(1,\), which broadcast to \(6, 6\)"),
        (in_plate(X, ROWS, mask=torch.ones(6, 1).bool()), r"'y'.*\(6, 6\)"),
        (in_plate(X, ROWS, scale=torch.ones(6, 1)), r"'y'.*\(6, 6\)"),
        (in_plate(X, ROWS[:4]), r"'y' in plate 'rows' of size 6 has a value of shape \(4,\).*do not fit"),
        (in_plate(torch.zeros(6, 3), torch.zeros(6, 1, 3), event_dim=1), r"'y'.*\(6, 6, 3\)"),
        (in_plate(torch.zeros(6, 3), torch.zeros(3, 6), event_dim=1), r"'y'.*\(3, 6\).*event shape \(3,\).*do not fit"),
        (bare(X, ROWS[:, None]), r"'y' has a value.*\(6, 6\).*y\.squeeze\(-1\)"),
        (bare(X, ROWS[:, None], event_dim=1), r"'y'.*event shape \(6,\).*y\.squeeze\(-1\)"),
        (bare(torch.zeros(4, 6), ROWS), r"'y'.*\(4, 6\)"),
        (factor_in_plate, r"factor 'y' in plate 'rows' of size 6 has shape \(6, 6\)"),
        (masked_latent, r"latent site 'y'.*\(6, 6\)"),
    ],
)
def test_a_value_that_counts_several_times_is_refused(model, message):
    """Pyro's own ELBO refuses these too, except for a value that is spread over an event."""
    with pytest.raises(ModelError, match=message):
        require_flow(describe(model, (), {}))
    if "event shape \\(1,\\)" not in message:
        with pytest.raises((ValueError, RuntimeError)):
            Trace_ELBO().loss(model, AutoNormal(model))


@pytest.mark.parametrize(
    "model",
    [
        in_plate(X, ROWS),
        in_plate(X, torch.tensor(1.0)),
        in_plate(torch.zeros(6, 3), torch.zeros(6, 3), event_dim=1),
        in_plate(torch.zeros(6, 3), torch.zeros(3), event_dim=1),
        in_plate(X, ROWS, mask=ROWS.bool(), scale=ROWS),
        bare(X, ROWS, event_dim=1),
        bare(X, ROWS),
        bare(1.0, ROWS),
        bare(X, torch.tensor(1.0)),
        bare(X, torch.zeros(4, 6)),
    ],
)
def test_every_value_that_counts_once_passes(model):
    require_flow(describe(model, (), {}))


def test_crossed_plates_may_spread_a_value():
    def model():
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 6, dim=-2), pyro.plate("rows", 6):
            pyro.sample("y", dist.Normal(slope * X, 1.0), obs=ROWS[:, None])

    require_flow(describe(model, (), {}))


# Data


@pytest.mark.parametrize(
    ("body", "has_data"),
    [
        (lambda: None, False),
        (lambda: pyro.sample("y", dist.Normal(0.0, 1.0)), False),
        (lambda: pyro.deterministic("y", torch.zeros(3)), False),
        (lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(0)), False),
        (lambda: pyro.sample("y", dist.Normal(0.0, 1.0).mask(False), obs=torch.tensor(0.0)), False),
        (lambda: pyro.sample("y", dist.Normal(X, 1.0).mask(torch.zeros(6).bool()), obs=ROWS), False),
        (lambda: pyro.sample("y", dist.Normal(X, 1.0).mask(X > 2), obs=ROWS), True),
        (lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)), True),
        (lambda: pyro.factor("y", torch.tensor(0.0)), True),
    ],
)
def test_has_data(body, has_data):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        body()

    assert describe(model, (), {}).has_data is has_data


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_of_half_precision_are_refused(dtype):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)))

    with pytest.raises(ModelError, match=r"'x', have dtype (b?float16), .*use float32 or float64"):
        require_flow(describe(model, (), {}))

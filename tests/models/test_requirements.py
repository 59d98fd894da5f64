"""What a flow asks of a model: who is refused, in which words, and who is not."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine

from pyroflows.errors import DataError, FlowError, ModelError
from pyroflows.models.requirements import check_static, require_flow, require_full_plates
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
            "'n_unobserved', made by obs_mask.*Mask the rows",
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
        require_flow(describe(poutine.block(model, **block) if block else model, (), {}))


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

"""Flat priors: which posteriors cannot be normalised."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch.distributions import constraints

from pyroflows.errors import ModelError
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.proper import require_proper
from pyroflows.models.structure import describe


def log_joint_of(model, dtype=torch.float32):
    layout = Layout(describe(model, (), {}))
    vector = torch.full((layout.dim,), 0.3, dtype=dtype)
    return LogJoint(model, (), {}, layout, vector[None]), vector


def flat(support, *event_shape):
    return pyro.sample("x", dist.ImproperUniform(support, (), event_shape))


def unseen(support, *event_shape):
    flat(support, *event_shape)
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def one_of_three():
    x = flat(constraints.real, 3)
    pyro.sample("y", dist.Normal(x[..., :2].sum(-1), 1.0), obs=torch.tensor(1.0))


def without_data():
    x = flat(constraints.real)
    pyro.sample("z", dist.Normal(x, 1.0))


@pytest.mark.parametrize(
    "model",
    [
        lambda: unseen(constraints.real),
        lambda: unseen(constraints.positive, 2),
        lambda: unseen(constraints.less_than(3.0)),
        lambda: unseen(dist.constraints.ordered_vector, 2),
        one_of_three,
        without_data,
    ],
)
def test_a_flat_prior_without_data_is_refused(model):
    with pytest.raises(ModelError, match="the prior of site 'x' is flat.*cannot be normalised"):
        require_proper(*log_joint_of(model))


def seen():
    x = flat(constraints.real, 2)
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=torch.tensor([1.0, 2.0]))


def walled():
    """The log joint is constant around the start, and -inf beyond a wall."""
    x = flat(constraints.real)
    pyro.factor("wall", torch.where(x.abs() < 2.0, 0.0, -torch.inf))


@pytest.mark.parametrize(
    "model",
    [
        seen,
        walled,
        lambda: unseen(constraints.unit_interval),
        lambda: unseen(constraints.interval(-2.0, 3.0)),
        lambda: unseen(constraints.simplex, 3),
        lambda: unseen(constraints.corr_cholesky, 3, 3),
    ],
)
def test_a_flat_prior_with_data_or_bounds_passes(model):
    require_proper(*log_joint_of(model))


def test_float64():
    """Its largest numbers do not fit into the default dtype."""
    require_proper(*log_joint_of(seen, torch.float64))

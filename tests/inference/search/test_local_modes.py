"""Modes of local latents that a search among the global ones cannot see: verdicts must not be good without them."""

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.compiling.check import Compiler
from pyroflows.flows import Recipe
from pyroflows.guides.hierarchical import hierarchy_near
from pyroflows.inference.search import hierarchical
from pyroflows.inference.search.gaussians import GaussianApproximation
from pyroflows.inference.search.hierarchical import global_marginal, with_locals
from pyroflows.inference.search.local_modes import has_images, has_other_rows
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe

NUM = 60


@pytest.fixture
def small_models_count(monkeypatch):
    monkeypatch.setattr(hierarchical, "MIN_LOCAL", 50)


def seen_through(function, mean=3.0, num=NUM, noise=0.05):
    """Rows of which a function is seen, around a mean."""
    torch.manual_seed(0)
    y = function(mean + 0.7 * torch.randn(num)) + noise * torch.randn(num)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", num):
            x = pyro.sample("x", dist.Normal(mu, 0.7))
            pyro.sample("y", dist.Normal(function(x), noise), obs=y)

    return model


def with_narrow_mode(share, distance=8.0, narrow=0.05):
    """Rows with a second mode, narrow and high, that holds a share of the mass."""

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", NUM):
            x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
            parts = dist.Normal(mu[..., None] + torch.tensor([0.0, distance]), torch.tensor([1.0, narrow]))
            weights = dist.Categorical(torch.tensor([1 - share, share]))
            pyro.factor("density", dist.MixtureSameFamily(weights, parts).log_prob(x))

    return model


def other_modes(model, mu, points=None):
    """Whether there are images, and other rows, of a Gaussian around a mean of the rows."""
    torch.manual_seed(0)
    layout = Layout(describe(model, (), {}))
    center = torch.full((layout.dim,), mu)
    log_joint = LogJoint(model, (), {}, layout, center + 0.1 * torch.randn(5, layout.dim), Compiler("none"))
    marginal = global_marginal(log_joint, center)
    loc = torch.tensor([mu])
    mode = with_locals(marginal, GaussianApproximation(loc, torch.tensor([[0.1]]), 0.0))
    points = (
        3.0 * torch.randn(marginal.num_rows, layout.dim) if points is None else points.expand(marginal.num_rows, -1)
    )
    flows = [hierarchy_near(mode, Recipe("Gaussian"), has_local_flow=False)]
    return has_images(log_joint, flows), has_other_rows(marginal, loc, points)


def twice(x):
    return 2 * x


def bent(x):
    return (x - 0.02) ** 2


@pytest.mark.parametrize(
    ("function", "mu", "is_symmetric", "has_others"),
    # At a mean of 3 the other sign of a row has next to no mass, and none has where the function is monotone.
    [
        (torch.abs, 3.0, True, False),
        (bent, 0.3, False, True),
        (twice, 3.0, False, False),
        (torch.exp, 1.0, False, False),
        (torch.zeros_like, 0.0, False, False),  # all signs can change at once, within the only mode
    ],
    ids=["images", "rows", "linear", "monotone", "symmetric"],
)
def test_other_modes_of_rows_are_found(small_models_count, function, mu, is_symmetric, has_others):
    assert other_modes(seen_through(function, mu, noise=0.05 if mu > 1 else 0.3), mu) == (is_symmetric, has_others)


@pytest.mark.parametrize(("share", "counts"), [(0.003, False), (0.04, True)])
def test_modes_count_by_their_mass_and_not_by_their_height(small_models_count, share, counts):
    """Their heights are 6 and 83 % of that of the other mode."""
    points = torch.full((16, 1 + NUM), 8.0)
    assert other_modes(with_narrow_mode(share), 0.0, points) == (False, counts)


@pytest.mark.slow
def test_a_hierarchy_whose_mirror_image_was_not_sought_is_not_good():
    """Beyond 200 latents a search among all of them would take long."""
    posterior = pf.FlowVI(seen_through(torch.abs, num=220), seed=0, progress_bar=False).run()
    diagnosis = posterior.diagnose()
    assert diagnosis.verdict == "do not use" and diagnosis.num_other_modes == 1


@pytest.mark.slow
def test_a_smaller_hierarchy_has_both_images():
    posterior = pf.FlowVI(seen_through(torch.abs, num=155), seed=0, progress_bar=False).run()
    assert posterior.sample(4000, seed=0)["mu"].gt(0).double().mean().item() == pytest.approx(0.5, abs=0.05)

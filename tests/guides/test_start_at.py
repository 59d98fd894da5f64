"""A guide that starts at a given Gaussian."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyroflows import OptionError
from pyroflows.flows import IAF, Gaussian
from pyroflows.guides import AutoFlow, AutoIAF, AutoPlanar
from pyroflows.transforms import Elementwise, Triangular

LOC = torch.tensor([1.0, -2.0, 3.0])
TRIL = torch.tensor([[2.0, 0.0, 0.0], [-1.0, 0.5, 0.0], [0.3, 0.2, 0.1]])


def model():
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("scale", dist.HalfNormal(1.0))


def whitened(guide):
    x = guide.get_posterior().sample((20_000,)).to(TRIL)
    return torch.linalg.solve_triangular(TRIL, (x - LOC).mT, upper=False)


@pytest.mark.parametrize("make", [AutoFlow, AutoIAF, lambda model: AutoFlow(model, Gaussian)])
def test_a_triangular_scale(make):
    """Layers start close to the identity, so that it is the Gaussian up to a little."""
    guide = make(model)
    guide.start_at(LOC, TRIL)
    white = whitened(guide)
    assert white.mean(1).abs().max() < 0.1
    assert (torch.cov(white) - torch.eye(3)).abs().max() < 0.1
    assert isinstance(guide.flow.transform.layers[-1], Triangular)


def test_of_a_gaussian_flow_it_is_exact():
    guide = AutoFlow(model, Gaussian)
    guide.start_at(LOC, TRIL)
    x = 3 * torch.randn(10, 3)
    exact = torch.distributions.MultivariateNormal(LOC, scale_tril=TRIL)
    torch.testing.assert_close(guide.get_posterior().log_prob(x), exact.log_prob(x), rtol=1e-4, atol=1e-4)


def test_a_diagonal_scale():
    guide = AutoPlanar(model, num_layers=2)
    guide.start_at(LOC, torch.tensor([2.0, 0.5, 0.1]))
    x = guide.get_posterior().sample((20_000,))
    assert ((x.mean(0) - LOC) / torch.tensor([2.0, 0.5, 0.1])).abs().max() < 0.1
    torch.testing.assert_close(x.std(0), torch.tensor([2.0, 0.5, 0.1]), rtol=0.1, atol=0.0)
    assert isinstance(guide.flow.transform.layers[-1], Elementwise)


def test_it_builds_anew():
    """Layers that were trained are gone; the guide's structure stays."""
    guide = AutoFlow(model, lambda dim: IAF(dim, num_layers=1, hidden_dims=(8,)))
    guide()
    structure, flow = guide.structure, guide.flow
    guide.start_at(LOC, TRIL)
    assert guide.structure is structure and guide.flow is not flow
    assert guide()["scale"] > 0


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_dtype_is_the_guide_s(dtype):
    guide = AutoFlow(model, dtype=dtype)
    guide.start_at(LOC.double(), TRIL.double())
    assert {p.dtype for p in guide.flow.parameters()} == {dtype or torch.float32}


@pytest.mark.parametrize("scale", [TRIL.T, -TRIL, torch.zeros(3, 3)])
def test_a_scale_that_is_none(scale):
    with pytest.raises(OptionError, match="lower triangular"):
        AutoFlow(model).start_at(LOC, scale)

"""Models of the kinds on which Pyro tests its own autoguides. Module-level, so that guides of them pickle."""

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions import transforms
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn


def scalar():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Beta(2.0, 2.0))


def plated():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 2):
        pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Beta(2.0, 2.0))


def nested_plates():
    with pyro.plate("columns", 2, dim=-1):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("b", dist.Exponential(torch.ones(2)))
            pyro.sample("c", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("rows_alone", 3, dim=-2):
        pyro.sample("d", dist.Uniform(0.0, 2.0))


def events():
    pyro.sample("a", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
    pyro.sample("b", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    pyro.sample("c", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with pyro.plate("rows", 3):
        pyro.sample("d", dist.Normal(torch.zeros(3), 1.0))


def supports():
    pyro.sample("positive", dist.Gamma(2.0, 2.0))
    pyro.sample("interval", dist.Uniform(-1.0, 3.0))
    pyro.sample("greater", dist.Pareto(1.5, 3.0))
    pyro.sample("less", dist.TransformedDistribution(dist.HalfNormal(1.0), transforms.AffineTransform(2.0, -1.0)))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("cholesky", dist.LKJCholesky(3, 2.0))
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    pyro.sample("ordered", dist.TransformedDistribution(base, transforms.OrderedTransform()))
    with pyro.plate("rows", 2):
        pyro.sample("simplices", dist.Dirichlet(torch.ones(3)))


def correlated(y=None):
    """A covariance from scales and an LKJ correlation, as in Pyro's own documentation of the prior."""
    scales = pyro.sample("scales", dist.HalfNormal(torch.ones(2)).to_event(1))
    cholesky = pyro.sample("cholesky", dist.LKJCholesky(2, 1.0))
    scale_tril = scales[..., None] * cholesky
    y = torch.tensor([[0.3, -0.2], [1.0, 0.4]]) if y is None else y
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale_tril[..., None, :, :]), obs=y)


def masked():
    """Latents of which a mask leaves some entries without a posterior, in each of the ways in which Pyro masks."""
    mask = torch.tensor([True, False, True])
    pyro.sample("a", dist.Normal(0.0, 1.0).expand((3,)).mask(mask).to_event(1))
    with pyro.plate("rows", 3):
        with poutine.mask(mask=mask):
            pyro.sample("b", dist.LogNormal(0.0, 1.0))
            pyro.sample("c", dist.Dirichlet(torch.ones(3)))
        pyro.sample("d", dist.Beta(2.0, 2.0).mask(mask))


def missing(y=None, is_seen=None):
    """A response of which some values are missing, which ``obs_mask`` makes latents."""
    y = torch.tensor([1.5, 0.0, -0.5]) if y is None else y
    is_seen = torch.tensor([True, False, True]) if is_seen is None else is_seen
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=is_seen)


def padded():
    """A random walk for each of three sequences, padded to the longest."""
    lengths = torch.tensor([1, 2, 3])
    with pyro.plate("sequences", 3):
        x = 0.0
        for t in range(3):
            with poutine.mask(mask=t < lengths):
                x = pyro.sample(f"x_{t}", dist.Normal(x, 1.0))
                pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=torch.tensor([0.3, 1.0, -0.4]))


KINDS = {
    "scalar": scalar,
    "plated": plated,
    "nested-plates": nested_plates,
    "events": events,
    "supports": supports,
    "correlated": correlated,
    "masked": masked,
    "missing": missing,
    "padded": padded,
}


def with_factors(log_factor):
    pyro.sample("z1", dist.Normal(0.0, 1.0))
    pyro.factor("f1", log_factor)
    pyro.sample("z2", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
    with pyro.plate("rows", 3):
        pyro.factor("f2", log_factor)
        pyro.sample("z3", dist.Normal(torch.zeros(3), torch.ones(3)))


def funnel(dim=4):
    y = pyro.sample("y", dist.Normal(0.0, 3.0))
    with pyro.plate("columns", dim):
        pyro.sample("x", dist.Normal(0.0, torch.exp(y / 2)))


def shares(data):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", len(data)):
        pyro.sample("data", dist.Categorical(p), obs=data)


def clusters(data):
    """A mixture with its assignments as discrete sites."""
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    locs = pyro.sample("locs", dist.Normal(0.0, 10.0).expand_by([2]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights.expand(len(data), 2)))
        pyro.sample("data", dist.Normal(locs[assignment], scale), obs=data)


def time_series(batch, subsample, full_size):
    """A global latent, and a random walk for each row of a plate of which a call sees a part."""
    drift = pyro.sample("drift", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("data", full_size, subsample=subsample):
        z = 0.0
        for t, y in enumerate(batch):
            z = pyro.sample(f"state_{t}", dist.Normal(z, drift))
            pyro.sample(f"obs_{t}", dist.Bernoulli(logits=z), obs=y)


class WithParameters(PyroModule):
    """A model whose priors have parameters, plain and constrained."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(1.0))
        self.scale = PyroParam(torch.tensor(0.1), dist.constraints.positive)

    def forward(self):
        pyro.sample("x", dist.Normal(self.loc, self.scale))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(2.0, 0.1))


class RandomLinear(nn.Linear, PyroModule):
    """A linear layer whose weight and bias are latents."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([out_features, in_features]).to_event(2))
        self.bias = PyroSample(dist.Normal(0.0, 10.0).expand([out_features]).to_event(1))


class BayesianRegression(PyroModule):
    """A linear regression whose layer is a module of latents inside the model."""

    def __init__(self, dim):
        super().__init__()
        self.linear = RandomLinear(dim, 1)

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, sigma), obs=y)

"""Hierarchical models with subsampled plates, for the tests of structured guides."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

SIZES = {"g": 4, "r": 3}
ROW_MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
GROUP_MASK = torch.tensor([1, 0, 1, 1]).bool()


def plate(name, sizes, dim):
    return pyro.plate(name, SIZES[name], subsample_size=None if sizes is None else sizes[name], dim=dim)


def one_plate(y, sizes):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with plate("g", sizes, -1) as i:
        t = pyro.sample("t", dist.LogNormal(mu, tau))
        w = pyro.sample("w", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(t + w.sum(-1), 1.0), obs=y[i, 0])


def nested(y, sizes):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with plate("g", sizes, -2) as i:
        t = pyro.sample("t", dist.Normal(mu, 1.0))
        with plate("r", sizes, -1) as j:
            s = pyro.sample("s", dist.LogNormal(t, 1.0))
            pyro.sample("y", dist.Normal(s, 1.0), obs=y[i][:, j])


def crossed(y, sizes):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    groups, rows = plate("g", sizes, -2), plate("r", sizes, -1)
    with groups:
        a = pyro.sample("a", dist.Normal(mu, 1.0))
    with rows:
        b = pyro.sample("b", dist.LogNormal(mu, 1.0))
    with groups as i, rows as j:
        c = pyro.sample("c", dist.Normal(a + b, 1.0))
        pyro.sample("y", dist.Normal(c, 1.0), obs=y[i][:, j])


def masked_rows(y, sizes):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with plate("g", sizes, -2) as i:
        t = pyro.sample("t", dist.LogNormal(mu, 1.0))
        with plate("r", sizes, -1) as j, poutine.mask(mask=ROW_MASK[i][:, j]):
            s = pyro.sample("s", dist.LogNormal(t, 1.0))
            pyro.sample("y", dist.Normal(s, 1.0), obs=y[i][:, j])


def masked_groups(y, sizes):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with plate("g", sizes, -2) as i, poutine.mask(mask=GROUP_MASK[i][:, None]):
        t = pyro.sample("t", dist.LogNormal(mu, 1.0))
        with plate("r", sizes, -1) as j:
            s = pyro.sample("s", dist.LogNormal(t, 1.0))
            pyro.sample("y", dist.Normal(s, 1.0), obs=y[i][:, j])


def measured(y, size=None):
    """Groups with one value each, whose posterior is Gaussian."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("g", len(y), subsample_size=size) as i:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 2.0), obs=y[i])


def encode(rows, y, size=None):
    return y[rows, None]

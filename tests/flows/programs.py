"""What the tests of flows in Pyro programs share."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

import pyroflows as pf
from tests.transforms.registry import perturb

pyro.enable_validation()  # the default, which other packages change at their import

all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def make(context_dim=0, recipe=pf.flows.MAF, dtype=torch.float64, noise=0.6, **options):
    """A flow of two dimensions with perturbed parameters."""
    if recipe is not pf.flows.Planar:
        options["hidden_dims"] = (8,)
    return perturb(recipe(2, num_layers=2, context_dim=context_dim, **options).to(dtype), noise)


def rows(*batch_shape, dim=2, dtype=torch.float64):
    return torch.randn(*batch_shape, dim, dtype=dtype)


def traced(model, *args, **kwargs):
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    return trace


def nothing(*args, **kwargs):
    """The guide of a model without latents."""


def elbo(model, guide=nothing, loss=None):
    return -torch.as_tensor((loss or Trace_ELBO()).differentiable_loss(model, guide))


def train(model, guide, *args, steps, lr=0.02, loss=None):
    """SVI with a learning rate that falls to a tenth."""
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.1 ** (1 / steps)}), loss or Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)


def standard_normal(*batch_shape):
    return dist.Normal(torch.zeros(*batch_shape, 2, dtype=torch.float64), 1.0).to_event(1)


class Shift(pf.transforms.FlowTransform):
    """x = z + c."""

    def __init__(self, dim):
        super().__init__(dim, context_dim=dim)

    def _forward_and_ladj(self, z, context):
        return z + context, z.new_zeros(z.shape[:-1])

    def _inverse_and_ladj(self, x, context):
        return x - context, x.new_zeros(x.shape[:-1])


def bent(base=None):
    """A flow whose draws at context c are f(c + w), w from the base, and f: then f.inv(x) are plain data on c."""
    f = make(noise=0.4).transform
    return pf.Flow([Shift(2), f], base=base or standard_normal()), f

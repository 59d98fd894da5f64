"""Discrete flows for tests, with parameters at which no layer is the identity."""

import torch
from pyro import distributions as dist
from torch import nn

from pyroflows import flows

RECIPES = {"autoregressive": flows.DiscreteAutoregressive, "coupling": flows.DiscreteCoupling}
MAPS = ["additive", "affine", "permutation"]


class Chain(nn.Module):
    """A base that no class of the library knows: a Markov chain as a mixture over its first category."""

    def __init__(self, length, num_categories):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(num_categories, length, num_categories))

    def forward(self):
        components = dist.Categorical(logits=self.logits).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(len(self.logits))), components)


BASES = {
    "factorized": lambda length, num_categories: "factorized",
    "autoregressive": lambda length, num_categories: "autoregressive",
    "categorical": lambda length, num_categories: dist.Categorical(torch.rand(length, num_categories)).to_event(1),
    "module": Chain,
    "flow": lambda length, num_categories: flows.DiscreteCoupling(length, num_categories, hidden_dims=(8,)),
}


@torch.no_grad()
def perturbed(flow, scale=0.5):
    """Return a flow with random parameters."""
    for parameter in flow.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return flow


def make(recipe="autoregressive", length=3, num_categories=4, base="factorized", scale=0.5, **options):
    options = {"num_layers": 3, "hidden_dims": (8,), "base": BASES[base](length, num_categories), **options}
    return perturbed(RECIPES[recipe](length, num_categories, **options), scale)

"""Bayesian inference: fit a posterior to a Pyro model, diagnose it, and correct it."""

from pyroflows.inference.bridge import BridgeEstimate
from pyroflows.inference.conditional import sample_conditional
from pyroflows.inference.export import to_arviz
from pyroflows.inference.importance import importance_sample
from pyroflows.inference.mcmc import Chains
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.verdict.diagnosis import Diagnosis
from pyroflows.inference.vi import FlowVI, load_posterior
from pyroflows.inference.weights import WeightedDraws, Weights

__all__ = [
    "BridgeEstimate",
    "Chains",
    "Diagnosis",
    "FlowVI",
    "Posterior",
    "WeightedDraws",
    "Weights",
    "importance_sample",
    "load_posterior",
    "sample_conditional",
    "to_arviz",
]

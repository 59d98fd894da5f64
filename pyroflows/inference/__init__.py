"""Bayesian inference: fit a posterior to a Pyro model, diagnose it, and correct it."""

from pyroflows.inference.amortized import Amortized, fit_amortized, load_amortized
from pyroflows.inference.bridge import BridgeEstimate
from pyroflows.inference.calibration import Calibration, sbc
from pyroflows.inference.conditional import sample_conditional
from pyroflows.inference.export import to_arviz
from pyroflows.inference.importance import importance_sample
from pyroflows.inference.loading import load_posterior
from pyroflows.inference.local_draws import LocalDraws
from pyroflows.inference.mcmc import Chains
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.search.starts import Starts
from pyroflows.inference.verdict.diagnosis import Diagnosis
from pyroflows.inference.vi import FlowVI
from pyroflows.inference.weights import WeightedDraws, Weights

__all__ = [
    "Amortized",
    "BridgeEstimate",
    "Calibration",
    "Chains",
    "Diagnosis",
    "FlowVI",
    "LocalDraws",
    "Posterior",
    "Starts",
    "WeightedDraws",
    "Weights",
    "fit_amortized",
    "importance_sample",
    "load_amortized",
    "load_posterior",
    "sample_conditional",
    "sbc",
    "to_arviz",
]

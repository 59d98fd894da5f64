"""Markov chain Monte Carlo in the base space of a flow."""

from pyroflows.inference.mcmc.chains import Chains

__all__ = ["Chains"]

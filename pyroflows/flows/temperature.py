"""Draws of a base distribution at a temperature."""

import math
from numbers import Real
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from pyroflows.errors import OptionError
from pyroflows.options import kind


def sample_at(law: Any, sample_shape: torch.Size, temperature: float) -> Tensor:
    r"""Draw from a normal law :math:`N(\mu, \Sigma)` at a temperature T, that is from :math:`N(\mu, T^2 \Sigma)`.

    The base of a flow may be the law of another flow, which then draws at this temperature.

    Args:
        law: a normal distribution of any kind, or the law of a flow. At temperature 1 it may be any distribution.
        sample_shape: the shape of the sample.
        temperature: T, at least 0; at 0 each draw is the mean.

    Raises:
        OptionError: if the temperature is not a finite number of at least 0, or is not 1 where the law is not normal.

    Example:
        >>> sample_at(dist.Normal(torch.ones(2), 1.0).to_event(1), torch.Size([3]), temperature=0.0).tolist()
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    if not isinstance(temperature, Real) or isinstance(temperature, bool) or not 0 <= temperature < math.inf:
        got = temperature if isinstance(temperature, Real) else kind(temperature)
        raise OptionError(f"temperature must be a finite number of at least 0, got {got}")
    if temperature == 1:
        return law.sample(sample_shape)
    if hasattr(law, "estimated"):
        return law.sample(sample_shape, temperature=temperature)
    if not _is_normal(law):
        name = type(innermost(law)).__name__
        raise OptionError(
            f"draws at temperature {temperature} are defined for a normal base, whose standard deviations it "
            f"multiplies, but the base of this flow is {name}: leave temperature out, or fit a flow with base=None"
        )
    mean = law.mean
    return mean + float(temperature) * (law.sample(sample_shape) - mean)


def _is_normal(law: Distribution) -> bool:
    return isinstance(innermost(law), Normal | MultivariateNormal | LowRankMultivariateNormal)


def innermost(law: Any) -> Distribution:
    """Return the law of which another one is an expansion, or whose axes it takes as those of an event."""
    while isinstance(law, Independent | ExpandedDistribution | MaskedDistribution):
        law = law.base_dist
    found: Distribution = law
    return found

"""Tell whether a value lies in the support of a distribution, where the distribution's density does not show it."""

from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor

from pyroflows.constraints import circular, is_angular
from pyroflows.models.supports import is_real, support_of

_TRANSFORMED = (dist.TransformedDistribution, torch.distributions.TransformedDistribution)


def inside_support(fn: Any, value: Tensor) -> Tensor | None:
    """Tell for each entry of the batch whether a value lies in the support of a continuous distribution.

    Without validation many densities go on outside of their supports, as that of an exponential law does below zero. A
    distribution that is transformed by hand declares the support of its last transform, not that of its base; here the
    value goes back through the transforms. Masked entries count as inside.

    Args:
        fn: a distribution.
        value: a value of its shape, or of a batch of it.

    Returns:
        Booleans in the batch shape; None where the support is that of all numbers, or of vectors, such as a simplex,
        which are met only up to rounding.

    Example:
        >>> shifted = dist.TransformedDistribution(dist.Exponential(1.0), dist.transforms.AffineTransform(2.0, 1.0))
        >>> inside_support(shifted, torch.tensor([1.0, 3.0]))
        tensor([False,  True])
        >>> inside_support(dist.Normal(0.0, 1.0), torch.tensor(1.0)) is None
        True
    """
    if isinstance(fn, torch.distributions.Independent):
        inside = inside_support(fn.base_dist, value)
        num = fn.reinterpreted_batch_ndims
        return inside.flatten(-num).all(-1) if num and inside is not None else inside
    if isinstance(fn, dist.MaskedDistribution):
        inside = inside_support(fn.base_dist, value)
        return None if inside is None else inside | ~torch.as_tensor(fn._mask)
    if isinstance(fn, ExpandedDistribution):
        return inside_support(fn.base_dist, value)
    if type(fn) in _TRANSFORMED:
        if any(transform.domain.event_dim or transform.codomain.event_dim for transform in fn.transforms):
            return None
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
        return inside_support(fn.base_dist, value)
    support = support_of(fn)
    # An angle may be given in any turn.
    if support is None or is_angular(support) or support.is_discrete or support.event_dim or is_real(support):
        return None
    return support.check(value)


def inside_turn(fn: Any, value: Tensor) -> Tensor | None:
    r"""Tell whether angles lie between :math:`-\pi` and :math:`\pi`, where each of them has its one value.

    Args:
        fn: a distribution.
        value: a value of its shape, or of a batch of it.

    Returns:
        Booleans in the batch shape; None if the values are no angles.
    """
    support = support_of(fn)
    if support is None or not is_angular(support):
        return None
    inside = circular.check(value)
    return inside.flatten(-fn.event_dim).all(-1) if fn.event_dim else inside

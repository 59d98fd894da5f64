"""Draws of single sites, in the shape of the data that they replicate."""

from collections.abc import Collection
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor

from pyroflows.compiling.singular import is_singular
from pyroflows.errors import ModelError
from pyroflows.models.vectorized import draw


class SamplerError(ModelError):
    """A site cannot be drawn.

    Args:
        site: the name of the site.
        reason: why, as a clause that says what to do.
        has_sampler: whether its distribution can be drawn from at other parameters.

    Attributes: those of the arguments.
    """

    def __init__(self, site: str, reason: str, has_sampler: bool) -> None:
        super().__init__(f"site '{site}' cannot be drawn, since {reason}")
        self.site, self.reason, self.has_sampler = site, reason, has_sampler


def replicate_shape(fn: Any, observed: Tensor | None, plate_dims: Collection[int] = ()) -> torch.Size:
    """The shape of a draw that replicates an observed value, which may have more dimensions than its distribution.

    Args:
        fn: the distribution of the site.
        observed: its observed value; None if it is not observed. A value that does not fit the distribution, such as
            old data beside new inputs, does not count.
        plate_dims: batch dimensions, negative, that plates with a size declare: there the distribution has its length.

    Example:
        >>> replicate_shape(dist.MultivariateNormal(torch.zeros(2), torch.eye(2)), torch.zeros(30, 2))
        torch.Size([30, 2])
    """
    if observed is None:
        return fn.shape()
    lengths = list(observed.shape[: max(observed.dim() - fn.event_dim, 0)])
    for dim in plate_dims:
        if -dim <= len(lengths):
            lengths[dim] = 1
    try:
        return torch.broadcast_shapes(fn.batch_shape, lengths) + fn.event_shape
    except RuntimeError:
        return fn.shape()


def replicate(fn: Any, observed: Tensor | None, plate_dims: Collection[int] = ()) -> Tensor:
    """Draw from a distribution, in the shape of the observed value if there is one, see :func:`replicate_shape`."""
    shape = replicate_shape(fn, observed, plate_dims)
    batch_shape = shape[: len(shape) - fn.event_dim]
    return draw(fn if fn.batch_shape == batch_shape else fn.expand(batch_shape))


def draw_site(name: str, fn: Any, observed: Tensor | None, plate_dims: Collection[int] = ()) -> Tensor:
    """Draw a site, as :func:`replicate` does.

    Args:
        name: the name of the site.
        fn: its distribution.
        observed: its observed value; None if it is not observed.
        plate_dims: the batch dimensions that plates with a size declare.

    Raises:
        SamplerError: if its distribution cannot be drawn from.

    Example:
        >>> draw_site("y", dist.ImproperUniform(dist.constraints.real, (), ()), None)
        Traceback (most recent call last):
        pyroflows.models.replicates.SamplerError: site 'y' cannot be drawn, since its distribution ...
    """
    try:
        return replicate(fn, observed, plate_dims)
    except Exception as error:  # samplers of users and of Pyro may raise anything
        if is_singular(error):
            raise
        lack = _lack(fn, error)
        lines = str(error).splitlines() or [""]
        failure = f"drawing from its distribution {_family(fn)} fails with [{type(error).__name__}: {lines[0]}]"
        raise SamplerError(name, lack or failure, has_sampler=lack is None) from error


def _lack(fn: Any, error: Exception) -> str | None:
    """What a distribution lacks that cannot be drawn from whatever its parameters are, as a clause."""
    fn = _inner(fn)
    if isinstance(fn, dist.ImproperUniform):
        return f"its distribution {_family(fn)} is improper (give it a proper one)"
    if isinstance(error, NotImplementedError):
        return f"its distribution {_family(fn)} has no sampler (give the class a method sample)"
    if isinstance(error, AssertionError) and getattr(fn, "duration", 0) is None:
        return f"its distribution {_family(fn)} has no duration (give it duration=, the number of its time steps)"
    return None


def _family(fn: Any) -> str:
    return type(_inner(fn)).__name__


def _inner(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    return fn

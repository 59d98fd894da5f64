"""Base distributions of flows, held by modules whose call returns the distribution."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from pyroflows.errors import OptionError, ShapeError
from pyroflows.options import kind
from pyroflows.shapes import as_given, shape_of

Base = Distribution | nn.Module | str | None


def base_module(base: Base, shape: torch.Size) -> nn.Module:
    """Return the module that holds the base of a flow.

    Args:
        base: a distribution, a module whose call returns one, "student_t" or None, see :class:`pyroflows.Flow`.
        shape: the shape of the events that the first layer takes.

    Raises:
        OptionError: if the base is unknown.
        ShapeError: if the base has another event shape.

    Example:
        >>> base_module("student_t", torch.Size([2]))().event_shape
        torch.Size([2])
    """
    if base is None:
        base = standard_normal(shape)
    if isinstance(base, Distribution):
        return DistributionModule(_checked_event(base, shape))
    if isinstance(base, nn.Module):
        _checked_event(base(), shape)
        return base
    if base == "student_t":
        return StudentT(shape)
    given = repr(base) if isinstance(base, str) else kind(base)
    raise OptionError(f'base must be a distribution, a module that returns one, "student_t" or None, got {given}')


def standard_normal(shape: torch.Size) -> Distribution:
    """Return the law of independent standard normal variables that form one event of this shape."""
    return dist.Normal(torch.zeros(shape), torch.ones(shape)).to_event(len(shape))


def is_validated() -> bool:
    """Return whether distributions check their values: as Pyro is set, but never while torch compiles."""
    return not torch.compiler.is_compiling() and bool(is_validation_enabled())


class StudentT(nn.Module):
    r"""Independent standard Student-t variables, each with learned degrees of freedom
    :math:`\nu = 1 + \mathrm{softplus}(a)`.

    Args:
        dim: the event size D, or the event shape.
        df: initial degrees of freedom, above 1.

    Shapes: a draw is one event ``(*event_shape)``.

    Example:
        >>> base = StudentT(2, df=5.0)
        >>> base().base_dist.df.tolist(), base().event_shape
        ([5.0, 5.0], torch.Size([2]))
    """

    def __init__(self, dim: int | Sequence[int], df: float = 10.0) -> None:
        super().__init__()
        shape = shape_of(dim)
        self.raw_df = nn.Parameter(torch.full(shape, df - 1.0).expm1().log())
        self.law = DistributionModule(dist.StudentT(torch.full(shape, df)).to_event(len(shape)))

    def forward(self) -> Distribution:
        # The constructor would make, and validate, a chi-square variable of its own, which torch.compile refuses.
        law: Any = self.law()
        law.base_dist.df = 1 + F.softplus(self.raw_df)
        law.base_dist._chi2.concentration = 0.5 * law.base_dist.df
        return law


class DistributionModule(nn.Module):
    """A module that holds the tensors of a distribution as buffers, so that they move and cast with it.

    Parameters among the tensors stay parameters. A call returns the distribution with the tensors as they are then.

    Args:
        distribution: any torch or Pyro distribution.

    Raises:
        OptionError: if a tensor of the distribution is computed from parameters.

    Example:
        >>> base = DistributionModule(dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        >>> base.double()().sample().dtype
        torch.float64
    """

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self._template = distribution
        for name, value in vars(distribution).items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor) and value.requires_grad:
                raise OptionError(
                    f"{name} of the base {type(distribution).__name__} is computed from parameters, which the flow "
                    "cannot find: give it as base a module whose call returns the distribution"
                )
            elif isinstance(value, Tensor):
                self.register_buffer(name, value.detach().clone())
            elif isinstance(value, Distribution):
                self.add_module(name, DistributionModule(value))

    def forward(self) -> Distribution:
        # The distribution is a shallow copy, since its constructor would validate the tensors again at every call.
        distribution = copy.copy(self._template)
        distribution._validate_args = distribution._validate_args and is_validated()
        vars(distribution).update(self._parameters)
        vars(distribution).update(self._buffers)
        vars(distribution).update({name: module() for name, module in self._modules.items() if module is not None})
        return distribution


def _checked_event(base: Distribution, event_shape: torch.Size) -> Distribution:
    """Return the base if its events have this shape."""
    if base.event_shape != event_shape:
        raise ShapeError(
            f"the base of a flow of {as_given(event_shape)} dimensions must have event shape {tuple(event_shape)}, but "
            f"has batch shape {tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}: use "
            f".expand({list(event_shape)}).to_event({len(event_shape)})"
        )
    return base

"""Base distributions of flows, held by modules whose call returns the distribution."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F

from pyroflows.arrays import ArrayLike, as_tensor, floating_tensor, require_finite
from pyroflows.compiling.eager import runs_in_python
from pyroflows.errors import OptionError, ShapeError
from pyroflows.options import kind
from pyroflows.shapes import as_given, described, shape_of
from pyroflows.transforms.held import Held, is_validated

Base = Distribution | nn.Module | str | None


def base_module(base: Base, shape: torch.Size) -> nn.Module:
    """Return the module that holds the base of a flow.

    Args:
        base: a distribution, a module whose call returns one, "student_t" or None, see :class:`pyroflows.Flow`.
        shape: the shape of the events that the first layer takes.

    Raises:
        OptionError: if the base is unknown, is the law of a flow, or has tensors that are computed from parameters.
        ShapeError: if the base has another event shape.

    Example:
        >>> base_module("student_t", torch.Size([2]))().event_shape
        torch.Size([2])
    """
    if base is None:
        base = standard_normal(shape)
    if hasattr(base, "estimated"):
        raise OptionError(
            "base is the law of a flow, whose parameters the new flow would not find: give the flow itself, base=flow, "
            "or, at a context, a module whose call returns flow(context)"
        )
    if isinstance(base, Distribution):
        return Held(_checked_event(base, shape))
    if isinstance(base, nn.Module):
        _checked_event(example_of(base), shape)
        return base
    if base == "student_t":
        return StudentT(shape)
    given = repr(base) if isinstance(base, str) else kind(base)
    raise OptionError(f'base must be a distribution, a module that returns one, "student_t" or None, got {given}')


def context_shape_of(base: nn.Module) -> torch.Size:
    """Return the shape of the context that a base takes, empty for none: its ``context_shape`` or ``context_dim``.

    Example:
        >>> context_shape_of(pf.flows.FactorizedCategorical(3, 5, context_dim=2)), context_shape_of(StudentT(2))
        (torch.Size([2]), torch.Size([]))
    """
    given = getattr(base, "context_shape", None) or getattr(base, "context_dim", 0)
    return shape_of(given) if given else torch.Size()


def example_of(base: nn.Module) -> Distribution:
    """Return the law that a base gives, at a context of zeros if it takes one, whose shapes and support are those of
    all.

    Example:
        >>> example_of(pf.flows.FactorizedCategorical(3, 5, context_dim=2)).event_shape
        torch.Size([3])
    """
    shape = context_shape_of(base)
    law: Distribution = base(torch.zeros(shape).to(floating_tensor(base))) if shape else base()
    return law


def checked_context(context: ArrayLike | None, module: Any, name: str) -> Tensor | None:
    """Return a context in the dtype and on the device of the flow or the base that takes it.

    Args:
        context: ``(..., *context_shape)``, or None.
        module: a flow or a base.
        name: what messages call it.

    Raises:
        ShapeError: if the context has another shape, or is missing.
        DataError: if it has NaN or infinite values, where values are validated; names the row.

    Example:
        >>> checked_context([1, 2], pf.flows.MAF(3, context_dim=2), "this flow")
        tensor([1., 2.])
    """
    shape, given = module.context_shape, context
    if context is not None:
        context = as_tensor("context", context, floating_tensor(module))
    if (None if context is None else context.shape[context.dim() - len(shape) :]) != (shape or None):
        got = "none" if context is None else f"shape {tuple(context.shape)}"
        raise ShapeError(f"{name} has context {described(shape)}, but got {got}{_hint_at_classes(given)}")
    if context is not None and is_validated() and runs_in_python():
        require_finite("context", context, len(shape))
    return context


def standard_normal(shape: torch.Size) -> Distribution:
    """Return the law of independent standard normal variables that form one event of this shape."""
    return dist.Normal(torch.zeros(shape), torch.ones(shape)).to_event(len(shape))


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
        self.law = Held(dist.StudentT(torch.full(shape, df)).to_event(len(shape)))

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of the distribution."""
        return self.law.batch_shape

    def forward(self) -> Distribution:
        # The constructor would make, and validate, a chi-square variable of its own, which torch.compile refuses.
        law: Any = self.law()
        law.base_dist.df = 1 + F.softplus(self.raw_df)
        law.base_dist._chi2.concentration = 0.5 * law.base_dist.df
        return law


def _checked_event(base: Distribution, event_shape: torch.Size) -> Distribution:
    """Return the base if its events have this shape."""
    if base.event_shape != event_shape:
        raise ShapeError(
            f"the base of a flow of {as_given(event_shape)} dimensions must have event shape {tuple(event_shape)}, but "
            f"has batch shape {tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}: use "
            f".expand({list(event_shape)}).to_event({len(event_shape)})"
        )
    return base


def _hint_at_classes(context: Any) -> str:
    """Return what to do with a context that may be the numbers of classes, for a message."""
    is_index = isinstance(context, Tensor) and not context.is_floating_point() and not context.is_complex()
    return ": classes are one-hot vectors, which torch.nn.functional.one_hot makes" if is_index else ""

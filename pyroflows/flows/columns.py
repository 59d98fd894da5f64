"""Laws of vectors made of angles and real numbers: uniform on circles, and independent blocks of columns."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyroflows.constraints import circular, on_events, without_events
from pyroflows.errors import ShapeError
from pyroflows.flows.law import shapes_of_law


class CircularUniform(dist.TorchDistribution):
    r"""The uniform law on the circle, of density :math:`1 / (2 \pi)` at every angle, whatever its turns.

    Args:
        like: a tensor of the batch shape, whose dtype and device the draws have.

    Example:
        >>> base = CircularUniform(torch.zeros(2)).to_event(1)
        >>> base.sample().abs().max() <= torch.pi, base.log_prob(torch.zeros(2))
        (tensor(True), tensor(-3.6758))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    __repr__ = shapes_of_law
    support = circular
    has_rsample = True

    def __init__(self, like: Tensor, validate_args: bool | None = None) -> None:
        self.like = like
        super().__init__(like.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CircularUniform":
        return CircularUniform(self.like.expand(torch.Size(batch_shape)))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(torch.Size(sample_shape))
        return math.pi * (2 * torch.rand(shape, dtype=self.like.dtype, device=self.like.device) - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        # What is no number has no density.
        return torch.zeros_like(self.like) + (value - value) - math.log(2 * math.pi)


class Blocks(dist.TorchDistribution):
    """The law of a vector of independent blocks of columns, each with a law of its own.

    It is a base for flows of angles and real numbers, ``pf.flows.Blocks([angles, reals])``.

    Args:
        laws: the laws of the blocks, each with an event shape of one axis and all of one batch shape.

    Raises:
        ShapeError: if the laws have other shapes.

    Example:
        >>> angles = dist.VonMises(torch.zeros(2), torch.ones(2)).to_event(1)
        >>> base = Blocks([angles, dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)])
        >>> base.event_shape, base.log_prob(base.sample((5,))).shape
        (torch.Size([5]), torch.Size([5]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    __repr__ = shapes_of_law

    def __init__(self, laws: Sequence[Distribution], validate_args: bool | None = None) -> None:
        shapes = [tuple(law.event_shape) for law in laws]
        if not laws or any(len(shape) != 1 for shape in shapes) or len({law.batch_shape for law in laws}) != 1:
            raise ShapeError(
                "Blocks needs laws of vectors with one batch shape, but got event shapes "
                f"{shapes} and batch shapes {[tuple(law.batch_shape) for law in laws]}"
            )
        self.lengths = [length for (length,) in shapes]
        # As attributes of their own, the laws are found by a flow, which moves and casts their tensors.
        for i, law in enumerate(laws):
            setattr(self, f"block{i}", law)
        super().__init__(laws[0].batch_shape, torch.Size([sum(self.lengths)]), validate_args=validate_args)

    @property
    def laws(self) -> list[Any]:
        """The laws of the blocks."""
        return [getattr(self, f"block{i}") for i in range(len(self.lengths))]

    @property
    def has_rsample(self) -> bool:
        return all(law.has_rsample for law in self.laws)

    @property
    def support(self) -> constraints.Constraint:
        parts = [without_events(law.support) for law in self.laws]
        return on_events(constraints.cat(parts, -1, self.lengths), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Blocks":
        return Blocks([law.expand(batch_shape) for law in self.laws])

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return torch.cat([law.sample(torch.Size(sample_shape)) for law in self.laws], -1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return torch.cat([law.rsample(torch.Size(sample_shape)) for law in self.laws], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        parts = value.split(self.lengths, -1)
        return torch.stack([law.log_prob(part) for law, part in zip(self.laws, parts, strict=True)]).sum(0)


def standard_base(shape: torch.Size, angles: Sequence[bool]) -> Distribution:
    """Return the law of independent elements that form one event, angles uniform and real numbers standard normal.

    Args:
        shape: the event shape.
        angles: which indices along its last axis are angles.

    Example:
        >>> standard_base(torch.Size([3]), [True, False, False]).lengths
        [1, 2]
    """
    runs = [(is_angle, len(list(run))) for is_angle, run in groupby(angles)]
    blocks = [_elements(torch.Size([*shape[:-1], length]), is_angle) for is_angle, length in runs]
    return blocks[0] if len(blocks) == 1 else Blocks(blocks)


def _elements(shape: torch.Size, is_angle: bool) -> Distribution:
    zeros = torch.zeros(shape)
    return (CircularUniform(zeros) if is_angle else dist.Normal(zeros, torch.ones(shape))).to_event(len(shape))

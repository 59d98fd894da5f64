"""The recipe of the noise that makes integers continuous."""

import math
from collections.abc import Sequence

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import constraints

from pyroflows.flows.flow import Flow
from pyroflows.options import checked_int
from pyroflows.shapes import shape_of
from pyroflows.transforms import Coupling, masks

# A logistic variable with this scale has variance 1.
UNIT_LOGISTIC = math.sqrt(3) / math.pi


class Dequantizer(Flow):
    r"""The noise of variational dequantisation (Ho et al. 2019, arXiv:1902.00275): a law :math:`q(u \mid x)` of u in
    :math:`(0, 1)^D`, given integers x of the same shape,

    .. math:: u = \operatorname{sigmoid}(t(z, x)),

    where t is a stack of affine couplings that see x, and z is logistic. :func:`pyroflows.fit_density` trains it beside
    a density, as ``dequantization``. It starts at uniform noise.

    Couplings of images ``(C, H, W)``, and of events of two or four axes, are convolutional. They transform the two
    colours of a checkerboard, then the two halves of the channels if there are several. Couplings of vectors transform
    every second dimension by turns. Sampling and scoring are parallel.

    Args:
        dim: the size or shape of the integers.
        num_layers: number of couplings, at least 1.
        hidden_dims: widths of the hidden layers of each coupling's network.

    Raises:
        OptionError: if there is no layer, or events have more than four axes.

    Example:
        >>> noise = Dequantizer((3, 8, 8), hidden_dims=(16, 16))
        >>> pixels = torch.randint(256, (5, 3, 8, 8))
        >>> u = noise(pixels).sample()
        >>> u.shape, bool((u > 0).all() and (u < 1).all())
        (torch.Size([5, 3, 8, 8]), True)
    """

    def __init__(self, dim: int | Sequence[int], num_layers: int = 4, hidden_dims: Sequence[int] = (32, 32)) -> None:
        shape = shape_of(dim)
        conditioner = "conv" if len(shape) > 1 else "mlp"
        turns = _masks(shape)
        layers = [
            Coupling(shape, "affine", turns[i % len(turns)], conditioner, hidden_dims, context_dim=shape)
            for i in range(checked_int("num_layers", num_layers))
        ]
        base = dist.Logistic(torch.zeros(shape), UNIT_LOGISTIC * torch.ones(shape)).to_event(len(shape))
        super().__init__(layers, base, constraints.unit_interval)


def _masks(shape: torch.Size) -> list[Tensor]:
    """Return the masks of couplings that take turns, without those that would let all pass."""
    size, *rest = shape
    first = masks.checkerboard(*rest) if rest else masks.alternating(size)
    others = [~first]
    if rest and size > 1:
        others += [masks.half(size), ~masks.half(size)]
    return [first, *(mask for mask in others if not mask.all())]

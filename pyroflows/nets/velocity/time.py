"""Features of time for networks of continuous flows."""

import math

import torch
from torch import Tensor

# The frequencies that the networks of the library see.
NUM_FREQUENCIES = 3


def time_features(t: Tensor, num_frequencies: int) -> Tensor:
    r"""Return :math:`(t, \sin \pi k t, \cos \pi k t)` for k up to the number of frequencies K.

    Args:
        t: times between 0 and 1, of any shape ``(...)``.
        num_frequencies: K.

    Shapes: the features are ``(..., 1 + 2 K)``.

    Example:
        >>> time_features(torch.tensor(0.5), 1)
        tensor([ 5.0000e-01,  1.0000e+00, -4.3711e-08])
    """
    t = t.unsqueeze(-1)
    angles = t * (math.pi * torch.arange(1, num_frequencies + 1, dtype=t.dtype, device=t.device))
    return torch.cat([t, angles.sin(), angles.cos()], -1)

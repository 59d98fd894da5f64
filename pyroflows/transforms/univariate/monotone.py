"""Monotone network: the deep sigmoidal map."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.errors import OptionError
from pyroflows.transforms.root import increasing_root
from pyroflows.transforms.univariate.base import Pair

EPS = 1e-3
SPREAD = 3.0
_SOFTPLUS_OF_THIS_IS_ONE = math.log(math.expm1(1))


class Monotone:
    def __init__(self, num_units: int = 8) -> None:
        if num_units < 1:
            raise OptionError(f"Monotone needs num_units >= 1, got {num_units}")
        self.num_units = num_units
        self.num_params = 3 * num_units
        self._centers = [SPREAD * (2 * i + 1 - num_units) / num_units for i in range(num_units)]

    def forward_and_ladj(self, z: Tensor, theta: Tensor) -> Pair:
        value, slope = _mixture(z, *self._units(theta, z.dim()))
        return value, slope.log()

    def inverse_and_ladj(self, x: Tensor, theta: Tensor) -> Pair:
        a, b, log_w = self._units(theta, x.dim())
        with torch.no_grad():
            roots = (x - (1 - EPS) * b) / (EPS + (1 - EPS) * a)
        z = increasing_root(lambda z: _mixture(z, a, b, log_w), x, roots.amin(0), roots.amax(0))
        return z, -_mixture(z, a, b, log_w)[1].log()

    def _units(self, theta: Tensor, num_dims: int) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and log w of shape ``(units, ...)``, with the dimensions of z."""
        padding = (1,) * (num_dims + 1 - theta.dim())
        theta = theta.reshape(*padding, *theta.shape).movedim(-1, 0)
        a, b, w = theta.unflatten(0, (3, self.num_units))
        a = F.softplus(a + _SOFTPLUS_OF_THIS_IS_ONE)
        m = torch.tensor(self._centers, dtype=a.dtype, device=a.device).reshape(-1, *[1] * num_dims)
        return a, m + b - a * m, F.log_softmax(w, 0)

    def __repr__(self) -> str:
        return f"Monotone(num_units={self.num_units})"


def _mixture(z: Tensor, a: Tensor, b: Tensor, log_w: Tensor) -> Pair:
    u = a * z + b
    both = torch.stack([u, -u])
    log_terms = log_w + F.logsigmoid(both)
    log_s, log_one_minus_s = torch.logsumexp(log_terms, 1)
    slope = (a * torch.softmax(log_terms, 1) * torch.sigmoid(-both)).sum((0, 1))
    return EPS * z + (1 - EPS) * (log_s - log_one_minus_s), EPS + (1 - EPS) * slope

"""Univariate maps: increasing functions of one variable, with their parameters in the last dimension.

A map knows scalars and nothing of dimensions; structures (elementwise, coupling, autoregressive) apply it. At
``theta = 0`` a map is the identity.
"""

from collections.abc import Callable

from pyroflows.errors import OptionError
from pyroflows.transforms.univariate.affine import Additive, Affine
from pyroflows.transforms.univariate.base import Univariate
from pyroflows.transforms.univariate.monotone import Monotone
from pyroflows.transforms.univariate.polynomial import SOS
from pyroflows.transforms.univariate.spline import Spline

__all__ = ["SOS", "Additive", "Affine", "Monotone", "Spline", "Univariate", "univariate_named"]

_NAMES: dict[str, Callable[[], Univariate]] = {
    "additive": Additive,
    "affine": Affine,
    "monotone": Monotone,
    "sos": SOS,
    "spline": Spline,
}


def univariate_named(univariate: str | Univariate) -> Univariate:
    """The map of a name, or the map itself."""
    if not isinstance(univariate, str):
        return univariate
    if univariate not in _NAMES:
        raise OptionError(f"univariate must be one of {sorted(_NAMES)} or an instance, got {univariate!r}")
    return _NAMES[univariate]()

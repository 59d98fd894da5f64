"""Univariate maps: increasing functions of one variable, whose parameters stand in the last dimension of ``theta``.

A map knows scalars and nothing of dimensions; structures (elementwise, coupling, autoregressive) apply it to each
element. At ``theta = 0`` a map is the identity.
"""

from collections.abc import Callable, Sequence

from pyroflows.errors import OptionError
from pyroflows.options import kind
from pyroflows.transforms.univariate.affine import Additive, Affine
from pyroflows.transforms.univariate.base import Univariate
from pyroflows.transforms.univariate.by_column import ByColumn
from pyroflows.transforms.univariate.circular_spline import CircularSpline
from pyroflows.transforms.univariate.monotone import Monotone
from pyroflows.transforms.univariate.polynomial import SOS
from pyroflows.transforms.univariate.scale import LeakyReLU, Scale
from pyroflows.transforms.univariate.sinh_arcsinh import SinhArcsinh
from pyroflows.transforms.univariate.spline import Spline

__all__ = [
    "SOS",
    "Additive",
    "Affine",
    "AffineMap",
    "ByColumn",
    "CircularSpline",
    "LeakyReLU",
    "Monotone",
    "Scale",
    "SinhArcsinh",
    "Spline",
    "Univariate",
    "UnivariateLike",
    "univariate_named",
]

AffineMap = Additive | Affine | Scale
UnivariateLike = str | Univariate | Sequence[str | Univariate]

_NAMES: dict[str, Callable[[], Univariate]] = {
    "additive": Additive,
    "affine": Affine,
    "circular_spline": CircularSpline,
    "leaky_relu": LeakyReLU,
    "monotone": Monotone,
    "scale": Scale,
    "sinh_arcsinh": SinhArcsinh,
    "sos": SOS,
    "spline": Spline,
}


def univariate_named(univariate: UnivariateLike) -> Univariate:
    """Return the map of this name with its default options, or the map itself if it is not a name.

    A list of names or maps, one for each column, gives the :class:`ByColumn` of them.

    Raises:
        OptionError: if the name is unknown, or the map is a class.

    Example:
        >>> univariate_named("spline"), univariate_named(Spline(bins=4))
        (Spline(bins=8, bound=5.0), Spline(bins=4, bound=5.0))
    """
    if isinstance(univariate, type):
        raise OptionError(f"univariate must be one of {sorted(_NAMES)} or an instance, got {kind(univariate)}")
    if isinstance(univariate, Sequence) and not isinstance(univariate, str):
        return ByColumn([univariate_named(part) for part in univariate])
    if not isinstance(univariate, str):
        return univariate
    if univariate not in _NAMES:
        raise OptionError(f"univariate must be one of {sorted(_NAMES)} or an instance, got {univariate!r}")
    return _NAMES[univariate]()

"""A recipe as a value: its name and its options, which can be compared, printed and written to a file."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyroflows.errors import OptionError
from pyroflows.flows.base import Base
from pyroflows.flows.flow import Flow
from pyroflows.flows.recipes import IAF, MAF, NAF, NICE, NSF, SOS, Gaussian, Planar, Radial, RealNVP, Sylvester

# Above, the score of an autoregressive layer, which goes dimension by dimension, costs more than its strength is worth.
MAX_AUTOREGRESSIVE_DIM = 64


def default_flow(dim: int, base: Base = None) -> Flow:
    """The flow of a guide that was given none, as strong as its dimension allows at little cost.

    It is an :class:`IAF`; a :class:`RealNVP` above 64 dimensions, where scoring an IAF becomes dear; and a
    :class:`Planar` flow of one dimension, where affine layers make a Gaussian.

    Args:
        dim: the event size D.
        base: base distribution, see :class:`pyroflows.Flow`.
    """
    if dim == 1:
        return Planar(dim, base=base)
    if dim <= MAX_AUTOREGRESSIVE_DIM:
        return IAF(dim, base=base)
    return RealNVP(dim, base=base)


_CLASSES = (IAF, MAF, NAF, NICE, NSF, SOS, Gaussian, Planar, Radial, RealNVP, Sylvester)
_RECIPES: dict[str, Callable[..., Flow]] = {"default": default_flow, **{flow.__name__: flow for flow in _CLASSES}}


@dataclass(frozen=True, init=False, repr=False)
class Recipe:
    """A function ``dim -> flow`` that is known by its name and its options.

    Guides and files keep a recipe where they cannot keep a function: two recipes are equal if their names and options
    are, those that were left at their defaults included, and :meth:`to_json` is all that rebuilds the flow.

    Args:
        name: a flow of :mod:`pyroflows.flows`, such as "MAF"; or "default", which is :class:`IAF`, or
            :class:`RealNVP` above 64 dimensions, or :class:`Planar` in a single one.
        options: arguments of the flow besides ``dim``, of kinds that JSON has; "default" takes ``base`` alone.

    Raises:
        OptionError: if the name or an option is unknown, or an option is none that JSON can hold, such as a
            distribution as ``base``.

    Example:
        >>> recipe = Recipe("MAF", num_layers=2, hidden_dims=(16, 16))
        >>> recipe(3).event_shape
        torch.Size([3])
        >>> recipe == Recipe.from_json(recipe.to_json())
        True
        >>> recipe
        Recipe('MAF', num_layers=2, hidden_dims=[16, 16])
    """

    name: str
    # As text they cannot be changed, and what is equal in JSON is equal here, lists and tuples above all.
    _options: str

    def __init__(self, name: str, **options: Any) -> None:
        if name not in _RECIPES:
            raise OptionError(f"there is no recipe {name!r}: it must be one of {list(_RECIPES)}")
        defaults = _defaults(name)
        for option, value in options.items():
            if option not in defaults:
                raise OptionError(f"the recipe {name!r} has no option {option!r}: it has {list(defaults)}")
            if not _is_json(value):
                raise OptionError(
                    f"{option} of the recipe {name!r} must be a value that JSON can hold, got "
                    f"{type(value).__name__}: use a function such as lambda dim: pf.flows.IAF(dim, {option}=...)"
                )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "_options", json.dumps({**defaults, **options}))

    @property
    def options(self) -> dict[str, Any]:
        """All options, as JSON has them: sequences are lists."""
        return json.loads(self._options)

    def __call__(self, dim: int) -> Flow:
        """The flow of ``dim`` dimensions."""
        return _RECIPES[self.name](dim, **self.options)

    def to_json(self) -> dict[str, Any]:
        """The recipe as a JSON object ``{"name": ..., "options": {...}}``."""
        return {"name": self.name, "options": self.options}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Recipe":
        """The recipe of which :meth:`to_json` made ``value``."""
        return cls(value["name"], **value["options"])

    def __repr__(self) -> str:
        defaults = json.loads(json.dumps(_defaults(self.name)))
        changed = [f"{key}={value!r}" for key, value in self.options.items() if value != defaults[key]]
        return f"Recipe({', '.join([repr(self.name), *changed])})"


def _defaults(name: str) -> dict[str, Any]:
    """The options of a recipe besides ``dim``, with their defaults."""
    parameters = inspect.signature(_RECIPES[name]).parameters
    return {option: parameter.default for option, parameter in parameters.items() if option != "dim"}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True

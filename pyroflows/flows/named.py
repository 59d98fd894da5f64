"""Recipes as values: a name and options, which can be compared, printed and written to a file."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyroflows.errors import OptionError
from pyroflows.flows.base import Base
from pyroflows.flows.continuous_recipes import CNF
from pyroflows.flows.flow import Flow
from pyroflows.flows.recipes import (
    BNAF,
    IAF,
    MAF,
    NAF,
    NICE,
    SOS,
    Gaussian,
    Planar,
    Radial,
    RealNVP,
    Residual,
    Sylvester,
)
from pyroflows.flows.spline_recipes import NSF, CircularNSF

# In more dimensions the score of an autoregressive layer, which goes dimension by dimension, costs more than it gains.
MAX_AUTOREGRESSIVE_DIM = 64


def default_flow(dim: int, base: Base = None, scaled: bool = False) -> Flow:
    """Return the flow that a guide uses by default, the strongest that is cheap in this dimension.

    It is an :class:`IAF` from 2 to 64 dimensions, a :class:`RealNVP` above, where scoring an IAF becomes dear, and a
    :class:`Planar` flow in one dimension, where affine layers would make no more than a Gaussian.

    Args:
        dim: the event size D.
        base: base distribution, see :class:`pyroflows.Flow`.
        scaled: whether its networks are :class:`pyroflows.nets.ScaledMADE` and :class:`pyroflows.nets.ScaledMLP`, which
            plain SVI trains at larger learning rates.

    Example:
        >>> [type(default_flow(dim)).__name__ for dim in (1, 64, 65)]
        ['Planar', 'IAF', 'RealNVP']
    """
    if dim == 1:
        return Planar(dim, base=base)
    if dim <= MAX_AUTOREGRESSIVE_DIM:
        return IAF(dim, conditioner="scaled_made" if scaled else "made", base=base)
    return RealNVP(dim, conditioner="scaled_mlp" if scaled else "mlp", base=base)


_CLASSES = (
    BNAF,
    CNF,
    IAF,
    MAF,
    NAF,
    NICE,
    NSF,
    SOS,
    CircularNSF,
    Gaussian,
    Planar,
    Radial,
    RealNVP,
    Residual,
    Sylvester,
)
_RECIPES: dict[str, Callable[..., Flow]] = {"default": default_flow, **{flow.__name__: flow for flow in _CLASSES}}


@dataclass(frozen=True, init=False, repr=False)
class Recipe:
    """A function from a dimension to a flow, given by the flow's name and options.

    Guides and files keep recipes, since a file cannot hold a function. Two recipes are equal if their names and all of
    their options are, including those that were left at their defaults. :meth:`to_json` returns all that is needed to
    rebuild the flow.

    Args:
        name: a flow of :mod:`pyroflows.flows`, such as "MAF"; or "default", which is :class:`IAF` from 2 to 64
            dimensions, :class:`RealNVP` above, and :class:`Planar` in one dimension.
        options: arguments of the flow besides ``dim``, of types that JSON has; "default" takes ``base`` and
            ``scaled``, see :func:`default_flow`.

    Raises:
        OptionError: if the name or an option is unknown, or JSON cannot hold an option, such as a distribution as
            ``base``.

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
    # They are JSON text, which cannot be changed, and in which equal lists and tuples are equal.
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
        """All options, with their defaults, as JSON has them: sequences are lists."""
        return json.loads(self._options)

    def __call__(self, dim: int) -> Flow:
        """Return a new flow of ``dim`` dimensions."""
        return _RECIPES[self.name](dim, **self.options)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as a JSON object ``{"name": ..., "options": {...}}``."""
        return {"name": self.name, "options": self.options}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Recipe":
        """Return the recipe from the JSON object that :meth:`to_json` returned."""
        return cls(value["name"], **value["options"])

    @classmethod
    def of(cls, flow_fn: Any) -> "Recipe | None":
        """Return the recipe that makes the same flows as a class does, perhaps with options by ``functools.partial``.

        Args:
            flow_fn: the class, or the partial; anything else has no recipe.

        Returns:
            The recipe; None if there is none, such as for an option that JSON cannot hold.

        Example:
            >>> Recipe.of(IAF), Recipe.of(lambda dim: IAF(dim))
            (Recipe('IAF'), None)
        """
        if isinstance(flow_fn, cls):
            return flow_fn
        is_partial = isinstance(flow_fn, partial) and not flow_fn.args
        made, options = (flow_fn.func, flow_fn.keywords) if is_partial else (flow_fn, {})
        names = [name for name, function in _RECIPES.items() if function is made]
        try:
            return cls(names[0], **options) if names else None
        except OptionError:
            return None

    def __repr__(self) -> str:
        defaults = json.loads(json.dumps(_defaults(self.name)))
        changed = [f"{key}={value!r}" for key, value in self.options.items() if value != defaults[key]]
        return f"Recipe({', '.join([repr(self.name), *changed])})"


def _defaults(name: str) -> dict[str, Any]:
    """Return the options of a recipe besides ``dim``, with their defaults."""
    parameters = inspect.signature(_RECIPES[name]).parameters
    return {option: parameter.default for option, parameter in parameters.items() if option != "dim"}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True

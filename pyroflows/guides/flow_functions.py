"""What makes the flow of a guide: a recipe, a class of flows, or another function of the dimension."""

import inspect
from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoGuide
from torch import nn
from torch.distributions import Transform

from pyroflows.errors import OptionError
from pyroflows.flows import Flow, Recipe


def as_flow_fn(flow_fn: Any) -> Callable[[int], Any]:
    """Return a function from a dimension to a flow; a recipe wherever one says the same, since files keep recipes.

    Args:
        flow_fn: a recipe; a class of flows, perhaps with options by ``functools.partial``; or another function.

    Raises:
        OptionError: if it is none of these, or a class that needs more than a dimension.

    Example:
        >>> from functools import partial
        >>> as_flow_fn(pf.flows.NSF), as_flow_fn(partial(pf.flows.MAF, num_layers=2))
        (Recipe('NSF'), Recipe('MAF', num_layers=2))
    """
    if isinstance(flow_fn, Flow) or not callable(flow_fn):
        raise OptionError(
            "flow_fn must be a function latent_dim -> flow, such as lambda dim: pf.flows.IAF(dim), or a class of "
            f"flows, such as pf.flows.IAF, got {type(flow_fn).__name__}"
        )
    if isinstance(flow_fn, type):
        _check_class(flow_fn)
    return Recipe.of(flow_fn) or flow_fn


def _check_class(cls: type) -> None:
    name = cls.__name__
    if issubclass(cls, AutoGuide):
        raise OptionError(f"{name} is a class of guides, from which a guide of the model is made: give {name}(model)")
    if not issubclass(cls, nn.Module | Transform):
        raise OptionError(
            f"{name} is no class of flows: give one such as pf.flows.IAF, or lambda dim: pf.flows.IAF(dim)"
        )
    try:
        inspect.signature(cls).bind(1)
    except TypeError:
        raise OptionError(f"{name} is not made of a dimension alone: give lambda dim: {name}(...)") from None
    except ValueError:  # a class that shows no arguments
        pass

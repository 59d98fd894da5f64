"""Choose how a flow is fitted to draws: by maximum likelihood, or by flow matching."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pyroflows.errors import OptionError
from pyroflows.fitting.density import fit_density
from pyroflows.fitting.flow_matching import fit_flow_matching
from pyroflows.fitting.velocity_regression import continuous_layer
from pyroflows.flows import Flow

# Each takes a flow, rows x, contexts, weights, and options of its own, trains the flow in place, and returns the fit.
METHODS: dict[str, Callable[..., Any]] = {"maximum_likelihood": fit_density, "flow_matching": fit_flow_matching}


def fit_method(flow: Flow, method: str = "auto") -> Callable[..., Any]:
    """Return the function that fits a flow to draws.

    Args:
        flow: the flow to be fitted.
        method: "maximum_likelihood", "flow_matching", or "auto" for flow matching where the flow is continuous.

    Raises:
        OptionError: if the method is unknown.

    Example:
        >>> fit_method(pf.flows.MAF(2)) is pf.fit_density, fit_method(pf.flows.CNF(2)) is pf.fit_flow_matching
        (True, True)
    """
    if method == "auto":
        method = "flow_matching" if _can_be_matched(flow) else "maximum_likelihood"
    if method not in METHODS:
        raise OptionError(f"method must be one of {['auto', *METHODS]}, got {method!r}")
    return METHODS[method]


def _can_be_matched(flow: Flow) -> bool:
    try:
        continuous_layer(flow)
    except OptionError:
        return False
    return True


def require_options(fit: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise if a function that fits flows does not take an option.

    Raises:
        OptionError: if so; names the option.

    Example:
        >>> require_options(pf.fit_density, {"epochs": 3})
        Traceback (most recent call last):
        pyroflows.errors.OptionError: fit_density has no option 'epochs', but ...
    """
    known = list(inspect.signature(fit).parameters)
    for name in options:
        if name not in known:
            raise OptionError(f"{fit.__name__} has no option {name!r}, but {', '.join(known[2:])}")

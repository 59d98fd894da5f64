"""The check of the guide that a user gives to :class:`pyroflows.FlowVI`."""

from typing import Any

from torch import nn

from pyroflows.errors import OptionError
from pyroflows.flows import Flow
from pyroflows.guides import AutoFlow
from pyroflows.guides.flow_functions import as_flow_fn


def check_guide(guide: Any) -> None:
    """Raise if a guide is neither None, nor a flow guide, nor what makes a flow.

    Args:
        guide: what the user gave.

    Raises:
        OptionError: if so; says what to give instead.

    Example:
        >>> check_guide(pf.flows.IAF(3))
        Traceback (most recent call last):
        pyroflows.errors.OptionError: guide must be a flow guide of the model, or a function latent_dim -> flow, ...
    """
    if guide is None or isinstance(guide, AutoFlow):
        return
    if isinstance(guide, Flow):
        raise OptionError(
            "guide must be a flow guide of the model, or a function latent_dim -> flow, got a flow: give a "
            "function such as lambda dim: pf.flows.IAF(dim)"
        )
    if isinstance(guide, nn.Module):
        raise OptionError(
            f"FlowVI trains flow guides, but got {type(guide).__name__}: use pyro.infer.SVI for it, or give "
            "a function latent_dim -> flow"
        )
    if not callable(guide):
        raise OptionError(f"guide must be a flow guide of the model, or a function latent_dim -> flow, got {guide!r}")
    as_flow_fn(guide)

"""The check of the guide that a user gives to :class:`pyroflows.FlowVI`."""

from typing import Any

import torch
from torch import nn

from pyroflows.errors import OptionError
from pyroflows.flows import Flow
from pyroflows.guides import AutoFlow
from pyroflows.guides.flow_functions import as_flow_fn
from pyroflows.guides.structured import AutoStructuredFlow
from pyroflows.models.arguments import in_dtype
from pyroflows.models.structure import describe
from pyroflows.models.tracing import Model


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


def guide_for(model: Model, guide: Any, dtype: torch.dtype | None, args: Any, kwargs: Any) -> AutoFlow:
    """The guide of a fit: the user's, or one with a flow for each plate where rows with latents are subsampled.

    Args:
        model: the Pyro model.
        guide: what the user gave, see :func:`check_guide`.
        dtype: the dtype of the fit.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
    """
    if isinstance(guide, AutoFlow):
        return guide
    structure = describe(in_dtype(model, dtype), args, kwargs).summed_out()
    is_local = any(plate.is_subsampled for site in structure.latents for plate in site.plates)
    return (AutoStructuredFlow if is_local else AutoFlow)(model, guide, dtype=dtype)

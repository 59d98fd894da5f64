"""One run of a model, outside of a batch."""

from typing import Any

from pyroflows.errors import FlowError
from pyroflows.models.enumeration import run_handler
from pyroflows.models.run import RunOptions, RunRecord, SiteValues
from pyroflows.models.structure import Enumeration
from pyroflows.models.tracing import Model


def run_once(
    model: Model, args: Any, kwargs: Any, values: SiteValues, enumeration: Enumeration | None = None
) -> RunRecord:
    """Run a model once at given values of its latents, with validation and gradients.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        values: values by latent site.
        enumeration: the latents that are summed out; None if there are none.

    Raises:
        ValueError: if validation fails; if it fails at the value of a site, the message names the site.
    """
    with run_handler(RunOptions(enumeration=enumeration), values, {}, {}, {}, single=True) as handler:
        try:
            model(*args, **kwargs)
        except ValueError as error:
            if handler.scored is None or isinstance(error, FlowError):
                raise
            raise ValueError(f"at site '{handler.scored}': {error}") from error
    return handler.record

"""The requirement that an ELBO sums out the discrete latents of a model that a guide leaves to it."""

import sys

import torch
from pyro.infer.elbo import ELBO
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK

from pyroflows.errors import ModelError
from pyroflows.models.structure import ModelStructure


def require_enumeration(structure: ModelStructure) -> None:
    """Raise if a guide is called in a training step of an ELBO of Pyro's that draws discrete latents from their prior.

    Such an ELBO would train the guide, without an error, as if the draws were data.

    Args:
        structure: the structure of the guide's model.

    Raises:
        ModelError: if so; names a site, and says what to do.
    """
    if not structure.enumerated or not torch.is_grad_enabled():
        return
    elbo = _calling_elbo()
    if elbo is None or any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK):
        return
    site = structure.enumerated[0]
    raise ModelError(
        f"latent site '{site.name}' is discrete ({site.family}), and {type(elbo).__name__} would draw it from its "
        f"prior: use TraceEnum_ELBO(max_plate_nesting={structure.max_plate_nesting}), with the model in "
        "pyro.infer.config_enumerate, which sums it out; or pf.FlowVI, which does so by itself"
    )


def _calling_elbo() -> ELBO | None:
    """The ELBO in a method of which this call takes place; None outside of such a method."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get("self")
        if isinstance(caller, ELBO):
            return caller
    return None

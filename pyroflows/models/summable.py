"""The requirement that the discrete latents of a model can be summed out."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.runtime import _ENUM_ALLOCATOR

from pyroflows.compiling.singular import is_singular
from pyroflows.errors import FlowError, ModelError
from pyroflows.models.once import run_once
from pyroflows.models.shared_results import WrittenShared
from pyroflows.models.size_guard import SizeGuard, TooLarge
from pyroflows.models.structure import ModelStructure
from pyroflows.models.tracing import Model

# A run with enumeration may make tensors of so many numbers, and of so many for each entry of the values of all sites.
MAX_NUMBERS, MAX_NUMBERS_EACH = 2**22, 100


@torch.enable_grad()  # since only runs with gradients share results
def checked_summable(structure: ModelStructure, model: Model, args: Any, kwargs: Any, trace: Trace) -> ModelStructure:
    """Raise if the discrete latents of a model cannot be summed out, by a run in which they are.

    Args:
        structure: the structure of the model, with the discrete latents set apart.
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        trace: a run of the model, whose values the other latents take.

    Returns:
        The structure, without shared results if the model writes into tensors that would be shared.

    Raises:
        ModelError: if the model does not run with all values of a discrete site at once, or at a cost that is
            exponential in the number of the sites; names a site, and says what to do.

    Example:
        >>> from pyroflows.models.structure import describe_run
        >>> def model():
        ...     z = pyro.sample("z", dist.Bernoulli(0.5))
        ...     pyro.sample("x", dist.Normal(1.0 if z else 0.0, 1.0))
        >>> structure, trace = describe_run(model, (), {})
        >>> checked_summable(structure.summed_out(), model, (), {}, trace)
        Traceback (most recent call last):
        pyroflows.errors.ModelError: the model does not run with all values of the discrete site 'z' at once, ...
    """
    if structure.enumeration is None:
        return structure
    values = {site.name: trace.nodes[site.name]["value"] for site in structure.latents}
    sites = (*structure.latents, *structure.enumerated, *structure.observed)
    limit = max(MAX_NUMBERS, MAX_NUMBERS_EACH * sum(site.shape.numel() for site in sites))
    names = [site.name for site in structure.enumerated]
    try:
        with pyro.validation_enabled(False), _apart(), SizeGuard(limit):
            try:
                run_once(model, args, kwargs, values, structure.enumeration)
            except WrittenShared:
                structure = replace(structure, enumeration=replace(structure.enumeration, shares_results=False))
                run_once(model, args, kwargs, values, structure.enumeration)
    except TooLarge as error:
        raise ModelError(
            f"summing out the discrete sites {_listed(names)} needs a tensor of {error.num_numbers:,} numbers, since "
            "something depends on the values of many of them at once: let sites that are independent given the rest "
            "stand in 'with pyro.plate(...)', and chains in pyro.markov"
        ) from None
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, FlowError) or is_singular(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"the model does not run with all values of the discrete site{'s' * (len(names) > 1)} {_listed(names)} at "
            "once, which stand along dimensions left of those of the plates "
            f"[{type(error).__name__}: {first}]: write torch.where(z == 0, a, b) for 'a if z == 0 else b', "
            "Vindex(x)[..., z] of pyro.ops.indexing for x[z], and index from the right, as in x[..., 0]"
        ) from error
    return structure


@contextmanager
def _apart() -> Iterator[None]:
    """A context in which a model runs unseen by handlers around it, such as those of an ELBO that calls a guide."""
    state = copy.deepcopy(vars(_ENUM_ALLOCATOR))
    try:
        with poutine.block():
            yield
    finally:
        vars(_ENUM_ALLOCATOR).clear()
        vars(_ENUM_ALLOCATOR).update(state)


def _listed(names: list[str]) -> str:
    shown = [f"'{name}'" for name in names]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]])

"""The requirement that the supports of latents are the same in every run of a model."""

from itertools import zip_longest
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyroflows.errors import ModelError
from pyroflows.models.bijections import bijection_of
from pyroflows.models.structure import ModelStructure, Site, describe
from pyroflows.models.supports import bounds, simplified, support_of
from pyroflows.models.tracing import Model
from pyroflows.randomness import seeded

# The unconstrained value of every entry in the second run: inside every support, and no value of special meaning.
ELSEWHERE = 0.4

_REWRITES = {
    "Uniform": "unit = pyro.sample('{name}_unit', dist.Uniform(0., 1.)) and "
    "pyro.deterministic('{name}', low + (high - low) * unit)",
    "Pareto": "ratio = pyro.sample('{name}_ratio', dist.Pareto(1., alpha)) and "
    "pyro.deterministic('{name}', scale * ratio)",
    "TransformedDistribution": "z = pyro.sample('{name}_base', base_dist) and "
    "pyro.deterministic('{name}', transform(z))",
}
_OTHER_REWRITE = (
    "distance = pyro.sample('{name}_distance', ...) from the bound, with a support of its own, and "
    "pyro.deterministic('{name}', bound + distance)"
)


def require_fixed_supports(structure: ModelStructure, model: Model, args: Any, kwargs: Any) -> None:
    """Raise if the support of a latent depends on other latents, since one bijection serves all runs.

    Where a bound is a tensor, the model runs once more, at other values.

    Args:
        structure: the structure of the model.
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ModelError: if a support differs between two runs; names the site, and says how to write the model instead.

    Example:
        >>> def model():
        ...     a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        ...     pyro.sample("b", dist.Uniform(0.0, a))
        >>> require_fixed_supports(describe(model, (), {}), model, (), {})
        Traceback (most recent call last):
        pyroflows.errors.ModelError: the support of latent site 'b' (Uniform) depends on other latents: ...
    """
    dependent = structure.latents if structure.enumerated else structure.latents[1:]
    bounded = {site.name: site for site in dependent if _has_tensor_bounds(site)}
    if not bounded:
        return
    # All discrete latents have their first or their last values.
    runs = [_supports_elsewhere(model, args, kwargs, place) for place in ((0, -1) if structure.enumerated else (0,))]
    for name, site, elsewhere in ((name, site, run) for name, site in bounded.items() for run in runs):
        other = elsewhere.get(name, site.support)
        if not _is_same(site.support, other):
            family = site.family
            rewrite = _REWRITES.get(family, _OTHER_REWRITE).format(name=name)
            raise ModelError(
                f"the support of latent site '{name}' ({family}) depends on other latents: it is "
                f"{site.support} in one run and {other} in another, and a flow needs the same in every run. "
                f"Draw a latent with a fixed support and compute the site from it: {rewrite}"
            )


def _has_tensor_bounds(site: Site) -> bool:
    return site.support is not None and any(isinstance(bound, Tensor) for bound in bounds(site.support))


class _Elsewhere(Messenger):
    """An effect handler that gives latents other values than the model's own handlers, such as those of a guide, do.

    Args:
        place: the place of the values of discrete latents among all that they can take.
    """

    def __init__(self, place: int) -> None:
        super().__init__()
        self._place = place

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or type(fn).__name__ == "_Subsample":
            return
        if fn.has_enumerate_support:
            msg["value"] = fn.enumerate_support()[self._place]
            return
        bijection = bijection_of(fn, fn.shape(), simplified(support_of(fn)))
        if bijection is not None:
            u = _like(msg).new_full(bijection.unconstrained_shape, ELSEWHERE)
            msg["value"], _ = bijection.constrain(u)


def _like(msg: Any) -> Tensor:
    """A tensor of the dtype and the device of a site."""
    if msg["value"] is not None:
        return msg["value"]
    try:
        return msg["fn"].sample()
    except NotImplementedError:
        return torch.zeros(())


def _supports_elsewhere(model: Model, args: Any, kwargs: Any, place: int) -> dict[str, Constraint | None]:
    """The supports of the latents in a run at other values, or at draws of the prior if the model refuses these."""
    with seeded(0), pyro.validation_enabled(False):
        try:
            structure = describe(_Elsewhere(place)(model), args, kwargs)
        except Exception:  # a model may raise anything at values that are not its own
            structure = describe(model, args, kwargs)
    return {site.name: site.support for site in structure.latents}


def _is_same(support: Constraint | None, other: Constraint | None) -> bool:
    if support is None or other is None:
        return support is other
    pairs = list(zip_longest(bounds(support), bounds(other), fillvalue=torch.nan))
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)

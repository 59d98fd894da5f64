"""What a fit may be, and what it may return: draws by site, in whatever form."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.guides import AutoFlow
from pyroflows.inference.amortized.amortized import Amortized as AmortizedFit
from pyroflows.inference.calibration.simulation import ConditionedModel
from pyroflows.inference.judged import JudgedApproximation
from pyroflows.inference.mcmc import Chains
from pyroflows.inference.vi import FlowVI
from pyroflows.inference.weights import WeightedDraws
from pyroflows.models.structure import ModelStructure
from pyroflows.models.tracing import Model
from pyroflows.options import kind

# A fit as a function of the conditioned model and a seed.
Fitter = Callable[[ConditionedModel, int], Any]


@runtime_checkable
class Amortized(Protocol):
    """Anything that has a posterior for every value of the observed sites."""

    def posterior(self, data: Any) -> Any:
        """The posterior given the value of the one observed site, or values by site if there are several."""


@dataclass(frozen=True)
class Draws:
    """Draws of one fit.

    Args:
        values: values ``(S, *site shape)`` by latent site.
        weights: the weights ``(S,)``, which sum to one.
        num_effective: how many independent draws of equal weight they are worth.
    """

    values: dict[str, Tensor]
    weights: np.ndarray
    num_effective: float


def fitter(fit: Any, model: Model) -> Fitter:
    """Make a function of a conditioned model and a seed of whatever a user calls a fit.

    Args:
        fit: a ``FlowVI``, an object with ``posterior``, or a function of the conditioned model.
        model: the model that is calibrated.

    Raises:
        OptionError: if it is none of them, or a ``FlowVI`` of another model.
    """
    if isinstance(fit, FlowVI):
        if isinstance(fit.guide, AutoFlow):
            raise OptionError(
                "the guide of this FlowVI is made of a model with its data, and would go on from one data set to the "
                "next: give it a function latent_dim -> flow instead"
            )
        if fit.model != model:
            raise OptionError(
                "the FlowVI has another model than the one that is calibrated, and would be used without it: give both "
                "the same object; to ask how another model fits data of this one, give a function, as in "
                "fit=lambda model: pf.FlowVI(other).run(y=model.data['y'])"
            )
        return lambda model, seed: _run(fit, model, seed)
    if isinstance(fit, AmortizedFit):
        return lambda model, seed: fit.posterior(model.data)
    if isinstance(fit, Amortized):
        return lambda model, seed: fit.posterior(_only(model.data))
    if callable(fit) and not isinstance(fit, type):
        return lambda model, seed: fit(model)
    hint = ""
    if isinstance(fit, JudgedApproximation | Chains | WeightedDraws):
        hint = ", which belongs to one data set: give what makes it, such as the FlowVI itself"
    raise OptionError(
        "fit must be a FlowVI, an object with posterior(y), or a function of the conditioned model that returns a "
        f"posterior or draws by site, got {kind(fit)}{hint}"
    )


def _run(vi: FlowVI, model: ConditionedModel, seed: int) -> Any:
    vi = copy.copy(vi)
    vi.model, vi.seed, vi.progress_bar = model, seed, False
    flow_fn = vi.guide
    if isinstance(flow_fn, FunctionType | partial):
        # A function may give the same flow each time, which would go on from one data set to the next.
        vi.guide = lambda dim: copy.deepcopy(flow_fn(dim))
    return vi.run(*model.args, **model.kwargs)


def _only(data: Mapping[str, Tensor]) -> Any:
    return next(iter(data.values())) if len(data) == 1 else dict(data)


@torch.no_grad()
def draws_of(result: Any, structure: ModelStructure, num_samples: int) -> Draws:
    """Read draws from what a fit has returned.

    Args:
        result: a posterior, which is asked for ``num_samples`` draws; weighted draws, chains, or draws by site.
        structure: the structure of the model.
        num_samples: the number of draws from a posterior.

    Raises:
        OptionError: if the result is none of these.
        ShapeError: if a latent is missing, or has another shape.
        DataError: if draws are not finite.
    """
    if isinstance(result, WeightedDraws):
        weights = result.weights.normalized.cpu().double().numpy()
        return Draws(_checked(result.draws, structure, len(weights)), weights, result.ess)
    ess = np.inf
    if isinstance(result, Chains):
        names = [site.name for site in structure.latents]
        ess = min(float(np.nanmin(result.ess[name], initial=np.inf)) for name in names)
        result = {name: value.flatten(0, 1) for name, value in result.draws.items()}
    elif callable(getattr(result, "sample", None)):
        result = result.sample(num_samples)
    if not isinstance(result, Mapping):
        raise OptionError(
            "a fit must return a posterior, weighted draws, chains, or a dictionary of draws by site, got "
            f"{kind(result)}"
        )
    first = torch.as_tensor(next(iter(result.values()), 0.0))
    num_draws = len(first) if first.dim() else 0
    weights = np.full(num_draws, 1 / max(num_draws, 1))
    return Draws(_checked(result, structure, num_draws), weights, min(float(num_draws), ess))


def _checked(values: Mapping[str, Any], structure: ModelStructure, num_draws: int) -> dict[str, Tensor]:
    checked = {}
    for site in structure.latents:
        if site.name not in values:
            raise ShapeError(f"the fit has no draws of latent site '{site.name}', only of {sorted(values)}")
        value = torch.as_tensor(values[site.name]).detach()
        if value.shape != (num_draws, *site.shape) or not num_draws:
            raise ShapeError(
                f"the fit's draws of site '{site.name}' have shape {tuple(value.shape)}, not (number of draws, "
                f"*{tuple(site.shape)})"
            )
        if not value.isfinite().all():
            raise DataError(f"the fit's draws of site '{site.name}' are not all finite")
        checked[site.name] = value
    return checked

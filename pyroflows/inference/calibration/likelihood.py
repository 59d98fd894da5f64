"""The log-likelihood of draws, whose ranks see what those of the latents cannot."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.inference.calibration.simulation import Simulations
from pyroflows.models.batching import BatchedModel
from pyroflows.models.tracing import Model


def log_likelihood_of(
    model: Model, args: Any, kwargs: Any, simulations: Simulations
) -> "tuple[LogLikelihood | None, str]":
    """The log-likelihood of a model as a function of latents and data; or None, and why there is none."""
    if simulations.nuisance:
        return None, f"it is an integral over '{simulations.nuisance[0]}', which is not inferred"
    if follows := simulations.data.keys() & {site.name for site in simulations.structure.deterministic}:
        return None, f"'{min(follows)}' follows from other sites without noise"
    try:
        log_likelihood = LogLikelihood(model, args, kwargs, simulations)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        return None, f"it cannot be evaluated ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    values = log_likelihood(simulations.latents, {name: value[0] for name, value in simulations.data.items()})
    if not values[0].isfinite() or (values[1:] == -torch.inf).all():
        # As where the data are a function of the latents, observed by dist.Delta.
        return None, "at latents other than those of the data it is not finite"
    return log_likelihood, ""


class LogLikelihood:
    r"""The log-likelihood :math:`\log p(y \mid x)` of draws of the latents.

    Its ranks see errors that those of the latents cannot, such as a fit that returns the prior whatever the data are
    (Modrák et al. 2023, arXiv:2211.02383).

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        simulations: draws from it.
    """

    def __init__(self, model: Model, args: Any, kwargs: Any, simulations: Simulations) -> None:
        self._names = list(simulations.data)
        self._batched = BatchedModel(model, args, kwargs, {**simulations.latents, **simulations.data})

    def __call__(self, latents: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> Tensor:
        """The log-likelihood ``(S,)`` of draws ``(S, *site shape)``, given one value of each observed site.

        It is -inf where it cannot be computed.
        """
        num_draws = len(next(iter(latents.values())))
        repeated = {name: value.expand(num_draws, *value.shape) for name, value in data.items()}
        log_probs = self._batched.in_chunks({**latents, **repeated}, num_draws).log_probs
        total = torch.stack([log_probs[name].double().reshape(num_draws, -1).sum(-1) for name in self._names]).sum(0)
        return torch.nan_to_num(total, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

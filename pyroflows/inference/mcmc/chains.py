"""Draws of several chains, with the figures that show whether they have mixed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from pyroflows.inference import arviz
from pyroflows.inference.export import arviz_data
from pyroflows.models.batching import BatchedModel
from pyroflows.models.structure import ModelStructure

MAX_RHAT = 1.05


@dataclass(frozen=True, eq=False, repr=False)
class Chains:
    r"""Draws from the exact posterior, in chains; see :meth:`pyroflows.Posterior.mcmc`.

    Args:
        draws: tensors ``(chain, draw, *site shape)`` by site, constrained; deterministic sites too.
        sample_stats: figures ``(chain, draw)`` by name: ``lp``, the log joint in the unconstrained space;
            ``acceptance_rate``, the acceptance probability of the trajectory ("nuts": the mean over the chain);
            ``diverging``; and for "independence" also ``flow_acceptance_rate``.
        method: the method that made them.
        structure: the structure of the model.
        batched: the model, run for batches of draws.

    Example:
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> posterior = pf.FlowVI(model, num_steps=400, seed=0, progress_bar=False).run()
        >>> chains = posterior.mcmc(200, num_chains=8, seed=0, progress_bar=False)
        >>> chains.draws["x"].shape
        torch.Size([8, 200])
        >>> bool(chains.rhat["x"] < 1.05)
        True
    """

    draws: dict[str, Tensor]
    sample_stats: dict[str, Tensor]
    method: str
    structure: ModelStructure
    batched: BatchedModel

    @cached_property
    def rhat(self) -> dict[str, np.ndarray]:
        r"""Rank-normalised split :math:`\hat R` of every component, by site (Vehtari et al. 2021, arXiv:1903.08008).

        Near 1 where the chains have mixed; NaN for a component that is the same in all draws.
        """
        return {name: arviz.rhat(_array(value)) for name, value in self.draws.items()}

    @cached_property
    def ess(self) -> dict[str, np.ndarray]:
        """Bulk effective sample size of every component, by site, over all chains (Vehtari et al. 2021)."""
        return {name: arviz.ess(_array(value)) for name, value in self.draws.items()}

    @property
    def acceptance_rate(self) -> float:
        """Mean acceptance probability of trajectories, between 0 and 1."""
        return self.sample_stats["acceptance_rate"].double().mean().item()

    @property
    def num_divergences(self) -> int:
        """Number of divergent trajectories, whose energy error is so large that chains may miss the region around."""
        return int(self.sample_stats["diverging"].sum())

    def to_arviz(
        self,
        log_likelihood: bool = True,
        posterior_predictive: bool = True,
        prior: bool = True,
        coords: Mapping[str, Sequence[Any]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
    ) -> Any:
        """Convert all chains to ArviZ data: InferenceData (ArviZ 0.x) or DataTree (1.x), whichever is installed.

        Args:
            log_likelihood: whether to add the pointwise log-likelihood, which ``az.loo`` needs.
            posterior_predictive: whether to add posterior predictive draws.
            prior: whether to add prior and prior predictive draws.
            coords: coordinates by dimension.
            dims: dimension names by site; a dimension of a plate has the plate's name by default.
        """
        return arviz_data(
            {name: value.flatten(0, 1) for name, value in self.draws.items()},
            self.structure,
            self.batched,
            num_chains=len(self.sample_stats["lp"]),
            sample_stats={name: value.flatten(0, 1) for name, value in self.sample_stats.items()},
            log_likelihood=log_likelihood,
            posterior_predictive=posterior_predictive,
            prior=prior,
            coords=coords,
            dims=dims,
        )

    def __repr__(self) -> str:
        num_chains, num_samples = self.sample_stats["lp"].shape
        rhat, ess = _labelled(self.rhat), _labelled(self.ess)
        worst = max(rhat, key=lambda name: np.nan_to_num(rhat[name], nan=0.0, posinf=np.inf))
        least = min(ess, key=lambda name: ess[name])
        mixed = "" if rhat[worst] <= MAX_RHAT else ", not mixed: run longer, or take a better flow"
        flow_rate = self.sample_stats.get("flow_acceptance_rate")
        of_flow = "" if flow_rate is None else f" of trajectories and {flow_rate.double().mean():.2f} of flow proposals"
        return (
            f"Chains({self.method}: {num_chains} chains of {num_samples} draws, "
            f"worst R-hat {rhat[worst]:.3f} ({worst}){mixed}, smallest ESS {ess[least]:.0f} ({least}), "
            f"acceptance {self.acceptance_rate:.2f}{of_flow}, {self.num_divergences} divergences)"
        )


def _array(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()


def _labelled(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Values of all components by their names, such as ``theta[0, 1]``."""
    return {
        f"{name}[{', '.join(map(str, index))}]" if index else name: float(value[index])
        for name, value in values.items()
        for index in np.ndindex(*value.shape)
    }

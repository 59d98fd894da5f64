"""Draws of several chains, with the figures that show whether they have mixed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyroflows.errors import each_said_once
from pyroflows.inference import arviz
from pyroflows.inference.component_labels import NO_LABELS, ComponentLabels
from pyroflows.inference.export import arviz_data
from pyroflows.inference.pairs import NUM_DRAWS, plot_pairs
from pyroflows.inference.summary import Summary
from pyroflows.models.batching import BatchedModel
from pyroflows.models.structure import ModelStructure
from pyroflows.randomness import seeded

if TYPE_CHECKING:
    import pandas as pd

MAX_RHAT = 1.05
# More divergent trajectories than this share are no accident.
MAX_DIVERGING_SHARE = 0.001


@dataclass(frozen=True, eq=False, repr=False)
class Chains:
    r"""Draws from the exact posterior, in chains; see :meth:`pyroflows.Posterior.mcmc`.

    They can be used where :attr:`rhat` is near 1, below 1.05 at least, and :attr:`ess` is in the hundreds. Draws of all
    chains together are ``chains.draws[name].flatten(0, 1)``.
    Printed, they are a table, and a line that says whether the chains have mixed.

    Args:
        draws: tensors ``(chain, draw, *site shape)`` by site, constrained; deterministic sites too.
        sample_stats: figures ``(chain, draw)`` by name: ``lp``, the log joint in the unconstrained space;
            ``acceptance_rate``, the acceptance probability of the trajectory ("nuts": the mean over the chain);
            ``diverging``; and for "independence" also ``flow_acceptance_rate``.
        method: the method that made them.
        structure: the structure of the model.
        batched: the model, run for batches of draws.
        labels: the labels of components.

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
    labels: ComponentLabels = NO_LABELS

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
        """Number of divergent trajectories, whose energy error is so large that chains may miss the region around.

        A few among thousands of draws do no harm; many ask for another form of the model, or a better flow.
        """
        return int(self.sample_stats["diverging"].sum())

    def to_arviz(
        self,
        log_likelihood: bool = True,
        posterior_predictive: bool = True,
        prior: bool = True,
        coords: Mapping[str, Sequence[Any]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        seed: int | None = None,
    ) -> Any:
        """Convert all chains to ArviZ data: InferenceData (ArviZ 0.x) or DataTree (1.x), whichever is installed.

        Args:
            log_likelihood: whether to add the pointwise log-likelihood, which ``az.loo`` needs.
            posterior_predictive: whether to add posterior predictive draws.
            prior: whether to add prior and prior predictive draws.
            coords: labels by dimension, in place of those of the fit.
            dims: names of dimensions by site, in place of those of the fit.
            seed: seed that makes the predictive and prior draws reproducible and leaves the global generator as it was;
                None to use the global generator.

        Raises:
            OptionError: if there is no such dimension or site, or the number of labels does not fit.
        """
        labels = self.labels.updated(self.structure, coords, dims)
        with seeded(seed), each_said_once(self.batched.said):
            return arviz_data(
                self._flat,
                self.structure,
                self.batched,
                num_chains=len(self.sample_stats["lp"]),
                sample_stats={name: value.flatten(0, 1) for name, value in self.sample_stats.items()},
                log_likelihood=log_likelihood,
                posterior_predictive=posterior_predictive,
                prior=prior,
                coords=labels.coords,
                dims=labels.dims,
            )

    def summary(self, var_names: Sequence[str] | None = None) -> "pd.DataFrame":
        """Tabulate every component of the draws of all chains, with pandas.

        The columns are those of :meth:`pyroflows.Posterior.summary`, and :attr:`ess` and :attr:`rhat`; ``mcse``, the
        Monte Carlo standard error of the mean, counts the correlation of the draws, as ArviZ's does.

        Args:
            var_names: sites to show; None for those that :meth:`pyroflows.Posterior.summary` shows.

        Raises:
            OptionError: if there is no such site.
        """
        return self._summary.table(var_names)

    def plot_pairs(
        self, var_names: Sequence[str] | None = None, coords: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Plot marginals and pairs of about 2,000 of the draws, as :meth:`pyroflows.Posterior.plot_pairs` does.

        Args:
            var_names: sites to show; None for all.
            coords: labels to show by dimension.
            kwargs: further options of ArviZ's ``plot_pair``.
        """
        thinned = {name: value[:: max(1, len(value) // NUM_DRAWS)] for name, value in self._flat.items()}
        return plot_pairs(Summary(thinned, self.structure, self.labels), var_names, coords, **kwargs)

    @property
    def _flat(self) -> dict[str, Tensor]:
        """The draws of all chains, one after the other."""
        return {name: value.flatten(0, 1) for name, value in self.draws.items()}

    @property
    def _summary(self) -> Summary:
        num_chains = len(next(iter(self.draws.values())))

        def num_effective(values: np.ndarray) -> float:
            return float(arviz.ess(values.reshape(num_chains, -1), "mean"))

        figures = {"ess": self.ess, "rhat": self.rhat}
        return Summary(self._flat, self.structure, self.labels, num_effective=num_effective, figures=figures)

    def __str__(self) -> str:
        return f"{self._summary}\n\n{self!r}"

    def __repr__(self) -> str:
        num_chains, num_samples = self.sample_stats["lp"].shape
        discrete = {site.name for site in self.structure.enumerated}  # whose draws are new ones given the others
        rhat, ess = (
            self._labelled({name: value for name, value in figure.items() if name not in discrete})
            for figure in (self.rhat, self.ess)
        )
        worst = max(rhat, key=lambda name: np.nan_to_num(rhat[name], nan=0.0, posinf=np.inf))
        least = min(ess, key=lambda name: ess[name])
        mixed = "" if rhat[worst] <= MAX_RHAT else ", not mixed: run longer, or take a better flow"
        is_often = self.num_divergences > MAX_DIVERGING_SHARE * num_chains * num_samples
        missed = ": draws may be missing where the posterior is narrow, whatever R-hat is" if is_often else ""
        flow_rate = self.sample_stats.get("flow_acceptance_rate")
        of_flow = "" if flow_rate is None else f" of trajectories and {flow_rate.double().mean():.2f} of flow proposals"
        return (
            f"Chains({self.method}: {num_chains} chains of {num_samples} draws, "
            f"worst R-hat {rhat[worst]:.3f} ({worst}){mixed}, smallest ESS {ess[least]:.0f} ({least}), "
            f"acceptance {self.acceptance_rate:.2f}{of_flow}, {self.num_divergences} divergences{missed})"
        )

    def _labelled(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Values of all components by their names, such as ``theta[0, 1]``."""
        return {
            self.labels.component(name, index): float(value[index])
            for name, value in values.items()
            for index in np.ndindex(*value.shape)
        }


def _array(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()

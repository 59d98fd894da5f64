"""Pareto-smoothed importance weights, and the figures that follow from them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyroflows.errors import each_said_once
from pyroflows.grad_mode import isolated
from pyroflows.inference.arviz import pareto_k_se, pareto_k_threshold, pareto_smoothed
from pyroflows.inference.component_labels import NO_LABELS, ComponentLabels
from pyroflows.inference.export import arviz_data
from pyroflows.inference.pairs import NUM_DRAWS, plot_pairs
from pyroflows.inference.summary import Summary
from pyroflows.interruption import keeping
from pyroflows.models.batching import BatchedModel
from pyroflows.models.structure import ModelStructure
from pyroflows.options import checked_int
from pyroflows.randomness import seeded

if TYPE_CHECKING:
    import pandas as pd

DELAY = 0.5  # seconds before a progress bar is printed


@dataclass(frozen=True, eq=False)
class Weights:
    r"""Pareto-smoothed log weights :math:`\log w_i`, not normalised, and the figures that follow from them.

    They are the attribute ``weights`` of :class:`WeightedDraws`.

    Args:
        log_weights: smoothed log weights ``(S,)`` in float64, with the offset of the raw ones.
        khat: Pareto shape of the tail of the raw weights (Vehtari et al. 2024, JMLR 25(72)); 0 for constant weights.
            Below :math:`\min(1 - 1/\log_{10} S, 0.7)` what follows from the weights can be trusted.
        khat_se: standard error of k-hat.
        ess: effective sample size :math:`(\sum_i w_i)^2 / \sum_i w_i^2`, between 1 and S.
        log_evidence: :math:`\log \frac1S \sum_i w_i` of the raw weights, in nats.
        log_evidence_se: standard error of the log evidence, by the delta method.

    Example:
        >>> weights = Weights.smoothed(torch.tensor([1.0, 1.0, 2.0]).double().log())
        >>> weights.normalized, round(weights.ess, 2)
        (tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64), 2.67)
    """

    log_weights: Tensor
    khat: float
    khat_se: float
    ess: float
    log_evidence: float
    log_evidence_se: float

    @classmethod
    def smoothed(cls, raw: Tensor) -> "Weights":
        """Smooth raw log weights ``(S,)``; one that is NaN or +inf counts as zero weight."""
        values = np.nan_to_num(raw.detach().cpu().double().numpy(), nan=-np.inf, posinf=-np.inf, neginf=-np.inf)
        smoothed, khat = pareto_smoothed(values)
        khat_se = pareto_k_se(khat, int(np.isfinite(values).sum()))
        log_weights = torch.from_numpy(smoothed)
        num_draws = len(log_weights)
        # The evidence is the mean of the raw weights, which is unbiased; smoothing a tail of k-hat above 1 is not.
        raw_weights = torch.from_numpy(values)
        variance = max(0.0, num_draws / _ess(raw_weights) - 1) / num_draws
        log_evidence = torch.logsumexp(raw_weights, 0).item() - math.log(num_draws)
        return cls(log_weights, khat, khat_se, _ess(log_weights), log_evidence, math.sqrt(variance))

    @property
    def khat_threshold(self) -> float:
        """The threshold of k-hat for this number of draws; no k-hat of 10 draws or fewer is below it."""
        return pareto_k_threshold(len(self.log_weights))

    @property
    def khat_in_words(self) -> str:
        """What k-hat says of the weights, as a sentence.

        Example:
            >>> Weights.smoothed(torch.zeros(1000)).khat_in_words
            'k-hat is below 0.67, the threshold for 1,000 draws: the weights can be trusted as far as the draws reach'
        """
        if not math.isfinite(self.khat) or self.khat_threshold <= 0:
            return "k-hat says nothing, since too few weights differ from zero and from one another: draw more"
        threshold = f"{self.khat_threshold:.2f}, the threshold for {len(self.log_weights):,} draws"
        if self.khat + self.khat_se < self.khat_threshold:
            return f"k-hat is below {threshold}: the weights can be trusted as far as the draws reach"
        if self.khat - self.khat_se < self.khat_threshold:
            return f"k-hat is too close to {threshold}: draw more to tell whether the weights can be trusted"
        return (
            f"k-hat is above {threshold}: what follows from the weights may be far off, so take a proposal that covers "
            "more, or run chains"
        )

    @property
    def normalized(self) -> Tensor:
        """Weights ``(S,)`` that sum to one, in float64 on the CPU."""
        return torch.softmax(self.log_weights, 0)


def _ess(log_weights: Tensor) -> float:
    return math.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))


@dataclass(frozen=True, eq=False)
class WeightedDraws:
    """Draws from a proposal with their Pareto-smoothed importance weights.

    :meth:`pyroflows.Posterior.importance_sample` and :func:`pyroflows.importance_sample` return them. A mean under the
    posterior is a weighted one, ``weights.normalized @ draws[name].double()`` for a scalar site; what does not take
    weights takes the draws of :meth:`resample`. Printed, they are a table, the figures of the weights, and a sentence
    on whether k-hat is good.

    Args:
        draws: tensors ``(S, *site shape)`` by site, in the constrained space.
        weights: the weights and their figures.
        structure: the structure of the model; None if there is none.
        labels: the labels of components.
        batched: the model, run for batches of draws; None if there is none.

    Example:
        >>> weighted = WeightedDraws({"x": torch.arange(1000.0)}, Weights.smoothed(torch.zeros(1000)))
        >>> weighted
        WeightedDraws(1000 draws, ess=1000, khat=0.00 +- 0.00 (good below 0.67), log_evidence=0.000 +- 0.000)
        >>> weighted.resample(5)["x"].shape
        torch.Size([5])
    """

    draws: dict[str, Tensor]
    weights: Weights
    structure: ModelStructure | None = None
    labels: ComponentLabels = NO_LABELS
    batched: BatchedModel | None = None

    @property
    def log_weights(self) -> Tensor:
        """Smoothed log weights ``(S,)``, not normalised."""
        return self.weights.log_weights

    @property
    def khat(self) -> float:
        """Pareto k-hat of the weights; below 0.7 they can be trusted, from about 2,000 draws on."""
        return self.weights.khat

    @property
    def khat_se(self) -> float:
        """Standard error of k-hat."""
        return self.weights.khat_se

    @property
    def ess(self) -> float:
        """Effective sample size of the weights, between 1 and S: the number of exact draws that they are worth."""
        return self.weights.ess

    @property
    def log_evidence(self) -> float:
        """Log evidence in nats, the log of the mean raw weight."""
        return self.weights.log_evidence

    @property
    def log_evidence_se(self) -> float:
        """Standard error of the log evidence, in nats."""
        return self.weights.log_evidence_se

    def resample(self, num_samples: int, seed: int | None = None) -> dict[str, Tensor]:
        """Draw with replacement by the weights, so that the result has equal weights.

        Args:
            num_samples: number of draws, at least 1.
            seed: seed that makes the draws reproducible and leaves the global generator as it was; None to use the
                global generator.

        Returns:
            Tensors ``(num_samples, *site shape)`` by site.

        Raises:
            OptionError: if ``num_samples`` is not a positive integer.
        """
        with seeded(seed):
            number = checked_int("num_samples", num_samples)
            indices = torch.multinomial(self.weights.normalized, number, replacement=True)
        return {name: value[indices.to(value.device)] for name, value in self.draws.items()}

    @isolated
    def to_arviz(
        self,
        num_samples: int = 1000,
        log_likelihood: bool = True,
        posterior_predictive: bool = True,
        prior: bool = True,
        coords: Mapping[str, Sequence[Any]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        seed: int | None = None,
    ) -> Any:
        """Convert one chain of draws to ArviZ data: InferenceData (ArviZ 0.x) or DataTree (1.x).

        ArviZ knows no weights, so these are draws with replacement by the weights, as those of :meth:`resample`. Some
        occur several times, which ArviZ's own errors and effective sample sizes do not count: :attr:`ess` does. Without
        a model, as from :func:`pyroflows.sample_conditional`, there is the posterior group alone.

        Args:
            num_samples: number of draws, at least 1; many more than :attr:`ess` repeat the same ones.
            log_likelihood: whether to add the pointwise log-likelihood, which ``az.loo`` needs.
            posterior_predictive: whether to add posterior predictive draws.
            prior: whether to add prior and prior predictive draws.
            coords: labels by dimension, in place of those of the fit.
            dims: names of dimensions by site, in place of those of the fit.
            seed: seed that makes the draws reproducible and leaves the global generator as it was; None to use the
                global generator.

        Raises:
            OptionError: if ``num_samples`` is not a positive integer, if ``coords`` or ``dims`` name what does not
                exist, or if a number of labels does not fit.
        """
        if self.structure is not None:
            labels = self.labels.updated(self.structure, coords, dims)
            coords, dims = labels.coords, labels.dims
        said = set() if self.batched is None else self.batched.said
        with seeded(seed), each_said_once(said):
            return arviz_data(
                self.resample(num_samples),
                self.structure,
                self.batched,
                log_likelihood=log_likelihood,
                posterior_predictive=posterior_predictive,
                prior=prior,
                coords=coords,
                dims=dims,
            )

    def summary(self, var_names: Sequence[str] | None = None) -> "pd.DataFrame":
        r"""Tabulate every component of the draws by their weights, with pandas.

        The columns are those of :meth:`pyroflows.Posterior.summary`; ``mcse``, the Monte Carlo standard error of the
        mean, is :math:`\sqrt{\sum_i w_i^2 (x_i - \bar x)^2}` for weights w that sum to one. It can be trusted as far as
        k-hat says so.

        Args:
            var_names: sites to show; None for those that :meth:`pyroflows.Posterior.summary` shows.

        Raises:
            OptionError: if there is no such site.
        """
        return self._summary().table(var_names)

    def plot_pairs(
        self, var_names: Sequence[str] | None = None, coords: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """Plot marginals and pairs of draws that are drawn by the weights, as :meth:`pyroflows.Posterior.plot_pairs`.

        Args:
            var_names: sites to show; None for all.
            coords: labels to show by dimension.
            kwargs: further options of ArviZ's ``plot_pair``.
        """
        with seeded(0):
            resampled = self.resample(NUM_DRAWS)
        return plot_pairs(Summary(resampled, self.structure, self.labels), var_names, coords, **kwargs)

    def _summary(self) -> Summary:
        return Summary(self.draws, self.structure, self.labels, self.weights.normalized.numpy())

    def __str__(self) -> str:
        return f"{self._summary()}\n\n{self!r}\n{self.weights.khat_in_words}"

    def __repr__(self) -> str:
        threshold = self.weights.khat_threshold
        good = f" (good below {threshold:.2f})" if threshold > 0 else ""
        return (
            f"WeightedDraws({len(self.log_weights)} draws, ess={self.ess:.0f}, "
            f"khat={self.khat:.2f} +- {self.khat_se:.2f}{good}, "
            f"log_evidence={self.log_evidence:.3f} +- {self.log_evidence_se:.3f})"
        )


def in_batches(
    weighted: Callable[[slice], tuple[Mapping[str, Tensor], Tensor]],
    make: Callable[[dict[str, Tensor], Weights], WeightedDraws],
    num_samples: int,
    batch_size: int,
    progress_bar: bool,
) -> WeightedDraws:
    """Weight draws batch by batch, under a progress bar, which is not printed if they take less than a second.

    Args:
        weighted: a function from the places of S draws among all to the draws ``(S, *site shape)`` by site, and their
            raw log weights ``(S,)``.
        make: a function from all draws and their smoothed weights to the result.
        num_samples: the number of draws.
        batch_size: the number of draws of a batch.
        progress_bar: whether to show one.

    Raises:
        FitInterrupted: if the batches are interrupted; its ``result`` holds the complete ones.
    """
    parts: list[tuple[Mapping[str, Tensor], Tensor]] = []

    def found(_: Any = None) -> WeightedDraws | None:
        if not parts:
            return None
        draws = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
        return make(draws, Weights.smoothed(torch.cat([log_weights for _, log_weights in parts])))

    with (
        keeping("importance sampling", found, "a batch of draws"),
        tqdm(total=num_samples, disable=not progress_bar, unit="draw", delay=DELAY) as bar,
    ):
        for start in range(0, num_samples, batch_size):
            rows = slice(start, min(start + batch_size, num_samples))
            parts.append(weighted(rows))
            bar.update(rows.stop - rows.start)
    complete = found()
    assert complete is not None
    return complete

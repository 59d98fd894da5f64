"""Draws of latents that are local to rows, with importance weights and a verdict for each row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.inference.arviz import pareto_k_se, pareto_k_threshold, pareto_smoothed_rows
from pyroflows.inference.component_labels import NO_LABELS, ComponentLabels
from pyroflows.inference.export import arviz_data
from pyroflows.inference.summary import Summary
from pyroflows.inference.verdict.figures import CLEARLY_ABOVE, MAX_LOG_WEIGHT_VARIANCE, VERDICTS, Verdict
from pyroflows.models.levels import SiteLevel
from pyroflows.models.structure import ModelStructure, Site
from pyroflows.options import checked_int
from pyroflows.randomness import seeded
from pyroflows.shapes import counted

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class LocalDraws:
    r"""Draws from a structured posterior, with Pareto-smoothed importance weights for each row of a plate.

    :meth:`pyroflows.Posterior.local` returns them. A row of the plate, such as a school, has latents :math:`l_r`,
    those of the plates within it included, and data :math:`y_r`. Given draws :math:`g_s` of the global latents, which
    stay as they were fitted, the draws of its latents have weights of their own,

    .. math:: w_{sr} \propto \frac{p(l_{sr}, y_r \mid g_s)}{q(l_{sr} \mid g_s)},

    so that one poor row does not spoil the others. Printed, they say how many rows are good.

    Args:
        draws: tensors ``(S, *site shape)`` by site, in the constrained space; global latents among them.
        log_weights: smoothed log weights, not normalised, ``(S, *rows)`` in float64, where rows are the numbers of rows
            of the plates; 0 throughout for rows without latents and data.
        khat: Pareto k-hat of the weights of each row, ``(*rows)``.
        ess: effective sample size of the weights of each row, between 1 and S, ``(*rows)``.
        log_weight_variance: variance of the log weights of each row, ``(*rows)``.
        structure: the structure of the model with these rows.
        level: the plates with their rows.
        labels: the labels of components.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y), subsample_size=min(len(y), 8)) as rows:
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])
        >>> guide = pf.guides.AutoStructuredFlow(model, encoder=lambda rows, y: y[rows, None])
        >>> vi = pf.FlowVI(model, guide, num_steps=20, num_particles=8, seed=0, progress_bar=False)
        >>> local = vi.run(torch.randn(32)).local(torch.tensor([2.0, 0.0, -1.0]), seed=0)
        >>> local.draws["z"].shape, local.mean()["z"].shape, local.khat.shape
        (torch.Size([1000, 3]), torch.Size([3]), torch.Size([3]))
    """

    draws: dict[str, Tensor]
    log_weights: Tensor
    khat: Tensor
    ess: Tensor
    log_weight_variance: Tensor
    structure: ModelStructure
    level: SiteLevel
    labels: ComponentLabels = NO_LABELS

    @classmethod
    def weighted(
        cls,
        draws: dict[str, Tensor],
        raw: Tensor,
        num_shared: int,
        structure: ModelStructure,
        level: SiteLevel,
        labels: ComponentLabels,
    ) -> "LocalDraws":
        """Smooth raw log weights ``(S, *rows)``; one that is NaN or +inf counts as zero weight.

        Args:
            draws: draws by site.
            raw: raw log weights.
            num_shared: the number of successive draws that share their globals, within which the weights are to sum
                to one; 1 to leave them as they are.
            structure: the structure of the model.
            level: the plates with their rows.
            labels: the labels of components.
        """
        values = raw.flatten(1).T.double().numpy()
        values = np.nan_to_num(values, nan=-np.inf, posinf=-np.inf, neginf=-np.inf)
        smoothed, khat = pareto_smoothed_rows(values)
        log_weights = torch.from_numpy(smoothed)
        if num_shared > 1:
            groups = log_weights.unflatten(1, (-1, num_shared))
            total = groups.logsumexp(-1, keepdim=True)
            log_weights = torch.where(total.isfinite(), groups - total, -torch.inf).flatten(1)
        ess = (2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)).exp()
        shape = raw.shape[1:]
        return cls(
            draws,
            log_weights.T.reshape(raw.shape),
            torch.from_numpy(khat).reshape(shape),
            ess.nan_to_num(0.0).reshape(shape),
            log_weights.var(1).nan_to_num(torch.inf).reshape(shape),
            structure,
            level,
            labels,
        )

    @property
    def num_samples(self) -> int:
        """The number of draws S."""
        return len(self.log_weights)

    @property
    def khat_threshold(self) -> float:
        """The threshold of k-hat for this number of draws, above which weights cannot be trusted."""
        return pareto_k_threshold(self.num_samples)

    @property
    def verdicts(self) -> np.ndarray:
        """The verdict on each row, strings ``(*rows)``: "good", "correct it" or "do not use".

        "good" rows have log weights with a variance of at most 0.1, and their draws can be used as they are; the others
        need their weights, and "do not use" marks those whose k-hat is above :attr:`khat_threshold` by more than two
        standard errors, so that the weights cannot be trusted either.
        """
        khat = self.khat.numpy()
        errors = np.vectorize(pareto_k_se, otypes=[float])(khat, self.num_samples)
        is_poor = ~(khat - CLEARLY_ABOVE * errors <= self.khat_threshold)
        is_close = self.log_weight_variance.numpy() <= MAX_LOG_WEIGHT_VARIANCE
        return np.array(VERDICTS)[np.where(is_poor, 2, np.where(is_close, 0, 1))]

    def count(self, verdict: Verdict) -> int:
        """The number of rows with a verdict."""
        return int((self.verdicts == verdict).sum())

    @property
    def normalized(self) -> Tensor:
        """Weights ``(S, *rows)`` of which those of each row sum to one, in float64."""
        return torch.softmax(self.log_weights, 0)

    def mean(self) -> dict[str, Tensor]:
        """The weighted means of all sites in the plate, ``(*site shape)`` by site."""
        weights = self._weights_by_site
        return {name: (weights[name] * self.draws[name].double()).sum(0) for name in weights}

    def resample(self, num_samples: int, seed: int | None = None) -> dict[str, Tensor]:
        """Draw with replacement by the weights of each row, so that the result has equal weights.

        The latents of a row stay together. Rows are drawn by themselves: what the globals make two rows have in common
        is lost.

        Args:
            num_samples: number of draws, at least 1.
            seed: seed that makes the draws reproducible and leaves the global generator as it was; None to use the
                global generator.

        Returns:
            Tensors ``(num_samples, *site shape)`` by site in the plate.

        Raises:
            OptionError: if ``num_samples`` is not a positive integer.
        """
        with seeded(seed):
            number = checked_int("num_samples", num_samples)
            indices = torch.multinomial(self.normalized.flatten(1).T, number, replacement=True)
        drawn = {}
        for site in self._sites:
            axes = self._axes(site)
            first = list(range(len(axes)))
            rows = self.draws[site.name].movedim([0, *axes], [len(axes), *first])
            flat = rows.flatten(0, len(axes) - 1)
            picked = flat[torch.arange(len(flat))[:, None], indices.to(flat.device)]
            picked = picked.unflatten(0, rows.shape[: len(axes)])
            drawn[site.name] = picked.movedim([len(axes), *first], [0, *axes])
        return drawn

    def summary(self, var_names: Sequence[str] | None = None) -> "pd.DataFrame":
        """Tabulate every component of the draws, those of sites in the plate by the weights of their row, with pandas.

        The columns are those of :meth:`pyroflows.WeightedDraws.summary`.

        Args:
            var_names: sites to show; None for those that :meth:`pyroflows.Posterior.summary` shows.

        Raises:
            OptionError: if there is no such site.
        """
        return self._summary().table(var_names)

    def to_arviz(self, num_samples: int = 1000, seed: int | None = None) -> Any:
        """Convert draws of :meth:`resample` to ArviZ data with a posterior group: InferenceData or DataTree.

        Args:
            num_samples: number of draws, at least 1.
            seed: seed that makes the draws reproducible and leaves the global generator as it was; None to use the
                global generator.

        Raises:
            OptionError: if ``num_samples`` is not a positive integer.
        """
        draws = self.resample(num_samples, seed)
        dims = {name: self.labels.dims_of(name, value.dim() - 1) for name, value in draws.items()}
        named = {dim for names in dims.values() for dim in names}
        coords = {name: labels for name, labels in self.labels.coords.items() if name in named}
        return arviz_data(draws, None, None, coords=coords, dims=dims)

    @property
    def _sites(self) -> list[Site]:
        sites = (*self.structure.latents, *self.structure.deterministic)
        return [site for site in sites if site.name in self.draws and set(self.level.plates) <= set(site.plates)]

    def _axes(self, site: Site) -> list[int]:
        """The dimensions of the draws of a site along which the rows lie."""
        batch_dim = len(site.shape) - site.event_dim
        return [1 + batch_dim + (plate.dim or 0) for plate in self.level.plates]

    @cached_property
    def _weights_by_site(self) -> dict[str, Tensor]:
        """The weights that broadcast with the draws, by site in the plate."""
        normalized, found = self.normalized, {}
        for site in self._sites:
            shape = [self.num_samples] + [1] * len(site.shape)
            for axis, size in zip(self._axes(site), normalized.shape[1:], strict=True):
                shape[axis] = size
            found[site.name] = normalized.reshape(shape).to(self.draws[site.name].device)
        return found

    def _summary(self) -> "RowSummary":
        found = self._weights_by_site.items()
        weights = {name: weight.expand(self.draws[name].shape).cpu().numpy() for name, weight in found}
        return RowSummary(self.draws, self.structure, self.labels, row_weights=weights)

    def __str__(self) -> str:
        return f"{self._summary()}\n\n{self!r}"

    def __repr__(self) -> str:
        good, correctable, poor = (f"{self.count(verdict):,}" for verdict in VERDICTS)
        rows = f"{counted(self.verdicts.size, 'row')} of plate '{self.level.name}'"
        return (
            f"LocalDraws({self.num_samples} draws): of {rows}, {good} can be used as drawn, {correctable} by their "
            f"weights, and {poor} not at all, since k-hat is above {self.khat_threshold:.2f}"
        )


@dataclass(frozen=True)
class RowSummary(Summary):
    """Draws with weights for each row, which are tabulated component by component.

    Args:
        row_weights: weights ``(S, *site shape)`` by site that has some; those of each component sum to one.
    """

    row_weights: Mapping[str, np.ndarray] = field(default_factory=dict)

    def weights_of(self, name: str, index: tuple[int, ...]) -> np.ndarray | None:
        """The weights of the row in which a component lies."""
        entries: Any = (slice(None), *index)
        return self.row_weights[name][entries] if name in self.row_weights else None

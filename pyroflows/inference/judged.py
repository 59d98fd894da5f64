"""A flow on the latents of a Pyro model, with the figures and the verdict that its draws give."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pyroflows.errors import OptionError
from pyroflows.exclusive import exclusive_property
from pyroflows.flows import Recipe
from pyroflows.grad_mode import isolated
from pyroflows.guides import AutoFlow
from pyroflows.inference.approximation import Approximation
from pyroflows.inference.component_labels import NO_LABELS, ComponentLabels
from pyroflows.inference.outcome import Outcome
from pyroflows.inference.search.starts import Starts
from pyroflows.inference.summary import Summary
from pyroflows.inference.verdict.diagnosis import Diagnosis
from pyroflows.inference.verdict.draws import DiagnosticDraws, default_num_samples
from pyroflows.inference.verdict.figures import Estimate
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.tracing import Model
from pyroflows.randomness import seeded
from pyroflows.training.history import History

if TYPE_CHECKING:
    import pandas as pd


class JudgedApproximation(Approximation):
    """What a flow guide, the arguments of its model, and the history of a fit give: draws, figures, and a verdict.

    The arguments are those of :class:`pyroflows.Posterior`, which also corrects the draws.
    """

    def __init__(
        self,
        model: Model,
        guide: AutoFlow,
        args: Any,
        kwargs: Any,
        history: History,
        starts: Starts | None = None,
        num_diagnostic_samples: int | None = None,
        compile: str = "auto",
        log_joint: LogJoint | None = None,
        draws: DiagnosticDraws | None = None,
        outcome: Outcome | None = None,
        labels: ComponentLabels = NO_LABELS,
    ) -> None:
        if num_diagnostic_samples is not None and num_diagnostic_samples < 100:
            raise OptionError(f"num_diagnostic_samples must be at least 100, got {num_diagnostic_samples}")
        super().__init__(model, guide, args, kwargs, compile, log_joint)
        self.history = history
        self.starts = starts
        self.num_diagnostic_samples = num_diagnostic_samples or default_num_samples(self.layout.dim)
        self.outcome = outcome
        self.labels = labels.updated(self.structure)
        if draws is not None:
            self._diagnostics = draws

    @property
    def is_gaussian(self) -> bool:
        """Whether a Gaussian, or one at each mode, was enough, so that no flow was trained."""
        is_complete = self.outcome is None or self.outcome.is_complete
        return is_complete and not self.history and self.guide.flow_fn == Recipe("Gaussian")

    @property
    def coords(self) -> dict[str, tuple[Any, ...]]:
        """The labels of the entries of dimensions, by dimension."""
        return dict(self.labels.coords)

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        """The names of the dimensions, by site, of sites that are in plates, or whose dimensions were named."""
        return {**self.labels.plates, **self.labels.dims}

    @exclusive_property
    @isolated
    def _diagnostics(self) -> DiagnosticDraws:
        self._require_full_plates()
        return DiagnosticDraws.drawn(self._flow(), self.log_joint, self.num_diagnostic_samples)

    @property
    def elbo(self) -> float:
        """Evidence lower bound in nats, the mean log weight; -inf if the model's density is zero at some draws."""
        return self._diagnostics.raw_log_weights.double().mean().item()

    @property
    def elbo_se(self) -> float:
        """Standard error of the ELBO, in nats; NaN where the ELBO is -inf."""
        log_weights = self._diagnostics.raw_log_weights.double()
        return log_weights.std().item() / len(log_weights) ** 0.5

    @property
    def khat(self) -> float:
        """Pareto k-hat of the importance weights; below 0.7 they can be trusted (Vehtari et al. 2024)."""
        return self._diagnostics.weights.khat

    @property
    def ess(self) -> float:
        """Effective sample size of the weighted draws, between 1 and their number."""
        return self._diagnostics.weights.ess

    @property
    def log_evidence(self) -> float:
        """Log evidence in nats, by importance sampling."""
        return self._diagnostics.weights.log_evidence

    @property
    def log_evidence_se(self) -> float:
        """Standard error of the log evidence, in nats."""
        return self._diagnostics.weights.log_evidence_se

    @isolated
    def diagnose(self) -> Diagnosis:
        """Judge whether the draws can be used as they are, need to be corrected, or should not be used.

        The verdict is computed at the first use, from ``num_diagnostic_samples`` draws with a seed of their own, so
        that it is the same each time. What follows from each verdict stands among its reasons.

        Returns:
            The :class:`pyroflows.Diagnosis`: ``verdict`` is "good", "correct it" or "do not use", ``reasons`` are
            sentences that say why and what to do, and the other attributes are the figures behind them.

        Raises:
            ModelError: if a plate is subsampled.

        Example:
            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            >>> diagnosis = pf.FlowVI(model, seed=0, progress_bar=False).run(torch.tensor(1.0)).diagnose()
            >>> diagnosis.verdict, diagnosis.khat < diagnosis.khat_threshold
            ('good', True)
        """
        diagnosis = self._diagnostics.diagnosis(self._flow, self.history, self.starts)
        if self.outcome is None or self.outcome.is_complete:
            return diagnosis
        how = self.outcome.in_words(self.history.num_steps)
        reason = f"the fit was {how}: this is the verdict on what it had found by then"
        return replace(diagnosis, reasons=(reason, *diagnosis.reasons))

    def summary(self, var_names: Sequence[str] | None = None) -> "pd.DataFrame":
        r"""Tabulate every component of uncorrected draws, with pandas.

        The columns are the mean; the standard deviation; ``mcse``, the Monte Carlo standard error of the mean,
        :math:`s / \sqrt S` for S draws, which says nothing of how far the flow is from the posterior; the quantiles
        5 %, 50 % and 95 %; and the ends ``hdi_5%`` and ``hdi_95%`` of the highest-density interval, the shortest one
        that holds 90 % of the draws, as many as lie between the outer quantiles (ArviZ's own default is 94 %).

        Entries of masked latents that have no posterior are left out. The mean of an angle is its mean direction. A
        categorical site has a row for each category, whose mean is its probability.

        Args:
            var_names: sites to show; None for all, except discrete sites, and deterministic sites in plates without
                latents, that have a value for each observation, and sites with ``obs_mask``, whose missing values are a
                latent's.

        Raises:
            OptionError: if there is no such site.
        """
        return self._summary().table(var_names)

    @isolated
    def _summary(self) -> Summary:
        with seeded(1):
            draws = self.sample(self.num_diagnostic_samples)
        return Summary(draws, self.structure, self.labels)

    def __repr__(self) -> str:
        lines = [str(self._summary()), "", *self._fit_in_words()]
        if self.structure.subsampled:
            names = ", ".join(p.name for p in self.structure.subsampled)
            return "\n".join([*lines, f"no verdict: plate {names} is subsampled, see Posterior.with_data"])
        diagnosis = self.diagnose()
        # The weights of draws that miss a part of the posterior say nothing of it.
        is_seen = diagnosis.verdict != "do not use"
        known = Estimate(self.log_evidence, self.log_evidence_se).in_words(3)
        log_evidence = known if is_seen else f"{self.log_evidence:.3f} with an unknown error"
        return "\n".join([*lines, f"{self._elbo_in_words()}, log evidence {log_evidence}", str(diagnosis)])

    def _fit_in_words(self) -> list[str]:
        """A line on how the fit went, if anything is known of it."""
        each = " at each mode" if len(self._flow.components) > 1 else ""
        enough = [f"a Gaussian{each} was enough, so that no flow was trained"] if self.is_gaussian else []
        how = [] if self.outcome is None else [self.outcome.in_words(self.history.num_steps)]
        if how and self.history and len(self._flow.components) > 1:
            how[0] += f" of the first of {len(self._flow.components)} flows"
        return ["; ".join([*how, *enough])] if how or enough else []

    def _elbo_in_words(self) -> str:
        outside = self._diagnostics.raw_log_weights == -torch.inf
        if outside.any():
            return f"ELBO -inf, since {outside.double().mean():.2%} of the draws have density zero"
        return f"ELBO {Estimate(self.elbo, self.elbo_se).in_words(3)}"

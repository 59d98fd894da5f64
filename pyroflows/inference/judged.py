"""A flow on the latents of a Pyro model, with the figures and the verdict that its draws give."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from pyroflows.errors import OptionError
from pyroflows.flows import Recipe
from pyroflows.grad_mode import with_gradients
from pyroflows.guides import AutoFlow
from pyroflows.inference.approximation import Approximation
from pyroflows.inference.search.starts import Starts
from pyroflows.inference.summary import default_names, summary_table
from pyroflows.inference.verdict.diagnosis import Diagnosis
from pyroflows.inference.verdict.draws import NUM_DIAGNOSTIC_SAMPLES, DiagnosticDraws
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
        num_diagnostic_samples: int = NUM_DIAGNOSTIC_SAMPLES,
        compile: str = "auto",
        log_joint: LogJoint | None = None,
        draws: DiagnosticDraws | None = None,
    ) -> None:
        if num_diagnostic_samples < 100:
            raise OptionError(f"num_diagnostic_samples must be at least 100, got {num_diagnostic_samples}")
        super().__init__(model, guide, args, kwargs, compile, log_joint)
        self.history = history
        self.starts = starts
        self.num_diagnostic_samples = num_diagnostic_samples
        if draws is not None:
            self._diagnostics = draws

    @property
    def is_gaussian(self) -> bool:
        """Whether a Gaussian, or one at each mode, was enough, so that no flow was trained."""
        return not self.history and self.guide.flow_fn == Recipe("Gaussian")

    @cached_property
    @with_gradients
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

    def diagnose(self) -> Diagnosis:
        """Judge whether the draws can be used as they are, need to be corrected, or should not be used.

        Raises:
            ModelError: if a plate is subsampled.
        """
        return self._diagnostics.diagnosis(self._flow, self.history, self.starts)

    def summary(self, var_names: Sequence[str] | None = None) -> "pd.DataFrame":
        """Tabulate mean, standard deviation and quantiles of every component of uncorrected draws, with pandas.

        Entries of masked latents that have no posterior are left out. The mean of an angle is its mean direction.

        Args:
            var_names: sites to show; None for all, except deterministic sites in plates without latents, which have a
                value for each observation, and sites with ``obs_mask``, whose missing values are a latent's.
        """
        with seeded(1):
            draws = self.sample(self.num_diagnostic_samples)
        names = default_names(self.structure) if var_names is None else var_names
        return summary_table(draws, names, self.structure.kept, self.layout.centers)

    def __repr__(self) -> str:
        table = self.summary().round(3).to_string(max_rows=60)
        if self.structure.subsampled:
            names = ", ".join(p.name for p in self.structure.subsampled)
            return f"{table}\n\nno verdict: plate {names} is subsampled, see Posterior.with_data"
        log_evidence = Estimate(self.log_evidence, self.log_evidence_se)
        each = " at each mode" if len(self._flow.components) > 1 else ""
        trained = f"a Gaussian{each} was enough, so that no flow was trained\n" if self.is_gaussian else ""
        return (
            f"{table}\n\n{trained}{self._elbo_in_words()}, log evidence {log_evidence.in_words(3)}\n{self.diagnose()}"
        )

    def _elbo_in_words(self) -> str:
        outside = self._diagnostics.raw_log_weights == -torch.inf
        if outside.any():
            return f"ELBO -inf, since {outside.double().mean():.2%} of the draws have density zero"
        return f"ELBO {Estimate(self.elbo, self.elbo_se).in_words(3)}"

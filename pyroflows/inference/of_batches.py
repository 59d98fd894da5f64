"""The posterior of a fit that saw its data batch by batch: it draws what all batches share, and needs all to judge."""

from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from pyroflows.errors import ModelError
from pyroflows.grad_mode import isolated
from pyroflows.guides import AutoFlow
from pyroflows.guides.structured import AutoStructuredFlow
from pyroflows.inference import files
from pyroflows.inference.posterior import Posterior
from pyroflows.models.all_rows import WithAllRows
from pyroflows.models.arguments import in_dtype, require_arguments, usable_arguments
from pyroflows.models.batching import BatchedModel
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import model_parameters
from pyroflows.models.tracing import Model


class PosteriorOfBatches(Posterior):
    """The posterior of a fit to batches of data, such as those of a ``DataLoader``.

    It draws, scores and tabulates the global latents, and predicts for the arguments that it is given, with new rows.
    A verdict, weights, evidence and corrections need all rows: :meth:`with_data` takes them.

    Args:
        model: the Pyro model.
        guide: a flow guide, built and trained.
        args: the positional arguments of one batch.
        kwargs: its keyword arguments.
        log_joint: the log joint of that batch, which is not needed.
        known: what else is known of the fit, as for :class:`pyroflows.Posterior`.
    """

    def __init__(
        self, model: Model, guide: AutoFlow, args: Any, kwargs: Any, log_joint: LogJoint | None = None, **known: Any
    ) -> None:
        super().__init__(model, guide.of_globals() if _has_rows(guide) else guide, args, kwargs, **known)
        self._labels_with_data = known["labels"]

    def _found_layout(self) -> Layout:
        assert self.guide.layout is not None
        return self.guide.layout

    @property
    def log_joint(self) -> LogJoint:
        """Raise, since not all data are at hand."""
        self._require_full_plates()

    def _require_full_plates(self) -> NoReturn:
        raise ModelError(
            "this posterior was fitted to batches of data: it has draws, log_prob and summary of the global latents, "
            "and predictive, but its ELBO, weights, evidence, verdict and corrections need all rows at once: use "
            "posterior.with_data(...) with the model's arguments for all of them"
        )

    def _predicted(self, num_samples: int, args: Any, kwargs: Any) -> dict[str, Tensor]:
        if not args and not kwargs:
            raise ModelError(
                "this posterior was fitted to batches of data: give predictive the arguments of the model, as in "
                f"posterior.predictive({num_samples}, x)"
            )
        return super()._predicted(num_samples, args, kwargs)

    def _sites(self, latents: Tensor) -> dict[str, Tensor]:
        values, _ = self.layout.constrain(latents)
        subsampled = {plate.name for plate in self.structure.subsampled}
        names = [s.name for s in self.structure.deterministic if not subsampled.intersection(s.plate_names)]
        if not names and not self.structure.kept:
            return values
        # The latents of the rows are drawn from their prior, on which no global site depends.
        batched = BatchedModel(self._model, self._args, self._kwargs, values, draw=True, kept=self.structure.kept)
        drawn = batched.in_chunks(values, len(latents)).values
        return {name: drawn[name] for name in (*values, *names)}

    @isolated
    def with_data(self, *args: Any, **kwargs: Any) -> Posterior:
        """The posterior of all latents at all rows of the data, which judges and corrects itself.

        Args:
            args: the model's arguments.
            kwargs: the model's keyword arguments.

        Raises:
            OptionError: if the model does not take these arguments.
            ModelError: if they do not hold all rows, or the model has other latents with them.
        """
        require_arguments(self.model, args, kwargs)
        guide, model = self.guide, self.model
        if _has_rows(guide):
            args, kwargs = usable_arguments(in_dtype(model, guide.dtype), args, kwargs, guide.dtype)
            guide, model = guide.at(args, kwargs), WithAllRows(model)
        return Posterior(
            model,
            guide,
            args,
            kwargs,
            self.history,
            self.starts,
            self.num_diagnostic_samples,
            self._compile,
            outcome=self.outcome,
            labels=self._labels_with_data,
        )

    def save(self, path: str | Path) -> None:
        """Write the posterior of the global latents to a safetensors file.

        ``pf.load_posterior(path, model)``, without data, reads it. Flows of rows and encoders are no part of it: keep
        the guide's ``state_dict()`` for these.

        Raises:
            CheckpointError: if the file cannot be written.
            ModelError: if plates that are not subsampled have latents too.
        """
        guide = self.guide.globals_alone() if _has_rows(self.guide) else self.guide
        parameters = model_parameters(self.structure, self._model, self._args, self._kwargs, self._init_fn)
        files.save(guide, self.structure, parameters, self.history, self.starts, None, self.outcome, self.labels, path)

    def __repr__(self) -> str:
        table = [str(self._summary()), "", *self._fit_in_words()]
        return "\n".join([*table, "no verdict: fitted to batches of data, see Posterior.with_data"])


def _has_rows(guide: AutoFlow) -> bool:
    return isinstance(guide, AutoStructuredFlow)

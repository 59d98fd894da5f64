"""A posterior that was loaded without its data: it draws, scores and predicts, but cannot judge or correct itself."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyroflows.errors import CheckpointError, ModelError
from pyroflows.grad_mode import isolated
from pyroflows.guides import AutoFlow
from pyroflows.guides.centering import centerings
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.predictive import posterior_predictive
from pyroflows.models.arguments import usable_arguments
from pyroflows.models.batching import BatchedModel
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.saved_sites import difference, difference_without_data
from pyroflows.models.structure import ModelStructure, describe
from pyroflows.models.tracing import Model
from pyroflows.randomness import seeded


class PosteriorWithoutData(Posterior):
    """The posterior of a file that was loaded without the data of the fit; :func:`pyroflows.load_posterior` makes it.

    It draws and scores latents, tabulates them, and predicts. What needs the data raises a ``ModelError``. The
    deterministic sites are drawn too if the model runs without the data. Entries of masked latents that have no
    posterior, and follow their prior given the data, are NaN if it does not.

    Args:
        model: the Pyro model.
        guide: a guide with the flow and the layout of the file.
        args: the model's positional arguments, without the data.
        kwargs: the model's keyword arguments.
        verdict: the verdict of the fit in words, when it was saved; None if it was not known.
        runs: whether the model runs with these arguments.
        without_values: the names of the latents that the model has in place of its data.
        known: what else is known of the fit, as for :class:`pyroflows.Posterior`.
    """

    def __init__(
        self,
        model: Model,
        guide: AutoFlow,
        args: Any,
        kwargs: Any,
        verdict: str | None,
        runs: bool,
        without_values: frozenset[str],
        **known: Any,
    ) -> None:
        super().__init__(model, guide, args, kwargs, **known)
        self.saved_verdict = verdict
        self._runs = runs
        # Without a run behind the guide, the model may lack latents of the file.
        self._draws_sites = runs and guide.prototype_trace is not None
        self._without_values = without_values
        self._is_model_known = False
        # The data may have dimensions that the latents lack.
        self._labels_with_data = known["labels"]

    def _found_layout(self) -> Layout:
        assert self.guide.layout is not None
        return self.guide.layout

    @property
    def log_joint(self) -> LogJoint:
        """Raise, since there are no data."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ModelError(
            "this posterior was loaded without the data of the fit: it has draws, log_prob, summary and predictive, "
            "but no ELBO, weights, evidence, verdict or correction. Load it with all arguments of the model, by "
            "pf.load_posterior(path, model, x, y), or use posterior.with_data(x, y)"
        )

    def require_latents(self, structure: ModelStructure) -> None:
        """Raise if a run of the model without its data has other latents than the file.

        Raises:
            CheckpointError: if so; says which.
        """
        if other := difference_without_data(self.structure.latents, structure.latents, self._without_values):
            raise CheckpointError(f"the file belongs to a model {other}")
        self._is_model_known = True

    def _require_latents_at(self, args: Any, kwargs: Any) -> None:
        args, kwargs = usable_arguments(self._model, args, kwargs, self.guide.dtype)
        try:
            with seeded(0):
                structure = describe(self._model, args, kwargs).summed_out()
        except Exception:  # the run for the draws explains what is wrong
            return
        self.require_latents(structure)

    def _predicted(self, num_samples: int, args: Any, kwargs: Any) -> dict[str, Tensor]:
        if args or kwargs:
            # Later runs may have further latents, such as those of groups that are new.
            if not self._is_model_known:
                self._require_latents_at(args, kwargs)
            return super()._predicted(num_samples, args, kwargs)
        if not self._runs:
            raise ModelError(
                "this posterior was loaded without arguments of the model: give predictive the inputs, as in "
                f"posterior.predictive({num_samples}, x)"
            )
        values, _ = self.layout.constrain(self._draw(num_samples))
        return posterior_predictive(self._model_drawing(values), values, num_samples)

    def _sites(self, latents: Tensor) -> dict[str, Tensor]:
        values, _ = self.layout.constrain(latents)
        kept = self.structure.kept
        names = [site.name for site in self.structure.deterministic]
        if self._draws_sites and (names or kept):
            drawn = self._model_drawing(values).in_chunks(values, len(latents)).values
            return {name: drawn[name] for name in (*values, *names)}
        return {n: torch.where(kept[n], value, torch.nan) if n in kept else value for n, value in values.items()}

    def _require_sites(self, names: Iterable[str]) -> None:
        """Take any name, since the file does not have those of deterministic and observed sites."""

    def _model_drawing(self, values: Mapping[str, Tensor]) -> BatchedModel:
        return BatchedModel(self._model, self._args, self._kwargs, values, draw=True, kept=self.structure.kept)

    @isolated
    def with_data(self, *args: Any, **kwargs: Any) -> Posterior:
        """The posterior at the data of the fit, or at others, which judges and corrects itself.

        Args:
            args: the model's arguments.
            kwargs: the model's keyword arguments.

        Raises:
            CheckpointError: if the model has latents with other supports or masks than the file.
            ModelError: if the model has other latents at these arguments.
        """
        guide = AutoFlow(self.model, self.guide.flow_fn, dtype=self.guide.dtype)
        guide.hold(self._flow, self.guide.flow_fn)
        guide.center_at(self.layout.centers)
        args, kwargs = usable_arguments(guide.model, args, kwargs, guide.dtype)
        guide._setup_prototype(*args, **kwargs)
        assert guide.structure is not None
        latents, found = self.structure.latents, guide.structure.latents
        if [(site.name, site.shape) for site in latents] != [(site.name, site.shape) for site in found]:
            raise CheckpointError(
                f"the file belongs to a model with latent sites {[site.name for site in latents]} of other shapes, or "
                f"in another order, than at these arguments: {[site.name for site in found]}"
            )
        if other := difference(latents, found):
            raise CheckpointError(f"the file belongs to a model {other}")
        for layer in centerings(self._flow):
            layer.require_priors()
        return Posterior(
            self.model,
            guide,
            args,
            kwargs,
            self.history,
            self.starts,
            self.num_diagnostic_samples,
            outcome=self.outcome,
            labels=self._labels_with_data,
        )

    def distill(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise, since the new posterior would be judged by the data."""
        self._refuse()

    def save(self, path: str | Path) -> NoReturn:
        """Raise, since the file would lack what the data show.

        Raises:
            ModelError: always; says what to do.
        """
        raise ModelError(
            "this posterior was loaded without its data: copy the file that it is from, or save "
            "posterior.with_data(...)"
        )

    def __repr__(self) -> str:
        table = "\n".join([str(self._summary()), "", *self._fit_in_words()])
        if self.saved_verdict is None:
            return f"{table}\nno verdict: loaded without the data, see Posterior.with_data"
        return f"{table}\nloaded without the data; the verdict of the fit when it was saved:\n{self.saved_verdict}"

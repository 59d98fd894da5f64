"""Posteriors that an amortised flow gives at one value of the data, with and without a likelihood."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyroflows.compiling.check import Compiler
from pyroflows.errors import DataError, FlowError, ModelError, OptionError
from pyroflows.exclusive import exclusive_property
from pyroflows.flows import Flow
from pyroflows.grad_mode import isolated
from pyroflows.guides import AutoFlow
from pyroflows.inference.amortized.simulator import Simulator
from pyroflows.inference.export import labelled_data, prior_groups
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.predictive import Reasons, posterior_predictive, replicates
from pyroflows.inference.verdict.diagnosis import HOPELESS, Diagnosis
from pyroflows.models.batching import NUM_EXAMPLES, BatchedModel
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe
from pyroflows.randomness import seeded
from pyroflows.training.history import History

MAX_EXAMPLES = 500
ADVICE = (
    "use posterior.mcmc and look at its R-hat; or fit these data by pf.FlowVI; or make the amortised fit with more "
    "simulations"
)


def posterior_at(simulator: Simulator, flow: Flow, data: Mapping[str, Tensor], note: str | None) -> Posterior:
    """Make the posterior at data of a flow for the latents of a simulator.

    Args:
        simulator: the simulator.
        flow: the flow at these data, which takes no context.
        data: values by observed site.
        note: what is to be said of these data; None for nothing.
    """
    model = simulator.conditioned(data)
    guide = AutoFlow(model, lambda dim: flow)
    guide.hold(flow, guide.flow_fn)
    guide._setup_prototype(*simulator.args, **simulator.kwargs)
    made = AmortizedPosterior if simulator.no_likelihood is None else LikelihoodFreePosterior
    return made(simulator, guide, data, note)


class AmortizedPosterior(Posterior):
    """The posterior of an amortised flow at one value of the data, which judges and corrects itself by the likelihood.

    It shares the parameters of the flow that :func:`pyroflows.fit_amortized` has trained.

    Args:
        simulator: the simulator of the model.
        guide: a guide of the model at the data, which holds the flow at the data.
        data: values by observed site.
        note: what is to be said of these data; None for nothing.
    """

    def __init__(self, simulator: Simulator, guide: AutoFlow, data: Mapping[str, Tensor], note: str | None) -> None:
        super().__init__(guide.model, guide, simulator.args, simulator.kwargs, History())
        self.simulator, self.data, self.note = simulator, data, note

    @exclusive_property
    @isolated
    def log_joint(self) -> LogJoint:
        """The log joint of the model at the data, made at the first use.

        Raises:
            DataError: if the model refuses the data at all draws of the flow.
        """
        with seeded(0), torch.no_grad():
            draws = self._flow().sample((MAX_EXAMPLES,))
        refusal: ValueError | None = None
        # The density may be zero at many draws, at which a model cannot be looked at.
        for examples in draws.split(NUM_EXAMPLES):
            try:
                compiler = Compiler(self._compile)
                with seeded(0):
                    return LogJoint(self._model, self._args, self._kwargs, self.layout, examples, compiler)
            except ValueError as error:
                if isinstance(error, FlowError):
                    raise
                refusal = refusal or error
        raise DataError(f"the model refuses these data at {MAX_EXAMPLES} draws of the flow: {refusal}") from refusal

    def diagnose(self) -> Diagnosis:
        diagnosis = super().diagnose()
        reasons = [ADVICE if reason == HOPELESS else reason for reason in diagnosis.reasons]
        notes = [] if self.note is None else [self.note]
        return replace(diagnosis, reasons=(*notes, *reasons))

    def with_data(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise: other data have a posterior of their own.

        Raises:
            OptionError: always; says how to get the posterior at other data.
        """
        raise OptionError(
            "the posterior of an amortised fit belongs to the data that it was made for: give other data to "
            "amortized.posterior(y); the other arguments of the model are the same in all simulations"
        )

    def save(self, path: str | Path) -> NoReturn:
        """Raise: the flow of an amortised fit belongs to all data.

        Raises:
            OptionError: always; says what can be saved.
        """
        raise OptionError(
            "a posterior of an amortised fit shares its flow with those at other data: save that fit by "
            "amortized.save(path), or save posterior.distill(), which has a flow of its own"
        )


class LikelihoodFreePosterior(AmortizedPosterior):
    """The posterior of an amortised flow where the likelihood cannot be evaluated: it is neither judged nor corrected.

    It draws and scores latents, tabulates them, predicts, and gives ArviZ data. What needs the likelihood raises a
    ``ModelError`` that says why there is none. The arguments are those of :class:`AmortizedPosterior`.
    """

    def __init__(self, simulator: Simulator, guide: AutoFlow, data: Mapping[str, Tensor], note: str | None) -> None:
        super().__init__(simulator, guide, data, note)
        # Deterministic sites may depend on what the simulator draws; predictive() has them.
        self.structure = replace(self.structure, deterministic=())

    @property
    def log_joint(self) -> LogJoint:
        """Raise, since there is none."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ModelError(
            f"the likelihood cannot be evaluated, since {self.simulator.no_likelihood}: this posterior has draws, "
            "log_prob, summary, predictive and to_arviz, but no weights, evidence, verdict or correction"
        )

    def _predicted(self, num_samples: int, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Draw the observed, deterministic and not inferred sites given draws from the flow, by site."""
        simulator = self.simulator
        values, _ = self.layout.constrain(self._draw(num_samples))
        if not (args or kwargs):
            args, kwargs = simulator.args, simulator.kwargs
        batched = BatchedModel(simulator.model, args, kwargs, values, draw=True, kept=self.structure.kept)
        return posterior_predictive(batched, values, len(next(iter(values.values()))))

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
        """Convert to ArviZ data as :meth:`pyroflows.Posterior.to_arviz` does, without log_likelihood, lp and weights.

        A warning says that the likelihood is missing, unless ``log_likelihood`` is False. The arguments are those of
        :meth:`pyroflows.Posterior.to_arviz`.
        """
        with seeded(seed):
            return self._arviz_data(num_samples, log_likelihood, posterior_predictive, prior, coords, dims)

    def _arviz_data(
        self, num_samples: int, log_likelihood: bool, posterior_predictive: bool, prior: bool, coords: Any, dims: Any
    ) -> Any:
        simulator = self.simulator
        latents, log_q = self._latents(num_samples)
        values, _ = self.layout.constrain(latents)
        model = BatchedModel(simulator.model, simulator.args, simulator.kwargs, values, draw=True)
        structure = describe(simulator.model, simulator.args, simulator.kwargs)
        sites = (*structure.latents, *structure.deterministic)
        simulated = [site for site in sites if site.name in self.data]
        groups: dict[str, Mapping[str, Tensor]] = {
            "posterior": self._sites(latents),
            "sample_stats": {"log_q": log_q.double()},
            "observed_data": self.data,
        }
        left_out: dict[str, Reasons] = {}
        if log_likelihood:
            reason = f"{simulator.no_likelihood}, so that it cannot be evaluated"
            left_out["log_likelihood"] = dict.fromkeys(self.data, reason)
        if posterior_predictive:
            groups["posterior_predictive"], left_out["posterior_predictive"] = replicates(
                model, simulated, values, num_samples
            )
        if prior:
            groups |= prior_groups(model, structure, self.data, num_samples, left_out)
        return labelled_data(groups, sites, left_out, coords, dims)

    def distill(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise, since the new posterior would be judged by the likelihood."""
        self._refuse()

    def __repr__(self) -> str:
        notes = [] if self.note is None else [f"  - {self.note}"]
        text = (
            f"no verdict: the likelihood cannot be evaluated, since {self.simulator.no_likelihood}. These are draws of "
            "the flow, without weights or correction"
        )
        return "\n".join([str(self._summary()), "", text, *notes])

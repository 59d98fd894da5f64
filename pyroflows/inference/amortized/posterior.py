"""Posteriors that an amortised flow gives at one value of the data, with and without a likelihood."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pyroflows.compiling.check import Compiler
from pyroflows.errors import DataError, FlowError, ModelError, OptionError
from pyroflows.flows import Flow
from pyroflows.grad_mode import with_gradients
from pyroflows.guides import AutoFlow
from pyroflows.inference.amortized.simulator import Simulator
from pyroflows.inference.arviz import plot_pairs
from pyroflows.inference.export import arviz_data
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.verdict.diagnosis import HOPELESS, Diagnosis
from pyroflows.models.batching import NUM_EXAMPLES, BatchedModel
from pyroflows.models.log_joint import LogJoint
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
    return made(simulator, guide, note)


class AmortizedPosterior(Posterior):
    """The posterior of an amortised flow at one value of the data, which judges and corrects itself by the likelihood.

    It shares the parameters of the flow that :func:`pyroflows.fit_amortized` has trained.

    Args:
        simulator: the simulator of the model.
        guide: a guide of the model at the data, which holds the flow at the data.
        note: what is to be said of these data; None for nothing.
    """

    def __init__(self, simulator: Simulator, guide: AutoFlow, note: str | None) -> None:
        super().__init__(guide.model, guide, simulator.args, simulator.kwargs, History())
        self.simulator, self.note = simulator, note

    @cached_property
    @with_gradients
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

    It draws and scores latents, tabulates them, and predicts. What needs the likelihood raises a ``ModelError`` that
    says why there is none. The arguments are those of :class:`AmortizedPosterior`.
    """

    def __init__(self, simulator: Simulator, guide: AutoFlow, note: str | None) -> None:
        super().__init__(simulator, guide, note)
        # Deterministic sites may depend on what the simulator draws; predictive() has them.
        self.structure = replace(self.structure, deterministic=())

    @property
    def log_joint(self) -> LogJoint:
        """Raise, since there is none."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ModelError(
            f"the likelihood cannot be evaluated, since {self.simulator.no_likelihood}: this posterior has draws, "
            "log_prob, summary and predictive, but no weights, evidence, verdict or correction"
        )

    @with_gradients
    def predictive(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the observed, deterministic and not inferred sites given draws from the flow, by site.

        Args:
            num_samples: number of draws, at least 1.
            args: arguments of the model; those of the simulations if none are given.
            kwargs: keyword arguments of the model.
        """
        simulator = self.simulator
        values, _ = self.layout.constrain(self._draw(num_samples))
        if not (args or kwargs):
            args, kwargs = simulator.args, simulator.kwargs
        batched = BatchedModel(simulator.model, args, kwargs, values, draw=True, kept=self.structure.kept)
        drawn = batched.in_chunks(values, num_samples).values
        return {name: value for name, value in drawn.items() if name not in values}

    def distill(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise, since the new posterior would be judged by the likelihood."""
        self._refuse()

    def plot_pairs(self, var_names: Any = None, coords: Any = None, num_samples: int = 2000, **kwargs: Any) -> Any:
        """Plot as :meth:`pyroflows.Posterior.plot_pairs` does."""
        return plot_pairs(arviz_data(self.sample(num_samples), None, None), var_names, coords, **kwargs)

    def __repr__(self) -> str:
        table = self.summary().round(3).to_string(max_rows=60)
        notes = [] if self.note is None else [f"  - {self.note}"]
        text = (
            f"no verdict: the likelihood cannot be evaluated, since {self.simulator.no_likelihood}. These are draws of "
            "the flow, without weights or correction"
        )
        return "\n".join([table, "", text, *notes])

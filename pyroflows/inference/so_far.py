"""What a fit has found so far, from which an interrupted or diverged fit gives a posterior."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pyroflows.flows import Recipe
from pyroflows.guides import AutoFlow
from pyroflows.inference.candidates import Candidate, FittedCandidate, Start
from pyroflows.inference.elbo import ModelELBO
from pyroflows.inference.outcome import Ending
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.search.gaussians import GaussianApproximation
from pyroflows.inference.search.starts import Starts
from pyroflows.models.log_joint import LogJoint
from pyroflows.training.history import History

# The standard deviation of a Gaussian at the initial values, as at the start of Pyro's guides.
INITIAL_SCALE = 0.1


class FitSoFar:
    """The candidates that a fit has found, the one in training included.

    Args:
        make: a function from a guide, and ``history=``, ``starts=``, ``draws=`` and ``ending=``, to the posterior.
        guide: the guide of the fit, built.
        log_joint: the log joint of the model.
        center: the initial values as an unconstrained vector ``(dim,)``.
        own_parameters: the parameters of the model, which are trained with the flow.

    Attributes:
        is_ended: whether the callback of the fit has ended it.
        elbo_of: a function from a flow, and the further arguments of :class:`ModelELBO`, to the objective.
    """

    def __init__(
        self,
        make: Callable[..., Posterior],
        guide: AutoFlow,
        log_joint: LogJoint,
        center: Tensor,
        own_parameters: Sequence[Tensor],
    ) -> None:
        self.guide = guide
        self.log_joint = log_joint
        self.center = center
        self.own_parameters = own_parameters
        self.is_ended = False
        self.elbo_of: Callable[..., ModelELBO] = partial(ModelELBO, log_joint=log_joint)
        self._make = make
        self._modes: Callable[[], Sequence[Start]] = tuple
        self._found: Starts | None = None
        self._finished: list[FittedCandidate] = []
        self._in_training: Callable[[], FittedCandidate] | None = None

    def note_modes(self, modes: Callable[[], Sequence[Start]], found: Starts) -> None:
        """Note the modes that the search has found by now, which a function gives."""
        self._modes, self._found = modes, found

    def note_training(self, make: Callable[[History], FittedCandidate], history: History) -> None:
        """Note that a candidate is in training.

        Args:
            make: a function from the history of its training to the candidate as it is by then.
            history: the history, which grows.
        """
        self._in_training = lambda: make(history)

    def note_finished(self, fitted: FittedCandidate) -> None:
        """Note a candidate that is complete."""
        self._finished.append(fitted)
        self._in_training = None

    def posterior(self, ending: Ending) -> Posterior:
        """The posterior of the best candidate.

        Args:
            ending: how the fit ended.
        """
        return self._with(self._best(), ending)

    def copied_posterior(self) -> Posterior:
        """The posterior of the candidate in training, with a copy of its flow."""
        assert self._in_training is not None
        fitted = self._in_training()
        copied = replace(fitted, flow=copy.deepcopy(fitted.flow), history=History(fitted.history.as_lists()))
        return self._with(copied, "still in training")

    def _with(self, fitted: FittedCandidate, ending: Ending) -> Posterior:
        guide = self.guide.holding(fitted.flow, fitted.candidate.flow_fn)
        return self._make(guide, history=fitted.history, starts=fitted.found, ending=ending)

    def _best(self) -> FittedCandidate:
        """The candidate whose log weights have the smallest variance; a Gaussian if no flow was trained yet."""
        fitted = self._finished + ([self._in_training()] if self._in_training else [])
        if not fitted:
            return self._gaussian()
        if len(fitted) == 1 or self.log_joint.structure.subsampled:
            return fitted[-1]
        return min(fitted, key=lambda candidate: candidate.first_draws.figures.log_weight_variance.value)

    def _gaussian(self) -> FittedCandidate:
        """A Gaussian at each mode, or at the initial values before the first mode was found."""
        scale = INITIAL_SCALE * torch.eye(len(self.center)).to(self.center)
        modes = tuple(self._modes()) or (GaussianApproximation(self.center, scale, elbo=-math.inf),)
        candidate = Candidate(Recipe("Gaussian"), modes, is_trained=False)
        return candidate.fit(self.log_joint, lambda flow, make: History(), self._found)

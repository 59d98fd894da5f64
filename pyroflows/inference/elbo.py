"""The objective that fits a flow to a model: the ELBO, estimated from subsampled rows, and tempered on demand."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from pyroflows.fitting.estimators import Estimator
from pyroflows.fitting.reverse_kl import ReverseKL
from pyroflows.flows import Flow
from pyroflows.models.log_joint import LogJoint


@dataclass(frozen=True)
class Tempering:
    r"""Inverse temperatures :math:`\beta_t = \beta_0^{1 - t/T}`, which rise geometrically to 1 over T steps.

    Args:
        first: :math:`\beta_0`, between 0 and 1.
        num_steps: T, the number of steps.

    Example:
        >>> [round(Tempering(0.01, num_steps=2)(step), 2) for step in range(4)]
        [0.01, 0.1, 1.0, 1.0]
    """

    first: float
    num_steps: int

    def __call__(self, step: int) -> float:
        """The inverse temperature :math:`\beta_t` of a step, counted from 0."""
        return self.first ** (1 - min(1.0, step / max(1, self.num_steps)))


class ModelELBO(ReverseKL):
    r"""The ELBO of a flow for a model, :math:`E_q[\beta_t \log p(x, y) - \log q(x)]`, which training maximises.

    Args:
        flow: the flow q.
        log_joint: the log joint of the model; the rows of subsampled plates are drawn anew in each step.
        estimator: the gradient estimator.
        num_particles: number of draws a step, at least 1.
        own_parameters: parameters of the model, which are trained with the flow.
        tempering: the inverse temperatures :math:`\beta_t`; None for 1 throughout.
    """

    remedy = "a smaller learning rate, other initial values (init_loc_fn of the guide), or float64"

    def __init__(
        self,
        flow: Flow,
        log_joint: LogJoint,
        estimator: Estimator,
        num_particles: int,
        own_parameters: Iterable[Tensor] = (),
        tempering: Tempering | None = None,
    ) -> None:
        super().__init__(flow, partial(_tempered, log_joint), estimator, num_particles, own_parameters)
        self._log_joint = log_joint
        self._tempering = tempering
        self._num_drawn = 0

    def draw(self) -> list[Tensor]:
        """Draw base values and the rows of each subsampled plate, and give the inverse temperature of the step."""
        beta = 1.0 if self._tempering is None else self._tempering(self._num_drawn)
        self._num_drawn += 1
        return [
            *super().draw(),
            next(self.flow.parameters()).new_tensor(beta),
            *self._log_joint.draw_subsample().values(),
        ]

    def state_dict(self) -> dict[str, Any]:
        """The number of steps so far, on which the temperature depends."""
        return {"num_drawn": self._num_drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._num_drawn = state["num_drawn"]


def _tempered(log_joint: LogJoint, x: Tensor, beta: Tensor, *rows: Tensor) -> Tensor:
    names = [plate.name for plate in log_joint.structure.subsampled]
    return beta * log_joint(x, dict(zip(names, rows, strict=True)))

"""The objective that fits a flow to a model: the ELBO, of subsampled rows and tempered where that is asked for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
        num_steps: T.
    """

    first: float
    num_steps: int

    def __call__(self, step: int) -> float:
        return self.first ** (1 - min(1.0, step / max(1, self.num_steps)))


class ModelELBO(ReverseKL):
    r"""Maximises the ELBO of a flow for a model's log joint, :math:`E_q[\beta_t \log p(x, y) - \log q(x)]`.

    Args:
        flow: the flow q.
        log_joint: that of the model; rows of subsampled plates are drawn anew in each step.
        estimator: of the gradient.
        num_particles: draws a step.
        own_parameters: parameters of the model, trained along.
        tempering: the inverse temperatures :math:`\beta_t`; None for 1 throughout.
    """

    def __init__(
        self,
        flow: Flow,
        log_joint: LogJoint,
        estimator: Estimator,
        num_particles: int,
        own_parameters: Iterable[Tensor] = (),
        tempering: Tempering | None = None,
    ) -> None:
        super().__init__(flow, self._tempered, estimator, num_particles, own_parameters)
        self._log_joint = log_joint
        self._tempering = tempering
        self._num_drawn = 0

    def draw(self) -> list[Tensor]:
        """Base draws, the inverse temperature, and rows of each subsampled plate."""
        beta = 1.0 if self._tempering is None else self._tempering(self._num_drawn)
        self._num_drawn += 1
        return [
            *super().draw(),
            next(self.flow.parameters()).new_tensor(beta),
            *self._log_joint.draw_subsample().values(),
        ]

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, which the temperature depends on."""
        return {"num_drawn": self._num_drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._num_drawn = state["num_drawn"]

    def _tempered(self, x: Tensor, beta: Tensor, *rows: Tensor) -> Tensor:
        names = [plate.name for plate in self._log_joint.structure.subsampled]
        return beta * self._log_joint(x, dict(zip(names, rows, strict=True)))

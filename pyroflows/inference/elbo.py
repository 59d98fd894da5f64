"""The step that fits a flow to a model: an estimator of the ELBO's gradient, tempered where that is asked for."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from pyroflows.fitting.estimators import Estimator
from pyroflows.flows import Flow
from pyroflows.models.log_joint import LogJoint
from pyroflows.training.step import Step


class Tempering(Iterator[float]):
    r"""Inverse temperatures :math:`\beta_t`, rising geometrically to 1 over the first third of the steps, or over 500.

    Args:
        first: :math:`\beta_0`.
        num_steps: of the whole training.
    """

    def __init__(self, first: float, num_steps: int | None) -> None:
        self.num_steps = 500 if num_steps is None else num_steps // 3
        self._first = first
        self._step = 0

    def __next__(self) -> float:
        done = min(1.0, self._step / max(1, self.num_steps))
        self._step += 1
        return self._first ** (1 - done)


def elbo_step(
    flow: Flow,
    log_joint: LogJoint,
    estimator: Estimator,
    num_particles: int,
    own_parameters: Iterable[Tensor] = (),
    tempering: Tempering | None = None,
) -> Step:
    """A step that maximises the ELBO.

    Args:
        flow: the flow q.
        log_joint: of the model.
        estimator: of the gradient.
        num_particles: draws a step.
        own_parameters: of the model, trained along.
        tempering: of the log joint.
    """
    names = [plate.name for plate in log_joint.structure.subsampled]

    def draw() -> list[Tensor]:
        beta = 1.0 if tempering is None else next(tempering)
        return [next(flow.parameters()).new_tensor(beta), *log_joint.draw_subsample().values()]

    def objective(z: Tensor, beta: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        subsample = dict(zip(names, rows, strict=True))
        return estimator(flow(), lambda x: beta * log_joint(x, subsample), z)

    return Step(flow, objective, _record, num_particles, log_joint.compiler, draw, own_parameters)


def _record(loss: Tensor, log_weights: Tensor) -> Mapping[str, Tensor]:
    variance = log_weights.var() if len(log_weights) > 1 else log_weights.new_tensor(torch.nan)
    return {"elbo": log_weights.mean(), "log_weight_variance": variance}

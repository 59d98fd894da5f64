"""One step of reverse KL: a pure function of parameters, noise and rows of data, compiled."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from pyroflows.flows import Flow
from pyroflows.inference.estimators import Estimator
from pyroflows.inference.log_joint import LogJoint, is_singular


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


class Step:
    """Fills the gradient of an estimator of the reverse KL divergence.

    The parameters become views of one flat tensor, which is what an optimiser trains: the flow is up to date at any
    time, and a step of the optimiser is one operation.

    Args:
        flow: the flow q.
        log_joint: of the model.
        estimator: of the gradient.
        num_particles: draws a step.
        own_parameters: of the model, trained along.
        tempering: of the log joint.

    Attributes:
        parameters: what an optimiser trains.
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
        self._flow = flow
        self._log_joint = log_joint
        self._estimator = estimator
        self._num_particles = num_particles
        self._trained = [*(p for p in flow.parameters() if p.requires_grad), *own_parameters]
        self._tempering = tempering
        # The noise of a base that is trained depends on its parameters, and is drawn inside.
        self._draws_inside = any(p.requires_grad for p in flow.base.parameters())
        self.parameters = _flattened(self._trained)
        self._views = [p.detach() for p in self._trained]
        examples = self._inputs()
        noise = [p + 0.03 * torch.randn_like(p) for p in self._views]
        others = [*noise, *self._inputs()[len(noise) :]]
        self._function = log_joint.compiler(self._loss_and_gradient, [*self._trained, *examples[len(noise) :]], others)

    def __call__(self) -> Mapping[str, Tensor]:
        try:
            gradients, log_weights = self._function(*self._inputs())
        except RuntimeError as error:
            if not is_singular(error):
                raise
            # A step to leave out.
            gradients = self._views[0].new_full((sum(p.numel() for p in self._trained),), torch.nan)
            log_weights = gradients.new_full((self._num_particles,), torch.nan)
        start = 0
        for parameter in self.parameters:
            parameter.grad = gradients[start : start + parameter.numel()].view_as(parameter).to(parameter)
            start += parameter.numel()
        variance = log_weights.var() if self._num_particles > 1 else log_weights.new_tensor(torch.nan)
        return {"elbo": log_weights.mean(), "log_weight_variance": variance}

    def release(self) -> None:
        """Give each parameter memory of its own again."""
        for parameter in self._trained:
            parameter.data = parameter.data.clone()

    def _inputs(self) -> list[Tensor]:
        noise = [] if self._draws_inside else [self._flow.base().sample((self._num_particles,))]
        beta = [] if self._tempering is None else [self._views[0].new_tensor(next(self._tempering))]
        return [*self._views, *noise, *beta, *self._log_joint.draw_subsample().values()]

    def _loss_and_gradient(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        rest = list(inputs[len(self._trained) :])
        with torch.enable_grad():
            z = self._flow.base().rsample((self._num_particles,)) if self._draws_inside else rest.pop(0)
            beta = 1.0 if self._tempering is None else rest.pop(0)
            names = (plate.name for plate in self._log_joint.structure.subsampled)
            subsample = dict(zip(names, rest, strict=True))
            loss, log_weights = self._estimator(self._flow(), lambda x: beta * self._log_joint(x, subsample), z)
            gradients = torch.autograd.grad(loss, self._trained, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.reshape(-1) for gradient in gradients]), log_weights


def _flattened(parameters: list[Tensor]) -> list[Tensor]:
    """One leaf tensor whose memory the parameters share, or the parameters where they differ in dtype or device."""
    if len({(p.dtype, p.device) for p in parameters}) > 1:
        return parameters
    flat = torch.cat([p.detach().reshape(-1) for p in parameters]).requires_grad_()
    parts = flat.detach().split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part.view_as(parameter)
    return [flat]

"""One step of reverse KL: a pure function of parameters, noise and what else a step draws, compiled."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pyroflows.compiling.check import Compiler, is_singular
from pyroflows.flows import Flow

# Base draws z (S, *event shape), and what else was drawn -> a loss and log weights (S,) without gradients.
Objective: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
# A loss and log weights -> what to put on record.
Record: TypeAlias = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


class Step:
    """Fills the gradient of an objective of a flow's draws.

    The parameters become views of one flat tensor, which is what an optimiser trains: the flow is up to date at any
    time, and a step of the optimiser is one operation.

    Args:
        flow: the flow q.
        objective: of its base draws.
        record: what a step puts on record.
        num_particles: draws a step.
        compiler: of the step.
        draw: what a step draws besides, tensors of the same shapes each time.
        own_parameters: of the objective, trained along.

    Attributes:
        parameters: what an optimiser trains.
    """

    def __init__(
        self,
        flow: Flow,
        objective: Objective,
        record: Record,
        num_particles: int,
        compiler: Compiler,
        draw: Callable[[], Sequence[Tensor]] = tuple,
        own_parameters: Iterable[Tensor] = (),
    ) -> None:
        self._flow = flow
        self._objective = objective
        self._record = record
        self._num_particles = num_particles
        self._draw = draw
        self._trained = [*(p for p in flow.parameters() if p.requires_grad), *own_parameters]
        # The noise of a base that is trained depends on its parameters, and is drawn inside.
        self._draws_inside = any(p.requires_grad for p in flow.base.parameters())
        self.parameters = _flattened(self._trained)
        self._views = [p.detach() for p in self._trained]
        examples = self._inputs()
        noise = [p + 0.03 * torch.randn_like(p) for p in self._views]
        others = [*noise, *self._inputs()[len(noise) :]]
        self._function = compiler(self._gradient, [*self._trained, *examples[len(noise) :]], others)

    def __call__(self) -> Mapping[str, Tensor]:
        try:
            gradients, loss, log_weights = self._function(*self._inputs())
        except RuntimeError as error:
            if not is_singular(error):
                raise
            # A step to leave out.
            gradients = self._views[0].new_full((sum(p.numel() for p in self._trained),), torch.nan)
            log_weights = gradients.new_full((self._num_particles,), torch.nan)
            loss = log_weights[0]
        start = 0
        for parameter in self.parameters:
            parameter.grad = gradients[start : start + parameter.numel()].view_as(parameter).to(parameter)
            start += parameter.numel()
        return self._record(loss, log_weights)

    def release(self) -> None:
        """Give each parameter memory of its own again."""
        for parameter in self._trained:
            parameter.data = parameter.data.clone()

    def _inputs(self) -> list[Tensor]:
        noise = [] if self._draws_inside else [self._flow.base().sample((self._num_particles,))]
        return [*self._views, *noise, *self._draw()]

    def _gradient(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rest = list(inputs[len(self._trained) :])
        with torch.enable_grad():
            z = self._flow.base().rsample((self._num_particles,)) if self._draws_inside else rest.pop(0)
            loss, log_weights = self._objective(z, *rest)
            gradients = torch.autograd.grad(loss, self._trained, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.reshape(-1) for gradient in gradients]), loss.detach(), log_weights


def _flattened(parameters: list[Tensor]) -> list[Tensor]:
    """One leaf tensor whose memory the parameters share, or the parameters where they differ in dtype or device."""
    if len({(p.dtype, p.device) for p in parameters}) > 1:
        return parameters
    flat = torch.cat([p.detach().reshape(-1) for p in parameters]).requires_grad_()
    parts = flat.detach().split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part.view_as(parameter)
    return [flat]

"""Regression of a student on a teacher: of a base draw z the student is to make what the teacher makes of it."""

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflows.flows import Flow
from pyroflows.randomness import seeded
from pyroflows.training.objective import Figures, Objective
from pyroflows.transforms import FlowTransform, TriangularTransform

# In which the draws are made, since layers that go dimension by dimension remember what they have computed.
NUM_PARTS = 4


class Regression(Objective):
    r"""Errors of a student that follows the draws of a teacher; as an objective, layer by layer.

    The error of an event is :math:`\sum_j h(e_j)` with :math:`h(e) = 2 (\sqrt{1 + e^2} - 1)` and :math:`e_j = (x^p_j -
    x^q_j) / s_j`: quadratic up to a standard deviation, and linear far out, where a few draws would rule the sum.
    For the same reason the standard deviation :math:`s_j` is half the distance of the quantiles of 16 % and 84 % of
    :math:`x^p_j`.

    Args:
        student: the flow that follows.
        teacher: a flow with the student's base, see :func:`same_law`.
        stages: of the teacher's draws, see :func:`draw_stages`.
        contexts: rows ``(n, *context_shape)`` at which they were made, or None.
        batch_size: draws a step.
    """

    def __init__(
        self, student: Flow, teacher: Flow, stages: list[Tensor], contexts: Tensor | None, batch_size: int
    ) -> None:
        super().__init__(student)
        self._batch_size = batch_size
        self._stages = stages
        self._scales = [_scale(stage) for stage in stages]
        self._contexts = contexts
        self._matched = _matched(student, teacher)

    def draw(self) -> list[Tensor]:
        """A random index ``(batch_size,)`` of the teacher's draws."""
        return [torch.randint(len(self._stages[0]), (self._batch_size,), device=self._stages[0].device)]

    def loss(self, index: Tensor) -> tuple[Tensor, Figures]:
        """The mean error, layer by layer."""
        return self.layer_by_layer(index).mean(), {}

    def end_to_end(self, index: Tensor) -> Tensor:
        """The errors ``(B,)`` of draws x of an index ``(B,)``."""
        return self._errors(self.flow.transform, 0, len(self._stages) - 1, index)

    def layer_by_layer(self, index: Tensor) -> Tensor:
        """The errors of each layer, given what the teacher's layer at its place was given, summed over layers.

        They are those end to end where the layers of the two do not match.
        """
        if not self._matched:
            return self.end_to_end(index)
        return torch.stack([self._errors(layer, i, i + 1, index) for i, layer in self._matched]).sum(0)

    def _errors(self, layer: FlowTransform, before: int, after: int, index: Tensor) -> Tensor:
        context = self._contexts[index] if layer.context_dim and self._contexts is not None else None
        found, _ = layer.forward_and_ladj(self._stages[before][index], context)
        errors = (found - self._stages[after][index]) / self._scales[after]
        return 2 * (torch.sqrt(1 + errors**2) - 1).flatten(1).sum(-1)


@torch.no_grad()
def draw_stages(teacher: Flow, num_draws: int, contexts: Tensor | None) -> list[Tensor]:
    """Base draws ``(n, *event_shape)`` of a flow, and what each of its layers makes of them, the last being draws x."""
    z = teacher.base().sample((num_draws,))
    parts = z.tensor_split(NUM_PARTS)
    given = [None] * NUM_PARTS if contexts is None else contexts.tensor_split(NUM_PARTS)
    drawn = [_stages(teacher, part, context) for part, context in zip(parts, given, strict=True)]
    return [torch.cat(stage) for stage in zip(*drawn, strict=True)]


def same_law(a: Distribution, b: Distribution) -> bool:
    """Whether two laws are one, as far as draws of the same seed tell."""
    draws = []
    for law in (a, b):
        with seeded(0):
            draws.append(law.sample((3,)))
    return torch.equal(*draws)


def _scale(draws: Tensor) -> Tensor:
    # torch.quantile takes 16 million numbers at most.
    low, high = (draws.kthvalue(1 + int(level * (len(draws) - 1)), 0).values for level in (0.16, 0.84))
    return (high - low) / 2


def _stages(teacher: Flow, z: Tensor, context: Tensor | None) -> list[Tensor]:
    stages = [z]
    for layer in teacher.transform.layers:
        stages.append(layer.forward_and_ladj(stages[-1], context if layer.context_dim else None)[0])
    return stages


def _matched(student: Flow, teacher: Flow) -> list[tuple[int, FlowTransform]]:
    """The student's trained layers, if each can become the teacher's layer at its place.

    A map that is triangular in some order is so in both directions, and one of its kind can represent its inverse.
    """
    layers, orders = student.transform.layers, _orders(student)
    if None in orders or orders != _orders(teacher):
        return []
    return [(i, layer) for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]


def _orders(flow: Flow) -> list[tuple[int, ...] | None]:
    return [
        layer.triangular_order if isinstance(layer, TriangularTransform) else None for layer in flow.transform.layers
    ]

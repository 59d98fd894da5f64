"""Define the regression of a student on a teacher: both should map a base draw z to the same x."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflows.constraints import angles_in, wrapped
from pyroflows.flows import Flow
from pyroflows.randomness import seeded
from pyroflows.training.objective import Figures, Objective, trained_parameters
from pyroflows.transforms import FlowTransform, TriangularTransform

# Draws are made in this many parts, since layers that go dimension by dimension keep intermediate values in memory.
NUM_PARTS = 4


class Regression(Objective):
    r"""This objective is the error of a student that should map base draws to the draws of a teacher.

    The error of an event is :math:`\sum_j h(e_j)` with :math:`h(e) = 2 (\sqrt{1 + e^2} - 1)` and :math:`e_j = (x^p_j -
    x^q_j) / s_j`, where angles differ by the shorter way around. It is quadratic up to about a standard deviation
    :math:`s_j`, and linear beyond, so that a few draws far out do not dominate the sum. For the same reason :math:`s_j`
    is half the distance between the quantiles of 16 % and 84 % of :math:`x^p_j`. The loss sums the errors of single
    layers where student and teacher match, and otherwise takes the error end to end.

    Args:
        student: the flow to train.
        teacher: a flow with the student's base, see :func:`same_law`.
        stages: the teacher's draws after each layer, see :func:`draw_stages`.
        contexts: rows ``(n, *context_shape)`` at which these draws were made, or None.
        batch_size: number B of draws in a step, at least 1.

    Example:
        >>> teacher = pf.flows.MAF(2, num_layers=2, hidden_dims=(8,))
        >>> student = pf.flows.IAF(2, num_layers=2, hidden_dims=(8,))
        >>> objective = Regression(student, teacher, draw_stages(teacher, 1000, None), None, batch_size=64)
        >>> pf.train(objective, num_steps=20, progress_bar=False)
        History(20 steps: loss, grad_norm, learning_rate)
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
        """Draw an index ``(batch_size,)`` of the teacher's draws."""
        return [torch.randint(len(self._stages[0]), (self._batch_size,), device=self._stages[0].device)]

    def loss(self, index: Tensor) -> tuple[Tensor, Figures]:
        """Compute the mean error, layer by layer where the layers match."""
        return self.layer_by_layer(index).mean(), {}

    def end_to_end(self, index: Tensor) -> Tensor:
        """Compute the errors ``(B,)`` of the student's x at an index ``(B,)`` of the teacher's draws."""
        return self._errors(list(self.flow.transform.layers), 0, len(self._stages) - 1, index)

    def layer_by_layer(self, index: Tensor) -> Tensor:
        """Compute errors ``(B,)`` layer by layer: each layer takes the input of the teacher's, and their errors add up.

        If the layers of the two flows do not match, these are the errors end to end.

        Args:
            index: an index ``(B,)`` of the teacher's draws.
        """
        if not self._matched:
            return self.end_to_end(index)
        return torch.stack([self._errors([layer], i, i + 1, index) for i, layer in self._matched]).sum(0)

    def _errors(self, layers: Sequence[FlowTransform], before: int, after: int, index: Tensor) -> Tensor:
        context = None if self._contexts is None else self.flow.transform.layer_context(self._contexts[index])
        found = self._stages[before][index]
        for layer in layers:
            found, _ = layer.forward_and_ladj(found, context if layer.context_dim else None)
        errors = _difference(found, self._stages[after][index], layers[-1]) / self._scales[after]
        return 2 * (torch.sqrt(1 + errors**2) - 1).flatten(1).sum(-1)


def _difference(a: Tensor, b: Tensor, layer: FlowTransform) -> Tensor:
    """Return a - b at the data end of a layer, for angles along the shorter way."""
    angles = angles_in(layer.codomain, layer.event_shape[-1])
    if not any(angles):
        return a - b
    return torch.where(torch.tensor(angles, device=a.device), wrapped(a - b), a - b)


@torch.no_grad()
def draw_stages(teacher: Flow, num_draws: int, contexts: Tensor | None) -> list[Tensor]:
    """Draw from the base of a flow, and return these draws and those after each layer.

    Args:
        teacher: the flow.
        num_draws: number n of draws.
        contexts: rows ``(n, *context_shape)``, if the flow takes a context.

    Returns:
        Tensors of n rows, one more than there are layers: the first holds base draws z ``(n, *base_shape)``, the last
        draws x ``(n, *event_shape)``.

    Example:
        >>> flow = pf.flows.MAF(2, num_layers=2)
        >>> len(draw_stages(flow, 10, None)) == len(flow.transform.layers) + 1
        True
    """
    z = teacher.base().sample((num_draws,))
    parts = z.tensor_split(NUM_PARTS)
    given = [None] * NUM_PARTS if contexts is None else contexts.tensor_split(NUM_PARTS)
    drawn = [_stages(teacher, part, context) for part, context in zip(parts, given, strict=True)]
    return [torch.cat(stage) for stage in zip(*drawn, strict=True)]


def same_law(a: Distribution, b: Distribution) -> bool:
    """Tell whether two laws are the same, as far as equal draws at the same seed show.

    Example:
        >>> same_law(dist.Normal(0.0, 1.0), dist.Normal(0.0, 1.0))
        True
        >>> same_law(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0))
        False
    """
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
    stages, context = [z], teacher.transform.layer_context(context)
    for layer in teacher.transform.layers:
        layer = layer if layer.value_is_exact else layer.exact()
        stages.append(layer.forward_and_ladj(stages[-1], context if layer.context_dim else None)[0])
    return stages


def _matched(student: Flow, teacher: Flow) -> list[tuple[int, FlowTransform]]:
    """Return the student's trained layers with their places, or none if a layer cannot match the teacher's there.

    A map that is triangular in some order has an inverse that is triangular in the same order, so that layers with
    equal orders can match, whichever direction each of them is fast in.
    """
    layers, orders = student.transform.layers, _orders(student)
    if None in orders or orders != _orders(teacher):
        return []
    return [(i, layer) for i, layer in enumerate(layers) if trained_parameters(layer)]


def _orders(flow: Flow) -> list[tuple[int, ...] | None]:
    return [
        layer.triangular_order if isinstance(layer, TriangularTransform) else None for layer in flow.transform.layers
    ]

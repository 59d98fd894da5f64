"""Define the objective of flow matching: the velocity of a continuous flow regresses on straight paths."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.fitting.coupling import Coupling, independent
from pyroflows.flows import Flow, Mixture
from pyroflows.training.averaging import MovingAverage
from pyroflows.training.data import Data, Rows
from pyroflows.training.objective import Figures, Objective, trained_parameters
from pyroflows.training.shuffling import ShuffledBatches
from pyroflows.transforms import Continuous, FlowTransform

# Held-out rows are repeated, each time with noise and times of their own, until there are this many.
NUM_SCORED = 4096


class VelocityRegression(Objective):
    r"""This objective is the error of a velocity that should carry base draws :math:`z_0` along straight lines to data
    :math:`z_1` (Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003):

    .. math:: \frac1D\, E\, \big| v(z_t, t, c) - (z_1 - z_0) \big|^2, \qquad z_t = (1 - t) z_0 + t z_1

    The data are rows x as they arrive at the continuous layer, without location and scale of the flow, and before the
    map onto a bounded support. Times have the density :math:`(1 + a)\, t^a`. Those of a batch of B are stratified: one
    lies in each of B intervals of equal probability.

    Args:
        flow: a flow with one continuous layer, and without other trained layers.
        data: all rows.
        index: indices ``(n,)`` of the rows to train on.
        batch_size: number B of rows in a step, from 1 to n.
        coupling: pairs base draws and rows in a batch.
        time_power: the power a, above -1.
        decay: the decay of the moving average of the parameters, at which the flow is validated.

    Attributes:
        average: the moving average of the trained parameters.

    Shapes: a step draws z0 and z1 ``(B, *shape)``, t ``(B,)`` and, if there are any, contexts ``(B, *context_shape)``.

    Example:
        >>> from pyroflows.training.data import load
        >>> flow = pf.flows.CNF(2)
        >>> objective = VelocityRegression(flow, load(flow, torch.randn(100, 2)), torch.arange(100), batch_size=10)
        >>> pf.train(objective, num_steps=20, progress_bar=False)
        History(20 steps: loss, grad_norm, learning_rate)
    """

    remedy = "a smaller learning rate or float64, and look for outliers in x and context"

    def __init__(
        self,
        flow: Flow,
        data: Data,
        index: Tensor,
        batch_size: int,
        coupling: Coupling = independent,
        time_power: float = 0.0,
        decay: float = 0.0,
    ) -> None:
        super().__init__(flow)
        place, self._layer = continuous_layer(flow)
        layers = list(flow.transform.layers)
        self._before, self._after = layers[:place], layers[place + 1 :]
        # An embedding of contexts is trained along, so that each step embeds its contexts anew.
        self._embedding: Any = getattr(flow.transform, "embedding", None)
        self._data = data
        self._batch_size = batch_size
        weights = data.rows.weights[index]
        self._batches = ShuffledBatches(index, batch_size, None if (weights == weights[0]).all() else weights)
        self._coupling = coupling
        self._time_power = time_power
        self.average = MovingAverage(self.parameters, decay)
        # Rows that stay the same are brought to the layer once, and not in each step.
        self._codes = None if data.dataset is not None or data.are_integers else self._at_layer(data.rows)

    @property
    def parameters(self) -> list[Tensor]:
        """Return the parameters of the continuous layer and of an embedding of contexts; the base stays as it is."""
        embedding = [] if self._embedding is None else trained_parameters(self._embedding)
        return [*trained_parameters(self._layer), *embedding]

    def before_step(self) -> None:
        """Take the parameters that the last step left into the moving average."""
        super().before_step()
        self.average.update()

    def draw(self) -> list[Tensor]:
        """Draw the next batch, in pairs with draws of the base, and times."""
        index = next(self._batches)
        if self._codes is None:
            return self._pairs(*self._at_layer(self._data.batch(index)))
        z1, context = self._codes
        return self._pairs(z1[index], None if context is None else context[index])

    def loss(self, z0: Tensor, z1: Tensor, t: Tensor, *context: Tensor) -> tuple[Tensor, Figures]:
        """Compute the mean squared error of the velocity."""
        return self._errors(z0, z1, t, *context).mean(), {}

    def score(self, rows: Rows) -> "HeldOut":
        """Return the function that gives the loss of rows at the average of the parameters, with pairs drawn once."""
        return HeldOut(self, rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the shuffled data, and the moving average."""
        return {"batches": self._batches.state_dict(), "average": self.average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned."""
        self._batches.load_state_dict(state["batches"])
        self.average.load_state_dict(state["average"])

    def _at_layer(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Return rows at the data end of the continuous layer, and their contexts as the layers take them.

        Contexts for an embedding stay as they are.
        """
        z1 = rows.x
        with torch.no_grad():
            context = self.flow.transform.layer_context(rows.context)
            for layer in reversed(self._after):
                z1 = layer.base_value(z1, context if layer.context_dim else None)
        return z1, context if self._embedding is None else rows.context

    @torch.no_grad()
    def _pairs(self, z1: Tensor, context: Tensor | None) -> list[Tensor]:
        z0 = self.flow.base().sample((len(z1),))
        given = context if self._embedding is None else self.flow.transform.layer_context(context)
        for layer in self._before:
            z0, _ = layer.forward_and_ladj(z0, given if layer.context_dim else None)
        t = stratified_times(len(z1), self._time_power).to(z1)
        return [self._coupling(z0, z1, context), z1, t, *([] if context is None else [context])]

    def _errors(self, z0: Tensor, z1: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        s = t.reshape(-1, *[1] * (z1.dim() - 1))
        given = context[0] if context and self._layer.context_dim else None
        if given is not None and self._embedding is not None:
            given = self.flow.transform.layer_context(given)
        velocity = self._layer.field(given)(t, (1 - s) * z0 + s * z1)
        return (velocity - (z1 - z0)).square().flatten(1).mean(1)


class HeldOut:
    """The loss of held-out rows, whose noise and times are drawn once, so that epochs are compared without noise.

    Args:
        objective: the objective.
        rows: the rows, which are repeated with noise and times of their own where they are few.
    """

    def __init__(self, objective: VelocityRegression, rows: Rows) -> None:
        self._objective = objective
        count = -(-NUM_SCORED // len(rows))
        self._weights = rows.weights.repeat(count)
        z1, context = objective._at_layer(rows)
        z1 = z1.repeat(count, *[1] * (z1.dim() - 1))
        context = None if context is None else context.repeat(count, *[1] * (context.dim() - 1))
        # Pairs are made in parts, as in training, since the loss depends on how many rows are coupled.
        size = objective._batch_size
        self._parts = [
            objective._pairs(part, None if context is None else context[i * size : (i + 1) * size])
            for i, part in enumerate(z1.split(size))
        ]

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the weighted mean of the loss."""
        with self._objective.average.in_place():
            errors = torch.cat([self._objective._errors(*part) for part in self._parts])
        return torch.dot(self._weights, errors).item() / self._weights.sum().item()


def stratified_times(count: int, power: float) -> Tensor:
    r"""Draw times ``(count,)`` in random order with the density :math:`(1 + a)\, t^a`, one in each of as many intervals
    of equal probability.

    Example:
        >>> (4 * stratified_times(4, 0.0)).floor().sort()[0]
        tensor([0., 1., 2., 3.])
    """
    return ((torch.randperm(count) + torch.rand(count)) / count) ** (1 / (1 + power))


def continuous_layer(flow: Flow) -> tuple[int, Continuous]:
    """Return the only trained layer of a flow, which is continuous, and its place.

    Raises:
        OptionError: if the flow is a mixture, has no continuous layer or several, or other trained layers.

    Example:
        >>> continuous_layer(pf.flows.CNF(2))[0]
        0
    """
    if isinstance(flow, Mixture):
        raise OptionError("flow matching trains one continuous flow, not a mixture: use pf.fit_density for mixtures")
    layers: list[FlowTransform] = list(flow.transform.layers)
    places = [i for i, layer in enumerate(layers) if isinstance(layer, Continuous)]
    if len(places) != 1:
        found = "several" if places else "none"
        raise OptionError(
            f"flow matching trains the one layer Continuous of a flow, but this flow has {found}: use pf.flows.CNF, or "
            "train the flow by pf.fit_density"
        )
    for i, layer in enumerate(layers):
        if i != places[0] and (trained_parameters(layer) or layer.observes):
            raise OptionError(
                f"flow matching trains the layer Continuous alone, but {type(layer).__name__} (transform.layers.{i} of "
                "this flow) would have to be trained too: leave it out, freeze it by requires_grad_(False), or train "
                "the flow by pf.fit_density"
            )
    return places[0], layers[places[0]]

"""Dense networks whose Lipschitz constant is bounded."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from pyroflows.nets.lipschitz.network import LipschitzNet
from pyroflows.nets.lipschitz.weights import almost_orthogonal
from pyroflows.nets.mlp import MLP, checked_widths

# Biases start between these, in the units of pre-activations.
BIAS = 2.0


class LipschitzMLP(LipschitzNet):
    """A multi-layer perceptron with a bounded Lipschitz constant, see :class:`LipschitzNet`.

    Weights are rescaled by :func:`almost_orthogonal`; that of the output is free as long as it is small. The biases are
    spread over the values that units have at the start.

    Args:
        dim: size of the input and of the output.
        hidden_dims: widths of the hidden layers.
        coefficient: the bound c, above 0.
        context_dim: size or shape of the context, 0 for none.
        activation: the name of the activation.

    Raises:
        OptionError: if a width is not positive, the context is no vector, or there is no such activation.

    Example:
        >>> g = LipschitzMLP(3, (8, 8), 0.9, 2, "sine").at(torch.randn(5, 2))
        >>> g(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self, dim: int, hidden_dims: Sequence[int], coefficient: float, context_dim: Any, activation: str
    ) -> None:
        widths = [dim, *checked_widths(hidden_dims, least=0), dim]
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        for layer in layers[:-1]:
            nn.init.orthogonal_(layer.weight)
            nn.init.uniform_(layer.bias, -BIAS, BIAS)
        super().__init__(layers, coefficient, activation)
        self.shifts: Any = MLP(context_dim, sum(widths[1:])) if context_dim else None

    def _weights(self, bound: float, ratios: Tensor) -> list[Tensor]:
        floors = [0.0] * (len(self.layers) - 1) + [bound**2]
        return almost_orthogonal([layer.weight for layer in self.layers], bound * ratios, floors)

    def _shifts_at(self, context: Tensor) -> Tensor:
        shifts: Tensor = self.shifts(context)
        return shifts

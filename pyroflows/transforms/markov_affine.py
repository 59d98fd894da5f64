"""An affine map along a graph: each element depends linearly on its neighbours, with coefficients from a context."""

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError
from pyroflows.nets.mlp import Parameters
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.linear.solves import solve
from pyroflows.transforms.univariate.clamp import soft_clamped

# Where a context is far out, scales and coefficients would overflow.
MAX_LOG_SCALE, MAX_CONTEXT = 5.0, 5.0
# Of the least squares by which a network is fitted, whose random features bend so many times as much as at the start.
RIDGE, SCALE_OF_FEATURES = 1e-7, 2.0


class MarkovAffine(FlowTransform):
    r"""Map noise to the Gaussian of a Markov random field, whose coefficients depend on a context c.

    .. math:: x_t = m_t(c) + \sum_{k \in \mathrm{pa}(t)} \rho_{tk}(c) (x_k - m_k(c)) + e^{s_t(c)} z_t

    The parents pa(t) of an element come after it: :math:`R^\top (x - m) = z` for a Cholesky factor R of the precision
    of x, in which an element has as many parents as its column has entries (Rue and Held 2005, section 2.4). m, s and
    :math:`\rho` are one network of the context, and start at zero, where the map is the identity. The log-scales s and
    the context are softly clamped to :math:`a \tanh(s / a)` with a = 5. The log-determinant is :math:`\sum_t s_t`. Both
    directions are parallel: the forward one solves a triangular system, the inverse multiplies.

    Args:
        dim: the event size D.
        edges: the pairs (t, k), of an element and a parent of it with k > t, ``(2, E)``.
        context_dim: size of the context, 0 for none.
        hidden_dims: widths of the hidden layers of the network.

    Shapes: z and x are ``(..., dim)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if an edge does not lead from an element to a later one.

    Example:
        >>> walk = MarkovAffine(3, edges=torch.tensor([[0, 1], [1, 2]]))
        >>> walk.parameters_of.value.data[6:] = 1.0  # each element is the next one and noise
        >>> walk(torch.ones(3)).tolist()
        [3.0, 2.0, 1.0]
    """

    edges: Tensor

    def __init__(self, dim: int, edges: Tensor, context_dim: int = 0, hidden_dims: tuple[int, ...] = (64,)) -> None:
        super().__init__(dim, context_dim)
        if edges.numel() and not bool((edges[0] < edges[1]).all() and edges[0].min() >= 0 and edges[1].max() < dim):
            raise OptionError(f"each edge must lead from an element to a later one among {dim}, got {edges.tolist()}")
        self.register_buffer("edges", edges.clone())
        self.parameters_of = Parameters(torch.zeros(2 * dim + edges.shape[1]), context_dim, hidden_dims)

    @torch.no_grad()
    def fit(self, contexts: Tensor, coefficients: Tensor) -> None:
        r"""Fit the network to coefficients at some contexts, and keep it out of training.

        The hidden layers stay random, and the output layer has least squares (random features; Rahimi and Recht 2008).
        A step of training would move hundreds of weights at once, and so be coarser than what they are known to.

        Args:
            contexts: c, ``(N, context_dim)``.
            coefficients: m, s and :math:`\rho` there, ``(N, 2 D + E)``.
        """
        assert self.parameters_of.net is not None
        hidden = list(self.parameters_of.net)
        output = hidden.pop()
        assert isinstance(output, nn.Linear)
        mean, log_scale, rho = coefficients.double().split([self.dim, self.dim, self.edges.shape[1]], -1)
        raw = MAX_LOG_SCALE * (log_scale / MAX_LOG_SCALE).clamp(-0.99, 0.99).atanh()
        targets = torch.cat([mean, raw, rho], -1)
        features = bounded_context(contexts).to(output.weight)
        for layer in hidden:
            for parameter in layer.parameters():
                parameter.mul_(SCALE_OF_FEATURES)
            features = layer(features)
        features = torch.cat([features, torch.ones_like(features[:, :1])], -1).double()
        ridge = RIDGE * len(features) * torch.eye(features.shape[1]).to(features)
        found = torch.linalg.solve(features.mT @ features + ridge, features.mT @ targets)
        output.weight.copy_(found[:-1].mT)
        output.bias.copy_(found[-1])
        self.requires_grad_(False)

    def _of(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The means m, the log-scales s ``(..., D)`` and the coefficients ``(..., E)``."""
        context = None if context is None else bounded_context(context)
        mean, log_scale, rho = self.parameters_of(context).split([self.dim, self.dim, self.edges.shape[1]], -1)
        return mean, soft_clamped(log_scale, (MAX_LOG_SCALE, MAX_LOG_SCALE)), rho

    def _matrix(self, rho: Tensor) -> Tensor:
        r"""The matrix of :math:`x - m \mapsto e^s z`, without its diagonal of ones."""
        flat = rho.new_zeros(*rho.shape[:-1], self.dim**2)
        return flat.index_copy(-1, self.edges[0] * self.dim + self.edges[1], -rho).unflatten(-1, (self.dim, self.dim))

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._forward(z, *self._of(context))

    def _forward(self, z: Tensor, mean: Tensor, log_scale: Tensor, rho: Tensor) -> Pair:
        x = mean + solve(self._matrix(rho), log_scale.exp() * z, upper=True, is_unit=True)
        return x, log_scale.sum(-1).expand(x.shape[:-1])

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        mean, log_scale, rho = self._of(context)
        centred = x - mean
        of_parents = torch.zeros_like(centred).index_add(-1, self.edges[0], rho * centred[..., self.edges[1]])
        return (-log_scale).exp() * (centred - of_parents), -log_scale.sum(-1).expand(x.shape[:-1])

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        mean, log_scale, rho = self._of(context)
        x, ladj = self._forward(z, mean, log_scale, rho)
        with torch.no_grad():
            scaled = (-log_scale).exp() * score
            moved = (rho * scaled[..., self.edges[0]]).expand(*scaled.shape[:-1], self.edges.shape[1])
            score = scaled.index_add(-1, self.edges[1], -moved)
        return x, ladj, score


def bounded_context(context: Tensor) -> Tensor:
    """Clamp a context softly, as the layer does."""
    return soft_clamped(context, (MAX_CONTEXT, MAX_CONTEXT))

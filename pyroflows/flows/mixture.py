"""Mixtures of flows, for laws with several separate modes.

A single flow either misses some of these modes or connects them by bridges of mass.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.errors import ShapeError
from pyroflows.flows.distribution import FlowDistribution
from pyroflows.flows.flow import Flow
from pyroflows.shapes import as_given
from pyroflows.transforms import Permutation


class Mixture(Flow):
    r"""The mixture :math:`q(x) = \sum_k w_k q_k(x)` of K flows :math:`q_k`.

    The components have no base in common. So the base of this flow is the mixture itself, and its transform is the
    identity. Its weights are fixed, and its draws carry no gradients.

    Args:
        flows: one or more flows of vectors of one size, without a context.
        log_weights: logarithms of positive weights ``(K,)``, which need not sum to one.

    Shapes: ``flow()`` has event shape ``(dim,)`` and no batch shape.

    Raises:
        ShapeError: if the flows differ in size, take a context or are not of vectors, or the number of weights is not
            that of the flows.

    Example:
        >>> q = Mixture([pf.flows.Gaussian(2), pf.flows.Gaussian(2)], torch.tensor([0.0, 1.0]))
        >>> q().log_prob(q().sample((5,))).shape
        torch.Size([5])
    """

    def __init__(self, flows: Sequence[Flow], log_weights: Tensor) -> None:
        dims = [as_given(shape) for shape in sorted({flow.event_shape for flow in flows})]
        are_vectors = len(dims) == 1 and isinstance(dims[0], int)
        if not are_vectors or log_weights.shape != (len(flows),) or any(flow.context_dim for flow in flows):
            raise ShapeError(
                "a mixture needs flows of one size without a context and a weight for each, but got "
                f"{len(flows)} flows of sizes {dims} and weights of shape {tuple(log_weights.shape)}"
            )
        super().__init__([Permutation(range(flows[0].dim))], base=_Mixed(flows, log_weights), standardize=False)

    @property
    def components(self) -> Sequence[Flow]:
        """The flows of the mixture."""
        components: Any = self.base.components
        return list(components)


class _Mixed(nn.Module):
    """The base of a mixture: a module that holds the components and returns their mixture."""

    log_weights: Tensor

    def __init__(self, flows: Sequence[Flow], log_weights: Tensor) -> None:
        super().__init__()
        self.components: Any = nn.ModuleList(flows)
        self.register_buffer("log_weights", log_weights.detach().log_softmax(0))

    def forward(self) -> "MixtureDistribution":
        return MixtureDistribution([flow() for flow in self.components], self.log_weights)


class MixtureDistribution(TorchDistribution):
    """The law of a mixture of laws, whose draws carry no gradients; it is the base of a :class:`Mixture`.

    Args:
        components: laws of event shape ``(dim,)``.
        log_weights: logarithms of their weights ``(K,)``, which sum to one.

    Shapes: draws are ``(*sample_shape, dim)``; the batch shape is empty.

    Example:
        >>> parts = [pf.flows.Gaussian(2)(), pf.flows.Gaussian(2)()]
        >>> MixtureDistribution(parts, torch.tensor([0.5, 0.5]).log()).sample((5,)).shape
        torch.Size([5, 2])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, components: Sequence[FlowDistribution], log_weights: Tensor) -> None:
        self.components = components
        self.log_weights = log_weights
        super().__init__(torch.Size(), components[0].event_shape, validate_args=False)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws ``(*sample_shape, dim)`` without gradients."""
        shape = torch.Size(sample_shape)
        which = torch.multinomial(self.log_weights.exp(), shape.numel(), replacement=True)
        x = torch.empty(shape.numel(), *self.event_shape, dtype=self.log_weights.dtype, device=which.device)
        for k, component in enumerate(self.components):
            rows = (which == k).nonzero()[:, 0]
            x[rows] = component.sample((len(rows),))
        return x.reshape(*shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-densities ``(...)`` of values ``(..., dim)``."""
        parts = [w + q.log_prob(value) for w, q in zip(self.log_weights, self.components, strict=True)]
        return torch.logsumexp(torch.stack(parts), 0)

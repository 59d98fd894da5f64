"""A mixture of flows: for a law with several separate modes, which one flow joins by bridges of mass or misses."""

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
from pyroflows.transforms.base import Pair


class Mixture(Flow):
    r""":math:`q(x) = \sum_k w_k q_k(x)`, each :math:`q_k` a flow.

    As a flow it is its own base, and its transform is the identity: the components have no base in common.

    Args:
        flows: two or more flows of one size, without a context.
        log_weights: logarithms of positive weights ``(K,)``, which need not sum to one.

    Raises:
        ShapeError: if the sizes of the flows, or their number and that of the weights, differ.

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
                "a mixture needs flows of one size without a context and a weight for each, but got sizes "
                f"{dims} and weights of shape {tuple(log_weights.shape)}"
            )
        super().__init__([Permutation(range(flows[0].dim))], base=_Mixed(flows, log_weights))

    @property
    def components(self) -> Any:
        """The flows."""
        return self.base.components

    def forward(self, context: Tensor | None = None) -> Any:
        """The distribution, of event shape ``(dim,)``; a mixture takes no context."""
        if context is not None:
            raise ShapeError(f"a mixture takes no context, but got shape {tuple(context.shape)}")
        return self.base()


class _Mixed(nn.Module):
    log_weights: Tensor

    def __init__(self, flows: Sequence[Flow], log_weights: Tensor) -> None:
        super().__init__()
        self.components: Any = nn.ModuleList(flows)
        self.register_buffer("log_weights", log_weights.detach().log_softmax(0))

    def forward(self) -> "MixtureDistribution":
        return MixtureDistribution([flow() for flow in self.components], self.log_weights)


class MixtureDistribution(TorchDistribution):
    """The law that a call of :class:`Mixture` makes. Its samples carry no gradients.

    Args:
        components: laws of event shape ``(dim,)``.
        log_weights: their log weights, normalised.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, components: Sequence[FlowDistribution], log_weights: Tensor) -> None:
        self.components = components
        self.log_weights = log_weights
        super().__init__(torch.Size(), components[0].event_shape, validate_args=False)

    def estimated(self) -> "MixtureDistribution":
        """The same law with the layers' own log-determinants, for training; itself where these are exact."""
        return self

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``(*sample_shape, dim)``."""
        shape = torch.Size(sample_shape)
        which = torch.multinomial(self.log_weights.exp(), shape.numel(), replacement=True)
        x = torch.empty(shape.numel(), *self.event_shape, dtype=self.log_weights.dtype, device=which.device)
        for k, component in enumerate(self.components):
            rows = (which == k).nonzero()[:, 0]
            x[rows] = component.sample((len(rows),))
        return x.reshape(*shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density ``(...)`` of ``(..., dim)``."""
        parts = [w + q.log_prob(value) for w, q in zip(self.log_weights, self.components, strict=True)]
        return torch.logsumexp(torch.stack(parts), 0)

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> Pair:  # noqa: B008
        """Draws and their log-densities, both without gradients."""
        with torch.no_grad():
            x = self.sample(sample_shape)
            return x, self.log_prob(x)

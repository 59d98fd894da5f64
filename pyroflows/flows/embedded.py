"""Flows whose context passes through an embedding network, which is trained with them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError, ShapeError
from pyroflows.flows.flow import Flow
from pyroflows.flows.mixture import Mixture
from pyroflows.options import kind
from pyroflows.transforms import Compose, FlowTransform
from pyroflows.transforms.views import Conditioned


class EmbeddedContext(Compose):
    r"""Layers whose context is the vector :math:`e(y)` that an embedding makes of a context y.

    Location and scale of :math:`e(y)` are taken off as those of a context without an embedding are; they are the ones
    that it has before training.

    Args:
        transform: layers that take a context of the size of :math:`e(y)`.
        embedding: a module that maps contexts ``(n, context_dim)`` to vectors ``(n, k)``.
        context_dim: the size of y.

    Example:
        >>> flow = pf.flows.NSF(2, context_dim=1)
        >>> t = EmbeddedContext(flow.transform, torch.nn.AvgPool1d(5), context_dim=5)
        >>> t.inverse_and_ladj(torch.zeros(7, 2), torch.zeros(7, 5))[1].shape
        torch.Size([7])
    """

    def __init__(self, transform: Compose, embedding: nn.Module, context_dim: int) -> None:
        super().__init__(list(transform.layers))
        self.context_shape, self.context_dim = torch.Size([context_dim]), context_dim
        self.embedding = embedding
        self.embedding_scale = transform.context_scale

    def _vectors(self, context: Tensor) -> Tensor:
        """Return the vectors ``(..., k)`` of contexts ``(..., context_dim)``."""
        vectors = self.embedding(context.reshape(-1, self.context_dim))
        return vectors.reshape(*context.shape[:-1], -1)

    def layer_context(self, context: Tensor | None) -> Tensor | None:
        """Return the vectors of contexts, without location and scale, as the layers take them."""
        if context is None:
            return None
        vectors = self._vectors(context)
        return vectors if self.embedding_scale is None else self.embedding_scale.inverse_and_ladj(vectors)[0]

    def condition(self, context: Tensor) -> FlowTransform:
        """Return the layers at one context, for which the embedding runs once, here."""
        layers: Any = Compose(list(self.layers))
        return Conditioned(layers, self.layer_context(context))  # type: ignore[arg-type]

    def _exact(self) -> FlowTransform:
        made = copy.copy(self)
        made._modules = {**self._modules, "layers": nn.ModuleList([layer.exact() for layer in self.layers])}
        return made

    def _parts(self) -> list[FlowTransform]:
        return [*self.layers, *([] if self.embedding_scale is None else [self.embedding_scale])]

    @torch.no_grad()
    def adapt(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Let the layers learn from rows, and the location and scale of the vectors from those of their contexts."""
        scale = self.embedding_scale
        if scale is not None and context is not None and (self.is_adapted or not scale.is_adapted):
            scale.adapt(self._vectors(context), None, weights)
        super().adapt(x, context, weights)


def with_embedding(flow: Flow, embedding: nn.Module, context_dim: int) -> Flow:
    """Return a flow that shares layers and base with another one, and takes contexts that are embedded first.

    Args:
        flow: a flow that takes the vectors of the embedding as context.
        embedding: a module that maps contexts ``(n, context_dim)`` to vectors ``(n, k)``; it becomes part of the flow.
        context_dim: the size of a context.

    Raises:
        OptionError: if the flow is a mixture, whose components would each have to share the embedding.

    Example:
        >>> flow = with_embedding(pf.flows.NSF(2, context_dim=1), torch.nn.AvgPool1d(5), context_dim=5)
        >>> flow(torch.zeros(7, 5)).sample().shape, flow.context_dim
        (torch.Size([7, 2]), 5)
    """
    if isinstance(flow, Mixture):
        raise OptionError("an embedding needs a single flow, but this one is a mixture: give another flow")
    made = copy.copy(flow)
    made._modules = {**flow._modules, "transform": EmbeddedContext(flow.transform, embedding, context_dim)}
    made._places = None
    made._note_stateful_layers()
    return made


def flow_at(flow: Flow, context: Tensor) -> Flow:
    """Return a flow at one context, as a flow without a context that shares its layers.

    Args:
        flow: a flow that takes a context, or a mixture of such flows.
        context: ``(*context_shape)``.

    Example:
        >>> flow = pf.flows.NSF(2, context_dim=3)
        >>> flow_at(flow, torch.zeros(3))().sample((5,)).shape
        torch.Size([5, 2])
    """
    if isinstance(flow, Mixture):
        parts = [flow_at(part, context) if part.context_dim else part for part in flow.components]
        with torch.no_grad():
            return Mixture(parts, flow.gate(context), context_dim=0)
    with torch.no_grad():
        return Flow(flow.transform.condition(context), base=flow.base, standardize=False)


def checked_embedding(embedding: nn.Module, examples: Tensor) -> int:
    """Return the size of the vectors that an embedding makes of contexts.

    Args:
        embedding: a module that maps contexts ``(n, context_dim)`` to vectors.
        examples: contexts, at least two.

    Raises:
        OptionError: if it does not run.
        ShapeError: if it does not give a vector for each context.
    """
    try:
        with torch.no_grad():
            vectors = embedding(examples)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(f"the embedding does not run with {len(examples)} data sets: {error}") from error
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or len(vectors) != len(examples):
        got = f"shape {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else kind(vectors)
        raise ShapeError(
            f"the embedding must give a vector for each data set, so a tensor of shape ({len(examples)}, k) for "
            f"{len(examples)} data sets, but gave {got}"
        )
    return vectors.shape[1]

"""The log joint of a model as a function of one unconstrained vector."""

from typing import Any

import torch
from torch import Tensor

from pyroflows.inference.batching import BatchedModel, Values
from pyroflows.model import Model, ModelStructure


class LogJoint:
    r""":math:`\log p(x, y) + \log|\det \partial x / \partial u|` of unconstrained vectors u, for a batch at once.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        structure: of the model with these arguments.
        examples: unconstrained vectors ``(n, dim)`` at which ways of running a batch are compared with single draws.

    Shapes: ``(S, dim)`` to ``(S,)``.
    """

    def __init__(self, model: Model, args: Any, kwargs: Any, structure: ModelStructure, examples: Tensor) -> None:
        self.structure = structure
        values, _ = structure.constrain(examples)
        self.batched = BatchedModel(model, args, kwargs, values, subsample=self.draw_subsample())

    def draw_subsample(self) -> dict[str, Tensor]:
        """Random rows of each subsampled plate, the same for all draws of a batch."""
        return {p.name: torch.randperm(p.size)[: p.subsample_size] for p in self.structure.subsampled}

    def __call__(self, vectors: Tensor, subsample: Values | None = None) -> Tensor:
        num_draws = len(vectors)
        values, ladj = self.structure.constrain(vectors)
        log_probs = self.batched(values, num_draws, subsample).log_probs
        return ladj + sum(lp.reshape(num_draws, -1).sum(-1) for lp in log_probs.values())

    @torch.no_grad()
    def in_chunks(self, vectors: Tensor) -> Tensor:
        """As a call, without gradients, for any number of vectors."""
        return torch.cat([self(part) for part in vectors.split(self.batched.chunk_size)])

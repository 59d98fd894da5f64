"""The log joint of a model as a function of one unconstrained vector."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.check import Compiler, is_singular
from pyroflows.models.batching import BatchedModel, SiteValues
from pyroflows.models.layout import Layout
from pyroflows.models.structure import Model

# Vectors (S, D) -> log densities (S,) and gradients (S, D), both without autograd history.
ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


class LogJoint:
    r""":math:`\log p(x, y) + \log|\det \partial x / \partial u|` of unconstrained vectors u, for a batch at once.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        layout: of the model's latents with these arguments.
        examples: unconstrained vectors ``(n, dim)`` at which ways of running a batch are compared with single draws.
        compiler: of functions of the log joint; by default they run as they are.

    Shapes: ``(S, dim)`` to ``(S,)``.
    """

    def __init__(
        self,
        model: Model,
        args: Any,
        kwargs: Any,
        layout: Layout,
        examples: Tensor,
        compiler: Compiler | None = None,
    ) -> None:
        self.layout = layout
        self.structure = layout.structure
        self.compiler = compiler or Compiler("none")
        values, _ = layout.constrain(examples)
        self.batched = BatchedModel(model, args, kwargs, values, subsample=self.draw_subsample())

    def draw_subsample(self) -> dict[str, Tensor]:
        """Random rows of each subsampled plate, the same for all draws of a batch."""
        return {p.name: torch.randperm(p.size)[: p.subsample_size] for p in self.structure.subsampled}

    def __call__(self, vectors: Tensor, subsample: SiteValues | None = None) -> Tensor:
        num_draws = len(vectors)
        values, ladj = self.layout.constrain(vectors)
        log_probs = self.batched(values, num_draws, subsample).log_probs
        return ladj + sum(lp.reshape(num_draws, -1).sum(-1) for lp in log_probs.values())

    @torch.no_grad()
    def in_chunks(self, vectors: Tensor) -> Tensor:
        """As a call, without gradients, for any number of vectors; -inf where a matrix of the model is singular."""

        def function(part: Tensor) -> tuple[Tensor]:
            return (self(part),)

        return torch.cat([_row_by_row(function, part)[0] for part in vectors.split(self.batched.chunk_size)])

    def value_and_grad(
        self, examples: Tensor, transform: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> ValueAndGrad:
        r"""The log joint ``(S,)`` and its gradient ``(S, dim)``, compiled for vectors of the examples' shape.

        Rows of subsampled plates are drawn once. With ``transform``, a map to u with its log-determinant, it is that of
        the vectors before it, :math:`\log p(T(z), y) + \log|\det \partial T / \partial z|`: the base's own log density
        up to the log evidence, where T is exact (NeuTra, Hoffman et al. 2019, arXiv:1903.03704). It is that of the
        transform as it is now, since a chain needs a target that stays: what follows from parameters alone, such as
        masked weights, is computed once, which makes a step of a chain a tenth faster.

        Where a matrix of the model is singular the log joint is not finite; only the vector that it belongs to notices.
        """
        subsample = self.draw_subsample()

        def function(vectors: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = vectors.detach().requires_grad_()
                u, ladj = (leaf, 0.0) if transform is None else transform(leaf)
                value = self(u, subsample) + ladj
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
            return value.detach(), gradient

        others = examples + 0.1 * torch.randn_like(examples)
        compiled = self.compiler(function, [examples], [others])

        def run(vectors: Tensor) -> tuple[Tensor, Tensor]:
            # A program is made for one number of vectors.
            return compiled(vectors) if vectors.shape == examples.shape else function(vectors)

        return lambda vectors: _row_by_row(run, vectors, torch.zeros_like(vectors[:1]))


def _row_by_row(function: Callable[[Tensor], Any], vectors: Tensor, *rest: Tensor) -> Any:
    """A function's values, with -inf and the rest for a vector at which a matrix is singular."""
    try:
        return function(vectors)
    except RuntimeError as error:
        if not is_singular(error):
            raise
    if len(vectors) == 1:
        return vectors.new_full((1,), -torch.inf), *rest
    halves = [_row_by_row(function, half, *rest) for half in vectors.tensor_split(2)]
    return tuple(torch.cat(parts) for parts in zip(*halves, strict=True))

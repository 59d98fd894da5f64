"""The log joint of a model as a function of unconstrained vectors."""

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.check import Compiler
from pyroflows.compiling.program import State
from pyroflows.models.batching import BatchedModel
from pyroflows.models.layout import Layout
from pyroflows.models.run import SiteValues
from pyroflows.models.subsampling import random_rows
from pyroflows.models.tracing import Model

# Vectors (S, D) -> log-densities (S,) and gradients (S, D), both without autograd history.
ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


class LogJoint:
    r"""The log joint density of a model in the unconstrained space, for a batch of vectors.

    .. math:: u \mapsto \log p(x(u), y) + \log\left|\det \frac{\partial x}{\partial u}\right|

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        layout: the layout of the model's latents with these arguments.
        examples: unconstrained vectors ``(n, dim)``, n at least 1, at which running a batch is compared with single
            draws.
        compiler: compiles :meth:`value_and_grad`; None to run it as it is.

    Attributes:
        batched: the model, run for batches of draws.

    Shapes:
        The log joint maps ``(S, dim)`` to ``(S,)``.

    Example:
        >>> from pyroflows.models.structure import describe
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> log_joint = LogJoint(model, (), {}, Layout(describe(model, (), {})), examples=torch.zeros(1, 1))
        >>> log_joint(torch.tensor([[0.0], [1.0]]))
        tensor([-0.9189, -1.4189])
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
        enumeration = layout.structure.enumeration
        self.batched = BatchedModel(
            model, args, kwargs, values, subsample=self.draw_subsample(), enumeration=enumeration
        )
        # The warning that the model runs draw by draw is the worse one, and says what to change.
        self.compiler.is_quiet |= self.batched.mode == "loop"

    def draw_subsample(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Draw rows of subsampled plates, which all vectors of a batch share; indices by plate.

        Args:
            names: the names of the plates; None for all that are subsampled.
        """
        return {
            p.name: random_rows(p.size, p.subsample_size)
            for p in self.structure.subsampled
            if names is None or p.name in names
        }

    def __call__(
        self, vectors: Tensor, subsample: SiteValues | None = None, counted: SiteValues | None = None
    ) -> Tensor:
        """The log joint ``(S,)`` of vectors ``(S, dim)``, with gradients.

        Args:
            vectors: unconstrained vectors.
            subsample: row indices by subsampled plate; None to let each run of the model draw them.
            counted: where the bijection of a latent counts, booleans that broadcast with its batch shape; None, or a
                site that is not in it, for everywhere. The model masks the log-densities itself.
        """
        num_draws = len(vectors)
        values, ladjs = self.layout.constrain_sites(vectors)
        log_probs = self.batched(values, num_draws, subsample, self.layout.logs(vectors)).log_probs
        # A row that stands for others does so with its bijection too.
        for site in self.structure.latents:
            if counted is not None and site.name in counted:
                ladjs[site.name] = torch.where(counted[site.name], ladjs[site.name], 0.0)
            if site.plate_scale != 1:
                ladjs[site.name] = site.plate_scale * ladjs[site.name]
        terms = [term.reshape(num_draws, -1).sum(-1) for term in (*ladjs.values(), *log_probs.values())]
        return sum(terms, vectors.new_zeros(num_draws))

    @torch.no_grad()
    def in_chunks(self, vectors: Tensor) -> Tensor:
        """The log joint of any number of vectors, without gradients; NaN where a matrix of the model is singular."""

        return torch.cat([self(part) for part in vectors.split(self.batched.chunk_size)])

    @torch.no_grad()
    def run_singly_if_wrong(self, vectors: Tensor, rows: Tensor) -> bool:
        """Let the model run draw by draw from now on, with a warning, if vectors have another log joint in a batch.

        Args:
            vectors: unconstrained vectors ``(S, dim)``.
            rows: the indices of those that are compared with single runs.

        Returns:
            Whether some differed.
        """
        return self.batched.run_singly_if_wrong(self.layout.constrain(vectors)[0], rows)

    @torch.no_grad()
    def draw_prior(self, num_draws: int) -> tuple[Tensor, Tensor] | None:
        """Draw vectors ``(S, dim)`` from the prior, and give their log-densities ``(S,)``.

        Args:
            num_draws: the number of draws; fewer are returned where a draw lies on an edge of its support.

        Returns:
            None where a prior is flat, has no sampler or depends on discrete sites, or the model draws one by one.
        """
        latents = self.structure.latents
        if self.batched.mode == "loop" or any(site.is_flat or site.kept is not None for site in latents):
            return None
        if any(site.name in names for site in latents for names in self.batched.groups.values()):
            return None  # the prior of the site is a sum over discrete ones
        try:
            prior = self.batched.drawing({}).unscaled()
            if prior.mode == "loop":
                return None
            record = prior.in_chunks({}, num_draws)
        except (NotImplementedError, ValueError):
            return None
        vectors = self.layout.unconstrain({site.name: record.values[site.name] for site in latents})
        _, ladj = self.layout.constrain(vectors)
        log_prior = ladj + sum(record.log_probs[site.name].reshape(num_draws, -1).sum(-1) for site in latents)
        is_inside = vectors.isfinite().all(-1) & log_prior.isfinite()
        return vectors[is_inside], log_prior[is_inside]

    @torch.no_grad()
    def non_finite_sites(self, vectors: Tensor) -> dict[str, int]:
        """Count, by site, the vectors ``(S, dim)`` at which its log-density is not finite; other sites are left out."""
        values, _ = self.layout.constrain(vectors)
        log_probs = self.batched.in_chunks(values, len(vectors), self.layout.logs(vectors)).log_probs
        counts = {name: int((~lp.reshape(len(vectors), -1).isfinite()).any(-1).sum()) for name, lp in log_probs.items()}
        return {name: count for name, count in counts.items() if count}

    @torch.no_grad()
    def shares_at_edges(self, vectors: Tensor) -> dict[str, float]:
        """The share of vectors ``(S, dim)`` at which a component of a site lies on an edge of floating-point numbers.

        There the value is the nearest number to an edge of its support, for all unconstrained values beyond, so that
        the density of what lies beyond is wrong, unless it is computed from logarithms, see
        :mod:`pyroflows.models.edges`. Sites with such a density, and those without a vector on an edge, are left out.
        """
        shares = {name: float(at_edge.double().mean()) for name, at_edge in self.layout.at_edges(vectors).items()}
        return {name: share for name, share in shares.items() if share}

    def at(self, args: Any, kwargs: Any) -> "LogJoint":
        """The log joint at other arguments of the model, which differ by the values of tensors."""
        other = copy.copy(self)
        other.batched = self.batched.at(args, kwargs)
        return other

    def in_layout(self, layout: Layout) -> "LogJoint":
        """The same log joint as a function of the vectors of another layout of the same latents."""
        other = copy.copy(self)
        other.layout, other.structure = layout, layout.structure
        return other

    def value_and_grad(
        self,
        examples: Tensor,
        transform: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        can_be_recorded: bool = True,
        state: State = (),
    ) -> ValueAndGrad:
        r"""Compile a function that gives the log joint ``(S,)`` of vectors ``(S, dim)``, and its gradient ``(S, dim)``.

        The rows of subsampled plates are drawn once, here. With a transform T the function is that of the vectors z
        before it, :math:`\log p(T(z), y) + \log|\det \partial T / \partial z|`; if T is the map of a perfect flow, this
        is the base's log-density plus the log evidence (NeuTra, Hoffman et al. 2019, arXiv:1903.03704). The function
        keeps the transform as it is now, since a chain needs a fixed target: what follows from its parameters alone,
        such as masked weights, is computed once, which makes a step of a chain a tenth faster.

        At a vector for which a matrix of the model is singular the log joint is not finite; other vectors of the batch
        are not affected.

        Args:
            examples: vectors of the shape for which the function is compiled; it also takes other numbers of vectors.
            transform: a map from z to u and its log-determinant; None for the identity.
            can_be_recorded: whether the transform runs without reading values; if it does not, nothing is compiled.
            state: modules of the transform whose parameters the function reads anew at each call.
        """
        subsample = self.draw_subsample()

        def function(vectors: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = vectors.detach().requires_grad_()
                u, ladj = (leaf, 0.0) if transform is None else transform(leaf)
                value = self(u, subsample) + ladj
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
            return value.detach(), gradient

        if not can_be_recorded:
            return function
        others = examples + 0.1 * torch.randn_like(examples)
        compiled = self.compiler(function, [examples], [others], state)

        def run(vectors: Tensor) -> tuple[Tensor, Tensor]:
            # The program was made for this one number of vectors.
            return compiled(vectors) if vectors.shape == examples.shape else function(vectors)

        return run

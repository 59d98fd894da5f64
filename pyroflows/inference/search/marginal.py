r"""The marginal density of the global latents of a hierarchy, with the local ones integrated out by Laplace's method.

Rows of local latents x_L that are independent of one another given the global ones x_0 leave

.. math:: \log p(x_0, y) \approx f(x_0, \hat x_L) - \tfrac12 \log\det P_{LL}(x_0, \hat x_L) + \tfrac{n}{2} \log 2\pi,
    \qquad \hat x_L = \arg\max_{x_L} f(x_0, x_L), \quad P = -\nabla^2 f

for the log joint f and n local latents (Tierney and Kadane 1986, JASA 81; Rue, Martino and Chopin 2009, JRSS B 71;
Kristensen et al. 2016, arXiv:1509.00660). It has no funnel where f has one, and few dimensions, so that a search for
modes of dense Gaussians serves it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.check import Compiler
from pyroflows.guides.centering import Centering
from pyroflows.inference.search.arrow import Arrow, ArrowLevel, Conditionals, positive
from pyroflows.inference.search.blocks import colors
from pyroflows.models.layout import Layout
from pyroflows.models.levels import SiteLevel
from pyroflows.models.log_joint import LogJoint, ValueAndGrad

# Newton's steps end when no row gains more nats than this by one, and are at most so many.
MAX_GAIN, MAX_STEPS = 1e-4, 20
# Near the optimum each step gains far less than the one before, until what is left is rounding.
NEAR_GAIN, LEAST_FALL = 0.5, 0.25
# Newton's method starts at the nearest of so many vectors that it has found.
MAX_SETTLED = 512
# A step overshoots where the slope along it turns round by more than this share of the first slope.
OVERSHOOT, SHORTEST = 0.5, 0.05


class GlobalMarginal:
    """The marginal density of the global latents, as a search for modes takes a log joint.

    Args:
        log_joint: the log joint f of a model.
        levels: the levels of its latents, the global one first; the others are independent row by row.
        center: a vector ``(dim,)`` at which f is finite.
        num_rows: the number of vectors in one call.
        pattern: which elements of a row are linked, booleans ``(d, d)``, where there is one local level; None for all.
        centering: the layer before which the vectors lie; None where they are unconstrained vectors of the model.

    Attributes:
        layout: the layout of the global latents.
        places: their places in the packed vector of all latents.
        is_block: whether the local latents are one block, which depend on one another.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        levels: Sequence[SiteLevel],
        center: Tensor,
        num_rows: int,
        pattern: Tensor | None = None,
        centering: Centering | None = None,
    ) -> None:
        self.log_joint = log_joint
        self.centering = centering
        self.places = levels[0].places[0]
        self.levels = arrow_levels(levels)
        self.is_block = pattern is not None
        if pattern is not None:
            self.levels = (replace(self.levels[0], pattern=pattern),)
        self.layout = Layout(replace(log_joint.structure, latents=levels[0].sites)).at_centers(log_joint.layout.centers)
        self.num_rows = num_rows
        self._settled = center[None]  # vectors whose local elements have settled
        example = center.repeat(num_rows, 1)
        other = example + 0.1 * torch.randn_like(example)
        # Where these derivatives cannot be recorded, the log joint itself may.
        compiler = Compiler(log_joint.compiler.mode)
        compiler.is_quiet, compiler.failure = True, log_joint.compiler.failure
        self._blocks: Callable[..., tuple[Tensor, ...]] = compiler(self._blocks_at, [example], [other])
        self._marginal: Callable[..., tuple[Tensor, ...]] = compiler(self._marginal_at, [example], [other])

    def value_and_grad(self, examples: Tensor, *transform: Any, **state: Any) -> ValueAndGrad:
        """The function from vectors ``(num_rows, D_0)`` to values and gradients of the marginal log-density."""

        def function(vectors: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = self._marginal(self.settled(vectors))
            return value, gradient

        return function

    def settled(self, vectors: Tensor, start: Tensor | None = None) -> Tensor:
        """Find the local elements of highest density by Newton's method, given global ones ``(num_rows, D_0)``.

        A row whose step has overshot goes back a part of it, whatever other rows do, since rows are independent.

        Args:
            vectors: the global elements.
            start: vectors of all elements from which to start, ``(num_rows, D)``; None for the nearest ones that have
                settled before.

        Returns:
            Vectors of all elements, ``(num_rows, D)``.
        """
        if start is None:
            nearest = torch.cdist(vectors.to(self._settled), self._settled[:, self.places]).argmin(-1)
            x = self._settled[nearest]
        else:
            x = start.clone()
        x[:, self.places] = vectors.to(x)
        before, step, slope = x, torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(MAX_STEPS):
            gradient, conditionals = self._newton(x)
            turned = self._by_row(gradient * step).nan_to_num(-torch.inf)
            is_over = (turned < -OVERSHOOT * slope) & (slope > MAX_GAIN)
            new_step = conditionals.solved(gradient).to(x)
            new_slope = self._by_row(gradient * new_step)
            share = (slope / (slope - turned)).nan_to_num(0.0).clamp(SHORTEST, 0.8)
            before = torch.where(is_over, before, x)
            step = torch.where(is_over, share * step, new_step).nan_to_num(0.0, 0.0, 0.0)
            is_rounding = (new_slope < NEAR_GAIN) & (new_slope > LEAST_FALL * slope) & (slope > 0.0)
            slope = torch.where(is_over, share * slope, new_slope).nan_to_num(0.0)
            x = before + step.to(before)
            is_moving = is_over | ((slope > MAX_GAIN) & ~is_rounding)
            if not is_moving.any():
                break
        if start is None:
            good = x[x.isfinite().all(-1) & ~is_moving.any(-1)]
            self._settled = torch.cat([self._settled, good])[-MAX_SETTLED:]
        return x

    def value(self, vectors: Tensor) -> Tensor:
        """The log joint at vectors of all elements, ``(S,)``, with the layer before it."""
        return self._value(vectors, vectors)

    def slopes(self, vectors: Tensor) -> Tensor:
        """What a step of Newton's would gain in the row of each local element, in nats, ``(num_rows, D)``."""
        gradient, conditionals = self._newton(vectors)
        return self._by_row(gradient * conditionals.solved(gradient).to(gradient))

    def conditionals(self, vectors: Tensor) -> Conditionals:
        """The conditional laws of rows at vectors of all elements ``(num_rows, D)``, given the global ones."""
        return self._newton(vectors)[1]

    def _newton(self, x: Tensor) -> tuple[Tensor, Conditionals]:
        gradient, *blocks = self._blocks(x)
        own = tuple(positive(block.double()) for block in blocks[: len(self.levels)])
        given = tuple(block.double() for block in blocks[len(self.levels) :])
        return gradient.double(), Arrow(self.levels, own, given).eliminated()[0]

    def _by_row(self, products: Tensor) -> Tensor:
        """Sum products of elements over each row, and give the sum to all elements of the row."""
        total = torch.zeros_like(products)
        for level in self.levels:
            sums = products[:, level.places].sum(-1, keepdim=True)
            total[:, level.places.flatten()] = sums.expand(-1, *level.places.shape).flatten(1)
        return total

    def _value(self, x: Tensor, of_globals: Tensor) -> Tensor:
        """The log joint of the local elements of x and the global ones of other vectors, both ``(num_rows, D)``."""
        layout = self.log_joint.layout
        layout = layout.with_parts({name: of_globals[:, layout.slices[name]] for name in self.layout.slices})
        ladj: Tensor | float = 0.0
        if self.centering is not None:
            x, ladj = self.centering.in_layout(layout).forward_and_ladj(x)
        return self.log_joint.in_layout(layout)(x) + ladj

    def _blocks_at(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._value(leaf, x).sum(), leaf, create_graph=True)
            arrow = local_arrow(self.levels, gradient, leaf)
        return gradient.detach(), *(block.detach() for block in (*arrow.own, *arrow.given))

    def _marginal_at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""The value, and its gradient

        .. math:: \nabla_0 f - \tfrac12 \big(\nabla_0 + (\nabla_0 \hat x_L)^\top \nabla_L\big) \log\det P_{LL},
            \qquad \nabla_0 \hat x_L = -P_{LL}^{-1} P_{L0}.
        """
        with torch.enable_grad():
            leaf, of_globals = (x.detach().requires_grad_() for _ in range(2))
            value = self._value(leaf, of_globals)
            (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
            (of_value,) = torch.autograd.grad(value.sum(), of_globals, retain_graph=True)
            conditionals, _ = local_arrow(self.levels, gradient, leaf).eliminated()
            log_det = conditionals.log_det
            of_log_det, of_locals = torch.autograd.grad(
                log_det.sum(), (of_globals, leaf), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            through_locals = times_hessian(gradient, of_globals, conditionals.solved(of_locals).detach())
        num_local = sum(level.places.numel() for level in self.levels)
        total = value.detach() - 0.5 * log_det.detach() + 0.5 * num_local * math.log(2 * math.pi)
        # The joint gradient with respect to local elements is zero where these have settled.
        gradient = of_value - 0.5 * (of_log_det + through_locals.detach())
        return total, gradient[:, self.places]

    def with_globals(self, x: Tensor) -> tuple[Conditionals, Tensor]:
        """The conditional laws at a vector of all elements ``(D,)``, with their dependence on the global ones.

        Returns:
            The conditionals, and the precision of the global elements with the local ones integrated out.
        """
        probes = torch.zeros(len(self.places), len(x)).to(x)
        probes[torch.arange(len(self.places)), self.places] = 1.0
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._value(leaf[None], leaf[None]).sum(), leaf, create_graph=True)
            columns = -torch.stack([times_hessian(gradient, leaf, probe).detach() for probe in probes]).double()
            local = local_arrow(self.levels, gradient, leaf)
        own = tuple(positive(block.detach().double()) for block in local.own)
        given = tuple(
            torch.cat([columns[:, level.places].movedim(0, -1), block.detach().double()], -1)
            for level, block in zip(self.levels, local.given, strict=True)
        )
        conditionals, added = Arrow(self.levels, own, given).eliminated()
        precision = columns[:, self.places]
        return conditionals, (precision + precision.mT) / 2 + (0.0 if added is None else added)


def arrow_levels(levels: Sequence[SiteLevel]) -> tuple[ArrowLevel, ...]:
    """The levels of a model but the global one, as they stand in a packed vector."""
    return tuple(
        ArrowLevel(level.places, level.parents, tuple(level.row_of(levels[1 + parent]) for parent in level.parents))
        for level in levels[1:]
    )


def times_hessian(gradient: Tensor, x: Tensor, vectors: Tensor) -> Tensor:
    """Multiply the Hessians of a batch by vectors, given the gradients at x with their graph; the product has one."""
    (product,) = torch.autograd.grad(
        (gradient * vectors.to(x)).sum(), x, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return product


def local_arrow(levels: Sequence[ArrowLevel], gradient: Tensor, x: Tensor) -> Arrow:
    """The negative Hessian among local elements, given the gradients at x ``(..., D)`` with their graph.

    Rows of a level are independent, so that one product of the Hessian serves an element of all of them; and so are
    elements of a row whose columns share no row of the pattern.
    """
    columns, own = [], []
    for level in levels:
        num = level.places.shape[1]
        color = torch.arange(num) if level.pattern is None else colors(level.pattern)
        probes = torch.zeros(int(color.max()) + 1, x.shape[-1]).to(x)
        probes[color, level.places] = 1.0
        columns.append([-times_hessian(gradient, x, probe.expand_as(x)) for probe in probes])
        block = torch.stack([column[..., level.places] for column in columns[-1]], -1)[..., color]
        own.append(block if level.pattern is None else torch.where(level.pattern, block, 0.0))
    given = []
    for level, block in zip(levels, own, strict=True):
        of_parents = [column[..., level.places] for parent in level.parents for column in columns[parent]]
        given.append(torch.stack(of_parents, -1) if of_parents else block[..., :0])
    return Arrow(tuple(levels), tuple(own), tuple(given))

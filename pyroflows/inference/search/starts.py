"""Where a fit starts: points, the modes of the log joint to which they lead, and a Gaussian at each."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyroflows.errors import FlowError, ModelError
from pyroflows.guides.centering import Centering
from pyroflows.inference.search.centering import recentred
from pyroflows.inference.search.density import Density
from pyroflows.inference.search.gaussians import GaussianApproximation, as_gaussian
from pyroflows.inference.search.initial import prior_draw
from pyroflows.inference.search.modes import Mode, ModeSearch
from pyroflows.inference.search.symmetries import Symmetry, exchangeable_axes, find_symmetries, permutation
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import ValueAndGrad
from pyroflows.models.tracing import Model

NUM_ROWS = 64
# Further starts come in batches of these sizes, of fewer where their matrices would have more entries than this.
LEAST_BATCH, BATCH, MAX_ENTRIES = 8, 48, 2**22
# Starts go on until a further one would find a new mode with this probability; or until there are this many, or they
# have cost this multiple of the first ones.
SMALL_PROBABILITY, MAX_STARTS, MAX_COST = 0.02, 200, 2.0
# At most this many modes are fitted.
MAX_MODES = 12
# Where a prior is flat, starts are drawn from a cube from -WIDE to WIDE in the unconstrained space; further ones near
# zero lie between -NEAR and NEAR.
WIDE, NEAR = 10.0, 2.0
# The kinds of further starts, in turn; a draw from the prior takes a run of the model.
KINDS = ("prior", "near", "dispersed", "image", "near", "dispersed")
# Over-dispersed starts lie around a known mode with so many times its standard deviations.
DISPERSION = (3.0, 10.0)
NUM_TESTS_OF_SYMMETRY = 5

Propose = Callable[[Sequence[Mode], int], Tensor]


@dataclass(frozen=True)
class Starts:
    """The result of the search for modes from several starts; the attribute ``starts`` of a posterior.

    Args:
        elbos: the ELBO of the best Gaussian of each start with a finite log joint, in nats, the best first.
        modes: the ELBO of the Gaussian at each separate mode that is not negligible, in nats, the best first.
        num_starts: the number of starts that were tried.
        new_mode_probability: an estimate of the probability that a further start would find a new mode.
        num_equal: the number of modes that symmetries of the log joint map to the best one, which is counted in; modes
            beyond 64 are not counted.

    Example:
        >>> print(Starts(elbos=(-3.0, -3.1, -9.0), modes=(-3.0,), num_starts=3, new_mode_probability=0.25))
        2 of 3 starts ended within 1 nat of the best Gaussian; a further start would find a new mode with probability
        below 25 %
    """

    elbos: tuple[float, ...]
    modes: tuple[float, ...]
    num_starts: int
    new_mode_probability: float = 0.0
    num_equal: int = 1

    def __str__(self) -> str:
        near = sum(elbo > self.elbos[0] - 1 for elbo in self.elbos)
        text = f"{near} of {self.num_starts} starts ended within 1 nat of the best Gaussian"
        if len(self.modes) > 1:
            text += (
                f", in {len(self.modes)} separate modes whose ELBOs lie {self.modes[0] - self.modes[-1]:.1f} nats apart"
            )
        if len(self.modes) > MAX_MODES and self.num_equal > 1:
            text += (
                f"; they are too many to fit, but {self.num_equal} of them are equal by exchangeable components or "
                "signs: order the components, or fix the signs, in the model"
            )
        if self.new_mode_probability:
            percent = math.ceil(round(100 * self.new_mode_probability, 6))
            text += f"; a further start would find a new mode with probability below {percent} %"
        return text


def starting_points(
    model: Model,
    args: Any,
    kwargs: Any,
    layout: Layout,
    center: Tensor,
    num_starts: int,
    centering: Centering | None = None,
) -> Tensor:
    """Choose points from which a search for modes starts, ``(num_starts, dim)``.

    The first is the center. The others are, in turn, points near zero, where Pyro's and Stan's chains start, and draws
    from the prior, which find modes that lie far apart. Where a prior is flat, they are uniform over a wider range.

    Args:
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        layout: the layout of its latents.
        center: the initial values, packed, ``(dim,)``.
        num_starts: the number of points, at least 1.
        centering: the layer before which the points lie; None where they are unconstrained vectors of the model.
    """
    starts = [_before(centering, center), *_uniform(num_starts - 1, center)]
    for i in range(2, num_starts, 2):
        starts[i] = _prior_draw(model, args, kwargs, layout, centering, instead=starts[i])
    return torch.stack(starts)


def further_points(
    model: Model,
    args: Any,
    kwargs: Any,
    layout: Layout,
    center: Tensor,
    modes: Sequence[Mode],
    num_starts: int,
    centering: Centering | None = None,
) -> Tensor:
    """Choose further points from which a search for modes starts, ``(num_starts, dim)``.

    They are, in turn, draws from the prior, points near zero, over-dispersed points around a known mode, and draws at
    an image of a known mode, with signs changed or components permuted at random.

    Args:
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        layout: the layout of its latents.
        center: the initial values, packed, ``(dim,)``.
        modes: the modes that were found so far.
        num_starts: the number of points, at least 1.
        centering: the layer before which the points lie; None where they are unconstrained vectors of the model.
    """
    points = []
    for i in range(num_starts):
        kind = KINDS[i % len(KINDS)]
        mode = modes[int(torch.randint(len(modes), ()))].gaussian
        noise = mode.root @ torch.randn_like(mode.loc)
        if kind == "dispersed":
            low, high = DISPERSION
            points.append(mode.loc + low * (high / low) ** torch.rand(()).item() * noise)
        elif kind == "image":
            points.append(_random_map(layout)((mode.loc + noise)[None])[0])
        else:
            near = NEAR * _uniform(1, center)[0]
            points.append(near if kind == "near" else _prior_draw(model, args, kwargs, layout, centering, near))
    return torch.stack([point.to(center) for point in points])


def _random_map(layout: Layout) -> Symmetry:
    """Change signs at random, or permute components along axes of one length."""
    groups = exchangeable_axes(layout)
    if groups and torch.rand(()) < 0.5:
        axes = groups[int(torch.randint(len(groups), ()))]
        return permutation(layout, axes, torch.randperm(axes[0].size))
    return Symmetry(torch.arange(layout.dim), 2.0 * torch.randint(2, (layout.dim,)) - 1)


def _prior_draw(
    model: Model, args: Any, kwargs: Any, layout: Layout, centering: Centering | None, instead: Tensor
) -> Tensor:
    """Draw from the prior; where that fails, and where it is flat, the draw is another."""
    drawn = prior_draw(model, args, kwargs, layout)
    if drawn is None:
        return instead
    drawn = drawn.to(instead)
    for site in layout.structure.latents:
        if site.is_flat:
            part = layout.slices[site.name]
            drawn[part] = WIDE * _uniform(1, drawn)[0, part]
    return _before(centering, drawn)


@torch.no_grad()
def _before(centering: Centering | None, vector: Tensor) -> Tensor:
    """The vector that a layer maps to an unconstrained vector of the model."""
    return vector if centering is None else centering.inverse_and_ladj(vector)[0]


def _uniform(num: int, like: Tensor) -> Tensor:
    """Draw points ``(num, dim)`` uniformly from the cube between -1 and 1."""
    return 2 * torch.rand(num, len(like)).to(like) - 1


class Target(Protocol):
    """What a search for modes climbs, such as a log joint."""

    layout: Layout

    # A log joint also takes a transform before it, and its state.
    def value_and_grad(self, examples: Tensor, *transform: Any, **state: Any) -> ValueAndGrad:
        """The function from vectors of the shape of the examples to log-densities and gradients."""


def find_start(
    log_joint: Target,
    starts: Tensor,
    inverse_temperature: float | None = None,
    propose: Propose | None = None,
    max_starts: int | None = None,
    note: Callable[[list[GaussianApproximation], Starts, int], None] = lambda modes, found, num_expected: None,
    centering: Centering | None = None,
    num_rows: int = NUM_ROWS,
) -> tuple[list[GaussianApproximation], Starts]:
    """Find the separate modes of a log joint, and fit a Gaussian at each.

    Args:
        log_joint: the log joint of a model, or its marginal density.
        starts: packed unconstrained vectors ``(S, dim)``, the first starts.
        inverse_temperature: a factor of the log joint, between 0 and 1; None for 1.
        propose: a function from the known modes and a number to as many further starts; None to use the first alone.
        max_starts: the largest number of starts, the first ones included, whatever they cost; None for 200, and for
            fewer where the further ones cost more than twice as much as the first.
        note: a function that is called, each time after a few starts, with what was found by then, and with the number
            of starts there will be if no more modes are found.
        centering: the layer before which the starts lie, non-centred, and modes are sought; its centredness is first
            chosen by a Gaussian. None to seek them in the unconstrained space.
        num_rows: the least number of vectors in a call of the log joint.

    Returns:
        The Gaussians at all modes that are not negligible, the best ELBO first; and a summary of the search. Where
        there are more than 12 of them, only one of those that symmetries map to one another is returned.

    Raises:
        ModelError: if the log joint is finite at none of the first starts.
    """
    num_rows = max(num_rows, len(starts))
    examples = starts[:1].repeat(num_rows, 1)
    if centering is None:
        value_and_grad = log_joint.value_and_grad(examples)
    else:
        value_and_grad = log_joint.value_and_grad(examples, centering.forward_and_ladj, state=[centering])

    def tempered(vectors: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = value_and_grad(vectors)
        beta = inverse_temperature or 1.0
        return beta * value, beta * gradient

    try:
        density = Density(tempered, num_rows, starts)
        if centering is not None:
            starts = recentred(density, centering, starts)
        search = ModeSearch(density, starts)
    except ValueError as error:
        if isinstance(error, FlowError):  # of the model, which other values do not help
            raise
        raise ModelError(
            f"{error}: give a guide with init_loc_fn=init_to_value(values={{...}}), with values where they are"
        ) from error
    symmetries = _symmetries(search, log_joint.layout)
    search.close(symmetries)

    layer = copy.deepcopy(centering)

    def found() -> tuple[list[GaussianApproximation], Starts]:
        return [as_gaussian(mode.gaussian, starts, layer) for mode in _fitted(search.kept)], _summary(search)

    batch = max(2, min(BATCH, num_rows, MAX_ENTRIES // starts.shape[1] ** 2))
    limit, max_cost = (MAX_STARTS, MAX_COST) if max_starts is None else (max_starts, math.inf)
    while propose is not None and _goes_on(search, limit, max_cost):
        wanted = max(LEAST_BATCH, math.ceil(search.num_wanted(SMALL_PROBABILITY)))
        wanted = min(wanted, limit - search.num_starts)
        note(*found(), search.num_starts + wanted)
        search.explore(propose(search.kept, min(batch, wanted)))
        search.close(symmetries)
    note(*found(), search.num_starts)
    return found()


def _goes_on(search: ModeSearch, max_starts: int, max_cost: float) -> bool:
    return (
        search.new_mode_probability >= SMALL_PROBABILITY
        and search.num_starts < max_starts
        and search.relative_cost < max_cost
        and len(search.kept) <= MAX_MODES
    )


def _symmetries(search: ModeSearch, layout: Layout) -> list[Symmetry]:
    """The symmetries of the log joint, tested at draws around the best mode."""
    best = search.kept[0].gaussian
    scale = torch.tensor([1.0, 2.0]).repeat(NUM_TESTS_OF_SYMMETRY)[:, None]
    points = best.loc + (scale * torch.randn(len(scale), len(best.loc))).to(best.root) @ best.root.mT
    finite = points[search.density(points)[0].isfinite()]
    return find_symmetries(layout, lambda u: search.density(u)[0], finite[:NUM_TESTS_OF_SYMMETRY])


def _fitted(modes: list[Mode]) -> list[Mode]:
    if len(modes) <= MAX_MODES:
        return modes
    first = {mode.orbit: mode for mode in reversed(modes)}
    return [mode for mode in modes if first[mode.orbit] is mode][:MAX_MODES]


def _summary(search: ModeSearch) -> Starts:
    kept = search.kept
    num_equal = sum(mode.orbit == kept[0].orbit for mode in kept)
    elbos = tuple(sorted(search.elbos, reverse=True))
    modes = tuple(mode.gaussian.elbo for mode in kept)
    return Starts(elbos, modes, search.num_starts, search.new_mode_probability, num_equal)

"""Where a fit starts: points, the modes of the log joint to which they lead, and a Gaussian at each."""

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyroflows.compiling.singular import is_singular
from pyroflows.errors import ModelError
from pyroflows.inference.pathfinder import GaussianApproximation, pathfinder
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint, ValueAndGrad
from pyroflows.models.structure import Model, trace_model

NUM_ROWS = 64
# Gaussians whose means are nearer than this many standard deviations of either describe the same mode.
SEPARATION = 4.0
# Between two modes the log joint falls by at least this many nats; where it falls less, a single mode is bent, or a
# funnel.
MIN_DIP = 3.0
# A Gaussian whose ELBO lies this many nats below the best stands for less than a hundredth of the best mode's mass, if
# both fit well.
MAX_DEFICIT = math.log(100.0)
# Where a prior is flat, starts are drawn from a cube from -WIDE to WIDE in the unconstrained space.
WIDE = 10.0


@dataclass(frozen=True)
class Starts:
    """The result of the search for modes from several starts.

    Args:
        elbos: the ELBO of the best Gaussian of each start with a finite log joint, in nats, the best first.
        modes: the ELBO of the Gaussian at each separate mode that is not negligible, in nats, the best first.
        num_starts: the number of starts that were tried.

    Example:
        >>> print(Starts(elbos=(-3.0, -3.1, -9.0), modes=(-3.0,), num_starts=3))
        2 of 3 starts ended within 1 nat of the best Gaussian
    """

    elbos: tuple[float, ...]
    modes: tuple[float, ...]
    num_starts: int

    def __str__(self) -> str:
        near = sum(elbo > self.elbos[0] - 1 for elbo in self.elbos)
        text = f"{near} of {self.num_starts} starts ended within 1 nat of the best Gaussian"
        if len(self.modes) > 1:
            text += (
                f", in {len(self.modes)} separate modes whose ELBOs lie {self.modes[0] - self.modes[-1]:.1f} nats apart"
            )
        return text


def starting_points(model: Model, args: Any, kwargs: Any, layout: Layout, center: Tensor, num_starts: int) -> Tensor:
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
    """
    starts = [center, *_uniform(num_starts - 1, center)]
    for i in range(2, num_starts, 2):
        # At an extreme draw from a vague prior a scale may underflow, or a matrix be singular.
        with pyro.validation_enabled(False):
            try:
                trace = trace_model(model, args, kwargs)
            except RuntimeError as error:
                if not is_singular(error):
                    raise
                continue
        drawn = layout.unconstrain({name: trace.nodes[name]["value"] for name in layout.slices})
        starts[i] = drawn.to(center)
        for site in layout.structure.latents:
            if site.is_flat:
                part = layout.slices[site.name]
                starts[i][part] = WIDE * _uniform(1, center)[0, part]
    return torch.stack(starts)


def _uniform(num: int, like: Tensor) -> Tensor:
    """Draw points ``(num, dim)`` uniformly from the cube between -1 and 1."""
    return 2 * torch.rand(num, len(like)).to(like) - 1


def find_start(
    log_joint: LogJoint, starts: Tensor, inverse_temperature: float | None = None
) -> tuple[list[GaussianApproximation], Starts]:
    """Find the separate modes of a log joint, and fit a Gaussian at each.

    Args:
        log_joint: the log joint of a model.
        starts: packed unconstrained vectors ``(S, dim)``.
        inverse_temperature: a factor of the log joint, between 0 and 1; None for 1.

    Returns:
        The Gaussians at all modes that are not negligible, the best ELBO first; and a summary of the search.

    Raises:
        ModelError: if the log joint is finite at none of them.
    """
    num_rows = max(NUM_ROWS, len(starts))
    value_and_grad = log_joint.value_and_grad(starts[:1].repeat(num_rows, 1))

    def tempered(vectors: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = value_and_grad(vectors)
        beta = inverse_temperature or 1.0
        return beta * value, beta * gradient

    try:
        found = pathfinder(tempered, starts, num_rows=num_rows)
    except ValueError as error:
        raise ModelError(f"{error}: give a guide with init_loc_fn=init_to_value(values={{...}})") from error
    modes = _separate(found, tempered, num_rows)
    return modes, Starts(tuple(g.elbo for g in found), tuple(g.elbo for g in modes), len(starts))


def _separate(
    gaussians: list[GaussianApproximation], value_and_grad: ValueAndGrad, num_rows: int
) -> list[GaussianApproximation]:
    modes = gaussians[:1]
    for gaussian in gaussians[1:]:
        has_mass = gaussian.elbo > gaussians[0].elbo - MAX_DEFICIT
        if has_mass and all(
            _distance(gaussian, mode) > SEPARATION and _dip(gaussian, mode, value_and_grad, num_rows) > MIN_DIP
            for mode in modes
        ):
            modes.append(gaussian)
    return modes


def _distance(a: GaussianApproximation, b: GaussianApproximation) -> float:
    """The distance between the means, in standard deviations of the wider Gaussian along that direction."""
    gap = (a.loc - b.loc)[:, None]
    solved = [torch.linalg.solve_triangular(g.scale_tril, gap, upper=False) for g in (a, b)]
    return min(s.norm().item() for s in solved)


def _dip(a: GaussianApproximation, b: GaussianApproximation, value_and_grad: ValueAndGrad, num_rows: int) -> float:
    """How far the log joint falls between the means, below its lower end; inf where it is not finite."""
    weight = torch.linspace(0, 1, num_rows).to(a.loc)[:, None]
    values, _ = value_and_grad(a.loc + weight * (b.loc - a.loc))
    return (torch.minimum(values[0], values[-1]) - values.nan_to_num(nan=-torch.inf).min()).item()

"""Where a fit starts: Gaussians at the modes of the log joint, and whether one of them is all that it needs."""

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyroflows.compiling.check import is_singular
from pyroflows.errors import ModelError
from pyroflows.inference.diagnosis import Diagnosis
from pyroflows.inference.pathfinder import GaussianApproximation, pathfinder
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint, ValueAndGrad
from pyroflows.models.structure import Model, trace_model

NUM_ROWS = 64
# In standard deviations of either Gaussian: nearer ones are two views of one mode.
SEPARATION = 4.0
# In nats, of the log joint between two modes: what falls less is one mode with a bend, or a funnel.
MIN_DIP = 3.0
# In nats below the best: a mode of less than a hundredth of its mass, if the Gaussians are good.
MAX_DEFICIT = math.log(100.0)
# Of the Gaussian's log weights, k-hat, moves of means in sds and relative changes of sds under the weights.
MAX_VARIANCE, MAX_KHAT, MAX_MOVE = 0.05, 0.5, 0.05
# Half the width of the cube from which flat priors are drawn, in the unconstrained space.
WIDE = 10.0
# Below this variance of the log weights k-hat is fitted to next to nothing.
EXACT_VARIANCE = 0.01


@dataclass(frozen=True)
class Starts:
    """What the starts of a fit found.

    Args:
        elbos: of the best Gaussian of each start that found a finite log joint, the best first.
        modes: the ELBO of each separate mode of some mass, the best first.
        num_starts: how many were tried.
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
    """The initial values, and in equal parts points near zero and draws from the prior; ``(num_starts, dim)``.

    Those near zero are where Pyro's and Stan's chains start; those from the prior find modes that lie apart. Where a
    prior is flat, they are uniform over a wider range.
    """
    starts = [center, *_uniform(num_starts - 1, center)]
    for i in range(2, num_starts, 2):
        # Far out in a vague prior a scale may underflow, and a matrix be singular.
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
    """Points ``(num, dim)`` of the cube from -1 to 1."""
    return 2 * torch.rand(num, len(like)).to(like) - 1


def find_start(
    log_joint: LogJoint, starts: Tensor, inverse_temperature: float | None = None
) -> tuple[list[GaussianApproximation], Starts]:
    """A Gaussian at each separate mode of some mass, the best ELBO first, from starts ``(S, dim)``.

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


def is_enough(gaussian: Diagnosis) -> bool:
    """Whether nothing is left for a flow to do."""
    return (
        gaussian.verdict == "good"
        and gaussian.log_weight_variance < MAX_VARIANCE
        and (gaussian.khat < MAX_KHAT or gaussian.log_weight_variance < EXACT_VARIANCE)
        and max(gaussian.mean_shift, abs(gaussian.sd_ratio - 1)) < MAX_MOVE
    )


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
    """Between the means, in the wider one's standard deviations."""
    gap = (a.loc - b.loc)[:, None]
    solved = [torch.linalg.solve_triangular(g.scale_tril, gap, upper=False) for g in (a, b)]
    return min(s.norm().item() for s in solved)


def _dip(a: GaussianApproximation, b: GaussianApproximation, value_and_grad: ValueAndGrad, num_rows: int) -> float:
    """How far the log joint falls between the means, below the lower of the two; inf where it is not finite."""
    weight = torch.linspace(0, 1, num_rows).to(a.loc)[:, None]
    values, _ = value_and_grad(a.loc + weight * (b.loc - a.loc))
    return (torch.minimum(values[0], values[-1]) - values.nan_to_num(nan=-torch.inf).min()).item()

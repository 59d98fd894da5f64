"""Where a flow and the posterior of a model differ most, by site, and which form of the model would help."""

import math
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyroflows.constraints import without_events
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint

MAX_ROWS = 5000
# What a site explains of the variance of the log weights, or how far its moments move, is worth a word above this.
LEAST_SCORE = 0.1
# Standardised coordinates are cut off here, so that a few far draws do not make the regression.
CUT = 5.0
NUM_EXCHANGED = 8
# The families that LocScaleReparam takes; "Independent" hides the family of a site with event dimensions.
WITH_LOC_AND_SCALE = {"Normal", "StudentT", "Cauchy", "Laplace", "Independent"}
LEAST_CORRELATION = 0.3
LEAST_LOOP = 3  # names with running numbers that are written as one expression
LARGEST_RATIO_OF_SDS = 1e3
VISIBLE_ROUNDING = 0.005  # nats, of a log joint that is rounded once; sums of many terms are rounded more often


@dataclass(frozen=True)
class SiteMismatch:
    """How a flow and the posterior differ at a site.

    Args:
        name: the name of the site.
        explained: the share of the variance of the log weights that its coordinates and their squares explain.
        shift: the largest change of a mean under the weights, in standard deviations of the draws.
        sd_ratio: the sd under the weights over that of the draws, of the coordinate where it is farthest from 1.

    Example:
        >>> print(SiteMismatch("tau", explained=0.62, shift=0.31, sd_ratio=1.12))
        'tau' (it explains 62 % of the variance of the log weights; under them a mean moves by 0.31 sd, an sd by 12 %)
    """

    name: str
    explained: float
    shift: float
    sd_ratio: float

    @property
    def score(self) -> float:
        """A number by which sites are compared, between 0 and 3."""
        # The sd is zero where one draw has all the weight.
        change = abs(math.log(self.sd_ratio)) if self.sd_ratio > 0 else math.inf
        return self.explained + min(1.0, self.shift) + min(1.0, change)

    def __str__(self) -> str:
        return (
            f"'{self.name}' (it explains {100 * self.explained:.0f} % of the variance of the log weights; under them a "
            f"mean moves by {self.shift:.2f} sd, an sd by {100 * abs(self.sd_ratio - 1):.0f} %)"
        )


def worst_sites(layout: Layout, latents: Tensor, log_weights: Tensor, normalized: Tensor) -> list[SiteMismatch]:
    """Find up to two sites at which a flow and the posterior differ most, the worst first.

    Args:
        layout: the layout of the latents.
        latents: unconstrained draws ``(S, dim)``.
        log_weights: their log weights ``(S,)``, not smoothed.
        normalized: their smoothed weights ``(S,)``, which sum to one.
    """
    finite = log_weights.isfinite()
    rows = finite.nonzero()[:MAX_ROWS, 0]
    z = (latents - latents.mean(0)) / latents.std(0)
    found = []
    for site, part in layout.split(z):
        explained = _explained(part[rows].clamp(-CUT, CUT), log_weights[rows])
        shift = normalized @ part
        ratios = (normalized @ (part - shift) ** 2).sqrt()
        ratio = ratios[ratios.log().abs().argmax()].item()
        found.append(SiteMismatch(site.name, explained, shift.abs().max().item(), ratio))
    found = sorted(found, key=lambda site: site.score, reverse=True)
    return [site for site in found[:2] if site.score > max(LEAST_SCORE, found[0].score / 2)]


def _explained(z: Tensor, log_weights: Tensor) -> float:
    r"""The adjusted :math:`R^2` of a linear regression of log weights ``(S,)`` on z ``(S, n)`` and its squares."""
    if len(z) <= 2 * z.shape[-1] + 1:
        return 0.0
    design = torch.cat([z, z**2], -1)
    design = design - design.mean(0)
    # Log weights may fall without bound, where a draw is next to impossible.
    centred = log_weights.clamp(min=log_weights.median() - 20)
    centred = centred - centred.mean()
    ridge = 1e-6 * len(z) * torch.eye(design.shape[-1], dtype=z.dtype)
    solution = torch.linalg.solve(design.T @ design + ridge, design.T @ centred)
    unexplained = ((centred - design @ solution) ** 2).sum() / (centred**2).sum()
    adjusted = 1 - unexplained.item() * (len(z) - 1) / (len(z) - design.shape[-1] - 1)
    return max(0.0, adjusted) if math.isfinite(adjusted) else 0.0


def helpful_forms(
    log_joint: LogJoint, latents: Tensor, log_weights: Tensor, names: list[str], learned: Set[str] = frozenset()
) -> Iterator[str]:
    """Say which other form of the model, or which dtype, would be nearer to a Gaussian.

    Args:
        log_joint: the log joint of the model.
        latents: unconstrained draws ``(S, dim)`` in the dtype of the fit.
        log_weights: their log weights ``(S,)``.
        names: the sites with the worst mismatch, which are named first.
        learned: the sites whose centring the flow has learned, so that no other form would help.
    """
    found = (pair for pair in _scaled(log_joint, latents) if pair[0] not in learned)
    pairs = sorted(found, key=lambda pair: not set(pair).intersection(names))
    if pairs:
        yield _non_centred(pairs)
    sds = {site.name: part.double().std(0) for site, part in log_joint.layout.split(latents)}
    low, high = min(sds, key=lambda name: sds[name].min()), max(sds, key=lambda name: sds[name].max())
    least, largest = sds[low].min().item(), sds[high].max().item()
    if largest > LARGEST_RATIO_OF_SDS * least:
        yield (
            f"the sds of the unconstrained draws go from {least:.1g} at site '{low}' to {largest:.1g} at site "
            f"'{high}': bring them to one scale, for instance by standardised predictors"
        )
    size = log_weights[log_weights.isfinite()].abs().median().item()
    rounding = torch.finfo(latents.dtype).eps * size
    if rounding > VISIBLE_ROUNDING:
        yield f"a log joint of {size:.1g} nats is rounded by {rounding:.1g} in {latents.dtype}: use dtype=torch.float64"


def _non_centred(pairs: Sequence[tuple[str, str]]) -> str:
    """Name the non-centred form of sites, each given with the latent that sets its scale, as code that runs."""
    scaled, scale = pairs[0]
    sets = f"site '{scale}' sets the scale of site '{scaled}'"
    if len(pairs) == 1:
        config = f'{{"{scaled}": LocScaleReparam(0.0)}}'
    else:
        sets += f", the first of {len(pairs)} sites whose scale a latent sets"
        config = f"dict.fromkeys([{', '.join(_as_code([name for name, _ in pairs]))}], LocScaleReparam(0.0))"
    return f"{sets}: fit the non-centred form, poutine.reparam(model, config={config})"


def _as_code(names: Sequence[str]) -> Iterator[str]:
    """The names as literals; those of a loop, such as ``w_0`` to ``w_9``, as one expression."""
    by_stem: dict[str, list[int]] = {}
    for name in names:
        if found := re.fullmatch(r"([\w ./-]*?)(0|[1-9][0-9]*)", name):
            by_stem.setdefault(found[1], []).append(int(found[2]))
    loops = {
        stem: (min(numbers), max(numbers) + 1)
        for stem, numbers in by_stem.items()
        if len(numbers) == max(numbers) + 1 - min(numbers) >= LEAST_LOOP
    }
    yield from (f'*[f"{stem}{{i}}" for i in range({start}, {stop})]' for stem, (start, stop) in loops.items())
    in_loops = {f"{stem}{i}" for stem, ends in loops.items() for i in range(*ends)}
    yield from (repr(name) for name in names if name not in in_loops)


@torch.no_grad()
def _scaled(log_joint: LogJoint, latents: Tensor) -> Iterator[tuple[str, str]]:
    """Find the sites whose prior has a scale that another latent sets, each with that latent.

    Exchanging the values of the other latent between draws changes the log-density of such a site. To tell a scale from
    a location, that latent is positive, or the log spread of the site's coordinates follows it.
    """
    values, _ = log_joint.layout.constrain(latents[:NUM_EXCHANGED])
    before = log_joint.batched(values, NUM_EXCHANGED).log_probs
    parts = {site.name: part.double() for site, part in log_joint.layout.split(latents)}
    scales: dict[str, dict[str, float]] = {}
    for scale in log_joint.structure.latents:
        exchanged = {**values, scale.name: values[scale.name].roll(1, 0)}
        try:
            after = log_joint.batched(exchanged, NUM_EXCHANGED).log_probs
        except Exception:  # values that do not belong together may make a model raise anything
            continue
        for site in log_joint.structure.latents:
            if site.name not in before:  # it depends on discrete sites
                continue
            depends = not torch.allclose(before[site.name], after[site.name], rtol=1e-4, atol=1e-4, equal_nan=True)
            if site is not scale and depends and site.family in WITH_LOC_AND_SCALE:
                follows = _spread_follows(parts[site.name], parts[scale.name])
                if _is_half_line(scale.support) or follows > LEAST_CORRELATION:
                    scales.setdefault(site.name, {})[scale.name] = follows
    for name, found in scales.items():
        yield name, max(found, key=lambda scale: found[scale])


def _spread_follows(of_site: Tensor, of_scale: Tensor) -> float:
    """The largest correlation of the log spread of a site's coordinates ``(S, n)`` with another's ``(S, m)``."""
    spread = of_site.std(-1) if of_site.shape[-1] > 1 else (of_site[:, 0] - of_site.mean()).abs()
    spread = spread.log() - spread.log().mean()
    of_scale = of_scale - of_scale.mean(0)
    correlations = spread @ of_scale / (spread.norm() * of_scale.norm(dim=0))
    return correlations.abs().nan_to_num().max().item()


def _is_half_line(support: Any) -> bool:
    support = without_events(support)
    return hasattr(support, "lower_bound") and not hasattr(support, "upper_bound")

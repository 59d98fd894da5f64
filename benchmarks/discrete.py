"""How near discrete flows come to known laws of categories, beside their bases alone.

    python -m benchmarks.discrete gaussians full_rank potts rules --seeds 0 1 2

"gaussians" are eight Gaussians on a circle, quantised to 91 levels a coordinate; "full_rank" are laws whose
probabilities of all sequences are drawn from a flat Dirichlet distribution, among them the sizes of Tran et al. 2019;
"potts" is a Potts model on a square grid; in "rules" some places are functions of others, or nearly so.
Each fit is ``pf.fit_density(flow, x, seed=seed)`` with its defaults on 20,000 rows. What is printed is the gap, the
exact cross-entropy of the law to the fitted flow minus the entropy of the law, in nats a row: its mean over seeds, with
the largest in brackets, and the processor's seconds of a fit.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.flows.discrete.base import AutoregressiveCategorical, FactorizedCategorical
from pyroflows.transforms import DiscreteAutoregressive

NUM_ROWS, MAX_SCORED = 20_000, 20_000
NUM_LEVELS, RADIUS, SD = 91, 30.0, 3.0
FULL_RANK = [(2, 2), (2, 10), (3, 5), (5, 5), (5, 10), (10, 5)]


@dataclass(frozen=True)
class Law:
    """A law of sequences of categories: all sequences ``(n, length)`` and their probabilities ``(n,)``."""

    sequences: Tensor
    probabilities: Tensor
    num_categories: int

    @property
    def length(self) -> int:
        return self.sequences.shape[1]

    @property
    def entropy(self) -> float:
        return -torch.special.xlogy(self.probabilities, self.probabilities).sum().item()

    def draws(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.sequences[self.probabilities.multinomial(NUM_ROWS, replacement=True, generator=generator)]

    @torch.no_grad()
    def cross_entropy(self, flow: pf.Flow) -> float:
        log_prob = torch.cat([flow().log_prob(part) for part in self.sequences.split(MAX_SCORED)])
        return -(self.probabilities * log_prob.double()).sum().item()


def all_sequences(length: int, num_categories: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(num_categories)] * length).reshape(-1, length)


def gaussians() -> Law:
    edges = torch.arange(NUM_LEVELS + 1, dtype=torch.double) - NUM_LEVELS / 2
    edges[0], edges[-1] = -math.inf, math.inf
    angles = torch.arange(8) * math.pi / 4
    centers = RADIUS * torch.stack([angles.cos(), angles.sin()], -1).double()
    of_levels = torch.special.ndtr((edges - centers[..., None]) / SD).diff()  # (8, 2, NUM_LEVELS)
    joint = torch.einsum("ci,cj->ij", of_levels[:, 0], of_levels[:, 1]) / 8
    return Law(all_sequences(2, NUM_LEVELS), joint.flatten(), NUM_LEVELS)


def full_rank(length: int, num_categories: int) -> Law:
    generator = torch.Generator().manual_seed(0)
    weights = -torch.rand(num_categories**length, dtype=torch.double, generator=generator).log()
    return Law(all_sequences(length, num_categories), weights / weights.sum(), num_categories)


def potts(side: int, num_states: int, coupling: float = 0.5) -> Law:
    """Return a Potts model with a field that differs from site to site."""
    x = all_sequences(side**2, num_states)
    field = 0.5 * torch.randn(side**2, num_states, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    grid = x.unflatten(-1, (side, side))
    equal = (grid[:, 1:] == grid[:, :-1]).sum((1, 2)) + (grid[..., 1:] == grid[..., :-1]).sum((1, 2))
    energy = coupling * equal + sum(field[site][x[:, site]] for site in range(side**2))
    return Law(x, energy.softmax(0), num_states)


def uniform_where(allowed: Callable[[Tensor], Tensor], length: int, num_categories: int) -> Law:
    """Return the uniform law of the sequences that a rule allows."""
    x = all_sequences(length, num_categories)
    weights = allowed(x).double()
    return Law(x, weights / weights.sum(), num_categories)


def noisy_parity(length: int, noise: float = 0.05) -> Law:
    """Return bits whose last one is the parity of the others, or, with some probability, is not."""
    x = all_sequences(length, 2)
    return Law(x, torch.where(x.sum(-1) % 2 == 0, 1 - noise, noise).double() / 2 ** (length - 1), 2)


def walk(length: int, num_categories: int) -> Law:
    """Return a walk on a circle that stays, or takes a step forward."""
    x = all_sequences(length, num_categories)
    step = x.diff(dim=-1) % num_categories
    chances = torch.tensor([0.7, 0.3] + [0.0] * (num_categories - 2), dtype=torch.double)
    return Law(x, chances[step].prod(-1) / num_categories, num_categories)


def base_alone(length: int, num_categories: int, base: torch.nn.Module) -> pf.Flow:
    """Return a flow that is its base: its layer is the identity, and is not trained."""
    layer = DiscreteAutoregressive(length, num_categories, "additive", hidden_dims=(1,))
    return pf.Flow([layer.requires_grad_(False).inv], base)


MODELS: dict[str, Callable[[int, int], pf.Flow]] = {
    "factorised base": lambda *sizes: base_alone(*sizes, FactorizedCategorical(*sizes)),
    "autoregressive base": lambda *sizes: base_alone(*sizes, AutoregressiveCategorical(*sizes)),
    'DiscreteAutoregressive, "affine"': lambda *sizes: pf.flows.DiscreteAutoregressive(*sizes, univariate="affine"),
    'DiscreteAutoregressive, "permutation"': lambda *sizes: pf.flows.DiscreteAutoregressive(
        *sizes, univariate="permutation"
    ),
    "the same, factorised base": lambda *sizes: pf.flows.DiscreteAutoregressive(
        *sizes, univariate="permutation", base="factorized"
    ),
    "DiscreteCoupling": pf.flows.DiscreteCoupling,
    'DiscreteCoupling, "affine"': lambda *sizes: pf.flows.DiscreteCoupling(*sizes, univariate="affine"),
}
LAWS: dict[str, dict[str, Callable[[], Law]]] = {
    "gaussians": {"eight Gaussians, K = 91": gaussians},
    "full_rank": {f"D = {d}, K = {k}": lambda d=d, k=k: full_rank(d, k) for d, k in FULL_RANK},
    "potts": {"Potts, 3 x 3 sites, 3 states": lambda: potts(3, 3)},
    "rules": {
        "a copy of three places, K = 5": lambda: uniform_where(lambda x: (x[:, :3] == x[:, 3:]).all(-1), 6, 5),
        "a sum modulo 7 of two places": lambda: uniform_where(lambda x: x[:, :2].sum(-1) % 7 == x[:, 2], 3, 7),
        "a permutation of six": lambda: uniform_where(lambda x: (x.sort().values == torch.arange(6)).all(-1), 6, 6),
        "the parity of seven bits, seldom wrong": lambda: noisy_parity(8),
        "a walk on a circle of six": lambda: walk(6, 6),
    },
}


def compare(title: str, law: Law, models: Sequence[str], seeds: Sequence[int]) -> None:
    print(f"\n{title}, entropy {law.entropy:.3f}\n\n| model | nats | gap | s |\n|---|---|---|---|")
    for name in models:
        gaps, seconds = [], []
        for seed in seeds:
            pyro.set_rng_seed(seed)
            flow = MODELS[name](law.length, law.num_categories)
            start = time.process_time()
            pf.fit_density(flow, law.draws(1000 + seed), seed=seed, progress_bar=False)
            seconds.append(time.process_time() - start)
            gaps.append(law.cross_entropy(flow) - law.entropy)
        mean = sum(gaps) / len(gaps)
        mean_seconds = sum(seconds) / len(seconds)
        print(f"| {name} | {law.entropy + mean:.3f} | {mean:.3f} ({max(gaps):.3f}) | {mean_seconds:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=list(LAWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}")
    for part in options.parts:
        for title, make_law in LAWS[part].items():
            compare(title, make_law(), options.models, options.seeds)

"""Flow matching beside torchcfm: from eight Gaussians to two moons and back, without and with contexts.

Both see the same 20,000 rows, in their own units, for the same number of steps of 256, train the same network of two
hidden layers of 64 units, and solve by adaptive steps. torchcfm's loop is that of its tutorials, with Adam at the rate
of ours, or at its own with its noise of 0.1 about paths; ours is that of fit_flow_matching, which sets a tenth of the
rows aside, averages parameters and lets the rate fall at the end. "our network" has the velocity network of the library
in the place of the common one. The distance is the sliced Wasserstein distance of order 2, over 200 directions, of
10,000 draws from as many exact ones; its yardstick is that of exact draws from exact ones. With contexts it is the mean
over their values: the moon, or one of eight angles by which both moons are turned.

    python -m benchmarks.transport --steps 2000 --seeds 0 1 2

Needs torchcfm and POT; torchcfm installs with ``--no-deps``.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher
from torchdiffeq import odeint

import pyroflows as pf

NUM_ROWS = 20_000
BATCH = 256
HIDDEN_DIMS = (64, 64)
NUM_DRAWS = 10_000
NUM_DIRECTIONS = 200
NUM_ANGLES = 8
RATE = 1e-2


def around(centers: Tensor, scale: float) -> dist.Distribution:
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(centers))), dist.Normal(centers, scale).to_event(1))


def eight_gaussians() -> dist.Distribution:
    angle = torch.arange(8) * math.pi / 4
    return around(5 * torch.stack([angle.cos(), angle.sin()], -1), 0.4)


def moon(is_lower: bool) -> Tensor:
    angle = torch.linspace(0, math.pi, 24)
    arc = torch.stack([angle.cos(), angle.sin()], -1)
    return 3 * (torch.tensor([1.0, 0.5]) - arc if is_lower else arc) - torch.tensor([1.5, 0.75])


def moons() -> dist.Distribution:
    return around(torch.cat([moon(False), moon(True)]), 0.3)


@dataclass(frozen=True)
class Task:
    """A base, a law of data for each context, and contexts at which it is judged; one None without a context."""

    base: dist.Distribution
    sample: Callable[[Tensor | None, int], Tensor]
    contexts: Callable[[int], Tensor | None]
    judged: tuple[Tensor | None, ...] = (None,)

    @property
    def context_dim(self) -> int:
        return 0 if self.judged[0] is None else len(self.judged[0])


def which_moon(count: int) -> Tensor:
    return torch.randint(2, (count, 1)).float()


def sample_moon(context: Tensor, count: int) -> Tensor:
    upper, lower = (around(moon(is_lower), 0.3).sample((count,)) for is_lower in (False, True))
    return torch.where(context.expand(count, 1) > 0, lower, upper)


def directions(count: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 2), dim=-1)


def sample_turned(context: Tensor, count: int) -> Tensor:
    x, y = moons().sample((count,)).unbind(-1)
    cos, sin = context.expand(count, 2).unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


ANGLES = torch.arange(NUM_ANGLES) * 2 * math.pi / NUM_ANGLES
TASKS = {
    "gaussians to moons": Task(eight_gaussians(), lambda _, n: moons().sample((n,)), lambda _: None),
    "moons to gaussians": Task(moons(), lambda _, n: eight_gaussians().sample((n,)), lambda _: None),
    "to one of the moons": Task(eight_gaussians(), sample_moon, which_moon, (torch.tensor([0.0]), torch.tensor([1.0]))),
    "to turned moons": Task(
        eight_gaussians(), sample_turned, directions, tuple(torch.stack([ANGLES.cos(), ANGLES.sin()], -1))
    ),
}

# Maps a context or None to draws.
Sampler = Callable[[Tensor | None], Tensor]


class Velocity(nn.Module):
    """A perceptron over place, time and context, as in torchcfm's tutorials but for width, depth and activation."""

    def __init__(self, dim: int, hidden_dims: Sequence[int], context_dim: int) -> None:
        super().__init__()
        a, b = hidden_dims
        layers = [nn.Linear(dim + 1 + context_dim, a), nn.SiLU(), nn.Linear(a, b), nn.SiLU(), nn.Linear(b, dim)]
        self.net = nn.Sequential(*layers)

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        parts = [z, t.unsqueeze(-1)]
        return self.net(torch.cat(parts if context is None else [*parts, context], -1))


def ours(
    task: Task, x: Tensor, context: Tensor | None, num_steps: int, seed: int, own_network: bool = False, **options: Any
) -> Sampler:
    layer = pf.transforms.Continuous(2, HIDDEN_DIMS, task.context_dim, net=None if own_network else Velocity)
    # Base and data are in the same units, as torchcfm takes them.
    flow = pf.Flow([layer], task.base, standardize=False)
    epochs = num_steps // (int(0.9 * len(x)) // BATCH)
    limits = {"max_epochs": epochs, "patience": epochs, "batch_size": BATCH}
    pf.fit_flow_matching(flow, x, context, seed=seed, progress_bar=False, **limits, **options)
    return lambda context: (flow() if context is None else flow(context)).sample((NUM_DRAWS,))


def theirs(
    task: Task,
    x: Tensor,
    context: Tensor | None,
    num_steps: int,
    seed: int,
    matcher: ConditionalFlowMatcher,
    rate: float,
) -> Sampler:
    net = Velocity(2, HIDDEN_DIMS, task.context_dim)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    for _ in range(num_steps):
        index = torch.randint(len(x), (BATCH,))
        z0, z1, c = task.base.sample((BATCH,)), x[index], None
        if context is None:
            t, zt, velocity = matcher.sample_location_and_conditional_flow(z0, z1)
        elif isinstance(matcher, ExactOptimalTransportConditionalFlowMatcher):
            t, zt, velocity, _, c = matcher.guided_sample_location_and_conditional_flow(z0, z1, y1=context[index])
        else:
            t, zt, velocity = matcher.sample_location_and_conditional_flow(z0, z1)
            c = context[index]
        optimizer.zero_grad()
        (net(t, zt, c) - velocity).square().mean().backward()
        optimizer.step()

    def sampler(context: Tensor | None) -> Tensor:
        times, z0 = torch.tensor([0.0, 1.0]), task.base.sample((NUM_DRAWS,))
        expanded = None if context is None else context.expand(NUM_DRAWS, -1)
        return odeint(lambda t, z: net(t.expand(NUM_DRAWS), z, expanded), z0, times, rtol=1e-5, atol=1e-5)[-1]

    return sampler


WAYS: dict[str, Callable[..., Sampler]] = {
    "pyroflows": partial(ours, coupling="independent"),
    "torchcfm": partial(theirs, matcher=ConditionalFlowMatcher(sigma=0.0), rate=RATE),
    "torchcfm, tutorial": partial(theirs, matcher=ConditionalFlowMatcher(sigma=0.1), rate=1e-3),
    "pyroflows, our network": partial(ours, own_network=True),
    "pyroflows, optimal transport": partial(ours, coupling="optimal_transport"),
    "torchcfm, optimal transport": partial(
        theirs, matcher=ExactOptimalTransportConditionalFlowMatcher(sigma=0.0), rate=RATE
    ),
}


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    axes = directions(NUM_DIRECTIONS).T
    gaps = (a @ axes).sort(0).values - (b @ axes).sort(0).values
    return gaps.square().mean().sqrt().item()


@torch.no_grad()
def distance(task: Task, sampler: Sampler) -> float:
    return statistics.mean(sliced_wasserstein(sampler(c), task.sample(c, NUM_DRAWS)) for c in task.judged)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.distributions.Distribution.set_default_validate_args(False)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, torchcfm 1.0.7; {args.steps} steps\n")
    print("| task | library | sliced Wasserstein | by seed | exact | s |\n|---|---|---|---|---|---|")
    for name in args.tasks:
        task = TASKS[name]
        torch.manual_seed(100)
        yardstick = statistics.mean(distance(task, lambda c, task=task: task.sample(c, NUM_DRAWS)) for _ in range(5))
        for way in args.ways:
            distances, times = [], []
            for seed in args.seeds:
                torch.manual_seed(seed)
                context = task.contexts(NUM_ROWS)
                x = task.sample(context, NUM_ROWS)
                start = time.process_time()
                sampler = WAYS[way](task, x, context, args.steps, seed)
                times.append(time.process_time() - start)
                torch.manual_seed(200 + seed)
                distances.append(distance(task, sampler))
            by_seed = " ".join(f"{value:.3f}" for value in distances)
            row = [name, way, f"{statistics.mean(distances):.3f}", by_seed, f"{yardstick:.3f}", f"{min(times):.0f}"]
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())

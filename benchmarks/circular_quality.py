"""How near densities of angles come to known ones, beside Zuko's NCSF of equal size.

Each model gets the same 16384 draws of a law on the torus. Ours are trained by ``fit_density`` as it is; Zuko's by the
loop of its tutorial, Adam at 0.001 for 8 epochs of batches of 64, and again by the same loop for 40 epochs with a
cosine schedule, which is about as long as ours. Printed are the mean of log p(x) - log q(x) over held-out draws, in
nats (an estimate of KL(p || q)), by seed, and the largest jump of log q between the two sides of the cut at pi, along
the cut.

    python -m benchmarks.circular_quality --seeds 0 1 2

Needs zuko beside the project's own requirements.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
import zuko
from pyro import distributions as dist
from torch import Tensor, nn

import pyroflows as pf

NUM_ROWS = 16_384
NUM_HELD_OUT = 20_000
HIDDEN_DIMS = (64, 64)
NUM_LAYERS = 3


class Correlated:
    """A sine von Mises law, of two correlated angles, whose mode lies on the cut.

    Its density is Pyro's. Pyro's draws have another law (1.12.0), so the first angle is drawn by its distribution
    function on a grid, and the second, which is von Mises given the first, exactly.
    """

    def __init__(self) -> None:
        self.loc, self.concentration, self.correlation = torch.tensor([3.0, -3.1]), torch.tensor(5.0), 4.0
        self.law = dist.SineBivariateVonMises(
            *self.loc, self.concentration, self.concentration, torch.tensor(self.correlation)
        )

    def sample(self, count: int) -> Tensor:
        grid = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)
        weights = torch.exp(self.concentration * grid.cos() + self.second(grid)[1]) * torch.special.i0e(
            self.second(grid)[1]
        )
        heights = torch.cat([weights.new_zeros(1), ((weights[1:] + weights[:-1]) / 2).cumsum(0)])
        at = heights[-1] * torch.rand(count, dtype=torch.float64)
        k = torch.searchsorted(heights, at, right=True).clamp(1, len(grid) - 1)
        share = (at - heights[k - 1]) / (heights[k] - heights[k - 1])
        first = grid[k - 1] + share * (grid[k] - grid[k - 1])
        loc, concentration = self.second(first)
        second = dist.VonMises(loc, concentration).sample()
        return pf.constraints.wrapped(self.loc + torch.stack([first, second], -1)).float()

    def second(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Location and concentration of the second angle given the first, both relative to the mode."""
        pull = self.correlation * first.sin()
        return torch.atan2(pull, self.concentration), torch.hypot(pull, self.concentration.to(pull))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.log_prob(x)


class Modes:
    """A mixture of five products of von Mises laws, two of them across the cut."""

    def __init__(self) -> None:
        centers = torch.tensor([[3.1, 0.0], [-1.5, -3.0], [1.5, 1.5], [0.0, -1.5], [-2.0, 1.0]])
        concentrations = torch.tensor([[10.0, 2.0], [5.0, 20.0], [30.0, 5.0], [8.0, 8.0], [3.0, 30.0]])
        parts = dist.VonMises(centers, concentrations).to_event(1)
        self.law = dist.MixtureSameFamily(dist.Categorical(torch.ones(5)), parts)

    def sample(self, count: int) -> Tensor:
        return self.law.sample((count,))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.log_prob(x)


class Locked:
    """A uniform angle, and one that follows it around the circle: the ridge winds around the torus."""

    concentration = torch.tensor(8.0)

    def sample(self, count: int) -> Tensor:
        first = 2 * math.pi * torch.rand(count) - math.pi
        second = first + dist.VonMises(torch.tensor(0.0), self.concentration).sample((count,))
        return pf.constraints.wrapped(torch.stack([first, second], -1))

    def log_prob(self, x: Tensor) -> Tensor:
        return dist.VonMises(x[:, 0], self.concentration).log_prob(x[:, 1]) - math.log(2 * math.pi)


def ours(autoregressive: bool) -> Callable[[Tensor, int], nn.Module]:
    def train(x: Tensor, seed: int) -> nn.Module:
        options = {"num_layers": NUM_LAYERS, "hidden_dims": HIDDEN_DIMS, "autoregressive": autoregressive}
        flow = pf.flows.CircularNSF(2, **options)
        pf.fit_density(flow, x, seed=seed, progress_bar=False)
        return flow

    return train


def zukos(num_epochs: int, has_schedule: bool) -> Callable[[Tensor, int], nn.Module]:
    def train(x: Tensor, seed: int) -> nn.Module:
        flow = zuko.flows.NCSF(2, transforms=NUM_LAYERS, hidden_features=HIDDEN_DIMS)
        optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs)
        for _ in range(num_epochs):
            for batch in x[torch.randperm(len(x))].split(64):
                loss = -flow().log_prob(batch).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if has_schedule:
                schedule.step()
        return flow

    return train


MODELS = {
    "CircularNSF, fit_density": ours(autoregressive=True),
    "CircularNSF, couplings, fit_density": ours(autoregressive=False),
    "NCSF, zuko, tutorial": zukos(8, has_schedule=False),
    "NCSF, zuko, 40 epochs": zukos(40, has_schedule=True),
}


@torch.no_grad()
def gap(flow: nn.Module, law: Correlated | Modes | Locked) -> float:
    """Mean of log p - log q over held-out draws."""
    torch.manual_seed(10_000)
    x = law.sample(NUM_HELD_OUT)
    return (law.log_prob(x) - flow().log_prob(x)).mean().item()


@torch.no_grad()
def jump(flow: nn.Module) -> float:
    """The largest difference of log q across the cut at pi, over both angles."""
    along = torch.linspace(-3.1, 3.1, 400)
    end = torch.full_like(along, math.pi - 1e-5)
    pairs = [(torch.stack([s * end, along], -1), torch.stack([along, s * end], -1)) for s in (1, -1)]
    upper, lower = (torch.stack([flow().log_prob(x) for x in pair]) for pair in pairs)
    return (upper - lower).abs().max().item()


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, zuko {zuko.__version__}\n")
    print("| law | model | log p - log q, nats | by seed | jump at the cut | seconds |\n|---|---|---|---|---|---|")
    for law in (Correlated(), Modes(), Locked()):
        if args.laws and type(law).__name__.lower() not in args.laws:
            continue
        for name, train in MODELS.items():
            if args.only and name not in args.only:
                continue
            gaps, jumps, seconds = [], [], []
            for seed in args.seeds:
                torch.manual_seed(seed)
                x = law.sample(NUM_ROWS)
                start = time.perf_counter()
                flow = train(x, seed)
                seconds.append(time.perf_counter() - start)
                gaps.append(gap(flow, law))
                jumps.append(jump(flow))
            by_seed = " ".join(f"{g:.4f}" for g in gaps)
            print(
                f"| {type(law).__name__.lower()} | {name} | {statistics.mean(gaps):.4f} | {by_seed} "
                f"| {max(jumps):.2g} | {statistics.mean(seconds):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--laws", nargs="+", help="laws of these names")
    parser.add_argument("--only", nargs="+", help="models of these names")
    main(parser.parse_args())

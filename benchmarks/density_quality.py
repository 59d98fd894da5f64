"""How near density models come to known densities, and to Zuko's and nflows' models of equal size.

All models of a row see the same fresh batches in the same order, for the same number of steps, with Adam and a cosine
schedule. What is printed is the mean over held-out rows of log p(x) - log q(x), in nats a dimension: an estimate of
KL(p || q) / D, for each seed and their mean; and the processor's time for a step, with its rows, of the fastest seed.

    python -m benchmarks.density_quality --steps 4000 --seeds 0 1 2

Needs nflows and zuko beside the project's own requirements.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import zuko
from nflows import transforms as nt
from pyro import distributions as dist
from torch import Tensor, nn

import pyroflows as pf
from benchmarks.density_speed import log_prob, nflows_autoregressive, nflows_coupling

BATCH = 512
HIDDEN_DIMS = (64, 64)
NUM_LAYERS = 5
NUM_COUPLINGS = 8
NUM_HELD_OUT = 20_000


class Moons:
    """Two interlocked half circles, each a mixture of Gaussians along its arc."""

    dim = 2

    def __init__(self) -> None:
        angle = torch.linspace(0, torch.pi, 24)
        upper = torch.stack([torch.cos(angle), torch.sin(angle)], -1)
        lower = torch.stack([1 - torch.cos(angle), 0.5 - torch.sin(angle)], -1)
        centers = 1.5 * (torch.cat([upper, lower]) - torch.tensor([0.5, 0.25]))
        parts = dist.Normal(centers, 0.15).to_event(1)
        self.law = dist.MixtureSameFamily(dist.Categorical(torch.ones(len(centers))), parts)

    def sample(self, count: int) -> Tensor:
        return self.law.sample((count,))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.log_prob(x)


class Chain:
    """Six dimensions, each skewed, heavy-tailed or of two modes given the one before."""

    dim = 6

    def sample(self, count: int) -> Tensor:
        columns = [torch.randn(count)]
        for j in range(1, self.dim):
            columns.append(self.conditional(j, columns[-1]).sample())
        return torch.stack(columns, -1)

    def log_prob(self, x: Tensor) -> Tensor:
        total = dist.Normal(0.0, 1.0).log_prob(x[:, 0])
        for j in range(1, self.dim):
            total = total + self.conditional(j, x[:, j - 1]).log_prob(x[:, j])
        return total

    def conditional(self, j: int, before: Tensor) -> dist.Distribution:
        scale = 0.3 + 0.4 * torch.sigmoid(2 * before)
        if j % 2:
            means = torch.stack([torch.sin(2 * before) - 1, torch.cos(before) + 1], -1)
            weights = dist.Categorical(logits=torch.stack([before, -before], -1))
            return dist.MixtureSameFamily(weights, dist.Normal(means, scale[:, None]))
        return dist.StudentT(6.0, 0.5 * before**2 - 0.5, scale)


def models(dim: int) -> dict[str, Callable[[], nn.Module]]:
    ours = {"hidden_dims": HIDDEN_DIMS}
    zukos = {"hidden_features": HIDDEN_DIMS, "activation": nn.SiLU}
    return {
        "MAF": lambda: pf.flows.MAF(dim, num_layers=NUM_LAYERS, **ours),
        "MAF, zuko": lambda: zuko.flows.MAF(dim, transforms=NUM_LAYERS, **zukos),
        "MAF, nflows": lambda: nflows_autoregressive(nt.MaskedAffineAutoregressiveTransform, dim, HIDDEN_DIMS),
        "RealNVP": lambda: pf.flows.RealNVP(dim, num_layers=NUM_COUPLINGS, **ours),
        "RealNVP, zuko": lambda: zuko.flows.MAF(dim, transforms=NUM_COUPLINGS, passes=2, **zukos),
        "RealNVP, nflows": lambda: nflows_coupling(nt.AffineCouplingTransform, dim, HIDDEN_DIMS, NUM_COUPLINGS),
        "NSF": lambda: pf.flows.NSF(dim, num_layers=NUM_LAYERS, autoregressive=True, **ours),
        "NSF, coupling": lambda: pf.flows.NSF(dim, num_layers=NUM_COUPLINGS, **ours),
        "NAF": lambda: pf.flows.NAF(dim, num_layers=3, **ours),
        "Residual": lambda: pf.flows.Residual(dim),
        "BNAF": lambda: pf.flows.BNAF(dim, num_layers=3, hidden_dims=(32,)),  # units of each dimension
    }


def gap(flow: nn.Module, data: Moons | Chain, num_steps: int, seed: int) -> tuple[float, float]:
    """Mean of (log p - log q) / D over held-out rows after training, and the milliseconds of a step."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    torch.manual_seed(seed)
    start = time.process_time()
    for _ in range(num_steps):
        x = data.sample(BATCH)
        optimizer.zero_grad()
        (-log_prob(flow, x).mean()).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    milliseconds = 1e3 * (time.process_time() - start) / num_steps
    torch.manual_seed(10_000 + seed)
    x = data.sample(NUM_HELD_OUT)
    with torch.no_grad():
        return ((data.log_prob(x) - log_prob(flow, x)).mean() / data.dim).item(), milliseconds


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, zuko {zuko.__version__}, nflows 0.14;")
    print(f"{args.steps} steps of {BATCH} fresh rows, seeds {args.seeds}\n")
    print("| data | model | log p - log q, nats a dimension | by seed | ms a step |\n|---|---|---|---|---|")
    for data in (Moons(), Chain()):
        for name, make in models(data.dim).items():
            if args.only and name not in args.only:
                continue
            gaps, times = [], []
            for seed in args.seeds:
                torch.manual_seed(seed)
                found, milliseconds = gap(make(), data, args.steps, seed)
                gaps.append(found)
                times.append(milliseconds)
            by_seed = " ".join(f"{g:.4f}" for g in gaps)
            row = [type(data).__name__.lower(), name, f"{statistics.mean(gaps):.4f}", by_seed, f"{min(times):.1f}"]
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="models of these names")
    main(parser.parse_args())

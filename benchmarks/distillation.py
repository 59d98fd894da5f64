"""How near a student comes to its teacher, and how much faster it is at drawing.

The teacher is a MAF fitted to data, the student an IAF of the same sizes. Quality: KL(student || teacher) and the
sliced Wasserstein distance of 5,000 draws of each, beside that of two sets of draws of the teacher. Speed: one pass of
the student, the teacher's inverse, which computes each hidden unit once, and D passes of the teacher's network, in turn
in one process.

    python -m benchmarks.distillation quality --data simulated-16 simulated-32 simulated-64 digits-64
    python -m benchmarks.distillation speed --dim 64
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import pyroflows as pf

HIDDEN_DIMS = (64, 64)
NUM_LAYERS = 5
NUM_DRAWS = 5000
NUM_PAIRS = 20
NUM_DIRECTIONS = 500
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)


def simulated(dim: int, num_rows: int = 20_000) -> Tensor:
    """Linear factors, bent and with noise whose size depends on a neighbour: no Gaussian, and no product."""
    generator = torch.Generator().manual_seed(1)
    loadings = torch.randn(dim, dim // 4, generator=generator) / (dim // 4) ** 0.5
    linear = torch.randn(num_rows, dim // 4, generator=generator) @ loadings.T
    bent = linear + 0.5 * torch.sin(2 * linear.roll(1, -1))
    noise = torch.randn(num_rows, dim, generator=generator)
    return bent + (0.2 + 0.3 * torch.sigmoid(2 * linear.roll(2, -1))) * noise


def digits(dim: int) -> Tensor:
    """Images of 8 x 8 pixels, dequantised, on the logit scale."""
    counts = torch.tensor(load_digits().data[:, :dim], dtype=torch.float32)
    shares = (counts + torch.rand(counts.shape, generator=torch.Generator().manual_seed(1))) / 17
    return torch.logit(0.02 + 0.96 * shares)


DATA = {"simulated": simulated, "digits": digits}


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """Root mean square, over directions, of the distance of order 2 between the projections."""
    directions = torch.randn(a.shape[1], NUM_DIRECTIONS, generator=torch.Generator().manual_seed(2))
    directions = directions / directions.norm(dim=0)
    gaps = (a @ directions).sort(0).values - (b @ directions).sort(0).values
    return gaps.square().mean().sqrt().item()


def quality(data: str, seed: int, **options: float) -> None:
    kind, dim = data.split("-")
    x = DATA[kind](int(dim))
    torch.manual_seed(seed)
    teacher = pf.flows.MAF(x.shape[1], NUM_LAYERS, HIDDEN_DIMS)
    fit = pf.fit_density(teacher, x, max_epochs=100, seed=seed, progress_bar=False)
    student = pf.flows.IAF(x.shape[1], NUM_LAYERS, HIDDEN_DIMS)
    start = time.process_time()
    distilled = pf.distill(student, teacher, seed=seed, progress_bar=False, **options)
    seconds = time.process_time() - start
    torch.manual_seed(seed + 1)
    unit = teacher().sample((NUM_DRAWS,)).std(0)
    draws = {flow: [flow().sample((NUM_DRAWS,)) / unit for _ in range(NUM_PAIRS)] for flow in (teacher, student)}
    others = [teacher().sample((NUM_DRAWS,)) / unit for _ in range(NUM_PAIRS)]
    same = [sliced_wasserstein(*pair) for pair in zip(draws[teacher], others, strict=True)]
    apart = [sliced_wasserstein(*pair) for pair in zip(draws[student], others, strict=True)]
    ratio = statistics.median(apart) / statistics.median(same)
    sds = [torch.cat(draws[flow]).quantile(torch.tensor([0.16, 0.84]), 0).diff(dim=0) for flow in (student, teacher)]
    print(
        f"{data:13} seed {seed}: teacher {fit.best_log_prob:.2f} nats a held-out row; {distilled}; {seconds:.0f} s; "
        f"sliced Wasserstein {statistics.median(apart):.4f} ({min(apart):.4f} to {max(apart):.4f}), teacher to itself "
        f"{statistics.median(same):.4f}: ratio {ratio:.2f}; student's sd to teacher's {(sds[0] / sds[1]).median():.3f}",
        flush=True,
    )


@torch.no_grad()
def speed(dim: int, rounds: int) -> None:
    teacher = pf.flows.MAF(dim, NUM_LAYERS, HIDDEN_DIMS)
    student = pf.flows.IAF(dim, NUM_LAYERS, HIDDEN_DIMS)
    print("  batch   student ms   teacher / student   D passes / student")
    for batch in BATCHES:

        def d_passes(batch: int = batch) -> None:
            x = torch.zeros(batch, dim)
            for _ in range(dim):
                teacher.transform.inverse_and_ladj(x)

        ways: dict[str, Callable[[], object]] = {
            "student": lambda: student().sample((batch,)),  # noqa: B023
            "teacher": lambda: teacher().sample((batch,)),  # noqa: B023
            "passes": d_passes,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                count = 20 if batch <= 64 and name != "passes" else 2
                start = time.perf_counter()
                for _ in range(count):
                    way()
                times[name].append((time.perf_counter() - start) / count)
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        ratios = [medians[name] / medians["student"] for name in ("teacher", "passes")]
        print(f"{batch:7} {1e3 * medians['student']:12.2f} {ratios[0]:19.1f} {ratios[1]:20.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["quality", "speed"])
    parser.add_argument("--data", nargs="+", default=["simulated-16", "simulated-32", "simulated-64", "digits-64"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--regression", type=float, default=2.0)
    parser.add_argument("--warm-start", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, {args.threads} thread(s)"
    )
    if args.part == "speed":
        speed(args.dim, args.rounds)
        return
    for data in args.data:
        for seed in range(args.seeds):
            quality(data, seed, regression=args.regression, warm_start=args.warm_start)


if __name__ == "__main__":
    main()

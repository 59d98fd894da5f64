"""One training step that sees 64 rows of a plate, for plates of different sizes.

The model is a hierarchy of Gaussians. The latents of rows are given by an encoder, or have parameters of their own; the
rows are drawn from all data, or come from a ``DataLoader``. All run in turn in one process. The ratios are of equal
steps at different numbers of rows. Setting up, and the largest memory of the process, are told of each alone, in a
process of its own.

    python -m benchmarks.minibatches --rounds 7 --rows 1000 100000 --particles 128
    python -m benchmarks.minibatches --setup 1000000 learned
"""

import argparse
import platform
import resource
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyroflows as pf
from benchmarks.timing import in_turn, milliseconds, ratio
from pyroflows.guides.structured import AutoStructuredFlow
from pyroflows.training.loop import Trainer

BATCH = 64
KINDS = ["encoder", "learned", "encoder, loader", "learned, loader"]


class Reads(nn.Module):
    """The features of a row are its observation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 4)

    def forward(self, rows: Tensor, *data: Tensor) -> Tensor:
        y = data[-1]
        return self.net((y[rows] if len(data) == 1 else y)[:, None])


def of_all(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(y), subsample_size=BATCH) as rows:
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def of_batch(num_rows: int) -> Callable[[Tensor, Tensor], None]:
    def model(rows: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("rows", num_rows, subsample=rows):
            z = pyro.sample("z", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return model


class Ready(Exception):
    """Ends a fit before its first step."""


def fit(kind: str, num_rows: int, num_particles: int | None) -> Trainer:
    """The trainer of a fit that is set up."""
    torch.manual_seed(0)
    y = 1.0 + 1.4 * torch.randn(num_rows)
    has_loader = kind.endswith("loader")
    model = of_batch(num_rows) if has_loader else of_all
    guide = AutoStructuredFlow(model, encoder=Reads() if kind.startswith("encoder") else None)
    data = DataLoader(TensorDataset(torch.arange(num_rows), y), batch_size=BATCH, shuffle=True) if has_loader else y
    found = []

    def run(trainer: Trainer) -> None:
        found.append(trainer)
        raise Ready

    original, Trainer.run = Trainer.run, run
    try:
        pf.FlowVI(model, guide, num_particles=num_particles, num_steps=10**6, progress_bar=False, seed=0).run(data)
    except Ready:
        pass
    finally:
        Trainer.run = original
    return found[0]


def step_of(trainer: Trainer, stack: ExitStack) -> Callable[[], None]:
    stack.enter_context(trainer._step.flattened())
    return lambda: trainer._take_step(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=20, help="steps in a round")
    parser.add_argument("--particles", type=int, help="draws a step; the default of the fit, 16, unless given")
    parser.add_argument("--setup", nargs=2, metavar=("ROWS", "KIND"), help="set up alone, and tell time and memory")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if args.setup:
        num_rows, kind = int(args.setup[0]), args.setup[1]
        before, start = peak(), time.perf_counter()
        fit(kind, num_rows, args.particles)
        print(f"{kind}, {num_rows} rows: set up in {time.perf_counter() - start:.1f} s, {peak() - before:.0f} MiB more")
        return
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {args.threads} threads")
    with ExitStack() as stack, pyro.validation_enabled(False):
        contenders = {
            f"{kind}, {n}": step_of(fit(kind, n, args.particles), stack) for kind in args.kinds for n in args.rows
        }
        times = in_turn(contenders, args.rounds, args.repeats)
    print(f"{'':20}" + "".join(f"{n:>12} rows" for n in args.rows) + f"{'ratio':>10}")
    for kind in args.kinds:
        names = [f"{kind}, {n}" for n in args.rows]
        line = "".join(f"{milliseconds(times[name]):>14} ms" for name in names)
        print(f"{kind:20}{line}{ratio(times, names[-1], names[0]):>10.2f}")


def peak() -> float:
    """The largest memory of the process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

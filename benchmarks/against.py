"""This checkout beside another one of the project, task by task and in turn: what a change made faster or slower.

Each checkout has a process of its own, on one thread, which imports ``pyroflows`` from there; models, data and tasks
are those of this file for both. A task runs once unmeasured in each process and then in turn, in every other round in
the reverse order. Both have the same seed, another one in each round.

    python -m benchmarks.against OTHER_CHECKOUT --path FOLDER [--tasks eight_schools maf] [--rounds 5]

The folder holds reference posteriors, see :mod:`benchmarks.posteriordb.run`. A ratio is the median over the rounds of
the other checkout's seconds to this one's: where it is above 1, this one is faster. Seconds are those of a processor,
but for one column. Where training stops by itself, a seed may lead two versions to different numbers of steps; so
there is a ratio of seconds a step as well, in which set-up and verdict are counted.
"""

import argparse
import gc
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from multiprocessing import get_context
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.posteriordb import reference
from benchmarks.posteriordb.models import TARGETS, Target

POSTERIORS = ("eight_schools", "gp_pois_regr", "hmm_example")
COLUMNS = ("task", "other s", "this s", "ratio", "by the clock", "other steps", "this steps", "ratio a step")

Run = Callable[[int], int | None]  # takes a seed; returns the number of training steps where it is not fixed


class FirstStep(Exception):
    """Training has come to its first step."""


class StopsAtFirstStep(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        raise FirstStep


def problem(folder: Path, name: str) -> tuple[Target, tuple[Any, ...]]:
    """A posterior, by the first part of its name, and the arguments of its model."""
    (full_name,) = (key for key in TARGETS if key.startswith(f"{name}-"))
    return TARGETS[full_name], TARGETS[full_name].args(reference.load(folder, full_name).data)


def flow_vi(pf: Any, folder: Path, name: str) -> Run:
    """A fit with default settings, and its verdict."""
    target, args = problem(folder, name)

    def run(seed: int) -> int:
        with target.default_dtype():
            posterior = pf.FlowVI(target.model, seed=seed, progress_bar=False).run(*args)
            posterior.diagnose()
        return posterior.history.num_steps

    return run


def first_step(pf: Any, folder: Path) -> Run:
    """From the call of a fit of eight schools to the first step of its training."""
    target, args = problem(folder, "eight_schools")

    def run(seed: int) -> None:
        vi = pf.FlowVI(target.model, optimizer=StopsAtFirstStep, gate=False, seed=seed, progress_bar=False)
        with suppress(FirstStep):
            vi.run(*args)
            raise RuntimeError("the fit ended without a step of the optimizer that it was given")

    return run


def weighted_draws(pf: Any, folder: Path) -> Run:
    """Draws of a fit of eight schools, with Pareto-smoothed weights."""
    target, args = problem(folder, "eight_schools")
    posterior = pf.FlowVI(target.model, seed=0, progress_bar=False).run(*args)

    def run(seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(5):  # a single set is drawn too quickly to be timed well
            posterior.importance_sample(100_000)

    return run


def rows(dim: int) -> Tensor:
    """Rows with a banana in each pair of columns."""
    x = torch.randn(5000, dim, generator=torch.Generator().manual_seed(0))
    x[:, 1::2] = 0.5 * x[:, 1::2] + x[:, ::2].square()
    return x


def density(pf: Any, _: Path, recipe: str) -> Run:
    """A fixed number of epochs at 6 dimensions."""

    def run(seed: int) -> None:
        torch.manual_seed(seed)
        flow = getattr(pf.flows, recipe)(6)
        pf.fit_density(flow, rows(6), max_epochs=30, patience=30, seed=seed, progress_bar=False)

    return run


def distillation(pf: Any, _: Path) -> Run:
    """A fixed number of steps, after as many of regression, from a MAF to an IAF of 16 dimensions."""
    torch.manual_seed(0)
    teacher = pf.flows.MAF(16)
    pf.fit_density(teacher, rows(16), max_epochs=5, seed=0, progress_bar=False)

    def run(seed: int) -> None:
        torch.manual_seed(seed)
        pf.distill(pf.flows.IAF(16), teacher, num_steps=200, warm_start=200, seed=seed, progress_bar=False)

    return run


TASKS: dict[str, Callable[[Any, Path], Run]] = {
    **{name: partial(flow_vi, name=name) for name in POSTERIORS},
    "first_step": first_step,
    "maf": partial(density, recipe="MAF"),
    "nsf": partial(density, recipe="NSF"),
    "distillation": distillation,
    "weighted_draws": weighted_draws,
}


@cache
def prepared(checkout: Path, folder: Path, task: str) -> Run:
    """A task with the package of a checkout, the only one of this process."""
    sys.path.insert(0, str(checkout))
    pf = import_module("pyroflows")
    if not Path(str(pf.__file__)).is_relative_to(checkout):
        raise ImportError(f"{checkout} holds no package pyroflows: give the root of a checkout")
    import_module("torch._dynamo")  # what torch's optimizers import at their first step
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    return TASKS[task](pf, folder)


def measured(checkout: Path, folder: Path, task: str, seed: int) -> tuple[float, float, int | None]:
    """Seconds of a processor and by the clock, and steps; this runs in the process of the checkout."""
    run = prepared(checkout, folder, task)
    gc.collect()
    start, cpu_start = time.perf_counter(), time.process_time()
    steps = run(seed)
    return time.process_time() - cpu_start, time.perf_counter() - start, steps


def compared(other: list[tuple], this: list[tuple]) -> dict[str, float]:
    """Medians over the rounds, by column."""
    (seconds, clock, steps), (own_seconds, own_clock, own_steps) = zip(*other, strict=True), zip(*this, strict=True)

    def ratio(a: Iterable[float], b: Iterable[float]) -> float:
        return statistics.median(map(truediv, a, b))

    found = {"other s": statistics.median(seconds), "this s": statistics.median(own_seconds)}
    found |= {"ratio": ratio(seconds, own_seconds), "by the clock": ratio(clock, own_clock)}
    if all(steps) and all(own_steps):
        found |= {"other steps": statistics.median(steps), "this steps": statistics.median(own_steps)}
        found["ratio a step"] = ratio(map(truediv, seconds, steps), map(truediv, own_seconds, own_steps))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    folder = os.environ.get("PYROFLOWS_POSTERIORDB")
    parser.add_argument("--path", type=Path, default=folder, required=folder is None, help="reference posteriors")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    options = parser.parse_args()
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, one thread each\n")
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    a_process = partial(ProcessPoolExecutor, max_workers=1, mp_context=get_context("spawn"))
    with a_process() as other, a_process() as this:
        checkouts = {other: options.other.resolve(), this: Path(__file__).resolve().parents[1]}
        for task in options.tasks:
            results: dict[ProcessPoolExecutor, list[tuple]] = {other: [], this: []}
            for seed in (0, *range(options.rounds)):
                for pool in (this, other) if seed % 2 else (other, this):
                    results[pool].append(pool.submit(measured, checkouts[pool], options.path, task, seed).result())
            found = compared(*(rounds[1:] for rounds in results.values()))  # without the warm-up
            cells = [f"{found[c]:.{0 if 'steps' in c else 2}f}" if c in found else "" for c in COLUMNS[1:]]
            print("| " + " | ".join([task, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()

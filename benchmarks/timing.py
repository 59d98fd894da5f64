"""Times of several contenders in turn in one process, so that each meets the same load of the machine."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.compiling import Compiler
from pyroflows.fitting.maximum_likelihood import MaximumLikelihood
from pyroflows.training.data import load
from pyroflows.training.step import Step


def recorded_step(flow: pf.Flow, x: Tensor, stack: ExitStack) -> Callable[[], None]:
    """Return the step that ``fit_density`` makes by default, which also draws the rows of its batch."""
    objective = MaximumLikelihood(flow, load(flow, x), torch.arange(len(x)), len(x))
    step = Step(objective, Compiler("trace"))
    stack.enter_context(step.flattened())
    optimizer = torch.optim.Adam(step.parameters, lr=1e-4, fused=True)

    def run() -> None:
        step()
        optimizer.step()

    return run


def seconds(run: Callable[[], None], repeats: int = 1) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def in_turn(contenders: dict[str, Callable[[], None]], rounds: int, repeats: int) -> dict[str, list[float]]:
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(seconds(run, repeats))
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def milliseconds(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e3:.2f}"

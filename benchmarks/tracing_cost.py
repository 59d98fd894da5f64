"""What it costs to record a long loop of a model, and from how many steps of training on it pays.

A time series whose state moves in a Python loop, as an ODE or a filter does, for 64 draws at once: seconds to record
and compile the log joint with its gradient, milliseconds of a call with and without, and seconds that ``make_fx`` takes
for the recording alone.

    python -m benchmarks.tracing_cost --lengths 100 1000 3000
"""

import argparse
import platform
import time
import warnings
from collections.abc import Callable

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflows.compiling.check import Compiler
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe

NUM_DRAWS = 64


def model(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    state, states = torch.zeros_like(rate), []
    for _ in range(len(y)):
        state = state + 0.1 * torch.tanh(level - rate * state)
        states.append(state)
    pyro.sample("y", dist.Normal(torch.stack(states, -1), 1.0).to_event(1), obs=y)


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def measure(length: int) -> str:
    args = (torch.randn(length),)
    layout = Layout(describe(model, args, {}))
    vectors = 0.1 * torch.randn(NUM_DRAWS, layout.dim)
    eager = LogJoint(model, args, {}, layout, vectors[:5]).value_and_grad(vectors)
    compiler = LogJoint(model, args, {}, layout, vectors[:5], Compiler("trace"))
    start = time.perf_counter()
    compiled = compiler.value_and_grad(vectors)
    compiled(vectors)
    compile_time = time.perf_counter() - start
    with pyro.validation_enabled(False):
        make_fx_time = seconds(lambda: make_fx(eager)(vectors))
    eager_time, compiled_time = seconds(lambda: eager(vectors), 5), seconds(lambda: compiled(vectors), 5)
    pays_after = compile_time / (eager_time - compiled_time)
    cells = (
        f"{length}",
        f"{compile_time:.2f}",
        f"{make_fx_time:.1f}",
        f"{1e3 * eager_time:.1f}",
        f"{1e3 * compiled_time:.1f}",
        f"{pays_after:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, one thread\n")
    print("| steps of the loop | compile, s | make_fx alone, s | call, ms | compiled call, ms | pays after, calls |")
    print("|---|---|---|---|---|---|")
    measure(10)  # imports
    for length in args.lengths:
        print(measure(length), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1000, 3000])
    main(parser.parse_args())

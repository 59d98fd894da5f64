"""Continuous flows beside Zuko's, and trained by flow matching beside maximum likelihood.

The network has hidden widths (64, 64), the trace is exact, and tolerances are 1e-5 unless said otherwise; Zuko lets
log-determinants have a hundred times the error. Laws are two moons, and chains of conditionals of other dimensions. The
last part has widths (64, 64, 64), and laws of the examples beside the chain.

    python -m benchmarks.continuous speed         # training step, log_prob and sample beside Zuko
    python -m benchmarks.continuous likelihood    # log-likelihood after equal numbers of steps beside Zuko
    python -m benchmarks.continuous matching      # flow matching beside maximum likelihood, default settings

Needs zuko beside the project's own requirements.
"""

import argparse
import copy
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zuko
from torch import Tensor, nn

import pyroflows as pf
from benchmarks.density_quality import Chain, Moons
from benchmarks.timing import in_turn, milliseconds, ratio, recorded_step
from pyroflows.transforms.continuous import Evaluations

BATCH = 256
HIDDEN_DIMS = (64, 64)
TOLERANCE = 1e-5
# Steps of training before times are taken, so that the fields are about as hard to solve.
NUM_STEPS_BEFORE = 100
NUM_HELD_OUT = 10_000
NUM_FIXED_STEPS = 8
OURS, FIXED, RECORDED = "pyroflows", f"{NUM_FIXED_STEPS} steps of rk4", "recorded"
MATCHED_DIMS = (64, 64, 64)
MATCHED_DATA = ["moons", "checkerboard", "pinwheel", "chain"]
MATCHING, LIKELIHOOD, ADAPTIVE = "flow matching", "likelihood", "likelihood, adaptive steps"
ZUKO, ZUKO_DEFAULTS = "zuko", "zuko, its defaults"

Data = Moons | Chain


def law(dim: int) -> Data:
    if dim == 2:
        return Moons()
    chain = Chain()
    chain.dim = dim
    return chain


def flows(dim: int) -> dict[str, nn.Module]:
    return {
        ZUKO: zuko.flows.CNF(dim, hidden_features=HIDDEN_DIMS, activation=nn.SiLU, atol=TOLERANCE, rtol=TOLERANCE),
        ZUKO_DEFAULTS: zuko.flows.CNF(dim, hidden_features=HIDDEN_DIMS),
        OURS: pf.flows.CNF(dim, HIDDEN_DIMS, tolerance=TOLERANCE, num_steps=None),
        FIXED: pf.flows.CNF(dim, HIDDEN_DIMS, num_steps=NUM_FIXED_STEPS),
    }


def training_log_prob(flow: nn.Module, x: Tensor) -> Tensor:
    """Return log-densities as training takes them, which for our fixed steps are inexact."""
    return flow().estimated().log_prob(x) if isinstance(flow, pf.Flow) else flow().log_prob(x)


def training_step(flow: nn.Module, draw: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (-training_log_prob(flow, draw()).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()

    return step


def set_exact(flow: nn.Module, is_exact: bool) -> None:
    """Let Zuko's flow have the exact trace or its estimate; ours stays exact."""
    if not isinstance(flow, pf.Flow):
        flow.transform.exact = is_exact


def evaluations(flow: nn.Module, run: Callable[[], Any]) -> int:
    """Count the evaluations of the network in a call; Zuko's backward pass evaluates it again."""
    if isinstance(flow, pf.Flow):
        with Evaluations() as count:
            run()
        return count.total
    counter, field = 0, flow.transform.f

    def counted(*args: Any, **keywords: Any) -> Tensor:
        nonlocal counter
        counter += 1
        return field(*args, **keywords)

    flow.transform.f = counted
    run()
    del flow.transform.f
    return counter


@torch.no_grad()
def scored(flow: nn.Module, x: Tensor) -> None:
    flow().log_prob(x)


@torch.no_grad()
def sampled(flow: nn.Module) -> None:
    flow().sample((BATCH,))


def speed(args: argparse.Namespace) -> None:
    print("| D | log q | task | library | evaluations | ms | times as fast as zuko |\n|---|---|---|---|---|---|---|")
    for dim in args.dims:
        data, members = law(dim), flows(dim)
        x = data.sample(BATCH)
        steps = {name: training_step(flow, partial(data.sample, BATCH)) for name, flow in members.items()}
        for name, step in steps.items():
            # The estimate of the trace is enough here, and the trace takes Zuko minutes in many dimensions.
            set_exact(members[name], False)
            for _ in range(NUM_STEPS_BEFORE):
                step()
            set_exact(members[name], True)
        held_out = data.sample(NUM_HELD_OUT)
        with torch.no_grad():
            values = {name: f"{flow().log_prob(held_out).mean():.2f}" for name, flow in members.items()}
        tasks = {
            "training step": {name: training_step(flow, lambda x=x: x) for name, flow in members.items()},
            "log_prob": {name: partial(scored, flow, x) for name, flow in members.items()},
            "sample": {name: partial(sampled, flow) for name, flow in members.items()},
        }
        for task, runs in tasks.items():
            if task != "training step":
                del runs[FIXED]  # which reports adaptive solves
            counts = {name: evaluations(members[name], run) for name, run in runs.items()}
            with ExitStack() as stack:
                if FIXED in runs:
                    runs[RECORDED] = recorded_step(copy.deepcopy(members[FIXED]), x, stack)
                times = in_turn(runs, args.rounds, args.repeats)
            for name in runs:
                row = [dim, values.get(name, ""), task, name, counts.get(name, ""), milliseconds(times[name])]
                print("|", " | ".join(map(str, [*row, f"{ratio(times, ZUKO, name):.2f}"])), "|", flush=True)


def likelihood(args: argparse.Namespace) -> None:
    print(f"{args.steps} steps of {BATCH} fresh rows, the same for all, and a cosine schedule\n")
    print("| D | library | log p - log q, nats | by seed | s |\n|---|---|---|---|---|")
    for dim in args.dims:
        data = law(dim)
        for name in flows(dim):
            found = [trained_gap(data, name, args.steps, seed) for seed in args.seeds]
            gaps, times = zip(*found, strict=True)
            by_seed = " ".join(f"{gap:.3f}" for gap in gaps)
            print(f"| {dim} | {name} | {statistics.mean(gaps):.3f} | {by_seed} | {min(times):.0f} |", flush=True)


def trained_gap(data: Data, name: str, num_steps: int, seed: int) -> tuple[float, float]:
    """Return the mean of log p - log q over held-out rows after training, and the seconds of training."""
    torch.manual_seed(seed)
    flow = flows(data.dim)[name]
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    torch.manual_seed(seed)
    start = time.process_time()
    for _ in range(num_steps):
        optimizer.zero_grad()
        (-training_log_prob(flow, data.sample(BATCH)).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    torch.manual_seed(10_000 + seed)
    x = data.sample(NUM_HELD_OUT)
    with torch.no_grad():
        return (data.log_prob(x) - flow().log_prob(x)).mean().item(), seconds


def example(name: str) -> Any:
    """Return an example as a module, for its laws."""
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows(name: str, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Return rows to fit and held-out rows."""
    torch.manual_seed(seed)
    if name == "chain":
        return Chain().sample(count), Chain().sample(NUM_HELD_OUT)
    if name == "pinwheel":
        draw = example("flow_matching").draw_pinwheel
        return draw(count, 5), draw(NUM_HELD_OUT, 5)
    rng = np.random.default_rng(seed)
    shape = example("density_2d").SHAPES[name]
    return tuple(torch.as_tensor(shape(n, rng), dtype=torch.float32) for n in (count, NUM_HELD_OUT))


def matching(args: argparse.Namespace) -> None:
    """Print held-out log-likelihoods and times of fits of the same flow."""
    # The first fit of a process imports what records steps, which would be counted for the first way alone.
    pf.fit_flow_matching(pf.flows.CNF(1), torch.randn(100, 1), max_epochs=1, progress_bar=False)
    print(f"{args.rows} rows, seed {args.seeds[0]}, hidden widths {MATCHED_DIMS}\n")
    print("| data | trained by | log q held out | epochs | s | as good as flow matching after, s | times its time |")
    print("|---|---|---|---|---|---|---|")
    for name in args.data:
        x, held_out = rows(name, args.seeds[0], args.rows)
        first = None
        for way in args.ways:
            torch.manual_seed(args.seeds[0])
            flow = pf.flows.CNF(x.shape[1], MATCHED_DIMS, num_steps=None if way == ADAPTIVE else NUM_FIXED_STEPS)
            fit = pf.fit_flow_matching if way == MATCHING else partial(pf.fit_density, max_epochs=args.epochs)
            start = time.process_time()
            found = fit(flow, x, seed=args.seeds[0], progress_bar=False)
            seconds = time.process_time() - start
            with torch.no_grad():
                row = [name, way, f"{flow().log_prob(held_out).mean():.3f}", found.history.num_steps, f"{seconds:.1f}"]
            if first is None:
                first = found, seconds
                row += ["", ""]
            else:
                row += [passing(found, first[0].best_log_prob, seconds), f"{seconds / first[1]:.1f}"]
            print("|", " | ".join(map(str, row)), "|", flush=True)


def passing(found: pf.DensityFit, value: float, seconds: float) -> str:
    """Return the time after which the log-density of the validation rows, the same in both fits, was above a value."""
    above = np.flatnonzero(np.asarray(found.history["validation_log_prob"]) > value)
    return f"{seconds * (above[0] + 1) / found.history.num_steps:.0f}" if len(above) else "never"


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.distributions.Distribution.set_default_validate_args(False)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, zuko {zuko.__version__}; ", end="")
    print(f"{args.threads} thread(s)\n")
    torch.manual_seed(0)
    {"speed": speed, "likelihood": likelihood, "matching": matching}[args.part](args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["speed", "likelihood", "matching"])
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 6, 16, 43])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="calls a round")
    parser.add_argument("--steps", type=int, default=400, help="of likelihood")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--data", nargs="+", default=MATCHED_DATA, help="of matching")
    parser.add_argument("--rows", type=int, default=5000, help="of matching, with a tenth of them for validation")
    parser.add_argument("--epochs", type=int, default=500, help="of maximum likelihood, at most")
    parser.add_argument("--ways", nargs="+", default=[MATCHING, LIKELIHOOD], metavar="WAY", help="of matching, in turn")
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())

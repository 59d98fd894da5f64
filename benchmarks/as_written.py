"""How long fits of models take that are written for one draw, beside the same models written for many draws at once.

    python -m benchmarks.as_written --rounds 5 --num-steps 200

Both are fitted by turns in one process, after a fit of each that is not counted. What is printed is the way in which
each runs, the median of the processor's seconds, and the median of the ratios.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

import pyroflows as pf

torch.manual_seed(0)
X, GRADES = torch.randn(300, 3), torch.randint(0, 4, (300,))
SERIES, ROWS = torch.randn(60), torch.randn(200)
AGES = torch.where(torch.rand(60) < 0.3, torch.nan, torch.randn(60))
GRID = torch.linspace(-1, 1, 200)


def ordinal_regression(many: bool) -> None:
    slopes = pyro.sample("slopes", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    ordered = dist.TransformedDistribution(
        dist.Normal(0.0, 2.0).expand([3]).to_event(1), [dist.transforms.OrderedTransform()]
    )
    cuts = pyro.sample("cuts", ordered)
    predictor = (X * slopes).sum(-1) if many else X @ slopes
    with pyro.plate("row", len(X)):
        pyro.sample("grade", dist.OrderedLogistic(predictor, cuts), obs=GRADES)


def hidden_markov_model(many: bool) -> None:
    rows = pyro.sample("rows", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    means = pyro.sample("means", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
    logits, at = (rows.log().unsqueeze(-3), means.unsqueeze(-2)) if many else (rows.log(), means)
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), logits, dist.Normal(at, 1.0), duration=60), obs=SERIES)


def missing_values(many: bool) -> None:
    is_missing = AGES.isnan()
    missing = pyro.sample("missing", dist.Normal(0.0, 1.0).expand([int(is_missing.sum())]).to_event(1))
    if many:
        shape = missing.shape[:-1] + AGES.shape
        full = torch.zeros(shape).masked_scatter(is_missing.expand(shape), missing) + AGES.nan_to_num()
    else:
        full = AGES.clone()
        full[is_missing] = missing
    with pyro.plate("row", len(AGES)):
        pyro.sample("y", dist.Normal(full, 1.0), obs=torch.zeros(len(AGES)))


def autoregression(many: bool) -> None:
    slope = pyro.sample("slope", dist.Normal(0.5, 0.2))
    state = pyro.sample("state", dist.Normal(0.0, 1.0))
    if many:
        states = [state]
        for _ in range(1, len(SERIES)):
            states.append(slope * states[-1] + 0.1 * state)
        path = torch.stack(states, -1)
    else:
        path = torch.zeros(len(SERIES))
        path[0] = state
        for t in range(1, len(SERIES)):
            path[t] = slope * path[t - 1] + 0.1 * state
    with pyro.plate("time", len(SERIES)):
        pyro.sample("y", dist.Normal(path, 1.0), obs=SERIES)


def branch(many: bool) -> None:
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))

    def rising(a: Tensor, b: Tensor) -> Tensor:
        return a * GRID + b

    def other(a: Tensor, b: Tensor) -> Tensor:
        return b * GRID.exp() - a.abs()

    if many:
        a, b = a[..., None], b[..., None]
        mean = torch.where(a > 0, rising(a, b), other(a, b))
    else:
        mean = rising(a, b) if a > 0 else other(a, b)
    with pyro.plate("row", len(GRID)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=ROWS)


def seconds(model: Callable[[bool], Any], many: bool, num_steps: int) -> tuple[float, str]:
    start = time.process_time()
    posterior = pf.FlowVI(model, seed=0, num_steps=num_steps, progress_bar=False).run(many)
    return time.process_time() - start, posterior.log_joint.batched.mode


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}\n")
    print("| model | as written | for many draws | ratio |\n|---|---|---|---|")
    for model in (ordinal_regression, hidden_markov_model, missing_values, autoregression, branch):
        ways = {many: seconds(model, many, options.num_steps)[1] for many in (False, True)}
        rounds = [[seconds(model, many, options.num_steps)[0] for many in (False, True)] for _ in range(options.rounds)]
        written, batched = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(first / second for first, second in rounds)
        name = model.__name__.replace("_", " ")
        print(f"| {name} | {ways[False]}, {written:.2f} s | {ways[True]}, {batched:.2f} s | {ratio:.2f} |", flush=True)

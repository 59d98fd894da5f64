"""What the default recipe of FlowVI rests on: one thing changed at a time, on posteriors that no Gaussian fits.

Besides posteriordb's and two synthetic ones these are middle-sized hierarchies, simulated, of :mod:`.hierarchies`.

For each variant and posterior: variance of the log weights (about twice the KL divergence; "good" is at most 0.1), and
seconds of a processor for the fit. Gates are off.

    python -m benchmarks.recipe --path FOLDER [--targets ...] [--variants ...] [--seeds 0 1]

The folder holds reference posteriors, see :mod:`benchmarks.posteriordb.run`.
"""

import argparse
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import arviz  # noqa: F401  (imports are no part of a fit)
import torch
import torch._dynamo  # what torch's optimizers import at their first step

import pyroflows as pf
from benchmarks import synthetic
from benchmarks.hierarchies import data, models
from benchmarks.posteriordb import reference
from benchmarks.posteriordb.models import TARGETS, Target
from pyroflows import flows

POSTERIORS = ("eight_schools", "garch", "gp_pois", "hmm_example", "mesquite")
SYNTHETIC = ("banana", "funnel")
HIERARCHIES = ("radon", "items", "volatility", "cox_process")


def iaf(dim: int, num_layers: int = 4, width: int = 32) -> flows.Flow:
    return flows.IAF(dim, num_layers, (width, width))


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "chosen by FlowVI": {"guide": None, "gate": False},
    "total gradient": {"estimator": "total"},
    "DReG": {"estimator": "dreg"},
    "VarGrad": {"estimator": "vargrad"},
    "64 particles": {"num_particles": 64},
    "512 particles": {"num_particles": 512},
    "learning rate 0.003": {"optimizer": partial(torch.optim.Adam, lr=3e-3, fused=True)},
    "learning rate 0.03": {"optimizer": partial(torch.optim.Adam, lr=3e-2, fused=True)},
    "2 layers": {"guide": partial(iaf, num_layers=2)},
    "8 layers": {"guide": partial(iaf, num_layers=8)},
    "width 64": {"guide": partial(iaf, width=64)},
    "RealNVP": {"guide": lambda dim: flows.RealNVP(dim, 6, (64, 64))},
    "NSF, coupling": {"guide": lambda dim: flows.NSF(dim, 4, (32, 32))},
    "one start": {"num_starts": 1},
    "no whitening": {"guide": "plain"},
}


def problems(path: Path, names: list[str]) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any]]:
    """Model, arguments and default dtype by name."""
    found = {}
    for part in POSTERIORS:
        (name,) = (name for name in TARGETS if part in name)
        target = TARGETS[name]
        found[part] = target.model, target.args(reference.load(path, name).data), target.default_dtype
    for name in SYNTHETIC:
        found[name] = synthetic.TARGETS[name].model, (), nullcontext
    for name in HIERARCHIES:
        dtype = torch.float64 if name in data.IN_FLOAT64 else torch.float32
        target = Target(partial(models.model(name), **models.arguments(name)), lambda _: (), dtype)
        found[name] = target.model, (), target.default_dtype
    return {name: problem for name, problem in found.items() if not names or name in names}


def fit(
    problem: tuple[Callable[..., Any], tuple[Any, ...], Any], options: dict[str, Any], seed: int
) -> tuple[float, float]:
    """Variance of the log weights, and seconds."""
    model, args, default_dtype = problem
    options = {"guide": flows.Recipe("default"), **options}
    with default_dtype():
        if options["guide"] == "plain":
            options["guide"] = pf.guides.AutoIAF(model, num_layers=4, hidden_dims=(32, 32))
        start = time.process_time()
        try:
            posterior = pf.FlowVI(model, seed=seed, progress_bar=False, **options).run(*args)
            seconds = time.process_time() - start
            return posterior.diagnose().log_weight_variance, seconds
        except pf.DivergedError:
            return math.inf, time.process_time() - start


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    found = problems(args.path, args.targets)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, one thread, seeds {args.seeds}\n")
    print("| | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for name in args.variants:
        cells = []
        for problem in found.values():
            results = [fit(problem, VARIANTS[name], seed) for seed in args.seeds]
            variance, seconds = (statistics.median(values) for values in zip(*results, strict=True))
            cells.append(f"{variance:.3f} ({seconds:.1f} s)")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = os.environ.get("PYROFLOWS_POSTERIORDB")
    parser.add_argument("--path", type=Path, default=folder, required=folder is None, help="folder of posteriors")
    parser.add_argument("--targets", nargs="+", default=[], help="default: all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    main(parser.parse_args())

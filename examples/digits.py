"""Handwritten digits: a density of 64 dimensions, given the class.

The 8 x 8 digits of scikit-learn have 17 grey levels, which no density can be fitted to as they are: it would grow
without bound on the levels. Noise of one level's width, fresh in every batch (uniform dequantisation, Theis et al.
2016, arXiv:1511.01844), makes them continuous, and the log-density a lower bound of the log-probability of the levels.
The flow's support is the cube from 0 to 17; the class enters as a one-hot context. Prints bits per dimension of
held-out digits and how well the flow tells their classes apart, and saves a sheet of samples.

    python examples/digits.py
    python examples/digits.py --max-epochs 20 --layers 3
"""

import argparse
import math
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

import pyroflows as pf

LEVELS = 17
NUM_CLASSES = 10
NUM_HELD_OUT = 297
DPI = 120


def one_hot(classes: Tensor) -> Tensor:
    return F.one_hot(classes, NUM_CLASSES).float()


def log_probs(flow: pf.Flow, levels: Tensor, num_draws: int) -> Tensor:
    """Log-density of each digit under each class ``(n, classes)``, averaged over draws of the noise."""
    contexts = one_hot(torch.arange(NUM_CLASSES))
    # Not on the boundary, which rounding could otherwise reach.
    noise = torch.rand(num_draws, *levels.shape).clamp(1e-4, 1 - 1e-4)
    with torch.no_grad():
        draws = [flow(contexts).log_prob((levels + u)[:, None]) for u in noise]
    return torch.stack(draws).logsumexp(0) - math.log(num_draws)


def save_sheet(flow: pf.Flow, levels: Tensor, classes: Tensor, path: Path) -> None:
    """Held-out digits in the first three columns, samples in the others, a row a class."""
    num_real, num_samples = 3, 9
    with torch.no_grad():
        samples = flow(one_hot(torch.arange(NUM_CLASSES))).sample((num_samples,)).floor().transpose(0, 1)
    real = torch.stack([levels[classes == k][:num_real] for k in range(NUM_CLASSES)])
    sheet = torch.cat([_row_of(real), torch.zeros(NUM_CLASSES, 10, 6), _row_of(samples)], -1)
    figure, axes = plt.subplots(figsize=(6.6, 6.2), layout="constrained")
    axes.imshow(sheet.flatten(0, 1).numpy(), cmap="gray_r", vmin=0, vmax=LEVELS)
    axes.set_axis_off()
    axes.set_title("held-out digits (left) and samples given the class (right)")
    figure.savefig(path, dpi=DPI)


def _row_of(digits: Tensor) -> Tensor:
    """Digits ``(classes, n, 64)`` side by side, with a margin round each: ``(classes, 10, n * 10)``."""
    return F.pad(digits.unflatten(-1, (8, 8)), (1, 1, 1, 1)).transpose(1, 2).flatten(2)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    pixels, classes = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    levels, classes = pixels.float(), classes.long()
    order = torch.randperm(len(levels))
    held_out, kept = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]

    flow = pf.flows.MAF(
        levels.shape[1],
        num_layers=args.layers,
        hidden_dims=(256, 256),
        context_dim=NUM_CLASSES,
        support=constraints.interval(0.0, float(LEVELS)),
    )
    start = time.perf_counter()
    fit = pf.fit_density(
        flow,
        levels[kept],
        one_hot(classes[kept]),
        batch_size=128,
        max_epochs=args.max_epochs,
        dequantization="uniform",
        seed=args.seed,
        progress_bar=not args.no_progress_bar,
    )
    print(f"{fit}, {time.perf_counter() - start:.0f} s")

    bits = pf.bits_per_dim(flow, levels[held_out], LEVELS, one_hot(classes[held_out]), seed=args.seed)
    print(f"held-out digits: {bits:.3f} bits per dimension (raw levels: {math.log2(LEVELS):.2f})")
    scores = log_probs(flow, levels[held_out], num_draws=20)
    accuracy = (scores.argmax(1) == classes[held_out]).float().mean().item()
    print(f"the class of highest density is the right one for {accuracy:.1%} of them")

    args.output.mkdir(parents=True, exist_ok=True)
    sheet, curves = args.output / "digits_samples.png", args.output / "digits_training.png"
    save_sheet(flow, levels[held_out], classes[held_out], sheet)
    fit.plot().savefig(curves, dpi=DPI)
    print(f"saved {sheet}\nsaved {curves}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A class-conditional density of handwritten digits")
    parser.add_argument("--layers", type=int, default=5, help="of the flow (default: 5)")
    parser.add_argument("--max-epochs", type=int, default=60, help="passes over the data at most (default: 60)")
    parser.add_argument("--threads", type=int, default=2, help="of the processor (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the pictures (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())

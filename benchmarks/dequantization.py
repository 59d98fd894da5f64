"""Uniform and learned noise on integers: bits per dimension of held-out rows under the same density.

Three sets: pairs of equal bits, and counts of which the second grows with the first, whose entropy is known; and the
8 x 8 digits of scikit-learn in 17 levels, given their class, by convolutional couplings.

    python -m benchmarks.dequantization --seeds 2    # needs scikit-learn
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributions import Poisson

import pyroflows as pf
from pyroflows.transforms import Coupling, masks

NUM_SAMPLES = (1, 16, 64)


class Integers(NamedTuple):
    """Rows to fit and to score, their levels and contexts, a flow for them, and the bits that no density can beat."""

    training: Tensor
    held_out: Tensor
    levels: int
    contexts: tuple[Tensor | None, Tensor | None]
    make_flow: Callable[[], pf.Flow]
    entropy: float | None


def digits() -> Integers:
    pixels, classes = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    images, one_hot = pixels[order].reshape(-1, 1, 8, 8), torch.nn.functional.one_hot(classes[order].long()).float()
    board = masks.checkerboard(8, 8)

    def make_flow() -> pf.Flow:
        return pf.Flow(
            [
                Coupling((1, 8, 8), mask=mask, conditioner="conv", hidden_dims=(32, 32), context_dim=10)
                for mask in [board, ~board] * 3
            ]
        )

    return Integers(images[:1500], images[1500:], 17, (one_hot[:1500], one_hot[1500:]), make_flow, None)


def bits() -> Integers:
    x = torch.randint(2, (3000, 2), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    return Integers(x[:2000], x[2000:], 2, (None, None), lambda: pf.flows.NSF(4, num_layers=4), 0.5)


def counts() -> Integers:
    generator = torch.Generator().manual_seed(0)
    first = torch.poisson(torch.full((3000, 1), 4.0), generator=generator)
    x = torch.cat([first, torch.poisson(1.0 + first, generator=generator)], 1)
    k = torch.arange(80.0, dtype=torch.float64)
    joint = Poisson(torch.tensor(4.0)).log_prob(k)[:, None] + Poisson(1.0 + k[:, None]).log_prob(k)
    entropy = -(joint.exp() * joint).sum().item() / (2 * math.log(2))
    return Integers(x[:2000], x[2000:], 80, (None, None), lambda: pf.flows.NSF(2, num_layers=4), entropy)


def measure(data: Integers, is_learned: bool, seed: int, max_epochs: int) -> list[float]:
    """Fit a flow, and return the bits per dimension of held-out rows for each number of draws of the noise."""
    torch.manual_seed(seed)
    flow = data.make_flow()
    noise = pf.flows.Dequantizer(flow.event_shape) if is_learned else "uniform"
    fit = pf.fit_density(
        flow,
        data.training,
        data.contexts[0],
        dequantization=noise,
        max_epochs=max_epochs,
        seed=seed,
        progress_bar=False,
    )
    return [
        pf.bits_per_dim(flow, data.held_out, data.levels, data.contexts[1], fit.noise, count, seed=seed).item()
        for count in NUM_SAMPLES
    ]


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    print(f"{'data':8} {'noise':8}" + "".join(f"{f'{count} draws':>18}" for count in NUM_SAMPLES))
    for name, data in (("bits", bits()), ("counts", counts()), ("digits", digits())):
        for is_learned in (False, True):
            found = torch.tensor([measure(data, is_learned, seed, args.max_epochs) for seed in range(args.seeds)])
            columns = (f"{m:.3f} ± {s:.3f}" for m, s in zip(found.mean(0), found.std(0), strict=True))
            print(
                f"{name:8} {'learned' if is_learned else 'uniform':8}" + "".join(f"{c:>18}" for c in columns),
                flush=True,
            )
        if data.entropy is not None:
            print(f"{name:8} entropy {data.entropy:17.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Uniform and learned noise on integers")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (default: 2)")
    parser.add_argument("--max-epochs", type=int, default=30, help="passes over the data at most (default: 30)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    main(parser.parse_args())

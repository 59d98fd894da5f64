"""What an emerging convolution costs against the size of the image, beside a loop over its pixels.

Eight channels, a 3 x 3 kernel, images of 8 x 8 to 64 x 64. All run in turn in one process; milliseconds of the
processor, medians. The loop takes one product of matrices for each pixel and each of the two convolutions, on memory
that is laid out for it. The steps are with gradients, for the layer's input and all of its parameters.

    python -m benchmarks.emerging_cost --rounds 15 --threads 1
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.transforms import EmergingConv
from pyroflows.transforms.linear.lu import lu_factors

CHANNELS = 8
CONTEXT_DIM = 4
SIZES = (8, 16, 32, 64)


def layer(size: int, context_dim: int = 0) -> EmergingConv:
    """Return a layer that is away from its start, and whose convolutions still have tame inverses."""
    t = EmergingConv((CHANNELS, size, size), context_dim=context_dim)
    with torch.no_grad():
        t.matrices_of.value += 0.3 * torch.randn_like(t.matrices_of.value) / (CHANNELS * t.num_taps) ** 0.5
    return t


def solved_by_pixels(y: Tensor, taps: Tensor) -> Tensor:
    """Solve a causal convolution with taps ``(3, C, C)`` for images ``(H, W, N, C)``, pixel by pixel."""
    height, width, num_images, channels = y.shape
    weight = F.pad(taps, (0, 0, 0, 0, 0, 1)).mT.reshape(-1, channels)
    x = F.pad(y, (0, 0, 0, 0, 1, 0, 1, 0)).permute(2, 0, 1, 3).contiguous()
    for i in range(height):
        for j in range(width):
            window = x[:, i : i + 2, j : j + 2].reshape(num_images, -1)
            x[:, i + 1, j + 1].addmm_(window, weight, alpha=-1)
    return x[:, 1:, 1:].permute(1, 2, 0, 3)


def forward_by_pixels(t: EmergingConv, z: Tensor) -> Tensor:
    """Return what ``t(z)`` is, by a loop over pixels for each of the two convolutions."""
    core, a, b = t._matrices(None)
    lower, upper, _ = lu_factors(core)
    y = solved_by_pixels(z.permute(2, 3, 0, 1).flip(0, 1), b).flip(0, 1)
    y = torch.linalg.solve_triangular(lower.mT, y, upper=True, left=False)
    y = torch.linalg.solve_triangular(upper.mT, y, upper=False, left=False)
    return solved_by_pixels(y, a).permute(2, 3, 0, 1)


@torch.enable_grad()
def training_step(t: EmergingConv, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    z, ladj = t.inverse_and_ladj(x)
    torch.autograd.grad(z.square().sum() / 2 - ladj.sum(), [x, *t.parameters()])


@torch.enable_grad()
def sampling_step(t: EmergingConv, z: Tensor) -> None:
    z = z.detach().requires_grad_()
    x, ladj = t.forward_and_ladj(z)
    torch.autograd.grad(x.square().sum() / 2 - ladj.sum(), [z, *t.parameters()])


def medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median time of each in milliseconds, from rounds in which they run in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()  # what ran before has left its own data in the caches
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def row(num_images: int, rounds: int) -> list[tuple[str, ...]]:
    functions: dict[str, Callable[[], object]] = {}
    for size in SIZES:
        t, conditional = layer(size), layer(size, CONTEXT_DIM).condition(torch.randn(num_images, CONTEXT_DIM))
        x = torch.randn(num_images, CHANNELS, size, size)
        z = t.inv(x)
        torch.testing.assert_close(t(z), x, rtol=0, atol=1e-5)
        torch.testing.assert_close(forward_by_pixels(t, z), x, rtol=0, atol=1e-5)
        functions |= {
            f"to base {size}": lambda t=t, x=x: t.inv(x),
            f"to data {size}": lambda t=t, z=z: t(z),
            f"by pixels {size}": lambda t=t, z=z: forward_by_pixels(t, z),
            f"step to base {size}": lambda t=t, x=x: training_step(t, x),
            f"step to data {size}": lambda t=t, z=z: sampling_step(t, z),
            f"to data, with a context {size}": lambda t=conditional, z=z: t(z),
        }
    found = medians(functions, rounds)
    rows = []
    for k, size in enumerate(SIZES):
        growth = found[f"to data {size}"] / found[f"to data {SIZES[k - 1]}"] if k else float("nan")
        columns = [found[f"{name} {size}"] for name in ("to base", "to data")]
        rest = [found[f"{name} {size}"] for name in ("step to base", "step to data", "to data, with a context")]
        gain = found[f"by pixels {size}"] / columns[1]
        figures = (
            [f"{value:.2f}" if value == value else "" for value in (*columns, growth)]
            + [f"{gain:.1f}"]
            + [f"{v:.2f}" for v in rest]
        )
        rows.append((str(num_images), f"{size} x {size}", *figures))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {args.threads} thread(s)\n")
    print("| batch | image | to base | to data | growth | by pixels | step to base | step to data | with a context |")
    print("|---|---|---|---|---|---|---|---|---|")
    for num_images in args.batches:
        for cells in row(num_images, args.rounds):
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

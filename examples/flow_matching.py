"""A pinwheel by flow matching: how a continuous flow carries a normal law onto data, in pictures.

The data are blades that are wound around a centre, a law whose density is known. A continuous flow starts at a normal
law at t = 0 and is at the data at t = 1; flow matching fits it without solving its differential equation. The script
compares its log-density of fresh points with the true one, counts the evaluations of the network that solves take, and
shows points on their way, as a picture and as an animation.

    python examples/flow_matching.py
    python examples/flow_matching.py --num-blades 9 --max-epochs 300 --output pictures
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor

import pyroflows as pf

LENGTH, WIDTH = 0.3, 0.06  # of a blade, standard deviations, at distance 1 from the centre
TWIST = 0.6
NUM_HELD_OUT, NUM_SHOWN = 5000, 5000
TOLERANCE = 1e-4  # of solves, which is what pictures need
TIMES = [0.0, 0.5, 0.75, 0.85, 0.95, 1.0]  # of the picture; most of the way is made late
NUM_FRAMES, NUM_STILL_FRAMES, FRAMES_PER_SECOND = 41, 15, 15  # of the animation, and those that stand still at its end
LIMIT, CELLS = 2.0, 160  # of the pictures, and cells of a density along a side
DPI = 110


def blade() -> dist.Independent:
    """The law of points of the blade that lies along the first axis, before it is wound."""
    return dist.Normal(torch.tensor([1.0, 0.0]), torch.tensor([LENGTH, WIDTH])).to_event(1)


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Points ``(..., 2)``, rotated about the centre."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], -1)


def wound(x: Tensor, direction: int) -> Tensor:
    """Points rotated by an angle that grows with their distance from the centre, which keeps areas."""
    return rotated(x, direction * TWIST * x.norm(dim=-1).exp())


def draw_pinwheel(count: int, num_blades: int) -> Tensor:
    angle = 2 * math.pi / num_blades * torch.randint(num_blades, (count,))
    return wound(rotated(blade().sample((count,)), angle), 1)


def true_log_prob(x: Tensor, num_blades: int) -> Tensor:
    """The log-density of the pinwheel at points ``(n, 2)``."""
    angles = 2 * math.pi / num_blades * torch.arange(num_blades)
    return blade().log_prob(rotated(wound(x, -1)[:, None], -angles)).logsumexp(-1) - math.log(num_blades)


def law_at(flow: pf.Flow, time: float) -> pf.Flow:
    """The flow of points on their way: at time 0 the base, in the units of the data, and at time 1 the flow itself."""
    continuous, *rest = flow.transform.layers
    return pf.Flow([continuous.until(time), *rest] if time > 0 else rest, standardize=False)


@torch.no_grad()
def density_of(flow: pf.Flow) -> np.ndarray:
    """The density on a grid, from the bottom row to the top."""
    line = torch.linspace(-LIMIT, LIMIT, CELLS)
    return flow().log_prob(torch.cartesian_prod(line, line).flip(-1)).exp().reshape(CELLS, CELLS).numpy()


def colors(z: Tensor) -> np.ndarray:
    """Colours of base values: the angle is the hue, and the middle is pale."""
    radius, angle = z.norm(dim=-1), torch.atan2(z[:, 1], z[:, 0])
    saturation = (0.25 + 0.45 * radius).clamp(max=1.0)
    return hsv_to_rgb(torch.stack([(angle / (2 * math.pi)) % 1, saturation, torch.full_like(angle, 0.82)], -1).numpy())


@torch.no_grad()
def positions(flow: pf.Flow, z: Tensor, times: Sequence[float]) -> list[np.ndarray]:
    """Where points that start at base values z are at some times."""
    return [law_at(flow, time).transform(z).numpy() for time in times]


def draw_points(axes: Axes, x: np.ndarray, shades: np.ndarray, title: str) -> None:
    axes.scatter(*x.T, s=2.5, c=shades, linewidths=0)
    axes.set(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), xticks=[], yticks=[], aspect="equal")
    axes.set_title(title, fontsize="medium")


def plot_transport(flow: pf.Flow, z: Tensor, rows: Tensor) -> Figure:
    """Points at six times, coloured by where they start; and beside them the data and the density at the end."""
    figure, grid = plt.subplots(2, 4, figsize=(11.6, 6.2), layout="constrained")
    shades = colors(z)
    for axes, x, t in zip(grid[:, :3].flat, positions(flow, z, TIMES), TIMES, strict=True):
        draw_points(axes, x, shades, f"t = {t:g}")
    draw_points(grid[0, 3], rows[: len(z)].numpy(), np.full((1, 3), 0.3), "data")
    density = density_of(flow)
    limit = np.quantile(density, 0.99)  # so that one bright spot does not darken all else
    grid[1, 3].imshow(density, origin="lower", extent=(-LIMIT, LIMIT) * 2, vmax=limit, interpolation="bilinear")
    grid[1, 3].set(xticks=[], yticks=[])
    grid[1, 3].set_title("density at t = 1", fontsize="medium")
    return figure


def animate(flow: pf.Flow, z: Tensor, path: Path) -> None:
    """Write an animation of points that travel from the base to the data, and stay there for a while."""
    times = np.linspace(0, 1, NUM_FRAMES).tolist()
    frames = positions(flow, z, times)
    figure, axes = plt.subplots(figsize=(4.4, 4.7), layout="constrained")
    draw_points(axes, frames[0], colors(z), "")
    (points,) = axes.collections

    def show(k: int) -> list[object]:
        k = min(k, NUM_FRAMES - 1)
        points.set_offsets(frames[k])
        axes.set_title(f"t = {times[k]:.2f}", fontsize="medium")
        return [points]

    animation = FuncAnimation(figure, show, frames=NUM_FRAMES + NUM_STILL_FRAMES)
    animation.save(path, writer=PillowWriter(fps=FRAMES_PER_SECOND), dpi=80)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the tensors are small, and more threads only wait for each other
    torch.manual_seed(args.seed)
    rows, held_out = (draw_pinwheel(count, args.num_blades) for count in (args.num_rows, NUM_HELD_OUT))
    print(f"{len(rows)} points of a pinwheel with {args.num_blades} blades\n")

    flow = pf.flows.CNF(2, hidden_dims=(args.width,) * 3, tolerance=TOLERANCE)
    start = time.perf_counter()
    fit = pf.fit_flow_matching(
        flow, rows, max_epochs=args.max_epochs, seed=args.seed, progress_bar=not args.no_progress_bar
    )
    print(f"{fit}\nfitted in {time.perf_counter() - start:.0f} s\n")

    start = time.perf_counter()
    with torch.no_grad(), pf.transforms.continuous.Evaluations() as scoring:
        log_prob = flow().log_prob(held_out)
    seconds, error = time.perf_counter() - start, log_prob.std().item() / len(held_out) ** 0.5
    z = torch.randn(NUM_SHOWN, 2)
    with torch.no_grad(), pf.transforms.continuous.Evaluations() as sampling:
        flow.transform(z)
    print(f"mean log-density of {len(held_out)} fresh points, nats: {log_prob.mean():.3f} +- {error:.3f}", end=", ")
    print(f"and {true_log_prob(held_out, args.num_blades).mean():.3f} by the truth")
    print(f"evaluations of the network: {scoring.total} to score them ({seconds:.1f} s), {sampling.total} to sample")

    args.output.mkdir(parents=True, exist_ok=True)
    picture, animation = args.output / "flow_matching.png", args.output / "flow_matching.gif"
    plot_transport(flow, z, rows).savefig(picture, dpi=DPI)
    animate(flow, z, animation)
    print(f"\nsaved {picture}\nsaved {animation}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A pinwheel by flow matching")
    parser.add_argument("--num-blades", type=int, default=5, help="of the pinwheel (default: 5)")
    parser.add_argument("--num-rows", type=int, default=20_000, help="points to fit to (default: 20000)")
    parser.add_argument("--width", type=int, default=128, help="of the three hidden layers (default: 128)")
    parser.add_argument("--max-epochs", type=int, default=200, help="passes over the points at most (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the pictures (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())

"""Images: Glow, emerging Glow, RealNVP and a residual flow of equal size, given the class.

Two data sets come with scikit-learn. The 8 x 8 digits have 17 grey levels and ten classes; patches of 16 x 16 pixels,
cut out of two photographs, have 256 levels of three colours, and the photograph as their class. No place of a
photograph is both in a patch to train on and in a held-out one. Integers have no density: the fit adds noise of one
level's width (``dequantization="uniform"``), and the log-density of the sums bounds the log-probability of the levels.

Prints bits per dimension of held-out images for four flows with equally many parameters, and how often the class of
highest density is the right one. Draws three sheets with the last flow fitted: samples at three temperatures,
interpolations between held-out images of one class, and what remains of held-out images if their coarse latents are
kept and those that were factored out on finer levels are drawn anew.

    python examples/glow_images.py
    python examples/glow_images.py --data digits --families Glow --max-epochs 20
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

import pyroflows as pf

BLOCK, PATCH, STRIDE = 48, 16, 8  # edges of blocks of a photograph and of patches, and the step between patches
TEMPERATURES = (0.5, 0.7, 1.0)
NUM_ROWS = 10  # of the sheets
DPI = 110


@dataclass
class Images:
    """Integer images ``(n, C, H, W)`` with their classes ``(n,)``, to train on and held out."""

    x: Tensor
    classes: Tensor
    held_out: Tensor
    held_out_classes: Tensor
    num_levels: int
    support: constraints.Constraint | None = None  # None for all reals, which suits where few levels lie at the ends

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return int(self.classes.max()) + 1

    def one_hot(self, classes: Tensor) -> Tensor:
        return F.one_hot(classes, self.num_classes).float()


def digits() -> Images:
    pixels, classes = (torch.as_tensor(values) for values in load_digits(return_X_y=True))
    x = pixels.long().reshape(-1, 1, 8, 8)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, kept = order.tensor_split([300])
    sets = x[kept], classes[kept], x[held_out], classes[held_out]
    return Images(*sets, num_levels=17, support=constraints.interval(0.0, 17.0))


def patches() -> Images:
    """Patches of two photographs, cut into blocks of which a fifth, drawn at random, is held out."""
    generator = torch.Generator().manual_seed(0)
    kept, held_out = [], []
    for photograph in load_sample_images().images:
        blocks = windows(torch.tensor(photograph).permute(2, 0, 1)[None], BLOCK, BLOCK)
        some, others = blocks[torch.randperm(len(blocks), generator=generator)].tensor_split([len(blocks) // 5])
        apart = windows(some, PATCH, PATCH)
        held_out.append(apart[torch.randperm(len(apart), generator=generator)])
        kept.append(windows(others, PATCH, STRIDE))
    classes = [torch.arange(2).repeat_interleave(len(parts[0])) for parts in (kept, held_out)]
    return Images(torch.cat(kept).long(), classes[0], torch.cat(held_out).long(), classes[1], num_levels=256)


def windows(images: Tensor, size: int, stride: int) -> Tensor:
    """All squares of images ``(n, C, H, W)`` whose corners lie on a grid: ``(m, C, size, size)``."""
    cut = images.unfold(2, size, stride).unfold(3, size, stride)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


DATA: dict[str, Callable[[], Images]] = {"digits": digits, "patches": patches}
FAMILIES: dict[str, Callable[..., pf.Flow]] = {
    "RealNVP": partial(pf.flows.MultiscaleRealNVP, conditioner="conv"),
    "Residual": pf.flows.MultiscaleResidual,
    "Glow": pf.flows.Glow,
    "emerging Glow": partial(pf.flows.Glow, convolution="emerging"),
}


def num_parameters(flow: nn.Module) -> int:
    return sum(parameter.numel() for parameter in flow.parameters())


def of_size(
    make: Callable[[int], nn.Module], size: int, count: Callable[[nn.Module], int] = num_parameters
) -> nn.Module:
    """The module whose number of parameters is nearest to the size, by a width that ``make`` takes."""
    low, high = 2, 4
    while count(make(high)) < size:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(make(middle)) < size else (low, middle)
    return min((make(low), make(high)), key=lambda module: abs(count(module) - size))


def halves(width: int) -> tuple[int, int]:
    """The widths of two hidden layers, which can differ by one so that sizes come nearer to each other."""
    return width // 2, (width + 1) // 2


def flow_of(family: str, images: Images, args: argparse.Namespace) -> pf.Flow:
    """A flow of the family with as many parameters as the Glow of the hidden width asked for."""
    sizes = {"num_levels": args.levels, "num_steps": args.steps}
    options = {"context_dim": images.num_classes, "support": images.support}

    def make(family: str, width: int) -> pf.Flow:
        return FAMILIES[family](images.shape, hidden_dims=halves(width), **sizes, **options)

    torch.manual_seed(args.seed)
    size = num_parameters(make("Glow", 2 * args.width))
    return of_size(lambda width: make(family, width), size)


def accuracy(flow: pf.Flow, images: Images) -> float:
    """How often the class under which a held-out image has the highest density is its own."""
    contexts = images.one_hot(torch.arange(images.num_classes))
    x = images.held_out + torch.rand(images.held_out.shape).clamp(1e-4, 1 - 1e-4)  # not on the ends of a support
    with torch.no_grad():
        scores = torch.stack([flow(context).log_prob(x) for context in contexts], -1)
    return (scores.argmax(-1) == images.held_out_classes).float().mean().item()


def row_classes(images: Images) -> Tensor:
    return torch.arange(NUM_ROWS) * images.num_classes // NUM_ROWS


def samples(flow: pf.Flow, images: Images, count: int = 4) -> list[tuple[str, Tensor]]:
    """Blocks of the sheet, each ``(rows, count, C, H, W)``: draws at each temperature."""
    law = flow(images.one_hot(row_classes(images)))
    return [(f"T = {t}", law.sample((count,), temperature=t).transpose(0, 1)) for t in TEMPERATURES]


def interpolations(flow: pf.Flow, images: Images, count: int = 8) -> list[tuple[str, Tensor]]:
    """From one held-out image to another one of the same class, along an arc between their latents.

    Latents of many dimensions lie near a sphere, which a straight line between two of them would leave.
    """
    classes = row_classes(images)
    a, b = pairs(images, classes)
    law = flow(images.one_hot(classes))
    start, end = law.latent(a), law.latent(b)
    angle = torch.acos(F.cosine_similarity(start, end, dim=-1))[:, None]
    share = torch.linspace(0, 1, count)[:, None, None]
    z = (torch.sin((1 - share) * angle) * start + torch.sin(share * angle) * end) / torch.sin(angle)
    return [("from left to right", law.transport(z)[0].transpose(0, 1))]


def pairs(images: Images, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Two held-out images for each row, all different, in the middle of their levels' cells.

    Of each class those half of the images are shown in which levels vary most: much of one photograph is sky.
    """
    taken = [0] * images.num_classes
    varied = images.held_out.float().flatten(1).std(1)
    found = []
    for k in classes.tolist():
        is_own = images.held_out_classes == k
        of_class = images.held_out[is_own & (varied > varied[is_own].median())]
        found.append(of_class[taken[k] : taken[k] + 2] + 0.5)
        taken[k] += 2
    a, b = torch.stack(found, 1)
    return a, b


def reconstructions(flow: pf.Flow, images: Images, count: int = 4) -> list[tuple[str, Tensor]]:
    """Held-out images, and what they become if only the latents of their coarsest levels are kept."""
    classes = row_classes(images)
    x, _ = pairs(images, classes)
    law = flow(images.one_hot(classes))
    levels = flow.multiscale.split(law.latent(x))
    blocks = [("data", x[:, None])]
    for kept in range(1, len(levels)):
        drawn = [[z if i < kept else torch.randn(z.shape) for i, z in enumerate(levels)] for _ in range(count)]
        again = torch.stack([law.transport(flow.multiscale.join(parts))[0] for parts in drawn], 1)
        share = sum(z[0].numel() for z in levels[:kept]) / math.prod(images.shape)
        blocks.append((f"{share:.0%} of latents kept", again))
    return blocks


SHEETS = {"samples": samples, "interpolations": interpolations, "reconstructions": reconstructions}


def draw(axes: plt.Axes, blocks: list[tuple[str, Tensor]], num_levels: int) -> None:
    """Blocks of images ``(rows, columns, C, H, W)`` side by side, their names below."""
    gap = blocks[0][1].shape[-1] // 2
    strips, left = [], 0
    for name, block in blocks:
        strip = tiled(block / num_levels)
        axes.text(left + strip.shape[1] / 2, len(strip) + 2, name, ha="center", va="top", fontsize="small")
        strips += [strip, torch.ones(len(strip), gap, strip.shape[2])]
        left += strip.shape[1] + gap
    sheet = torch.cat(strips[:-1], 1).clamp(0, 1)
    axes.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def tiled(images: Tensor) -> Tensor:
    """Images ``(rows, columns, C, H, W)`` as one ``(height, width, C)``, with a white margin round each."""
    framed = F.pad(images, (1, 1, 1, 1), value=1.0)
    return framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)


def save_sheets(flows: dict[str, tuple[pf.Flow, Images]], output: Path) -> None:
    """One picture a sheet, with a panel for each data set."""
    for sheet, blocks in SHEETS.items():
        size = 5.2 * len(flows), 4.6
        figure, panels = plt.subplots(1, len(flows), figsize=size, squeeze=False, layout="constrained")
        for axes, (name, (flow, images)) in zip(panels[0], flows.items(), strict=True):
            with torch.no_grad():
                draw(axes, blocks(flow, images), images.num_levels)
            axes.set_title(name, fontsize="medium")
        path = output / f"glow_{sheet}.png"
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
        print(f"saved {path}")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    shown = {}
    for name in args.data:
        images = DATA[name]()
        print(f"{name}: {len(images.x)} images {images.shape}, {len(images.held_out)} held out")
        for family in args.families:
            flow = flow_of(family, images, args)
            start = time.perf_counter()
            pf.fit_density(
                flow,
                images.x,
                images.one_hot(images.classes),
                dequantization="uniform",
                batch_size=64,
                max_epochs=args.max_epochs,
                seed=args.seed,
                progress_bar=not args.no_progress_bar,
            )
            seconds = time.perf_counter() - start
            bits = pf.bits_per_dim(flow, images.held_out, images.num_levels, images.one_hot(images.held_out_classes))
            print(
                f"  {family:14} {num_parameters(flow):7} parameters  {bits.item():.3f} bits per dimension  "
                f"class right for {accuracy(flow, images):.1%}  {seconds:.0f} s",
                flush=True,
            )
            shown[name] = flow, images
    torch.manual_seed(args.seed)
    save_sheets(shown, args.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Glow, emerging Glow, RealNVP and residual flows of digits and of colour patches"
    )
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="(default: all)")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="(default: all)")
    parser.add_argument("--levels", type=int, default=3, help="of the flow (default: 3)")
    parser.add_argument("--steps", type=int, default=4, help="of the flow on each level (default: 4)")
    parser.add_argument("--width", type=int, default=48, help="of Glow's hidden layers (default: 48)")
    parser.add_argument("--max-epochs", type=int, default=20, help="passes over the data at most (default: 20)")
    parser.add_argument("--threads", type=int, default=2, help="of the processor (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the pictures (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())

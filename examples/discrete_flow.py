"""Discrete flows: laws of categories, and text character by character.

Fits flows of categories to three laws whose probabilities are known: eight Gaussians on a grid of 91 x 91 cells, a law
with random probabilities of all sequences, and a Potts model. Cross-entropies, sums over all sequences, stand beside
the entropy, which none can fall below. Then flows of windows of text, 27 characters, are fitted to chapters of a novel:
bits per character of chapters that were held out, and the time to draw a window. An autoregressive flow takes a step
for each character, a coupling flow takes as many as there are groups of places. Saves a picture of counts.

    python examples/discrete_flow.py
    python examples/discrete_flow.py --tasks text --length 1024 --groups 32
"""

import argparse
import math
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.utils.data import Dataset

import pyroflows as pf

PASSAGE = Path(__file__).parent / "data" / "pride_and_prejudice.txt"
CHARACTERS = " abcdefghijklmnopqrstuvwxyz"
DPI = 120


# Laws of few places, as tables of probabilities


def eight_gaussians(size: int = 91) -> Tensor:
    """Probabilities ``(size, size)``: eight Gaussians on a circle, at the centres of cells."""
    angles = torch.arange(8) * math.pi / 4
    centres = size // 2 + 0.35 * size * torch.stack([angles.cos(), angles.sin()], -1)
    cells = torch.cartesian_prod(torch.arange(size), torch.arange(size)).float()
    density = (-((cells[:, None] - centres) ** 2).sum(-1) / (2 * (0.04 * size) ** 2)).exp().sum(1)
    return (density / density.sum()).view(size, size)


def full_rank(size: int = 5, length: int = 4) -> Tensor:
    """Probabilities ``(size, ..., size)`` that have no structure."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((size,) * length, generator=generator).flatten().softmax(0).view((size,) * length)


def potts(side: int = 3, size: int = 3, coupling: float = 0.5) -> Tensor:
    """Probabilities of the states of a square lattice, on which neighbours like to agree."""
    states = torch.cartesian_prod(*[torch.arange(size)] * side**2)
    lattice = states.view(-1, side, side)
    agreements = sum((lattice.diff(dim=axis) == 0).sum((1, 2)) for axis in (1, 2))
    return (coupling * agreements).softmax(0).view((size,) * side**2)


LAWS: dict[str, Callable[[], Tensor]] = {
    "eight Gaussians": eight_gaussians,
    "full rank": full_rank,
    "Potts": potts,
}


def small_flows(length: int, size: int) -> dict[str, pf.Flow]:
    """Flows of equal networks; the coupling flow has a layer for each place, given all others."""
    make_base = partial(pf.flows.AutoregressiveCategorical, length, size)
    return {
        "independent places": base_alone(pf.flows.FactorizedCategorical(length, size), length, size),
        "autoregressive base": base_alone(make_base(), length, size),
        "autoregressive flow": pf.flows.DiscreteAutoregressive(length, size, base=make_base()),
        "coupling flow": pf.flows.DiscreteCoupling(length, size, num_layers=length, num_groups=length),
    }


def base_alone(base: torch.nn.Module, length: int, size: int) -> pf.Flow:
    """A flow whose only layer stays the identity."""
    layer = pf.transforms.DiscreteCoupling(length, size, conditioner="dilated_conv", hidden_dims=(1,))
    return pf.Flow([layer.requires_grad_(False)], base)


def compare_on_laws(args: argparse.Namespace) -> dict[str, Tensor]:
    """Print a table of cross-entropies; returns counts of the eight Gaussians, by what drew them."""
    counts = {}
    print(f"{'nats':22}" + "".join(f"{name:>18}" for name in LAWS))
    rows: dict[str, list[float]] = {}
    for law, table in ((name, make()) for name, make in LAWS.items()):
        states, probs = torch.ones_like(table).nonzero(), table.flatten()
        rows.setdefault("entropy", []).append(torch.special.entr(probs).sum().item())
        generator = torch.Generator().manual_seed(args.seed)
        data = states[probs.multinomial(args.num_rows, replacement=True, generator=generator)]
        torch.manual_seed(args.seed)
        for name, flow in small_flows(table.dim(), len(table)).items():
            fit(flow, data.float(), args, batch_size=256, max_epochs=args.max_epochs)
            with torch.no_grad():
                rows.setdefault(name, []).append(-(probs * flow().log_prob(states)).sum().item())
                if law == "eight Gaussians" and "flow" in name:
                    counts[name] = _counted(flow().sample((len(data),)), len(table))
        if law == "eight Gaussians":
            counts = {"data": _counted(data, len(table)), **counts}
    for name, values in rows.items():
        print(f"{name:22}" + "".join(f"{value:18.3f}" for value in values))
    return counts


def _counted(pairs: Tensor, size: int) -> Tensor:
    """How often each pair of categories ``(n, 2)`` occurs, ``(size, size)``."""
    index = pairs[..., 0] * size + pairs[..., 1]
    return index.flatten().bincount(minlength=size**2).view(size, size)


# Text


def read_text(path: Path) -> Tensor:
    """A text as numbers of characters: letters lose their case, and all else between them is one space, as in text8."""
    text = re.sub("[^a-z]+", " ", path.read_text().lower()).strip()
    return torch.tensor([CHARACTERS.index(character) for character in text])


class Windows(Dataset):
    """Windows of a text, each drawn afresh within its own part of the text, so that parts can be set aside."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.parts = text[: len(text) // (2 * length) * 2 * length].view(-1, 2 * length)
        self.length = length

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> Tensor:
        start = int(torch.randint(self.length + 1, ()))
        return self.parts[i, start : start + self.length].float()


def text_flows(args: argparse.Namespace) -> dict[str, pf.Flow]:
    """Flows of windows; all networks of bases, and of the autoregressive layer, have one size."""
    sizes = args.length, len(CHARACTERS)
    options = {"hidden_dims": (args.width,) * 5, "embedding_dim": 16}
    causal = {**options, "conditioner": "causal_conv"}
    # Characters in different blocks are that far apart that the network had better not see them.
    groupwise = partial(pf.flows.GroupwiseCategorical, *sizes, args.groups, reach=0, **options)
    return {
        "autoregressive base": base_alone(pf.flows.AutoregressiveCategorical(*sizes, **causal), *sizes),
        "autoregressive flow": pf.flows.DiscreteAutoregressive(*sizes, **causal),
        "groupwise base": base_alone(groupwise(), *sizes),
        # The layer maps the first place of each block, of which the base knows least, given all other places. It had
        # better do little, since the base predicts the places that follow from this one: an affine map starts as the
        # identity and learns by the gradient of the base, where a permutation would hide the place behind its rank.
        "coupling flow": pf.flows.DiscreteCoupling(
            *sizes,
            num_layers=1,
            univariate="affine",
            num_groups=args.groups,
            conditioner="dilated_conv",
            hidden_dims=(args.width // 4,) * 3,
            embedding_dim=16,
            base=groupwise(),
        ),
    }


def compare_on_text(args: argparse.Namespace) -> dict[str, Tensor]:
    """Print bits per character and times to sample; returns counts of pairs of characters, by what drew them."""
    text = read_text(args.text)
    num_training = len(text) * 9 // 10
    training, held_out = text[:num_training], text[num_training:]
    windows = held_out[: len(held_out) // args.length * args.length].view(-1, args.length)
    print(f"\ntext: {num_training} characters to fit to, {windows.numel()} held out, in windows of {args.length}")

    torch.manual_seed(args.seed)
    flows, bits = text_flows(args), {}
    for name, flow in flows.items():
        batch_size = max(1, 2048 // args.length)
        # Steps of the coupling flow cost about half of those of the autoregressive one.
        max_epochs = 2 * args.text_epochs if name == "coupling flow" else args.text_epochs
        fit(flow, Windows(training, args.length), args, batch_size=batch_size, max_epochs=max_epochs)
        with torch.no_grad():
            bits[name] = -flow().log_prob(windows).mean().item() / args.length / math.log(2)
    seconds = {size: times_to_sample(list(flows.values()), size) for size in (1, 64)}

    print(f"{'':22}{'parameters':>12}{'bits a character':>18}{'ms to draw one':>16}{'ms to draw 64':>15}")
    for name, one, many in zip(flows, *seconds.values(), strict=True):
        num_parameters = sum(p.numel() for p in flows[name].parameters() if p.requires_grad)
        print(f"{name:22}{num_parameters:12}{bits[name]:18.3f}{1000 * one:16.1f}{1000 * many:15.1f}")
    ratio = bits["coupling flow"] / bits["autoregressive flow"] - 1
    of = dict(zip(flows, zip(*seconds.values(), strict=True), strict=True))
    one, many = (a / b for a, b in zip(of["autoregressive flow"], of["coupling flow"], strict=True))
    print(
        f"the coupling flow takes {100 * ratio:+.1f} % bits compared with the autoregressive flow; it draws one window "
        f"{one:.1f} times as fast, and 64 windows {many:.1f} times as fast"
    )

    counts = {"data": text}
    with torch.no_grad():
        for name in ("autoregressive flow", "coupling flow"):
            sample = flows[name]().sample((len(text) // args.length,)).long()
            print(f"{name}: ...{''.join(CHARACTERS[k] for k in sample[0, :160])}...")
            counts[name] = sample
    size = len(CHARACTERS)
    return {name: _counted(x.unfold(-1, 2, 1).reshape(-1, 2), size) for name, x in counts.items()}


@torch.no_grad()
def times_to_sample(flows: Sequence[pf.Flow], size: int, num_rounds: int = 3) -> list[float]:
    """The median time of each flow to draw so many samples; flows take turns, so that the load is the same for all."""
    times = torch.zeros(num_rounds + 1, len(flows))
    for i in range(num_rounds + 1):
        for k, flow in enumerate(flows):
            start = time.process_time()
            flow().sample((size,))
            times[i, k] = time.process_time() - start
    return times[1:].median(0).values.tolist()  # the first round warms up


def fit(flow: pf.Flow, x: Tensor | Dataset, args: argparse.Namespace, **options: object) -> None:
    start = time.process_time()
    optimizer = partial(torch.optim.Adam, lr=args.learning_rate)
    options = {**options, "optimizer": optimizer, "seed": args.seed, "progress_bar": not args.no_progress_bar}
    found = pf.fit_density(flow, x, **options)
    if args.verbose:
        print(f"{found}, {time.process_time() - start:.0f} s of a processor")


def save_counts(rows: dict[str, dict[str, Tensor]], path: Path) -> None:
    """A row of pictures for each task: data first, then samples."""
    figure, grid = plt.subplots(len(rows), 3, figsize=(9, 3.3 * len(rows)), layout="constrained", squeeze=False)
    for (task, counts), line in zip(rows.items(), grid, strict=True):
        limit = counts["data"].max().item()
        for (name, table), axes in zip(counts.items(), line, strict=True):
            # The square root shows rare pairs beside frequent ones.
            axes.imshow(table.sqrt().T.numpy(), origin="lower", vmin=0, vmax=math.sqrt(limit), cmap="magma_r")
            axes.set_title("data" if name == "data" else f"samples of the {name}", fontsize="medium")
            if task == "text":
                axes.set_xticks(range(27), CHARACTERS.replace(" ", "_"), fontsize=6)
                axes.set_yticks(range(27), CHARACTERS.replace(" ", "_"), fontsize=6)
                axes.set_xlabel("character", fontsize="small")
                axes.set_ylabel("next character", fontsize="small")
            else:
                axes.set_xlabel("first place", fontsize="small")
                axes.set_ylabel("second place", fontsize="small")
    figure.savefig(path, dpi=DPI)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the tensors are small, and more threads only wait for each other
    start = time.process_time()
    rows = {}
    if "laws" in args.tasks:
        rows["laws"] = compare_on_laws(args)
    if "text" in args.tasks:
        rows["text"] = compare_on_text(args)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "discrete_flow.png"
    save_counts(rows, path)
    print(f"{time.process_time() - start:.0f} s of a processor; saved {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Discrete flows of known laws and of text")
    parser.add_argument(
        "--tasks", nargs="+", choices=["laws", "text"], default=["laws", "text"], help="(default: both)"
    )
    parser.add_argument("--num-rows", type=int, default=20_000, help="draws of each known law (default: 20000)")
    parser.add_argument("--max-epochs", type=int, default=15, help="passes over these at most (default: 15)")
    parser.add_argument("--text", type=Path, default=PASSAGE, help="a file (default: the novel of the example)")
    parser.add_argument("--length", type=int, default=2048, help="of a window of text (default: 2048)")
    parser.add_argument("--groups", type=int, default=40, help="of places of the coupling flow (default: 40)")
    parser.add_argument("--width", type=int, default=64, help="of the networks for text (default: 64)")
    parser.add_argument("--text-epochs", type=int, default=33, help="passes over the text at most (default: 33)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of Adam (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the picture (default: output)")
    parser.add_argument("--verbose", action="store_true", help="print each fit")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())

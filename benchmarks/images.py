"""Flows of images beside normflows' Glow of equal size: bits per dimension, speed, and where the time goes.

Patches of 16 x 16 pixels in three colours, as in ``examples/glow_images.py``, from disjoint parts of two photographs.
All flows have as many parameters as pyroflows' Glow of the width asked for, to 2 %, by the width of their hidden
layers. Weights that a triangular mask of normflows hides are not counted.

Quality: the same batches with the same noise, the same steps and the same Adam for all, whose rate rises and then falls
along a cosine, in turn in one process; normflows' once more at a learning rate that suits it better. What is printed is
the bound on the bits per dimension of held-out patches, whose noise is one draw that is the same for all, and its
paired difference to the better one of normflows' with the standard error over patches. normflows' flow gets the
location and scale of the channels, as ours do.

Speed: a training step is log_prob of a batch, backward, and a step of a fused Adam; ours once more as ``fit_density``
records it. Times are seconds of the processor.

    python -m benchmarks.images quality --steps 600 --seeds 0 1 2
    python -m benchmarks.images quality --steps 60 --seeds 0    # a look, in a minute or two
    python -m benchmarks.images speed --rounds 15
    python -m benchmarks.images profile

Needs normflows and scikit-learn beside the project's own requirements.
"""

import argparse
import copy
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import normflows
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import pyroflows as pf
from benchmarks.timing import in_turn, milliseconds, ratio, recorded_step
from examples.glow_images import halves, num_parameters, of_size, patches

BATCH = 64
PEER = "Glow, normflows"


class Peer(nn.Module):
    """normflows' Glow as its documentation builds it, behind location and scale of the channels.

    Args:
        rows: images ``(n, C, H, W)`` from which location and scale are learned.
        num_levels: number of levels, each of which begins with a squeeze.
        num_steps: steps of ActNorm, 1 x 1 convolution and coupling on each level.
        width: channels of the hidden layers.
    """

    def __init__(self, rows: Tensor, num_levels: int, num_steps: int, width: int) -> None:
        super().__init__()
        _, channels, *sizes = rows.shape
        self.num_places = math.prod(sizes)
        base, flows = [], []
        for squeezes in range(num_levels, 0, -1):  # from the coarsest level on, as normflows lists them
            own = channels * 2 ** (squeezes + 1)
            steps = [normflows.flows.GlowBlock(own, width) for _ in range(num_steps)]
            flows.append([*steps, normflows.flows.Squeeze()])
            latents = own // 2 if base else own
            places = [size // 2**squeezes for size in sizes]
            base.append(normflows.distributions.DiagGaussian((latents, *places)))
        merges = [normflows.flows.Merge() for _ in flows[1:]]
        self.flow = normflows.MultiscaleFlow(base, flows, merges, class_cond=False)
        self.register_buffer("loc", rows.mean((0, 2, 3))[:, None, None])
        self.register_buffer("scale", rows.std((0, 2, 3))[:, None, None])

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob((x - self.loc) / self.scale, None) - self.num_places * self.scale.log().sum()

    def sample(self, count: int) -> Tensor:
        return self.flow.sample(count)[0] * self.scale + self.loc


def size_of(module: nn.Module) -> int:
    """The number of parameters that count."""
    linear = normflows.flows.Invertible1x1Conv
    hidden = sum(m.num_channels * (m.num_channels + 1) for m in module.modules() if isinstance(m, linear))
    return num_parameters(module) - hidden


def flows(rows: Tensor, num_levels: int, num_steps: int, width: int) -> dict[str, nn.Module]:
    """Our three flows, which know the location and scale of the rows, and normflows', all of one size."""
    shape = rows.shape[1:]

    def ours(family: Callable[..., pf.Flow], width: int, **options: str) -> pf.Flow:
        return family(shape, num_levels=num_levels, num_steps=num_steps, hidden_dims=halves(width), **options)

    glow = ours(pf.flows.Glow, 2 * width)
    others: dict[str, Callable[[int], nn.Module]] = {
        "emerging Glow": partial(ours, pf.flows.Glow, convolution="emerging"),
        "RealNVP": partial(ours, pf.flows.MultiscaleRealNVP, conditioner="conv"),
        PEER: partial(Peer, rows, num_levels, num_steps),
    }
    found = {"Glow": glow, **{name: of_size(make, size_of(glow), size_of) for name, make in others.items()}}
    for name, flow in found.items():
        share = size_of(flow) / size_of(glow)
        assert abs(share - 1) < 0.02, f"{name} has {share:.3f} times as many parameters as Glow"
        if isinstance(flow, pf.Flow):
            flow.adapt(rows)
    log_prob(found[PEER], rows[:BATCH])  # normflows' ActNorm learns from the first batch
    return found


def log_prob(flow: nn.Module, x: Tensor) -> Tensor:
    return flow.log_prob(x) if isinstance(flow, Peer) else flow().log_prob(x)


def sample(flow: nn.Module) -> None:
    with torch.no_grad():
        flow.sample(BATCH) if isinstance(flow, Peer) else flow().sample((BATCH,))


def bits(flow: nn.Module, x: Tensor) -> Tensor:
    """The bound for each row of dequantised levels ``(n, C, H, W)``, whose cells have volume 1."""
    with torch.no_grad():
        scores = torch.cat([log_prob(flow, part) for part in x.split(128)])
    return -scores / (x[0].numel() * math.log(2))


class Trained:
    """A flow with its optimiser and the time its steps have taken."""

    def __init__(self, flow: nn.Module, learning_rate: float, num_steps: int) -> None:
        self.flow = flow
        self.optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, learning_rate, num_steps, pct_start=0.1)
        self.seconds = 0.0

    def step(self, x: Tensor) -> None:
        start = time.process_time()
        self.optimizer.zero_grad()
        (-log_prob(self.flow, x).mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.flow.parameters(), 10.0)
        if norm.isfinite():  # as fit_density does
            self.optimizer.step()
        self.schedule.step()
        self.seconds += time.process_time() - start


def trained(seed: int, args: argparse.Namespace) -> tuple[dict[str, Trained], dict[str, Tensor]]:
    """The flows after training, and the bits per dimension of each held-out patch."""
    images = patches()
    torch.manual_seed(seed)
    rows = images.x + torch.rand(images.x.shape)
    members = flows(rows, *args.sizes[0])
    twin = copy.deepcopy(members[PEER])
    contenders = {name: Trained(flow, args.learning_rate, args.steps) for name, flow in members.items()}
    contenders[f"{PEER}, at {args.peer_learning_rate}"] = Trained(twin, args.peer_learning_rate, args.steps)
    torch.manual_seed(100 + seed)
    order = torch.cat([torch.randperm(len(images.x)) for _ in range(1 + args.steps * BATCH // len(images.x))])
    for index in order[: args.steps * BATCH].split(BATCH):
        x = images.x[index] + torch.rand(BATCH, *images.shape)
        for contender in contenders.values():
            contender.step(x)
    held_out = images.held_out + torch.rand(images.held_out.shape)
    return contenders, {name: bits(contender.flow, held_out) for name, contender in contenders.items()}


def quality(args: argparse.Namespace) -> None:
    print(f"levels, steps a level and width {args.sizes[0]}; {args.steps} steps of training at {args.learning_rate}\n")
    by_seed = []
    for seed in args.seeds:
        contenders, found = trained(seed, args)
        by_seed.append(found)
        line = "  ".join(f"{name} {values.mean():.3f}" for name, values in found.items())
        print(f"seed {seed}: {line}", flush=True)
    peers = [name for name in contenders if name.startswith(PEER)]
    best = min(peers, key=lambda name: sum(found[name].mean().item() for found in by_seed))
    print(f"\n| flow | parameters | bits per dimension | by seed | less than {best} | s |\n|---|---|---|---|---|---|")
    for name, contender in contenders.items():
        means = [found[name].mean().item() for found in by_seed]
        # Patches are the same for all seeds, so that the mean over seeds comes first.
        gaps = torch.stack([found[best] - found[name] for found in by_seed]).mean(0)
        gap = "" if name == best else f"{gaps.mean():.3f} +- {gaps.std() / len(gaps) ** 0.5:.3f}"
        cells = [name, size_of(contender.flow), f"{statistics.mean(means):.3f}", " ".join(f"{m:.3f}" for m in means)]
        print("|", " | ".join(map(str, [*cells, gap, f"{contender.seconds:.0f}"])), "|", flush=True)


def training_step(flow: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (-log_prob(flow, x).mean()).backward()
        optimizer.step()

    return step


def speed(args: argparse.Namespace) -> None:
    print(f"medians of {args.rounds} rounds of {args.repeats} steps in turn, batch {BATCH}\n")
    print("| levels, steps, width | | step, ms | times as fast | recorded, ms | times as fast | ", end="")
    print(f"{BATCH} samples, ms | times as fast |\n|---|---|---|---|---|---|---|---|")
    images = patches()
    x = images.x[:BATCH] + torch.rand(BATCH, *images.shape)
    for sizes in args.sizes:
        torch.manual_seed(0)
        members = flows(x, *sizes)
        draws = in_turn({name: partial(sample, flow) for name, flow in members.items()}, args.rounds, args.repeats)
        with ExitStack() as stack:
            steps = {name: training_step(flow, x) for name, flow in members.items()}
            for name, flow in members.items():
                if isinstance(flow, pf.Flow):
                    steps[f"{name}, recorded"] = recorded_step(copy.deepcopy(flow), x, stack)
            times = in_turn(steps, args.rounds, args.repeats)
        for name in members:
            row = [", ".join(map(str, sizes)), name]
            for column in (name, f"{name}, recorded"):
                known = column in times
                row += [milliseconds(times[column]), f"{ratio(times, PEER, column):.2f}"] if known else ["", ""]
            row += [milliseconds(draws[name]), f"{ratio(draws, PEER, name):.2f}"]
            print("|", " | ".join(row), "|", flush=True)


def profiled(args: argparse.Namespace) -> None:
    """Print which operations a training step and sampling spend their time in, ours and normflows'."""
    images = patches()
    x = images.x[:BATCH] + torch.rand(BATCH, *images.shape)
    torch.manual_seed(0)
    members = flows(x, *args.sizes[0])
    for name in ("Glow", PEER):
        runs = {"a training step": training_step(members[name], x), "sampling": partial(sample, members[name])}
        for what, run in runs.items():
            run()
            with profile(activities=[ProfilerActivity.CPU]) as found:
                for _ in range(args.repeats):
                    run()
            print(f"\n{name}, {what}")
            print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=args.rows))


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.distributions.Distribution.set_default_validate_args(False)
    warnings.filterwarnings("ignore", message="torch.lu is deprecated")  # in normflows
    print(f"Python {platform.python_version()}, torch {torch.__version__}, normflows 1.7.3, {args.threads} thread(s);")
    {"quality": quality, "speed": speed, "profile": profiled}[args.part](args)


def sizes(text: str) -> tuple[int, int, int]:
    num_levels, num_steps, width = map(int, text.split("x"))
    return num_levels, num_steps, width


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["quality", "speed", "profile"])
    help_sizes = "levels x steps on each x width of Glow's hidden layers; speed takes several (default: 2x4x64)"
    parser.add_argument("--sizes", type=sizes, nargs="+", default=[(2, 4, 64)], help=help_sizes)
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of all (default: 0.002)")
    parser.add_argument("--peer-learning-rate", type=float, default=1e-2, help="of normflows once more")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3, help="steps a round")
    parser.add_argument("--rows", type=int, default=25, help="of the profile")
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())

"""Training steps and sampling of density models beside Zuko's and nflows', in turn in one process.

All: 5 layers, batch 512, hidden widths (64, 64) at 6 dimensions and (128, 128) at 43, 8 bins, the same fused Adam.
A training step is log_prob of a batch, backward, optimiser step. Ours once more as ``fit_density`` records it.
Times are seconds of the processor, all threads together.

    python -m benchmarks.density_speed --rounds 9 --threads 1

Needs nflows and zuko beside the project's own requirements.
"""

import argparse
import copy
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import nflows.flows
import torch
import zuko
from nflows import transforms as nt
from nflows.distributions.normal import StandardNormal
from nflows.nn.nets import MLP
from torch import Tensor, nn
from torch.nn import functional as F

import pyroflows as pf
from benchmarks.timing import in_turn, milliseconds, ratio, recorded_step

BATCH = 512
NUM_LAYERS = 5
BINS = 8
SIZES = ((6, (64, 64)), (43, (128, 128)))


def nflows_autoregressive(transform: Callable, dim: int, hidden_dims: tuple[int, int]) -> nn.Module:
    layers = []
    for _ in range(NUM_LAYERS):
        # One block after the first hidden layer makes two hidden layers, as the others have.
        layer = transform(dim, hidden_dims[0], num_blocks=1, use_residual_blocks=False, activation=F.silu)
        layers += [layer, nt.ReversePermutation(dim)]
    return nflows.flows.Flow(nt.CompositeTransform(layers), StandardNormal([dim]))


class NflowsMLP(MLP):
    """nflows calls the networks of its couplings with a context, which its perceptron does not take."""

    def forward(self, inputs: Tensor, context: None = None) -> Tensor:
        return super().forward(inputs)


def nflows_coupling(transform: Callable, dim: int, hidden_dims: tuple[int, int], num_layers: int) -> nn.Module:
    def net(in_dim: int, out_dim: int) -> nn.Module:
        return NflowsMLP([in_dim], [out_dim], list(hidden_dims), activation=F.silu)

    masks = [torch.where((torch.arange(dim) < dim // 2) == (i % 2 == 0), -1, 1) for i in range(num_layers)]
    layers = [transform(mask, net) for mask in masks]
    return nflows.flows.Flow(nt.CompositeTransform(layers), StandardNormal([dim]))


def flows(dim: int, hidden_dims: tuple[int, int]) -> dict[str, dict[str, nn.Module]]:
    """By family, then library; the first peer of a family is what its goals are measured against."""
    ours = {"num_layers": NUM_LAYERS, "hidden_dims": hidden_dims}
    zukos = {"transforms": NUM_LAYERS, "hidden_features": hidden_dims, "activation": nn.SiLU}
    splines = {"num_bins": BINS, "tails": "linear", "tail_bound": 5.0}
    spline = partial(nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform, **splines)
    spline_coupling = partial(nt.PiecewiseRationalQuadraticCouplingTransform, **splines)
    return {
        "MAF": {
            "zuko": zuko.flows.MAF(dim, **zukos),
            "nflows": nflows_autoregressive(nt.MaskedAffineAutoregressiveTransform, dim, hidden_dims),
            "pyroflows": pf.flows.MAF(dim, **ours),
        },
        "NSF, autoregressive": {
            "zuko": zuko.flows.NSF(dim, bins=BINS, **zukos),
            "nflows": nflows_autoregressive(spline, dim, hidden_dims),
            "pyroflows": pf.flows.NSF(dim, autoregressive=True, bins=BINS, **ours),
        },
        "NSF, coupling": {
            "nflows": nflows_coupling(spline_coupling, dim, hidden_dims, NUM_LAYERS),
            "pyroflows": pf.flows.NSF(dim, bins=BINS, **ours),
        },
    }


def log_prob(flow: nn.Module, x: Tensor) -> Tensor:
    return flow.log_prob(x) if isinstance(flow, nflows.flows.Flow) else flow().log_prob(x)


def sample(flow: nn.Module) -> None:
    with torch.no_grad():
        flow.sample(BATCH) if isinstance(flow, nflows.flows.Flow) else flow().sample((BATCH,))


def training_step(flow: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (-log_prob(flow, x).mean()).backward()
        optimizer.step()

    return step


def train_rows(args: argparse.Namespace) -> None:
    print("| training step | D | peer | peer, ms | eager, ms | times as fast | recorded, ms | times as fast | ", end="")
    print("recording, s |\n|---|---|---|---|---|---|---|---|---|")
    for dim, hidden_dims in SIZES:
        x = torch.randn(BATCH, dim)
        for family, members in flows(dim, hidden_dims).items():
            contenders = {library: training_step(flow, x) for library, flow in members.items()}
            with ExitStack() as stack:
                start = time.perf_counter()
                twin = copy.deepcopy(members["pyroflows"])
                contenders["recorded"] = recorded_step(twin, x, stack)
                recording = time.perf_counter() - start
                times = in_turn(contenders, args.rounds, args.repeats)
            for peer in [name for name in members if name != "pyroflows"]:
                row = [family, dim, peer, milliseconds(times[peer])]
                for ours in ("pyroflows", "recorded"):
                    row += [milliseconds(times[ours]), f"{ratio(times, peer, ours):.2f}"]
                print("|", " | ".join(map(str, [*row, f"{recording:.1f}"])), "|", flush=True)


def sample_rows(args: argparse.Namespace) -> None:
    print("\n| 512 samples | D | peer | peer, ms | ours, ms | times as fast |\n|---|---|---|---|---|---|")
    for dim, hidden_dims in SIZES:
        for family, members in flows(dim, hidden_dims).items():
            times = in_turn({name: partial(sample, flow) for name, flow in members.items()}, args.rounds, 1)
            for peer in [name for name in members if name != "pyroflows"]:
                row = [family, dim, peer, milliseconds(times[peer]), milliseconds(times["pyroflows"])]
                print("|", " | ".join(map(str, [*row, f"{ratio(times, peer, 'pyroflows'):.1f}"])), "|", flush=True)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, zuko {zuko.__version__}, nflows 0.14;")
    print(f"{args.threads} thread(s), medians of {args.rounds} rounds of {args.repeats} steps in turn\n")
    torch.manual_seed(0)
    if not args.only_sampling:
        train_rows(args)
    sample_rows(args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=10, help="steps a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-sampling", action="store_true")
    main(parser.parse_args())

"""Residual flows beside normflows' and torchflows': training steps, inverses, and the bias of log-determinants.

All blocks of a comparison have the same networks: dense, with LipSwish between the layers, and every weight a
semi-orthogonal matrix times its share of the coefficient, which the normalisation of each library leaves as it is. The
last weight is minus the transposed product of the others, so that the Jacobian has eigenvalues far below zero, where
the series is long and the inverse takes many iterations.

Speed: a training step is log_prob of a batch, backward, a step of a fused Adam, and what must be called by hand, which
is ``update_lipschitz`` in normflows: with 50 iterations in its example, and with 5, the count its layers default to.
The inverse is without log-determinant, at each library's own tolerance and once more to at most twice the residual that
ours reaches, or where plain iteration stays for rounding.
Times are seconds of the processor.

Bias: the means over many draws of the log-determinant in training mode and of its gradient on one and the same map,
whose exact ones are known. The gradient is given along the exact one, as a multiple of it, so that 1 is right.

    python -m benchmarks.residual_speed speed --rounds 15
    python -m benchmarks.residual_speed bias --draws 4000
    python -m benchmarks.residual_speed bounds

Needs normflows and torchflows beside the project's own requirements.
"""

import argparse
import copy
import math
import platform
import statistics
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import normflows
import numpy
import torch
from torch import Tensor, nn
from torchflows.bijections.finite.residual.iterative import InvertibleResNetBlock, ResFlowBlock, SpectralLinear

from benchmarks.residual_stacks import (
    Normflows,
    Ours,
    Torchflows,
    Weights,
    linear,
    normflows_net,
    our_layer,
    trained_like,
)
from benchmarks.timing import in_turn, milliseconds, ratio, recorded_step
from pyroflows.transforms.residual import roulette

NUM_BLOCKS = 4
BATCH = 256
SIZES = ((2, (64, 64)), (8, (64, 64)), (32, (64, 64)), (8, (128, 128, 128)), (32, (128, 128, 128)))
OURS = "pyroflows"


def mean_terms(stack: Ours, x: Tensor) -> float:
    """The mean number of terms of a row in a block, which are one more than the products of the roulette's loop."""
    rows, times = [], roulette._transposed_times

    def counted(u: Tensor, *matrices: Any) -> Tensor:
        rows.append(int(u.flatten(1).any(1).sum()))
        return times(u, *matrices)

    with patch.object(roulette, "_transposed_times", counted), torch.no_grad():
        for _ in range(10):
            stack.log_prob(x)
    return 1 + sum(rows) / (10 * len(x) * NUM_BLOCKS)


def ours_of_terms(networks: list[Weights], x: Tensor, terms: float) -> Ours:
    """The stack whose threshold is such that a row takes so many terms in the mean."""
    low, high = -7.0, 3.0
    for _ in range(12):
        middle = (low + high) / 2
        stack = Ours(networks, log_det=roulette.RussianRoulette(threshold=math.exp(middle)))
        low, high = (middle, high) if mean_terms(stack, x) > terms else (low, middle)
    return stack


def stacks(networks: list[Weights], x: Tensor) -> dict[str, nn.Module]:
    """All with the same networks. A roulette takes four terms on average, but in the stacks that are as they come."""
    return {
        "normflows, 5": Normflows(networks, iterations=5),
        "normflows, 50": Normflows(networks, iterations=50),
        "torchflows": Torchflows(networks, p=0.25),
        "torchflows, as it comes": Torchflows(networks, p=0.5),
        OURS: ours_of_terms(networks, x, terms=4),
        "pyroflows, as it comes": Ours(networks),
    }


def training_step(stack: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(stack.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (-stack.log_prob(x).mean()).backward()
        optimizer.step()
        stack.after_step()

    return step


def train_rows(args: argparse.Namespace) -> None:
    print("| training step: D | hidden | library | terms | ms | times |\n|---|---|---|---|---|---|")
    for dim, hidden_dims in SIZES:
        x = torch.randn(BATCH, dim)
        members = stacks([trained_like(dim, hidden_dims) for _ in range(NUM_BLOCKS)], x)
        terms = {name: f"{mean_terms(stack, x):.1f}" for name, stack in members.items() if isinstance(stack, Ours)}
        with ExitStack() as stack:
            steps = {name: training_step(member, x) for name, member in members.items()}
            steps["pyroflows, recorded"] = recorded_step(copy.deepcopy(members[OURS].flow), x, stack)
            times = in_turn(steps, args.rounds, args.repeats)
        for name in steps:
            row = [dim, " ".join(map(str, hidden_dims)), name, terms.get(name, ""), milliseconds(times[name])]
            print("|", " | ".join(map(str, [*row, f"{ratio(times, name, OURS):.2f}"])), "|", flush=True)


@torch.no_grad()
def residual(stack: nn.Module, z: Tensor) -> float:
    x = stack.to_data(z)
    return ((stack.to_base(x) - z).abs() / (1 + x.abs())).max().item()


def draw(stack: nn.Module, z: Tensor) -> None:
    with torch.no_grad():
        stack.to_data(z)


def inverse_rows(args: argparse.Namespace) -> None:
    print("\n| inverse: D | hidden | library | as it comes: residual | ms | times | ", end="")
    print("to our residual: residual | ms | times |\n|---|---|---|---|---|---|---|---|---|")
    for dim, hidden_dims in SIZES:
        z = torch.randn(BATCH, dim)
        networks = [trained_like(dim, hidden_dims) for _ in range(NUM_BLOCKS)]
        members: dict[str, Any] = {
            "normflows": Normflows(networks, iterations=5),
            "torchflows": Torchflows(networks, p=0.5),
            OURS: Ours(networks),
        }
        endless = Normflows(networks, iterations=5)
        endless.tolerance = 0.0
        rounding = residual(endless, z)
        cells: dict[str, list[str]] = {name: [] for name in members}
        for _ in range(2):
            times = in_turn({name: partial(draw, stack, z) for name, stack in members.items()}, args.rounds, 3)
            for name, stack in members.items():
                cells[name] += [f"{residual(stack, z):.0e}", milliseconds(times[name])]
                cells[name] += [f"{ratio(times, name, OURS):.2f}"]
            goal = 2 * max(residual(members[OURS], z), rounding)
            for name in ("normflows", "torchflows"):
                while residual(members[name], z) > goal:
                    members[name].finer()
        for name, row in cells.items():
            print("|", " | ".join(map(str, [dim, " ".join(map(str, hidden_dims)), name, *row])), "|", flush=True)


def speed(args: argparse.Namespace) -> None:
    print(f"batch {BATCH}, {NUM_BLOCKS} blocks, medians of {args.rounds} rounds of {args.repeats} steps in turn\n")
    train_rows(args)
    inverse_rows(args)


class Estimate(NamedTuple):
    parameters: list[nn.Parameter]  # the matrices of the network
    ladj: Callable[[Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    has_gradient: bool = True

    def gradient(self, ladj: Tensor) -> Tensor:
        """The gradient of the mean, in one vector."""
        return torch.cat([g.flatten() for g in torch.autograd.grad(ladj.mean(), self.parameters)])


def matrices(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.dim() == 2]


def exact_ladj(net: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    rows = [torch.autograd.grad(column.sum(), x, create_graph=True)[0] for column in net(x).unbind(-1)]
    return torch.linalg.slogdet(torch.eye(x.shape[-1]) + torch.stack(rows, -2)).logabsdet


def of_normflows(weights: Weights, training: bool = True, **options: bool) -> Estimate:
    net = normflows_net(weights)
    block = normflows.flows.Residual(net, **options).train(training)
    return Estimate(matrices(net), lambda x: block.inverse(x)[1], partial(exact_ladj, net), training)


def of_torchflows(weights: Weights, kind: type[nn.Module], training: bool = True) -> Estimate:
    net = normflows_net(weights)  # torchflows' own layers are another map at every call
    block = kind((weights[0][0].shape[1],), g=net).train(training)
    return Estimate(matrices(net), lambda x: block.forward(x)[1], partial(exact_ladj, net), training)


def of_ours(weights: Weights, **options: Any) -> Estimate:
    layer = our_layer(weights, **options)
    ladj, exact = layer.forward_and_ladj, layer.exact().forward_and_ladj
    return Estimate(matrices(layer), lambda x: ladj(x)[1], lambda x: exact(x)[1])


def mean(draws: list[float]) -> str:
    return f"{statistics.mean(draws):.4f} +- {statistics.stdev(draws) / math.sqrt(len(draws)):.4f}"


def bias_row(estimate: Estimate, x: Tensor, num_draws: int) -> list[str]:
    exact = estimate.exact(x)
    direction = estimate.gradient(exact)
    values, along = [], []
    for _ in range(num_draws):
        ladj = estimate.ladj(x)
        values.append(ladj.mean().item())
        if estimate.has_gradient:
            along.append((estimate.gradient(ladj) @ direction / (direction @ direction)).item())
    return [f"{exact.mean():.4f}", mean(values), mean(along) if along else ""]


def bias(args: argparse.Namespace) -> None:
    dim = 8
    maps = {"z / 2": linear(dim, 0.5), "-z / 2": linear(dim, -0.5), "a network, 8-64-64-8": trained_like(dim, (64, 64))}
    libraries: dict[str, Callable[[Weights], Estimate]] = {
        "normflows": of_normflows,
        "normflows, reduce_memory=False": partial(of_normflows, reduce_memory=False),
        "normflows, evaluation": partial(of_normflows, training=False),
        "torchflows, ResFlowBlock": partial(of_torchflows, kind=ResFlowBlock),
        "torchflows, ResFlowBlock, evaluation": partial(of_torchflows, kind=ResFlowBlock, training=False),
        "torchflows, InvertibleResNetBlock, 2 terms": partial(of_torchflows, kind=InvertibleResNetBlock),
        OURS: of_ours,
    }
    print(f"means of {args.draws} draws at 64 points with standard errors, {dim} dimensions\n")
    print("| g | library | exact | estimate | gradient, over the exact one |\n|---|---|---|---|---|")
    for name, weights in maps.items():
        x = torch.randn(64, dim)
        for library, make in libraries.items():
            print("|", " | ".join([name, library, *bias_row(make(weights), x, args.draws)]), "|", flush=True)


def norm(weight: Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach(), 2).item()


def bounds(args: argparse.Namespace) -> None:
    """Print by how much norms of weights exceed their bounds: normflows' in training, torchflows' from call to call."""
    for iterations in (0, 1, 5, 50):
        torch.manual_seed(args.seed)
        stack = Normflows([trained_like(2, (64, 64)) for _ in range(NUM_BLOCKS)], iterations)
        layers = [m for m in stack.modules() if isinstance(m, normflows.nets.lipschitz.InducedNormLinear)]
        optimizer = torch.optim.Adam(stack.parameters(), lr=3e-3)
        largest = 0.0
        for _ in range(300):
            x = two_arcs()
            optimizer.zero_grad()
            (-stack.log_prob(x).mean()).backward()
            optimizer.step()
            stack.after_step()
            largest = max(largest, *(norm(layer.compute_weight(update=False)) / layer.coeff for layer in layers))
        print(f"normflows, {iterations} iterations: norms up to {largest:.3f} times their bound", flush=True)
    for c in (0.5, 0.97):
        layer = SpectralLinear(64, 64, c=c)
        norms = [norm(layer.w.normalized()) for _ in range(200)]
        print(f"torchflows, c = {c}: norms from {min(norms):.3f} to {max(norms):.3f}")


def two_arcs() -> Tensor:
    angle, second = math.pi * torch.rand(BATCH), torch.randint(0, 2, (BATCH,))
    side = 1 - 2 * second
    places = torch.stack([side * angle.cos() + second, side * angle.sin() + 0.5 * second], 1)
    return places + 0.05 * torch.randn(BATCH, 2)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.distributions.Distribution.set_default_validate_args(False)
    warnings.filterwarnings("ignore", message="Using a non-tuple sequence")  # in torchflows
    torch.manual_seed(args.seed)
    numpy.random.seed(args.seed)  # noqa: NPY002, from which normflows draws its numbers of terms
    print(f"Python {platform.python_version()}, torch {torch.__version__}, normflows 1.7.3, torchflows 1.2.1;")
    {"speed": speed, "bias": bias, "bounds": bounds}[args.part](args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["speed", "bias", "bounds"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=10, help="steps a round")
    parser.add_argument("--draws", type=int, default=4000, help="of each estimate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())

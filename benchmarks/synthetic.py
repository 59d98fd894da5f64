"""How near a fit comes to targets of which exact draws exist, straight from the flow and corrected.

The targets are densities without data: Gaussians, a banana, Neal's funnel, Student-t, two modes. The distance is the
sum over coordinates of the 1-D Wasserstein distances, each the mean absolute difference of sorted draws, of 10,000
draws against 10,000 exact ones (Agrawal and Domke 2024). Its yardstick is the distance of exact draws from exact ones.
All distances are medians over pairs of fresh sets of draws. Corrected draws are resampled from weighted ones, or come
from MCMC where the verdict says that the weights cannot be trusted.

    python -m benchmarks.synthetic --targets gaussian banana --seeds 0 1 --json output/synthetic.json
"""

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import constraints

import pyroflows as pf

NUM_DRAWS = 10_000
NUM_WEIGHTED = 200_000
NUM_PAIRS = 20
NUM_CHAINS, CHAIN_LENGTH = 100, 500
GOAL = 1.5

Draws = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Target:
    """A Pyro model without data, 10,000 exact draws of its sites, and whether the goal holds for it."""

    model: Callable[[], None]
    exact: Draws
    has_goal: bool = True


def of_density(law: dist.Distribution, has_goal: bool = True) -> Target:
    """A law over vectors that is known to the model only by its density, so that no prior says where it lies."""

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), law.event_shape))
        pyro.factor("density", law.log_prob(x))

    return Target(model, lambda: {"x": law.sample((NUM_DRAWS,))}, has_goal)


def gaussian(dim: int, condition: float) -> Target:
    """Randomly rotated; the variances along the axes go from condition^-1/2 to condition^1/2."""
    generator = torch.Generator().manual_seed(7)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    half = torch.tensor(condition).log10().item() / 2
    variances = torch.logspace(-half, half, dim, dtype=torch.float64)
    scale_tril = torch.linalg.cholesky(rotation * variances @ rotation.T).float()
    loc = torch.randn(dim, generator=generator)
    return of_density(dist.MultivariateNormal(loc, scale_tril=scale_tril))


class Banana(dist.TorchDistribution):
    """x1 ~ N(0, 2^2), x2 | x1 ~ N(x1^2 / 4, 1)."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self) -> None:
        super().__init__(event_shape=torch.Size([2]))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        x1 = 2 * torch.randn(sample_shape)
        return torch.stack([x1, x1**2 / 4 + torch.randn(sample_shape)], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        x1, x2 = x.unbind(-1)
        return dist.Normal(0.0, 2.0).log_prob(x1) + dist.Normal(x1**2 / 4, 1.0).log_prob(x2)


def funnel_model() -> None:
    """Neal's funnel, centred: v ~ N(0, 3^2), nine x_i ~ N(0, e^v)."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("D", 9):
        pyro.sample("x", dist.Normal(0.0, torch.exp(v / 2)))


def funnel_draws() -> dict[str, Tensor]:
    v = 3 * torch.randn(NUM_DRAWS)
    return {"v": v, "x": torch.exp(v / 2)[:, None] * torch.randn(NUM_DRAWS, 9)}


def student_t(dim: int, df: float) -> Target:
    """Independent in each coordinate."""
    return of_density(dist.StudentT(df).expand([dim]).to_event(1), has_goal=False)


def two_modes() -> Target:
    """0.3 N((-4, -1), I) + 0.7 N((4, 1), I)."""
    parts = dist.Normal(torch.tensor([[-4.0, -1.0], [4.0, 1.0]]), 1.0).to_event(1)
    return of_density(dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts), has_goal=False)


TARGETS = {
    "gaussian": gaussian(10, condition=10.0),
    "gaussian, condition 1e4": gaussian(10, condition=1e4),
    "gaussian, condition 1e6": gaussian(10, condition=1e6),
    "banana": of_density(Banana()),
    "funnel": Target(funnel_model, funnel_draws),
    "student-t, df 2.5": student_t(10, df=2.5),
    "student-t, df 1.5": student_t(10, df=1.5),
    "two modes": two_modes(),
}


@dataclass(frozen=True)
class Result:
    """Of one fit; ratios are distances over that of exact draws from exact ones. The true log evidence is 0."""

    target: str
    seed: int
    exact_distance: float
    flow_ratio: float
    corrected_ratio: float
    corrected_by: str
    verdict: str
    khat: float
    log_evidence: float
    log_evidence_se: float
    seconds: float
    steps: int


COLUMNS = (
    *("target", "seed", "exact", "flow / exact", "corrected / exact", "by", "goal"),
    *("verdict", "k-hat", "log evidence (0)", "s", "steps"),
)


def wasserstein(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Sum over coordinates of 1-D distances, of equally many draws."""
    return sum(
        (a[name].double().sort(0).values - b[name].double().sort(0).values).abs().mean(0).sum().item() for name in b
    )


def distance(draws: Draws, exact: Draws) -> float:
    return statistics.median(wasserstein(draws(), exact()) for _ in range(NUM_PAIRS))


def corrected(posterior: pf.Posterior, correction: str) -> tuple[str, Draws]:
    """How the fit was corrected, and what draws from that. Many more draws stand behind each set of 10,000."""
    diagnosis = posterior.diagnose()
    if correction == "auto":
        correction = "mcmc" if diagnosis.verdict == "do not use" else "importance"
    if correction == "importance":
        weighted = posterior.importance_sample(NUM_WEIGHTED)
        return correction, lambda: weighted.resample(NUM_DRAWS)
    chains = posterior.mcmc(CHAIN_LENGTH, NUM_CHAINS, method="hmc").draws
    pooled = {name: value.flatten(0, 1) for name, value in chains.items()}

    def subset() -> dict[str, Tensor]:
        indices = torch.randperm(NUM_CHAINS * CHAIN_LENGTH)[:NUM_DRAWS]
        return {name: value[indices] for name, value in pooled.items()}

    return correction, subset


def fit(name: str, seed: int, correction: str, options: dict[str, Any]) -> Result:
    target = TARGETS[name]
    torch.manual_seed(1000 + seed)
    yardstick = distance(target.exact, target.exact)
    vi = pf.FlowVI(target.model, seed=seed, progress_bar=False, **options)
    start = time.perf_counter()
    posterior = vi.run()
    seconds = time.perf_counter() - start
    flow_ratio = distance(lambda: posterior.sample(NUM_DRAWS), target.exact) / yardstick
    method, draws = corrected(posterior, correction)
    return Result(
        target=name,
        seed=seed,
        exact_distance=yardstick,
        flow_ratio=flow_ratio,
        corrected_ratio=distance(draws, target.exact) / yardstick,
        corrected_by=method,
        verdict=posterior.diagnose().verdict,
        khat=posterior.khat,
        log_evidence=posterior.log_evidence,
        log_evidence_se=posterior.log_evidence_se,
        seconds=seconds,
        steps=posterior.history.num_steps,
    )


def row(result: Result) -> str:
    goal = f"{GOAL}, {'met' if result.corrected_ratio <= GOAL else 'missed'}" if TARGETS[result.target].has_goal else ""
    return (
        f"| {result.target} | {result.seed} | {result.exact_distance:.3g} | {result.flow_ratio:.2f} "
        f"| {result.corrected_ratio:.2f} | {result.corrected_by} | {goal} | {result.verdict} | {result.khat:.2f} "
        f"| {result.log_evidence:.3f} | {result.seconds:.0f} | {result.steps} |"
    )


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {args.threads} thread(s)\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    options = {} if args.gate is None else {"gate": args.gate == "on"}
    results = []
    for name in args.targets:
        for seed in args.seeds:
            results.append(fit(name, seed, args.correction, options))
            print(row(results[-1]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS), metavar="TARGET")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--correction", choices=["auto", "importance", "mcmc"], default="auto")
    parser.add_argument("--gate", choices=["on", "off"], help="of FlowVI; its default where left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all figures")
    warnings.filterwarnings("ignore", category=UserWarning, module="pyro")
    main(parser.parse_args())

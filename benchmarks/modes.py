"""Whether a fit finds all modes of posteriors that have several, and what its verdict says where it does not.

Ten models with two to eight modes, equal and unequal, by symmetry or not, of two to twenty dimensions. The share of
each mode is known. A fit with default settings has found a mode if its share among the draws is at least half of the
right one. A mode counts as missing if it holds more than 2 % of the mass and was not found; with the verdict "good"
that is an error, of which there should be none.

    python -m benchmarks.modes --targets signs crescents --seeds 0 1 2 --json output/modes.json
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import constraints

import pyroflows as pf

NUM_DRAWS = 20_000
MISSING, FOUND = 0.02, 0.5

Sites = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A Pyro model with several modes.

    Args:
        model: the model, without arguments.
        mode_of: draws of the sites to the number of the mode in which each lies, ``(S,)``.
        shares: the share of each mode.
    """

    model: Callable[[], None]
    mode_of: Callable[[Sites], Tensor]
    shares: tuple[float, ...]


def of_density(law: dist.Distribution, mode_of: Callable[[Tensor], Tensor], shares: tuple[float, ...]) -> Target:
    """A law over vectors that is known to the model only by its density, so that no prior says where it lies."""

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), law.event_shape))
        pyro.factor("density", law.log_prob(x))

    return Target(model, lambda sites: mode_of(sites["x"]), shares)


def gaussians(locs: Tensor, weights: tuple[float, ...], sd: float) -> Target:
    """A mixture of Gaussians at ``locs``, ``(K, D)``."""
    parts = dist.Normal(locs, sd).to_event(1)
    law = dist.MixtureSameFamily(dist.Categorical(torch.tensor(weights)), parts)
    return of_density(law, lambda x: torch.cdist(x, locs).argmin(-1), weights)


def random_locs(num: int, dim: int, distance: float) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    locs = torch.randn(num, dim, generator=generator)
    return distance * locs / locs.norm(dim=-1, keepdim=True)


def bits(*are_set: Tensor) -> Tensor:
    """Number the combinations of conditions."""
    return sum((2**i * condition.long() for i, condition in enumerate(are_set)), torch.zeros(()).long())


def signs() -> Target:
    """The signs of a and b do not matter: four equal modes."""
    y = torch.randn(6, generator=torch.Generator().manual_seed(0))

    def model() -> None:
        a = pyro.sample("a", dist.Uniform(-3.0, 3.0))
        b = pyro.sample("b", dist.Uniform(-3.0, 3.0))
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(m, a**2 + 0.01), obs=y)
            pyro.sample("z", dist.Normal(m, b**2 + 0.01), obs=2 * y)

    return Target(model, lambda s: bits(s["a"] > 0, s["b"] > 0), (0.25,) * 4)


class Crescents(dist.TorchDistribution):
    """Two halves of a ring of radius 4 and width 0.3, cut apart and moved by one radius, in equal parts."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self) -> None:
        super().__init__(event_shape=torch.Size([2]))

    def log_prob(self, x: Tensor) -> Tensor:
        def crescent(x1: Tensor, x2: Tensor) -> Tensor:
            radius = (x1**2 + x2**2 + 1e-6).sqrt()
            return -0.5 * ((radius - 4) / 0.3) ** 2 + torch.nn.functional.logsigmoid(4 * x2)

        x1, x2 = x.unbind(-1)
        return torch.logaddexp(crescent(x1 + 2, x2 - 1), crescent(x1 - 2, -x2 - 1))


def crescents() -> Target:
    return of_density(Crescents(), lambda x: (x[:, 1] < 0).long(), (0.5, 0.5))


def products() -> Target:
    """Only products are seen: the signs of pairs can change, in eight equal modes of six dimensions."""
    y = torch.tensor([1.5, -2.0, 3.0])

    def model() -> None:
        with pyro.plate("n", 3):
            a = pyro.sample("a", dist.Normal(0.0, 2.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.5))
            pyro.sample("y", dist.Normal(a * b, 0.2), obs=y)

    return Target(model, lambda s: bits(*(s["a"] > 0).unbind(-1)), (0.125,) * 8)


def labels() -> Target:
    """A mixture of three with free labels: weights, means and scales are permuted together, in six equal modes."""
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 120, True, generator=generator)
    y = torch.tensor([-4.0, 0.0, 4.0])[which] + 0.5 * torch.randn(120, generator=generator)
    orders = torch.tensor(list(permutations(range(3))))

    def model() -> None:
        w = pyro.sample("w", dist.Dirichlet(2 * torch.ones(3)))
        with pyro.plate("comp", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 4.0))
            s = pyro.sample("s", dist.LogNormal(-0.5, 0.5))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, s)), obs=y)

    def mode_of(sites: Sites) -> Tensor:
        return (sites["mu"].argsort(-1)[:, None] == orders).all(-1).long().argmax(-1)

    return Target(model, mode_of, (1 / 6,) * 6)


def factors() -> Target:
    """One factor with free signs: loadings and scores change sign together, in two equal modes of 17 dimensions."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(12, 1, generator=generator)
    y = scores * torch.tensor([2.0, -1.5, 1.0, 1.8]) + 0.4 * torch.randn(12, 4, generator=generator)

    def model() -> None:
        loadings = pyro.sample("loadings", dist.Normal(torch.zeros(1, 4), 2.0).to_event(2))
        sd = pyro.sample("sd", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("row", len(y)):
            f = pyro.sample("f", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(f @ loadings, sd[..., None]).to_event(1), obs=y)

    return Target(model, lambda s: (s["loadings"][:, 0, 0] > 0).long(), (0.5, 0.5))


def two_rates() -> Target:
    """A sum of two decays, which can be exchanged although their amplitudes lie in another plate: two equal modes."""
    t = torch.linspace(0, 4, 20)
    y = 3 * torch.exp(-0.3 * t) + 5 * torch.exp(-3.0 * t)
    y = y + 0.1 * torch.randn(20, generator=torch.Generator().manual_seed(2))

    def model() -> None:
        with pyro.plate("decay", 2):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.5))
        with pyro.plate("part", 2):
            amplitude = pyro.sample("amplitude", dist.HalfNormal(5.0))
        mean = (amplitude[..., None] * torch.exp(-rate[..., None] * t)).sum(-2)
        with pyro.plate("time", len(t)):
            pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    return Target(model, lambda s: (s["rate"][:, 0] > s["rate"][:, 1]).long(), (0.5, 0.5))


def grid() -> Target:
    """Eight modes of unequal shares in three dimensions, without a symmetry."""
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=3)))
    locs = corners * torch.tensor([4.0, 5.0, 6.0]) + torch.tensor([0.5, -0.3, 0.8])
    return gaussians(locs, (0.24, 0.2, 0.16, 0.12, 0.1, 0.08, 0.06, 0.04), sd=1.0)


TARGETS = {
    "signs": signs(),
    "labels": labels(),
    "crescents": crescents(),
    "products": products(),
    "factors": factors(),
    "two rates": two_rates(),
    "90 to 10": gaussians(torch.tensor([[-3.0, 0.0], [5.0, 2.0]]), (0.9, 0.1), sd=1.0),
    "95 to 5": gaussians(random_locs(2, dim=10, distance=5.0), (0.95, 0.05), sd=0.7),
    "grid of eight": grid(),
    "four in twenty": gaussians(random_locs(4, dim=20, distance=8.0), (0.4, 0.3, 0.2, 0.1), sd=1.0),
}


@dataclass(frozen=True)
class Result:
    """What one fit found."""

    target: str
    seed: int
    shares: tuple[float, ...]
    num_missing: int
    verdict: str
    new_mode_probability: float
    num_starts: int
    seconds: float

    @property
    def is_error(self) -> bool:
        """Whether a mode is missing and the verdict is good."""
        return self.num_missing > 0 and self.verdict == "good"


def fit(name: str, seed: int) -> Result:
    target = TARGETS[name]
    start = time.process_time()
    posterior = pf.FlowVI(target.model, seed=seed, progress_bar=False).run()
    verdict = posterior.diagnose().verdict
    seconds = time.process_time() - start
    counts = target.mode_of(posterior.sample(NUM_DRAWS)).bincount(minlength=len(target.shares))
    shares = tuple((counts / NUM_DRAWS).tolist())
    missing = [s > MISSING and found < FOUND * s for s, found in zip(target.shares, shares, strict=True)]
    starts = posterior.starts
    assert starts is not None
    return Result(
        name, seed, shares, sum(missing), verdict, starts.new_mode_probability, starts.num_starts, round(seconds, 1)
    )


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {args.threads} thread(s)\n")
    columns = ("target", "seed", "shares", "missing", "verdict", "new mode below", "starts", "s")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    results = []
    for name in args.targets:
        for seed in args.seeds:
            found = fit(name, seed)
            results.append(found)
            shares = " ".join(f"{share:.2f}" for share in found.shares)
            cells: tuple[Any, ...] = (name, seed, shares, found.num_missing, found.verdict)
            cells += (f"{found.new_mode_probability:.3f}", found.num_starts, found.seconds)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    complete = sum(found.num_missing == 0 for found in results)
    errors = sum(found.is_error for found in results)
    print(f"\n{complete} of {len(results)} fits found all modes; {errors} missed one with the verdict good")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([asdict(found) for found in results], indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS), metavar="TARGET")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all figures")
    warnings.filterwarnings("ignore", category=UserWarning, module="pyro")
    main(parser.parse_args())

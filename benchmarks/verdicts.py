"""Whether verdicts can be relied on.

    python -m benchmarks.verdicts [reference calibrated bad] [--path FOLDER] [--seeds 20] [--repeats 10]

- reference: each of the sixteen reference posteriors (see :mod:`benchmarks.posteriordb.run`) is fitted once and
  diagnosed ten times, with fresh draws each time. The ten verdicts should agree.
- calibrated: ten small models with data simulated from their priors, twenty data sets each, of which 98 % should be
  "good". Whether the fits are right does not rest on the verdict: means and sds of the unconstrained latents are
  compared with those of 100,000 draws from a wider proposal, weighted; and the ranks of the true latents among draws of
  all fits should be uniform. A fit is right if no mean is off by more than 0.1 sd and no sd by more than 10 %.
- bad: Gaussians of which it is known that they fit badly. None of ten diagnoses should be "good".

In all parts the words of a "good" verdict should hold no k-hat above its threshold.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import torch
from pyro import distributions as dist
from scipy import stats
from torch import Tensor
from torch.distributions import constraints

import pyroflows as pf
from benchmarks.posteriordb import reference
from benchmarks.posteriordb.models import TARGETS
from benchmarks.small_models import MODELS, simulated
from pyroflows.inference.verdict.diagnosis import Diagnosis
from pyroflows.inference.verdict.draws import NUM_DIAGNOSTIC_SAMPLES, DiagnosticDraws
from pyroflows.training.history import History

NUM_DRAWS = 100_000
NUM_RANKED = 1000
FIRST_SEED = 1000


def diagnosed(posterior: pf.Posterior, repeats: int) -> Iterator[Diagnosis]:
    """Diagnose a posterior several times, with fresh draws each time."""
    for seed in range(FIRST_SEED, FIRST_SEED + repeats):
        law = posterior.guide.flow()
        draws = DiagnosticDraws.drawn(law, posterior.log_joint, NUM_DIAGNOSTIC_SAMPLES, seed)
        yield draws.diagnosis(posterior.guide.flow, posterior.history, posterior.starts)


def contradicts_itself(diagnosis: Diagnosis) -> bool:
    """Whether the words of a "good" verdict hold a k-hat that is not said to be below its threshold."""
    return diagnosis.verdict == "good" and any(
        reason.startswith("k-hat") and "below the threshold" not in reason for reason in diagnosis.reasons
    )


def row(name: str, found: list[Diagnosis]) -> str:
    counts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(d.verdict for d in found).items())
    khats = [d.khat for d in found]
    unseen = [100 * d.unseen_share for d in found if d.unseen_share is not None]
    shares = f"{min(unseen):.2f} to {max(unseen):.2f}" if unseen else ""
    sizes = sorted({d.num_samples for d in found})
    return f"| {name} | {counts} | {min(khats):.2f} to {max(khats):.2f} | {shares} | {', '.join(map(str, sizes))} |"


def header(title: str) -> None:
    print(f"\n{title}\n\n| fit | verdicts | k-hat | % unseen | draws |\n|---|---|---|---|---|", flush=True)


def run_reference(folder: Path, repeats: int) -> None:
    header("Reference posteriors")
    num_agreeing = num_contradictions = 0
    for name, target in TARGETS.items():
        with target.default_dtype():
            args = target.args(reference.load(folder, name).data)
            posterior = pf.FlowVI(target.model, seed=0, progress_bar=False).run(*args)
            found = list(diagnosed(posterior, repeats))
        num_agreeing += len({d.verdict for d in found}) == 1
        num_contradictions += sum(map(contradicts_itself, found))
        print(row(name, found), flush=True)
    print(f"\nverdicts agree for {num_agreeing} of {len(TARGETS)} fits; {num_contradictions} contradict themselves")


def run_calibrated(num_seeds: int) -> None:
    header("Small models, one diagnosis a fit")
    found, wrong, ranks = [], [], []
    for model in MODELS:
        of_model = []
        for seed in range(num_seeds):
            truth, y = simulated(model, seed)
            posterior = pf.FlowVI(model, seed=seed, progress_bar=False).run(y)
            of_model.append(posterior.diagnose())
            torch.manual_seed(seed)
            if (off := error(posterior)) > 1:
                wrong.append(f"{model.__name__} {seed}, {of_model[-1].verdict}, {off:.1f} times what is right")
            draws = posterior.sample(NUM_RANKED)
            ranks += [(draws[name] < value).double().mean(0).flatten() for name, value in truth.items()]
        found += of_model
        print(row(model.__name__, of_model), flush=True)
    num_good = sum(d.verdict == "good" for d in found)
    print(f"\n{num_good} of {len(found)} fits are good; {sum(map(contradicts_itself, found))} contradict themselves")
    print(f"{len(wrong)} fits are not right: {wrong}")
    uniform = stats.kstest(torch.cat(ranks).numpy(), "uniform")
    print(f"ranks of {len(torch.cat(ranks))} true latents are uniform with p = {uniform.pvalue:.3f}")


@torch.no_grad()
def error(posterior: pf.Posterior) -> float:
    """The largest error of a mean over 0.1 sd, or of an sd over 10 %, beyond three standard errors.

    The proposal is a mixture in equal parts of the flow and of a Student-t law, whose scale matrix is twice the
    covariance of the flow.
    """
    flow = posterior.guide.flow()
    own, _ = flow.rsample_and_log_prob((NUM_DRAWS // 2,))
    mean, sd = own.mean(0), own.std(0)
    root = torch.linalg.cholesky(2 * torch.atleast_2d(torch.cov(own.T)))
    wide = dist.MultivariateStudentT(5.0, mean, root)
    x = torch.cat([own, wide.sample((NUM_DRAWS // 2,))])
    log_q = torch.logaddexp(flow.log_prob(x), wide.log_prob(x))
    weights = (posterior.log_joint.in_chunks(x) - log_q).double().softmax(0)
    z = ((x - mean) / sd).double()
    shift = weights @ z
    ratio = (weights @ (z - shift) ** 2).sqrt()
    shift_se = (weights**2 @ (z - shift) ** 2).sqrt()
    ratio_se = 0.5 * (weights**2 @ (((z - shift) / ratio) ** 2 - 1) ** 2).sqrt()
    errors = torch.cat([shift.abs() - 3 * shift_se, (ratio - 1).abs() - 3 * ratio_se])
    return (errors / 0.1).max().item()


def by_hand(model: Callable[[], None], loc: Tensor | float, sd: Tensor | float) -> pf.Posterior:
    """The posterior of a Gaussian guide, for which nothing was trained."""
    guide = pf.guides.AutoFlow(model, lambda dim: [pf.transforms.Elementwise(dim)])
    guide()
    size = torch.Size([guide.layout.dim])
    parameters = torch.stack([torch.as_tensor(loc).expand(size), torch.as_tensor(sd).expand(size).log()], -1)
    with torch.no_grad():
        guide.flow.transform.layers[-1].parameters_of.value.copy_(parameters)
    return pf.Posterior(model, guide, (), {}, History({"elbo": [-1.0]}))


def of_density(law: dist.Distribution) -> Callable[[], None]:
    """A model without data whose posterior is the law."""

    def model() -> None:
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), law.event_shape))
        pyro.factor("density", law.log_prob(x))

    return model


def funnel() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("D", 9):
        pyro.sample("x", dist.Normal(0.0, torch.exp(v / 2)))


def two_modes(weight: float, distance: float) -> Callable[[], None]:
    parts = dist.Normal(torch.tensor([[0.0, 0.0], [distance, 0.0]]), 1.0).to_event(1)
    return of_density(dist.MixtureSameFamily(dist.Categorical(torch.tensor([1 - weight, weight])), parts))


def independent(law: dist.Distribution, dim: int) -> Callable[[], None]:
    return of_density(law.expand([dim]).to_event(1))


def narrow_in_one(dim: int, sd: float) -> Tensor:
    return torch.ones(dim).index_fill(0, torch.tensor([dim // 2]), sd)


BAD: dict[str, tuple[Callable[[], None], Tensor | float, Tensor | float]] = {
    "funnel": (funnel, 0.0, torch.tensor([1.5, *[1.0] * 9])),
    "Student-t, df 1.5": (independent(dist.StudentT(1.5), 1), 0.0, 1.3),
    "Student-t, df 1.5, 10-D": (independent(dist.StudentT(1.5), 10), 0.0, 1.3),
    "Student-t, df 2.5": (independent(dist.StudentT(2.5), 1), 0.0, 1.2),
    "Student-t, df 4": (independent(dist.StudentT(4.0), 1), 0.0, 1.1),
    "one of two modes, 4 sd away": (two_modes(0.3, 4.0), 0.0, 1.0),
    "one of two modes, 8 sd away": (two_modes(0.1, 8.0), 0.0, 1.0),
    "over two modes": (two_modes(0.5, 5.0), torch.tensor([2.5, 0.0]), torch.tensor([2.7, 1.0])),
    "narrow by 0.3": (independent(dist.Normal(0.0, 1.0), 2), 0.0, 0.3),
    "narrow by 0.7": (independent(dist.Normal(0.0, 1.0), 1), 0.0, 0.7),
    "narrow by 0.8 in 1 of 20": (independent(dist.Normal(0.0, 1.0), 20), 0.0, narrow_in_one(20, 0.8)),
    "narrow by 0.6 in 50": (independent(dist.Normal(0.0, 1.0), 50), 0.0, 0.6),
}


def run_bad(repeats: int) -> None:
    header("Fits that are known to be bad")
    num_good = 0
    for name, (model, loc, sd) in BAD.items():
        found = list(diagnosed(by_hand(model, loc, sd), repeats))
        num_good += sum(d.verdict == "good" for d in found)
        print(row(name, found), flush=True)
    print(f"\n{num_good} of {len(BAD) * repeats} diagnoses are good")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("reference", "calibrated", "bad")
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(parts)}; all by default")
    parser.add_argument("--path", type=Path, default=os.environ.get("PYROFLOWS_POSTERIORDB"))
    parser.add_argument("--seeds", type=int, default=20, help="data sets of each small model")
    parser.add_argument("--repeats", type=int, default=10, help="diagnoses of each of the other fits")
    options = parser.parse_args()
    chosen = options.parts or parts
    if unknown := set(chosen) - set(parts):
        parser.error(f"there are no parts {sorted(unknown)}")
    if "reference" in chosen and options.path is None:
        parser.error("give --path, or set PYROFLOWS_POSTERIORDB")
    torch.set_num_threads(1)
    if "bad" in chosen:
        run_bad(options.repeats)
    if "calibrated" in chosen:
        run_calibrated(options.seeds)
    if "reference" in chosen:
        run_reference(options.path, options.repeats)


if __name__ == "__main__":
    main()

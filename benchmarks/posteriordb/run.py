r"""FlowVI with default settings on sixteen reference posteriors of posteriordb.

    python -m benchmarks.posteriordb.run --path FOLDER [names...] [--seeds 0 1 2] [--no-gate] [--guide NAME]
                                               [--nuts] [--json FILE]

The folder, which ``PYROFLOWS_POSTERIORDB`` may name instead, is a checkout of github.com/stan-dev/posteriordb or one of
the layout in :mod:`.reference`. Names are any part of the posteriors' names; without names all sixteen run. A row of
the table is a fit, on one thread:

- s: seconds of the fit and its verdict, imports not counted, and of a processor; steps of its training, 0 where a
  Gaussian was enough; its ELBO and k-hat.
- flow: accuracy of 100,000 draws straight from the flow.
- corrected: accuracy after the correction, and its seconds. That is importance sampling, with as many draws as give an
  effective sample size of 20,000, 400,000 at most; or where the verdict says not to use the flow, HMC in its space.
- verdict, and whether it is true: "good" promises that draws of the flow are close to the reference, "correct it" that
  corrected ones are, "do not use" that one of the two is not. "overcautious": "correct it" of a flow that is close.

Accuracy is two figures. The first is the largest distance of a mean from that of the reference, over all scalar
components, in the reference's standard deviations; the second is the sd over that of the reference, of the component
where it is farthest from 1. Close means at most 0.1 and within 10 %. Components whose moments are set by a few extreme
draws (K_m and V_m of one_comp_mm_elim_abs) are compared by their logarithms' 5, 50 and 95 % quantiles, of which the
worst counts, in units of the reference's 5-95 % width / 3.29, and by that width in place of the sd. The reference's
own standard error is about 0.01 in both figures.

NUTS for comparison: :mod:`.nuts` (``--nuts`` adds its figures to the table) and :mod:`.numpyro_nuts`.
"""

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import arviz  # noqa: F401  (imports are no part of a fit)
import numpy as np
import torch
import torch._dynamo  # what torch's optimizers import at their first step
from torch import Tensor

import pyroflows as pf
from benchmarks.posteriordb import reference
from benchmarks.posteriordb.metrics import Accuracy, accuracy
from benchmarks.posteriordb.models import TARGETS
from benchmarks.posteriordb.nuts import nuts
from benchmarks.posteriordb.samplers import limited, selected

CHUNK = 20_000
NUM_DRAWS = 100_000
ENOUGH_ESS = 20_000
MAX_DRAWS = 400_000
HMC_CHAINS, HMC_DRAWS = 64, 500

COLUMNS = ("posterior", "seed", "s", "steps", "ELBO", "k-hat", "flow", "corrected", "s more", "by", "verdict", "is")


def measure(folder: Path, name: str, seed: int, options: Mapping[str, Any], guide: str | None = None) -> dict[str, Any]:
    """Fit once, correct, and compare both with the reference; ``guide`` names a guide, a recipe, or the default."""
    target, ref = TARGETS[name], reference.load(folder, name)
    with target.default_dtype():
        args = target.args(ref.data)
        start, cpu_start = time.perf_counter(), time.process_time()
        own = guide and _made(guide, target.model)
        posterior = pf.FlowVI(target.model, own, seed=seed, progress_bar=False, **options).run(*args)
        diagnosis = posterior.diagnose()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        torch.manual_seed(seed)
        chunks = (posterior.sample(CHUNK) for _ in range(NUM_DRAWS // CHUNK))
        straight = accuracy(_joined(_arrays(chunk, ref) for chunk in chunks), ref.draws, target.by_quantiles)
        start = time.perf_counter()
        by, draws, weights = _correction(posterior, diagnosis.verdict, ref)
        correction_seconds = time.perf_counter() - start
    corrected = accuracy(draws, ref.draws, target.by_quantiles, weights)
    return {
        "name": name,
        "seed": seed,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "steps": posterior.history.num_steps,
        "elbo": posterior.elbo,
        "khat": posterior.khat,
        "straight": vars(straight),
        "corrected": vars(corrected),
        "correction_seconds": correction_seconds,
        "by": by,
        "verdict": diagnosis.verdict,
        "judged": judged(diagnosis.verdict, straight, corrected),
    }


def _made(guide: str, model: Any) -> Any:
    """A guide of the model, which starts where it stands, or a recipe, which starts at the posterior's Gaussian."""
    return getattr(pf.guides, guide)(model) if hasattr(pf.guides, guide) else pf.flows.Recipe(guide)


def judged(verdict: str, straight: Accuracy, corrected: Accuracy) -> str:
    """Whether a verdict is "true", "overcautious" or "false"."""
    if verdict == "do not use":
        return "false" if straight.is_close and corrected.is_close else "true"
    promised = straight if verdict == "good" else corrected
    if not promised.is_close:
        return "false"
    return "overcautious" if verdict == "correct it" and straight.is_close else "true"


def _correction(
    posterior: Any, verdict: str, ref: reference.Reference
) -> tuple[str, dict[str, np.ndarray], np.ndarray | None]:
    """The method, draws ``(S, *shape)``, and their weights unless they are equal."""
    if verdict == "do not use":
        chains = posterior.mcmc(HMC_DRAWS, HMC_CHAINS, method="hmc", progress_bar=False)
        return "HMC", _arrays({key: draws.flatten(0, 1) for key, draws in chains.draws.items()}, ref), None
    parts, log_weights, ess = [], torch.empty(0, dtype=torch.float64), 0.0
    # Each chunk has its weights smoothed by itself; they keep their offset, so chunks can be joined.
    while ess < ENOUGH_ESS and len(log_weights) < MAX_DRAWS:
        found = posterior.importance_sample(CHUNK)
        parts.append(_arrays(found.draws, ref))
        log_weights = torch.cat([log_weights, found.log_weights])
        ess = 1 / torch.softmax(log_weights, 0).square().sum().item()
    return f"IS {len(log_weights) // 1000}k", _joined(parts), torch.softmax(log_weights, 0).numpy()


def _arrays(draws: Mapping[str, Tensor], ref: reference.Reference) -> dict[str, np.ndarray]:
    """Of the quantities that the reference has."""
    return {key: draws[key].numpy() for key in ref.draws}


def _joined(parts: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    parts = list(parts)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def row(result: Mapping[str, Any]) -> str:
    """A row of the Markdown table."""
    start = [result["name"], str(result["seed"])]
    if "error" in result:
        return "| " + " | ".join([*start, *[""] * (len(COLUMNS) - 4), result["error"], "false"]) + " |"
    flow, corrected = (
        f"{result[key]['mean_error']:.3f}, {result[key]['sd_ratio']:.3f}" for key in ("straight", "corrected")
    )
    cells = [
        *start,
        f"{result['seconds']:.1f} ({result['cpu_seconds']:.1f})",
        str(result["steps"]),
        f"{result['elbo']:.3f}",
        f"{result['khat']:.2f}",
        flow,
        corrected,
        f"{result['correction_seconds']:.1f}",
        result["by"],
        result["verdict"],
        result["judged"],
    ]
    if "nuts" in result:
        found = result["nuts"]
        accurate = f"{found['mean_error']:.3f}, {found['sd_ratio']:.3f}" if "mean_error" in found else "stopped"
        cells += [f"{found.get('cpu_seconds', math.nan):.0f}", found.get("error", accurate)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="posteriors, by any part of their names; all by default")
    parser.add_argument("--path", type=Path, default=os.environ.get("PYROFLOWS_POSTERIORDB"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--no-gate", action="store_true", help="train a flow where a Gaussian would do, too")
    parser.add_argument("--guide", help="a guide or a recipe in the place of the default, such as AutoResidual or CNF")
    parser.add_argument("--nuts", action="store_true", help="run Pyro's NUTS on each as well, ten minutes at most")
    parser.add_argument("--json", type=Path, help="file to which a line is added for each fit")
    options = parser.parse_args()
    if options.path is None:
        parser.error("give --path, or set PYROFLOWS_POSTERIORDB")
    torch.set_num_threads(1)
    columns = [*COLUMNS, "NUTS CPU s", "NUTS"] if options.nuts else COLUMNS
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    results = []
    for name in selected(TARGETS, options.names):
        beside = {"nuts": limited(nuts, options.path, name)} if options.nuts else {}
        for seed in options.seeds:
            try:
                found = measure(options.path, name, seed, {"gate": False} if options.no_gate else {}, options.guide)
            except Exception as error:  # one posterior that fails is a row of the table
                found = {"name": name, "seed": seed, "error": f"{type(error).__name__}: {error}", "judged": "false"}
            results.append({**found, **beside})
            print(row(results[-1]), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    counts = Counter(result["judged"] for result in results)
    seconds = sum(result.get("seconds", 0.0) for result in results)
    print(f"\n{len(results)} fits in {seconds:.0f} s; verdicts: " + ", ".join(f"{n} {k}" for k, n in counts.items()))


if __name__ == "__main__":
    main()

"""FlowVI with default settings on middle-sized and large hierarchies, beside NumPyro's NUTS.

    python -m benchmarks.hierarchies.run [names...] [--reference FOLDER] [--numpyro PYTHON] [--threads 1] [--seeds 0]
                                         [--json FILE]

A row of the table is a fit:

- s: seconds of the fit and its verdict, and in brackets those of the processor. The processor's go to describing the
  model, the search for modes, recording steps, training them, and the rest, which is the verdict.
- steps of each training, milliseconds of the processor a step, and verdict, effective sample size and k-hat of 10,000
  draws.
- flow, corrected: the largest distance of a mean from that of a long run of NUTS, in posterior standard deviations,
  and the sd over that of the long run, where it is farthest from 1, of 20,000 draws as they are and weighted.
- NUTS: seconds, r-hat, least effective sample size and divergences of :mod:`.numpyro_nuts`, which ``--numpyro``, the
  Python of its environment, runs after each fit. It also writes the moments of long runs that the folder holds.
"""

import argparse
import json
import subprocess
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what torch's optimizers import at their first step

import pyroflows as pf
from benchmarks.hierarchies.accuracy import Moments, accuracy, load, moments
from benchmarks.hierarchies.data import DATA, IN_FLOAT64
from benchmarks.hierarchies.models import arguments, model
from benchmarks.hierarchies.phases import watched

NUM_DRAWS = 20_000
COLUMNS = (
    *("model", "latents", "s", "describe", "search", "record", "train", "rest", "steps", "ms a step"),
    *("verdict", "ESS", "k-hat", "flow", "corrected", "NUTS s", "r-hat", "ESS", "divergences"),
)


def measure(name: str, seed: int) -> tuple[dict[str, Any], pf.Posterior]:
    """Figures of a fit, and what it found."""
    arguments_ = arguments(name)
    dtype = torch.float64 if name in IN_FLOAT64 else None
    with watched() as phases, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start, cpu_start = time.perf_counter(), time.process_time()
        posterior = pf.FlowVI(model(name), dtype=dtype, seed=seed, progress_bar=False).run(**arguments_)
        diagnosis = posterior.diagnose()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    found = {
        "name": name,
        "seed": seed,
        "latents": posterior.guide.latent_dim,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "phases": phases.seconds | {"rest": cpu_seconds - sum(phases.seconds.values())},
        "starts": phases.num_starts,
        "modes": phases.num_modes,
        "steps": phases.steps,
        "flow": repr(posterior.guide.flow_fn),
        "mode": posterior.log_joint.batched.mode,
        "verdict": diagnosis.verdict,
        "reasons": diagnosis.reasons,
        "elbo": posterior.elbo,
        "log_evidence": posterior.log_evidence,
        "ess": posterior.ess,
        "khat": posterior.khat,
        "warnings": [str(w.message) for w in caught],
    }
    return found, posterior


def both_moments(posterior: pf.Posterior) -> dict[str, Moments]:
    """Of draws as they are, and weighted."""
    weighted = posterior.importance_sample(NUM_DRAWS, seed=1)
    draws = {key: value.numpy() for key, value in weighted.draws.items()}
    weights = torch.softmax(weighted.log_weights.double(), 0).numpy()
    return {"straight": moments(draws), "corrected": moments(draws, weights)}


def numpyro_nuts(python: str, name: str, reference: Path | None) -> dict[str, Any]:
    """Figures of NUTS in the other environment."""
    command = [python, "-m", "benchmarks.hierarchies.numpyro_nuts", name]
    command += [] if reference is None else ["--reference", str(reference)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row(result: Mapping[str, Any]) -> str:
    """A row of the Markdown table."""
    phases, steps = result["phases"], sum(result["steps"])
    cells = [
        result["name"],
        f"{result['latents']:,}",
        f"{result['seconds']:.1f} ({result['cpu_seconds']:.1f})",
        *(f"{phases[key]:.1f}" for key in ("describe", "search", "record", "train", "rest")),
        " + ".join(str(number) for number in result["steps"]),
        f"{1e3 * phases['train'] / steps:.1f}" if steps else "",
        result["verdict"],
        f"{result['ess']:.0f}",
        f"{result['khat']:.2f}",
    ]
    for key in ("straight", "corrected"):
        pair = result.get(key)
        cells.append(f"{pair['mean_error']:.3f}, {pair['sd_ratio']:.3f}" if pair else "")
    nuts = result.get("nuts")
    if nuts is None:
        cells += [""] * 4
    else:
        cells += [f"{nuts['seconds']:.1f} ({nuts['cpu_seconds']:.1f})", f"{nuts['rhat']:.3f}", f"{nuts['ess']:.0f}"]
        cells.append(str(nuts["divergences"]))
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(DATA), metavar="names", help="all by default")
    parser.add_argument("--reference", type=Path, help="folder with the moments of long runs")
    parser.add_argument("--numpyro", help="the Python of an environment with NumPyro, to run NUTS beside each fit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, help="file to which a line is added for each fit")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pf.FlowVI(model("schools"), num_steps=5, seed=0, progress_bar=False).run(
        **arguments("schools")
    )  # loads what is loaded late
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS), flush=True)
    for name in options.names:
        reference = None if options.reference is None else load(options.reference, name.removesuffix("_loop"))
        for seed in options.seeds:
            result, posterior = measure(name, seed)
            result["threads"] = options.threads
            if reference is not None:
                result |= {key: vars(accuracy(m, reference)) for key, m in both_moments(posterior).items()}
            if options.numpyro:
                result["nuts"] = numpyro_nuts(options.numpyro, name, options.reference)
            print(row(result), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

"""NumPyro's NUTS on the hierarchies: four vectorised chains, each of 1,000 draws after 1,000 of warm-up.

    python -m pip install numpyro            # in an environment of its own: neither Pyro nor torch is needed
    python -m benchmarks.hierarchies.numpyro_nuts [names...] [--reference FOLDER] [--json FILE]

Times include compilation. Models are centred, as in :mod:`.models`, and run in float32 unless float64 is needed. A line
has the worst r-hat and the least effective sample size of all components, divergences, and the distance from the means
and standard deviations of a long run, where the folder has one. With ``--long`` such a run is made and written there:
in float64, sixteen chains of 2,500 draws after 1,500 of warm-up, a target acceptance of 0.95, and the non-centred form
where the centred one mixes badly; of models with more than 2,000 latents every tenth draw is kept.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from benchmarks.hierarchies.accuracy import Moments, accuracy, load, moments, save
from benchmarks.hierarchies.data import DATA, IN_FLOAT64
from benchmarks.hierarchies.numpyro_models import FUNNEL_DIM, model

NUM_CHAINS, NUM_WARMUP, NUM_DRAWS, TARGET = 4, 1000, 1000, 0.8
LONG_CHAINS, LONG_WARMUP, LONG_DRAWS, LONG_TARGET = 16, 1500, 2500, 0.95
MANY_LATENTS, THINNING = 2000, 10
# Of the reparametrised models, which have other latents besides those of the centred ones.
AUXILIARY = ("z", "theta_decentered", "b_decentered", "x_decentered")
SEED = 0


def sample(name: str, is_long: bool) -> tuple[dict[str, Any], Moments]:
    """Figures of a run, and the moments of its draws."""
    double = is_long or name in IN_FLOAT64
    jax.config.update("jax_enable_x64", double)
    data = {
        k: v if v.dtype == np.int64 else v.astype(np.float64 if double else np.float32) for k, v in DATA[name]().items()
    }
    num_groups = int(data["group"][-1]) if "group" in data else 0
    chains = MCMC(
        NUTS(model(name, mixes=is_long), target_accept_prob=LONG_TARGET if is_long else TARGET),
        num_warmup=LONG_WARMUP if is_long else NUM_WARMUP,
        num_samples=LONG_DRAWS if is_long else NUM_DRAWS,
        num_chains=LONG_CHAINS if is_long else NUM_CHAINS,
        thinning=THINNING if is_long and num_groups > MANY_LATENTS else 1,
        chain_method="vectorized",
        progress_bar=False,
    )
    start, cpu_start = time.perf_counter(), time.process_time()
    chains.run(jax.random.PRNGKey(SEED), **data, extra_fields=("num_steps", "diverging"))
    jax.block_until_ready(chains.get_samples())
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    by_chain = {k: np.asarray(v) for k, v in chains.get_samples(group_by_chain=True).items() if k not in AUXILIARY}
    extra = chains.get_extra_fields()
    ess = {key: effective_sample_size(value) for key, value in by_chain.items()}
    worst = min(ess, key=lambda key: np.min(ess[key]))
    figures = {
        "name": name,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rhat": max(float(np.max(split_gelman_rubin(value))) for value in by_chain.values()),
        "ess": float(np.min(ess[worst])),
        "ess_at": worst,
        "divergences": int(extra["diverging"].sum()),
        "leapfrogs": float(extra["num_steps"].mean()),
    }
    return figures, moments({key: value.reshape(-1, *value.shape[2:]) for key, value in by_chain.items()})


def exact_funnel() -> Moments:
    """The funnel's moments: the variance of x is the mean of exp(v)."""
    x = np.ones(FUNNEL_DIM - 1)
    return {"v": (np.zeros(1), 3 * np.ones(1)), "x": (0 * x, math.exp(9 / 4) * x)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(DATA), metavar="names", help="all by default")
    parser.add_argument("--reference", type=Path, help="folder with the moments of long runs, and their figures")
    parser.add_argument("--long", action="store_true", help="make long runs, and write their moments to the folder")
    parser.add_argument("--json", type=Path, help="file to which a line is added for each run")
    options = parser.parse_args()
    for name in options.names:
        figures, found = sample(name, options.long)
        if options.long:
            save(options.reference, name, exact_funnel() if name == "funnel" else found)
        reference = None if options.reference is None else load(options.reference, name)
        if reference is not None:
            figures |= vars(accuracy(found, reference))
        print(json.dumps(figures), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()

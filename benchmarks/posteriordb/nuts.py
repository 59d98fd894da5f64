"""Pyro's NUTS on the same models: one chain, 1000 draws after 1000 of warm-up, compiled, for ten minutes at most.

    python -m benchmarks.posteriordb.nuts --path FOLDER [names...] [--json FILE]

Seconds are by the clock, cpu_seconds those of a processor, of which a run may use ten minutes; one that is stopped
there has no accuracy. One thread.
"""

from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import biject_to

from benchmarks.posteriordb import reference
from benchmarks.posteriordb.metrics import accuracy
from benchmarks.posteriordb.models import TARGETS
from benchmarks.posteriordb.samplers import NUM_DRAWS, NUM_WARMUP, main, timed
from pyroflows.models.batching import BatchedModel


def init_uniform(site: Any) -> Tensor:
    """Uniform on (-2, 2) in the unconstrained space; Pyro's own function asks flat priors for a draw."""
    transform = biject_to(site["fn"].support)
    return transform(torch.empty(transform.inverse_shape(site["fn"].shape())).uniform_(-2.0, 2.0))


def nuts(folder: Path, name: str) -> dict[str, Any]:
    """Seconds, compilation included, and accuracy."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    target, ref = TARGETS[name], reference.load(folder, name)
    with target.default_dtype():
        args = target.args(ref.data)
        kernel = NUTS(
            target.model,
            jit_compile=True,
            ignore_jit_warnings=True,
            init_strategy=init_uniform,
            max_plate_nesting=1,  # told, or Pyro draws from flat priors to find it
        )
        chain = MCMC(kernel, num_samples=NUM_DRAWS, warmup_steps=NUM_WARMUP, disable_progbar=True)
        seconds = timed(lambda: chain.run(*args))
        latents = chain.get_samples()
        draws = BatchedModel(target.model, args, {}, latents).in_chunks(latents, NUM_DRAWS).values
    found = accuracy({k: v.numpy() for k, v in draws.items()}, ref.draws, target.by_quantiles)
    divergences = len(chain.diagnostics()["divergences"]["chain 0"])
    return {**seconds, "divergences": divergences, **vars(found)}


if __name__ == "__main__":
    main(nuts, TARGETS, __doc__)

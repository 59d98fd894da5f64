"""Pyro's NUTS on the same models: one chain, 1000 draws after 1000 of warm-up, compiled, for ten minutes at most.

    python -m tests.benchmarks.posteriordb.nuts --path FOLDER [names...] [--json FILE]

A run that is stopped counts as ten minutes and has no accuracy. Each runs in a process of its own, on one thread.
"""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.inference.batching import BatchedModel
from tests.benchmarks.posteriordb import reference
from tests.benchmarks.posteriordb.metrics import accuracy
from tests.benchmarks.posteriordb.models import TARGETS

MAX_SECONDS = 600.0
NUM_DRAWS = 1000


def init_uniform(site: Any) -> Tensor:
    """Uniform on (-2, 2) in the unconstrained space; Pyro's own function asks flat priors for a draw."""
    transform = biject_to(site["fn"].support)
    return transform(torch.empty(transform.inverse_shape(site["fn"].shape())).uniform_(-2.0, 2.0))


def nuts(folder: Path, name: str, seed: int = 0) -> dict[str, Any]:
    """Seconds and accuracy of one run."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(seed)
    target, ref = TARGETS[name], reference.load(folder, name)
    with target.default_dtype():
        args = target.args(ref.data)
        kernel = NUTS(target.model, jit_compile=True, ignore_jit_warnings=True, init_strategy=init_uniform)
        chain = MCMC(kernel, num_samples=NUM_DRAWS, warmup_steps=NUM_DRAWS, disable_progbar=True)
        start = time.perf_counter()
        chain.run(*args)
        seconds = time.perf_counter() - start
        latents = chain.get_samples()
        draws = BatchedModel(target.model, args, {}, latents).in_chunks(latents, NUM_DRAWS).values
    found = accuracy({k: v.numpy() for k, v in draws.items()}, ref.draws, target.by_quantiles)
    divergences = len(chain.diagnostics()["divergences"]["chain 0"])
    return {"seconds": seconds, "divergences": divergences, **vars(found)}


def _send(connection: Any, folder: Path, name: str) -> None:
    connection.send(nuts(folder, name))


def limited_nuts(folder: Path, name: str) -> dict[str, Any]:
    """As :func:`nuts`, stopped at ten minutes."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, folder, name))
    process.start()
    sender.close()
    finished = receiver.poll(MAX_SECONDS)
    if not finished:
        process.kill()
    process.join()
    return {"name": name, **(receiver.recv() if finished else {"seconds": MAX_SECONDS})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="posteriors, by any part of their names; all by default")
    parser.add_argument("--path", type=Path, default=os.environ.get("PYROFLOWS_POSTERIORDB"))
    parser.add_argument("--json", type=Path, help="file to which a line is added for each run")
    options = parser.parse_args()
    for name in TARGETS:
        if options.names and not any(part in name for part in options.names):
            continue
        line = json.dumps(limited_nuts(options.path, name))
        print(line, flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()

"""The command line that the samplers share: each posterior in a process of its own, for ten minutes at most."""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Of a processor, so that other work on the machine does not count. Samplers run on one thread.
MAX_SECONDS = 600
NUM_WARMUP = 1000
NUM_DRAWS = 1000

Sampler = Callable[[Path, str], dict[str, Any]]


def selected(names: Iterable[str], parts: list[str]) -> list[str]:
    """The names that contain any of the parts; all names where there are no parts."""
    return [name for name in names if not parts or any(part in name for part in parts)]


def timed(function: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call, by the clock and of a processor."""
    start, cpu_start = time.perf_counter(), time.process_time()
    function()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}


def limited(sampler: Sampler, folder: Path, name: str) -> dict[str, Any]:
    """What the sampler returns; only ``cpu_seconds`` where it had to be stopped, and the error where it raised."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, sampler, folder, name))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        stopped = process.exitcode == -signal.SIGXCPU
        result = {"cpu_seconds": MAX_SECONDS} if stopped else {"error": f"exit code {process.exitcode}"}
    process.join()
    return {"name": name, **result}


def _send(connection: Any, sampler: Sampler, folder: Path, name: str) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, resource.RLIM_INFINITY))
    try:
        connection.send(sampler(folder, name))
    except Exception as error:  # what a sampler cannot do is a result
        connection.send({"error": f"{type(error).__name__}: {error}"})


def main(sampler: Sampler, names: Iterable[str], description: str | None) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="posteriors, by any part of their names; all by default")
    parser.add_argument("--path", type=Path, default=os.environ.get("PYROFLOWS_POSTERIORDB"))
    parser.add_argument("--json", type=Path, help="file to which a line is added for each run")
    options = parser.parse_args()
    if options.path is None:
        parser.error("give --path, or set PYROFLOWS_POSTERIORDB")
    for name in selected(names, options.names):
        line = json.dumps(limited(sampler, options.path, name))
        print(line, flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(line + "\n")

"""The command line that the samplers share: each posterior in a process of its own, for ten minutes at most."""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MAX_SECONDS = 600.0
NUM_WARMUP = 1000
NUM_DRAWS = 1000

Sampler = Callable[[Path, str], dict[str, Any]]


def selected(names: Iterable[str], parts: list[str]) -> list[str]:
    """The names that contain any of the parts; all names where there are no parts."""
    return [name for name in names if not parts or any(part in name for part in parts)]


def limited(sampler: Sampler, folder: Path, name: str) -> dict[str, Any]:
    """What the sampler returns; where it had to be stopped only its seconds, and those that it had of a processor."""
    cpu_before = _children_cpu_seconds()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, sampler, folder, name))
    process.start()
    sender.close()
    finished = receiver.poll(MAX_SECONDS)
    if not finished:
        process.kill()
    result = receiver.recv() if finished else {"seconds": MAX_SECONDS}
    process.join()
    return {"name": name, "cpu_seconds": _children_cpu_seconds() - cpu_before, **result}


def _children_cpu_seconds() -> float:
    """Of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _send(connection: Any, sampler: Sampler, folder: Path, name: str) -> None:
    connection.send(sampler(folder, name))


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

"""Where the processor's time of a fit goes: a stopwatch around the parts of ``FlowVI``."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from pyroflows.inference import vi
from pyroflows.inference.candidates import Candidate
from pyroflows.training.loop import Trainer


@dataclass
class Phases:
    """Seconds of a processor by part, and the trainings.

    Args:
        describe: what it takes to describe the model, run it for many draws at once, and find initial values.
        search: the search for modes, the program of the log joint included.
        build: flows, before they are trained.
        record: the programs of training steps.
        train: training steps.
        steps: the number of steps of each training.
    """

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("describe", "search", "build", "record", "train"), 0.0)
    )
    steps: list[int] = field(default_factory=list)
    num_starts: int = 0
    num_modes: int = 0


@contextmanager
def watched() -> Iterator[Phases]:
    """Measure the fits inside this context."""
    phases = Phases()

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                phases.seconds[phase] += time.process_time() - start

        return run

    def trained(trainer: Trainer) -> Any:
        try:
            return run_training(trainer)
        finally:
            phases.steps.append(trainer.history.num_steps)

    def found(*args: Any, **kwargs: Any) -> Any:
        modes, starts = find(*args, **kwargs)
        phases.num_starts, phases.num_modes = starts.num_starts, len(modes)
        return modes, starts

    run_training, find = timed("train", Trainer.run), timed("search", vi.find_start)
    with ExitStack() as stack:
        for where, name, function in (
            (vi.AutoFlow, "_setup_prototype", timed("describe", vi.AutoFlow._setup_prototype)),
            (vi, "prepared", timed("describe", vi.prepared)),
            (vi, "find_start", found),
            (Candidate, "_flow_at", timed("build", Candidate._flow_at)),
            (Trainer, "__init__", timed("record", Trainer.__init__)),
            (Trainer, "run", trained),
        ):
            stack.enter_context(patch.object(where, name, function))
        yield phases

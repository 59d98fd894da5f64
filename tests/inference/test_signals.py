"""Real signals that end calls at random moments: what was found by then is reachable."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALLS = ["run", "mcmc", "distill", "fit_density"]


@pytest.fixture(scope="module")
def child():
    command = [sys.executable, "-m", "tests.inference.interrupted_child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process
        process.kill()


def interrupted(child, call, fraction):
    """What the child has found after a signal at a fraction of the duration of a call."""
    print(call, file=child.stdin, flush=True)
    duration = float(child.stdout.readline())
    assert child.stdout.readline() == "started\n"
    time.sleep(duration * fraction)
    child.send_signal(signal.SIGINT)
    return child.stdout.readline().strip()


@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_in_the_second_half(child, call):
    assert interrupted(child, call, 0.6) in ("found", "complete")


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_interrupts_at_random_moments(child, call):
    moments = random.Random(0)
    found = [interrupted(child, call, moments.random()) for _ in range(10)]
    assert set(found) <= {"found", "nothing", "complete"}
    assert "found" in found

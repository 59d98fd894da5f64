"""Calls free what they have made as soon as their result is dropped, so that a long session does not grow."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf

QUIET = {"seed": 0, "progress_bar": False}


class Data:
    """Data of a model, which tells whether it still exists."""

    def __init__(self):
        self.y = torch.tensor([1.0, 2.0])


def make_model(data):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(x.prod(-1), 1.0).expand([2]).to_event(1), obs=data.y)

    return model


def fitted(data):
    return pf.FlowVI(make_model(data), num_steps=5, gate=False, **QUIET).run()


def recorded(data):
    flow = pf.flows.Planar(2)

    def target(x):
        return -(x - data.y).square().sum(-1)

    pf.train(pf.fitting.ReverseKL(flow, target), 3, compile="trace", **QUIET)


CALLS = {
    "fit": fitted,
    "diagnose": lambda data: fitted(data).diagnose(),
    "mcmc": lambda data: fitted(data).mcmc(4, num_chains=2, num_warmup=2, **QUIET),
    "distill": lambda data: fitted(data).distill(num_steps=2, warm_start=2, **QUIET),
    "train": recorded,
}


@pytest.mark.parametrize("call", CALLS)
def test_data_are_freed_with_the_result(call):
    """The collector of cycles is off, since it may come after hundreds of fits."""
    CALLS[call](Data())  # what is imported at the first use may keep the frames around it
    data = Data()
    alive = weakref.ref(data)
    gc.collect()
    gc.disable()
    try:
        result = CALLS[call](data)
        del data, result
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fit", "mcmc", "distill", "fit_density"])
def test_memory_does_not_grow(call):
    """A fifth of the calls of the benchmark, and of the 20 MB that its 300 calls may take."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", call, "--num-calls", "60"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[1]) < 4.0

"""A program and its constants are freed with the last reference to it."""

import gc
import os
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch

from pyroflows.compiling import program as program_module
from pyroflows.compiling.program import compiled

MEMORY = """
    import gc, warnings
    import torch
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def megabytes():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    def growth(make, first, more):
        # What a fit leaves in cycles is collected after each: the rhythm of the collector is no matter of the fits.
        for _ in range(first):
            make()
            gc.collect()
        before = megabytes()
        for _ in range(more):
            make()
            gc.collect()
        return megabytes() - before
"""
PROGRAMS = """
    from pyroflows.compiling.program import compiled

    def make():
        table, filters, shift = torch.randn(1_000_000), torch.randn(3, 1, 2), torch.zeros(())

        def function(x):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                value = (leaf * table).sum() + torch.nn.functional.conv1d(leaf[None, None, :9], filters).sum() + shift
                return torch.autograd.grad(value, leaf)

        for state in ([], [shift]):
            run = compiled(function, [torch.randn(1_000_000)], state=state)
            for _ in range(3):
                run(torch.randn(1_000_000))

    print(growth(make, 3, 6))
"""
FITS = """
    import pyro
    import pyroflows as pf
    from pyro import distributions as dist

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def make():
        flow = lambda dim: pf.flows.IAF(dim, num_layers=4, hidden_dims=(16, 16))
        pf.FlowVI(model, flow, num_steps=3, num_particles=4, num_starts=1, progress_bar=False, seed=0).run()

    print(growth(make, 10, 8))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of the process is read from Linux")
@pytest.mark.parametrize("script", [PROGRAMS, pytest.param(FITS, marks=pytest.mark.slow)], ids=["programs", "fits"])
def test_memory_does_not_grow(script):
    """By 24 MB or more, were each program to stay."""
    source = textwrap.dedent(MEMORY) + textwrap.dedent(script)
    # What is freed goes back to the system at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10.0


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_inductor_frees_constants(monkeypatch):
    made = []
    graph_module = program_module._Program.graph_module

    def noted(self):
        module = graph_module(self)
        made.extend(weakref.ref(tensor) for tensor in module.buffers())
        return module

    monkeypatch.setattr(program_module._Program, "graph_module", noted)
    table, scale = torch.randn(3), torch.ones(3)
    run = compiled(lambda x: [x * table.exp() * scale], [torch.ones(3)], "inductor", [scale])
    run(torch.ones(3))
    assert made and all(tensor() is not None for tensor in made)
    del run
    gc.collect()
    assert all(tensor() is None for tensor in made)


def test_a_program_does_not_keep_what_was_recorded():
    seen = []

    def function(x):
        between = x.exp()
        seen.append(weakref.ref(between))
        return [between.sin() * scale, torch.rand(3)]

    scale = torch.tensor(1.0)
    run = compiled(function, [torch.ones(3)], state=[scale])
    gc.collect()
    assert seen[0]() is None
    torch.testing.assert_close(run(torch.zeros(3))[0], torch.ones(3).sin())

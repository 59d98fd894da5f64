"""What all tests share: one thread, since tensors are small and the machine is shared, fixed seeds, and grids."""

import signal
import sys
import threading
from itertools import combinations, product

import pyro
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--full-grid", action="store_true", help="try all combinations of a grid, not pairs of its values")


def pytest_configure(config):
    config.addinivalue_line("markers", "grid(**values): all pairs of these values; all combinations with --full-grid")
    # A shell lets what it runs in the background ignore SIGINT, by which tests interrupt calls.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc):
    for mark in metafunc.definition.iter_markers("grid"):
        values = [list(value) for value in mark.kwargs.values()]
        places = list(product(*(range(len(value)) for value in values)))
        if not metafunc.config.getoption("--full-grid"):
            places = all_pairs(places)
        metafunc.parametrize(list(mark.kwargs), [[v[i] for v, i in zip(values, case, strict=True)] for case in places])


def all_pairs(places):
    """Of all combinations a few in which each pair of places occurs: always the one that adds most pairs."""
    pairs = {case: set(combinations(enumerate(case), 2)) for case in places}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(places, key=lambda case: len(pairs[case] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(autouse=True)
def _fresh_state():
    torch.manual_seed(0)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()

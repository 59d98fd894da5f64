"""What all tests share: one thread, since tensors are small and the machine is shared, and fixed seeds."""

import pyro
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--full-grid", action="store_true", help="try all combinations in the laws of layers, not pairs")


@pytest.fixture(autouse=True)
def _fresh_state():
    torch.manual_seed(0)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()

"""The grid of cases, event shapes, batch shapes and dtypes that some laws run over, and which cases are slow."""

import pytest

from tests.transforms.registry import LAYERS, grid

GRID = ["name", "context_dim", "shape", "batch_shape", "dtype"]


def pytest_generate_tests(metafunc):
    if set(GRID) <= set(metafunc.fixturenames):
        metafunc.parametrize(GRID, grid(metafunc.config.getoption("--full-grid")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        if name in LAYERS and LAYERS[name].is_slow:
            item.add_marker(pytest.mark.slow)

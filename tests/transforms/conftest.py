"""The grid of cases, event shapes, batch shapes and dtypes that some laws run over."""

from tests.transforms.registry import grid

GRID = ["name", "context_dim", "shape", "batch_shape", "dtype"]


def pytest_generate_tests(metafunc):
    if set(GRID) <= set(metafunc.fixturenames):
        metafunc.parametrize(GRID, grid(metafunc.config.getoption("--full-grid")))

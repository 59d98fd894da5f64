"""Which cases of the laws are slow."""

import pytest

from tests.transforms.registry import LAYERS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("name")
        if name in LAYERS and LAYERS[name].is_slow:
            item.add_marker(pytest.mark.slow)

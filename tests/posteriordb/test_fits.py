"""A few of the fits of the benchmark, the quick ones."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.posteriordb.models import TARGETS
from benchmarks.posteriordb.run import measure

FOLDER = os.environ.get("PYROFLOWS_POSTERIORDB")
QUICK = ("eight_schools", "arK", "kidiq", "mesquite", "kilpisjarvi")

pytestmark = pytest.mark.skipif(FOLDER is None, reason="PYROFLOWS_POSTERIORDB does not name a folder of posteriors")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for part in QUICK for name in TARGETS if part in name])
def test_default_settings_reach_the_reference(name):
    found = measure(Path(FOLDER), name, seed=0, options={})
    # Means are known to 0.014 sd, from 100,000 draws against 10,000; sds to 1 %: the goals leave five standard errors.
    assert found["straight"]["mean_error"] < 0.1 and abs(found["straight"]["sd_ratio"] - 1) < 0.1
    assert found["corrected"]["mean_error"] < 0.06 and abs(found["corrected"]["sd_ratio"] - 1) < 0.05
    assert found["verdict"] == "good"

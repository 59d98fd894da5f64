"""Center and spread of columns, which rows far out do not change."""

import pytest
import torch

from pyroflows.transforms.wild import center_and_spread


@pytest.mark.parametrize("share", [0.0, 0.7, 0.97])
def test_the_spread_is_the_standard_deviation_of_a_normal_law_with_the_same_quantiles(share):
    """Also where so many rows agree that their quartiles, or their central 90 %, coincide."""
    n = 20_001
    level = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    rows = 5 + 3 * torch.distributions.Normal(0.0, 1.0).icdf(level)
    rows = torch.where((level - 0.5).abs() < share / 2, 5.0, rows)
    center, spread = center_and_spread(rows[:, None])
    assert center.item() == pytest.approx(5.0, abs=1e-3)
    assert spread.item() == pytest.approx(3.0, rel=2e-3)

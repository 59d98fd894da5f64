"""Clusters of rows: those that are far apart are found, whatever the seed."""

import pytest
import torch

from pyroflows.flows.clusters import clusters_of

CENTERS = torch.tensor([[0.0, 0.0], [1.0, 900.0], [2.0, 0.0], [0.0, 400.0]])


@pytest.mark.parametrize("seed", range(10))
def test_separate_clusters_are_found(seed):
    torch.manual_seed(seed)
    which = torch.arange(400) % 4
    found = clusters_of(CENTERS[which] + torch.tensor([0.05, 20.0]) * torch.randn(400, 2), torch.ones(400), 4)
    assert {(a, b) for a, b in zip(which.tolist(), found.tolist(), strict=True)} == {
        (k, found[k].item()) for k in range(4)
    } and len(found.unique()) == 4


def test_rows_of_weight_zero_draw_no_cluster():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(50, 1), 10 + torch.randn(50, 1), torch.full((100, 1), 1000.0)])
    weights = torch.cat([torch.ones(100), torch.zeros(100)])
    found = clusters_of(x, weights, 2)
    assert len(found[:50].unique()) == 1 and len(found[50:100].unique()) == 1 and found[0] != found[50]


def test_more_clusters_than_different_rows():
    assert clusters_of(torch.tensor([[1.0], [1.0], [2.0]]), torch.ones(3), 5).shape == (3,)

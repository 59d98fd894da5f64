"""The functions in which the laws of rows are linear, and the score of rows that count several times or never."""

import pytest
import torch

from pyroflows.transforms import Autoregressive, FlowTransform
from pyroflows.transforms.hierarchy import Hierarchy, Level, Rows
from pyroflows.transforms.local_affine import LocalAffine, curved, num_curves


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_the_functions_are_distinct_and_as_many_as_said(dim, degree):
    functions = curved(torch.randn(300, dim, dtype=torch.float64), num_curves(dim, degree))
    assert functions.shape[-1] == num_curves(dim, degree)
    assert torch.linalg.matrix_rank(functions) == num_curves(dim, degree)


def test_the_score_counts_each_row_as_often_as_its_weight_says():
    torch.manual_seed(0)
    weight = torch.tensor([2.5, 0.0, 1.0]).double()
    affine = LocalAffine(2, 1, curves=0.2 * torch.randn(3, 5, num_curves(1, 3)), num_curved=1)
    flow = Autoregressive(2, "spline", context_dim=1, hidden_dims=(8,))
    rows = Rows(torch.arange(1, 7).reshape(3, 2), (), torch.arange(3), weight)
    layer = Hierarchy(None, None, torch.tensor([0]), [Level(flow, affine, (), torch.tensor([0]))], [rows]).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    z = torch.randn(50, 7).double()
    score = -z * layer.weights
    found = layer.forward_and_score(z, score)[2]
    by_inverse = FlowTransform._forward_and_score(layer, z.requires_grad_(), score, None)[2]
    torch.testing.assert_close(found, by_inverse.detach(), rtol=1e-8, atol=1e-8)

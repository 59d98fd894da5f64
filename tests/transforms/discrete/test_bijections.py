"""Stacks of discrete layers are bijections of the whole support, whatever their parameters are."""

from itertools import product

import pytest
import torch

from tests.transforms.discrete.registry import MAPS, all_sequences, stack

STACKS = list(product(("autoregressive", "coupling"), MAPS))


def randomize(t):
    """Draw all parameters anew, so large that most categories move."""
    with torch.no_grad():
        for parameter in t.parameters():
            parameter.normal_(std=2.0)


def numbers(sequences, size):
    """The number of each sequence in the support."""
    return (sequences * size ** torch.arange(sequences.shape[-1])).sum(-1)


def moved_by_bijections(structure, univariate, sizes, lengths, settings, dtype):
    """Assert that settings of the parameters at each size give bijections; return the shares of values that move."""
    moved = []
    for size, length in product(sizes, lengths):
        t = stack(structure, univariate, length, size).to(dtype)
        z = all_sequences(length, size)
        for _ in range(settings if size**length < 5000 else 1):
            randomize(t)
            x, ladj = t.forward_and_ladj(z)
            assert torch.equal(numbers(x, size).sort().values, torch.arange(size**length))
            z_again, inverse_ladj = t.inverse_and_ladj(x)
            assert torch.equal(z_again, z)
            assert (ladj == 0).all() and (inverse_ladj == 0).all()
            moved.append((x != z).double().mean())
    return torch.stack(moved)


@pytest.mark.parametrize(("structure", "univariate"), STACKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stacks_are_bijections(structure, univariate, dtype):
    moved = moved_by_bijections(structure, univariate, (2, 3, 4, 6), (1, 2, 3), settings=1, dtype=dtype)
    assert moved.mean() > 0.4


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "univariate"), STACKS)
def test_stacks_are_bijections_at_a_thousand_settings(structure, univariate):
    """Together these are 1008 settings, at sizes that are prime and composite; the largest supports have one each."""
    for dtype in (torch.float32, torch.float64):
        moved = moved_by_bijections(structure, univariate, range(2, 13), range(1, 5), settings=2, dtype=dtype)
        assert moved.mean() > 0.4

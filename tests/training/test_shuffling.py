"""The split of rows, and batches of them."""

import pytest
import torch

from pyroflows import DataError, Flow
from pyroflows.training.data import load
from pyroflows.training.shuffling import ShuffledBatches, split
from pyroflows.transforms import Planar

N, DIM, CONTEXT_DIM = 20, 3, 2


def plain():
    return Flow([Planar(DIM)])


def conditional():
    return Flow([Planar(DIM, CONTEXT_DIM)])


def values(n=N, dim=DIM):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(3))


def rows(n=N, weights=None, x=None):
    return load(plain(), values(n) if x is None else x, weights=weights).rows


@pytest.mark.parametrize(("validation", "n", "expected"), [(0.1, 100, 10), (0.25, 20, 5), (0.5, 4, 2), (0.9, 20, 18)])
def test_split_takes_a_fraction_of_the_rows(validation, n, expected):
    training, held_out = split(rows(n), validation)
    assert len(held_out) == expected
    assert sorted([*training.tolist(), *held_out.tolist()]) == list(range(n))
    assert held_out.tolist() != split(rows(n), validation)[1].tolist()


def test_without_equal_rows_the_split_is_a_shuffle():
    """A seed of older fits means the same rows."""
    data = rows(100)
    torch.manual_seed(1)
    training, held_out = split(data, 0.1)
    torch.manual_seed(1)
    order = torch.randperm(100)
    assert torch.equal(torch.cat([training, held_out]), order)


@pytest.mark.parametrize("conditional_on", [None, "one", "own"])
def test_equal_rows_are_on_one_side(conditional_on):
    """In any number, and of any sign of zero; rows of one x with other contexts are other rows."""
    index = torch.randint(300, (1000,), generator=torch.Generator().manual_seed(0))
    x = values(300)[index]
    x[index == 7, 0], x[:500][index[:500] == 7, 0] = 0.0, -0.0
    flow = plain() if conditional_on is None else conditional()
    context = {None: None, "one": values(300, CONTEXT_DIM)[index], "own": values(1000, CONTEXT_DIM)}[conditional_on]
    data = load(flow, x, context).rows
    torch.manual_seed(0)
    training, held_out = split(data, 0.1)
    assert sorted([*training.tolist(), *held_out.tolist()]) == list(range(1000))
    assert 96 <= len(held_out) <= 104
    shared = {*index[training].tolist()} & {*index[held_out].tolist()}
    assert len(data.group.unique()) == (1000 if conditional_on == "own" else len(index.unique()))
    assert bool(shared) == (conditional_on == "own")


def test_every_group_is_validated_with_equal_chance():
    """A group that went to validation with its last member would come there the more often, the larger it is."""
    x = torch.cat([values(500), values(500)[:100].repeat(5, 1)])
    data = rows(x=x)
    torch.manual_seed(0)
    parts = [split(data, 0.1)[1] for _ in range(200)]
    copies = torch.tensor([((part >= 500) | (part < 100)).float().mean() for part in parts])
    # Of 1000 rows 600 are in groups of six.
    assert abs(copies.mean() - 0.6) < 4 * copies.std() / len(parts) ** 0.5


def test_a_row_repeated_very_often_is_on_both_sides():
    """Half of the rows are one: it cannot be validated with alone, nor left out of validation."""
    x = torch.cat([values(100), torch.ones(100, DIM)])
    _, held_out = split(rows(x=x), 0.1)
    assert len(held_out) == 20 and {*held_out.tolist()} & {*range(100)} and {*held_out.tolist()} - {*range(100)}


def test_rows_without_weight_are_in_neither_part():
    weights = torch.ones(N)
    weights[[2, 3, 5, 7]] = 0.0
    training, held_out = split(rows(weights=weights), 0.25)
    assert (len(training), len(held_out)) == (12, 4)
    assert not {2, 3, 5, 7} & {*training.tolist(), *held_out.tolist()}


@pytest.mark.parametrize(
    ("n", "validation", "message"),
    [
        (4, 0.1, "validation=0.1 of 4 rows with a weight leaves 4 to train on and 0 to validate with"),
        (4, 0.9, "leaves 0 to train on and 4 to validate with"),
        (4, 0.75, "leaves 1 to train on and 3 to validate with"),
    ],
)
def test_a_fraction_that_leaves_a_part_empty(n, validation, message):
    with pytest.raises(DataError, match=message):
        split(rows(n), validation)


def test_weights_that_are_all_zero():
    with pytest.raises(DataError, match="of 0 rows with a weight leaves 0 to train on"):
        split(rows(weights=torch.zeros(N)), 0.1)


def test_constant_columns():
    x = values()
    x[:, [0, 2]] = torch.tensor([5.0, 0.0])
    with pytest.raises(DataError, match=r"columns \[0, 2\] of x are constant in all 18 training rows"):
        split(rows(x=x), 0.1)


def test_columns_that_vary_only_where_the_weight_is_zero():
    x, weights = values(), torch.ones(N)
    x[:, 1], x[4, 1], weights[4] = 1.0, 2.0, 0.0
    with pytest.raises(DataError, match=r"columns \[1\] of x are constant"):
        split(rows(x=x, weights=weights), 0.1)


# Batches


def test_each_epoch_has_other_batches_of_all_rows_but_a_rest():
    index = torch.arange(100, 123)
    batches = ShuffledBatches(index, 5)
    epochs = [torch.stack([next(batches) for _ in range(4)]).flatten().tolist() for _ in range(50)]
    assert all(len(set(epoch)) == 20 and set(epoch) <= set(index.tolist()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 50
    # Another rest each time, so that no row is always left out.
    assert set().union(*epochs) == set(index.tolist())


@pytest.mark.parametrize("place", [0, 1, 3, 4, 6])
def test_batches_go_on_from_a_place(place):
    index = torch.arange(100, 123)
    batches, others = ShuffledBatches(index, 5), ShuffledBatches(index, 5)
    for _ in range(place):
        next(batches)
    others.load_state_dict(batches.state_dict())
    random_state = torch.get_rng_state()
    expected = [next(batches) for _ in range(9)]
    torch.set_rng_state(random_state)
    assert all(torch.equal(next(others), batch) for batch in expected)

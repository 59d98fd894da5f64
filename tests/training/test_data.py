"""Data of a fit: what is taken, and what is refused with which words."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from pyro import distributions as dist
from pyro.distributions.constraints import ordered_vector, positive_ordered_vector
from torch.distributions import constraints
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from pyroflows import DataError, Flow, OptionError, ShapeError, flows
from pyroflows.training.data import load
from pyroflows.transforms import Permutation, Planar

N, DIM, CONTEXT_DIM = 20, 3, 2


class Items(Dataset):
    """A Dataset of any items."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def plain(support=None):
    return Flow([Planar(DIM)], support=support)


def conditional():
    return Flow([Planar(DIM, CONTEXT_DIM)])


def values(n=N, dim=DIM):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(3))


# What is taken


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        lambda x: x.double(),
        lambda x: x.requires_grad_(),
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(np.float64),
        lambda x: x.numpy().astype(">f4"),
        lambda x: x.numpy()[::-1][::-1],
        lambda x: np.asfortranarray(x.numpy()),
        lambda x: x.tolist(),
        lambda x: TensorDataset(x),
        lambda x: Items(*x),
        lambda x: Items(*x.numpy()),
        lambda x: Items(*((row,) for row in x)),
        lambda x: torch.utils.data.Subset(TensorDataset(x), range(N)),
    ],
)
def test_rows_in_many_forms(convert):
    rows = load(plain(), convert(values())).rows
    assert torch.equal(rows.x, values())
    assert not rows.x.requires_grad
    assert rows.context is None
    assert torch.equal(rows.weights, torch.ones(N))


def test_read_only_arrays_are_taken_without_a_warning():
    x = values().numpy()
    x.flags.writeable = False
    assert torch.equal(load(plain(), x).rows.x, values())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float16])
def test_numbers_of_other_kinds_are_cast(dtype):
    x = (10 * values()).to(dtype)
    for array in (x, x.numpy()):
        assert torch.equal(load(plain(), array).rows.x, x.float())


def test_dtype_is_that_of_the_flow():
    rows = load(conditional().double(), values().numpy(), values(N, CONTEXT_DIM), np.ones(N, dtype=int)).rows
    assert {rows.x.dtype, rows.context.dtype, rows.weights.dtype} == {torch.float64}


@pytest.mark.parametrize(
    "convert",
    [
        lambda x, context: (x, context),
        lambda x, context: (x.numpy(), context.numpy()),
        lambda x, context: (TensorDataset(x, context),),
        lambda x, context: (Items(*zip(x, context, strict=True)),),
        lambda x, context: (Items(*zip(x.numpy(), context.numpy(), strict=True)),),
    ],
)
def test_contexts_in_many_forms(convert):
    context = values(N, CONTEXT_DIM)
    data = load(conditional(), *convert(values(), context))
    assert torch.equal(data.rows.context, context)
    batch = data.batch(torch.tensor([4, 2]))
    assert torch.equal(batch.x, values()[[4, 2]])
    assert torch.equal(batch.context, context[[4, 2]])


def test_weights_follow_their_rows():
    weights = torch.rand(N)
    for x in (values(), Items(*values())):
        data = load(plain(), x, weights=weights)
        assert torch.equal(data.batch(torch.tensor([4, 2])).weights, weights[[4, 2]])


class Noisy(Dataset):
    """Noise drawn afresh at each access."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return i + torch.rand(DIM, dtype=torch.float64)


def test_batches_of_a_dataset_are_read_anew():
    data = load(plain(), Noisy())
    index = torch.tensor([7, 7])
    first, second = data.batch(index), data.batch(index)
    assert first.x.dtype == torch.float32
    assert (first.x.floor() == 7).all()
    assert (first.x != second.x).all()
    assert (data.rows[index].x == data.rows[index].x).all()


# What is refused


def bad(value, *places, shape=(N, DIM)):
    x = torch.ones(shape) * torch.arange(1.0, shape[0] + 1).view(-1, *[1] * (len(shape) - 1))
    for place in places:
        x[place] = value
    return x


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.numpy(), lambda x: Items(*x)])
def test_values_that_are_not_finite(value, convert):
    x = bad(value, (13, 2), (4, 1), (4, 2))
    expected = rf"x has NaN or infinite values in 2 of 20 rows, the first is {value} in row 4, column 1"
    with pytest.raises(DataError, match=expected):
        load(plain(), convert(x))


def test_context_that_is_not_finite():
    context = bad(torch.nan, (6, 1), shape=(N, CONTEXT_DIM))
    with pytest.raises(DataError, match="context has NaN or infinite values in 1 of 20 rows.* row 6, column 1"):
        load(conditional(), values(), context)


@pytest.mark.parametrize("value", [-1.0, torch.nan, torch.inf])
def test_weights_that_are_no_weights(value):
    weights = bad(value, 5, 8, shape=(N,))
    expected = rf"weights has negative, NaN or infinite values in 2 of 20 rows, the first is {value:.6g} in row 5$"
    with pytest.raises(DataError, match=expected):
        load(plain(), values(), weights=weights)


@pytest.mark.parametrize("shape", [(N - 1,), (N + 1,), (N, 1), ()], ids=str)
def test_weights_of_another_shape(shape):
    with pytest.raises(ShapeError, match=r"weights must have shape \(20,\), one a row of x, got"):
        load(plain(), values(), weights=torch.ones(shape))


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_another_number_of_columns(dim):
    with pytest.raises(ShapeError, match=f"x has {dim} columns, but the flow has 3 of x"):
        load(plain(), values(N, dim))


@pytest.mark.parametrize("shape", [(N,), (), (N, DIM, 1), (2, N, DIM)], ids=str)
def test_x_that_is_no_matrix(shape):
    with pytest.raises(ShapeError, match=r"x must have shape \(rows, 3\), got"):
        load(plain(), torch.ones(shape))


def test_one_variable_needs_a_column():
    with pytest.raises(ShapeError, match=r"x must have shape \(rows, 1\), got \(20,\): give x\[:, None\]"):
        load(flows.Planar(1), torch.randn(N))


def test_context_missing():
    with pytest.raises(ShapeError, match="this flow needs a context of size 2 for each row, but got none"):
        load(conditional(), values())


@pytest.mark.parametrize("data", [(values(), values()), (TensorDataset(values(), values()),)])
def test_context_superfluous(data):
    with pytest.raises(ShapeError, match="takes no context, but got one"):
        load(plain(), *data)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((N, 3), "context has 3 columns, but the flow has 2 of context"),
        ((N,), r"context must have shape \(rows, 2\), got \(20,\)"),
        ((N - 1, 2), "x has 20 rows, but context has 19"),
        ((1, 2), "x has 20 rows, but context has 1"),
    ],
    ids=str,
)
def test_context_of_another_shape(shape, message):
    with pytest.raises(ShapeError, match=message):
        load(conditional(), values(), torch.ones(shape))


@pytest.mark.parametrize(("num_rows", "words"), [(0, "0 rows"), (1, "1 row")])
def test_too_few_rows(num_rows, words):
    with pytest.raises(DataError, match=f"x has {words}: a density needs more"):
        load(plain(), values(num_rows))


@pytest.mark.parametrize("x", [np.full((N, DIM), "a"), [[1.0], [2.0, 3.0]], {"a": 1}])
def test_what_is_no_array_of_numbers(x):
    with pytest.raises(DataError, match="x is no array of numbers"):
        load(plain(), x)


@pytest.mark.parametrize("convert", [lambda x: x, lambda x: x.numpy()])
def test_complex_numbers(convert):
    with warnings.catch_warnings(), pytest.raises(DataError, match="x holds complex numbers"):
        load(plain(), convert(torch.complex(values(), values())))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(values())


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "must have a length and items by index"),
        (Items(*({"x": row} for row in values())), r"must be x or \(x, context\)"),
        (Items(*((row, row, row) for row in values())), r"must be x or \(x, context\)"),
        (Items(*((row, "label") for row in values())), r"must be x or \(x, context\)"),
        (Items(torch.ones(3), torch.ones(2)), "cannot be stacked.*equal size"),
        (Items(object(), object()), "cannot be stacked.*object"),
    ],
    ids=["stream", "dictionaries", "triples", "labels", "ragged", "objects"],
)
def test_datasets_that_cannot_be_read(dataset, message):
    with pytest.raises(DataError, match=message):
        load(plain(), dataset)


def test_context_beside_a_dataset():
    with pytest.raises(OptionError, match="the context of a Dataset comes with its items"):
        load(conditional(), TensorDataset(values()), values(N, CONTEXT_DIM))


# Frames


FRAME = pd.DataFrame(values().double().numpy(), columns=["a", "b", "age"])
CONTEXTS = pd.DataFrame(values(N, CONTEXT_DIM).double().numpy(), columns=["u", "v"])


def test_frames_of_different_indices():
    """A shuffled frame beside another that was not would be paired with the wrong rows."""
    other = CONTEXTS.sample(frac=1, random_state=0)
    for x in (FRAME, FRAME["a"]):
        with pytest.raises(DataError, match=r"x and context have different indices.*give context.loc\[x.index\] to"):
            load(conditional(), x, other)
    for weights in (FRAME["a"].abs().iloc[::-1], FRAME[["a"]].iloc[::-1]):
        with pytest.raises(DataError, match="x and weights have different indices"):
            load(plain(), FRAME, weights=weights)
    with pytest.raises(DataError, match="context and weights have different indices"):
        load(conditional(), FRAME.to_numpy(), other, weights=FRAME["a"].abs())
    with pytest.raises(DataError, match="x and context have different indices"):
        conditional().adapt(FRAME, other)


def test_frames_that_are_paired():
    shuffled = FRAME.sample(frac=1, random_state=0)
    context = CONTEXTS.loc[shuffled.index]
    for given in (context, context.to_numpy()):
        rows = load(conditional(), shuffled, given, weights=shuffled["a"].abs()).rows
        assert rows.context[0].tolist() == pytest.approx(CONTEXTS.loc[shuffled.index[0]].tolist())
    load(conditional(), FRAME, CONTEXTS.set_axis([*range(N)]))
    with pytest.raises(ShapeError, match="x has 20 rows, but context has 19"):
        load(conditional(), FRAME, CONTEXTS[1:])


def test_messages_name_the_columns_of_frames():
    bad = FRAME.copy()
    bad.iloc[4, 2] = np.nan
    with pytest.raises(DataError, match=r"in row 4, column 2 \('age'\)"):
        load(plain(), bad)
    with pytest.raises(DataError, match=r"in row 4, column 2$"):
        load(plain(), bad.set_axis([0, 1, 2], axis=1))
    with pytest.raises(DataError, match=r"context has .* in row 3, column 1 \('v'\)"):
        load(conditional(), FRAME, CONTEXTS.mask((CONTEXTS.index == 3)[:, None] & (CONTEXTS.columns == "v")))
    with pytest.raises(DataError, match=r"outside the support .* column 1 \('b'\)"):
        load(plain(constraints.positive), FRAME.abs().assign(b=-1.0))


# The support


@pytest.mark.parametrize(
    ("support", "value", "name"),
    [
        (constraints.positive, -1.5, r"GreaterThan\(lower_bound=0.0\)"),
        (constraints.positive, 0.0, r"GreaterThan\(lower_bound=0.0\)"),
        (constraints.nonnegative, 0.0, r"GreaterThanEq\(lower_bound=0.0\)"),
        (constraints.interval(0.0, 30.0), 31.0, r"Interval\(lower_bound=0.0, upper_bound=30.0\)"),
        (constraints.interval(0.0, 30.0), 30.0, "Interval"),
        (constraints.interval(0.0, 30.0), 0.0, "Interval"),
        (constraints.independent(constraints.positive, 1), -1.5, "GreaterThan"),
        (constraints.interval(torch.zeros(3), torch.tensor([90.0, 90.0, 30.0])), 31.0, "Interval"),
        (constraints.cat([constraints.real, constraints.positive], dim=-1, lengths=[1, 2]), -1.5, "Greater"),
        (
            constraints.cat([constraints.positive, constraints.real, constraints.interval(0.0, 30.0)], dim=-1),
            31.0,
            "Interval",
        ),
    ],
)
def test_values_outside_the_support(support, value, name):
    """On the boundary the bijection is infinite, or clamped far out without a word."""
    expected = f"x has values outside the support {name}.* or on its boundary in 1 of 20 rows, .* {value:.6g} in row 7"
    assert len(load(plain(support), bad(value)).rows) == N
    with pytest.raises(DataError, match=expected + ", column 2"):
        load(plain(support), bad(value, (7, 2)))


@pytest.mark.parametrize("support", [ordered_vector, positive_ordered_vector])
def test_a_constraint_of_whole_vectors(support):
    x = torch.arange(1.0, 4.0).expand(N, 3).clone()
    assert len(load(plain(support), x).rows) == N
    x[9] = torch.tensor([2.0, 1.0, 3.0])
    with pytest.raises(DataError, match=r"in 1 of 20 rows, the first is \[2, 1, 3\] in row 9"):
        load(plain(support), x)


class LearnedPoisson(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log_rate = torch.nn.Parameter(torch.zeros(2))

    def forward(self):
        return dist.Poisson(self.log_rate.exp()).to_event(1)


def test_equal_counts_are_draws_of_one_value():
    swap = Permutation([1, 0])
    swap.codomain = constraints.independent(constraints.nonnegative_integer, 1)
    data = load(Flow([swap], base=LearnedPoisson()), torch.poisson(torch.ones(200, 2))).rows
    assert torch.equal(data.group, torch.arange(200))

"""Integer data: what is read, the noise on top of it, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import constraints
from torch.utils.data import Dataset

import pyroflows as pf
from pyroflows.errors import DataError
from pyroflows.randomness import seeded
from pyroflows.training.data import load
from pyroflows.training.ill_posed import check_density
from pyroflows.training.integers import dequantized, uniform_noise
from pyroflows.training.shuffling import split
from pyroflows.transforms import Elementwise
from pyroflows.transforms.wild import wild_elements

FLOW = pf.Flow([Elementwise(3)])
IMAGES = pf.Flow([Elementwise((3, 4, 4))])
COUNTS = torch.tensor([[0, 2, -7], [1, 255, 3], [5, 2, -1], [1, 2, 3]])


def rows_of(x, flow=FLOW, seed=0, **given):
    with seeded(seed):
        return load(flow, x, **given, are_integers=True).rows


def checked(x, flow):
    """Do what a fit does before its first step; all warnings are errors."""
    with seeded(0):
        rows = load(flow, x, are_integers=True).rows
        check_density(flow, rows, split(rows, 0.1)[0], are_integers=True)
    return rows


# The noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [-300.0, -1.0, 0.0, 1.0, 255.0, 1e5, 2.0**23, 2.0**24, -(2.0**24), 1e9])
def test_the_floor_of_integers_with_noise_is_the_integers(x, dtype):
    x = torch.tensor(x, dtype=dtype)
    ends = torch.tensor([0.0, 1e-30, 0.25, 1 - torch.finfo(dtype).eps, 1.0], dtype=dtype)
    y = dequantized(x, ends)
    assert torch.equal(y.floor(), x.expand(5))
    assert x.abs() > 2**22 or ((x < y) & (y < x + 1)).all()


def test_uniform_noise_is_uniform_between_its_ends():
    u = uniform_noise(torch.zeros(100_000, dtype=torch.float64))
    assert u.min() > 0 and u.max() < 1
    # The Kolmogorov-Smirnov statistic exceeds 2 / sqrt(n) with a probability of 0.0007.
    levels = torch.arange(1, len(u) + 1) / len(u)
    assert (u.sort().values - levels).abs().max() < 2 / len(u) ** 0.5


def test_gradients_pass_through_the_sum():
    u = torch.rand(5).requires_grad_()
    dequantized(torch.arange(5.0), u).sum().backward()
    assert torch.equal(u.grad, torch.ones(5))


# What is read


@pytest.mark.parametrize(
    "as_given",
    [
        lambda x: x.to(torch.int16),
        lambda x: x.float(),
        lambda x: x.double(),
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(float),
        lambda x: x.tolist(),
        lambda x: pd.DataFrame(x.numpy()),
    ],
    ids=["int16", "float32", "float64", "numpy", "numpy float", "lists", "pandas"],
)
def test_integers_may_come_in_any_form(as_given):
    rows = rows_of(as_given(COUNTS))
    assert rows.x.dtype == torch.float32
    assert torch.equal(rows.x, rows_of(COUNTS).x)
    assert torch.equal(rows.x.floor(), COUNTS.float())


def test_bytes_and_booleans_are_integers():
    assert torch.equal(rows_of(COUNTS.abs().to(torch.uint8)).x.floor(), COUNTS.abs().float())
    assert torch.equal(rows_of(COUNTS > 1).x.floor(), (COUNTS > 1).float())


def test_each_batch_has_noise_of_its_own():
    data = load(FLOW, COUNTS, weights=torch.arange(4.0), are_integers=True)
    index = torch.tensor([3, 0])
    first, second = data.batch(index), data.batch(index)
    assert (first.x != second.x).all() and (first.x != data.rows.x[index]).all()
    for batch in (first, second):
        assert torch.equal(batch.x.floor(), COUNTS[index].float())
        assert batch.weights.tolist() == [3.0, 0.0]


class Flipped(Dataset):
    """Integers that are turned around at random whenever they are read."""

    def __len__(self):
        return len(COUNTS)

    def __getitem__(self, index):
        return COUNTS[index].flip(0) if torch.rand(()) < 0.5 else COUNTS[index]


def test_a_dataset_of_integers_is_read_anew_and_has_noise():
    data, index = load(FLOW, Flipped(), are_integers=True), torch.arange(4)
    read = [data.batch(index).x for _ in range(20)]
    assert all((x != x.floor()).all() for x in read)
    assert {tuple(x[0].floor().tolist()) for x in read} == {(0.0, 2.0, -7.0), (-7.0, 2.0, 0.0)}


def test_without_noise_data_stay_as_they_are():
    assert torch.equal(load(FLOW, COUNTS.float()).batch(torch.arange(4)).x, COUNTS.float())


# What is refused


@pytest.mark.parametrize("as_given", [torch.tensor, np.array])
def test_fractions_are_refused_with_what_to_do(as_given):
    x = as_given([[0.0, 1.0, 2.0], [0.5, 1.0, 0.25], [0.1, 0.0, 0.0]])
    with pytest.raises(DataError, match=r"x has values that are no integers .*0 to 255 instead of shares.* in 2 of 3"):
        rows_of(x)


def test_the_column_of_a_frame_with_fractions_is_named():
    frame = pd.DataFrame({"a": [1, 2], "b": [3, 4], "height": [1.0, 1.5]})
    with pytest.raises(DataError, match=r"the first is 1.5 in row 1, column 2 \('height'\)"):
        rows_of(frame)


def test_missing_values_are_refused_as_such():
    with pytest.raises(DataError, match="NaN or infinite values in 1 of 2 rows"):
        rows_of([[1, 2, 3], [1, np.nan, 2]])


def test_a_support_must_have_room_for_the_noise():
    x = torch.tensor([[0, 255, 3], [7, 1, 2]])
    rows_of(x, pf.flows.MAF(3, support=constraints.interval(0.0, 256.0)))
    rows_of(x, pf.flows.MAF(3, support=constraints.positive))
    with pytest.raises(DataError, match=r"x plus noise between 0 and 1 has values outside the support"):
        rows_of(x, pf.flows.MAF(3, support=constraints.interval(0.0, 255.0)))
    with pytest.raises(DataError, match=r"x plus noise between 0 and 1 has values outside the support"):
        rows_of(-x, pf.flows.MAF(3, support=constraints.positive))


# What is looked at before a fit


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("support", [None, constraints.interval(0.0, 256.0)])
def test_images_with_constant_and_rare_and_equal_pixels_pass(support):
    x = torch.randint(256, (500, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    x[:, :, 0] = 0
    x[:2, 0, 0] = 250  # a pixel that is hardly ever on
    x[:, 1, 1] = x[:, 0, 1]  # grey
    x[:, :, 3] = 255 * (x[:, :, 3] > 128)
    rows = checked(x, pf.Flow([Elementwise((3, 4, 4))], support=support))
    assert not rows.is_wild.any()


@pytest.mark.filterwarnings("error")
def test_counts_that_agree_in_most_rows_pass():
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.tensor([0.3, 1.0, 40.0]).expand(2000, 3), generator=generator)
    x[:, 1] = x[:, 0]
    checked(x, FLOW)
    few = torch.randint(3, (300, 1), generator=generator)
    rows = checked(few, pf.flows.NSF(1, num_layers=1, hidden_dims=(8,)))
    assert len(rows.group.unique()) == 300


def test_equal_images_stay_on_one_side_of_the_split():
    x = torch.randint(256, (100, 3, 4, 4)).repeat(2, 1, 1, 1)
    rows = rows_of(x, IMAGES)
    training, held_out = split(rows, 0.2)
    assert not set((training % 100).tolist()) & set((held_out % 100).tolist())
    with pytest.warns(UserWarning, match="100 of 200 rows repeat others"):
        check_density(IMAGES, rows, training, are_integers=True)


@pytest.mark.filterwarnings("error")
def test_equal_images_of_few_pixels_and_levels_pass():
    x = torch.randint(3, (500, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    checked(x, pf.Flow([Elementwise((1, 2, 2))]))


def test_a_code_of_missing_values_warns_as_in_continuous_data():
    x = torch.poisson(torch.full((1000, 3), 50.0), generator=torch.Generator().manual_seed(0))
    x[7, 1] = -9999
    with pytest.warns(UserWarning, match="row 7 of x has -999.* in column 1"):
        checked(x, FLOW)


def test_integers_as_continuous_data_are_told_of_noise():
    x = torch.randint(3, (500, 3)).float()
    with pytest.warns(UserWarning, match='dequantise them .give dequantization="uniform" to the fit.'):
        check_density(FLOW, load(FLOW, x).rows, torch.arange(450))
    x[:, 1] = 3.0
    with pytest.raises(DataError, match='leave them out, or give dequantization="uniform" to the fit'):
        split(load(FLOW, x).rows, 0.1)
    with pytest.warns(UserWarning, match="dequantise them, that is"):
        check_density(FLOW, load(FLOW, torch.randint(3, (500, 3)) / 4).rows, torch.arange(450))


def test_rare_integers_are_wild_to_their_noise_alone():
    """This is why location and scale of integers are not those of continuous data."""
    x = torch.zeros(1000, 1)
    x[:5] = 200.0
    assert not wild_elements(x).any()
    assert wild_elements(x + torch.rand(1000, 1)).sum() == 5

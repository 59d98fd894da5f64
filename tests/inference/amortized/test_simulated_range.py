"""The range of simulations: single entries, joint patterns, heavy tails, constants."""

import pytest
import torch

from pyroflows.inference.amortized.simulated_range import SimulatedRange


@pytest.mark.parametrize("num_columns", [1, 20])
@pytest.mark.parametrize("law", ["normal", "uniform", "cauchy", "counts"])
def test_further_draws_are_not_far_out(law, num_columns):
    mixing = torch.randn(num_columns, num_columns)
    draw = {
        "normal": lambda: torch.randn(4000, num_columns) @ mixing,
        "uniform": lambda: torch.rand(4000, num_columns),
        "cauchy": lambda: torch.randn(4000, num_columns) / torch.randn(4000, num_columns),
        "counts": lambda: torch.poisson(torch.full((4000, num_columns), 0.1)),
    }[law]
    simulations, rows = draw().chunk(2)
    found = SimulatedRange.of(simulations)
    # A heavy tail passes 1.5 times the largest of n draws with probability 1 / 1.5n in each column and on each side.
    limit = 0.002 if law != "cauchy" else 3 * 2 * num_columns / (1.5 * 1000)
    assert found.far_out(rows).double().mean() <= limit


def test_an_entry_far_out_is_named():
    found = SimulatedRange.of(torch.randn(1000, 3))
    row = torch.tensor([[0.0, 8.0, 0.0]])
    assert found.far_entries(row).tolist() == [[False, True, False]] and found.far_out(row).all()


def test_a_value_below_skewed_draws_is_far_out():
    found = SimulatedRange.of(torch.randn(1000, 1).exp())
    assert found.far_out(torch.tensor([[-3.0], [5.0]])).tolist() == [True, False]


def test_another_value_than_a_constant_is_far_out():
    found = SimulatedRange.of(torch.cat([torch.full((100, 1), 1e6), torch.randn(100, 1)], 1))
    assert found.far_out(torch.tensor([[1e6, 0.0], [1.001e6, 0.0]])).tolist() == [False, True]


def test_a_joint_pattern_is_far_out_only_where_it_can_be_known():
    y = torch.randn(100, 1)
    rows = torch.cat([y, y + 0.1 * torch.randn(100, 1)], 1)
    pattern = torch.tensor([[1.0, -1.0]])
    assert SimulatedRange.of(rows).far_out(pattern).all()
    assert not SimulatedRange.of(rows[:15]).far_out(pattern).any()


def test_many_entries_that_are_each_near_the_edge_are_far_out_together():
    found = SimulatedRange.of(torch.randn(1000, 20))
    row = torch.full((1, 20), 3.0)
    assert not found.far_entries(row).any() and found.far_out(row).all()

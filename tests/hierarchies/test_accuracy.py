"""Distances from the moments of a long run, by the worst component."""

import numpy as np
import pytest

from benchmarks.hierarchies.accuracy import accuracy, load, moments, save

REFERENCE = {"a": (np.array([1.0, -200.0]), np.array([0.01, 50.0])), "b": (np.zeros(1), np.ones(1))}


def test_the_worst_component_is_named():
    found = {"a": (np.array([1.0, -190.0]), np.array([0.01, 40.0])), "b": (np.array([0.1]), np.array([1.1]))}
    result = accuracy(found, REFERENCE)
    assert (result.mean_error, result.mean_at) == (pytest.approx(0.2), "a[1]")
    assert (result.sd_ratio, result.sd_at) == (pytest.approx(0.8), "a[1]")


def test_weights_give_the_moments_of_the_target():
    # Three points with weights of a binomial of two trials at 1/2: mean 1, variance 1/2.
    draws = {"x": np.array([0.0, 1.0, 2.0])}
    mean, sd = moments(draws, np.array([0.25, 0.5, 0.25]))["x"]
    assert mean == pytest.approx(1.0) and sd == pytest.approx(np.sqrt(0.5))


def test_what_is_written_is_read(tmp_path):
    assert load(tmp_path, "model") is None
    save(tmp_path, "model", REFERENCE)
    assert accuracy(load(tmp_path, "model"), REFERENCE).mean_error == 0

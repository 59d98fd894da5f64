"""The metrics and the reader, without the data of posteriordb."""

import json
from zipfile import ZipFile

import numpy as np
import pytest

from benchmarks.posteriordb import reference
from benchmarks.posteriordb.metrics import Accuracy, accuracy
from benchmarks.posteriordb.run import judged

NUM_DRAWS = 10_000
CLOSE, FAR = Accuracy(0.02, 1.02), Accuracy(0.3, 1.02)
LOC, SCALE = np.array([1.0, -200.0]), np.array([0.01, 50.0])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def draws(rng, by_quantiles, shift=0.0, scale=1.0):
    x = LOC + SCALE * (shift + scale * rng.standard_normal((NUM_DRAWS, 2)))
    return {
        "x": _positive(x, by_quantiles),
        "z": rng.standard_normal(NUM_DRAWS),
    }


def _positive(x, by_quantiles):
    """What is compared by quantiles is compared by those of its logarithm."""
    return np.exp(x) if by_quantiles else x


@pytest.mark.parametrize("by_quantiles", [(), ("x",)])
def test_a_perfect_sampler_is_close(rng, by_quantiles):
    found = accuracy(draws(rng, by_quantiles), draws(rng, by_quantiles), by_quantiles)
    # Four standard errors: of a mean 0.014 sd, of a 5 % quantile 0.03 sd, of an sd 0.01, of a width 0.012.
    assert found.mean_error < (0.12 if by_quantiles else 0.056)
    assert found.sd_ratio == pytest.approx(1, abs=0.048)
    assert by_quantiles or found.is_close


@pytest.mark.parametrize("by_quantiles", [(), ("x",)])
def test_a_shift_and_a_scale_are_found(rng, by_quantiles):
    shifted, scaled = draws(rng, by_quantiles, shift=0.5), draws(rng, by_quantiles, scale=0.8)
    found = accuracy(shifted, draws(rng, by_quantiles), by_quantiles)
    assert found.mean_error == pytest.approx(0.5, abs=0.12) and not found.is_close
    found = accuracy(scaled, draws(rng, by_quantiles), by_quantiles)
    assert found.sd_ratio == pytest.approx(0.8, abs=0.048) and not found.is_close


@pytest.mark.parametrize("by_quantiles", [(), ("x",)])
def test_weights_move_draws_to_the_reference(rng, by_quantiles):
    # Of 100,000 draws the weights of N(0, 1) over N(0.5, 1) leave an effective sample of 78 %.
    x = 0.5 + rng.standard_normal(100_000)
    weights = np.exp(-0.5 * x**2 + 0.5 * (x - 0.5) ** 2)
    ref = {"x": _positive(rng.standard_normal(NUM_DRAWS), by_quantiles)}
    x = _positive(x, by_quantiles)
    assert not accuracy({"x": x}, ref, by_quantiles).is_close
    assert accuracy({"x": x}, ref, by_quantiles, weights / weights.sum()).is_close


@pytest.mark.parametrize(
    ("verdict", "straight", "corrected", "expected"),
    [
        ("good", CLOSE, CLOSE, "true"),
        ("good", FAR, CLOSE, "false"),
        ("correct it", FAR, CLOSE, "true"),
        ("correct it", CLOSE, CLOSE, "overcautious"),
        ("correct it", FAR, FAR, "false"),
        ("do not use", FAR, CLOSE, "true"),
        ("do not use", CLOSE, FAR, "true"),
        ("do not use", CLOSE, CLOSE, "false"),
    ],
)
def test_a_verdict_is_judged_by_what_it_promises(verdict, straight, corrected, expected):
    assert judged(verdict, straight, corrected) == expected


def test_a_checkout_and_a_folder_of_arrays_read_the_same(tmp_path, rng):
    theta, tau = rng.standard_normal((2, 5, 2, 3)), rng.standard_normal((2, 5))  # chains, draws, shape
    data = {"N": 2, "y": [1.0, 2.5]}
    folder = tmp_path / "arrays" / "fruit-pie"
    folder.mkdir(parents=True)
    (folder / "data.json").write_text(json.dumps(data))
    np.savez(folder / "reference.npz", theta=theta, tau=tau)

    database = tmp_path / "checkout" / "posterior_database"
    entry = {"name": "fruit-pie", "data_name": "fruit", "reference_posterior_name": "fruit-pie"}
    elements = {f"theta[{i + 1},{j + 1}]": theta[..., i, j] for j in range(3) for i in range(2)} | {"tau": tau}
    chains = [{key: value[chain].tolist() for key, value in elements.items()} for chain in range(2)]
    write(database / "posteriors" / "fruit-pie.json", entry)
    write(database / "data" / "data" / "fruit.json", data)
    write(database / "reference_posteriors" / "draws" / "draws" / "fruit-pie.json", chains)

    a, b = (reference.load(tmp_path / layout, "fruit-pie") for layout in ("arrays", "checkout"))
    assert a.data == b.data == data
    assert a.draws.keys() == b.draws.keys() == {"theta", "tau"}
    for name in a.draws:
        np.testing.assert_array_equal(a.draws[name], b.draws[name])
    np.testing.assert_array_equal(b.draws["theta"][7], theta[1, 2])


def write(path, content):
    """As posteriordb has it: entries as they are, data and draws in archives of one file."""
    path.parent.mkdir(parents=True)
    if path.parent.name == "posteriors":
        path.write_text(json.dumps(content))
        return
    with ZipFile(path.with_suffix(".json.zip"), "w") as archive:
        archive.writestr(path.name, json.dumps(content))

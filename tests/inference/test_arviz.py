"""ArviZ 0.x and 1.x, whichever is here. To run it with ArviZ 1.x (Python 3.12 or later):

    python -m venv /tmp/arviz1 && /tmp/arviz1/bin/pip install "arviz>=1" numpy pytest
    /tmp/arviz1/bin/python -m pytest tests/inference/test_arviz.py --noconftest -p no:cacheprovider

Neither torch nor pyroflows is needed: its part for ArviZ is loaded by its path.
"""

import doctest
import importlib.metadata
import importlib.util
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "pyroflows" / "inference" / "arviz" / "__init__.py"
NUM_DRAWS, NUM_DATA = 400, 20


@cache
def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pyroflows_arviz", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load() -> ModuleType:
    """The package, which is to look anew which ArviZ is installed."""
    loaded().generations.installed.cache_clear()
    return loaded()


def generation() -> int | None:
    try:
        return int(importlib.metadata.version("arviz").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return None


def backend(module: ModuleType, name: str):
    """One generation of ArviZ. Parts of 1.x may be installed beside 0.x; never the other way round."""
    if name == "0.x":
        if generation() != 0:
            pytest.skip("ArviZ 0.x is not installed")
        return module.generations.arviz_0()
    pytest.importorskip("arviz_base")
    pytest.importorskip("arviz_stats")
    return module.generations.arviz_1()


@pytest.fixture(params=["0.x", "1.x"])
def version(request):
    return request.param


@pytest.fixture
def module(version, monkeypatch):
    module = load()
    chosen = backend(module, version)
    monkeypatch.setattr(module.generations, "installed", lambda: chosen)
    return module


@pytest.fixture
def groups():
    """What a posterior of y ~ Normal(b[0], 1) gives."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=NUM_DATA)
    b = y.mean() + rng.normal(size=(1, NUM_DRAWS, 3)) / math.sqrt(NUM_DATA)
    location = b[..., :1]
    return {
        "posterior": {"b": b, "scale": rng.gamma(2.0, size=(1, NUM_DRAWS))},
        "log_likelihood": {"y": -0.5 * (y - location) ** 2 - 0.5 * math.log(2 * math.pi)},
        "posterior_predictive": {"y": location + rng.normal(size=(1, NUM_DRAWS, NUM_DATA))},
        "prior": {"b": rng.normal(size=(1, 50, 3))},
        "prior_predictive": {"y": rng.normal(size=(1, 50, NUM_DATA))},
        "sample_stats": {"lp": rng.normal(size=(1, NUM_DRAWS))},
        "observed_data": {"y": y},
        "constant_data": {"x": np.arange(NUM_DATA)},
    }


def group_names(data) -> set[str]:
    return set(data.groups()) if callable(data.groups) else {name.strip("/") for name in data.groups} - {""}


# Conversion


def test_kind_of_data(module, version, groups):
    kind = type(module.to_arviz_data(groups))
    assert kind.__name__ == {"0.x": "InferenceData", "1.x": "DataTree"}[version]


def test_groups_and_values(module, groups):
    data = module.to_arviz_data(groups)
    assert group_names(data) == set(groups)
    for group, variables in groups.items():
        assert set(data[group].data_vars) == set(variables)
        for name, values in variables.items():
            np.testing.assert_array_equal(data[group][name].values, values)
            sampled = group not in module.DATA_GROUPS
            assert (data[group][name].dims[:2] == ("chain", "draw")) == sampled


def test_dims_and_coords_name_the_dimensions_in_every_group(module, groups):
    coords = {"obs": [f"day {i}" for i in range(NUM_DATA)], "effect": np.array(["u", "v", "w"])}
    data = module.to_arviz_data(groups, coords, {"y": ["obs"], "x": ("obs",), "b": "effect"})
    for group, name in [
        ("log_likelihood", "y"),
        ("posterior_predictive", "y"),
        ("prior_predictive", "y"),
        ("observed_data", "y"),
        ("constant_data", "x"),
    ]:
        assert data[group][name].dims[-1] == "obs"
        assert list(data[group]["obs"].values) == coords["obs"]
    for group in ("posterior", "prior"):
        assert data[group]["b"].dims == ("chain", "draw", "effect")
        np.testing.assert_array_equal(data[group]["b"].sel(effect="v").values, groups[group]["b"][..., 1])


def test_unnamed_dimensions_get_arviz_names(module, groups):
    data = module.to_arviz_data(groups)
    assert data.posterior["b"].dims == ("chain", "draw", "b_dim_0")
    assert data.observed_data["y"].dims == ("y_dim_0",)


def test_log_likelihood_lacks_event_dimensions(module):
    """Of a multivariate likelihood, whose log-density has one dimension less than its data."""
    groups = {
        "posterior": {"m": np.zeros((1, 20))},
        "log_likelihood": {"y": np.zeros((1, 20, 5))},
        "observed_data": {"y": np.zeros((5, 2))},
    }
    data = module.to_arviz_data(groups, {"axis": ["a", "b"]}, {"y": ["obs", "axis"]})
    assert data.log_likelihood["y"].dims == ("chain", "draw", "obs")
    assert data.observed_data["y"].dims == ("obs", "axis")


def test_attrs_are_on_the_posterior_only(module, groups):
    attrs = {"inference_library": "pyroflows", "inference_library_version": "0.1.0", "khat": 0.3}
    data = module.to_arviz_data(groups, attrs=attrs)
    assert {name: data.posterior.attrs[name] for name in attrs} == attrs
    assert "khat" not in data.prior.attrs
    assert "created_at" in data.posterior.attrs


def test_empty_groups_are_left_out(module, groups):
    data = module.to_arviz_data({"posterior": groups["posterior"], "prior": {}, "observed_data": {}})
    assert group_names(data) == {"posterior"}
    assert group_names(module.to_arviz_data({})) == set()


def test_without_posterior(module, groups):
    assert group_names(module.to_arviz_data({"prior": groups["prior"]})) == {"prior"}


def test_arguments_are_left_as_they_are(module, groups):
    coords, dims, attrs = {"obs": list(range(NUM_DATA))}, {"y": ["obs"]}, {"seed": 1}
    module.to_arviz_data(groups, coords, dims, attrs)
    assert (coords, dims, attrs) == ({"obs": list(range(NUM_DATA))}, {"y": ["obs"]}, {"seed": 1})


def test_more_chains_than_draws_is_no_warning(module):
    data = module.to_arviz_data({"posterior": {"a": np.zeros((4, 2))}})
    assert dict(data.posterior.sizes) == {"chain": 4, "draw": 2}


def test_scalar_observation(module):
    data = module.to_arviz_data({"posterior": {"m": np.zeros((1, 9))}, "observed_data": {"y": np.array(2.5)}})
    assert data.observed_data["y"].values.item() == 2.5


@pytest.mark.parametrize(
    ("groups", "dims", "message"),
    [
        ({"posteriors": {"a": np.zeros((1, 9))}}, None, "no such group"),
        ({"posterior": {"a": np.zeros(9)}}, None, "'a' in posterior"),
        ({"posterior": {"a": np.zeros((1, 9))}}, {"a": ["group"]}, "'a' in posterior"),
        ({"observed_data": {"y": np.zeros(9)}}, {"y": ["row", "column"]}, "'y' in observed_data"),
        ({"posterior": {"a": np.zeros((1, 9)), "b": np.zeros((1, 8))}}, None, "another length"),
        ({"posterior": {"a": np.zeros((1, 9, 2)), "b": np.zeros((1, 9, 3))}}, {"a": "g", "b": "g"}, "another length"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(module, groups, dims, message):
    with pytest.raises(ValueError, match=message):
        module.to_arviz_data(groups, dims=dims)


def test_same_as_from_dict(module, version, groups):
    """What ArviZ's own converter makes of the same arrays."""
    dims = {"y": ["obs"], "b": ["effect"]}
    if version == "0.x":
        import arviz

        expected = arviz.from_dict(**groups, dims=dims)
    else:
        import arviz_base

        expected = arviz_base.from_dict(groups, dims=dims)
    data = module.to_arviz_data(groups, dims=dims)
    for group in groups:
        assert data[group].equals(expected[group])
        assert set(data[group].attrs) == set(expected[group].attrs)


def test_loo(module, version, groups):
    data = module.to_arviz_data(groups, dims={"y": ["obs"]})
    if version == "0.x":
        import arviz

        loo = arviz.loo(data, pointwise=True)
        elpd, khat = loo.elpd_loo, loo.pareto_k
    else:
        import arviz_stats

        loo = arviz_stats.loo(data, pointwise=True)
        elpd, khat = loo.elpd, loo.pareto_k
    # The exact leave-one-out posterior of a normal mean under a flat prior.
    y = groups["observed_data"]["y"]
    others = (y.sum() - y) / (NUM_DATA - 1)
    variance = 1 + 1 / (NUM_DATA - 1)
    exact = -0.5 * ((y - others) ** 2 / variance + np.log(2 * np.pi * variance)).sum()
    assert elpd == pytest.approx(exact, abs=0.3)
    assert khat.shape == (NUM_DATA,)


# Missing observations


def loo_and_waic(version, data, variable):
    if version == "0.x":
        import arviz

        return arviz.loo(data, var_name=variable, pointwise=True), arviz.waic(data, var_name=variable)
    import arviz_stats

    # ArviZ 1.x has no WAIC any more.
    return (arviz_stats.loo(data, var_name=variable, pointwise=True),)


def test_missing_rows_do_not_count(module, version, groups):
    """They are as if they had never been there."""
    is_seen = np.arange(NUM_DATA) % 2 == 0
    full = groups["log_likelihood"]["y"]
    groups["observed_data"]["y"] = np.where(is_seen, groups["observed_data"]["y"], np.nan)
    data = module.to_arviz_data(groups, dims={"y": ["obs"]}, seen_rows={"y": is_seen})
    assert dict(data["log_likelihood"]["y"].sizes) == {"chain": 1, "draw": NUM_DRAWS, "obs": NUM_DATA // 2}
    assert data["log_likelihood"]["obs"].values.tolist() == list(range(0, NUM_DATA, 2))
    assert data["posterior_predictive"]["y"].sizes["obs"] == NUM_DATA
    cut = module.to_arviz_data({**groups, "log_likelihood": {"y": full[..., is_seen]}, "observed_data": {}})
    for found, expected in zip(loo_and_waic(version, data, "y"), loo_and_waic(version, cut, "y"), strict=True):
        assert found.n_data_points == NUM_DATA // 2
        assert (
            (found.iloc[0], found.se) == pytest.approx((expected.iloc[0], expected.se))
            if version == "0.x"
            else ((found.elpd, found.se) == pytest.approx((expected.elpd, expected.se)))
        )


def test_labels_of_rows_that_are_seen(module):
    rng = np.random.default_rng(0)
    likelihood = rng.normal(size=(1, 10, 3))
    seen = np.array([True, False, True])
    data = module.to_arviz_data(
        {"log_likelihood": {"y": likelihood}}, {"obs": ["a", "b", "c"]}, {"y": "obs"}, seen_rows={"y": seen}
    )
    assert data["log_likelihood"]["obs"].values.tolist() == ["a", "c"]
    np.testing.assert_array_equal(data["log_likelihood"]["y"].values, likelihood[..., seen])
    unnamed = module.to_arviz_data({"log_likelihood": {"y": likelihood}}, seen_rows={"y": seen})
    assert unnamed["log_likelihood"]["y_dim_0"].values.tolist() == [0, 2]


def test_several_variables_miss_other_rows(module):
    """Of the same plate; without names of their own, ArviZ would fill the rows with NaN."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(1, 10, 3)) for name in ("x", "y", "z")}
    seen = {"x": np.array([True, False, True]), "y": np.array([False, False, True]), "z": np.array([True] * 3)}
    data = module.to_arviz_data({"log_likelihood": arrays}, dims=dict.fromkeys(arrays, "obs"), seen_rows=seen)
    sizes = {name: dict(data["log_likelihood"][name].sizes) for name in arrays}
    common = {"chain": 1, "draw": 10}
    assert sizes == {"x": common | {"x_obs": 2}, "y": common | {"y_obs": 1}, "z": common | {"obs": 3}}
    assert not any(np.isnan(data["log_likelihood"][name]).any() for name in arrays)


def test_missing_entries_of_several_dimensions_are_flattened(module):
    likelihood = np.random.default_rng(0).normal(size=(1, 10, 2, 3))
    seen = np.array([[True, False, True], [False, False, True]])
    data = module.to_arviz_data(
        {"log_likelihood": {"y": likelihood}}, dims={"y": ["outer", "inner"]}, seen_rows={"y": seen}
    )
    assert data["log_likelihood"]["y_outer_inner"].values.tolist() == ["0, 0", "0, 2", "1, 2"]
    np.testing.assert_array_equal(data["log_likelihood"]["y"].values, likelihood[..., seen])


def test_a_variable_without_any_row_has_no_log_likelihood(module, groups):
    groups["log_likelihood"]["x"] = np.zeros((1, NUM_DRAWS, 3))
    data = module.to_arviz_data(groups, seen_rows={"x": np.zeros(3, dtype=bool), "y": np.ones(NUM_DATA, dtype=bool)})
    assert list(data["log_likelihood"].data_vars) == ["y"]


# Pareto smoothing


def log_mean_exp(log_weights: np.ndarray) -> float:
    return np.logaddexp.reduce(log_weights) - math.log(log_weights.size)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_recovers_the_index_of_a_pareto_tail(module, k):
    uniform = np.random.default_rng(1).uniform(size=250_000)
    log_weights = np.log1p((uniform**-k - 1) / k)
    _, khat = module.pareto_smoothed(log_weights)
    # The standard error is (1 + k) / sqrt(1500) = 0.03 to 0.05.
    assert khat == pytest.approx(k, abs=0.12)


def test_smooths_the_tail_alone(module):
    log_weights = 1.5 * np.random.default_rng(2).normal(size=2500)
    before = log_weights.copy()
    smoothed, _ = module.pareto_smoothed(log_weights)
    np.testing.assert_array_equal(log_weights, before)
    order = np.argsort(log_weights)
    num_tail = 150
    body, tail = order[:-num_tail], order[-num_tail:]
    np.testing.assert_allclose(smoothed[body], log_weights[body], rtol=0, atol=1e-12)
    assert np.all(np.diff(smoothed[tail]) >= 0)
    assert smoothed[tail][0] >= log_weights[body].max()
    assert smoothed.max() <= log_weights.max() + 1e-12
    assert np.count_nonzero(np.abs(smoothed - log_weights) > 1e-9) > num_tail / 2


@pytest.mark.parametrize("log_evidence", [0.0, 1234.5, -1e5])
def test_keeps_the_log_evidence(module, log_evidence):
    noise = 0.7 * np.random.default_rng(3).normal(size=40_000) - 0.7**2 / 2
    smoothed, khat = module.pareto_smoothed(noise + log_evidence)
    assert log_mean_exp(smoothed) == pytest.approx(log_evidence, abs=0.02)
    body = noise < np.quantile(noise, 0.9)
    np.testing.assert_allclose(smoothed[body], (noise + log_evidence)[body], rtol=1e-14, atol=1e-12)
    assert khat == pytest.approx(module.pareto_smoothed(noise)[1], abs=1e-6)


@pytest.mark.parametrize("size", [2, 10, 30, 4000])
@pytest.mark.parametrize("rounding", [0.0, 1e-13, 1e-5])
def test_equal_weights_have_no_tail(module, size, rounding):
    log_weights = -42.0 + rounding * np.random.default_rng(4).normal(size=size)
    smoothed, khat = module.pareto_smoothed(log_weights)
    assert khat == 0.0
    np.testing.assert_array_equal(smoothed, log_weights)


def test_bounded_weights_have_no_tail(module):
    log_weights = np.minimum(np.random.default_rng(5).normal(size=4000), 1.0)
    smoothed, khat = module.pareto_smoothed(log_weights)
    assert khat == 0.0
    np.testing.assert_array_equal(smoothed, log_weights)


def test_zero_weights_stay_zero_and_do_not_count(module):
    log_weights = np.random.default_rng(6).normal(size=3600) + 100
    expected, expected_khat = module.pareto_smoothed(log_weights)
    with_zeros = np.insert(log_weights, [0, 0, 1800, 3600], -np.inf)
    smoothed, khat = module.pareto_smoothed(with_zeros)
    assert khat == expected_khat
    np.testing.assert_array_equal(smoothed, np.insert(expected, [0, 0, 1800, 3600], -np.inf))


def test_zero_and_equal_weights(module):
    """Rejection sampling: exact draws from a smaller support."""
    log_weights = np.where(np.random.default_rng(7).uniform(size=1000) < 0.9, -np.inf, 2.0)
    smoothed, khat = module.pareto_smoothed(log_weights)
    assert khat == 0.0
    np.testing.assert_array_equal(smoothed, log_weights)


@pytest.mark.parametrize(
    "log_weights",
    [
        np.array([0.5]),
        np.arange(29.0),
        np.full(100, -np.inf),
        np.where(np.arange(1000) < 10, np.arange(1000.0), -np.inf),
        # One weight dwarfs all others by more than float64's range, as before a flow is trained.
        np.append(np.linspace(-2000.0, -1000.0, 3999), 0.0),
    ],
    ids=["one", "few", "all zero", "few not zero", "one dwarfs all"],
)
def test_index_is_infinite_where_nothing_can_be_fitted(module, log_weights):
    smoothed, khat = module.pareto_smoothed(log_weights)
    assert khat == math.inf
    np.testing.assert_array_equal(smoothed, log_weights)


@pytest.mark.parametrize("size", [30, 31, 100, 225, 226, 4000])
def test_log_weights_of_every_size_are_fitted(module, size):
    log_weights = np.random.default_rng(size).normal(size=size)
    smoothed, khat = module.pareto_smoothed(log_weights)
    assert math.isfinite(khat)
    assert smoothed.shape == (size,)
    assert np.isfinite(smoothed).all()


def test_wide_weights_are_not_to_be_trusted(module):
    """Log weights that spread over hundreds, as those of an untrained flow."""
    _, khat = module.pareto_smoothed(300 * np.random.default_rng(8).normal(size=4000))
    assert khat > 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_without_a_value_are_errors(module, bad):
    log_weights = np.append(np.zeros(99), [bad, bad])
    with pytest.raises(ValueError, match=r"2 of 101 log weights are NaN or \+inf"):
        module.pareto_smoothed(log_weights)


def test_weights_are_one_a_draw(module):
    with pytest.raises(ValueError, match=r"\(4, 100\)"):
        module.pareto_smoothed(np.zeros((4, 100)))


def test_single_precision_is_widened(module):
    log_weights = np.random.default_rng(9).normal(size=3600).astype(np.float32)
    smoothed, khat = module.pareto_smoothed(log_weights)
    assert smoothed.dtype == np.float64
    assert khat == module.pareto_smoothed(log_weights.astype(np.float64))[1]


# ArviZ 0.x rounds the tail's length up, 1.x down: identical where 3 sqrt(S) or S / 5 is whole, alike elsewhere.
@pytest.mark.parametrize(("size", "tolerance"), [(30, 1e-6), (100, 1e-6), (2500, 1e-6), (10_000, 1e-6), (4000, 0.02)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_generations_agree(monkeypatch, size, tolerance, spread):
    module = load()
    log_weights = spread * np.random.default_rng(size).normal(size=size) + 1234.5
    results = []
    for chosen in [backend(module, "0.x"), backend(module, "1.x")]:
        monkeypatch.setattr(module.generations, "installed", lambda chosen=chosen: chosen)
        results.append(module.pareto_smoothed(log_weights))
    (old, old_khat), (new, new_khat) = results
    assert old_khat == pytest.approx(new_khat, abs=tolerance)
    assert log_mean_exp(old) == pytest.approx(log_mean_exp(new), abs=tolerance)
    if tolerance <= 1e-6:
        np.testing.assert_allclose(old, new, rtol=0, atol=tolerance)


def test_threshold():
    threshold = load().pareto_k_threshold
    assert threshold(100) == pytest.approx(0.5)
    assert threshold(1000) == pytest.approx(2 / 3)
    assert threshold(2155) == pytest.approx(0.7, abs=1e-4)
    assert threshold(100_000) == 0.7
    assert threshold(1) == -math.inf


# The installed ArviZ, and what the module imports


def test_installed_arviz_decides():
    module = load()
    if generation() is None:
        pytest.importorskip("arviz_stats")
    expected = "InferenceData" if generation() == 0 else "DataTree"
    data = module.to_arviz_data({"posterior": {"a": np.zeros((1, 9))}})
    assert type(data).__name__ == expected


def test_parts_of_arviz_1_do_without_the_package_named_arviz(monkeypatch):
    module = load()
    backend(module, "1.x")

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    assert type(module.to_arviz_data({"prior": {"a": np.zeros((1, 9))}})).__name__ == "DataTree"
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    module.generations.installed.cache_clear()
    with pytest.raises(ImportError, match="pip install arviz"):
        module.to_arviz_data({"prior": {"a": np.zeros((1, 9))}})


def test_doctests():
    module = load()
    for part in (module.data, module.draws, module.pareto):
        result = doctest.testmod(part, globs={**vars(module), "np": np}, optionflags=doctest.NORMALIZE_WHITESPACE)
        assert result.attempted and not result.failed


def test_needs_neither_torch_nor_the_package_nor_warns(tmp_path):
    # Not by None in sys.modules, on which SciPy stumbles.
    program = f"""
import importlib.util, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "pyroflows"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
spec = importlib.util.spec_from_file_location("pyroflows_arviz", {str(PATH)!r})
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
early = [name for name in ("arviz", "arviz_base", "arviz_stats", "xarray", "matplotlib") if name in sys.modules]
assert not early, early
import numpy
module.to_arviz_data({{"posterior": {{"a": numpy.zeros((1, 9))}}}})
module.pareto_smoothed(numpy.arange(100.0))
assert "torch" not in sys.modules and "pyroflows" not in sys.modules
"""
    # ArviZ 0.x announces its successor once a day, of which it keeps note in the cache folder.
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-W", "error::FutureWarning", "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# Chains


def autoregressive(rng, coefficient, num_chains=8, num_draws=1000):
    x = np.empty((num_chains, num_draws))
    x[:, 0] = rng.normal(size=num_chains)
    for i in range(1, num_draws):
        x[:, i] = coefficient * x[:, i - 1] + math.sqrt(1 - coefficient**2) * rng.normal(size=num_chains)
    return x


def test_ess_and_rhat_by_component(module):
    """The effective sample size of an autoregressive chain is N (1 - rho) / (1 + rho)."""
    rng = np.random.default_rng(0)
    draws = np.stack([autoregressive(rng, 0.0), autoregressive(rng, 0.7)], -1)[..., None]
    assert module.rhat(draws).shape == module.ess(draws).shape == (2, 1)
    assert (module.rhat(draws) < 1.02).all()
    expected = np.array([[8000.0], [8000 * 0.3 / 1.7]])
    for method in ("bulk", "mean"):
        assert np.allclose(module.ess(draws, method), expected, rtol=0.15)


def test_rhat_of_chains_that_stand_still(module):
    apart = np.repeat(np.arange(4.0)[:, None], 50, 1)
    assert module.rhat(apart) == math.inf
    assert math.isnan(module.rhat(np.zeros((4, 50))))
    assert module.rhat(apart + 0.2 * np.random.default_rng(0).normal(size=(4, 50))) > 2


def test_rhat_of_one_chain(module):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1, 400))
    assert module.rhat(noise) < 1.02
    assert module.rhat(noise + np.linspace(0, 5, 400)) > 1.5


def test_the_standard_error_of_khat_covers_its_spread():
    """The sd of k-hat over 40 sets of Pareto weights of shape 0.7, which is known to 11 %."""
    module = load()
    rng = np.random.default_rng(11)
    found = [module.pareto_smoothed(-0.7 * np.log(rng.uniform(size=10_000)))[1] for _ in range(40)]
    assert module.pareto_k_se(0.7, 10_000) == pytest.approx(1.7 / math.sqrt(300))
    assert np.std(found) == pytest.approx(module.pareto_k_se(0.7, 10_000), rel=0.4)


@pytest.mark.parametrize("khat", [0.0, math.inf])
def test_khat_that_was_not_fitted_has_no_error(khat):
    assert load().pareto_k_se(khat, 10_000) == 0.0


def test_the_error_of_khat_of_short_tails():
    module = load()
    assert module.pareto_k_se(-0.9, 10_000) == module.pareto_k_se(-0.5, 10_000)


def test_bands_hold_the_whole_distribution_as_often_as_they_say(module):
    num, points, prob = 50, np.linspace(0, 1, 21)[1:-1], 0.8
    low, high = module.ecdf_band(num, points, prob)
    assert low.shape == high.shape == points.shape
    levels = np.random.default_rng(1).uniform(size=(2000, num, 1))
    ecdf = (levels <= points).mean(1)
    is_inside = ((ecdf >= low - 1e-9) & (ecdf <= high + 1e-9)).all(-1)
    # Bands are of steps of 1/50, so that they hold somewhat more; the sd is that of both simulations.
    assert (
        prob - 4 * (prob * (1 - prob) * (1 / 2000 + 1 / module.generations.BAND_TRIALS)) ** 0.5 < is_inside.mean() < 0.9
    )

"""Arguments and observations in whatever form users have numbers, and what is not finite in them."""

import warnings
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch.distributions import constraints

from pyroflows.errors import DataError
from pyroflows.models.arguments import in_dtype, non_finite, usable_arguments
from pyroflows.models.batching import BatchedModel
from pyroflows.models.observations import as_tensor
from pyroflows.models.requirements import describe_for_flow
from pyroflows.models.signature import bound_arguments
from pyroflows.models.structure import describe_run

X, Y = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, -1.0, 2.0])
NAN = torch.tensor([0.0, torch.nan, torch.nan])


def line(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def logit(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=slope * x), obs=y)


# Numbers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, torch.tensor(2)),
        (2.5, torch.tensor(2.5)),
        (True, torch.tensor(True)),
        (np.float64(2.5), torch.tensor(2.5)),
        (np.array(2.5), torch.tensor(2.5)),
        (np.array([1, 2], dtype=np.uint8), torch.tensor([1, 2])),
        (np.array([1.0, 2.0], dtype=">f8")[::-1], torch.tensor([2.0, 1.0])),
        (np.array([1.5, 2], dtype=object), torch.tensor([1.5, 2.0])),
        (pd.Series([1.5, 2.0]), torch.tensor([1.5, 2.0])),
        (pd.Series([1, 2], dtype="Int64"), torch.tensor([1, 2])),
        (pd.DataFrame({"a": [1.0, 2.0], "b": [3, 4]}), torch.tensor([[1.0, 3.0], [2.0, 4.0]])),
        ([[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]])),
        ((0.5, 1), torch.tensor([0.5, 1.0])),
        (range(3), torch.tensor([0, 1, 2])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numbers_become_tensors(value, expected):
    found = as_tensor(value)
    if isinstance(value, pd.Series) and found.is_floating_point():
        expected = expected.float()
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "value",
    [None, "text", ["a"], [1, "a"], [], [[1], [1, 2]], np.array(["a"]), np.array([None, 1.0]), pd.Series(["a"]), {}],
    ids=str,
)
def test_what_is_no_array_of_numbers_stays(value):
    assert as_tensor(value) is value


def test_tensors_share_no_memory_and_get_the_dtype():
    array = np.zeros(2)
    tensor = as_tensor(array, torch.float64)
    array[0] = 1.0
    assert tensor.tolist() == [0.0, 0.0]
    assert tensor.dtype == torch.float64


# Observations


@pytest.mark.parametrize("obs", [9.5, [9.5], np.array(9.5), np.float32(9.5), pd.Series([9.5]), 9], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_observations_become_tensors_of_the_distribution(obs, dtype):
    """In the run that describes the model, and in batches; a condition is an observation too."""

    def model(obs=None):
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=obs)

    expected = torch.tensor(9.0 if isinstance(obs, int) else 9.5)
    for conditioned, args in ((model, (obs,)), (poutine.condition(model, data={"y": obs}), ())):
        value = describe_run(conditioned, args, {})[1].nodes["y"]["value"]
        assert torch.equal(value.reshape(()).float(), expected)
        assert value.dtype == dtype or not value.is_floating_point()
        batched = BatchedModel(conditioned, args, {}, {"mean": torch.zeros(5, dtype=dtype)})
        log_prob = batched({"mean": torch.tensor([0.0, 9.0], dtype=dtype)}, 2).log_probs["y"]
        assert torch.allclose(
            log_prob.reshape(2), dist.Normal(torch.tensor([0.0, 9.0], dtype=dtype), 1.0).log_prob(expected)
        )


def test_a_float_is_not_rounded_to_float32_on_its_way_to_float64():
    def model():
        pyro.sample("y", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0), obs=[0.1])

    assert describe_run(model, (), {})[1].nodes["y"]["value"].item() == 0.1


@pytest.mark.parametrize("y", [[0, 1, 1], [False, True, True], torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1]).bool()])
def test_labels_become_what_bernoulli_can_score(y):
    """Integers and booleans fail in torch."""
    trace = describe_run(logit, (X, y), {})[1]
    assert torch.equal(trace.nodes["y"]["value"], torch.tensor([0.0, 1.0, 1.0]))
    batched = BatchedModel(logit, (X, y), {}, {"slope": torch.zeros(5)})
    assert batched.mode == "plate"


def test_counts_stay_integers():
    def model():
        pyro.sample("k", dist.Categorical(torch.ones(3)), obs=[0, 2])

    assert describe_run(model, (), {})[1].nodes["k"]["value"].dtype == torch.int64


def test_observed_words_raise():
    with pytest.raises(DataError, match=r"observed site 'y' \(list\) holds something other than numbers") as caught:
        describe_for_flow(line, (X, ["a", "b", "c"]), {})
    assert "\n" not in str(caught.value)


# Arguments

AS_ARRAYS = {
    "numpy": lambda tensor: tensor.double().numpy(),
    "series": lambda tensor: pd.Series(tensor.double().numpy()),
    "list": lambda tensor: tensor.tolist(),
}


@pytest.mark.parametrize("form", AS_ARRAYS)
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
def test_arrays_become_tensors_where_a_model_needs_them(form, dtype):
    (x,), kwargs = usable_arguments(in_dtype(line, dtype), (AS_ARRAYS[form](X),), {"y": AS_ARRAYS[form](Y)}, dtype)
    assert x.dtype == kwargs["y"].dtype == (dtype or torch.float32)
    assert torch.equal(x, X.to(x.dtype))
    assert torch.equal(kwargs["y"], Y.to(x.dtype))


def test_labels_of_numpy_run_with_predictors_of_numpy():
    args, _ = usable_arguments(logit, (X.double().numpy(), np.array([0, 1, 1])), {})
    assert BatchedModel(logit, args, {}, {"slope": torch.zeros(5)}).mode == "plate"


def test_arrays_stay_arrays_where_a_model_needs_them():
    def model(x, table):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        x = torch.from_numpy(np.log(x.astype(np.float32)))
        with pyro.plate("rows", len(table)):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=torch.tensor(table["y"].values))

    args = np.ones(3), pd.DataFrame({"y": [1.0, 2.0, 3.0], "name": ["a", "b", "c"]})
    found, _ = usable_arguments(model, args, {})
    assert found is args or all(a is b for a, b in zip(found, args, strict=True))


def test_a_table_becomes_a_matrix_or_columns():
    def by_column(table):
        line(table["x"], table["y"])

    def by_position(table):
        line(table[:, 0], table[:, 1])

    table = pd.DataFrame({"x": X.double().numpy(), "y": Y.double().numpy(), "name": ["a", "b", "c"]})
    ((columns,), _) = usable_arguments(by_column, (table,), {})
    assert torch.equal(columns["x"], X)
    ((matrix,), _) = usable_arguments(by_position, (table[["x", "y"]],), {})
    assert torch.equal(matrix, torch.stack([X, Y], -1))


def test_arrays_inside_of_dictionaries_and_beside_sizes():
    def model(data, size, shape):
        pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        pyro.sample("w", dist.Normal(torch.zeros(shape), 1.0).to_event(2))
        line(**data)

    (data, size, shape), _ = usable_arguments(model, ({"x": X.numpy(), "y": Y.numpy()}, np.int64(2), (2, 3)), {})
    assert torch.equal(data["x"], X)
    assert (size, shape) == (2, (2, 3))


def test_arguments_of_numbers_alone_are_no_list():
    def model(rows, columns, x):
        pyro.sample("z", dist.Normal(torch.zeros(rows, columns), 1.0).to_event(2))
        line(x, x)

    (rows, columns, x), _ = usable_arguments(model, (2, 3, [1.0, 2.0]), {})
    assert (rows, columns) == (2, 3)
    assert torch.equal(x, torch.tensor([1.0, 2.0]))


def test_flat_priors_and_generators_are_left_alone():
    def model(x):
        scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
        line(x * scale, x)

    state = torch.get_rng_state()
    (x,), _ = usable_arguments(model, (X.numpy(),), {})
    assert torch.equal(x, X)
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_without_arrays_does_not_run():
    usable_arguments(lambda *args: pytest.fail("it has run"), (X, 3, "text", {"y": None}), {})


@pytest.mark.parametrize(
    "words",
    [np.array(["a", "b", "c"]), pd.Series(["a", "b", None]), np.array([1.0, 2.0, None]), ["a", "b", "c"]],
    ids=str,
)
def test_arrays_of_words_raise(words):
    with pytest.raises(DataError, match=r"argument 'x' \(.*\) holds something other than numbers.*give it numbers"):
        usable_arguments(line, (words, Y), {})


def test_names_stay_names():
    def model(x, names):
        for name in names:
            pyro.sample(name, dist.Normal(0.0, 1.0))
        line(x, x)

    assert usable_arguments(model, (X, ["a", "b"]), {})[0][1] == ["a", "b"]
    ((x, names), _) = usable_arguments(model, (X.numpy(), ["a", "b"]), {})
    assert torch.equal(x, X)
    assert names == ["a", "b"]


def test_options_that_are_lists_hide_no_error():
    def model(x, sizes):
        line(x, x)
        raise ValueError("what the user wrote")

    args = X, [3, 4]
    assert usable_arguments(model, args, {}) == (args, {})


def test_an_error_of_the_model_passes_on():
    def model(x):
        line(x, x)
        raise ValueError("what the user wrote")

    with pytest.raises(ValueError, match="what the user wrote"):
        usable_arguments(model, (X.numpy(),), {})


# Names


def test_names_of_arguments():
    class Model(torch.nn.Module):
        def forward(self, x, y=None):
            return line(x, y)

    assert bound_arguments(line, (X,), {}) == {"x": X, "y": None}
    assert bound_arguments(Model(), (X,), {}) == {"x": X, "y": None}
    assert bound_arguments(poutine.scale(line, scale=2.0), (X,), {}) == {"x": X, "y": None}
    assert bound_arguments(in_dtype(line, torch.float64), (X,), {}) == {"x": X, "y": None}
    assert bound_arguments(lambda *rows: None, (1, 2), {}) == {"rows": (1, 2)}
    assert bound_arguments(partial(lambda a, b, c: None, 1, 2), (3,), {}) == {"c": 3}


# Values that are not finite


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((NAN,), "argument 'x' has 2 NaN of 3 values, the first at [1]"),
        ((NAN.numpy(),), "argument 'x' has 2 NaN of 3 values, the first at [1]"),
        ((NAN.tolist(),), "argument 'x' has 2 NaN of 3 values, the first at [1]"),
        ((X, {"z": [NAN]}), "argument 'y['z'][0]' has 2 NaN of 3 values, the first at [1]"),
        ((-X.log(),), "argument 'x' has 1 infinite of 3 values, the first at [0]"),
        ((float("nan"),), "argument 'x' has 1 NaN of 1 values"),
    ],
)
def test_what_is_not_finite(args, message):
    assert non_finite(line, args, {}) == [message]


def test_what_is_finite():
    assert non_finite(line, (X, {"y": Y, "n": torch.tensor([1]), "name": "text"}), {}) == []


def unvalidated(x, y):
    """Like a line, with no check that the mean is a number."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.StudentT(3.0, slope * x, 1.0, validate_args=False), obs=y)


def covariance(x, y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    kernel = torch.exp(-((x[:, None] - x) ** 2)) + scale * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)


def factored(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.factor("fit", -((y - slope * x) ** 2))


def nested(x, y):
    line(x["here"][0], y)


@pytest.mark.parametrize("model", [line, unvalidated, covariance, factored], ids=lambda model: model.__name__)
def test_predictors_that_are_nan_raise(model):
    with pytest.raises(DataError, match=r"argument 'x' has 2 NaN of 3 values, the first at \[1\].*drop these rows"):
        describe_for_flow(model, (NAN, Y), {})


def test_nested_predictors_that_are_nan_raise():
    with pytest.raises(DataError, match=r"argument 'x\['here'\]\[0\]' has 2 NaN of 3 values"):
        describe_for_flow(nested, ({"here": [NAN]}, Y), {})


def test_predictors_of_numpy_that_are_nan_raise():
    with pytest.raises(DataError, match=r"argument 'x' has 2 NaN of 3 values, the first at \[1\]"):
        usable_arguments(line, (NAN.numpy(), Y.numpy()), {})


def test_infinite_values_raise():
    for args, name in (((X.log(), Y), "x"), ((X, X.log()), "y")):
        with pytest.raises(DataError, match=rf"argument '{name}' has 1 infinite of 3 values, the first at \[0\].*'y'"):
            describe_for_flow(line, args, {})


def test_observed_nan_are_found_in_the_argument():
    with pytest.raises(DataError, match=r"observed site 'y' has 2 NaN.*argument 'y' has 2 NaN.*the first at \[1\]"):
        describe_for_flow(line, (X, NAN), {})


def test_values_that_do_not_matter_may_be_nan():
    def masked(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3), poutine.mask(mask=~x.isnan()):
            pyro.sample("y", dist.Normal(slope * x.nan_to_num(), 1.0), obs=y)

    def unused(x, y):
        line(y, y)

    def bounded(x, upper):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.factor("bound", torch.where(slope < upper, 0.0, -torch.inf))
        pyro.sample("y", dist.Normal(slope * x, 1.0).to_event(1), obs=x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        describe_for_flow(masked, (NAN, Y), {})
        describe_for_flow(unused, (NAN, Y), {})
        describe_for_flow(bounded, (X, torch.tensor(torch.inf)), {})


def test_a_wall_is_no_fault_of_an_infinite_bound():
    """The log joint is -inf at the first draw, but it would be so with any bound."""

    def model(upper):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where((x > 50.0) & (x < upper), 0.0, -torch.inf))

    describe_for_flow(model, (torch.tensor(torch.inf),), {})


def test_other_faults_are_not_blamed_on_arguments():
    def twice(x, y):
        pyro.sample("slope", dist.Normal(0.0, 1.0))
        line(x, y)

    with pytest.raises(RuntimeError, match="Multiple sample sites named 'slope'"):
        describe_for_flow(twice, (NAN, Y), {})


# Other dtypes


def test_in_dtype():
    """Floating tensors in any argument are cast, and what the model makes of numbers is of the dtype too."""
    seen = {}

    def model(x, data, *, flag):
        seen.update(x=x, data=data, flag=flag)
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    index = torch.arange(3)
    run = in_dtype(model, torch.float64)
    value = run(torch.zeros(2), {"a": [torch.ones(1), index], "b": "text"}, flag=True)
    assert seen["x"].dtype == seen["data"]["a"][0].dtype == value.dtype == torch.float64
    assert seen["data"]["a"][1] is index
    assert seen["data"]["b"] == "text"
    assert seen["flag"] is True


def test_in_no_dtype_is_the_model_itself():
    assert in_dtype(line, None) is line


def test_in_dtype_restores_the_default():
    def model():
        raise KeyError("stop")

    with pytest.raises(KeyError):
        in_dtype(model, torch.float64)()
    assert torch.get_default_dtype() == torch.float32


def test_in_dtype_gradients_reach_the_arguments():
    x = torch.ones(2, requires_grad=True)
    in_dtype(lambda x: x.square().sum(), torch.float64)(x).backward()
    torch.testing.assert_close(x.grad, torch.full((2,), 2.0))


def test_the_advice_for_a_table_that_the_model_measures():
    def model(table):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(table)):
            pyro.sample("y", dist.Normal(slope * table["x"], 1.0), obs=table["y"])

    table = pd.DataFrame({"x": X.double().numpy(), "y": Y.double().numpy()})
    with pytest.raises(DataError, match=r"argument 'table' \(DataFrame\).*give it tensors, such as torch.tensor"):
        usable_arguments(model, (table,), {})

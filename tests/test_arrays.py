"""Numbers and options as users give them: what is taken, and what is refused with which words."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from torch import nn

from pyroflows import DataError, Flow, OptionError, flows, transforms
from pyroflows.arrays import as_numbers, as_tensor, floating_tensor

FRAME = pd.DataFrame({"a": [1.0, 2.5], "b": [3, 4], "c": [True, False]})
EXPECTED = torch.tensor([[1.0, 3.0, 1.0], [2.5, 4.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "values",
    [
        FRAME,
        FRAME.convert_dtypes(),  # nullable columns
        FRAME.astype({"b": "Int64", "c": "boolean"}),
        FRAME.astype(object),
        FRAME.to_numpy(dtype=object),
        EXPECTED.tolist(),
        EXPECTED.numpy()[::-1][::-1],
        np.asfortranarray(EXPECTED.numpy()),
        EXPECTED,
    ],
)
def test_values_in_many_forms(values):
    assert torch.equal(as_numbers("x", values), EXPECTED)


def test_a_series_is_a_vector():
    assert as_numbers("weights", FRAME["b"].astype("Int64")).tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    "values",
    [
        pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}),
        np.ma.MaskedArray([[1], [7]], mask=[[False], [True]]),
        pd.DataFrame({"a": [1.0, None]}),
    ],
)
def test_what_is_missing_is_nan(values):
    assert as_numbers("x", values).isnan().tolist() == [[False], [True]]


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pd.Categorical(["u", "v"]), "categorical"),
        (pd.Categorical([1, 2]), "categorical"),
        (["u", "v"], "string"),
        (["1.5", "2.5"], "string"),
        (pd.to_datetime(["2020-01-01", "2021-01-01"]), "datetime64"),
        ([1, "v"], "mixed-integer"),
    ],
)
def test_columns_of_a_frame_that_are_no_numbers(column, kind):
    with pytest.raises(DataError, match=f"column 'd' of x holds values of kind '{kind}', which are no numbers: leave"):
        as_numbers("x", FRAME.assign(d=column))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.eye(2).to_sparse(), r"x is a sparse tensor: make it dense by to_dense\(\)"),
        (scipy.sparse.csr_matrix(np.eye(2)), r"x is a sparse matrix: make it dense by toarray\(\)"),
        (scipy.sparse.coo_array(np.eye(2)), "x is a sparse matrix"),
    ],
    ids=["tensor", "matrix", "array"],
)
def test_sparse_values(values, message):
    for like in (None, torch.zeros(())):
        with pytest.raises(DataError, match=message):
            as_tensor("x", values, like)


@pytest.mark.parametrize(
    "values",
    [
        np.array(["1.5"]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.zeros(2, dtype=[("a", float)]),
        [[1.0], [2.0, 3.0]],
        {"a": 1},
        object(),
        "abc",
    ],
    ids=lambda values: type(values).__name__,
)
def test_what_is_no_array_of_numbers(values):
    with pytest.raises(DataError, match="x is no array of numbers"):
        as_numbers("x", values)


def test_a_tensor_that_fits_is_returned_itself():
    x = torch.zeros(2)
    assert as_tensor("x", x, torch.ones(1)) is x
    assert as_tensor("x", x, None) is x
    assert as_tensor("x", x, torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert as_tensor("x", x, torch.ones(1, device="meta")).device.type == "meta"


def test_a_cast_carries_gradients():
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    as_tensor("x", x, torch.ones(1)).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_dtype_of_a_module(dtype):
    for module in (
        flows.NSF(2),
        flows.Planar(1),
        Flow([transforms.Permutation([1, 0])]),
        nn.Sequential(nn.Linear(1, 1)),
    ):
        assert floating_tensor(module.to(dtype)).dtype == dtype
    assert floating_tensor(nn.Identity()) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flows.NSF(2.0), "dim must be an integer of at least 1, got 2.0"),
        (lambda: flows.MAF("2"), "dim must be an integer"),
        (lambda: flows.RealNVP(True), "dim must be an integer"),
        (lambda: flows.NSF([2]), "dim must be an integer"),
        (lambda: flows.Planar(2.0), "a size of events or contexts must be an integer or a sequence of these, got 2.0"),
        (lambda: flows.Gaussian(torch.zeros(2)), "a size of events or contexts must be"),
        (lambda: flows.Sylvester(2.0), "a size of events or contexts must be"),
        (lambda: flows.NSF(2, context_dim=1.5), "a size of events or contexts must be"),
        (lambda: flows.NSF(2, num_layers=2.5), "num_layers must be an integer of at least 1, got 2.5"),
        (lambda: flows.NSF(2, hidden_dims=64), r"hidden_dims must be a sequence of widths, such as \(64, 64\), got 64"),
        (lambda: flows.MAF(2, hidden_dims=None), "hidden_dims must be a sequence of widths"),
        (lambda: flows.MAF(2, hidden_dims=(64, 2.5)), "hidden_dims must be one or more positive widths"),
        (lambda: flows.NSF(2, bins=4.5), "bins must be an integer of at least 2, got 4.5"),
        (lambda: flows.Sylvester(3, rank=1.5), "rank must be an integer"),
        (lambda: transforms.univariate.Monotone(1.5), "num_units must be an integer"),
        (lambda: transforms.univariate.SOS(degree=1.5), "degree must be an integer"),
        (lambda: transforms.Permutation(3), "order must be a sequence of the indices 0 to D - 1, got 3"),
        (lambda: transforms.Coupling(2, transforms.univariate.Spline), "got the class Spline: make an instance first"),
        (lambda: flows.NSF(2, base=torch.distributions.Normal), "got the class Normal: make an instance first"),
        (lambda: Flow([transforms.Planar]), "got the class Planar: make an instance first"),
        (lambda: Flow(transforms.Planar), "got the class Planar: make an instance first"),
        (lambda: flows.Mixture(flows.MAF(2)), r"made of a list of flows, such as \[flow, other\], but got MAF"),
        (lambda: flows.Mixture([flows.MAF]), "got the class MAF: make an instance first"),
    ],
)
def test_options_of_the_wrong_kind(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_integers_of_numpy_and_torch_are_taken():
    assert flows.NSF(np.int64(3), num_layers=torch.tensor(2), hidden_dims=[np.int64(8)]).dim == 3
    assert isinstance(flows.Planar(np.int64(3)).dim, int)

"""Names of dimensions and labels, given once to a fit, and where they are shown."""

import datetime
import json

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.inference.component_labels import ComponentLabels
from pyroflows.models.structure import describe

QUIET = {"seed": 0, "progress_bar": False}
SCHOOLS = ["Choate", "Deerfield", "Exeter"]
Y = torch.tensor([1.0, -1.0, 0.5])


def schools(y, subsample_size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("school", len(y), subsample_size) as rows:
        if subsample_size is None:
            theta = pyro.deterministic("theta", mu + pyro.sample("eta", dist.Normal(0.0, 1.0)))
        else:
            theta = mu
        pyro.sample("y", dist.Normal(theta + weight.sum(-1)[..., None], 1.0), obs=y[rows])


def fit(**options):
    return pf.FlowVI(schools, num_steps=20, num_starts=1, **QUIET, **options).run(Y)


@pytest.fixture(scope="module")
def posterior():
    return fit(coords={"school": SCHOOLS, "side": [1, 2]}, dims={"weight": ["side"]})


ROWS = ["mu", "weight[1]", "weight[2]", *(f"{site}[{name}]" for site in ("eta", "theta") for name in SCHOOLS)]


def test_a_plate_is_a_dimension_so_that_coords_suffice(posterior):
    assert posterior.coords == {"school": tuple(SCHOOLS), "side": (1, 2)}
    assert posterior.dims == {"weight": ("side",), **dict.fromkeys(("eta", "theta", "y"), ("school",))}


def test_labels_serve_tables_print_and_arviz(posterior):
    assert list(posterior.summary().index) == ROWS
    assert "theta[Exeter]" in repr(posterior)
    data = posterior.to_arviz(num_samples=10)
    assert data["posterior"]["theta"].dims[-1] == "school"
    for group in ("posterior", "observed_data", "log_likelihood", "posterior_predictive", "prior"):
        assert data[group].coords["school"].values.tolist() == SCHOOLS
    assert data["posterior"]["weight"].coords["side"].values.tolist() == [1, 2]


def test_without_labels_there_are_numbers():
    posterior = fit()
    assert posterior.coords == {} and "weight" not in posterior.dims
    assert list(posterior.summary().index)[:4] == ["mu", "weight[0]", "weight[1]", "eta[0]"]


@pytest.mark.slow
def test_labels_go_where_draws_go(posterior, tmp_path):
    weighted = posterior.importance_sample(50)
    assert list(weighted.summary().index) == ROWS
    by_function = pf.importance_sample(schools, posterior, Y, num_samples=50, progress_bar=False)
    assert list(by_function.summary().index) == ROWS
    chains = posterior.mcmc(4, 2, num_warmup=1, **QUIET)
    assert list(chains.summary().index) == ROWS and "[Choate]" in repr(chains) + str(chains)
    assert chains.to_arviz(prior=False)["posterior"].coords["school"].values.tolist() == SCHOOLS
    distilled = posterior.distill(num_steps=2, **QUIET)
    assert distilled.coords == posterior.coords and distilled.outcome is None
    assert posterior.fit_proposal(num_samples=50, max_epochs=1, **QUIET).coords == posterior.coords
    posterior.save(tmp_path / "posterior")
    loaded = pf.load_posterior(tmp_path / "posterior", schools, Y)
    assert (loaded.coords, loaded.dims) == (posterior.coords, posterior.dims)


def test_other_data_keep_the_labels_of_rows_that_stay(posterior):
    assert posterior.with_data(Y + 1).coords == posterior.coords


def test_other_rows_lose_their_labels():
    def line(x, y, size):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x), size) as rows:
            pyro.sample("y", dist.Normal(slope * x[rows], 1.0), obs=y[rows])

    x = torch.arange(6.0)
    names = list("abcdef")
    fitted = pf.FlowVI(line, num_steps=5, num_starts=1, coords={"row": names}, **QUIET).run(x, x, 2)
    assert fitted.with_data(x, x, 6).coords == {"row": tuple(names)}  # the plate has as many rows as before
    assert fitted.with_data(x[:4], x[:4], 4).coords == {}
    assert fitted.with_data(x, x, 6).to_arviz(5)["log_likelihood"].coords["row"].values.tolist() == names


def test_to_arviz_replaces_what_it_is_given(posterior):
    options = {"log_likelihood": False, "posterior_predictive": False, "prior": False}
    data = posterior.to_arviz(5, coords={"place": ["x", "y", "z"]}, dims={"theta": ["place"]}, **options)["posterior"]
    assert data["theta"].coords["place"].values.tolist() == ["x", "y", "z"]
    assert data["eta"].coords["school"].values.tolist() == SCHOOLS
    data = posterior.to_arviz(5, dims={"weight": ["letter"]}, **options)["posterior"]
    assert data["weight"].dims[-1] == "letter" and "side" not in data.coords
    with pytest.raises(pf.errors.OptionError, match="dimension 'plce'"):
        posterior.to_arviz(5, coords={"plce": ["x"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"coords": {"schol": SCHOOLS}},
            r"'schol', but the .* are \['weight_dim_0' \(2\), 'school' \(3\)\]",
        ),
        ({"coords": {"school": SCHOOLS[:2]}}, "2 labels of the dimension 'school', which has 3 entries"),
        ({"coords": {"side": [1, 2, 3]}, "dims": {"weight": "side"}}, "3 labels of the dimension 'side', which has 2"),
        ({"dims": {"teta": ["school"]}}, r"site 'teta', but the model has the sites \[mu, weight, eta, theta, y\]"),
        ({"dims": {"mu": ["one"]}}, r"\['one'\] for site 'mu', whose dimensions have the sizes \[\]"),
        ({"dims": {"weight": ["school"]}}, "'school' has 3 entries at site 'eta', but 2 elsewhere"),
        ({"coords": SCHOOLS}, "coords must be a dictionary, such as .*, got list"),
    ],
)
def test_what_does_not_fit_is_refused_when_the_fit_starts(options, message):
    with pytest.raises(pf.errors.OptionError, match=message):
        fit(**options)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (np.array(["a", "b", "c"]), "eta[a]"),
        (pd.Index([2019, 2020, 2021]), "eta[2019]"),
        (torch.tensor([5, 6, 7]), "eta[5]"),
        (range(10, 13), "eta[10]"),
        ([datetime.date(2020, 1, day) for day in (1, 2, 3)], "eta[2020-01-01]"),
        (pd.Series(["a", "b", "c"], index=[7, 8, 9]), "eta[a]"),
    ],
)
def test_labels_of_many_kinds_are_shown_and_saved(given, shown):
    structure = describe(schools, (Y,), {})
    labels = ComponentLabels.of(structure, {"school": given})
    assert labels.component("eta", (0,)) == shown
    saved = json.loads(json.dumps(labels.to_json()))
    assert ComponentLabels.from_json(saved).updated(structure).component("eta", (0,)) == shown

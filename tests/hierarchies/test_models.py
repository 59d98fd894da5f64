"""The hierarchies have the latents that the benchmark says, and two forms of one model agree."""

import pyro
import pytest
import torch
from pyro import poutine

from benchmarks.hierarchies.data import DATA
from benchmarks.hierarchies.models import arguments, model
from pyroflows.models.layout import Layout
from pyroflows.models.structure import describe

DIMS = {
    **{"radon": 86, "volatility": 153, "volatility_loop": 153, "items": 233, "cox_process": 43, "schools": 10},
    **{"funnel": 10, "gaussian_1000": 1003, "poisson_1000": 1002},
}


@pytest.mark.parametrize("name", DIMS)
def test_number_of_latents(name):
    layout = Layout(describe(model(name), (), arguments(name)))
    assert layout.dim == DIMS[name]
    assert all(torch.isfinite(value).all() for value in arguments(name).values())


def test_data_are_the_same_in_each_call():
    for name in DIMS:
        first, second = DATA[name](), DATA[name]()
        assert all((first[key] == second[key]).all() for key in first)


def test_the_two_forms_of_volatility_agree():
    # The first has a density for the days after the first one, the second a site for each day.
    y = arguments("volatility")["y"].double()
    values = {"mu": torch.tensor(-1.0), "phi": torch.tensor(0.9), "sigma": torch.tensor(0.3)}
    h = torch.randn(len(y), generator=torch.Generator().manual_seed(0), dtype=torch.double)
    by_form = []
    for name, days in (("volatility", {"h": h}), ("volatility_loop", {f"h_{t}": h[t] for t in range(len(y))})):
        conditioned = pyro.condition(model(name), data={**{k: v.double() for k, v in values.items()}, **days})
        by_form.append(poutine.trace(conditioned).get_trace(y).log_prob_sum())
    torch.testing.assert_close(*by_form)

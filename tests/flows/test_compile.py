"""torch.compile makes one graph of a flow's call, its density and its draws, whatever the recipe."""

import pyro
import pytest
import torch
from torch.distributions import constraints

from pyroflows import flows
from pyroflows.transforms import root
from tests.flows.test_recipes import RECIPES

COMPILED = {
    **RECIPES,
    "planar": (lambda dim, hidden_dims, **options: flows.Planar(dim, **options),),
    "radial": (lambda dim, hidden_dims, **options: flows.Radial(dim, **options),),
    "sylvester": (lambda dim, hidden_dims, **options: flows.Sylvester(dim, **options),),
    "gaussian": (lambda dim, hidden_dims, num_layers, **options: flows.Gaussian(dim, **options),),
    "student-t": (lambda dim, **options: flows.IAF(dim, base="student_t", **options),),
    "support": (lambda dim, **options: flows.MAF(dim, support=constraints.positive, **options),),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it imports its compiler
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_graph_breaks(name, monkeypatch):
    """The call of the flow, its density and its draws, so that nothing has to be written twice for compilation."""
    monkeypatch.setitem(root.NUM_ITERATIONS, torch.float32, 12)  # they unroll, and few are enough near the identity
    dim = 1 if name in ("naf", "sos") else 2
    torch.compiler.reset()
    pyro.enable_validation(True)  # as a user has it, unless a compilation before has switched it off
    flow = COMPILED[name][0](dim, num_layers=1, hidden_dims=(4,))
    x = torch.rand(5, dim) + 0.1

    def log_prob(x):
        return flow().log_prob(x)

    def draws(x):
        return flow().rsample_and_log_prob((5,))

    for function in (log_prob, draws):
        torch.manual_seed(0)
        expected = function(x)
        torch.manual_seed(0)
        found = torch.compile(function, fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(found, expected)
    x = torch.compile(lambda: flow().rsample((5,)), fullgraph=True, backend="eager")()
    assert x.shape == (5, dim) and (x.requires_grad or name == "gaussian")

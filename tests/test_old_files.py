"""Files of earlier versions, which must load as long as their formats are read.

Where a format changes, add a file of the new one, and keep these as examples that are refused by their number.
"""

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf

FOLDER = Path(__file__).parent / "files"
Y = torch.tensor([1.0, 2.0, 2.5])
VALUES = {
    "mean": torch.tensor([0.5, 2.0]),
    "scale": torch.tensor([1.0, 0.2]),
    "share": torch.tensor([0.3, 0.9]),
    "angle": torch.tensor([0.0, 2.0]),
}
LOG_PROB_OF_POSTERIOR = [-2.04951, -9.63503]
LOG_PROB_OF_FLOW = [-3.41374, -4.31911]


def model(y=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    share = pyro.sample("share", dist.Uniform(0.0, 1.0))
    angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(mean + share * angle.cos(), scale + 0.1), obs=y)


@pytest.mark.parametrize("args", [(), (Y,)], ids=["without data", "with data"])
def test_a_posterior_of_format_4(args):
    posterior = pf.load_posterior(FOLDER / "posterior.safetensors", model, *args)
    assert posterior.log_prob(VALUES).tolist() == pytest.approx(LOG_PROB_OF_POSTERIOR, abs=1e-3)
    assert posterior.predictive(5, None)["y"].shape == (5, 3)
    assert posterior.history.num_steps == 200 and posterior.outcome.seconds == 1.5


def test_a_flow_of_format_1():
    flow = pf.load_flow(FOLDER / "flow.safetensors")
    x = torch.tensor([[1.0, 2.0], [0.1, 5.0]])
    assert flow().log_prob(x).tolist() == pytest.approx(LOG_PROB_OF_FLOW, abs=1e-3)
    assert flow().sample((5,)).min() > 0

"""Draws of single sites, in the shape of the data that they replicate."""

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyroflows import ModelError
from pyroflows.models.batching import BatchedModel
from pyroflows.models.replicates import SamplerError, draw_site, replicate, replicate_shape


@pytest.mark.parametrize(
    ("fn", "observed", "plate_dims", "shape"),
    [
        (dist.Normal(0.0, 1.0), None, [], ()),
        (dist.Normal(0.0, 1.0), (30, 2), [], (30, 2)),
        (dist.Normal(torch.zeros(2), 1.0), (30, 2), [-1], (30, 2)),
        (dist.Normal(torch.zeros(30, 1), 1.0), (2,), [], (30, 2)),
        (dist.Normal(torch.zeros(2), 1.0).to_event(1), (30, 2), [], (30, 2)),
        (dist.Normal(torch.zeros(2), 1.0).to_event(1), (), [], (2,)),
        (dist.Dirichlet(torch.ones(3)), (4, 3), [], (4, 3)),
        # A plate has its own length, whatever the length of old data is.
        (dist.Normal(torch.zeros(1), 1.0), (30,), [-1], (1,)),
        (dist.Normal(torch.zeros(5), 1.0), (30,), [], (5,)),
    ],
)
def test_shapes(fn, observed, plate_dims, shape):
    value = None if observed is None else torch.zeros(observed)
    assert replicate_shape(fn, value, plate_dims) == shape
    drawn = replicate(fn, value, plate_dims)
    assert drawn.shape == shape
    assert drawn.unique().numel() == drawn.numel()


class Failing(dist.Normal):
    def sample(self, sample_shape=torch.Size()):  # noqa: B008
        raise RuntimeError("no luck\nat all")


@pytest.mark.parametrize(
    ("fn", "reason", "has_sampler"),
    [
        (dist.ImproperUniform(dist.constraints.real, (), ()), "ImproperUniform is improper", False),
        (dist.ImproperUniform(dist.constraints.real, (2,), ()).to_event(1), "ImproperUniform is improper", False),
        (dist.TorchDistribution(validate_args=False), "TorchDistribution has no sampler", False),
        (Failing(0.0, 1.0), r"Failing fails with \[RuntimeError: no luck\]", True),
    ],
)
def test_what_cannot_be_drawn(fn, reason, has_sampler):
    with pytest.raises(SamplerError, match=f"site 'y' cannot be drawn, since.*{reason}") as caught:
        draw_site("y", fn, None)
    assert (caught.value.site, caught.value.has_sampler) == ("y", has_sampler)
    assert isinstance(caught.value, ModelError)


def test_a_site_that_is_not_drawn_is_left_out():
    def model():
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(x, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    batched = BatchedModel(model, (), {}, {"z": torch.zeros(2)}, draw=True, undrawn=frozenset({"x"}))
    record = batched({"z": torch.zeros(2)}, 2)
    assert record.values.keys() == record.log_probs.keys() == {"y", "z"}
    assert record.values["y"].isnan().all()
    assert not record.values["z"].isnan().any()


@pytest.mark.parametrize("num_rows", [5, 30])
def test_data_with_more_dimensions_than_their_distribution_run_in_a_batch(num_rows):
    """Under a plate, although no site has a batch shape; as many rows as examples do not confuse it."""
    y = torch.randn(num_rows)

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    batched = BatchedModel(model, (), {}, {"x": torch.randn(5)})
    assert batched.mode == "plate"
    x = torch.randn(7)
    expected = dist.Normal(x[:, None], 1.0).log_prob(y)
    torch.testing.assert_close(batched({"x": x}, 7).log_probs["y"], expected)
    assert batched.drawing({"x": x})({"x": x}, 7).values["y"].shape == (7, num_rows)

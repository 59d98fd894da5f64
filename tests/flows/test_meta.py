"""Flows that have been on the meta device, which empties all tensors, are what they were once their state is loaded."""

import copy

import pytest
import torch

import pyroflows as pf
from pyroflows.transforms import Autoregressive, Coupling, masks
from tests.flows.test_no_rows import MAKE
from tests.transforms.registry import perturb

MAKE = {
    **MAKE,
    "angles and reals": lambda: pf.Flow([Coupling(4, ["circular_spline", "affine"] * 2)]),
    "autoregressive angles": lambda: pf.Flow([Autoregressive(3, ["circular_spline", "affine", "circular_spline"])]),
    "networks": lambda: pf.Flow(
        [Autoregressive(3, conditioner=name) for name in ("made", "scaled_made", "residual", "causal_conv")]
        + [Coupling(3, conditioner=name) for name in ("mlp", "scaled_mlp", "residual")]
    ),
    "sequence": lambda: pf.Flow([Autoregressive((2, 5), conditioner="causal_conv", order=[4, 1, 0, 3, 2])]),
    "images": lambda: pf.Flow([Coupling((4, 2, 2), mask=masks.half(4))]),
}


def emptied(flow):
    # What stands in memory that is not initialised is chance; here it is wrong for certain.
    flow = copy.deepcopy(flow).to("meta").to_empty(device="cpu")
    for tensor in [*flow.parameters(), *flow.buffers()]:
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 0)
    return flow


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_a_state_brings_back_a_flow_from_the_meta_device(name, assign):
    torch.manual_seed(0)
    flow = perturb(MAKE[name](), 0.1)
    context = torch.randn(5, 3) if flow.context_dim else None
    x = flow(context).sample(() if flow.context_dim else (5,))
    back = copy.deepcopy(flow).to("meta") if assign else emptied(flow)
    back.load_state_dict(copy.deepcopy(flow.state_dict()), assign=assign)
    for tensor, other in zip(flow.buffers(), back.buffers(), strict=True):
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype
    assert torch.equal(back(context).log_prob(x), flow(context).log_prob(x))


def test_a_state_of_another_dtype_keeps_that_of_the_flow():
    flow = pf.flows.MAF(2)
    back = emptied(flow.double())
    back.load_state_dict(flow.state_dict())
    assert all(buffer.dtype == other.dtype for buffer, other in zip(flow.buffers(), back.buffers(), strict=True))
    assert torch.equal(back().log_prob(torch.zeros(2).double()), flow().log_prob(torch.zeros(2).double()))


@pytest.mark.parametrize("make", [lambda: pf.flows.MAF(2), lambda: pf.flows.Mixture([pf.flows.MAF(2, context_dim=1)])])
def test_what_needs_values_says_that_there_are_none(make, tmp_path):
    flow = make().to("meta")
    x = torch.randn(50, 2)
    calls = [
        lambda: flow.is_adapted,
        lambda: flow.adapt(x),
        lambda: flow.save(tmp_path / "flow"),
        lambda: pf.fit_density(flow, x, max_epochs=1, progress_bar=False),
    ]
    for call in calls:
        with pytest.raises(pf.OptionError, match="this flow is on the meta device, where tensors have no values: call"):
            call()
    assert not (tmp_path / "flow").exists()

"""Models under Pyro's effect handlers, which replace, scale, hide, fix or add sites. Module-level, with fixed data."""

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.reparam import (
    AutoReparam,
    HaarReparam,
    LocScaleReparam,
    MinimalReparam,
    ProjectedNormalReparam,
    SplitReparam,
    StudentTReparam,
    TransformReparam,
)
from torch import nn

from pyroflows import flows

Y = torch.tensor([1.3, 0.2, -0.4, 0.9, 2.1])
Y_ROWS = torch.linspace(-1, 2, 15).reshape(5, 3)
NON_CENTRED = {"x": LocScaleReparam(centered=0.0)}


def _flow():
    torch.manual_seed(3)
    flow = flows.MAF(2, num_layers=2, hidden_dims=(8,))
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    return flow


FLOW = _flow()


def groups(y=Y):
    t = pyro.sample("t", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(y)):
        x = pyro.sample("x", dist.Normal(0.0, t))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def handler_inside_a_plate(y=Y):
    t = pyro.sample("t", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(y)):
        with poutine.reparam(config=NON_CENTRED):
            x = pyro.sample("x", dist.Normal(0.0, t))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def vectors_inside_a_plate(y=Y_ROWS):
    t = pyro.sample("t", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(y)):
        with poutine.reparam(config=NON_CENTRED):
            x = pyro.sample("x", dist.Normal(torch.zeros(3), t[..., None]).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


def log_normal():
    x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.5))


def direction():
    z = pyro.sample("z", dist.ProjectedNormal(torch.tensor([0.5, 0.0])))
    pyro.sample("y", dist.Normal(z[..., 0], 0.5), obs=torch.tensor(0.3))


def directions():
    with pyro.plate("rows", 5):
        z = pyro.sample("z", dist.ProjectedNormal(torch.tensor([0.5, 0.0, 0.2])))
        pyro.sample("y", dist.Normal(z[..., 0], 0.5), obs=Y)


def student_t():
    x = pyro.sample("x", dist.StudentT(3.0, 0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.5))


def stable():
    x = pyro.sample("x", dist.Stable(1.5, 0.0, 1.0, 0.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.5))


def walks():
    with pyro.plate("rows", 5):
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=Y_ROWS)


def flow_prior():
    pyro.module("flow", FLOW)
    z = pyro.sample("z", FLOW())
    pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=torch.tensor(0.5))


def chain():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(a, 1.0))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(b, 1.0), obs=Y)


def parametrised():
    m = pyro.param("m", torch.tensor(0.3))
    s = pyro.sample("s", dist.Normal(m, 1.0))
    pyro.sample("y", dist.Normal(s, 1.0), obs=torch.tensor(0.5))


# Name to (model, its sites that follow from others, its observed sites).
HANDLED = {
    "loc-scale-inside-a-plate": (handler_inside_a_plate, ["x"], ["y"]),
    "loc-scale-of-vectors": (vectors_inside_a_plate, ["x"], ["y"]),
    "loc-scale-around-the-model": (poutine.reparam(groups, NON_CENTRED), ["x"], ["y"]),
    "loc-scale-learned": (poutine.reparam(groups, {"x": LocScaleReparam()}), ["x"], ["y"]),
    "transform": (poutine.reparam(log_normal, {"x": TransformReparam()}), ["x"], ["y"]),
    "auto": (AutoReparam()(log_normal), ["x_base", "x"], ["y"]),
    "auto-in-a-plate": (AutoReparam()(groups), ["x"], ["y"]),
    "projected-normal": (poutine.reparam(direction, {"z": ProjectedNormalReparam()}), ["z"], ["y"]),
    "projected-normal-in-a-plate": (poutine.reparam(directions, {"z": ProjectedNormalReparam()}), ["z"], ["y"]),
    "minimal": (MinimalReparam()(directions), ["z"], ["y"]),
    "minimal-stable": (MinimalReparam()(stable), ["x"], ["y"]),
    "student-t": (poutine.reparam(student_t, {"x": StudentTReparam()}), [], ["y"]),
    "haar": (poutine.reparam(walks, {"x": HaarReparam(dim=-1)}), ["x"], ["y"]),
    "split": (poutine.reparam(walks, {"x": SplitReparam([1, 2], -1)}), ["x"], ["y"]),
    "flow-as-prior": (poutine.reparam(flow_prior, {"z": TransformReparam()}), ["z"], ["y"]),
    "auto-of-a-flow": (AutoReparam()(flow_prior), ["z_base", "z"], ["y"]),
    "scale": (poutine.scale(chain, 0.5), [], ["y"]),
    "mask": (poutine.mask(chain, torch.tensor(True)), [], ["y"]),
    "condition": (poutine.condition(chain, {"a": torch.tensor(0.1)}), [], ["a", "y"]),
    "lift": (poutine.lift(parametrised, {"m": dist.Normal(0.0, 1.0)}), [], ["y"]),
    "infer-config": (poutine.infer_config(chain, lambda site: {"note": 1}), [], ["y"]),
}

"""States of flows: twins of a fitted flow, and states that belong to another flow."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import constraints
from torch.distributions import transforms as torch_transforms
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyroflows import StateError, fit_density, flows
from pyroflows.flows import Flow
from pyroflows.flows.facts import facts_of, require_same
from pyroflows.guides import AutoFlow
from pyroflows.transforms import LU, Autoregressive, Coupling, Permutation, Planar, Triangular
from pyroflows.transforms.univariate import SOS, Affine

DATA = 20 + 5 * torch.randn(600, 2, generator=torch.Generator().manual_seed(0))


def make(**options):
    return flows.NSF(2, num_layers=2, hidden_dims=(16,), **options)


def fitted(flow):
    fit_density(flow, DATA, max_epochs=2, seed=0, progress_bar=False)
    return flow


def assert_same_law(a, b):
    x = DATA[:20].to(next(a.parameters()))
    assert torch.equal(a().log_prob(x), b().log_prob(x))


# Twins


def test_a_fit_changes_values_only():
    flow = make()
    names = [[name for name, _ in named()] for named in (flow.named_modules, flow.named_parameters, flow.named_buffers)]
    identities = [id(tensor) for tensor in (*flow.parameters(), *flow.buffers())]
    facts = facts_of(flow)
    fitted(flow)
    assert names == [
        [name for name, _ in named()] for named in (flow.named_modules, flow.named_parameters, flow.named_buffers)
    ]
    assert identities == [id(tensor) for tensor in (*flow.parameters(), *flow.buffers())]
    assert facts == facts_of(flow)


def test_a_twin_that_gets_the_parameters_has_the_fitted_density():
    flow = make()
    twin = copy.deepcopy(flow)
    fitted(flow)
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), flow.parameters(), strict=True):
            mine.copy_(theirs)
    assert_same_law(twin, flow)
    assert len(twin.layers) == len(flow.layers) == 3
    assert torch.equal(twin.standardization.loc, flow.standardization.loc)
    torch.testing.assert_close(twin.standardization.loc, DATA.mean(0), atol=1.0, rtol=0)


@pytest.mark.parametrize("options", [{}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
def test_an_average_of_models_follows_a_fit(options):
    flow = make(mixing="permutation")
    average = AveragedModel(flow, **options)
    fitted(flow)
    average.update_parameters(flow)
    assert_same_law(average.module, flow)
    fitted(flow)
    average.update_parameters(flow)
    assert average.module().log_prob(DATA).isfinite().all()


def test_a_fresh_flow_can_be_called_with_the_state_of_a_fitted_one():
    flow, fresh = fitted(make()), make()
    before = copy.deepcopy(fresh.state_dict())

    class Score(nn.Module):
        def __init__(self, flow):
            super().__init__()
            self.flow = flow

        def forward(self, x):
            return self.flow().log_prob(x)

    state = {f"flow.{name}": value for name, value in flow.state_dict().items()}
    assert torch.equal(functional_call(Score(fresh), state, (DATA,)), flow().log_prob(DATA))
    functional_call(fresh, flow.state_dict())
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, before[name])


def test_pyros_store_holds_location_and_scale(tmp_path):
    flow, fresh = make(), make()
    flow.adapt(DATA)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", flow(), obs=x)

    SVI(model, lambda x: None, pyro.optim.AdamW({"lr": 1e-3}), Trace_ELBO()).step(DATA)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    pyro.module("flow", fresh, update_module_params=True)
    assert_same_law(fresh, flow)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_training_moves_location_and_scale_in_units_of_the_data(scale):
    """Steps in units of the numbers themselves would take a small scale below zero."""
    x = scale * DATA
    flow = flows.Gaussian(2)
    flow.adapt(x)
    start = flow().log_prob(x).mean().item()
    optimizer = torch.optim.AdamW(flow.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (-flow().log_prob(x).mean()).backward()
        optimizer.step()
    assert flow().log_prob(x).mean().item() == pytest.approx(start, abs=0.05)


# States of other flows


def coupling(activation):
    def network(in_dim, out_dim, hidden_dims):
        return nn.Sequential(nn.Linear(in_dim, 8), activation, nn.Linear(8, out_dim))

    return Flow([Coupling(4, conditioner=network)])


def laplace(dim):
    return dist.Laplace(torch.zeros(dim), torch.ones(dim)).to_event(1)


def two_components(cls):
    weights, ones = dist.Categorical(torch.ones(2)), torch.ones(2, 2)
    return dist.MixtureSameFamily(weights, cls(torch.zeros(2, 2), ones).to_event(1))


def mixture(*kinds):
    return flows.Mixture([kind(2, num_layers=1) for kind in kinds], torch.zeros(len(kinds)))


NETWORKS = {
    flows.RealNVP: ("mlp", "scaled_mlp", "residual"),
    flows.MAF: ("made", "scaled_made", "residual", "causal_conv"),
}
SWAPS = {
    "family": (
        flows.MAF(3, 2),
        flows.NAF(3, 2),
        r"univariate of layer 0 \(inverse of Autoregressive\) is Affine.*Monotone",
    ),
    "direction": (flows.MAF(3), flows.IAF(3), "layer 0 is inverse of Autoregressive in the state and Autoregressive"),
    "inverse": (Flow([Autoregressive(3)]), Flow([Autoregressive(3).inv]), "layer 0 is Autoregressive in the state"),
    "kind of layer": (flows.Planar(3), flows.Radial(3), "layer 0 is Planar in the state and Radial in this flow"),
    "places of layers": (Flow([Planar(2), LU(2)]), Flow([LU(2), Planar(2)]), "layer 0 is Planar in the state and LU"),
    "number of layers": (flows.MAF(3, 2), flows.MAF(3, 3), "the number of layers is 2 in the state and 3 in"),
    "standardize": (Flow([LU(2)]), Flow([LU(2)], standardize=False), "the number of layers is 2 in the state and 1"),
    "dim": (flows.MAF(3), flows.MAF(4), r"event_shape is \[3\] in the state and \[4\] in this flow"),
    "context": (flows.MAF(3), flows.MAF(3, context_dim=2), r"context_shape is \[\] in the state and \[2\]"),
    "units of blocks": (
        flows.BNAF(3, hidden_dims=(8, 4)),
        flows.BNAF(3, hidden_dims=(8, 5)),
        r"hidden_dims of layer 0 \(inverse of BlockAutoregressive\) is \[8, 4\] in the state and \[8, 5\]",
    ),
    "order of blocks": (
        flows.BNAF(3, order=[0, 1, 2]),
        flows.BNAF(3, order=[0, 2, 1]),
        r"order of layer 0 .* is \[0, 1, 2\] in the state and \[0, 2, 1\]",
    ),
    "hidden widths": (
        flows.RealNVP(4),
        flows.RealNVP(4, hidden_dims=(8, 8)),
        r"hidden_dims .* is \[64, 64\] .* and \[8, 8\]",
    ),
    **{
        f"hidden widths of {name} in {recipe.__name__}": (
            recipe(4, conditioner=name, hidden_dims=(8, 8)),
            recipe(4, conditioner=name, hidden_dims=(8, 4)),
            r"hidden_dims of conditioner of layer 0 .* is \[8, 8\] in the state and \[8, 4\]",
        )
        for recipe, names in NETWORKS.items()
        for name in names
    },
    "support": (flows.MAF(3), flows.MAF(3, support=constraints.positive), "support is real in the state and positive"),
    "bounds of a support": (
        flows.MAF(3, support=constraints.interval(0, 1)),
        flows.MAF(3, support=constraints.interval(0, 2)),
        r"support is unit_interval in the state and Interval\(lower_bound=0, upper_bound=2\)",
    ),
    "columns of a support": (
        flows.MAF(2, support=constraints.cat([constraints.positive, constraints.real], dim=-1)),
        flows.MAF(2, support=constraints.cat([constraints.real, constraints.positive], dim=-1)),
        "0 of support is positive in the state and real",
    ),
    "mask": (
        Flow([Coupling(4)]),
        Flow([Coupling(4, mask=[True, False, True, False])]),
        r"mask of layer 0 \(Coupling\) is \[True, True, False, False\] in the state",
    ),
    "long mask": (
        Flow([Coupling(40)]),
        Flow([Coupling(40, mask=torch.arange(40) < 19)]),
        r"mask 19 of layer 0 \(Coupling\) is True in the state and False",
    ),
    "axis": (Flow([Coupling((2, 2))]), Flow([Coupling((2, 2), axis=1)]), "axis of layer 0 .* is -2 in the state"),
    "permutation": (
        Flow([Autoregressive(3), Permutation([0, 2, 1])]),
        Flow([Autoregressive(3), Permutation([1, 0, 2])]),
        r"permutation of layer 1 \(Permutation\) is \[0, 2, 1\] in the state and \[1, 0, 2\]",
    ),
    "order of factors": (
        Flow([LU(3, [0, 2, 1])]),
        Flow([LU(3)]),
        r"permutation of permutation of layer 0 \(LU\) is \[0, 2, 1\] in the state and \[0, 1, 2\]",
    ),
    "order": (
        Flow([Autoregressive(3)]),
        Flow([Autoregressive(3, order=[2, 1, 0])]),
        r"order of layer 0 \(Autoregressive\) is \[0, 1, 2\] in the state and \[2, 1, 0\]",
    ),
    "bound": (flows.NSF(3), flows.NSF(3, bound=3.0), r"Spline\(bins=8, bound=5.0\) .* Spline\(bins=8, bound=3.0\)"),
    "bins": (flows.NSF(3), flows.NSF(3, bins=4), r"Spline\(bins=8, bound=5.0\) .* Spline\(bins=4, bound=5.0\)"),
    "autoregressive": (flows.NSF(3), flows.NSF(3, autoregressive=True), "layer 0 is Coupling in the state and inverse"),
    "univariate of as many parameters": (
        Flow([Autoregressive(3, SOS(3, 1))]),
        Flow([Autoregressive(3, SOS(2, 2))]),
        r"SOS\(num_polynomials=3, degree=1, bound=3.0\) in the state and SOS\(num_polynomials=2, degree=2",
    ),
    "clamp": (
        Flow([Autoregressive(3, Affine(None, None))]),
        Flow([Autoregressive(3)]),
        r"Affine\(max_contraction=None, max_expansion=None\) in the state and Affine\(max_contraction=4.0",
    ),
    "volume": (flows.NICE(4), flows.RealNVP(4), "univariate of layer 0 .* is Additive in the state and Affine"),
    "kind of network": (flows.MAF(3), flows.MAF(3, conditioner="scaled_made"), "MADE in the state and ScaledMADE"),
    "residual network": (
        flows.RealNVP(4),
        flows.RealNVP(4, conditioner="residual"),
        "MLP in the state and ResidualMLP",
    ),
    "activation": (coupling(nn.Tanh()), coupling(nn.ReLU()), "1 of conditioner of layer 0 .* is Tanh in the state"),
    "option of an activation": (coupling(nn.LeakyReLU(0.1)), coupling(nn.LeakyReLU(0.2)), "slope=0.1.*slope=0.2"),
    "mixing": (flows.MAF(3), flows.MAF(3, mixing="lu"), "layer 1 is inverse of Autoregressive in the state and LU"),
    "rank": (flows.Sylvester(3), flows.Sylvester(3, rank=2), "rank of layer 0 .* is 3 in the state and 2"),
    "base": (flows.MAF(3), flows.MAF(3, base=laplace(3)), "base is Normal in the state and Laplace in this flow"),
    "trained base": (flows.MAF(3), flows.MAF(3, base="student_t"), "base is Normal in the state and StudentT"),
    "part of a base": (
        Flow([LU(2)], base=two_components(dist.Normal)),
        Flow([LU(2)], base=two_components(dist.Laplace)),
        "component_distribution of base is Normal in the state and Laplace",
    ),
    "torch transform": (
        Flow([LU(2), torch_transforms.AffineTransform(1.0, 2.0)]),
        Flow([LU(2), torch_transforms.AffineTransform(1.0, 3.0)]),
        r"layer 1 \(Foreign\) is AffineTransform\(loc=1.0, scale=2.0\) in the state and AffineTransform",
    ),
    "direction of a torch transform": (
        Flow([LU(2), torch_transforms.ExpTransform(), torch_transforms.ExpTransform().inv]),
        Flow([LU(2), torch_transforms.ExpTransform(), torch_transforms.SoftplusTransform().inv]),
        "ExpTransform in the state and SoftplusTransform",
    ),
    "component": (
        mixture(flows.MAF, flows.MAF),
        mixture(flows.MAF, flows.NAF),
        r"univariate of layer 0 \(inverse of Autoregressive\) of component 1 is Affine",
    ),
    "number of components": (
        mixture(flows.MAF, flows.MAF),
        mixture(flows.MAF, flows.MAF, flows.MAF),
        "the number of components is 2 in the state and 3",
    ),
    "mixture": (mixture(flows.MAF), flows.MAF(2), "the kind of flow is Mixture in the state and Flow in this flow"),
    "widths in a component": (
        flows.Mixture([flows.MAF(2), flows.NSF(2)]),
        flows.Mixture([flows.MAF(2), flows.NSF(2, hidden_dims=(8,))]),
        r"hidden_dims of conditioner of layer 0 \(Coupling\) of component 1 is \[64, 64\] in the state and \[8\]",
    ),
    "layers in a component": (
        flows.Mixture([flows.MAF(2, 2)]),
        flows.Mixture([flows.MAF(2, 3)]),
        "the number of layers of component 0 is 2 in the state and 3",
    ),
    "component of a base": (
        Flow([LU(2)], base=mixture(flows.MAF)),
        Flow([LU(2)], base=mixture(flows.NAF)),
        "of component 0 of base is Affine",
    ),
    "layers that mix": (
        flows.NSF(3, 2, mixing="lu", autoregressive=True),
        flows.NSF(3, 4, mixing="lu", autoregressive=True),
        "the number of layers is 2 in the state and 4",
    ),
}
all_swaps = pytest.mark.parametrize("swap", SWAPS)


@all_swaps
def test_the_state_of_another_flow_is_refused_before_a_value_changes(swap):
    flow, other, message = SWAPS[swap]
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match=message):
        other.load_state_dict(flow.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name])
    flow.load_state_dict(flow.state_dict())


@all_swaps
def test_facts_survive_copies_use_and_casts(swap):
    flow = SWAPS[swap][0]
    facts = facts_of(flow)
    context = [torch.zeros(flow.context_shape)] if flow.context_dim else []
    flow(*context).log_prob(flow(*context).sample((3,)))
    for other in (flow, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), copy.deepcopy(flow).double()):
        assert facts_of(other) == facts


def nested(flow):
    return nn.ModuleDict({"features": nn.Linear(2, 2), "density": flow})


def in_a_program(flow):
    class Program(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = flow

    return Program()


@pytest.mark.parametrize("owner", [nested, in_a_program])
def test_the_state_of_a_module_around_another_flow_is_refused(owner):
    with pytest.raises(StateError, match=r"bound=5.0\) in the state and Spline\(bins=8, bound=3.0\)"):
        owner(make(bound=3.0)).load_state_dict(owner(make()).state_dict())
    fresh, flow = make(), fitted(make())
    owner(fresh).load_state_dict(owner(flow).state_dict())
    assert_same_law(fresh, flow)


def test_a_pyro_module_made_of_a_flow_takes_its_state():
    flow, program = fitted(make()), in_a_program(make())
    to_pyro_module_(program)
    program.flow.load_state_dict(flow.state_dict())
    assert_same_law(program.flow, flow)
    make().load_state_dict(program.flow.state_dict())


def test_a_guide_refuses_the_state_of_another_flow():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = AutoFlow(model, lambda dim: flows.NSF(dim, num_layers=1))
    other = AutoFlow(model, lambda dim: flows.NSF(dim, num_layers=1, bound=3.0))
    guide(), other()
    with pytest.raises(StateError, match="bound=5.0"):
        other.load_state_dict(guide.state_dict())


def test_a_state_without_facts_is_taken_as_it_is():
    flow, fresh = fitted(make()), make()
    state = flow.state_dict()
    del state["_extra_state"]
    fresh.load_state_dict(state)
    assert_same_law(fresh, flow)


def test_facts_survive_averages_casts_and_files_of_states(tmp_path):
    flow, fresh = fitted(make()), make()
    state = flow.state_dict()
    fresh.load_state_dict({name: (value + value + value) / 3 for name, value in state.items()})
    fresh.load_state_dict({name: value.half() for name, value in state.items()})
    save_file(state, tmp_path / "state")
    fresh.load_state_dict(load_file(tmp_path / "state"))
    torch.save(state, tmp_path / "state")
    fresh.load_state_dict(torch.load(tmp_path / "state"))
    assert_same_law(fresh, flow)


def test_facts_that_cannot_be_read_are_an_error():
    state = make().state_dict()
    state["_extra_state"] = torch.zeros_like(state["_extra_state"])
    with pytest.raises(StateError, match="_extra_state cannot be read"):
        make().load_state_dict(state)


def test_what_another_version_does_not_know_is_no_difference():
    saved, own = facts_of(Triangular(2)), facts_of(Triangular(2))
    saved["of_a_newer_version"] = 1
    own["of_an_older_version"] = 2
    require_same(saved, own)


def test_options_of_modules_of_the_users_do_not_count():
    """They may count calls, for example."""

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    def make_flow():
        return Flow([Coupling(4, conditioner=lambda in_dim, out_dim, _: Counting(in_dim, out_dim))])

    flow = make_flow()
    flow().sample((3,))
    make_flow().load_state_dict(flow.state_dict())

"""Flows in files: what is written, and files that are no flows."""

import json
import os
import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms as pyro_transforms
from pyro.nn.module import to_pyro_module_
from safetensors.torch import save_file
from torch import nn
from torch.distributions import constraints
from torch.distributions import transforms as torch_transforms

import pyroflows as pf
from pyroflows import CheckpointError, Flow, OptionError, StateError, flows, load_flow
from pyroflows.archive import write_archive
from pyroflows.flows.encoding import FORMAT, encode
from pyroflows.transforms import LU, Autoregressive, Compose, Coupling, Planar, Radial, Triangular
from pyroflows.transforms.univariate import SOS, Affine, Monotone, Spline

ZEROS, ONES = torch.zeros(2), torch.ones(2)


def perturbed(flow):
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow


def shared_layer():
    layer = Planar(2)
    return Flow([layer, Radial(2), layer])


def network(in_dim, out_dim, hidden_dims):
    return nn.Sequential(nn.Linear(in_dim, 8), nn.LeakyReLU(0.2), nn.Linear(8, out_dim))


def recipe(name, options):
    """Two layers show as much as sixteen."""
    return getattr(flows, name)(3, **({} if name == "Gaussian" else {"num_layers": 2}), **options)


RECIPES = {
    f"{name}, {options}": lambda name=name, options=options: recipe(name, options)
    for name in (
        "BNAF",
        "Gaussian",
        "IAF",
        "MAF",
        "NAF",
        "NICE",
        "NSF",
        "Planar",
        "Radial",
        "RealNVP",
        "SOS",
        "Sylvester",
    )
    for options in (
        {},
        {"context_dim": 2},
        {"support": constraints.interval(-1.0, 2.0), "base": "student_t"},
        *([{"mixing": "lu"}, {"mixing": "permutation"}] if name != "Gaussian" else []),
    )
}
STACKS = {
    "inverse": lambda: Flow([Planar(2).inv, Compose([Radial(2), LU(2, [1, 0])]).inv]),
    "tensors of a layer": lambda: Flow([Triangular(2, loc=ONES, scale_tril=2 * torch.eye(2))]),
    "conditioned": lambda: Flow([Planar(2, context_dim=3).condition(torch.randn(3))]),
    "remembering": lambda: Flow([Planar(2).with_cache()]),
    "shared layer": shared_layer,
    "options of maps": lambda: Flow(
        [
            Autoregressive(3, univariate, order=[2, 0, 1])
            for univariate in (Spline(4, 3.0), SOS(3, 1), Monotone(4), Affine(None, None))
        ]
    ),
    "networks": lambda: Flow(
        [Coupling(3, conditioner=name) for name in ("mlp", "scaled_mlp", "residual")]
        + [Autoregressive(3, conditioner=name) for name in ("made", "scaled_made", "residual", "causal_conv")]
    ),
    "arrays": lambda: Flow([Coupling((4, 2, 2)), Coupling((4, 2, 2), axis=1)]),
    "sequences": lambda: Flow([Autoregressive((2, 6), conditioner="causal_conv", hidden_dims=[8], context_dim=(1, 6))]),
    "network of torch's modules": lambda: Flow([Coupling(4, conditioner=network)]),
    "mixture": lambda: flows.Mixture([flows.MAF(2), flows.NSF(2)], torch.tensor([0.0, 1.0])),
    "no standardisation": lambda: Flow([Planar(2)], standardize=False),
}
SUPPORTS = {
    "positive": constraints.positive,
    "greater than": constraints.greater_than(torch.tensor([1.0, 2.0])),
    "interval": constraints.interval(ZEROS, torch.tensor([1.0, 2.0])),
    "cat": constraints.cat([constraints.positive, constraints.interval(0.0, 3.0)], dim=-1),
    "ordered": dist.constraints.ordered_vector,
}
TRANSFORMS = {
    "exp": torch_transforms.ExpTransform(),
    "affine": torch_transforms.AffineTransform(ZEROS, 2 * ONES),
    "inverse": torch_transforms.AffineTransform(1.0, 2.0).inv,
    "composed": torch_transforms.ComposeTransform([torch_transforms.TanhTransform(), torch_transforms.ExpTransform()]),
    "cdf": torch_transforms.CumulativeDistributionTransform(dist.Normal(0.0, 1.0)),
    "stack": torch_transforms.StackTransform([torch_transforms.ExpTransform(), torch_transforms.TanhTransform()], -1),
    "reshape": torch_transforms.ReshapeTransform((2,), (2, 1)),
    "pyro's autoregressive": pyro_transforms.affine_autoregressive(2),
    "pyro's inverse": pyro_transforms.spline_autoregressive(2).inv,
    "pyro's spline": pyro_transforms.spline(2),
    "pyro's coupling": pyro_transforms.affine_coupling(2),
}
BASES = {
    "Normal": dist.Normal(ZEROS, ONES),
    "expanded": dist.Normal(0.0, 1.0).expand([2]),
    "Gumbel": dist.Gumbel(ZEROS, ONES),
    "Weibull": dist.Weibull(ONES, ONES),
    "Pareto": dist.Pareto(ONES, ONES),
    "LogNormal": dist.LogNormal(ZEROS, ONES),
    "Uniform": dist.Uniform(ZEROS, ONES),
    "Gamma": dist.Gamma(ONES, ONES),
    "StudentT": dist.StudentT(3.0, ZEROS, ONES),
    "VonMises": dist.VonMises(ZEROS, ONES),
    "MultivariateNormal": dist.MultivariateNormal(ZEROS, precision_matrix=2 * torch.eye(2)),
    "LowRankMultivariateNormal": dist.LowRankMultivariateNormal(ZEROS, torch.ones(2, 1), ONES),
    "Dirichlet": dist.Dirichlet(ONES),
    "mixture": dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Normal(torch.randn(3, 2), 1.0).to_event(1)),
    "Pyro's mixture": dist.MixtureOfDiagNormals(torch.randn(3, 2), torch.ones(3, 2), torch.zeros(3)),
    "MultivariateStudentT": dist.MultivariateStudentT(torch.tensor(4.0), ZEROS, torch.eye(2)),
    "parameter": dist.Normal(nn.Parameter(torch.zeros(2)), ONES),
    "flow": flows.MAF(2),
}


def with_base(base):
    return Flow([LU(2)], base=base if base.event_shape else base.to_event(1))


FLOWS = {
    **{f"recipe {name}": make for name, make in RECIPES.items()},
    **{f"stack {name}": make for name, make in STACKS.items()},
    **{f"support {name}": lambda value=value: flows.MAF(2, support=value) for name, value in SUPPORTS.items()},
    **{f"transform {name}": lambda value=value: Flow([LU(2), value]) for name, value in TRANSFORMS.items()},
    **{f"base {name}": lambda value=value: with_base(value) for name, value in BASES.items()},
}


def assert_same(flow, other):
    context = [torch.full(flow.context_shape, 0.5)] if flow.context_dim else []
    samples = []
    for q in (flow(*context), other(*context)):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            samples.append(q.sample((4,)))
        samples.append(q.log_prob(samples[0]))
    x, log_q, others_x, others_log_q = samples
    assert torch.equal(x, others_x)
    torch.testing.assert_close(log_q, others_log_q, rtol=0, atol=0, equal_nan=True)
    assert repr(flow) == repr(other)
    assert [(n, p.requires_grad) for n, p in flow.named_parameters()] == [
        (n, p.requires_grad) for n, p in other.named_parameters()
    ]
    assert list(flow.state_dict()) == list(other.state_dict())
    other.load_state_dict(flow.state_dict())


@pytest.mark.parametrize("name", FLOWS)
def test_a_loaded_flow_is_bit_equal(name, tmp_path):
    flow, path = perturbed(FLOWS[name]()), tmp_path / "flow"
    random_state = torch.random.get_rng_state()
    flow.save(path)
    loaded = load_flow(path)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert_same(flow, loaded)
    loaded.save(path)  # after use, when inverses of transforms and the like are remembered
    assert_same(flow, load_flow(path))


def test_a_trained_flow_in_float64_with_frozen_parameters(tmp_path):
    x = 20 + 5 * torch.randn(200, 2, dtype=torch.float64)
    flow = flows.NSF(2, num_layers=2, hidden_dims=(8,), bound=3.0).double()
    pf.fit_density(flow, x, max_epochs=2, seed=0, progress_bar=False)
    flow.transform.layers[0].requires_grad_(False)
    flow.eval().save(tmp_path / "flow")
    loaded = load_flow(str(tmp_path / "flow"))
    assert_same(flow, loaded)
    assert loaded.is_adapted and not loaded.training
    pf.fit_density(loaded, x, max_epochs=1, seed=0, progress_bar=False)


def test_a_loaded_flow_knows_what_state_fits(tmp_path):
    flows.NSF(2).save(tmp_path / "flow")
    load_flow(tmp_path / "flow").load_state_dict(flows.NSF(2).state_dict())
    with pytest.raises(StateError, match=r"bound=3.0\) in the state"):
        load_flow(tmp_path / "flow").load_state_dict(flows.NSF(2, bound=3.0).state_dict())


def test_saving_leaves_one_complete_file(tmp_path):
    path = tmp_path / "flow"
    path.write_text("something older")
    flows.Gaussian(2).save(path)
    assert os.listdir(tmp_path) == ["flow"]
    load_flow(path)


# What cannot be saved


class OwnLayer(Planar):
    pass


class OwnBase(nn.Module):
    def forward(self):
        return dist.Normal(ZEROS, ONES).to_event(1)


class OwnMap(Affine):
    pass


def with_a_hook():
    flow = Flow([LU(2)])
    flow.transform.register_forward_hook(lambda *_: None)
    return flow


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Flow([LU(2), OwnLayer(2)]), r"transform.layers.1 is a OwnLayer.*save flow.state_dict\(\)"),
        (lambda: Flow([LU(2)], base=OwnBase()), "base is a OwnBase"),
        (lambda: Flow([Autoregressive(2, OwnMap())]), "transform.layers.0.univariate is a OwnMap"),
        (lambda: to_pyro_module_(flow := Flow([LU(2)])) or flow, "this flow is a Flow turned into a PyroModule"),
        (with_a_hook, "transform has hooks"),
    ],
    ids=["layer", "base", "map", "pyro module", "hook"],
)
def test_what_no_file_can_rebuild_is_an_error_that_names_the_place(make, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        make().save(tmp_path / "flow")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("place", ["folder/flow", "."])
def test_a_path_that_cannot_be_written_is_an_error(place, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        flows.Gaussian(2).save(tmp_path / place)


# Files that are no flows


@pytest.fixture
def saved(tmp_path):
    flows.NSF(2, num_layers=1, hidden_dims=(4,)).save(tmp_path / "flow")
    return (tmp_path / "flow").read_bytes()


def refused(contents, tmp_path):
    (tmp_path / "altered").write_bytes(contents)
    with pytest.raises(CheckpointError, match=str(tmp_path / "altered")) as caught:
        load_flow(tmp_path / "altered")
    return "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(20))
def test_an_altered_or_truncated_file_is_refused(seed, saved, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    place, bit = (int(torch.randint(high, (), generator=generator)) for high in (len(saved), 8))
    altered = bytearray(saved)
    altered[place] ^= 1 << bit
    assert refused(bytes(altered), tmp_path)
    assert refused(saved[:place], tmp_path)


@pytest.mark.parametrize("contents", [b"", b"text", pickle.dumps({"a": 1})])
def test_a_foreign_file_is_refused(contents, tmp_path):
    assert refused(contents, tmp_path)


def test_a_state_in_safetensors_is_no_flow(tmp_path):
    save_file(flows.Gaussian(2).state_dict(), tmp_path / "state")
    with pytest.raises(CheckpointError, match="holds no flow of pyroflows"):
        load_flow(tmp_path / "state")


def test_a_missing_file_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="there is no file"):
            load_flow(path)


def crafted(code, tmp_path, tensors=None, number=FORMAT, kind="flow"):
    """A file whose checksum is right."""
    write_archive(tmp_path / "flow", kind, number, code, tensors or {})
    return tmp_path / "flow"


def test_a_file_of_another_kind_or_a_newer_format_is_refused(tmp_path):
    code, tensors = encode(flows.Gaussian(2))
    with pytest.raises(CheckpointError, match="holds no flow of pyroflows: it holds a posterior"):
        load_flow(crafted({"flow": code}, tmp_path, tensors, kind="posterior"))
    with pytest.raises(CheckpointError, match=f"has format {FORMAT + 1} of version .*reads format {FORMAT}: install"):
        load_flow(crafted({"flow": code}, tmp_path, tensors, number=FORMAT + 1))


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "subprocess:Popen",
        "torch.nn.modules.module:torch.os",
        "pyroflows.inference.files:load",
        "torch.nn.modules.linear:NoSuchClass",
        "no.such.package:Class",
    ],
)
def test_a_file_names_classes_of_flows_only(name, tmp_path):
    with pytest.raises(CheckpointError, match="no class .* that a flow could hold"):
        load_flow(crafted({"flow": {"class": name, "has": {}}}, tmp_path))


def nested_lists(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "code",
    [
        {},
        {"flow": 1},
        {"flow": {"same": 3}},
        {"flow": {"class": "pyroflows.flows.flow:Flow", "has": []}},
        {"flow": {"class": "torch.distributions.normal:Normal", "has": {}}},
        {"flow": encode(flows.Gaussian(2))[0]},
        {"flow": nested_lists(600)},
    ],
    ids=["nothing", "number", "reference", "no attributes", "no flow", "no tensors", "too deep"],
)
def test_a_file_that_makes_no_flow_is_refused(code, tmp_path):
    with pytest.raises(CheckpointError):
        load_flow(crafted(code, tmp_path))


def test_the_code_is_plain_json():
    code, _ = encode(flows.NSF(2))
    assert json.loads(json.dumps(code, allow_nan=False)) == code

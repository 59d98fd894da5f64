"""All tensors that a flow holds move, cast, load and copy with it, whichever torch or Pyro object brought them."""

import copy
import inspect
import io
import pickle
import warnings

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn
from torch.distributions import Distribution, constraints, transforms
from torch.distributions.utils import lazy_property
from torch.func import functional_call

import pyroflows as pf
from pyroflows.training.objective import trained_parameters
from pyroflows.transforms.held import Held
from tests.flows.distributions import EXAMPLES, NO_BASE, SUPPORTS, WITHOUT_EXAMPLE, chol, normal, v

HERE, THERE = 0.5, 0.7

LAYERS = {
    "affine": lambda t: transforms.AffineTransform(v(t), v(t)),
    "inverse": lambda t: transforms.AffineTransform(v(t), v(t)).inv,
    "compose": lambda t: transforms.ComposeTransform([transforms.ExpTransform(), transforms.PowerTransform(v(t))]),
    "inverse of compose": lambda t: (
        transforms.ComposeTransform([transforms.AffineTransform(v(t), v(t)), transforms.ExpTransform()]).inv
    ),
    "independent": lambda t: transforms.IndependentTransform(transforms.AffineTransform(v(t), 2.0), 1),
    "cat": lambda t: transforms.CatTransform(
        [transforms.AffineTransform(torch.tensor([t]), 1.0), transforms.ExpTransform()], lengths=[1, 1], dim=-1
    ),
    "stack": lambda t: transforms.StackTransform(
        [transforms.AffineTransform(torch.tensor(t), 1.0), transforms.ExpTransform()], dim=-1
    ),
    "by a distribution": lambda t: transforms.CumulativeDistributionTransform(dist.Gumbel(v(t), v(t))),
    "lower triangular": lambda t: pyro.distributions.transforms.LowerCholeskyAffine(v(t), chol(t)),
}


def outcome(law, shape=(3,)):
    """Return draws and log-densities from a fixed seed, or what torch says where the law has none of them."""
    torch.manual_seed(0)
    results = []
    try:
        results.append(law.sample(shape))
        results.append(law.log_prob(results[0]))
        results.append(law.support.check(results[0]))
        results.append(law.cdf(results[0]))
    except (NotImplementedError, ValueError, AssertionError, RuntimeError) as error:
        results.append(f"{type(error).__name__}: {error}"[:40])
    return results


def compute_lazy_properties(law):
    for name in dir(type(law)):
        if isinstance(getattr(type(law), name, None), lazy_property):
            getattr(law, name)


def tensors_in(value, seen=None):
    """Yield all tensors that can be reached from an object."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and id(value) not in seen:
        seen.add(id(value))
        yield from tensors_in(list(vars(value).values()), seen)


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(torch.nan_to_num(p), torch.nan_to_num(q)) if isinstance(p, torch.Tensor) else p == q
        for p, q in zip(a, b, strict=True)
    )


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_distribution_has_an_example():
    names = {
        name
        for package in (dist, torch.distributions)
        for name in package.__all__
        if inspect.isclass(getattr(package, name, None)) and issubclass(getattr(package, name), Distribution)
    }
    assert names == {name.split(" ")[0] for name in EXAMPLES} | WITHOUT_EXAMPLE


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_held_distribution_is_the_one_whose_tensors_it_has(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two Pyro distributions, that they are slow or experimental
        here, there = EXAMPLES[name](HERE), EXAMPLES[name](THERE)
        expected, other = outcome(there), outcome(here)
        compute_lazy_properties(there)
        given = [(tensor, tensor.clone()) for tensor in tensors_in(here)]
        held, source = Held(here), Held(there)

        assert same(outcome(held()), other)
        held.load_state_dict(saved(source))
        for law in (held(), copy.deepcopy(source)(), pickled(source)(), functional_call(Held(here), saved(source), ())):
            assert same(outcome(law), expected)

        assert all(tensor.device.type == "meta" for tensor in tensors_in(Held(there).to("meta")()))
        wide = outcome(held.double()())
        assert isinstance(wide[-1], str) or wide[1].dtype == torch.float64
        # The distributions that were given are as they were.
        assert [id(t) for t in tensors_in(here)] == [id(t) for t, _ in given]
        assert all(torch.equal(torch.nan_to_num(t), torch.nan_to_num(kept)) for t, kept in given)


def check_that_a_state_decides(make):
    """Check flows that ``make(t)`` makes: all that they hold moves, casts, loads and copies."""
    source = make(THERE)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
    expected = outcome(source())
    assert isinstance(expected[1], torch.Tensor) and not same(outcome(make(HERE)()), expected)
    loaded = make(HERE)
    loaded.load_state_dict(saved(source))
    for flow in (loaded, copy.deepcopy(source), pickled(source)):
        assert same(outcome(flow()), expected)
    there = copy.deepcopy(source).to("meta")
    assert all(t.device.type == "meta" for t in [*tensors_in(there.base()), *tensors_in(there().support)])
    with pyro.validation_enabled(False):  # which would read values
        assert there.transform(torch.zeros(1, *source.base_shape, device="meta")).device.type == "meta"
    wide = source.double()()
    x = wide.sample((3,))
    assert (x.dtype, wide.log_prob(x).dtype) == (torch.float64, torch.float64)


@pytest.mark.filterwarnings("ignore:Singular sample detected")  # torch's Wishart says so of every sample
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in NO_BASE])
def test_all_tensors_of_a_base_move_and_load(name):
    def make(t):
        base = EXAMPLES[name](t)
        base = base.to_event(len(base.batch_shape))
        return pf.Flow([pf.transforms.Elementwise(base.event_shape, "affine")], base=base)

    check_that_a_state_decides(make)


@pytest.mark.parametrize("name", LAYERS)
def test_all_tensors_of_a_torch_transform_move_and_load(name):
    def make(t):
        layers = [pf.transforms.Elementwise(2, "affine"), LAYERS[name](t)]
        return pf.Flow(layers, base=dist.Uniform(torch.zeros(2), torch.ones(2)).to_event(1), standardize=False)

    check_that_a_state_decides(make)


@pytest.mark.parametrize("name", SUPPORTS)
def test_all_bounds_of_a_support_move_and_load(name):
    def make(t):
        return pf.flows.MAF(2, num_layers=1, hidden_dims=(4,), support=SUPPORTS[name](t))

    check_that_a_state_decides(make)


def test_parameters_in_the_transforms_of_base_and_layers_are_trained():
    loc, scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    base = dist.TransformedDistribution(normal(HERE), transforms.AffineTransform(loc, 1.0)).to_event(1)
    flow = pf.Flow([transforms.AffineTransform(0.0, scale)], base=base)
    assert {id(p) for p in trained_parameters(flow)} == {id(loc), id(scale)}
    pf.fit_density(flow, 3 + 2 * torch.randn(500, 2), max_epochs=1, seed=0, progress_bar=False)
    assert (loc != 0).all() and (scale != 1).all()


def test_a_learning_transform_of_pyro_inside_another_one_is_trained():
    spline = pyro.distributions.transforms.Spline(2, count_bins=4)
    flow = pf.Flow([transforms.ComposeTransform([spline, transforms.AffineTransform(v(HERE), 2.0)]).inv], normal_base())
    assert set(map(id, spline.parameters())) <= set(map(id, flow.parameters()))
    x = flow().sample((5,))
    flow().log_prob(x).sum().backward()
    assert all(p.grad is not None for p in spline.parameters())
    assert same(outcome(copy.deepcopy(flow)()), outcome(flow()))


def normal_base():
    return dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)


def test_a_tensor_that_is_computed_from_parameters_is_refused():
    computed = 2 * torch.ones(2, requires_grad=True)
    with pytest.raises(pf.OptionError, match="loc of AffineTransform requires gradients but is no nn.Parameter"):
        pf.Flow([transforms.AffineTransform(computed, 1.0)], base=normal_base())
    with pytest.raises(pf.OptionError, match="scale of Normal requires gradients"):
        pf.Flow([pf.transforms.Elementwise(2)], base=dist.Normal(torch.zeros(2), computed).to_event(1))


def test_the_law_of_a_flow_is_no_base():
    with pytest.raises(pf.OptionError, match="give the flow itself, base=flow"):
        pf.Flow([pf.transforms.Elementwise(2)], base=pf.flows.MAF(2)())


def test_a_transform_with_a_cache_does_not_return_values_of_another_state():
    base = dist.TransformedDistribution(
        normal(HERE).to_event(1), transforms.AffineTransform(v(HERE), v(HERE)).with_cache()
    )
    flow = pf.Flow([pf.transforms.Elementwise(2)], base=base)
    x = flow.base().sample((3,))
    other = copy.deepcopy(flow)
    flow.base.transforms.get_buffer("0.loc").add_(1.0)
    assert torch.allclose(flow.base().log_prob(x + 1), other.base().log_prob(x), atol=1e-5)


def test_a_flow_in_half_precision_samples_and_scores():
    flow = pf.flows.MAF(2, support=constraints.interval(v(HERE), 1 + v(HERE))).bfloat16()
    x = flow().sample((3,))
    assert x.dtype == torch.bfloat16 and flow().log_prob(x).dtype == torch.bfloat16

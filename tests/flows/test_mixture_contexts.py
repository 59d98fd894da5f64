"""Mixtures of flows whose components or weights depend on a context, and their weights as parameters."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn.module import to_pyro_module_
from torch.distributions import constraints
from torch.func import functional_call

from pyroflows.errors import ShapeError
from pyroflows.flows import NSF, Flow, Mixture
from pyroflows.transforms import Elementwise, Triangular
from tests.transforms.registry import perturb

pyro.enable_validation()  # the default, which other packages change at their import

DOUBLE = {"dtype": torch.float64}


def gaussian(loc, scale, context_dim=0):
    """A flow whose law is normal, of two dimensions, if its context does not matter yet."""
    init = torch.tensor([[loc, math.log(scale)]] * 2)
    return Flow([Elementwise(2, init=init, context_dim=context_dim)], standardize=False).double()


def conditional(context_dim=None, **options):
    """One component and the weights depend on three numbers, another component does not."""
    flows = [gaussian(-2.0, 1.0, context_dim=3), gaussian(3.0, 0.5)]
    return perturb(Mixture(flows, context_dim=context_dim, **options), 0.3)


def by_hand(mixture, context, x):
    parts = [flow(context if flow.context_dim else None).log_prob(x) for flow in mixture.components]
    return (torch.stack(parts, -1) + mixture.gate(context)).logsumexp(-1)


def test_weights_start_as_given_and_depend_on_the_context_later():
    log_weights = torch.tensor([0.2, 0.8]).log()
    mixture = Mixture([NSF(2, context_dim=3), NSF(2)], log_weights)
    contexts = torch.randn(5, 3)
    torch.testing.assert_close(mixture.gate(contexts), log_weights.expand(5, 2))
    weights = perturb(mixture, 0.5).gate(contexts).exp()
    assert weights.std(0).min() > 0.01
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))


@pytest.mark.parametrize("batch", [(), (6,), (4, 6)])
def test_densities_and_shapes(batch):
    mixture, context = conditional(), torch.randn(*batch, 3, **DOUBLE)
    assert (mixture.context_dim, mixture.context_shape) == (3, (3,))
    q = mixture(context)
    assert (q.batch_shape, q.event_shape) == (batch, (2,))
    x, log_q = q.rsample_and_log_prob((7,))
    assert x.shape == (7, *batch, 2) and log_q.shape == (7, *batch)
    torch.testing.assert_close(log_q, by_hand(mixture, context, x))
    torch.testing.assert_close(q.log_prob(x[0]), log_q[0])
    wide = q.expand((2, *batch))
    assert wide.sample().shape == (2, *batch, 2) and wide.log_prob(x[0]).shape == (2, *batch)


def test_density_integrates_to_one_at_each_context():
    mixture, contexts = conditional(), torch.randn(3, 3, **DOUBLE)
    axis = torch.linspace(-12, 12, 241, **DOUBLE)
    grid = torch.cartesian_prod(axis, axis)
    masses = mixture(contexts).log_prob(grid[:, None]).exp().sum(0) * 0.1**2
    torch.testing.assert_close(masses, torch.ones(3, **DOUBLE), rtol=0, atol=1e-3)


def test_draws_have_the_moments_at_each_context():
    torch.manual_seed(0)
    mixture, contexts, n = conditional(), torch.randn(3, 3, **DOUBLE), 20_000
    with torch.no_grad():
        x = mixture(contexts).sample((n,))
        weights = mixture.gate(contexts).exp()
        theta = mixture.components[0].layers[0].parameters_of(contexts)
        locs = torch.stack([theta[..., 0], mixture.components[1].layers[0].parameters_of.value[:, 0].expand(3, 2)], 1)
        draws = [mixture.components[0](contexts).sample((n,)), mixture.components[1]().sample((n, 3))]
    second = sum(w[:, None] * (part**2).mean(0) for w, part in zip(weights.T, draws, strict=True))
    mean = (weights[..., None] * locs).sum(1)
    error = 5 * x.std(0) / math.sqrt(n)
    assert ((x.mean(0) - mean).abs() < error).all()
    assert (((x**2).mean(0) - second).abs() < 8 * (x**2).std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize(
    ("flows", "context_dim", "of_weights"),
    [
        (lambda: [gaussian(0.0, 1.0), gaussian(1.0, 1.0)], 2, True),
        (lambda: [gaussian(0.0, 1.0, context_dim=2), gaussian(1.0, 1.0)], 0, False),
        (lambda: [gaussian(0.0, 1.0, context_dim=2), gaussian(1.0, 1.0)], 2, True),
        (lambda: [Mixture([gaussian(0.0, 1.0)], context_dim=2), gaussian(1.0, 1.0)], None, True),
    ],
    ids=["weights alone", "components alone", "both", "nested"],
)
def test_what_depends_on_the_context(flows, context_dim, of_weights):
    mixture = perturb(Mixture(flows(), context_dim=context_dim), 0.3)
    assert mixture.context_dim == 2 and (mixture.gate.net is not None) == of_weights
    context, x = torch.randn(5, 2, **DOUBLE), torch.randn(5, 2, **DOUBLE)
    found = mixture(context).log_prob(x)
    torch.testing.assert_close(found, by_hand(mixture, context, x))
    assert mixture(context).sample((3,)).shape == (3, 5, 2)


def test_context_of_more_axes():
    mixture = perturb(Mixture([gaussian(0.0, 1.0), gaussian(4.0, 1.0)], context_dim=(2, 3)), 0.3)
    context = torch.randn(5, 2, 3, **DOUBLE)
    assert (mixture.context_dim, mixture.context_shape) == (6, (2, 3))
    assert mixture(context).sample((4,)).shape == (4, 5, 2)
    assert mixture(context).log_prob(torch.zeros(2, **DOUBLE)).shape == (5,)


def test_contexts_that_do_not_fit():
    with pytest.raises(ShapeError, match="has context size 3, but got none"):
        conditional()()
    with pytest.raises(ShapeError, match=r"has context size 3, but got shape \(5, 2\)"):
        conditional()(torch.zeros(5, 2))
    with pytest.raises(ShapeError, match="the weights of this mixture need a context of size 3"):
        conditional().gate()


def loaded(mixture):
    fresh = conditional()
    fresh.load_state_dict(mixture.state_dict())
    return fresh


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), loaded])
def test_copies(copied):
    mixture, context = conditional(), torch.randn(5, 3, **DOUBLE)
    mixture.adapt(torch.randn(50, 2, **DOUBLE), torch.randn(50, 3, **DOUBLE) + 100)
    x = mixture(context).sample()
    assert torch.equal(copied(mixture)(context).log_prob(x), mixture(context).log_prob(x))


# Gradients, and the tensors of a law


@pytest.mark.parametrize("support", [None, constraints.positive])
def test_gradients_are_exact(support):
    """Against finite differences, in each parameter, the context and the value."""
    flows = [
        Flow([Triangular(2), Elementwise(2, context_dim=1)], support=support).double(),
        Flow([Triangular(2)]).double(),
    ]
    mixture = perturb(Mixture(flows), 0.3)
    x = torch.tensor([[0.7, 1.2], [0.3, 0.4]], **DOUBLE, requires_grad=True)
    context = torch.randn(2, 1, **DOUBLE, requires_grad=True)
    inputs = [x, context, *mixture.parameters()]
    gradients = torch.autograd.grad(mixture(context).log_prob(x).sum(), inputs)
    for tensor, gradient in zip(inputs, gradients, strict=True):
        start, direction, values = tensor.detach().clone(), torch.randn_like(tensor), []
        for step in (1e-5, -1e-5, 0.0):
            with torch.no_grad():
                tensor.copy_(start + step * direction)
                values.append(mixture(context).log_prob(x).sum())
        expected = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((direction * gradient).sum(), expected, rtol=1e-5, atol=1e-7)


def test_a_law_is_differentiated_more_than_once():
    mixture, context = conditional(), torch.randn(5, 3, **DOUBLE)
    q, x = mixture(context), torch.zeros(2, **DOUBLE)
    for _ in range(2):
        mixture.zero_grad()
        q.log_prob(x).sum().backward()
    assert all((p.grad != 0).any() for p in mixture.gate.parameters())


def test_a_law_follows_its_weights_and_those_that_it_was_called_with():
    mixture, other, context = conditional(), conditional(), torch.randn(5, 3, **DOUBLE)
    q = mixture(context)
    given = functional_call(mixture, dict(other.named_parameters()), (context,))
    torch.testing.assert_close(given.log_weights(), other.gate(context))
    with torch.no_grad():
        mixture.gate.value.copy_(torch.tensor([0.0, 5.0]))
    torch.testing.assert_close(q.log_weights(), mixture.gate(context))


def test_weights_that_are_fixed():
    """They stay as given in :meth:`adapt` and in training, and the larger one belongs to the larger cluster."""
    x = torch.cat([torch.randn(300, 2), 50 + torch.randn(100, 2)])
    mixture = Mixture([NSF(2, num_layers=1), NSF(2, num_layers=1)], torch.tensor([0.1, 0.9]).log())
    mixture.gate.requires_grad_(False)
    mixture.adapt(x)
    torch.testing.assert_close(mixture.gate().exp(), torch.tensor([0.1, 0.9]))
    assert mixture.components[0].standardization.loc.min() > 40 and mixture.components[1].standardization.loc.max() < 1


@pytest.mark.parametrize("is_converted", [False, True])
def test_training_by_svi(is_converted):
    mixture = conditional()
    if is_converted:
        to_pyro_module_(mixture)
    context, x = torch.randn(50, 3, **DOUBLE), torch.randn(50, 2, **DOUBLE)

    def model():
        pyro.module("mixture", mixture)
        with pyro.plate("rows", 50):
            pyro.sample("x", mixture(context), obs=x)

    pyro.clear_param_store()
    before = copy.deepcopy(mixture.state_dict())
    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all((mixture.state_dict()[name] != before[name]).any() for name, _ in mixture.named_parameters())


def test_against_a_mixture_of_torch():
    """A mixture of normals, of equal weights at all contexts, has the log-density and the gradients of torch's."""
    locs = torch.tensor([-1.0, 2.0], **DOUBLE, requires_grad=True)
    mixture = Mixture([gaussian(-1.0, 1.0), gaussian(2.0, 1.0)])
    x = torch.randn(20, 2, **DOUBLE)
    parts = dist.Normal(locs[:, None].expand(2, 2), 1.0).to_event(1)
    expected = dist.MixtureSameFamily(dist.Categorical(torch.ones(2, **DOUBLE)), parts).log_prob(x)
    found = mixture().log_prob(x)
    torch.testing.assert_close(found, expected)
    (by_torch,) = torch.autograd.grad(expected.sum(), locs)
    values = [flow.layers[0].parameters_of.value for flow in mixture.components]
    gradients = torch.autograd.grad(found.sum(), values)
    torch.testing.assert_close(torch.stack([g[:, 0].sum() for g in gradients]), by_torch)

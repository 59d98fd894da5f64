"""Bases of categories that take a context, alone and in flows: it changes the probabilities, and not only the order."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from scipy.stats import chi2
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

import pyroflows as pf
from pyroflows import DataError, OptionError, ShapeError, StateError, flows
from pyroflows.nets.categories import by_passes
from pyroflows.transforms import DiscreteCoupling

from .categories import make, perturbed

LENGTH, SIZE = 3, 4


class ChainAt(nn.Module):
    """A base that no class of the library knows: a Markov chain of which the context is the first category's logits."""

    context_dim = 2

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(SIZE, LENGTH, SIZE))
        self.of_context = nn.Linear(2, SIZE)

    def forward(self, context):
        components = dist.Categorical(logits=self.logits).to_event(1).expand((*context.shape[:-1], SIZE))
        return dist.MixtureSameFamily(dist.Categorical(logits=self.of_context(context)), components)


LEARNED = {
    "factorized": lambda **options: flows.FactorizedCategorical(LENGTH, SIZE, hidden_dims=(8,), **options),
    "autoregressive": lambda **options: flows.AutoregressiveCategorical(LENGTH, SIZE, hidden_dims=(8,), **options),
    "groupwise": lambda **options: flows.GroupwiseCategorical(LENGTH, SIZE, 2, hidden_dims=(8, 8), **options),
}
BASES = {
    **{name: lambda make=make: make(context_dim=2) for name, make in LEARNED.items()},
    "module": ChainAt,
    "flow": lambda: make(base="autoregressive", length=LENGTH, num_categories=SIZE, context_dim=2),
    "mixture": lambda: flows.Mixture([make("coupling", context_dim=2), make("autoregressive")]),
}


@pytest.fixture(params=list(LEARNED))
def base(request):
    torch.manual_seed(1)
    return perturbed(LEARNED[request.param](context_dim=2))


@pytest.fixture(params=list(BASES))
def flow(request):
    """A flow whose layers take no context, but whose base does."""
    torch.manual_seed(1)
    return perturbed(flows.Flow([DiscreteCoupling(LENGTH, SIZE, hidden_dims=(8,))], BASES[request.param]()))


def probabilities(law):
    """The probabilities of all sequences, in descending order along the first axis."""
    with torch.no_grad():
        return law.log_prob(law.enumerate_support(expand=False)).exp().sort(0, descending=True).values


def assert_frequencies(draws, probs):
    """Test that draws ``(n, length)`` have the probabilities of all sequences, by Pearson's statistic."""
    counts = (draws.long() * SIZE ** torch.arange(LENGTH).flip(0)).sum(-1).bincount(minlength=len(probs)).double()
    expected = len(draws) * probs.double()
    is_rare = expected < 5
    counts = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]])
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).nan_to_num(0.0).sum().item()
    assert statistic < chi2.ppf(0.9995, len(counts) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_context_changes_the_probabilities(flow, dtype):
    flow, context = flow.to(dtype), 2 * torch.randn(7, 2, dtype=dtype)
    assert (flow.context_dim, flow.context_shape) == (2, (2,))
    q = flow(context)
    probs = probabilities(q)
    assert (probs.shape, probs.dtype) == ((SIZE**LENGTH, 7), dtype)
    torch.testing.assert_close(probs.sum(0), torch.ones(7, dtype=dtype))
    assert probs[0].std() > 0.01
    for i in range(7):
        torch.testing.assert_close(probabilities(flow(context[i])), probs[:, i])


def test_draws_follow_their_own_contexts(flow):
    context = torch.tensor([[[2.0, -2.0]], [[-2.0, 2.0]]])
    q = flow(context)
    draws = q.sample((4000,))
    assert draws.shape == (4000, 2, 1, LENGTH)
    with torch.no_grad():
        probs = q.log_prob(q.enumerate_support(expand=False)).exp()
    for i in range(2):
        assert_frequencies(draws[:, i, 0], probs[:, i, 0])


@pytest.mark.parametrize("batch", [(), (7,), (3, 2, 2), (0,)])
def test_batch_shapes_and_expansion(flow, batch):
    if isinstance(flow.base, ChainAt) and 0 in batch:
        pytest.skip("torch's mixture has no draws of no rows")
    q = flow(torch.randn(*batch, 2))
    assert (q.batch_shape, q.event_shape) == (batch, (LENGTH,))
    x = q.sample((5,))
    assert (x.shape, x.dtype) == ((5, *batch, LENGTH), torch.int64)
    log_q = q.log_prob(x)
    assert log_q.shape == (5, *batch)
    with torch.no_grad():  # integers, without gradients, have the same
        torch.testing.assert_close(q.log_prob(x), log_q.detach())
    wide = q.expand((5, *batch))
    torch.testing.assert_close(wide.log_prob(x), log_q)
    assert wide.log_prob(x[0]).shape == (5, *batch)
    assert wide.sample((2,)).shape == (2, 5, *batch, LENGTH)
    assert q.enumerate_support().shape == (64, *batch, LENGTH)
    back, log_p = q.transport(q.latent(x))
    assert torch.equal(back, x)
    torch.testing.assert_close(log_p, log_q)
    if batch and 0 not in batch:
        with pytest.raises((RuntimeError, ShapeError)):
            q.expand((*batch, 5))


@pytest.mark.parametrize("batch", [(), (7,), (3, 2), (0,)])
def test_a_base_alone(base, batch):
    law = base(torch.randn(*batch, 2))
    x = law.sample((5,)) if 0 not in batch else torch.zeros(5, *batch, LENGTH, dtype=torch.long)
    assert x.shape == (5, *batch, LENGTH)
    if 0 not in batch:
        assert law.log_prob(x).shape == (5, *batch)
        assert law.expand((5, *batch)).sample((2,)).shape == (2, 5, *batch, LENGTH)
        torch.testing.assert_close(law.expand((5, *batch)).log_prob(x), law.log_prob(x))
    assert base(torch.randn(*batch, 2).numpy()).batch_shape == batch


def test_draws_of_an_autoregressive_law_by_passes_are_those_by_steps():
    for name in ("autoregressive", "groupwise"):
        base = perturbed(LEARNED[name](context_dim=2))
        context, uniform = torch.randn(5, 2), torch.rand(5, LENGTH)
        at_uniform = lambda u, logits: (logits.softmax(-1).cumsum(-1)[..., :-1] <= u[..., None]).sum(-1)  # noqa: E731
        steps = base.net.by_place(uniform, context, at_uniform)
        assert torch.equal(by_passes(base.net, LENGTH, uniform, context, at_uniform), steps)


def test_contexts_of_another_shape(base):
    with pytest.raises(ShapeError, match="Categorical has context size 2, but got none"):
        base()
    with pytest.raises(ShapeError, match="Categorical has context size 2, but got shape"):
        base(torch.zeros(5, 3))
    with pytest.raises(DataError, match="context has NaN or infinite values in 1 of 5 rows"):
        base(torch.full((5, 2), torch.nan).masked_fill(torch.arange(5)[:, None] > 0, 0.0))
    for make_base in LEARNED.values():
        with pytest.raises(ShapeError, match="context size 0"):
            make_base()(torch.zeros(2))
        with pytest.raises(OptionError, match="context_dim >= 0"):
            make_base(context_dim=-1)
    with pytest.raises(ShapeError, match="this flow has context size 2, but got none"):
        flows.Flow([DiscreteCoupling(LENGTH, SIZE)], base)()


def test_layers_and_base_have_one_context():
    with pytest.raises(ShapeError, match="DiscreteCoupling has 3, the base has 2"):
        flows.Flow([DiscreteCoupling(LENGTH, SIZE, context_dim=3)], LEARNED["factorized"](context_dim=2))
    with pytest.raises(OptionError, match="the base takes a context of size 2, but a flow of real numbers"):
        flows.Flow([pf.transforms.Planar(2)], flows.Gaussian(2, context_dim=2))


@pytest.mark.parametrize("recipe", ["autoregressive", "coupling"])
@pytest.mark.parametrize("name", [*LEARNED, None])
def test_recipes_give_their_context_to_the_base(recipe, name):
    torch.manual_seed(0)
    maker = {"autoregressive": flows.DiscreteAutoregressive, "coupling": flows.DiscreteCoupling}[recipe]
    flow = perturbed(maker(LENGTH, SIZE, hidden_dims=(8,), context_dim=2, base=name), 0.1)
    assert flow.base.context_dim == 2
    probs = probabilities(flow(3 * torch.randn(5, 2)))
    torch.testing.assert_close(probs.sum(0), torch.ones(5))
    assert probs[0].std() > 1e-4


def test_layers_over_a_base_that_sees_all_are_affine_by_default():
    def univariate(**options):
        return type(flows.DiscreteAutoregressive(LENGTH, SIZE, **options).layers[0].layer.univariate).__name__

    assert univariate() == univariate(context_dim=2) == "Modular"
    assert univariate(context_dim=2, base=LEARNED["autoregressive"]()) == "Ranking"
    assert univariate(context_dim=2, base="factorized") == univariate(base="groupwise") == "Ranking"


def test_the_default_base_of_layers_with_a_context_takes_it():
    assert flows.Flow([DiscreteCoupling(LENGTH, SIZE, context_dim=2)]).base.context_dim == 2
    assert flows.Flow([DiscreteCoupling(LENGTH, SIZE)]).base.net is None


@pytest.mark.parametrize("name", list(LEARNED))
@pytest.mark.parametrize("recipe", ["autoregressive", "coupling"])
def test_contexts_that_are_sequences(recipe, name):
    length, conditioner = 5, {"autoregressive": "causal_conv", "coupling": "dilated_conv"}[recipe]
    maker = {"autoregressive": flows.DiscreteAutoregressive, "coupling": flows.DiscreteCoupling}[recipe]
    flow = perturbed(maker(length, 2, hidden_dims=(6, 6), conditioner=conditioner, context_dim=(2, length), base=name))
    context = torch.randn(4, 2, length)
    probs = probabilities(flow(context))
    torch.testing.assert_close(probs.sum(0), torch.ones(4))
    x = flow(context).sample((3,))
    for i in range(4):
        torch.testing.assert_close(flow(context).log_prob(x)[:, i], flow(context[i]).log_prob(x[:, i]))


def test_a_place_of_a_groupwise_base_sees_its_element_of_a_context():
    base = perturbed(flows.GroupwiseCategorical(7, 3, 3, (6, 6), context_dim=(2, 7)))
    context, one_hot = torch.randn(2, 7), torch.eye(3)[torch.randint(3, (7,))]
    sees = torch.func.jacrev(lambda c: base.net(one_hot, c))(context).abs().sum((1, 2)) > 0  # (place, element)
    expected = torch.eye(7, dtype=torch.bool)
    expected[2, 0] = expected[5, 3] = True  # by a convolution of dilation 2, in the same block
    assert torch.equal(sees, expected)
    with pytest.raises(OptionError, match=r"a conditioning sequence of 5 places has shape \(channels, 5\)"):
        flows.GroupwiseCategorical(5, 3, context_dim=(2, 4))
    with pytest.raises(OptionError, match="AutoregressiveCategorical with conditioner='made' takes a context vector"):
        flows.AutoregressiveCategorical(5, 3, context_dim=(2, 5))


def test_the_base_sees_contexts_as_layers_see_them(flow):
    context = torch.tensor([1990.0, 0.0]) + torch.tensor([30.0, 1e-3]) * torch.rand(50, 2)
    x = torch.randint(SIZE, (50, LENGTH))
    flow.adapt(x.float(), context)
    scaled = (context - context.mean(0)) / context.std(0, correction=0)
    found = flow(context).base_dist.log_prob(x)
    torch.testing.assert_close(found, flow.base(scaled).log_prob(x), atol=1e-3, rtol=1e-3)


def test_one_hot_events():
    torch.manual_seed(1)
    integers = make("coupling", base="factorized", context_dim=2)
    torch.manual_seed(1)
    vectors = make("coupling", base="factorized", context_dim=2, one_hot=True)
    context = torch.randn(6, 2)
    x = vectors(context).sample((5,))
    assert x.shape == (5, 6, LENGTH, SIZE)
    torch.testing.assert_close(vectors(context).log_prob(x), integers(context).log_prob(x.argmax(-1)))
    torch.testing.assert_close(probabilities(vectors(context)), probabilities(integers(context)))


def test_copies_and_files(flow, tmp_path):
    context, x = torch.randn(6, 2), torch.randint(SIZE, (6, LENGTH))
    q = flow(context)
    expected = q.log_prob(x)
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(other(context).log_prob(x), expected)
    for law in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        torch.testing.assert_close(law.log_prob(x), expected)
    if not isinstance(flow.base, ChainAt):
        flow.save(tmp_path / "flow.safetensors")
        torch.testing.assert_close(pf.load_flow(tmp_path / "flow.safetensors")(context).log_prob(x), expected)


@pytest.mark.parametrize("name", list(LEARNED))
def test_states_of_bases_with_another_context_are_refused(name):
    states = [flows.Flow([DiscreteCoupling(LENGTH, SIZE)], LEARNED[name](context_dim=k)) for k in (0, 2)]
    with pytest.raises(StateError, match="context_shape"):
        states[0].load_state_dict(states[1].state_dict())


def test_a_flow_of_bound_tensors(flow):
    """The law is that of the tensors of a functional call, and vmap stacks them."""
    others = [perturbed(copy.deepcopy(flow)) for _ in range(2)]
    context, x = torch.randn(6, 2), torch.randint(SIZE, (6, LENGTH))
    expected = torch.stack([other(context).log_prob(x) for other in others]).detach()
    tensors = dict(others[0].named_parameters()) | dict(others[0].named_buffers())
    law = functional_call(flow, tensors, (context,))
    torch.testing.assert_close(law.log_prob(x), expected[0])
    with torch.no_grad():
        torch.testing.assert_close(law.log_prob(x), expected[0])
    parameters, buffers = stack_module_state(others)
    score = lambda p, b: functional_call(flow, (p, b), (context,)).log_prob(x)  # noqa: E731
    torch.testing.assert_close(vmap(score)(parameters, buffers), expected)
    torch.testing.assert_close(vmap(lambda c, x: flow(c).log_prob(x))(context, x), flow(context).log_prob(x))


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", list(LEARNED))
def test_a_law_of_a_base_is_bound_to_the_tensors_of_a_functional_call(name, context_dim):
    base = perturbed(LEARNED[name](context_dim=context_dim))
    other, x = perturbed(copy.deepcopy(base)), torch.randint(SIZE, (6, LENGTH))
    given = (torch.randn(6, 2),) if context_dim else ()
    law = functional_call(base, dict(other.named_parameters()), given)
    expected = other(*given).log_prob(x)
    assert not torch.allclose(base(*given).log_prob(x), expected)
    shape = (6, *law.batch_shape)
    for same in (law, pickle.loads(pickle.dumps(other(*given))), law.expand(shape)):
        torch.testing.assert_close(same.log_prob(x), expected.expand(shape) if same.batch_shape == shape else expected)
    torch.manual_seed(0)
    draws = law.sample((4,))
    torch.manual_seed(0)
    assert torch.equal(other(*given).sample((4,)), draws)
    loss = lambda p: functional_call(base, p, given).log_prob(x).sum()  # noqa: E731
    parameters = dict(base.named_parameters())
    found = grad(loss)(parameters)
    own = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for a, b in zip(found.values(), own, strict=True):
        torch.testing.assert_close(a, b)
    # Changes in place, such as an optimiser makes, are followed.
    law, before = base(*given), base(*given).log_prob(x).detach()
    assert torch.allclose(law.log_prob(x), before)
    perturbed(base)
    if name != "factorized":  # whose logits were computed when the law was made
        assert not torch.allclose(law.log_prob(x), before)


def test_gradients_reach_the_context_and_all_parameters(flow):
    flow, context = flow.double(), torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randint(SIZE, (1, LENGTH))

    # The derivative with respect to the context is one of the base alone.
    def of_context(c):
        return flow(c).log_prob(x)

    (found,) = torch.autograd.grad(of_context(context).sum(), context)
    steps = 1e-5 * torch.eye(2, dtype=torch.float64)
    expected = [(of_context(context + h) - of_context(context - h)).item() / 2e-5 for h in steps]
    if not isinstance(flow.base, flows.Flow):  # whose layers have gradients that go straight through
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64), atol=1e-7, rtol=1e-5)
    many = torch.randint(SIZE, (50, LENGTH))
    flow(torch.randn(50, 2)).log_prob(many).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.base.parameters())


def test_enumerated_latents_in_a_plate(flow):
    context, y = torch.randn(5, 2), torch.randn(5)

    def model():
        with pyro.plate("rows", 5):
            z = pyro.sample("z", flow(context), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z.sum(-1).float(), 1.0), obs=y)

    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda: None)
    total = 0.0
    for i in range(5):
        z = flow(context[i]).enumerate_support()
        log_joint = flow(context[i]).log_prob(z) + dist.Normal(z.sum(-1).float(), 1.0).log_prob(y[i])
        total = total + log_joint.logsumexp(0)
    torch.testing.assert_close(loss, -total)


def test_enumerated_contexts():
    """The context may itself be enumerated, so that it has an axis more than the plate."""
    flow, y = make("coupling", base="autoregressive", length=2, context_dim=2), torch.randn(3)

    def model():
        with pyro.plate("rows", 3):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", flow(torch.stack([k, 1 - k], -1)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z.sum(-1).float(), 1.0), obs=y)

    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda: None)
    terms = []
    for k, p in ((0.0, 0.7), (1.0, 0.3)):
        q = flow(torch.tensor([k, 1 - k]))
        z = q.enumerate_support()
        terms.append(q.log_prob(z)[:, None] + dist.Normal(z.sum(-1, keepdim=True).float(), 1.0).log_prob(y))
        terms[-1] = terms[-1] + torch.tensor(p).log()
    torch.testing.assert_close(loss, -torch.cat(terms).logsumexp(0).sum())


@pytest.mark.parametrize("name", list(LEARNED))
def test_fit_to_a_law_whose_entropy_depends_on_the_context(name):
    """Places are constant at one context and uniform at the other, which no flow on a base without a context can be."""
    torch.manual_seed(0)
    context = torch.rand(600, 1).round()
    x = torch.where(context > 0, torch.randint(SIZE, (600, LENGTH)), 1)
    base = LEARNED[name](context_dim=1)
    flow = flows.DiscreteCoupling(LENGTH, SIZE, num_layers=3, hidden_dims=(8,), context_dim=1, base=base)
    optimizer = lambda parameters: torch.optim.Adam(parameters, lr=0.02)  # noqa: E731
    pf.fit_density(flow, x, context, optimizer=optimizer, max_epochs=20, seed=0, progress_bar=False)
    entropies = torch.special.entr(probabilities(flow(torch.tensor([[0.0], [1.0]])))).sum(0)
    torch.testing.assert_close(entropies, LENGTH * torch.tensor([1.0, SIZE]).log(), atol=0.5, rtol=0)
    assert pf.bits_per_dim(flow, x, SIZE, context) < 1.1


def test_state_dict_of_a_mixture_of_flows_with_contexts():
    mixture = flows.Mixture([make("coupling", context_dim=2), make("autoregressive", context_dim=2)])
    context = torch.randn(5, 2)
    probs = probabilities(mixture(context))
    torch.testing.assert_close(probs.sum(0), torch.ones(5))
    buffer = io.BytesIO()
    torch.save(mixture.state_dict(), buffer)
    buffer.seek(0)
    other = flows.Mixture([make("coupling", context_dim=2), make("autoregressive", context_dim=2)])
    other.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(probabilities(other(context)), probs)


# Laws alone


@pytest.mark.parametrize("name", list(LEARNED))
def test_values_that_are_no_categories(name):
    law = perturbed(LEARNED[name]())()
    for value in ([SIZE, 0, 0], [0, -1, 0], [0.5, 0, 0]):
        with pytest.raises(ValueError, match="categories 0 to 3, but got|within the support"):
            law.log_prob(torch.tensor(value))
    with pyro.validation_enabled(False):
        quiet = perturbed(LEARNED[name]())()
        if name != "factorized":
            assert quiet.log_prob(torch.tensor([[SIZE, 0, 0], [0, 0, 0]]))[0] == -torch.inf
    assert law.log_prob(torch.tensor([1.0, 2.0, 0.0])).isfinite()


@pytest.mark.parametrize("name", ["autoregressive", "groupwise"])
def test_values_of_another_length_and_no_rows(name):
    law = perturbed(LEARNED[name]())()
    for shape in ((LENGTH + 1,), (5, 1), ()):
        with pytest.raises(ShapeError, match="events of size 3, but got a tensor of shape"):
            law.log_prob(torch.zeros(shape, dtype=torch.long))
    assert law.sample((0,)).shape == (0, LENGTH) and law.sample((0,)).dtype == torch.long
    assert law.log_prob(law.sample((2, 0))).shape == (2, 0)
    assert law.expand((0,)).log_prob(torch.zeros(LENGTH)).shape == (0,)
    with pytest.raises(ShapeError, match=r"a law of batch shape \(5,\) cannot expand to \(4,\)"):
        law.expand((5,)).expand((4,))

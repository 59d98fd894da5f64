"""The distribution that a flow of categories returns."""

import copy
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chi2
from torch.func import functional_call, grad, stack_module_state, vmap

from pyroflows import DataError, FlowError, InexactError, OptionError, ShapeError, flows, load_flow
from pyroflows.flows import Flow
from pyroflows.flows.discrete.scoring import one_hot_log_prob
from pyroflows.transforms import Compose, Coupling, DiscreteAutoregressive, DiscreteCoupling, OneHot, Permutation

from .categories import BASES, MAPS, RECIPES, make


def all_sequences(length, num_categories):
    return torch.tensor(list(itertools.product(range(num_categories), repeat=length)))


@pytest.mark.grid(
    recipe=list(RECIPES), univariate=MAPS, base=list(BASES), num_categories=[2, 3, 4, 5], length=[1, 2, 3, 4]
)
def test_probabilities_of_the_whole_support_sum_to_one(recipe, univariate, base, num_categories, length):
    flow = make(recipe, length, num_categories, base, univariate=univariate).double()
    x = all_sequences(length, num_categories)
    assert torch.equal(flow().enumerate_support(), x)
    isolated = flow().log_prob(x)
    assert isolated.exp().sum().item() == pytest.approx(1, abs=1e-6)
    with torch.no_grad():  # integers, without gradients, have the same
        torch.testing.assert_close(flow().log_prob(x), isolated, rtol=1e-9, atol=1e-9)
    z = flow().latent(x)
    assert z.dtype == torch.long
    assert len(z.unique(dim=0)) == len(x)
    back, log_q = flow().transport(z)
    assert torch.equal(back, x)
    torch.testing.assert_close(log_q, isolated)


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_frequencies_of_draws_are_the_probabilities(recipe, base):
    flow = make(recipe, base=base, univariate="permutation", scale=0.3)
    num_draws = 20_000
    weights = 4 ** torch.arange(3).flip(0)
    counts = ((flow().sample((num_draws,)) * weights).sum(-1)).bincount(minlength=64)
    expected = num_draws * flow().log_prob(flow().enumerate_support()).exp().detach()
    # Rare sequences are counted together, so that the statistic follows the chi-square law.
    is_rare = expected < 5
    counts = torch.cat([counts[~is_rare], counts[is_rare].sum()[None]]).double()
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]]).double()
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < chi2.ppf(0.999, len(counts) - 1)


def test_one_hot_events():
    torch.manual_seed(1)
    integers = make("coupling", base="autoregressive")
    torch.manual_seed(1)
    vectors = make("coupling", base="autoregressive", one_hot=True)
    x = vectors().sample((5,))
    assert x.shape == (5, 3, 4)
    assert torch.equal(x.sum(-1), torch.ones(5, 3))
    assert (vectors().event_shape, vectors.event_shape, vectors.base_shape) == ((3, 4), (3, 4), (3,))
    torch.testing.assert_close(vectors().log_prob(x), integers().log_prob(x.argmax(-1)))
    torch.testing.assert_close(vectors().log_prob(x.long()), vectors().log_prob(x))
    assert torch.equal(vectors().latent(x), integers().latent(x.argmax(-1)))
    support = vectors().enumerate_support()
    assert support.shape == (64, 3, 4)
    with torch.no_grad():
        assert vectors().log_prob(support).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_context_batch_shapes_and_expansion():
    flow = make(context_dim=2, base="autoregressive", univariate="permutation")
    context = 3 * torch.randn(5, 2)
    q = flow(context)
    assert (q.batch_shape, q.event_shape) == ((5,), (3,))
    x = q.sample((7,))
    assert x.shape == (7, 5, 3)
    log_q = q.log_prob(x)
    for i in range(5):
        torch.testing.assert_close(flow(context[i]).log_prob(x[:, i]), log_q[:, i])
    assert q.log_prob(x[0, 0]).shape == (5,)
    wide = q.expand((6, 5))
    assert wide.sample().shape == (6, 5, 3)
    assert wide.log_prob(x[0]).shape == (6, 5)
    assert q.enumerate_support().shape == (64, 5, 3)
    assert q.enumerate_support(expand=False).shape == (64, 1, 3)
    torch.testing.assert_close(q.log_prob(q.enumerate_support(expand=False)).exp().sum(0), torch.ones(5))
    assert len({tuple(row.tolist()) for row in q.log_prob(x[0, :1])[None]}) == 1
    assert not torch.allclose(log_q[:, 0], flow(context[1]).log_prob(x[:, 0]))


def test_context_of_a_convolution_is_a_sequence():
    flow = make(length=4, conditioner="causal_conv", context_dim=(2, 4), univariate="permutation")
    context = torch.randn(5, 2, 4)
    q = flow(context)
    assert q.log_prob(q.sample((3,))).shape == (3, 5)
    torch.testing.assert_close(q.log_prob(q.enumerate_support(expand=False)).exp().sum(0), torch.ones(5))


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_rows_of_none(recipe):
    q = make(recipe)()
    assert q.sample((0,)).shape == (0, 3)
    assert q.log_prob(torch.zeros(0, 3)).shape == (0,)
    with torch.no_grad():
        assert q.log_prob(torch.zeros(2, 0, 3, dtype=torch.long)).shape == (2, 0)


WRONG = {"too large": [4, 0, 0], "negative": [0, -1, 0], "a fraction": [0.5, 0, 0], "NaN": [math.nan, 0, 0]}


@pytest.mark.parametrize("value", WRONG.values(), ids=list(WRONG))
@pytest.mark.parametrize("univariate", MAPS)
def test_values_that_are_no_categories(univariate, value):
    flow, value = make(univariate=univariate), torch.tensor([value, [0, 1, 2]])
    with pytest.raises(DataError, match="takes categories 0 to 3, but got"):
        flow().log_prob(value)
    with pytest.raises(DataError, match="takes categories 0 to 3, but got"):
        flow().latent(value)
    with pyro.validation_enabled(False):
        expected = flow().log_prob(torch.tensor([0, 1, 2]))
        for log_q in (flow().log_prob(value), flow().log_prob(value[0]), flow().log_prob(value).detach()):
            assert log_q.flatten()[0] == -math.inf
        torch.testing.assert_close(flow().log_prob(value)[1], expected)
        with torch.no_grad():
            assert flow().log_prob(value)[0] == -math.inf
        assert flow().latent(value)[0].tolist() == [-1, -1, -1]


def test_values_of_another_shape():
    with pytest.raises(ShapeError, match="events of size 3"):
        make()().log_prob(torch.zeros(4, dtype=torch.long))
    with pyro.validation_enabled(False), pytest.raises(ShapeError, match="events of size 3"):
        make()().log_prob(torch.zeros(5, 4, dtype=torch.long))
    with pytest.raises(ShapeError, match="context size 2"):
        make(context_dim=2)(torch.zeros(3))


def test_draws_have_no_gradients_scores_or_temperature():
    q = make()()
    assert not q.has_rsample
    with pytest.raises(NotImplementedError, match="no gradients"):
        q.rsample()
    with pytest.raises(InexactError, match="no score"):
        q.transport_and_score(q.base.sample())
    with pytest.raises(OptionError, match="no temperature"):
        q.sample(temperature=0.5)
    x, log_q = q.rsample_and_log_prob((5,))
    torch.testing.assert_close(q.log_prob(x), log_q)


def test_a_support_that_is_too_large_is_not_enumerated():
    assert make(length=10, num_categories=4)().enumerate_support(expand=False).shape == (2**20, 10)
    with pytest.raises(OptionError, match="4194304 values, which are too many"):
        make(length=11, num_categories=4)().enumerate_support()


def test_what_reparametrisations_ask_for():
    q = make(context_dim=2)(torch.randn(2))
    x = z = q.base_dist.sample((5,))
    for t in q.transforms:
        x = t(x)
    assert torch.equal(x, q.transport(z)[0])


def test_wrapped_in_other_distributions():
    flow = make(context_dim=2)
    q = flow(torch.randn(5, 2))
    x = q.sample()
    torch.testing.assert_close(q.to_event(1).log_prob(x), q.log_prob(x).sum())
    mask = torch.tensor([True, False, True, False, True])
    assert q.mask(mask).log_prob(x).count_nonzero() == 3


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_copies_and_files(recipe, base, tmp_path):
    flow = make(recipe, base=base, univariate="permutation", embedding_dim=3)
    x = flow().sample((20,))
    expected = flow().log_prob(x)
    flow().log_prob(x).sum().backward()
    twins = [copy.deepcopy(flow)(), copy.deepcopy(flow()), pickle.loads(pickle.dumps(flow()))]
    if base != "module":  # its class is the user's
        flow.save(tmp_path / "flow.safetensors")
        twins.append(load_flow(tmp_path / "flow.safetensors")())
    for law in twins:
        assert torch.equal(law.log_prob(x), expected)
    with pytest.raises(FlowError, match="another flow"):
        make(recipe, base=base, univariate="affine", embedding_dim=3).load_state_dict(flow.state_dict())


OTHERS = {
    "categories": lambda: make(num_categories=5),
    "map": lambda: make(univariate="additive"),
    "order": lambda: make(order=[2, 0, 1]),
    "base": lambda: make(base="autoregressive"),
    "number of layers": lambda: make(num_layers=2),
    "events": lambda: make(one_hot=True),
    "structure": lambda: make("coupling"),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=list(OTHERS))
def test_states_of_other_flows_are_refused(other):
    with pytest.raises(FlowError, match="another flow"):
        make().load_state_dict(other().state_dict())


def test_states_of_other_groups_are_refused():
    with pytest.raises(FlowError, match="mask"):
        make("coupling", length=4).load_state_dict(make("coupling", length=4, num_groups=2).state_dict())


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("univariate", MAPS)
def test_parameters_of_a_functional_call_and_of_a_stack(recipe, univariate):
    parts = [make(recipe, univariate=univariate, base="autoregressive") for _ in range(3)]
    x = torch.randint(4, (5, 3))
    state = {name: value.detach() for name, value in parts[1].state_dict().items() if value.is_floating_point()}
    q = functional_call(parts[0], state, ())
    torch.testing.assert_close(q.log_prob(x), parts[1]().log_prob(x))
    template = copy.deepcopy(parts[0])
    parameters, buffers = stack_module_state(parts)

    def log_prob(parameters, buffers):
        return functional_call(template, (parameters, buffers), ()).log_prob(x)

    expected = torch.stack([part().log_prob(x) for part in parts])
    torch.testing.assert_close(vmap(log_prob)(parameters, buffers), expected)
    with torch.no_grad():
        torch.testing.assert_close(vmap(log_prob)(parameters, buffers), expected)
    own = {name: value.detach() for name, value in parts[0].named_parameters()}
    found = grad(lambda p: functional_call(template, p, ()).log_prob(x).sum())(own)
    parts[0].zero_grad()
    parts[0]().log_prob(x).sum().backward()
    for name, parameter in parts[0].named_parameters():
        given = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], given)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_log_prob_compiles(recipe):
    flow = make(recipe, base="autoregressive", univariate="permutation")
    x = torch.randint(4, (5, 3))
    compiled = torch.compile(lambda x: flow().log_prob(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), flow().log_prob(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    # Integers of this size are rounded in bfloat16.
    flow = flows.DiscreteCoupling(2, 1000, hidden_dims=(8,), base=dist.Categorical(torch.rand(2, 1000)).to_event(1))
    flow = flow.to(dtype)
    x = torch.tensor([[999, 997], [513, 2]])
    log_q = flow().log_prob(x)
    assert log_q.dtype == dtype
    assert torch.equal(flow().latent(x), x)
    assert torch.equal(log_q.argsort(), flow.base().log_prob(x).argsort())


def test_gradient_of_a_base_that_is_not_the_library_s():
    # The gradient with respect to an entry is the log-probability with that category at that place, up to a constant
    # that makes the mean over categories one.
    law = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Categorical(torch.rand(2, 3, 4)).to_event(1)
    )
    x = torch.tensor([1, 3, 0])
    one_hot = torch.eye(4)[x].requires_grad_()
    (gradient,) = torch.autograd.grad(one_hot_log_prob(law, one_hot), one_hot)
    table = torch.empty(3, 4)
    for place, category in itertools.product(range(3), range(4)):
        changed = x.clone()
        changed[place] = category
        table[place, category] = law.log_prob(changed)
    torch.testing.assert_close(gradient, table - table.mean(-1, keepdim=True) + 1)


def test_gradient_where_a_category_has_no_probability():
    law = dist.Categorical(logits=torch.tensor([[0.0, 0.0, -math.inf], [0.2, 0.3, 0.5]])).to_event(1)
    one_hot = torch.eye(3)[torch.tensor([0, 2])].requires_grad_()
    (gradient,) = torch.autograd.grad(one_hot_log_prob(law, one_hot).sum(), one_hot)
    assert gradient.isfinite().all()
    assert gradient[0].argmin() == 2


def test_layers_stacked_by_hand():
    layers = [DiscreteAutoregressive(3, 4, "permutation", hidden_dims=(8,)), DiscreteCoupling(3, 4, hidden_dims=(8,))]
    flow = Flow(layers, base=dist.Binomial(3, torch.full((3,), 0.4)).to_event(1))
    assert flow().log_prob(flow().enumerate_support()).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert isinstance(Flow(layers).base, flows.FactorizedCategorical)
    bits = dist.Bernoulli(torch.tensor([0.2, 0.5, 0.9])).to_event(1)
    flow = Flow([DiscreteCoupling(3, 2, hidden_dims=(8,))], bits)
    x = torch.tensor([[0, 1, 1], [1, 0, 0]])
    torch.testing.assert_close(flow().log_prob(x), bits.log_prob(x.float()))
    for z in (flow().latent(x), flow().base.sample((2,))):
        y, log_q = flow().transport(z)
        assert y.dtype == torch.long
        assert torch.equal(flow().latent(y), z.long())
        torch.testing.assert_close(log_q, flow().log_prob(y))
    batch = dist.Categorical(torch.rand(6, 3, 4)).to_event(1)
    flow = Flow(layers, batch)
    assert (flow().batch_shape, flow().sample((2,)).shape) == ((6,), (2, 6, 3))
    assert flow().log_prob(torch.zeros(3)).shape == (6,)


NO_EVENTS = {
    "too large": (
        torch.tensor([[0, 1, 2], [0, 6, 1]]),
        DataError,
        r"takes categories 0 to 3, but got 6 at .1, 1.: .*=7",
    ),
    "negative": (torch.tensor([-1, 1, 2]), DataError, r"takes categories 0 to 3, but got -1 at .0.: .*give x . 1"),
    "fractions": (torch.tensor([0.0, 0.5, 1.0]), DataError, r"takes categories 0 to 3, but got 0.5 at .1.: .*whole"),
    "too short": (torch.zeros(2), ShapeError, r"has events of size 3, but got a tensor of shape .2,."),
}


@pytest.mark.parametrize("kind", NO_EVENTS)
def test_values_that_are_no_events_are_named(kind):
    x, error, message = NO_EVENTS[kind]
    flow = flows.DiscreteCoupling(3, 4, hidden_dims=(8,))
    for part in (flow, flows.Mixture([flow, flow])):
        with pytest.raises(error, match=message) as raised:
            part().log_prob(x)
        assert raised.value.__context__ is None  # torch's message would show all values
    with pytest.raises(error, match=message):
        flow().latent(x)
    trace = pyro.poutine.trace(lambda: pyro.sample("x", flow(), obs=x)).get_trace()
    with pytest.raises(ValueError, match=message):
        trace.log_prob_sum()


def test_vectors_that_are_not_one_hot_are_named():
    flow = flows.DiscreteCoupling(3, 4, hidden_dims=(8,), one_hot=True)
    x = flow().sample((2,))
    x[1, 2] = 0.25
    with pytest.raises(DataError, match=r"this flow takes one-hot vectors, but the one at \[1, 2\] is none"):
        flow().log_prob(x)
    with pytest.raises(ShapeError, match=r"events of shape \(3, 4\), but got a tensor of shape \(2, 3\)"):
        flow().log_prob(torch.zeros(2, 3))


@pytest.mark.parametrize("law", [flows.DiscreteCoupling(3, 4), flows.Mixture([flows.DiscreteCoupling(3, 4)])])
def test_moments_are_not_known(law):
    for moment in ("mean", "variance", "stddev"):
        with pytest.raises(NotImplementedError, match=r"no mean and variance in closed form: .* by law.sample"):
            getattr(law(), moment)


ONE_HOT = dist.OneHotCategorical(torch.ones(3, 4))
REFUSED = {
    "base of vectors": ([DiscreteCoupling(3, 4)], {"base": ONE_HOT.to_event(1)}, "OneHotCategorical gives one-hot"),
    "base of rows of vectors": ([DiscreteCoupling(3, 4)], {"base": ONE_HOT}, r"give dist.Categorical.*to_event\(1\)"),
    "base that is a flow of vectors": (
        [DiscreteCoupling(3, 4)],
        {"base": flows.DiscreteCoupling(3, 4, one_hot=True)},
        "gives integers, but DiscreteCoupling gives one-hot vectors: .* without one_hot=True",
    ),
    "other categories": ([DiscreteCoupling(3, 4), DiscreteCoupling(3, 5)], {}, "has 4 and layer 1 .* has 5"),
    "a real layer behind": ([DiscreteCoupling(3, 4), Coupling(3)], {}, "layer 1 .Coupling. maps real numbers"),
    "a real layer before": ([Permutation([2, 0, 1]), DiscreteCoupling(3, 4)], {}, "layer 0 .Permutation. maps real"),
    "vectors of other categories": ([DiscreteCoupling(3, 4), OneHot(3, 5)], {}, "layer 1 .OneHot. has 5"),
    "vectors at the base": ([OneHot(3, 4).inv, DiscreteCoupling(3, 4)], {}, "last layer"),
    "support": ([DiscreteCoupling(3, 4)], {"support": dist.constraints.positive}, "leave support out"),
    "base of other categories": (
        [DiscreteCoupling(3, 4)],
        {"base": dist.Categorical(torch.ones(3, 5)).to_event(1)},
        "numbers 0 to 3 .* upper_bound=4",
    ),
    "base of fewer": ([DiscreteCoupling(3, 4)], {"base": flows.FactorizedCategorical(3, 3)}, "numbers 0 to 3"),
    "base of counts": ([DiscreteCoupling(3, 4)], {"base": dist.Poisson(torch.ones(3)).to_event(1)}, "of Independent"),
    "base of real numbers": ([DiscreteCoupling(3, 4)], {"base": dist.Normal(torch.zeros(3), 1).to_event(1)}, "Real"),
    "base of another length": ([DiscreteCoupling(3, 4)], {"base": flows.FactorizedCategorical(2, 4)}, "event shape"),
    "base of variables": ([DiscreteCoupling(3, 4)], {"base": "student_t"}, "Real"),
}


@pytest.mark.parametrize(("layers", "options", "message"), REFUSED.values(), ids=list(REFUSED))
def test_stacks_that_are_refused(layers, options, message):
    with pytest.raises(FlowError, match=message):
        Flow(layers, **options)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_options_of_recipes(recipe):
    for option in ({"mixing": "lu"}, {"support": dist.constraints.positive}, {"bins": 3}):
        with pytest.raises(TypeError, match=next(iter(option))):
            recipe(3, 4, **option)
    for options, message in (
        ({"base": "student_t"}, "factorized.*autoregressive"),
        ({"num_layers": 0}, "num_layers"),
        ({"univariate": "spline"}, "univariate"),
        ({"conditioner": "lstm"}, "conditioner"),
        ({"base": dist.Categorical(torch.ones(3, 5)).to_event(1)}, "numbers 0 to 3"),
    ):
        with pytest.raises(OptionError, match=message):
            recipe(3, 4, **options)
    with pytest.raises(OptionError, match="num_categories"):
        recipe(3, 1)


def test_groups_of_couplings():
    for num_groups in (1, 4):
        with pytest.raises(OptionError, match="num_groups"):
            flows.DiscreteCoupling(3, 4, num_groups=num_groups)
    flow = flows.DiscreteCoupling(6, 4, num_layers=3, num_groups=3)
    assert [layer.mask for layer in flow.layers][1] == [True, False, True, True, False, True]


def test_orders_of_autoregressive_layers():
    orders = [layer.layer.order for layer in flows.DiscreteAutoregressive(3, 4, num_layers=2).layers]
    assert orders == [[0, 1, 2], [2, 1, 0]]
    flow = flows.DiscreteAutoregressive(3, 4, num_layers=2, order=[2, 0, 1])
    assert [layer.layer.order for layer in flow.layers] == [[2, 0, 1]] * 2
    assert flow.base.net.order == [2, 0, 1]


def test_a_long_dependent_base_gives_layers_a_gradient():
    """The log-probability of a long sequence is below that of the smallest number of a dtype."""
    components = dist.Categorical(torch.rand(2, 60, 4)).to_event(1)
    law = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)
    flow = Flow([DiscreteCoupling(60, 4, "affine", hidden_dims=(8,))], law)
    flow().log_prob(torch.randint(4, (3, 60))).sum().backward()
    assert max(p.grad.abs().max() for p in flow.parameters() if p.grad is not None) > 1e-3


@pytest.mark.parametrize("has_gradients", [True, False])
def test_copies_of_a_law_are_scored_once(monkeypatch, has_gradients):
    flow = make("autoregressive", length=3, base="autoregressive")
    shapes = []
    forward = type(flow.base.net).forward
    monkeypatch.setattr(
        type(flow.base.net), "forward", lambda net, z, *rest: shapes.append(z.shape) or forward(net, z, *rest)
    )
    support = flow().enumerate_support(expand=False)
    with torch.set_grad_enabled(has_gradients):
        log_prob = flow().expand([50]).log_prob(support[:, None])
    assert log_prob.shape == (len(support), 50)
    assert {shape[:-2] for shape in shapes} == {(len(support), 1)}


def test_layers_and_mixtures_of_other_categories_are_refused():
    layers = [DiscreteCoupling(3, 4), DiscreteCoupling(3, 5)]
    with pytest.raises(OptionError, match="same categories"):
        Flow([Compose(layers)])
    with pytest.raises(OptionError, match="same categories"):
        flows.Mixture([Flow([layer]) for layer in layers])


def test_draws_with_log_probabilities_train_all_layers():
    flow = make("autoregressive")
    x, log_prob = flow().rsample_and_log_prob((20,))
    log_prob.sum().backward()
    torch.testing.assert_close(log_prob, flow().log_prob(x))
    assert all(p.grad is not None for p in flow.transform.parameters())

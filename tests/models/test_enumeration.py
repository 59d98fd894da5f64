"""The log joint of models with discrete latents, which are summed out, against sums over all assignments."""

from itertools import product

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch.distributions.utils import clamp_probs

from pyroflows.errors import ModelError
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.requirements import describe_for_flow

Y = torch.tensor([-1.0, 0.3, 2.5, 1.0], dtype=torch.float64)
LOCS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(model, *args, num_draws=4):
    structure, _ = describe_for_flow(model, args, {})
    layout = Layout(structure)
    torch.manual_seed(1)
    log_joint = LogJoint(model, args, {}, layout, 0.3 * torch.randn(13, layout.dim))
    return log_joint, torch.randn(num_draws, layout.dim)


def brute_force(model, args, log_joint, vector):
    """Log sum over all assignments, where masks act on all but the priors of discrete sites, and no scale acts."""
    values, ladj = log_joint.layout.constrain(vector)
    sites = log_joint.structure.enumerated
    nodes = poutine.trace(model).get_trace(*args).nodes
    choices = []
    for site in sites:
        fn = nodes[site.name]["fn"]
        support = fn.enumerate_support(expand=False).reshape(-1, *fn.event_shape)
        num_entries = site.shape[: len(site.shape) - site.event_dim].numel()
        entries = product(support, repeat=num_entries)
        choices.append(torch.stack([torch.stack(entry).reshape(site.shape) for entry in entries]))

    def log_density(*assignment):
        given = {site.name: value for site, value in zip(sites, assignment, strict=True)}
        trace = poutine.trace(poutine.condition(model, {**values, **given})).get_trace(*args)
        trace.compute_log_prob()
        parts = [
            node["unscaled_log_prob"]
            if name in given
            else torch.where(as_mask(node["mask"]), node["unscaled_log_prob"], 0.0)
            for name, node in trace.nodes.items()
            if node["type"] == "sample" and type(node["fn"]).__name__ != "_Subsample"
        ]
        return sum(part.sum() for part in parts)

    places = torch.cartesian_prod(*(torch.arange(len(choice)) for choice in choices)).reshape(-1, len(sites))
    assignments = [choice[i] for choice, i in zip(choices, places.T, strict=True)]
    with pyro.validation_enabled(False):
        totals = torch.func.vmap(log_density)(*assignments)
    return torch.logsumexp(totals, 0) + ladj


def as_mask(mask):
    return torch.tensor(True) if mask is None else torch.as_tensor(mask)


def single():
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    z = pyro.sample("z", dist.Bernoulli(p))
    pyro.sample("y", dist.Normal(3 * z, 1.0), obs=torch.tensor(1.5))


def global_for_all_rows():
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(loc + LOCS[z], 1.0), obs=Y)


def local_by_index():
    """Indexes from the left, which an outer plate cannot do."""
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=Y)


def two_in_a_plate():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4):
        u = pyro.sample("u", dist.Bernoulli(0.3))
        v = pyro.sample("v", dist.Categorical(Vindex(torch.tensor([[0.2, 0.8], [0.6, 0.4]]))[u.long()]))
        pyro.sample("y", dist.Normal(a * u + v, 1.0), obs=Y)


def two_apart():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4):
        u = pyro.sample("u", dist.Bernoulli(0.3))
        v = pyro.sample("v", dist.Bernoulli(a.sigmoid()))
        pyro.sample("y", dist.Normal(a + u, 1.0), obs=Y)
        pyro.sample("x", dist.Normal(2 * v, 1.0), obs=Y)


def nested():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    top = pyro.sample("top", dist.Bernoulli(0.4))
    with pyro.plate("groups", 2, dim=-2):
        z = pyro.sample("z", dist.Bernoulli(0.2 + 0.5 * top))
        with pyro.plate("rows", 3, dim=-1):
            w = pyro.sample("w", dist.Bernoulli(0.3 + 0.4 * z))
            pyro.sample("y", dist.Normal(a * w + z, 1.0), obs=torch.arange(6.0).reshape(2, 3) / 3)


def chain():
    """Transitions and emissions by indices from the left."""
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    z = torch.tensor(0)
    for t in pyro.markov(range(5)):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(LOCS[z], 1.0), obs=torch.tensor(0.4 * t))


def chains_in_a_plate():
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    data = torch.arange(10.0).reshape(2, 5) / 5
    lengths = torch.tensor([5, 3])
    with pyro.plate("series", 2):
        z = torch.tensor(0.0)
        for t in pyro.markov(range(5)):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Bernoulli(0.1 + 0.8 * p * z))
                pyro.sample(f"y_{t}", dist.Normal(2 * z, 1.0), obs=data[:, t])


def second_order_chain():
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    last = before = torch.tensor(0.0)
    for t in pyro.markov(range(5), history=2):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.1 + p * (0.5 * last + 0.3 * before)))
        pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=torch.tensor(0.3 * t))
        last, before = z, last


def masked():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4), poutine.mask(mask=torch.tensor([True, False, True, False])):
        z = pyro.sample("z", dist.Bernoulli(a.sigmoid()))
        pyro.sample("y", dist.Normal(a + z, 1.0), obs=Y)


def missing_categories():
    logits = pyro.sample("logits", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    seen = torch.tensor([True, False, True, False])
    with pyro.plate("rows", 4):
        kind = pyro.sample("kind", dist.Categorical(logits=logits), obs=torch.tensor([0, 0, 2, 0]), obs_mask=seen)
        pyro.sample("y", dist.Normal(LOCS[kind.long()], 1.0), obs=Y)


def one_hot():
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.OneHotCategorical(w))
        pyro.sample("y", dist.Normal((z * LOCS).sum(-1), 1.0), obs=Y)


def binomial():
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("rows", 3):
        n = pyro.sample("n", dist.Binomial(4, p))
        pyro.sample("y", dist.Poisson(1.0 + n), obs=torch.tensor([0.0, 2.0, 5.0]))


def latent_below():
    """A continuous latent whose prior depends on a discrete one, and a factor that does."""
    z = pyro.sample("z", dist.Bernoulli(0.3))
    x = pyro.sample("x", dist.Normal(2 * z, 0.5 + z))
    pyro.factor("f", -((x - z) ** 2))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.7))


def triangle():
    """Each pair of discrete sites has an observation of its own."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    u, v, w = (pyro.sample(name, dist.Bernoulli(0.3)) for name in "uvw")
    for i, (first, second) in enumerate([(u, v), (v, w), (u, w)]):
        pyro.sample(f"y_{i}", dist.Normal(a * first + second, 1.0), obs=Y[i])


def unused():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.8])))


MODES = {
    single: "plate",
    global_for_all_rows: "plate",
    local_by_index: "vmap",
    two_in_a_plate: "plate",
    two_apart: "plate",
    nested: "plate",
    chain: "vmap",
    chains_in_a_plate: "plate",
    second_order_chain: "plate",
    masked: "plate",
    missing_categories: "plate",
    one_hot: "plate",
    binomial: "plate",
    latent_below: "plate",
    triangle: "plate",
    unused: "plate",
}


@pytest.mark.parametrize("model", MODES, ids=lambda model: model.__name__)
@pytest.mark.parametrize("decorate", [lambda model: model, config_enumerate], ids=["as-written", "config_enumerate"])
def test_log_joint_is_the_sum_over_all_assignments(model, decorate):
    log_joint, vectors = made(decorate(model))
    assert log_joint.batched.mode == MODES[model]
    found = log_joint(vectors)
    for i, vector in enumerate(vectors):
        torch.testing.assert_close(found[i], brute_force(model, (), log_joint, vector), rtol=1e-9, atol=1e-9)


def long_chain(y):
    """Long enough that operations are shared between steps, and that the sum goes by halves."""
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(LOCS[z], 1.0), obs=y[t])
        if t % 3 == 0:
            pyro.sample(f"x_{t}", dist.Normal(LOCS[z] ** 2, 2.0), obs=y[t])


def long_chain_by_hand(y):
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    alpha = None
    for t in range(len(y)):
        prior = transition[0].log() if alpha is None else torch.logsumexp(alpha[:, None] + transition.log(), 0)
        alpha = prior + dist.Normal(LOCS, 1.0).log_prob(y[t])
        if t % 3 == 0:
            alpha = alpha + dist.Normal(LOCS**2, 2.0).log_prob(y[t])
    pyro.factor("chain", torch.logsumexp(alpha, 0))


def long_chains_in_a_plate(y):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("series", len(y)):
        z = torch.tensor(0.0)
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.1 + 0.8 * p * z))
            pyro.sample(f"y_{t}", dist.Normal(2 * z, 1.0), obs=y[:, t])


def long_chains_by_hand(y):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    stay = torch.stack([torch.tensor(0.1), 0.1 + 0.8 * p])
    transition = torch.stack([1 - stay, stay], -1).log()
    for i, series in enumerate(y):
        alpha = transition[0] + dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(series[0])
        for value in series[1:]:
            alpha = torch.logsumexp(alpha[:, None] + transition, 0)
            alpha = alpha + dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(value)
        pyro.factor(f"series_{i}", torch.logsumexp(alpha, 0))


def chain_that_writes(y):
    """Writes into tensors that were the same before."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    z = torch.tensor(0.0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.1 + 0.8 * p * z))
        loc, scale = 2 * z, 2 * z
        loc += t
        scale += 1
        pyro.sample(f"y_{t}", dist.Normal(loc, scale), obs=y[t])


def chain_that_writes_by_hand(y):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    stay = torch.stack([torch.tensor(0.1), 0.1 + 0.8 * p])
    transition = torch.stack([1 - stay, stay], -1).log()
    alpha = torch.tensor([0.0, -torch.inf])
    for t, value in enumerate(y):
        law = dist.Normal(torch.tensor([0.0, 2.0]) + t, torch.tensor([1.0, 3.0]))
        alpha = torch.logsumexp(alpha[:, None] + transition, 0) + law.log_prob(value)
    pyro.factor("chain", torch.logsumexp(alpha, 0))


def mixture(y):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu[z], sd), obs=y)


def mixture_by_hand(y):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, sd)), obs=y)


def zero_inflated(y):
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        is_zero = pyro.sample("is_zero", dist.Bernoulli(gate))
        pyro.sample("y", dist.Poisson(torch.where(is_zero == 1, 1e-12, rate)), obs=y)


def zero_inflated_by_hand(y):
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        of_zero = gate.log() + dist.Poisson(torch.tensor(1e-12)).log_prob(y)
        pyro.factor("y", torch.logaddexp(of_zero, torch.log1p(-gate) + dist.Poisson(rate).log_prob(y)))


def hmm(y):
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2, 2) + 4 * torch.eye(2)).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])


def hmm_by_hand(y):
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2, 2) + 4 * torch.eye(2)).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    start = torch.tensor([0.0, -torch.inf])
    pyro.sample("y", dist.DiscreteHMM(start, transition.log(), dist.Normal(mu, 1.0), duration=len(y)), obs=y)


def capture_recapture(y):
    """Cormack-Jolly-Seber, as in Pyro's example: an animal lives on with probability phi, and is seen with rho."""
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    with pyro.plate("animals", len(y), dim=-1):
        z = torch.ones(len(y))
        is_caught = torch.zeros(len(y), dtype=torch.bool)
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=is_caught):
                alive = is_caught.double() * phi * z + (1 - is_caught.double())
                z = pyro.sample(f"z_{t}", dist.Bernoulli(clamp_probs(alive)))
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=y[:, t])
            is_caught |= y[:, t].bool()


def capture_recapture_by_hand(y):
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    total = 0.0
    for history in y.tolist():
        seen = [t for t, value in enumerate(history) if value]
        first, last = seen[0], seen[-1]
        for t in range(first + 1, last + 1):
            total = total + phi.log() + (rho if history[t] else 1 - rho).log()
        unseen = torch.tensor(1.0)
        for _ in range(last + 1, len(history)):
            unseen = 1 - phi + phi * (1 - rho) * unseen
        total = total + unseen.log()
    pyro.factor("y", total)


HISTORIES = torch.tensor([[1.0, 0, 1, 0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0, 1]])
BY_HAND = {
    "mixture": (mixture, mixture_by_hand, Y),
    "zero-inflated": (zero_inflated, zero_inflated_by_hand, torch.tensor([0.0, 0, 0, 3, 0, 1, 4])),
    "hmm": (hmm, hmm_by_hand, 2 * torch.sin(torch.arange(40.0) / 5)),
    "long-chain": (long_chain, long_chain_by_hand, 2 * torch.sin(torch.arange(20.0))),
    "long-chains": (long_chains_in_a_plate, long_chains_by_hand, torch.sin(torch.arange(40.0)).reshape(2, 20)),
    "writes": (chain_that_writes, chain_that_writes_by_hand, torch.arange(10.0) + torch.sin(torch.arange(10.0))),
    "capture-recapture": (capture_recapture, capture_recapture_by_hand, HISTORIES),
}


@pytest.mark.parametrize(("model", "by_hand", "data"), BY_HAND.values(), ids=BY_HAND)
def test_log_joint_and_gradient_are_those_of_the_form_that_is_summed_by_hand(model, by_hand, data):
    data = data.double()
    enumerated, vectors = made(model, data)
    expected, _ = made(by_hand, data)
    vectors.requires_grad_()
    assert enumerated.batched.mode != "loop"
    values, others = enumerated(vectors), expected(vectors)
    torch.testing.assert_close(values, others, rtol=1e-8, atol=1e-8)
    gradients = [torch.autograd.grad(value.sum(), vectors)[0] for value in (values, others)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def scaled_mixture(y, scale, other=None):
    w = pyro.sample("w", dist.Beta(2.0, 2.0))
    with pyro.plate("rows", len(y)), poutine.scale(scale=scale):
        z = pyro.sample("z", dist.Bernoulli(w))
        with poutine.scale(scale=1.0 if other is None else other):
            pyro.sample("y", dist.Normal(4 * z - 2, 1.0), obs=y)


def test_a_scale_acts_on_the_sum():
    log_joint, vectors = made(scaled_mixture, Y, 0.3)
    w = vectors[:, 0].sigmoid()
    terms = [dist.Bernoulli(w).log_prob(k)[:, None] + dist.Normal(4 * k - 2, 1.0).log_prob(Y) for k in torch.eye(2)[0]]
    prior = dist.Beta(2.0, 2.0).log_prob(w) + (w * (1 - w)).log()
    torch.testing.assert_close(log_joint(vectors), prior + 0.3 * torch.logaddexp(*terms).sum(-1))


@pytest.mark.parametrize(
    ("scales", "message"), [((0.3, 0.5), "give them one scale"), ((torch.rand(4), None), "give poutine.scale a single")]
)
def test_scales_that_do_not_act_on_a_sum_as_a_whole_are_refused(scales, message):
    with pytest.raises(ModelError, match=message):
        made(scaled_mixture, Y, *scales)

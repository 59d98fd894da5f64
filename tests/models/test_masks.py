"""Masks of sites: which entries have a density, and which entries of a latent have no posterior."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine

from pyroflows.errors import DataError, ModelError
from pyroflows.models.batching import BatchedModel
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.masks import entry_mask
from pyroflows.models.requirements import check_static, require_flow
from pyroflows.models.structure import describe

MASK = torch.tensor([True, False, True])
NAN = torch.nan


def sites(model, *args):
    return {site.name: site for site in describe(model, args, {}).latents}


# What a mask covers


@pytest.mark.parametrize(
    ("fn", "mask", "expected"),
    [
        (dist.Normal(torch.zeros(3), 1.0), None, None),
        (dist.Normal(torch.zeros(3), 1.0), True, None),
        (dist.Normal(torch.zeros(3), 1.0), False, [False] * 3),
        (dist.Normal(torch.zeros(3), 1.0), torch.tensor(False), [False] * 3),
        (dist.Normal(torch.zeros(3), 1.0), MASK, [True, False, True]),
        (dist.Normal(torch.zeros(3), 1.0).mask(MASK), torch.tensor([True, True, False]), [True, False, False]),
        (dist.Normal(torch.zeros(2, 3), 1.0).to_event(1), torch.tensor([True, False]), [True, False]),
        (dist.Normal(torch.zeros(2, 3), 1.0).mask(MASK).to_event(1), None, [[True, False, True]] * 2),
        (dist.Normal(torch.zeros(2, 3), 1.0).mask(MASK).to_event(1), False, [[False] * 3] * 2),
        (dist.Normal(torch.zeros(2, 1), 1.0), MASK, [[True], [True]]),
    ],
    ids=["none", "true", "false", "tensor-false", "batch", "both", "rows", "in-event", "in-event-off", "wider"],
)
def test_entries_of_a_mask(fn, mask, expected):
    found = entry_mask(fn, mask, fn.batch_shape + fn.event_shape)
    assert (found if found is None else found.tolist()) == expected


def padded(mask=MASK):
    """A walk whose later values are padding, with masked observations."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 2.0, 3.0]))


def imputed(mask=MASK):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor([1.0, NAN, 3.0]), obs_mask=mask)


def flat(mask=MASK):
    """All entries have a likelihood, whatever the mask of the prior is."""
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(mask))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 2.0, 3.0]))


def of_both_kinds():
    """The first entry has a flat prior, nothing depends on the second, the third is not masked."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([False, False, True])).to_event(1))
    pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=torch.tensor(1.0))


def compared():
    """The log joint depends on all entries, but its gradient is zero."""
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(MASK))
        pyro.sample("y", dist.Normal((z > 0).float(), 1.0), obs=torch.ones(3))


def masked_by_a_latent():
    """Which entries have a density depends on a latent, and with it the log joint."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(x > torch.tensor([0.0, 5.0, 0.0])))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.0))


def unused(mask=False):
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(mask))
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def selected():
    """Multiplied by the mask, as hidden states of recurrent models are: the gradient is exactly zero."""
    mask = MASK.float()
    with pyro.plate("rows", 3):
        with poutine.mask(mask=MASK):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(z * mask, 1.0), obs=torch.ones(3))


@pytest.mark.parametrize(
    ("model", "site", "kept", "is_flat"),
    [
        (padded, "z", [True, False, True], False),
        (imputed, "y_unobserved", [False, True, False], False),
        (flat, "z", None, True),
        (lambda: flat(False), "z", None, True),
        (lambda: flat(torch.tensor(False)), "z", None, True),
        (lambda: flat(torch.ones(3, dtype=torch.bool)), "z", None, False),
        (of_both_kinds, "z", [True, False, True], True),
        (compared, "z", None, True),
        (masked_by_a_latent, "z", None, True),
        (unused, "z", [False] * 3, False),
        (lambda: unused(torch.zeros(3, dtype=torch.bool)), "z", [False] * 3, False),
        (selected, "z", [True, False, True], False),
        # A block may hide what depends on a site; a mask of False is a flat prior then.
        (poutine.block(lambda: flat(False), hide=["y"]), "z", None, True),
    ],
    ids=[
        "padded",
        "imputed",
        "flat-in-part",
        "flat",
        "flat-tensor",
        "all-true",
        "both-kinds",
        "compared",
        "by-a-latent",
        "unused",
        "unused-tensor",
        "selected",
        "hidden",
    ],
)
def test_the_two_meanings_of_a_mask(model, site, kept, is_flat):
    torch.manual_seed(0)
    site = sites(model)[site]
    assert (site.kept if site.kept is None else site.kept.tolist()) == kept
    assert site.is_flat == is_flat


def test_a_model_without_masks_runs_once():
    count = 0

    def model():
        nonlocal count
        count += 1
        pyro.sample("z", dist.Normal(0.0, 1.0).mask(True))

    describe(model, (), {})
    assert count == 1


def test_looks_leave_the_generator_alone():
    torch.manual_seed(0)
    describe(padded, (), {})
    first = torch.rand(1)
    torch.manual_seed(0)
    poutine.trace(padded).get_trace()
    assert torch.rand(1) == first


# What is packed: the log joint is that of the model without the entries


def _ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


SUPPORTS = {
    "real": lambda n: dist.Normal(0 * _ones(n), 2.0),
    "positive": lambda n: dist.Gamma(2 * _ones(n), 3.0),
    "interval": lambda n: dist.Uniform(-_ones(n), 3.0),
    "unit": lambda n: dist.Beta(2 * _ones(n), 3.0),
    "tail": lambda n: dist.Pareto(_ones(n), 3.0),
    "log-normal": lambda n: dist.LogNormal(0 * _ones(n), 0.5),
    "vector": lambda n: dist.MultivariateNormal(0 * _ones(n, 2), torch.eye(2, dtype=torch.float64)),
    "simplex": lambda n: dist.Dirichlet(2 * _ones(n, 4)),
    "cholesky": lambda n: dist.LKJCholesky(3, 2 * _ones(n)),
    "ordered": lambda n: dist.TransformedDistribution(
        dist.Normal(0 * _ones(n, 3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ),
    "event": lambda n: dist.HalfNormal(_ones(n, 2)).to_event(1),
}

all_supports = pytest.mark.parametrize("make", SUPPORTS.values(), ids=SUPPORTS)


def _model(make, size, mask):
    def model():
        x = pyro.sample("x", dist.Normal(_ones(), 1.0))
        with pyro.plate("rows", size), poutine.mask(mask=mask):
            pyro.sample("z", make(size))
        pyro.sample("w", dist.Normal(x, 1.0))

    return model


@all_supports
def test_log_joint_is_that_of_the_model_without_the_entries(make):
    masked, cut = _model(make, 3, MASK), _model(make, 2, True)
    layout, small = Layout(describe(masked, (), {})), Layout(describe(cut, (), {}))
    assert layout.dim == small.dim
    torch.manual_seed(0)
    vectors = torch.randn(5, layout.dim, dtype=torch.float64)
    found, expected = LogJoint(masked, (), {}, layout, vectors), LogJoint(cut, (), {}, small, vectors)
    torch.testing.assert_close(found(vectors), expected(vectors))
    values, _ = layout.constrain(vectors)
    torch.testing.assert_close(values["z"][:, MASK], small.constrain(vectors)[0]["z"])
    torch.testing.assert_close(layout.unconstrain(values), vectors)
    layout.check_draws(values)


@pytest.mark.parametrize("name", ["real", "positive", "interval", "unit"])
@pytest.mark.parametrize("size", [(), (2,)], ids=str)
def test_masks_inside_of_events(name, size):
    """As those of rows, whether an event has all entries, or there are several events."""
    make = SUPPORTS[name]
    mask = MASK.expand(*size, 3).clone()
    mask[..., 0] = torch.arange(mask[..., 0].numel()).reshape(size) == 0
    fn = make(3).expand((*size, 3))

    def masked():
        pyro.sample("z", fn.mask(mask).to_event(1))

    def cut():
        pyro.sample("z", make(int(mask.sum())))

    layout, small = Layout(describe(masked, (), {})), Layout(describe(cut, (), {}))
    vectors = torch.randn(5, layout.dim, dtype=torch.float64)
    found, expected = LogJoint(masked, (), {}, layout, vectors), LogJoint(cut, (), {}, small, vectors)
    torch.testing.assert_close(found(vectors), expected(vectors))


def test_nested_plates():
    mask = torch.tensor([[True, False, True], [False, False, True]])

    def model():
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1), poutine.mask(mask=mask):
            pyro.sample("z", dist.Dirichlet(_ones(3)))

    layout = Layout(describe(model, (), {}))
    assert layout.dim == 3 * 2
    vectors = torch.randn(7, layout.dim, dtype=torch.float64)
    values, ladj = layout.constrain(vectors)
    plain, plain_ladj = Layout(describe(lambda: pyro.sample("z", dist.Dirichlet(_ones(3, 3))), (), {})).constrain(
        vectors
    )
    torch.testing.assert_close(values["z"][:, mask], plain["z"])
    torch.testing.assert_close(ladj, plain_ladj)


# Draws of the entries that are left out


def in_a_vector():
    """Runs under vmap alone."""
    z = pyro.sample("z", dist.Normal(torch.tensor([0.0, 5.0, 0.0]), 1.0).mask(MASK).to_event(1))
    pyro.factor("f", -(z[0] ** 2))


def with_a_read():
    """Runs draw by draw."""
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Normal(torch.tensor([0.0, 5.0, 0.0]), 1.0).mask(MASK))
    pyro.factor("f", -(z[..., 0].item() ** 2) * torch.ones(()))


@pytest.mark.parametrize(("model", "mode"), [(padded, "plate"), (in_a_vector, "vmap"), (with_a_read, "loop")])
@pytest.mark.filterwarnings("ignore:the model runs draw by draw")
def test_entries_are_drawn_in_each_mode(model, mode):
    structure = describe(model, (), {})
    vectors = torch.randn(400, Layout(structure).dim)
    values, _ = Layout(structure).constrain(vectors)
    torch.manual_seed(0)
    batched = BatchedModel(model, (), {}, values)
    drawn = batched.filling(values, structure.kept)
    assert (batched.mode, drawn.mode) == (mode, mode)
    found = drawn.in_chunks(values, 400).values
    assert torch.equal(found["z"][:, MASK], values["z"][:, MASK])
    left_out = found["z"][:, 1] - (values["loc"] if model is padded else 5.0)
    assert abs(left_out.mean()) < 4 / 400**0.5 and left_out.std() == pytest.approx(1.0, abs=4 / 800**0.5)


# What is refused


def test_a_posterior_of_nothing_is_refused():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(False))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ModelError, match=r"all latents are masked.*\(z\)"):
        require_flow(describe(model, (), {}))


@pytest.mark.parametrize("other", [~MASK, torch.ones(3, dtype=torch.bool), False])
def test_another_mask_is_another_model(other):
    check_static(describe(padded, (MASK,), {}), describe(padded, (MASK.clone(),), {}))
    for first, second in ((MASK, other), (other, MASK)):
        with pytest.raises(ModelError, match="'z' is masked at other entries"):
            check_static(describe(padded, (first,), {}), describe(padded, (second,), {}))


# NaN


def observe(fn, y, **options):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", fn(a), obs=y, **options)

    return model


def pair(a):
    return torch.stack([a, a], -1)


Y = torch.tensor([1.5, NAN, -0.5])
PAIRS = torch.tensor([[1.5, 0.0], [NAN, 2.0], [NAN, NAN]])

HIDDEN = {
    "nan-masked": observe(lambda a: dist.NanMaskedNormal(a, 1.0), Y),
    "nan-masked-vector": observe(lambda a: dist.NanMaskedMultivariateNormal(pair(a), torch.eye(2)), PAIRS),
    "mask": observe(lambda a: dist.Normal(a, 1.0).mask(~Y.isnan()), Y),
    "obs-mask": observe(lambda a: dist.Normal(a, 1.0), Y, obs_mask=~Y.isnan()),
}


@pytest.mark.parametrize("model", HIDDEN.values(), ids=HIDDEN)
def test_nan_that_does_not_count_is_accepted(model):
    structure = describe(model, (), {})
    require_flow(structure)
    layout = Layout(structure)
    vectors = torch.randn(4, layout.dim, requires_grad=True)
    log_joint = LogJoint(model, (), {}, layout, vectors.detach())
    value = log_joint(vectors)
    (gradient,) = torch.autograd.grad(value.sum(), vectors)
    assert value.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (observe(lambda a: dist.Normal(a, 1.0), Y), r"'y' has 1 NaN of 3 values, at \(1,\): "),
        (observe(lambda a: dist.Normal(a, 1.0).mask(Y.isnan()), Y), r"1 NaN of 3 values, at \(1,\)"),
        (
            observe(lambda a: dist.Normal(pair(a), 1.0).to_event(1), PAIRS),
            r"3 NaN.*\(1, 0\), \(2, 0\), \(2, 1\): ",
        ),
        (
            observe(lambda a: dist.Normal(a, 1.0), torch.full((9,), NAN)),
            r"9 NaN of 9 values, at \(0,\), \(1,\), \(2,\), \.\.\.: ",
        ),
    ],
    ids=["plain", "mask-elsewhere", "vectors", "many"],
)
def test_nan_that_counts_is_refused_with_its_place(model, message):
    with pytest.raises(DataError, match=message):
        require_flow(describe(model, (), {}))

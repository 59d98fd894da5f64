"""Distillation: the loss is the KL divergence, the student comes to its teacher, and what cannot be is refused."""

from functools import partial
from itertools import pairwise

import matplotlib
import pyro
import pytest
import torch
from torch import nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, constraints, kl_divergence

import pyroflows as pf
from pyroflows.errors import DataError, DivergedError, OptionError, ShapeError
from pyroflows.fitting.closed_form import gaussian_kl, has_closed_form
from pyroflows.fitting.regression import Regression, draw_stages, same_law
from pyroflows.flows import IAF, MAF, Flow, Gaussian, RealNVP
from pyroflows.transforms import Autoregressive, Elementwise, Permutation, Planar, Standardize
from pyroflows.transforms.univariate import Affine
from tests.transforms.registry import perturb

matplotlib.use("Agg")
small = {"num_layers": 2, "hidden_dims": (16,)}
quick = {"num_steps": 60, "warm_start": 60, "batch_size": 64, "seed": 0, "progress_bar": False}


def disturbed(flow, scale=0.5, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return perturb(flow, scale)


def affine(dim, loc, log_scale):
    """Independent Gaussians."""
    init = torch.stack([torch.as_tensor(loc), torch.as_tensor(log_scale)], -1).double()
    return Flow([Elementwise(dim, Affine(None, None), init=init)]).double()


def log_weights(student, teacher, count=20_000):
    with torch.no_grad():
        x, log_q = student.rsample_and_log_prob((count,))
        return teacher.log_prob(x) - log_q


# The closed form


def test_closed_form_is_the_kl_divergence_of_gaussians():
    q = affine(3, [0.0, 1.0, -2.0], [0.0, 0.5, -1.0])
    p = affine(3, [0.5, 1.0, 0.0], [-0.3, 0.2, 0.4])
    z = torch.randn(7, 3, dtype=torch.float64)
    _, loss, found = gaussian_kl(q(), p(), z)

    def normals(flow):
        loc, log_scale = flow.transform.layers[0].parameters_of().detach().unbind(-1)
        return Independent(Normal(loc, log_scale.exp()), 1)

    expected = kl_divergence(normals(q), normals(p))
    torch.testing.assert_close(found, -expected.expand(7))
    torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_closed_form_has_the_mean_of_sampled_log_ratios_and_less_variance(num_stages):
    q = disturbed(Flow([Autoregressive(4, hidden_dims=(16,)) for _ in range(num_stages)]).double(), 0.3, seed=1)
    p = disturbed(Flow([Autoregressive(4, hidden_dims=(16,)).inv]).double(), 0.3, seed=2)
    torch.manual_seed(3)
    z = torch.randn(20_000, 4, dtype=torch.float64)
    x, _, minus_kl = gaussian_kl(q(), p(), z)
    sampled = (p().log_prob(x) - q().transport(z)[1]).detach()
    difference = sampled - minus_kl
    assert difference.mean().abs() < 4 * difference.std() / len(z) ** 0.5
    assert minus_kl.std() < sampled.std()
    assert minus_kl.mean() < -0.05  # there is something to measure


def test_closed_form_knows_locations_and_scales_of_bases():
    loc, scale = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5])
    q = Flow([Autoregressive(2)], base=pyro.distributions.Normal(loc, scale).to_event(1))
    p = Flow([Autoregressive(2).inv])
    _, _, found = gaussian_kl(q(), p(), q.base().sample((5,)))
    torch.testing.assert_close(found, -kl_divergence(Normal(loc, scale), Normal(0.0, 1.0)).sum().expand(5))


def test_closed_form_vanishes_with_its_gradient_at_the_teacher():
    p = disturbed(Flow([Autoregressive(3, hidden_dims=(16,))]).double())
    _, loss, minus_kl = gaussian_kl(p(), p(), torch.randn(7, 3, dtype=torch.float64))
    assert minus_kl.abs().max() < 1e-12
    assert max(g.abs().max() for g in torch.autograd.grad(loss, list(p.parameters()))) < 1e-7


def test_regularization_adds_squared_log_ratios_of_scales():
    q, p = affine(2, [0.0, 0.0], [0.5, -0.5]), affine(2, [0.0, 0.0], [0.0, 1.0])
    z = torch.randn(5, 2, dtype=torch.float64)
    (_, plain, kl), (_, regularized, same_kl) = gaussian_kl(q(), p(), z), gaussian_kl(q(), p(), z, 4.0)
    assert (regularized - plain).item() == pytest.approx(4 * (0.5**2 + 1.5**2))
    assert torch.equal(kl, same_kl)


def test_closed_form_needs_one_order_affine_maps_and_normal_bases():
    up, down = Autoregressive(3), Autoregressive(3, order=[2, 1, 0])
    standardize = Standardize(3)
    assert has_closed_form(Flow([up, Autoregressive(3)]), Flow([up.inv, standardize]))
    assert has_closed_form(Flow([Elementwise(3)]), Flow([down]))
    assert not has_closed_form(Flow([up]), Flow([down]))
    assert not has_closed_form(Flow([up, down]), Flow([up]))
    assert not has_closed_form(Flow([up]), Flow([Autoregressive(3, "spline").inv]))
    assert not has_closed_form(Flow([up], base="student_t"), Flow([up]))
    assert not has_closed_form(Flow([up]), Flow([Planar(3)]))
    assert not has_closed_form(Flow([up]), MultivariateNormal(torch.zeros(3), torch.eye(3)))


# Following the teacher's draws


def test_regression_vanishes_for_a_student_that_is_the_teacher():
    teacher = disturbed(MAF(4, 3, (16,)).double())
    stages = draw_stages(teacher, 50, None)
    torch.testing.assert_close(stages[-1], teacher.transform(stages[0]))
    found = Regression(teacher, teacher, stages, None, 20)
    (index,) = found.draw()
    assert index.shape == (20,) and index.max() < 50
    assert found.end_to_end(index).abs().max() < 1e-12
    assert found.layer_by_layer(index).abs().max() < 1e-12


def test_regression_counts_errors_in_standard_deviations():
    teacher = affine(2, [1.0, -1.0], [0.0, 1.0])
    student = affine(2, [4.0, -1.0], [0.0, 1.0])
    torch.manual_seed(0)
    stages = draw_stages(teacher, 1000, None)
    errors = Regression(student, teacher, stages, None, 20).end_to_end(torch.arange(5))
    low, high = stages[-1][:, 0].sort().values[[int(0.16 * 999), int(0.84 * 999)]]
    scaled = 3.0 / ((high - low) / 2)
    torch.testing.assert_close(errors, (2 * (torch.sqrt(1 + scaled**2) - 1)).expand(5))


def test_layers_are_followed_one_by_one_where_their_orders_agree():
    teacher = disturbed(MAF(4, 3, (16,)))
    teacher.standardization.load_state_dict(Standardize(4).state_dict())
    stages = draw_stages(teacher, 50, None)
    index = torch.arange(50)
    same, shorter = IAF(4, 3, (16,)), IAF(4, 2, (16,))
    by_layer = Regression(same, teacher, stages, None, 20)
    # At its start the student is the identity: each layer misses by what the teacher's layer does.
    expected = sum(_error(before, after) for before, after in pairwise(stages))
    torch.testing.assert_close(by_layer.layer_by_layer(index), expected)
    end_to_end = Regression(shorter, teacher, stages, None, 20)
    torch.testing.assert_close(end_to_end.layer_by_layer(index), _error(stages[0], stages[-1]))
    other_orders = Flow([Autoregressive(4, order=[1, 0, 3, 2]) for _ in range(3)])
    for student in (other_orders, RealNVP(4, 3)):
        found = Regression(student, teacher, stages, None, 20).layer_by_layer(index)
        torch.testing.assert_close(found, _error(stages[0], stages[-1]))


def _error(found, expected):
    low, high = expected.sort(0).values[[int(0.16 * 49), int(0.84 * 49)]]
    scaled = (found - expected) / ((high - low) / 2)
    return 2 * (torch.sqrt(1 + scaled**2) - 1).sum(-1)


def test_student_takes_location_and_scale_of_a_teacher_that_has_them():
    teacher, student = MAF(2, **small), IAF(2, **small)
    teacher.adapt(torch.tensor([[1.0, 10.0], [3.0, 50.0]]))
    pf.distill(student, teacher, **quick)
    for name in ("loc", "scale"):
        assert torch.equal(*(getattr(flow.transform.layers[-1], name) for flow in (student, teacher)))
    again = IAF(2, **small)
    again.load_state_dict(student.state_dict())
    x = student().sample((5,))
    torch.testing.assert_close(again().log_prob(x), student().log_prob(x))


def test_laws_are_one_if_draws_are():
    normal = Normal(torch.zeros(3), 1.0)
    assert same_law(normal, Normal(torch.zeros(3), 1.0))
    assert not same_law(normal, Normal(torch.zeros(3), 1.1))
    assert not same_law(normal, Normal(torch.zeros(4), 1.0))


# Fits


@pytest.mark.parametrize("estimator", ["auto", *(pytest.param(e, marks=pytest.mark.slow) for e in ("total", "path"))])
def test_student_comes_to_its_teacher(estimator):
    teacher = disturbed(MAF(4, **small))
    student = IAF(4, **small)
    torch.manual_seed(1)
    start = -log_weights(student(), teacher()).mean()
    fit = pf.distill(student, teacher, num_steps=500, warm_start=500, estimator=estimator, seed=0, progress_bar=False)
    assert fit.kl < 0.03 < start / 10
    fresh = -log_weights(student(), teacher())
    assert abs(fresh.mean() - fit.kl) < 4 * (fresh.var() / len(fresh) + fit.kl_se**2) ** 0.5
    assert fit.kl_se == pytest.approx(fresh.std().item() / (40 * 256) ** 0.5, rel=0.5)
    assert fit.history.num_steps == 500
    assert fit.history["kl"][-50:].mean() < fit.history["kl"][:5].mean()


def test_closed_form_is_taken_where_it_can_be():
    teacher = disturbed(Flow([Autoregressive(3, hidden_dims=(16,)).inv]))
    fits = {
        name: pf.distill(
            Flow([Autoregressive(3, hidden_dims=(16,)) for _ in range(2)]), teacher, estimator=name, **quick
        )
        for name in ("auto", "closed_form", "path")
    }
    errors = {name: fit.kl_se for name, fit in fits.items()}
    assert errors["auto"] != errors["path"] and fits["auto"].kl < 0.2


def test_both_take_the_context():
    teacher = disturbed(MAF(2, context_dim=1, **small))
    student = IAF(2, context_dim=1, **small)
    contexts = torch.linspace(-2, 2, 41)[:, None]
    fit = pf.distill(student, teacher, contexts, num_steps=600, warm_start=600, seed=0, progress_bar=False)
    assert fit.kl < 0.03
    torch.manual_seed(1)
    apart = log_weights(student(contexts[0]), teacher(contexts[40]))
    for row in (0, 20, 40):
        assert -log_weights(student(contexts[row]), teacher(contexts[row])).mean() < 0.06 < -apart.mean()


def test_a_mixture_as_teacher_at_a_context():
    """It has no base in common with the student, which takes location and scale from its draws."""
    teacher = disturbed(pf.flows.Mixture([MAF(2, context_dim=1, **small), MAF(2, **small)]), 0.2)
    contexts = torch.linspace(-2, 2, 41)[:, None]
    student = IAF(2, context_dim=1, **small)
    fit = pf.distill(student, teacher, contexts, num_steps=200, seed=0, progress_bar=False)
    assert student.is_adapted and fit.kl < 0.1


def test_any_distribution_can_be_the_teacher():
    covariance = torch.tensor([[4.0, 1.5], [1.5, 1.0]])
    teacher = MultivariateNormal(torch.tensor([100.0, -3.0]), covariance)
    student = Gaussian(2)
    fit = pf.distill(student, teacher, num_steps=800, seed=0, progress_bar=False)
    assert fit.kl < 0.005


def test_support_of_teacher_and_student():
    teacher = disturbed(MAF(2, support=constraints.positive, **small), 0.3)
    fit = pf.distill(IAF(2, support=constraints.positive, **small), teacher, seed=0, num_steps=300, progress_bar=False)
    assert fit.kl < 0.05
    with pytest.raises(DataError, match=r"\d+ of 64 draws of the student are outside.*GreaterThan"):
        pf.distill(IAF(2, **small), teacher, **quick)


@pytest.mark.slow
def test_regression_keeps_the_variance_that_reverse_kl_loses():
    teacher = disturbed(MAF(8, 3, (32,)), 0.5)
    sds = {}
    for weight in (0.0, 2.0):
        student = IAF(8, 3, (8,))  # too small to be exact
        pf.distill(student, teacher, num_steps=600, regression=weight, seed=0, progress_bar=False)
        torch.manual_seed(1)
        sds[weight] = student().sample((20_000,)).quantile(0.95, 0) - student().sample((20_000,)).quantile(0.05, 0)
    torch.manual_seed(1)
    expected = teacher().sample((20_000,)).quantile(0.95, 0) - teacher().sample((20_000,)).quantile(0.05, 0)
    loss = {weight: (sd / expected).log().mean().item() for weight, sd in sds.items()}
    assert loss[0.0] < -0.01
    assert abs(loss[2.0]) < abs(loss[0.0]) / 2


def test_penalty_sees_draws_and_their_rows():
    contexts = torch.tensor([[-1.0], [1.0]])
    teacher = MAF(2, context_dim=1, **small)
    seen = []

    def penalty(x, rows):
        seen.append((x.shape, rows.shape, rows.max().item() < 2))
        return 50.0 * ((x[:, 0] - 3 * contexts[rows, 0]) ** 2).mean()

    student = IAF(2, context_dim=1, **small)
    options = {**quick, "num_steps": 300, "regression": 0.0, "compile": "none"}
    fit = pf.distill(student, teacher, contexts, penalty=penalty, **options)
    assert set(seen) == {((64, 2), (64,), True)} and len(seen) == 301  # once to see what it returns
    means = student(contexts).sample((1000,))[..., 0].mean(0)
    assert means[0] < -2 and means[1] > 2
    assert (fit.history["loss"] > fit.history["kl"]).all()


def test_penalty_without_context_gets_no_rows():
    rows_seen = set()
    teacher = MAF(2, **small)

    def penalty(x, rows):
        rows_seen.add(rows)
        return x.sum() * 0

    pf.distill(IAF(2, **small), teacher, penalty=penalty, compile="none", **quick)
    assert rows_seen == {None}


def test_without_a_warm_start_the_student_starts_where_it_stands():
    teacher = disturbed(MAF(3, **small))
    student = disturbed(IAF(3, **small), 0.1)
    before = [p.detach().clone() for p in student.parameters()]
    fit = pf.distill(student, teacher, **{**quick, "num_steps": 1, "warm_start": 0, "regression": 0.0})
    assert not student.is_adapted
    assert all((a - b).abs().max() < 0.01 for a, b in zip(before, student.parameters(), strict=True))
    assert fit.history.num_steps == 1


def test_teacher_is_left_as_it_is():
    teacher = disturbed(MAF(3, **small))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    pf.distill(IAF(3, **small), teacher, **quick)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_seed_makes_it_reproducible():
    teacher = disturbed(MAF(3, **small))
    state = torch.get_rng_state()
    fits = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            student = IAF(3, **small)
        fits.append(pf.distill(student, teacher, **quick))
    assert fits[0].kl == fits[1].kl
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("compile", ["trace", "none"])
def test_compiled_or_not(compile):
    teacher = disturbed(MAF(3, **small))
    fit = pf.distill(IAF(3, **small), teacher, compile=compile, **quick)
    assert fit.history["kl"][-1] < fit.history["kl"][0] + 0.1


def test_result_prints_and_plots():
    fit = pf.distill(IAF(3, **small), disturbed(MAF(3, **small)), **quick)
    assert repr(fit).startswith("Distillation(60 steps; KL(student || teacher) = ")
    assert "for each of 3 dimensions" in repr(fit)
    (axis,) = fit.plot().axes
    assert axis.get_ylabel() == "KL(student || teacher) (nats)"


class Unscored(Distribution):
    """Draws and cannot score."""

    event_shape, batch_shape = torch.Size([2]), torch.Size()
    support = constraints.real_vector
    arg_constraints = {}  # noqa: RUF012

    def __init__(self):
        pass

    def sample(self, shape=torch.Size()):  # noqa: B008
        return torch.randn(*shape, 2)


class Undrawn(Normal):
    def __init__(self):
        super().__init__(torch.zeros(2), 1.0)

    event_shape, batch_shape = torch.Size([2]), torch.Size()

    def log_prob(self, x):
        return super().log_prob(x).sum(-1)

    def sample(self, shape=torch.Size()):  # noqa: B008
        raise NotImplementedError


class Detached(MultivariateNormal):
    def log_prob(self, x):
        return super().log_prob(x).detach()


class Cut(MultivariateNormal):
    def log_prob(self, x):
        return torch.where(x[..., 0] > 0, super().log_prob(x), -torch.inf)


def student_of_two():
    return IAF(2, **small)


def conditional(dim=2, context_dim=1):
    return MAF(dim, context_dim=context_dim, **small)


REFUSED = {
    "no flow as student": (OptionError, "the student must be a pyroflows.Flow", lambda: (nn.Linear(2, 2), MAF(2))),
    "no parameters": (OptionError, "no parameters to train", lambda: (Flow([Permutation([1, 0])]), MAF(2))),
    "no gradients": (
        OptionError,
        "carry no gradients.*mixture",
        lambda: (pf.flows.Mixture([Gaussian(2), Gaussian(2)], torch.zeros(2)), MAF(2)),
    ),
    "no gradients at a context": (
        OptionError,
        "carry no gradients.*mixture",
        lambda: (pf.flows.Mixture([conditional()]), conditional(), torch.zeros(3, 1)),
    ),
    "no teacher": (OptionError, "must be a flow or a distribution, got Linear", lambda: (IAF(2), nn.Linear(2, 2))),
    "cannot score": (OptionError, "cannot score.*NotImplementedError", lambda: (student_of_two(), Unscored())),
    "cannot draw": (OptionError, "needs draws of the teacher.*warm_start=0", lambda: (student_of_two(), Undrawn())),
    "event shapes": (ShapeError, r"one event shape, but have \(2,\) and \(3,\)", lambda: (IAF(2), MAF(3))),
    "batch of teachers": (ShapeError, r"batch shape \(2,\).*to_event", lambda: (IAF(2), Normal(torch.zeros(2), 1.0))),
    "batch of teachers of vectors": (
        ShapeError,
        r"batch shape \(5,\).*to_event",
        lambda: (IAF(2), MultivariateNormal(torch.zeros(5, 2), torch.eye(2))),
    ),
    "context of teacher only": (
        ShapeError,
        "student has context size 0 and the teacher context size 1.*teacher\\(context\\)",
        lambda: (IAF(2), conditional(), torch.zeros(3, 1)),
    ),
    "context of student only": (
        ShapeError,
        "student has context size 1 and the teacher context size 0",
        lambda: (IAF(2, context_dim=1), MAF(2), torch.zeros(3, 1)),
    ),
    "no context": (ShapeError, "take a context of size 1: give rows", lambda: (IAF(2, context_dim=1), conditional())),
    "needless context": (ShapeError, "take no context, but got one", lambda: (IAF(2), MAF(2), torch.zeros(3, 1))),
    "context of another size": (
        ShapeError,
        "context has 2 columns",
        lambda: (IAF(2, context_dim=1), conditional(), torch.zeros(3, 2)),
    ),
    "context with NaN": (
        DataError,
        "context has NaN.*row 1",
        lambda: (IAF(2, context_dim=1), conditional(), torch.tensor([[0.0], [torch.nan]])),
    ),
    "empty context": (
        DataError,
        "the context has no rows",
        lambda: (IAF(2, context_dim=1), conditional(), torch.zeros(0, 1)),
    ),
    "support of teacher": (
        DataError,
        r"of 64 draws of the student are outside the support of the teacher.*GreaterThan",
        lambda: (student_of_two(), pyro.distributions.Exponential(torch.ones(2)).to_event(1)),
    ),
    "support of student": (
        DataError,
        r"draws of the teacher are outside the support of the student",
        lambda: (IAF(2, support=constraints.unit_interval), pyro.distributions.Exponential(torch.ones(2)).to_event(1)),
    ),
    "no density at draws": (
        DataError,
        "of 64 draws of the student.*or have no finite density there",
        lambda: (student_of_two(), Cut(torch.zeros(2), torch.eye(2))),
    ),
    "no gradient of teacher": (
        OptionError,
        "log_prob carries no gradient",
        lambda: (student_of_two(), Detached(torch.zeros(2), torch.eye(2))),
    ),
    "dtype of a distribution": (
        OptionError,
        "one dtype",
        lambda: (student_of_two(), MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())),
    ),
    "dtypes": (OptionError, "one dtype and device", lambda: (IAF(2), MAF(2).double())),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    error, message, make = REFUSED[case]
    with pytest.raises(error, match=message):
        pf.distill(*make(), **quick)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"warm_start": -1}, "warm_start must be at least 0"),
        ({"regression": -1.0}, "regression must be a weight"),
        ({"estimator": "iwae"}, 'must be "auto", "total", "path" or "closed_form"'),
        ({"estimator": "closed_form"}, "no closed form for this student and teacher"),
        ({"regularization": 4.0}, "only with the closed form"),
        ({"compile": "yes"}, "compile must be one of"),
    ],
    ids=str,
)
def test_options_outside_their_range(options, message):
    with pytest.raises(OptionError, match=message):
        pf.distill(IAF(2, **small), MAF(2, **small), **{**quick, **options})


def test_a_fit_that_diverges_leaves_the_last_good_state():
    teacher = disturbed(MAF(2, **small))
    student = IAF(2, **small)
    calls = iter(range(1000))

    def penalty(x, rows):
        return x.sum() * (torch.nan if next(calls) > 30 else 0.0)

    with pytest.raises(DivergedError, match="last good state"):
        pf.distill(student, teacher, penalty=penalty, compile="none", **{**quick, "num_steps": 200})
    assert student().sample((10,)).isfinite().all()


@pytest.mark.parametrize(
    ("penalty", "got"),
    [
        (lambda x, rows: x.sum(-1), r"a tensor of shape \(64,\)"),
        (lambda x, rows: None, "None"),
        (lambda x, rows: x.sum() * torch.nan, "nan"),
    ],
)
def test_a_penalty_must_be_a_finite_scalar(penalty, got):
    with pytest.raises(OptionError, match=f"penalty must map draws .*finite scalar tensor, got .*{got}"):
        pf.distill(IAF(2, **small), MAF(2, **small), penalty=penalty, **quick)


def test_a_slow_student_is_told():
    with pytest.warns(UserWarning, match="draws dimension by dimension.*swapped"):
        pf.distill(MAF(2, **small), disturbed(IAF(2, **small)), **{**quick, "num_steps": 1, "warm_start": 1})


@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_trained_student_is_not_overwritten_by_an_untrained_teacher(context_dim):
    teacher, student = (make(2, context_dim=context_dim, **small) for make in (RealNVP, IAF))
    teacher = disturbed(teacher)
    before = [parameter.clone() for parameter in teacher.parameters()]
    with pytest.raises(OptionError, match=r"they are swapped, since the call is distill\(student, teacher\)"):
        pf.distill(teacher, student, torch.randn(99, 2) if context_dim else None, **quick)
    assert all(torch.equal(p, q) for p, q in zip(before, teacher.parameters(), strict=True))


def test_swapped_flows_with_bounds_are_told():
    teacher, student = (make(2, support=constraints.positive, **small) for make in (RealNVP, IAF))
    with pytest.raises(OptionError, match=r"they are swapped.*give the teacher's law: distill\(student, teacher\(\)\)"):
        pf.distill(disturbed(teacher), student, **quick)
    # This is how to go on deliberately.
    assert pf.distill(teacher, student(), **{**quick, "num_steps": 1, "warm_start": 0}).history.num_steps == 1


def test_a_student_of_conditional_couplings_is_compiled():
    """TorchScript's optimiser breaks this program, which then runs as it is; a warning would fail here."""
    teacher, student = MAF(3, context_dim=2), RealNVP(3, num_layers=2, hidden_dims=(8,), context_dim=2)
    pf.distill(student, teacher, torch.randn(99, 2), **{**quick, "num_steps": 2, "warm_start": 2})


def test_unknown_options_raise():
    with pytest.raises(TypeError, match="temperature"):
        pf.distill(IAF(2), MAF(2), temperature=1.0)


@pytest.mark.slow
def test_sequences():
    length = 12
    conv = partial(Autoregressive, length, conditioner="causal_conv", hidden_dims=(8, 8), context_dim=(1, length))
    teacher = disturbed(Flow([conv().inv]), 0.5)
    student = Flow([conv(), conv()])
    contexts = torch.randn(20, 1, length)
    fit = pf.distill(
        student, teacher, contexts, num_steps=300, warm_start=300, batch_size=64, seed=0, progress_bar=False
    )
    assert fit.kl < 0.1
    x = student(contexts).sample()
    assert x.shape == (20, length)

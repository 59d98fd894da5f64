"""Flows of angles: densities on circles and tori, beside real columns, as likelihood and prior, and in fits."""

import copy
import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.errors import DataError, OptionError
from pyroflows.transforms import (
    LU,
    ActNorm,
    Autoregressive,
    Compose,
    Coupling,
    Elementwise,
    Multiscale,
    Permutation,
    Planar,
)
from tests.transforms.registry import perturb

PI = math.pi
CIRCULAR = pf.constraints.circular
MIXED = constraints.cat([CIRCULAR, constraints.real, CIRCULAR, constraints.positive], dim=-1)
QUIET = {"seed": 0, "progress_bar": False}

both_kinds = pytest.mark.parametrize("autoregressive", [False, True], ids=["coupling", "autoregressive"])


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    torch.manual_seed(0)


def bent(dim=2, noise=0.3, num_layers=3, **options):
    flow = pf.flows.CircularNSF(dim, num_layers=num_layers, hidden_dims=(16, 16), **options).double()
    return perturb(flow, noise)


def cells(num):
    """Middles of the cells of a grid on the torus."""
    middles = 2 * PI * (torch.arange(num, dtype=torch.float64) + 0.5) / num - PI
    return torch.cartesian_prod(middles, middles), (2 * PI / num) ** 2


# The density


def test_starts_at_the_uniform_law():
    x = PI * (2 * torch.rand(50, 3) - 1)
    torch.testing.assert_close(pf.flows.CircularNSF(3)().log_prob(x), torch.full((50,), -3 * math.log(2 * PI)))


@both_kinds
def test_density_integrates_to_one_and_is_that_of_the_draws(autoregressive):
    q = bent(autoregressive=autoregressive)()
    with torch.no_grad():
        points, area = cells(400)
        masses = q.log_prob(points).exp() * area
        assert abs(masses.sum() - 1) < 1e-3
        draws = q.sample((20_000,))
        assert CIRCULAR.check(draws).all()
        row, column = ((draws + PI) / (2 * PI) * 8).long().clamp(0, 7).T
        counts = torch.bincount(8 * row + column, minlength=64)
        expected = masses.reshape(8, 50, 8, 50).sum((1, 3)).flatten() * len(draws)
        # A chi-squared variable of 63 degrees of freedom, at five standard deviations.
        assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * math.sqrt(2 * 63)


@both_kinds
@pytest.mark.parametrize("base", [None, "von mises"])
def test_density_is_continuous_across_the_cut(autoregressive, base):
    """At the cut of each angle, whatever the others are: through the splines, and through the conditioners."""
    law = dist.VonMises(torch.tensor([1.0, 3.0, -2.0]), torch.tensor([2.0, 1.0, 3.0])).to_event(1)
    q = bent(3, noise=0.5, autoregressive=autoregressive, base=law if base else None)()
    x = PI * (2 * torch.rand(100, 3, dtype=torch.float64) - 1)
    for j in range(3):
        above, below = x.clone(), x.clone()
        above[:, j], below[:, j] = PI - 1e-10, 1e-10 - PI
        values = q.log_prob(above)
        torch.testing.assert_close(values, q.log_prob(below), rtol=0, atol=1e-6)
        for end in (PI, -PI):
            at = x.clone()
            at[:, j] = end
            torch.testing.assert_close(q.log_prob(at), values, rtol=0, atol=1e-6)
        assert values.std() > 0.3


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_scores_and_latents_agree(autoregressive, dtype):
    flow = bent(4, autoregressive=autoregressive, context_dim=2).to(dtype)
    q = flow(torch.randn(2, dtype=dtype))
    x, log_q = q.rsample_and_log_prob((200,))
    z = q.latent(x)
    assert CIRCULAR.check(x).all() and CIRCULAR.check(z).all()
    torch.testing.assert_close(
        q.log_prob(x.detach().clone()), log_q, rtol=0, atol=1e-2 if dtype == torch.float32 else 1e-9
    )
    again = q.transport(z)[0]
    torch.testing.assert_close(again.cos(), x.cos(), rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)
    torch.testing.assert_close(again.sin(), x.sin(), rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9)


def test_von_mises_is_exact():
    """A shift moves the location; the identity leaves the base."""
    law = dist.VonMises(torch.tensor([1.0, -3.0]), torch.tensor([2.0, 40.0])).to_event(1)
    spline = pf.transforms.univariate.CircularSpline()
    init = torch.zeros(2, spline.num_params)
    init[:, -1] = torch.tensor([2.0, -20.0])
    q = pf.Flow([Elementwise(2, spline, init=init)], base=law)()
    x = PI * (2 * torch.rand(100, 2) - 1)
    expected = dist.VonMises(torch.tensor([3.0, -23.0]), torch.tensor([2.0, 40.0])).to_event(1)
    torch.testing.assert_close(q.log_prob(x), expected.log_prob(x), rtol=1e-5, atol=2e-4)
    assert not q.has_rsample and CIRCULAR.check(q.sample((100,))).all()


# Angles beside other columns


@both_kinds
def test_mixed_columns(autoregressive):
    flow = pf.flows.CircularNSF(4, num_layers=2, hidden_dims=(16,), support=MIXED, autoregressive=autoregressive)
    base = flow()
    assert base.support.check(perturb(flow, 0.3)().sample((500,))).all()
    phi = torch.randn(600)
    x = torch.stack([pf.constraints.wrapped(phi + 3), 100 + 7 * phi + torch.randn(600), phi * 0, phi.exp()], -1)
    x[:, 2] = PI * (2 * torch.rand(600) - 1)
    before = flow().log_prob(x).mean()
    pf.fit_density(flow, x, max_epochs=3, **QUIET)
    # A circle has no location and scale; the other columns are standardised behind the bijection onto their support.
    loc, scale = flow.standardization.loc, flow.standardization.scale
    assert loc[[0, 2]].tolist() == [0, 0] and scale[[0, 2]].tolist() == [1, 1]
    torch.testing.assert_close(loc[[1, 3]], torch.stack([x[:, 1], x[:, 3].log()], -1).mean(0), rtol=0.1, atol=0.2)
    assert flow().log_prob(x).mean() > before + 10
    turned = x.clone()
    turned[0, 0], turned[1, 0] = PI, -PI
    turned[1, 1:] = turned[0, 1:]
    a, b = flow().log_prob(turned)[:2]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_mixed_density_integrates_to_one():
    support = constraints.cat([CIRCULAR, constraints.positive], dim=-1)
    flow = bent(support=support)
    angle = 2 * PI * (torch.arange(200, dtype=torch.float64) + 0.5) / 200 - PI
    log_y = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    points = torch.cartesian_prod(angle, log_y)
    with torch.no_grad():
        log_q = flow().log_prob(torch.stack([points[:, 0], points[:, 1].exp()], -1)) + points[:, 1]
    assert abs(log_q.exp().sum() * (2 * PI / 200) * (18 / 1000) - 1) < 1e-3


def test_blocks_are_a_base_that_moves_with_its_flow():
    angles = dist.VonMises(torch.zeros(2), torch.ones(2)).to_event(1)
    base = pf.flows.Blocks([angles, dist.StudentT(torch.full((1,), 4.0)).to_event(1)])
    x = base.sample((3, 5))
    expected = angles.log_prob(x[..., :2]) + dist.StudentT(4.0).log_prob(x[..., 2])
    torch.testing.assert_close(base.log_prob(x), expected)
    assert not base.has_rsample and base.expand([4]).sample().shape == (4, 3)
    columns = constraints.cat([CIRCULAR, constraints.real], dim=-1, lengths=[2, 1])
    flow = pf.flows.CircularNSF(3, num_layers=2, support=columns, base=base).double()
    assert flow().sample((7,)).dtype == flow().log_prob(x.double()).dtype == torch.float64
    with pytest.raises(pf.ShapeError, match="one batch shape"):
        pf.flows.Blocks([dist.Normal(0.0, 1.0)])


# What is refused


@pytest.mark.parametrize(
    "base",
    [
        dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1),
        dist.Uniform(torch.full((2,), -PI), torch.full((2,), PI)).to_event(1),
        "student_t",
    ],
    ids=str,
)
def test_base_without_period_is_refused(base):
    with pytest.raises(OptionError, match="same density after a turn"):
        pf.flows.CircularNSF(2, base=base)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pf.Flow([Elementwise(2, "circular_spline"), Planar(2)]), r"layer 1 \(Planar\) takes no angles"),
        (lambda: pf.Flow([Planar(2), Elementwise(2, "circular_spline")]), r"takes angles in columns \[0, 1\]"),
        (lambda: pf.flows.CircularNSF(2, mixing="lu"), r"\(LU\) takes no angles"),
        (lambda: pf.flows.CircularNSF(4, mixing="permutation", support=MIXED), "every layer must treat angles"),
        (lambda: pf.flows.CircularNSF(2, support=constraints.positive), "use NSF"),
        (lambda: pf.Flow([Elementwise(2, "circular_spline")], support=constraints.positive), "in no others"),
        (
            lambda: pf.flows.Recipe("CircularNSF")(2) and pf.flows.conversion.as_flow(pf.flows.CircularNSF(2), 2),
            "of angles",
        ),
        (lambda: pf.flows.conversion.as_flow(pf.flows.Mixture([pf.flows.CircularNSF(2)]), 2), "of angles"),
    ],
)
def test_layers_and_supports_that_do_not_fit_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def test_angles_out_of_range_are_refused_with_the_remedy():
    degrees = torch.tensor([[0.0, 90.0], [10.0, 1.0]])
    with pytest.raises(DataError, match=r"x has angles outside of -pi to pi .*deg2rad, then .*remainder.* in 2 of 2"):
        pf.fit_density(pf.flows.CircularNSF(2), degrees, **QUIET)
    with_ends = PI * (2 * torch.rand(80, 2) - 1)
    with_ends[:2] = torch.tensor([[PI, -PI], [-PI, PI]])
    pf.fit_density(pf.flows.CircularNSF(2, num_layers=1), with_ends, max_epochs=1, **QUIET)


def test_angles_rounded_in_float32_are_taken_in_float64():
    """The float32 number next to pi is beyond it, and a remainder may end one step farther out."""
    ends = torch.tensor([[PI, -PI], [-PI, PI]], dtype=torch.float32)
    x = torch.cat([PI * (2 * torch.rand(80, 2) - 1), ends, ends.nextafter(2 * ends)]).double()
    assert (x.abs() > math.pi).any()
    for flow in (pf.flows.CircularNSF(2, num_layers=1), pf.flows.NSF(2, num_layers=1, support=CIRCULAR)):
        flow.double()
        pf.fit_density(flow, x, max_epochs=1, **QUIET)
        assert flow().log_prob(x).isfinite().all()
        with pytest.raises(DataError, match="outside of -pi to pi"):
            pf.fit_density(flow, x * (1 + 1e-5), max_epochs=1, **QUIET)


def test_permutations_carry_angles_along():
    layers = [pf.transforms.Permutation([2, 0, 1]), Elementwise(3, ["circular_spline", "spline", "spline"])]
    flow = pf.Flow([*layers, pf.transforms.Permutation([1, 2, 0])])
    assert pf.constraints.angles_in(flow.support if hasattr(flow, "support") else flow().support, 3) == [
        False,
        False,
        True,
    ]
    x = flow().sample((100,))
    assert x[:, 2].abs().max() <= PI and flow.base().support.check(flow().latent(x)).all()


def turning():
    return Autoregressive(2, "circular_spline", hidden_dims=(4,))


@pytest.mark.parametrize(
    "make",
    [
        lambda: [Permutation([1, 0]), turning()],
        lambda: [Permutation([1, 0]), turning(), Permutation([1, 0]), turning()],
        lambda: [Compose([Permutation([1, 0]), turning()]), turning()],
        lambda: [Compose([turning(), Permutation([1, 0])]), turning().inv],
        lambda: [Compose([turning(), Permutation([1, 0])]).inv],
    ],
    ids=["permutation-first", "two", "nested-first", "nested-last", "nested-inverse"],
)
def test_densities_of_permuted_angles_integrate_to_one(make):
    torch.manual_seed(0)
    flow = perturb(pf.Flow(make()).double(), 0.4)
    angles = (torch.arange(400, dtype=torch.float64) + 0.5) / 400 * 2 * PI - PI
    density = flow().log_prob(torch.cartesian_prod(angles, angles)).exp()
    assert (density.mean() * (2 * PI) ** 2).item() == pytest.approx(1.0, abs=5e-3)


def test_angles_of_an_inverse_stack_are_those_of_its_other_end():
    stack = Compose([Elementwise(2, ["circular_spline", "spline"]), Permutation([1, 0])])
    for layer, expected in ((stack, [False, True]), (stack.inv, [True, False])):
        assert pf.constraints.angles_in(pf.Flow([layer]).support, 2) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compose([LU(2), turning()]), r"layer 1 \(Autoregressive\) takes angles in columns \[0, 1\]"),
        (lambda: Compose([ActNorm(2), turning()]), r"takes angles in columns \[0, 1\]"),
        (lambda: Compose([turning(), ActNorm(2)]), r"layer 1 \(ActNorm\) takes no angles"),
        (lambda: Compose([turning(), LU(2)]).inv, r"layer 1 \(LU\) takes no angles"),
        (lambda: Compose([Compose([turning(), LU(2)]), LU(2)]), r"layer 1 \(LU\) takes no angles"),
        (lambda: Multiscale([Coupling((2, 1, 1), "circular_spline", conditioner="conv")]), "latents of Multiscale"),
    ],
)
def test_nested_stacks_that_do_not_fit_are_refused(make, message):
    with pytest.raises(OptionError, match=message):
        pf.Flow([make()])


# Copies, contexts, torch.func


def test_copies_and_states():
    flow = bent(support=constraints.cat([CIRCULAR, constraints.real], dim=-1))
    x = flow().sample((20,))
    expected = flow().log_prob(x)
    fresh = bent(support=constraints.cat([CIRCULAR, constraints.real], dim=-1))
    fresh.load_state_dict(flow.state_dict())
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), fresh):
        torch.testing.assert_close(twin().log_prob(x), expected, rtol=0, atol=0)
        assert twin().support.check(twin().sample((10,))).all()
        copy.deepcopy(twin).adapt(x)
        assert pf.Flow(list(twin.layers)[1:-1])().support.check(x).all()


@both_kinds
def test_vmap_and_grad(autoregressive):
    flow = bent(autoregressive=autoregressive)
    x = flow().sample((5,))
    found = torch.func.vmap(torch.func.grad(lambda row: flow().log_prob(row)))(x)
    x.requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(flow().log_prob(x).sum(), x)[0])


# In programs and fits


def test_likelihood():
    data = dist.VonMises(torch.tensor([1.0, 3.0]), torch.tensor(5.0)).sample((200,))
    flow = pf.flows.CircularNSF(2, num_layers=2, hidden_dims=(8,))

    def model():
        pyro.module("flow", flow)
        with pyro.plate("rows", 200):
            pyro.sample("x", flow(), obs=data)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    # At the truth the loss is 200 times the entropy of the two laws.
    assert losses[0] > 730 and losses[-1] < 400


def prior_of(flow):
    def model():
        phi = pyro.sample("phi", flow())
        pyro.sample("y", dist.VonMises(phi[..., 0] + phi[..., 1], 20.0), obs=torch.tensor(2.5))

    return model


@pytest.mark.slow
def test_prior_of_latent_angles():
    flow = bent().float().requires_grad_(False)
    points, area = cells(400)
    points = points.float()
    joint = flow().log_prob(points) + dist.VonMises(points.sum(-1), 20.0).log_prob(torch.tensor(2.5))
    evidence = joint.logsumexp(0) + math.log(area)
    posterior = pf.FlowVI(prior_of(flow), num_steps=300, num_starts=5, **QUIET).run()
    assert CIRCULAR.check(posterior.sample(500)["phi"]).all()
    estimate = posterior.importance_sample(5000)
    assert abs(estimate.log_evidence - evidence) < 5 * estimate.log_evidence_se + 0.01


def test_prior_in_pyros_own_nuts():
    flow = bent().float().requires_grad_(False)
    mcmc = MCMC(NUTS(prior_of(flow), max_tree_depth=3), num_samples=20, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    phi = mcmc.get_samples()["phi"]
    assert CIRCULAR.check(phi).all() and phi.std() > 0.1


@pytest.mark.slow
def test_distill():
    """The regression on the teacher's draws takes the shorter way around; across the cut it would lead astray."""
    teacher = bent(autoregressive=True).float()
    layers = [Autoregressive(2, "circular_spline", order, hidden_dims=(16,)) for order in ([0, 1], [1, 0])]
    student = pf.Flow(layers)
    x = teacher().sample((1000,))
    before = (teacher().log_prob(x) - student().log_prob(x)).mean()
    pf.distill(student, teacher, num_steps=50, warm_start=300, compile="none", **QUIET)
    assert (teacher().log_prob(x) - student().log_prob(x)).mean() < before / 3
    assert CIRCULAR.check(student().sample((1000,))).all()


def test_fit_finds_a_mode_on_the_cut():
    """The uniform law, where the flow starts, is 1.9 nats from this one."""
    law = dist.VonMises(torch.tensor([3.1, -3.0]), torch.tensor([4.0, 10.0])).to_event(1)
    flow = pf.flows.CircularNSF(2, num_layers=2, hidden_dims=(16,))
    pf.fit_density(flow, law.sample((4000,)), max_epochs=30, optimizer=partial(torch.optim.Adam, lr=0.01), **QUIET)
    x = law.sample((4000,))
    with torch.no_grad():
        assert (law.log_prob(x) - flow().log_prob(x)).mean() < 0.05

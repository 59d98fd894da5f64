"""Where fits start: points, the Gaussians they lead to, and when one of those is enough."""

import dataclasses
import math
from dataclasses import replace

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch.distributions import constraints

from pyroflows import ModelError
from pyroflows.compiling.check import Compiler
from pyroflows.inference.candidates import is_enough
from pyroflows.inference.search import starts as starts_module
from pyroflows.inference.search.density import Density
from pyroflows.inference.search.gaussians import Approximation
from pyroflows.inference.search.modes import Mode, ModeSearch, is_separate
from pyroflows.inference.search.starts import WIDE, Starts, find_start, further_points, starting_points
from pyroflows.inference.verdict.diagnosis import diagnose
from pyroflows.inference.verdict.figures import Estimate, Figures, Unseen
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe


def points(model, num_starts, dtype=torch.float32):
    layout = Layout(describe(model, (), {}))
    center = torch.full((layout.dim,), 7.0, dtype=dtype)
    return layout, starting_points(model, (), {}, layout, center, num_starts)


# The points


def far_prior():
    pyro.sample("scale", dist.LogNormal(torch.full((2,), 50.0), 1.0).to_event(1))
    flat = pyro.sample("flat", dist.ImproperUniform(constraints.positive, (), (3,)))
    masked = pyro.sample("masked", dist.Normal(80.0, 1.0).mask(False))
    pyro.factor("y", -flat.sum(-1) - masked**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initial_values_near_zero_and_the_prior(dtype):
    _, starts = points(far_prior, 41, dtype)
    assert starts.shape == (41, 6) and starts.dtype == dtype
    assert (starts[0] == 7.0).all()
    near, prior = starts[1::2], starts[2::2]
    assert near.abs().max() <= 1 and near.min() < -0.8 and near.max() > 0.8
    # Unconstrained: the logarithm is Normal(50, 1).
    assert abs(prior[:, :2].mean() - 50.0) < 4 / math.sqrt(40)
    assert prior[:, :2].std() == pytest.approx(1.0, abs=4 / math.sqrt(80))
    # Where a prior is flat: uniform over the cube, whatever the masked distribution says.
    assert prior[:, 2:].abs().max() <= WIDE
    assert prior[:, 2:].std() == pytest.approx(WIDE / math.sqrt(3), rel=0.2)


@pytest.mark.parametrize("num_starts", [1, 2, 3])
def test_few_points(num_starts):
    _, starts = points(far_prior, num_starts)
    assert len(starts) == num_starts and (starts[0] == 7.0).all()


def test_draws_at_which_the_prior_breaks_are_left_out():
    """A scale that underflows, or a singular matrix."""

    def model():
        v = pyro.sample("v", dist.Normal(0.0, 300.0))
        pyro.sample("x", dist.Normal(0.0, v.exp()))
        torch.linalg.cholesky(torch.eye(2) - torch.full((2, 2), 0.01 * v.item()))

    layout = Layout(describe(model, (), {}, lambda site: torch.zeros(())))
    starts = starting_points(model, (), {}, layout, torch.zeros(2), 21)
    v = starts[2::2, 0]
    assert starts.shape == (21, 2)
    # What failed stays near zero.
    assert 0 < (v.abs() <= 1).sum() < 10
    assert v.max() < 50 and v.min() < -100


# The Gaussians


def of_density(law):
    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), law.event_shape))
        pyro.factor("density", law.log_prob(x))

    return model


def found_from(model, starts, inverse_temperature=None, mode="trace"):
    layout = Layout(describe(model, (), {}))
    log_joint = LogJoint(model, (), {}, layout, torch.zeros(5, layout.dim), Compiler(mode))
    return find_start(log_joint, torch.as_tensor(starts), inverse_temperature)


def modes_at(*locs, weights=None):
    weights = torch.ones(len(locs)) if weights is None else torch.tensor(weights)
    parts = dist.Normal(torch.tensor(locs)[:, None].expand(-1, 2), 1.0).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(weights), parts)


AT_BOTH = [[-9.0, -9.0], [-11.0, -9.0], [9.0, 9.0], [10.5, 10.0]]


@pytest.mark.parametrize("mode", ["trace", "none"])
def test_separate_modes(mode):
    modes, starts = found_from(of_density(modes_at(-10.0, 10.0, weights=[0.3, 0.7])), AT_BOTH, mode=mode)
    assert [round(m.loc[0].item()) for m in modes] == [10, -10]
    for gaussian, weight in zip(modes, (0.7, 0.3), strict=True):
        torch.testing.assert_close(gaussian.scale_tril, torch.eye(2), atol=0.05, rtol=0.0)
        assert gaussian.elbo == pytest.approx(math.log(weight), abs=0.01)
    assert starts.num_starts == len(starts.elbos) == 4
    assert starts.modes == tuple(m.elbo for m in modes)
    assert list(starts.elbos) == sorted(starts.elbos, reverse=True)
    assert str(starts) == (
        "4 of 4 starts ended within 1 nat of the best Gaussian, in 2 separate modes whose ELBOs lie 0.8 nats apart; "
        "a further start would find a new mode with probability below 20 %"
    )


def test_one_mode():
    modes, starts = found_from(of_density(modes_at(0.0)), [[1.0, 0.0], [0.0, -3.0], [5.0, 5.0]])
    assert len(modes) == len(starts.modes) == 1
    assert str(starts) == (
        "3 of 3 starts ended within 1 nat of the best Gaussian; "
        "a further start would find a new mode with probability below 25 %"
    )


@pytest.mark.parametrize(("weight", "num_modes"), [(0.02, 2), (0.005, 1)])
def test_a_mode_of_next_to_no_mass_does_not_count(weight, num_modes):
    modes, starts = found_from(of_density(modes_at(-10.0, 10.0, weights=[weight, 1 - weight])), AT_BOTH)
    assert len(modes) == num_modes
    assert starts.elbos[-1] == pytest.approx(math.log(weight), abs=0.01)
    assert str(starts).startswith("2 of 4")


def gaussian(loc, sd=1.0, elbo=0.0):
    return Approximation(torch.tensor([loc, 0.0]).double(), sd * torch.eye(2).double(), elbo)


def density_of(log_density, dim=2):
    def value_and_grad(u):
        u = u.detach().requires_grad_()
        value = log_density(u)
        return value.detach(), torch.autograd.grad(value.sum(), u)[0]

    return Density(value_and_grad, 64, torch.zeros(1, dim, dtype=torch.float64))


def between(a, b, dip, at_b=0.0):
    """A log-density that falls by ``dip`` half way, and is ``at_b`` at b."""

    def value_and_grad(x):
        weight = (x - a.loc)[:, 0] / (b.loc - a.loc)[0]
        fall = (dip * (1 - (2 * weight - 1).abs())).nan_to_num(nan=0.0, posinf=math.inf)
        return at_b * weight - fall, torch.zeros_like(x)

    return Density(value_and_grad, 65, a.loc[None])


@pytest.mark.parametrize(
    ("other", "separate"),
    [
        (gaussian(4.1), True),
        (gaussian(3.9), False),
        (gaussian(7.9, sd=2.0), False),  # by the wider one
        (gaussian(8.1, sd=2.0), True),
        (gaussian(5.0, sd=0.1), True),
        (gaussian(3.0, sd=0.1), False),
    ],
)
def test_which_gaussians_are_separate(other, separate):
    first = gaussian(0.0)
    assert is_separate(first, other, between(first, other, dip=50.0)) is separate


@pytest.mark.parametrize(("dip", "separate"), [(0.0, False), (2.8, False), (3.2, True), (math.inf, True)])
def test_modes_have_a_dip_between_them(dip, separate):
    """Else they are one with a bend."""
    a, b = gaussian(0.0), gaussian(20.0)
    assert is_separate(a, b, between(a, b, dip)) is separate


def test_the_dip_is_below_the_lower_of_the_two():
    a, b = gaussian(0.0), gaussian(20.0)
    assert is_separate(a, b, between(a, b, 4.2, at_b=-2.0))  # -5.2 between 0 and -2
    assert not is_separate(a, b, between(a, b, 3.8, at_b=-2.0))


def test_a_ridge_may_be_bent():
    """On the way along a ring the log-density does not fall, on the straight line it falls by 13 nats."""
    ring = density_of(lambda u: -0.5 * ((u.norm(dim=-1) - 4) / 0.3).square())
    north, east = gaussian(0.0, sd=0.5), gaussian(4.0, sd=0.5)
    north.loc[1] = 4.0
    assert not is_separate(north, east, ring)
    crescents = density_of(
        lambda u: -0.5 * ((u.norm(dim=-1) - 4) / 0.3).square() + 3 * torch.cos(2 * u[:, 0].atan2(u[:, 1]))
    )
    assert is_separate(north, Approximation(-north.loc, north.root, 0.0), crescents)


def known(*gaussians, hits, orbits=None):
    """A search that has found these modes, in so many starts."""
    search = ModeSearch.__new__(ModeSearch)
    orbits = orbits or range(len(hits))
    search.modes = [Mode(g, o, h) for g, o, h in zip(gaussians, orbits, hits, strict=True)]
    return search


@pytest.mark.parametrize(("elbo", "num_modes"), [(-4.5, 2), (-4.7, 1)])
def test_a_hundredth_of_the_best_mass_counts(elbo, num_modes):
    """log 100 is 4.605."""
    assert len(known(gaussian(0.0), gaussian(50.0, elbo=elbo), hits=(1, 1)).kept) == num_modes


def test_the_mass_is_that_of_the_weights():
    """A Gaussian that fits badly has an ELBO far below the mass of its mode."""
    poor = Approximation(torch.ones(2).double(), torch.eye(2).double(), elbo=-9.0, log_evidence=-1.0)
    assert len(known(gaussian(0.0), poor, hits=(1, 1)).kept) == 2


@pytest.mark.parametrize("elbo", [-math.inf, math.nan])
def test_there_is_always_a_mode(elbo):
    """Where the log joint is not finite at some draws of every Gaussian, the first of them is the start."""
    search = known(gaussian(0.0, elbo=elbo), gaussian(9.0, elbo=elbo), hits=(1, 1))
    assert search.kept == search.modes[:1]


# How many starts


@pytest.mark.parametrize(
    ("hits", "probability"),
    [
        ((8,), 1 / 9),  # one mode, never found once: (0 + 1) / (8 + 1)
        ((7, 1), 2 / 9),
        ((1, 1, 1), 1.0),
        ((40, 2, 8), 1 / 51),
        ((97, 1, 1), 3 / 100),
        ((8, 0), 1 / 9),  # a mode that no start found, but a symmetry
    ],
)
def test_good_and_turing_by_hand(hits, probability):
    search = known(*[gaussian(9.0 * i) for i in range(len(hits))], hits=hits)
    assert search.new_mode_probability == pytest.approx(probability)


def test_symmetric_modes_count_as_one():
    modes = [gaussian(9.0 * i) for i in range(4)]
    assert known(*modes, hits=(1, 1, 1, 1), orbits=(0, 0, 0, 0)).new_mode_probability == pytest.approx(1 / 5)
    assert known(*modes, hits=(3, 1, 1, 0), orbits=(0, 0, 2, 2)).new_mode_probability == pytest.approx(2 / 6)


def test_modes_of_next_to_no_mass_do_not_count():
    """Neither as found once, nor as starts."""
    search = known(gaussian(0.0), gaussian(9.0, elbo=-100.0), gaussian(18.0, elbo=-50.0), hits=(9, 20, 1))
    assert search.new_mode_probability == pytest.approx(1 / 10)


def test_good_turing_is_right_on_average():
    """Of modes that starts find by known probabilities, the expected share that n starts have missed is known."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.03, 0.01, 0.01])
    num_starts, num_repeats = 60, 2000
    torch.manual_seed(0)
    counts = dist.Multinomial(num_starts, probabilities).sample((num_repeats,))
    missed = ((counts == 0) * probabilities).sum(-1)
    estimates = torch.tensor(
        [known(*[gaussian(9.0 * i) for i in range(6)], hits=row).new_mode_probability for row in counts.int().tolist()]
    )
    # It is above the missed share on average, by no more than what counts in one more mode, 1 / (n + 1).
    excess = (estimates - missed).mean().item()
    error = (estimates - missed).std().item() / math.sqrt(num_repeats)
    assert -4 * error < excess < 1 / (num_starts + 1) + 4 * error


def uniform(num, scale=12.0, dim=2):
    return scale * (2 * torch.rand(num, dim) - 1)


def searched(law, propose, first, max_starts=None):
    torch.manual_seed(0)
    model = of_density(law)
    layout = Layout(describe(model, (), {}))
    log_joint = LogJoint(model, (), {}, layout, torch.zeros(5, layout.dim), Compiler("none"))
    return find_start(log_joint, first, None, propose, max_starts)


def test_starts_go_on_until_a_further_one_would_hardly_find_a_mode():
    corners = torch.tensor([[-8.0, -6.0], [-8.0, 5.0], [7.0, -6.0], [9.0, 5.0], [0.0, 0.0]])
    parts = dist.Normal(corners, 1.0).to_event(1)
    law = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])), parts)
    first = corners[:1] + torch.rand(8, 2)
    modes, starts = searched(law, lambda known, num: uniform(num), first)
    assert len(modes) == 5
    assert starts.new_mode_probability < 0.02
    assert 50 <= starts.num_starts <= 200
    assert "a further start would find a new mode with probability below 2 %" in str(starts)


def test_no_more_starts_than_are_allowed():
    modes, starts = searched(modes_at(-10.0, 10.0), lambda known, num: uniform(num), uniform(8), max_starts=20)
    assert starts.num_starts == 20 and len(modes) == 2
    assert 1 / 21 <= starts.new_mode_probability <= 2 / 21


class Rough(dist.TorchDistribution):
    """A standard normal that is lowered by 60 nats to the left of -3, where waves make many poor optima."""

    arg_constraints = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self):
        super().__init__(event_shape=torch.Size([2]))

    def log_prob(self, x):
        wall = torch.sigmoid(20 * (x[..., 0] + 3))
        waves = -60 + 5 * torch.cos(3 * x).sum(-1) - 0.02 * x.square().sum(-1)
        return wall * dist.Normal(0.0, 1.0).log_prob(x).sum(-1) + (1 - wall) * waves


def test_poor_optima_do_not_use_up_the_budget():
    """Half of the starts end 60 nats below the mode, and count for nothing."""
    modes, starts = searched(Rough(), lambda known, num: uniform(num, 9.0), uniform(8, 2.0))
    assert len(modes) == 1
    poor = starts.num_starts - sum(elbo > starts.elbos[0] - 1 for elbo in starts.elbos)
    assert poor > 10
    assert starts.num_starts - poor >= 50 or starts.new_mode_probability > 0.02
    assert starts.new_mode_probability == pytest.approx(1 / (starts.num_starts - poor + 1), rel=0.1)


def test_where_all_starts_are_poor_the_search_ends():
    modes, starts = searched(Rough(), lambda known, num: uniform(num, 1.0) - 20.0, uniform(8, 1.0) - 20.0)
    assert starts.num_starts <= 200 and modes


def test_the_cost_has_a_cap(monkeypatch):
    """Further starts that never help stop after a multiple of the calls of the first ones."""
    monkeypatch.setattr(starts_module, "SMALL_PROBABILITY", 0.0)
    monkeypatch.setattr(starts_module, "MAX_STARTS", 10**6)
    monkeypatch.setattr(starts_module.ModeSearch, "num_wanted", lambda *_: 8.0)
    costs = []

    class Counted(ModeSearch):
        def explore(self, starts):
            super().explore(starts)
            costs.append(self.relative_cost)

    monkeypatch.setattr(starts_module, "ModeSearch", Counted)
    _, starts = searched(modes_at(0.0), lambda known, num: uniform(num), uniform(8))
    assert starts_module.MAX_COST <= costs[-1] < 2 * starts_module.MAX_COST
    assert all(cost < starts_module.MAX_COST for cost in costs[:-1])
    assert starts.num_starts == 8 + 8 * len(costs)


def test_further_points_are_of_all_kinds():
    layout = Layout(describe(far_prior, (), {}))
    center = torch.full((6,), 7.0)
    mode = Mode(Approximation(100.0 + torch.arange(6).double(), 0.1 * torch.eye(6).double(), 0.0), 0)
    torch.manual_seed(0)
    points = further_points(far_prior, (), {}, layout, center, [mode], 600)
    assert points.shape == (600, 6) and points.dtype == center.dtype
    prior, near, dispersed, image = points[0::6], points[1::6], points[2::6], points[3::6]
    assert abs(prior[:, :2].mean() - 50.0) < 4 / math.sqrt(200)
    assert near.abs().max() <= 2.0 and near.std() == pytest.approx(2 / math.sqrt(3), rel=0.1)
    spread = (dispersed - mode.gaussian.loc.float()) / 0.1
    assert 3 < spread.std() < 10
    assert (image.abs().mean(0) - mode.gaussian.loc).abs().max() < 2  # permuted rows differ by 2 at most
    assert (image < 0).any() and (image[:, 3] > 100.5).any()


def test_a_temperature_widens():
    model = of_density(dist.MultivariateNormal(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 1.0], [1.0, 3.0]])))
    (found,), _ = found_from(model, [[0.0, 0.0]], inverse_temperature=0.25)
    expected = 4 * torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    torch.testing.assert_close(found.loc, torch.tensor([1.0, 2.0]), atol=0.05, rtol=0.0)
    torch.testing.assert_close(found.scale_tril @ found.scale_tril.mT, expected, rtol=0.02, atol=0.02)
    # Of p^beta, p of determinant 5.
    assert found.elbo == pytest.approx(0.75 * math.log(2 * math.pi) + 0.375 * math.log(5) + math.log(4), abs=0.01)


def test_a_log_joint_that_is_finite_nowhere():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 50, 0.0, -torch.inf))

    with pytest.raises(ModelError, match=r"finite at none of the starts.*init_loc_fn=init_to_value"):
        found_from(model, [[0.0], [1.0]])


def test_one_start_at_which_it_is_not_finite_is_left_out():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x < 3, 0.0, -torch.inf))

    modes, starts = found_from(model, [[5.0], [1.0]])
    assert starts.num_starts == 2 and len(starts.elbos) == len(modes) == 1


# When one is enough

FIGURES = Figures(
    num_samples=10_000,
    khat=Estimate(0.2, 0.07),
    ess=9500.0,
    log_weight_variance=Estimate(0.03, 0.001),
    mean_shift=Estimate(0.02, 0.002),
    sd_ratio=Estimate(0.98, 0.005),
    widening=Estimate(1.0, 0.005),
    num_zero=0,
    num_nan=0,
)


@dataclasses.dataclass
class Fitted:
    """A Gaussian with these figures; none of which but the share takes more draws than a first batch."""

    figures: Figures
    share: float | None
    flow = history = found = None

    @property
    def draws(self):
        return self

    few_draws = first_draws = draws

    def diagnosis(self, *args):
        unseen = None if self.share is None else Unseen(Estimate(self.share, 0.0001), 10_000)
        return diagnose(self.figures, unseen)


@pytest.mark.parametrize(
    ("changes", "share", "enough"),
    [
        ({}, None, True),
        ({"log_weight_variance": Estimate(0.06, 0.001)}, None, False),
        ({"log_weight_variance": Estimate(0.04, 0.01)}, None, True),
        ({"mean_shift": Estimate(0.06, 0.001)}, None, False),
        ({"sd_ratio": Estimate(0.94, 0.001)}, None, False),
        ({"sd_ratio": Estimate(1.06, 0.001)}, None, False),
        ({"num_zero": 1}, None, False),
        ({"khat": Estimate(1.6, 0.1)}, 0.0005, True),
        ({"khat": Estimate(1.6, 0.1)}, 0.002, False),
        ({"khat": Estimate(1.6, 0.1)}, None, False),
    ],
)
def test_enough(changes, share, enough):
    """The verdict is "good", with room to spare; a tail that holds next to nothing does not count."""
    assert is_enough(Fitted(dataclasses.replace(FIGURES, **changes), share)) is enough


def test_starts_near_the_best():
    assert str(Starts((-1.0, -1.5, -2.5), (-1.0,), 8)).startswith("2 of 8 starts")


@pytest.mark.parametrize(
    ("probability", "text"), [(0.0196, "below 2 %"), (0.02, "below 2 %"), (1 / 9, "below 12 %"), (1.0, "below 100 %")]
)
def test_the_probability_in_words(probability, text):
    assert text in str(Starts((-1.0,), (-1.0,), 8, probability))


def test_too_many_equal_modes_in_words():
    text = str(Starts((-1.0,), (-1.0,) * 24, 60, 0.01, num_equal=24))
    assert "24 of them are equal by exchangeable components" in text
    assert "order the components" in text
    assert "equal" not in str(Starts((-1.0,), (-1.0,) * 12, 60, 0.01, num_equal=12))  # all are fitted


def test_a_few_large_weights_do_not_make_the_other_modes_negligible():
    """The log mean weight of a Gaussian that fits badly may be far too large."""

    def value_and_grad(u):
        return -0.5 * (u.abs() - 9).square().sum(-1), -(u.abs() - 9) * u.sign()

    torch.manual_seed(0)
    starts = 10 * torch.rand(16, 1) - 5
    search = ModeSearch(Density(value_and_grad, 64, starts), starts)
    assert len(search.kept) == 2
    search.modes[0].gaussian = replace(search.modes[0].gaussian, log_evidence=20.0)
    assert len(search.kept) == 2

"""Where fits start: points, the Gaussians they lead to, and when one of those is enough."""

import dataclasses
import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch.distributions import constraints

from pyroflows import ModelError
from pyroflows.compiling.check import Compiler
from pyroflows.inference.candidates import is_enough
from pyroflows.inference.diagnosis import diagnose
from pyroflows.inference.figures import Estimate, Figures, Unseen
from pyroflows.inference.pathfinder import GaussianApproximation
from pyroflows.inference.starts import WIDE, Starts, _separate, find_start, starting_points
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
    text = "4 of 4 starts ended within 1 nat of the best Gaussian, in 2 separate modes whose ELBOs lie 0.8 nats apart"
    assert str(starts) == text


def test_one_mode():
    modes, starts = found_from(of_density(modes_at(0.0)), [[1.0, 0.0], [0.0, -3.0], [5.0, 5.0]])
    assert len(modes) == len(starts.modes) == 1
    assert str(starts) == "3 of 3 starts ended within 1 nat of the best Gaussian"


@pytest.mark.parametrize(("weight", "num_modes"), [(0.02, 2), (0.005, 1)])
def test_a_mode_of_next_to_no_mass_does_not_count(weight, num_modes):
    modes, starts = found_from(of_density(modes_at(-10.0, 10.0, weights=[weight, 1 - weight])), AT_BOTH)
    assert len(modes) == num_modes
    assert starts.elbos[-1] == pytest.approx(math.log(weight), abs=0.01)
    assert str(starts).startswith("2 of 4")


def gaussian(loc, sd=1.0, elbo=0.0):
    return GaussianApproximation(torch.tensor([loc, 0.0]), sd * torch.eye(2), elbo)


@pytest.mark.parametrize(
    ("other", "is_separate"),
    [
        (gaussian(4.1), True),
        (gaussian(3.9), False),
        (gaussian(7.9, sd=2.0), False),  # by the wider one
        (gaussian(8.1, sd=2.0), True),
        (gaussian(5.0, sd=0.1), True),
        (gaussian(3.0, sd=0.1), False),
        (gaussian(50.0, elbo=-4.5), True),
        (gaussian(50.0, elbo=-4.7), False),  # log 100 is 4.605
    ],
)
def test_which_gaussians_are_separate(other, is_separate):
    first = gaussian(0.0)
    modes = _separate([first, other], between(first, other, dip=50.0), 64)
    assert modes[0] is first and len(modes) == 1 + is_separate


def between(a, b, dip, at_b=0.0):
    """A log density that falls by ``dip`` half way, and is ``at_b`` at b."""

    def value_and_grad(x):
        weight = (x - a.loc)[:, 0] / (b.loc - a.loc)[0]
        fall = (dip * (1 - (2 * weight - 1).abs())).nan_to_num(nan=0.0, posinf=math.inf)
        return at_b * weight - fall, torch.zeros_like(x)

    return value_and_grad


@pytest.mark.parametrize(("dip", "is_separate"), [(0.0, False), (2.8, False), (3.2, True), (math.inf, True)])
def test_modes_have_a_dip_between_them(dip, is_separate):
    """Else they are one with a bend."""
    a, b = gaussian(0.0), gaussian(20.0)
    assert len(_separate([a, b], between(a, b, dip), 65)) == 1 + is_separate


def test_the_dip_is_below_the_lower_of_the_two():
    a, b = gaussian(0.0), gaussian(20.0)
    assert len(_separate([a, b], between(a, b, 4.2, at_b=-2.0), 65)) == 2  # -5.2 between 0 and -2
    assert len(_separate([a, b], between(a, b, 3.8, at_b=-2.0), 65)) == 1


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

    @property
    def first_draws(self):
        return self

    @property
    def diagnosis(self):
        unseen = None if self.share is None else Unseen(Estimate(self.share, 0.0001), 10_000)
        return diagnose(self.figures, unseen)


@pytest.mark.parametrize(
    ("changes", "share", "enough"),
    [
        ({}, None, True),
        ({"log_weight_variance": Estimate(0.06, 0.001)}, None, False),
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


@pytest.mark.parametrize("elbo", [-math.inf, math.nan])
def test_there_is_always_a_mode(elbo):
    """Where the log joint is not finite at some draws of every Gaussian, the first of them is the start."""
    gaussian = GaussianApproximation(torch.zeros(1), torch.eye(1), elbo)
    assert _separate([gaussian, gaussian], lambda u: (u[:, 0], u), 4) == [gaussian]

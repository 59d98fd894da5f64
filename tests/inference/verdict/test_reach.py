"""Draws that reach further than a flow's, and the share of a posterior that the flow's draws do not see."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from scipy import stats
from torch.distributions import constraints

from pyroflows.flows import Flow, Gaussian, Mixture
from pyroflows.inference.verdict.reach import ReachingDraws
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe
from pyroflows.transforms import Elementwise

NUM_DRAWS = 10_000


def log_joint_of(law):
    """The log joint of a model without data whose posterior is the law."""

    def model():
        x = pyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), law.event_shape))
        pyro.factor("density", law.log_prob(x))

    return LogJoint(model, (), {}, Layout(describe(model, (), {})), torch.zeros(1, *law.event_shape))


def normal(dim, loc=0.0):
    return dist.Normal(torch.full((dim,), loc), 1.0).to_event(1)


def gaussian_flow(dim, sd=1.0, loc=0.0, base=None):
    flow = Flow([Elementwise(dim)], base=base)
    with torch.no_grad():
        flow.transform.layers[0].parameters_of.value.copy_(torch.tensor([loc, math.log(sd)]))
    return flow


def beyond(z):
    """The probability that a standard normal is larger in absolute value."""
    return math.erfc(z / math.sqrt(2))


EDGE = 3.8906  # which a standard normal exceeds in absolute value once in 10,000 draws


@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("base", [None, "student_t"])
def test_ratios_are_those_of_two_laws(dim, base):
    """Averaged over r, q / r is 1; and it is at most 3, since a third of r is q."""
    torch.manual_seed(0)
    draws = ReachingDraws.drawn(gaussian_flow(dim, base=base)(), log_joint_of(normal(dim)), 50_000)
    ratios = draws.log_ratios.exp()
    assert ratios.mean() == pytest.approx(1, abs=4.5 * ratios.std().item() / math.sqrt(50_000))
    assert ratios.max() <= 3 + 1e-4
    # So averages under the posterior are right, too.
    weights = ratios * draws.log_weights.exp()
    assert weights.mean() == pytest.approx(1, abs=4.5 * weights.std().item() / math.sqrt(50_000))


@pytest.mark.parametrize("sd", [0.6, 0.7, 0.8])
def test_share_of_a_narrow_flow(sd):
    """Weights rise with the distance from zero, so that the draws see all up to 3.89 sd of the flow."""
    torch.manual_seed(0)
    draws = ReachingDraws.drawn(gaussian_flow(1, sd)(), log_joint_of(normal(1)), NUM_DRAWS)
    share, _ = draws.unseen(NUM_DRAWS)
    assert share.value == pytest.approx(beyond(EDGE * sd), abs=4.5 * share.se + 0.0003)
    assert share.se < 0.1 * share.value


def test_share_of_a_flow_that_is_narrow_in_one_of_many_coordinates():
    torch.manual_seed(0)
    flow = gaussian_flow(20)
    with torch.no_grad():
        flow.transform.layers[0].parameters_of.value[7, 1] = math.log(0.6)
    draws = ReachingDraws.drawn(flow(), log_joint_of(normal(20)), NUM_DRAWS)
    share, _ = draws.unseen(NUM_DRAWS)
    assert share.value == pytest.approx(beyond(EDGE * 0.6), abs=4.5 * share.se)


def test_share_of_a_tail_in_no_coordinate_alone():
    """The tail of a multivariate Student-t law lies in all directions; the weights rise with the radius."""
    torch.manual_seed(1)
    dim, df = 10, 10.0
    target = dist.MultivariateStudentT(df, torch.zeros(dim), torch.eye(dim))
    draws = ReachingDraws.drawn(gaussian_flow(dim, sd=1.05)(), log_joint_of(target), NUM_DRAWS)
    share, _ = draws.unseen(NUM_DRAWS)
    # r^2 is chi-square with dim degrees of freedom under a standard normal; under the target r^2 / dim has an F law.
    edge = 1.05**2 * stats.chi2.isf(1 / NUM_DRAWS, dim)
    assert share.value == pytest.approx(stats.f.sf(edge / dim, dim, df), abs=4.5 * share.se)
    assert share.se < 0.005


def test_an_exact_flow_sees_all_that_its_draws_can_see():
    torch.manual_seed(0)
    draws = ReachingDraws.drawn(gaussian_flow(3)(), log_joint_of(normal(3)), NUM_DRAWS)
    assert draws.unseen(NUM_DRAWS).share.value <= 1.5 / NUM_DRAWS


def test_mixture():
    """Two modes, of which the flows cover both, or one with another at the same place."""
    parts = dist.Normal(torch.tensor([[-4.0], [4.0]]), 1.0).to_event(1)
    log_joint = log_joint_of(dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts))
    left, right = gaussian_flow(1, loc=-4.0), gaussian_flow(1, loc=4.0)
    torch.manual_seed(0)
    both = ReachingDraws.drawn(Mixture([left, right], torch.tensor([0.3, 0.7]).log())(), log_joint, NUM_DRAWS)
    assert both.unseen(NUM_DRAWS).share.value < 0.001
    assert both.log_weights.exp().mean() == pytest.approx(1, abs=0.02)
    one = ReachingDraws.drawn(Mixture([left, left], torch.tensor([0.5, 0.5]).log())(), log_joint, NUM_DRAWS)
    assert one.unseen(NUM_DRAWS).share.value == pytest.approx(0.7, abs=0.1)


def test_draws_where_the_log_joint_is_not_finite_have_no_weight():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 1, torch.nan, torch.where(x < -1, torch.inf, 0.0)))

    log_joint = LogJoint(
        model, (), {}, Layout(describe(model, (), {}, pyro.infer.autoguide.init_to_median)), torch.zeros(1, 1)
    )
    draws = ReachingDraws.drawn(gaussian_flow(1)(), log_joint, NUM_DRAWS)
    assert draws.log_weights.isneginf().any() and not draws.log_weights.isnan().any()
    assert math.isfinite(draws.unseen(NUM_DRAWS).share.value)


@pytest.mark.parametrize(
    "base",
    [
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        dist.Uniform(torch.zeros(2), 1.0).to_event(1),
    ],
)
def test_bases_that_cannot_be_stretched(base):
    """The coordinates depend on each other, or are bounded."""
    assert ReachingDraws.drawn(gaussian_flow(2, base=base)(), log_joint_of(normal(2)), 10) is None


def test_joined_draws():
    torch.manual_seed(0)
    flow, log_joint = Gaussian(2), log_joint_of(normal(2))
    first, second = (ReachingDraws.drawn(flow(), log_joint, 30) for _ in range(2))
    joined = first.joined(second)
    assert joined.log_weights.tolist() == first.log_weights.tolist() + second.log_weights.tolist()
    assert joined.log_ratios.tolist() == first.log_ratios.tolist() + second.log_ratios.tolist()

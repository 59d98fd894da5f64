"""Mixtures of flows fitted to data: where components start, what a fit reports, contexts and weights of rows."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.errors import DataError
from pyroflows.flows import NSF, Flow, Mixture
from pyroflows.randomness import seeded
from pyroflows.training.data import load
from pyroflows.training.shuffling import split
from pyroflows.transforms import Elementwise, Triangular

QUIET = {"seed": 0, "progress_bar": False}


def two_clusters(n=2000):
    """A quarter of the rows around 100, the others around 110, in both columns."""
    torch.manual_seed(0)
    which = (torch.rand(n, 1) < 0.75).to(torch.get_default_dtype())
    return 100 + 10 * which + torch.randn(n, 2)


def log_density(x):
    parts = [dist.Normal(loc, 1.0).log_prob(x).sum(-1) + math.log(w) for loc, w in ((100.0, 0.25), (110.0, 0.75))]
    return torch.stack(parts).logsumexp(0)


def splines(num=2, **options):
    return Mixture([NSF(2, num_layers=1, hidden_dims=(16,), **options) for _ in range(num)])


def gaussians(num=2, dim=2, **options):
    return Mixture([Flow([Triangular(dim)], **options) for _ in range(num)])


def locations(mixture):
    return torch.stack([flow.standardization.loc for flow in mixture.components])


# Where components start


def test_each_component_starts_at_a_cluster():
    """Before any training the mixture of Gaussians has the shares, means and deviations of the clusters."""
    x, mixture = two_clusters(), gaussians()
    assert mixture.adapts and not mixture.is_adapted
    mixture.adapt(x)
    assert mixture.is_adapted
    order = locations(mixture)[:, 0].argsort()
    for place, is_member in zip(order.tolist(), (x.sum(1) < 210, x.sum(1) > 210), strict=True):
        layer = mixture.components[place].standardization
        torch.testing.assert_close(layer.loc, x[is_member].mean(0))
        torch.testing.assert_close(layer.scale, x[is_member].std(0, correction=0))
        assert mixture.gate().exp()[place].item() == pytest.approx(is_member.float().mean().item(), abs=0.01)
    torch.testing.assert_close(mixture().log_prob(x).mean(), log_density(x).mean(), rtol=0, atol=0.02)


def test_columns_of_other_units_count_alike():
    x = two_clusters() * torch.tensor([1e6, 1.0]) + torch.tensor([0.0, 1e3])
    mixture = gaussians()
    mixture.adapt(x)
    assert (locations(mixture)[:, 1] - 1e3).sort().values.tolist() == pytest.approx([100.0, 110.0], abs=0.2)


def test_weights_of_rows():
    """Rows of weight zero do not count, and other weights act as repeated rows."""
    x = torch.cat([two_clusters(400), torch.full((50, 2), 1e4)])
    weights = torch.cat([(x[:400, 0] > 105) * 2.0 + 1.0, torch.zeros(50)])
    mixture = gaussians()
    mixture.adapt(x, weights=weights)
    assert locations(mixture)[:, 0].sort().values.tolist() == pytest.approx([100.0, 110.0], abs=0.3)
    share = (weights * (x[:, 0] > 105)).sum() / weights.sum()
    assert mixture.gate().exp().max().item() == pytest.approx(share.item(), abs=0.01)


def test_an_adapted_component_stays_while_another_starts():
    x = two_clusters()
    fitted, fresh = Flow([Triangular(2)]), Flow([Triangular(2)])
    fitted.adapt(x[x[:, 0] < 105])
    before = fitted.standardization.loc.clone()
    mixture = Mixture([fitted, fresh], torch.tensor([0.4, 0.6]).log())
    mixture.adapt(x)
    assert torch.equal(fitted.standardization.loc, before) and mixture.is_adapted
    # The fresh one starts at the rows that the other does not explain.
    torch.testing.assert_close(fresh.standardization.loc, x[x[:, 0] > 105].mean(0), rtol=0, atol=0.3)
    torch.testing.assert_close(mixture.gate().exp(), torch.tensor([0.4, 0.6]))


@pytest.mark.parametrize("context_dim", [0, 1])
@pytest.mark.parametrize("support", [None, constraints.positive])
def test_a_new_component_starts_at_the_rows_that_a_fitted_one_does_not_explain(support, context_dim):
    x, fitted = two_clusters(), NSF(2, num_layers=1, support=support, context_dim=context_dim)
    context = torch.randn(len(x), 1) if context_dim else None
    is_known = x[:, 0] > 105
    fitted.adapt(x[is_known], None if context is None else context[is_known])
    mixture = Mixture([fitted, Flow([Triangular(2)])])
    mixture.adapt(x, context)
    torch.testing.assert_close(locations(mixture)[1], x[~is_known].mean(0), rtol=0, atol=0.3)


def test_a_new_component_starts_at_all_rows_if_a_fitted_one_explains_them():
    x, fitted = torch.randn(2000, 2), Flow([Triangular(2)])
    fitted.adapt(x)
    mixture = Mixture([fitted, Flow([Triangular(2)])])
    mixture.adapt(x)
    torch.testing.assert_close(locations(mixture)[1], locations(mixture)[0])


def test_the_same_flow_twice_has_one_cluster():
    x, flow = two_clusters(), Flow([Triangular(2)])
    mixture = Mixture([flow, Flow([Triangular(2)]), flow])
    mixture.adapt(x)
    assert len(set(locations(mixture)[:, 0].round().tolist())) == 2
    weights = mixture.gate().exp()
    assert weights[0] == weights[2] and sorted([2 * weights[0].item(), weights[1].item()]) == pytest.approx(
        [0.25, 0.75], abs=0.04
    )


def test_components_of_nested_mixtures_differ():
    inner = [gaussians(), gaussians()]
    mixture = Mixture(inner)
    mixture.adapt(two_clusters())
    assert len({round(loc, 3) for part in inner for loc in locations(part)[:, 0].tolist()}) == 4


@pytest.mark.parametrize("rows", ["outlier", "repeated", "binary"])
def test_clusters_without_a_scale(rows):
    """A component whose cluster is a single row, or constant in a column, takes its scale from all rows."""
    x = two_clusters(300)
    if rows == "outlier":
        x[0] = 1e4
    if rows == "repeated":
        x[:50] = x[0]
    if rows == "binary":
        x[:, 0] = (x[:, 0] > 105).float()
    mixture = gaussians(3)
    mixture.adapt(x)
    assert all((flow.standardization.scale > 0).all() for flow in mixture.components)
    assert mixture().log_prob(x).isfinite().all()
    assert len({tuple(loc) for loc in locations(mixture).tolist()}) == 3


def test_components_start_inside_their_supports():
    """The bounded component takes the cluster of positive rows, in whichever place it stands."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(500, 1) - 5, (0.2 * torch.randn(500, 1)).exp() + 5])
    for place in (0, 1):
        flows = [Flow([Triangular(1)])]
        flows.insert(place, Flow([Triangular(1)], support=constraints.positive))
        mixture = Mixture(flows)
        mixture.adapt(x)
        bounded, real = mixture.components[place], mixture.components[1 - place]
        torch.testing.assert_close(bounded.standardization.loc, x[x > 0].log().mean()[None])
        assert real.standardization.loc.item() == pytest.approx(-5.0, abs=0.2)


def test_a_component_without_rows_raises():
    mixture = Mixture([Flow([Triangular(2)]), Flow([Triangular(2)], support=constraints.unit_interval)])
    with pytest.raises(DataError, match="component 1 of this mixture has fewer than 2 of the 100 rows .*Interval"):
        mixture.adapt(two_clusters(100))


# What a fit does


@pytest.mark.parametrize("make", [splines, gaussians], ids=["splines", "gaussians"])
def test_a_fit_reports_what_the_mixture_scores(make):
    x, mixture = two_clusters(), make()
    fit = pf.fit_density(mixture, x, max_epochs=10, **QUIET)
    with seeded(0):
        _, held_out = split(load(mixture, x).rows, 0.1)
    assert fit.best_log_prob == pytest.approx(mixture().log_prob(x[held_out]).mean().item(), abs=1e-5)
    # Five parameters of each component, and more of splines, each of which costs 1 / 2n nats.
    assert mixture().log_prob(x).mean() > log_density(x).mean() - 0.02
    draws = mixture().sample((4000,))
    assert draws.mean(0).tolist() == pytest.approx([107.5, 107.5], abs=4 * 4.5 / math.sqrt(1000))
    assert mixture.gate().exp().max().item() == pytest.approx(0.75, abs=0.03)


def test_a_further_fit_starts_from_the_state_before():
    x, mixture = two_clusters(), gaussians()
    pf.fit_density(mixture, x, max_epochs=5, **QUIET)
    before, scored = locations(mixture).clone(), mixture().log_prob(x).mean().item()
    pf.fit_density(mixture, x, max_epochs=5, **QUIET)
    assert torch.equal(locations(mixture), before)
    assert mixture().log_prob(x).mean().item() > scored - 0.005


def test_identical_components_part():
    """Three Gaussian components, equal before the fit, reach the likelihood of the truth on three clusters in a row."""
    torch.manual_seed(1)
    x = torch.cat([loc + torch.randn(600, 1) for loc in (-1e3, -980.0, -960.0)])
    mixture = gaussians(3, dim=1)
    pf.fit_density(mixture, x, max_epochs=5, **QUIET)
    truth = -math.log(3) - 0.5 * math.log(2 * math.pi) - 0.5
    assert mixture().log_prob(x).mean().item() == pytest.approx(truth, abs=4 * math.sqrt(0.5 / 1800))


def test_bounded_and_unbounded_components():
    """Of a positive and a real variable in equal parts, each component finds its own."""
    torch.manual_seed(0)
    x = torch.cat([(0.5 * torch.randn(1500, 1)).exp(), -2 + torch.randn(1500, 1)])
    mixture = Mixture([Flow([Triangular(1)], support=constraints.positive), Flow([Triangular(1)])])
    pf.fit_density(mixture, x, max_epochs=40, **QUIET)
    law = [dist.LogNormal(0.0, 0.5), dist.Normal(-2.0, 1.0)]
    parts = torch.stack([law[0].log_prob(x.clamp_min(1e-9)).where(x > 0, -torch.inf), law[1].log_prob(x)])
    truth = (parts.logsumexp(0) - math.log(2)).mean().item()
    assert mixture().log_prob(x).mean().item() == pytest.approx(truth, abs=0.01)
    assert mixture.gate().exp()[0].item() == pytest.approx(0.5, abs=0.05)


def test_all_rows_below_a_bound_are_refused():
    with pytest.raises(DataError, match="values outside the support"):
        pf.fit_density(splines(support=constraints.positive), torch.randn(100, 2), **QUIET)


def test_a_compiled_fit_is_the_same():
    x = two_clusters(600).double()
    logs = []
    for compile in ("none", "trace"):
        torch.manual_seed(0)
        mixture = splines().double()
        fit = pf.fit_density(mixture, x, max_epochs=3, batch_size=8, compile=compile, **QUIET)
        logs.append(fit.history["log_prob"])
    torch.testing.assert_close(*map(torch.tensor, logs), rtol=1e-6, atol=1e-6)


def test_weights_that_depend_on_a_context():
    r"""A logistic law of the class given a context far from zero, with means on a line: the density of the truth."""
    torch.manual_seed(0)
    c = torch.randn(3000, 1)
    chance = torch.sigmoid(3 * c)
    x = torch.where(torch.rand(3000, 1) < chance, 5.0, -5.0) + c + 0.5 * torch.randn(3000, 1)
    mixture = Mixture([Flow([Elementwise(1, context_dim=1)]) for _ in range(2)])
    pf.fit_density(mixture, x, c, max_epochs=30, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), **QUIET)
    parts = [dist.Normal(sign * 5 + c, 0.5).log_prob(x) + w.log() for sign, w in ((1, chance), (-1, 1 - chance))]
    truth = torch.stack(parts).logsumexp(0).mean().item()
    assert mixture(c).log_prob(x).mean().item() == pytest.approx(truth, abs=0.03)
    given = torch.tensor([[-1.0], [0.0], [0.5]])
    upper = mixture.gate(given).exp()[:, locations(mixture)[:, 0].argmax()]
    torch.testing.assert_close(upper, torch.sigmoid(3 * given[:, 0]), rtol=0, atol=0.05)


def test_the_network_of_the_weights_sees_standardised_contexts():
    torch.manual_seed(0)
    c = 2000 + 10 * torch.randn(2000, 2)
    c[:, 1] = 5.0
    x = torch.where(c[:, :1] > 2000, 5.0, -5.0) + torch.randn(2000, 1)
    mixture = Mixture([Flow([Triangular(1)]), Flow([Triangular(1)])], context_dim=2)
    pf.fit_density(mixture, x, c, max_epochs=20, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), **QUIET)
    # Up to rows near the step, the context tells the component.
    truth = -0.5 * math.log(2 * math.pi) - 0.5
    assert mixture(c).log_prob(x).mean().item() == pytest.approx(truth, abs=0.1)

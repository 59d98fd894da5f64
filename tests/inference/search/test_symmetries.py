"""Exact symmetries of log joints: found, not found where they are not exact, and what they spare a search."""

import math

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.compiling.check import Compiler
from pyroflows.inference.search.starts import MAX_MODES, find_start, further_points, starting_points
from pyroflows.inference.search.symmetries import MAX_CANDIDATES, candidates, find_symmetries
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe

Y = torch.tensor([-4.2, -3.8, 0.1, -0.2, 0.3, 4.1, 3.9])


def symmetries_of(model):
    layout = Layout(describe(model, (), {}))
    torch.manual_seed(0)
    points = torch.randn(5, layout.dim)
    log_joint = LogJoint(model, (), {}, layout, points, Compiler("none"))
    return layout, log_joint, find_symmetries(layout, log_joint.in_chunks, points)


def start_of(model):
    """As a fit with default settings does."""
    layout = Layout(describe(model, (), {}))
    torch.manual_seed(0)
    center = torch.zeros(layout.dim)
    log_joint = LogJoint(model, (), {}, layout, torch.randn(5, layout.dim), Compiler("none"))
    points = starting_points(model, (), {}, layout, center, 8)
    return find_start(
        log_joint, points, None, lambda modes, num: further_points(model, (), {}, layout, center, modes, num)
    )


def mixture(means=3, loc=0.0):
    def model():
        w = pyro.sample("w", dist.Dirichlet(2 * torch.ones(means)))
        with pyro.plate("comp", means):
            mu = pyro.sample("mu", dist.Normal(loc, 4.0))
            s = pyro.sample("s", dist.LogNormal(-0.5, 0.5))
        with pyro.plate("row", len(Y)):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, s)), obs=Y)

    return model


def signs():
    a = pyro.sample("a", dist.Uniform(-3.0, 3.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    c = pyro.sample("c", dist.Normal(0.5, 2.0))
    pyro.factor("y", -4 * (a.square() - 2).square() - 40 * (b.abs() - 1).square() - (c - 1).square())


def test_signs_of_sites():
    """Of a symmetric interval and of the reals; not of a site whose prior has another center."""
    _, _, found = symmetries_of(signs)
    assert {tuple(s.signs.tolist()) for s in found} == {(-1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (-1.0, -1.0, 1.0)}
    assert not any(s.is_permutation for s in found)


def test_loadings_and_scores_change_sign_column_by_column():
    y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 4), torch.tensor([[1.0], [2.0]])).to_event(2))
        with pyro.plate("row", 5):
            f = pyro.sample("f", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal((f[..., None, :] @ w[..., None, :, :])[..., 0, :], 0.5).to_event(1), obs=y)

    layout, _, found = symmetries_of(model)
    flips = {tuple(s.signs.tolist()) for s in found}
    for k in (0, 1):
        expected = torch.ones(layout.dim)
        expected[:8].reshape(2, 4)[k] = -1
        expected[8:].reshape(5, 2)[:, k] = -1
        assert tuple(expected.tolist()) in flips
    # The priors of the two factors differ, so that they cannot be exchanged.
    assert not any(s.is_permutation for s in found)


def test_components_are_exchanged_along_all_their_sites():
    """Weights on a simplex, means and scales in a plate: together, and in no other way."""
    layout, log_joint, found = symmetries_of(mixture())
    assert len(found) == 3 and all(s.is_permutation for s in found)
    u = torch.randn(4, layout.dim)
    for symmetry in found:
        assert torch.allclose(log_joint(symmetry(u)), log_joint(u), atol=1e-3)
        before, after = layout.constrain(u)[0], layout.constrain(symmetry(u))[0]
        order = [int((after["mu"][0] == m).nonzero()) for m in before["mu"][0]]
        assert sorted(order) == [0, 1, 2] and order != [0, 1, 2]
        for name in ("w", "mu", "s"):
            torch.testing.assert_close(after[name][:, order], before[name], rtol=1e-4, atol=1e-5)


def test_components_with_other_priors_are_not_exchanged():
    _, _, found = symmetries_of(mixture(loc=torch.tensor([0.0, 0.0, 1.0])))
    assert len(found) == 1  # the first two
    _, _, found = symmetries_of(mixture(loc=torch.tensor([-1.0, 0.0, 1.0])))
    assert not found


def test_states_of_a_chain_are_exchanged_in_rows_and_columns():
    """A matrix of transitions keeps its meaning only if both are permuted."""

    def model():
        with pyro.plate("from", 2):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(2)))
            m = pyro.sample("m", dist.Normal(0.0, 2.0))
        stay = p[..., 0, 0] * p[..., 1, 1]
        pyro.factor("y", -(m[..., 0] - m[..., 1]).square() + stay + (m * p[..., 0, :].detach() * 0).sum(-1))

    _, _, found = symmetries_of(model)
    assert any(len(s.swaps) == 2 for s in found)


def test_the_covariance_of_an_image():
    layout, _, (swap, *_) = symmetries_of(mixture())
    torch.manual_seed(1)
    loc, root = torch.randn(layout.dim).double(), 1e-3 * torch.randn(layout.dim, layout.dim).double().tril()
    draws = loc + torch.randn(20_000, layout.dim).double() @ root.mT
    image = swap.root_of_image(loc, root)
    expected = torch.cov(swap(draws).mT)
    scale = expected.diagonal().sqrt()
    error = (image @ image.mT - expected) / (scale * scale[:, None])
    assert error.abs().max() < 5 * math.sqrt(2 / 20_000)


def test_the_number_of_candidates_is_bounded():
    def model():
        with pyro.plate("rows", 1000):
            pyro.sample("f", dist.Normal(torch.zeros(9), 1.0).to_event(1))
        for i in range(12):
            pyro.sample(f"x{i}", dist.Normal(torch.zeros(9), 1.0).to_event(1))

    assert 100 < len(candidates(Layout(describe(model, (), {})))) <= MAX_CANDIDATES


# What they spare a search


def test_images_are_modes_without_a_search():
    modes, starts = start_of(signs)
    assert len(modes) == 4 and starts.num_equal == 4
    assert {tuple(m.loc[:2].sign().tolist()) for m in modes} == {(1, 1), (1, -1), (-1, 1), (-1, -1)}
    assert max(starts.modes) - min(starts.modes) < 0.3
    # All hits count as one mode, so that the second batch is the last.
    assert starts.num_starts < 80 and starts.new_mode_probability < 0.02


def test_too_many_equal_modes_are_counted_and_one_is_fitted():
    """Four labels have 24 orders; the verdict leaves 23 of them out."""

    def model():
        with pyro.plate("comp", 4):
            mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ordered = mu.sort(-1).values
        pyro.factor("y", -0.5 * ((ordered - torch.tensor([-9.0, -3.0, 3.0, 9.0])) / 0.3).square().sum(-1))

    modes, starts = start_of(model)
    assert len(starts.modes) == starts.num_equal == 24 > MAX_MODES
    assert len(modes) == 1
    posterior = pf.FlowVI(model, num_steps=30, seed=0, progress_bar=False).run()
    diagnosis = posterior.diagnose()
    assert diagnosis.verdict == "do not use" and diagnosis.num_other_modes == 23
    assert any("order the components" in reason for reason in diagnosis.reasons)
    assert (posterior.sample(1000)["mu"].std(0) < 0.5).all()  # the draws are those of one order


@pytest.mark.slow
def test_four_equal_modes():
    """The right shares of the modes are known by symmetry; eight starts find all four in half of the fits."""
    y = torch.randn(6, generator=torch.Generator().manual_seed(0))

    def model():
        a = pyro.sample("a", dist.Uniform(-3.0, 3.0))
        b = pyro.sample("b", dist.Uniform(-3.0, 3.0))
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(m, a**2 + 0.01), obs=y)
            pyro.sample("z", dist.Normal(m, b**2 + 0.01), obs=2 * y)

    posterior = pf.FlowVI(model, seed=1, progress_bar=False).run()
    draws = posterior.sample(20_000)
    assert posterior.diagnose().verdict == "good"
    for i in (True, False):
        for j in (True, False):
            share = ((draws["a"] > 0) == i).logical_and((draws["b"] > 0) == j).double().mean()
            # The weights are evidences from 4000 draws each, of flows whose log weights have a variance below 0.1.
            assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.1875 / 20_000 + 2 * 0.0625 * 0.1 / 4000))


@pytest.mark.slow
def test_free_labels_have_equal_means():
    torch.manual_seed(0)
    which = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), 250, True)
    y = torch.tensor([-2.0, 0.5, 3.0])[which] + 0.6 * torch.randn(250)

    def model(y):
        w = pyro.sample("w", dist.Dirichlet(2 * torch.ones(3)))
        with pyro.plate("comp", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
            s = pyro.sample("s", dist.LogNormal(-0.5, 0.5))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, s)), obs=y)

    posterior = pf.FlowVI(model, num_steps=300, seed=0, progress_bar=False).run(y)
    mu = posterior.sample(20_000)["mu"].double()
    assert posterior.starts.num_equal == len(posterior.guide.flow.components) == 6
    # The sd of a mean is about 2; weights of six modes add to the error of the draws.
    assert (mu.mean(0) - mu.mean()).abs().max() < 0.1

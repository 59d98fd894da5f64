"""Local draws: the rows of a structured posterior, seen or not, with weights and verdicts of their own."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_value

import pyroflows as pf
from pyroflows.errors import CheckpointError, ModelError, OptionError
from pyroflows.flows import Recipe
from pyroflows.guides import AutoFlow, AutoStructuredFlow
from pyroflows.inference.arviz import pareto_smoothed, pareto_smoothed_rows
from pyroflows.inference.posterior import Posterior
from pyroflows.models.all_rows import WithAllRows
from pyroflows.training.history import History
from tests.guides.hierarchies import encode, measured

Y = torch.tensor([6.0, -1.0, 0.5, 0.0, 1.0, -0.5])
NEW = torch.tensor([3.0, 0.0, -2.0])


def untrained(model, guide, *args):
    """The posterior of a guide that was not trained, whose weights must correct it."""
    torch.manual_seed(0)
    guide(*args)
    return Posterior(WithAllRows(model), guide, args, {}, History(), compile="none")


@pytest.fixture(scope="module")
def posterior():
    """A short fit to six rows, whose global latent is Gaussian."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    guide = AutoStructuredFlow(measured, Recipe("Gaussian"), encoder=encode, init_scale=0.8)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True)
    svi = SVI(measured, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(200):
        svi.step(Y)
    return Posterior(WithAllRows(measured), guide, (Y,), {}, History(), compile="none")


def sd(weights, values):
    mean = (weights * values).sum(0)
    return (weights * (values - mean) ** 2).sum(0).sqrt()


def test_new_rows_have_the_posterior_of_their_data(posterior):
    r"""With :math:`\mu \sim N(m, s^2)` as drawn, :math:`z \sim N(m, s^2 + 1)` a priori, and y has variance 4."""
    local = posterior.local(NEW, num_samples=40_000, seed=1)
    m, s = local.draws["mu"].mean(), local.draws["mu"].std()
    precision = 1 / (s**2 + 1) + 1 / 4
    expected = (m / (s**2 + 1) + NEW / 4) / precision
    torch.testing.assert_close(local.mean()["z"].float(), expected, rtol=0.05, atol=0.05)
    found = sd(local.normalized, local.draws["z"]).float()
    torch.testing.assert_close(found, precision.rsqrt().expand(3), rtol=0.05, atol=0)
    resampled = local.resample(40_000, seed=0)
    assert list(resampled) == ["z"]
    torch.testing.assert_close(resampled["z"].mean(0), local.mean()["z"].float(), rtol=0, atol=0.03)
    table = local.summary()
    assert table.loc["z[2]", "mean"] == pytest.approx(local.mean()["z"][2].item())
    assert table.loc["mu", "mean"] == pytest.approx(m.item(), rel=1e-4)


def test_data_of_own_rows_do_not_enter_the_globals_twice(posterior):
    r"""Given :math:`\mu` the mean of z is :math:`0.8 \mu + 0.2 y`, whatever the law of the globals is."""
    local = posterior.local(num_samples=40_000, seed=1)
    expected = 0.8 * local.draws["mu"].mean() + 0.2 * Y
    torch.testing.assert_close(local.mean()["z"].float(), expected, rtol=0, atol=0.06)
    as_if_new = posterior.local(Y, num_samples=40_000, seed=1).mean()["z"].float()
    assert (as_if_new - expected).abs().max() > 0.2


def test_weights_are_ratios_of_densities(posterior):
    """Those of each draw and row, without smoothing, computed by hand."""
    local = posterior.local(NEW, num_samples=20, seed=1)
    mu, z = local.draws["mu"][:, None], local.draws["z"]
    log_p = dist.Normal(mu, 1.0).log_prob(z) + dist.Normal(z, 2.0).log_prob(NEW)
    levels = posterior.guide.call((NEW,), {}).levels
    law = posterior.guide.law_at(levels, {}, (NEW,), {})
    log_q = law.log_prob(torch.cat([mu, z], -1)) - dist.Normal(*moments(posterior)).log_prob(mu)[:, 0]
    assert math.isinf(local.khat[0]), "20 weights are too few to be smoothed"
    torch.testing.assert_close(local.log_weights.sum(1).float(), log_p.sum(1) - log_q, rtol=1e-4, atol=1e-3)


def moments(posterior):
    """Location and scale of the global latent."""
    layer = posterior.guide.flow.transform.layers[0]
    ends = layer.affine(layer.flow(torch.tensor([[0.0], [1.0]]))).detach()
    return ends[0], ends[1] - ends[0]


def two_levels(y, mask, size=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("g", len(y), subsample_size=size, dim=-2) as i:
        t = pyro.sample("t", dist.Normal(mu, 1.0))
        with pyro.plate("r", y.shape[1], dim=-1), poutine.mask(mask=mask[i]):
            s = pyro.sample("s", dist.LogNormal(t, 1.0))
            pyro.deterministic("twice", 2 * s)
            pyro.sample("y", dist.Normal(s, 1.0), obs=y[i])


def of_groups(rows, y, mask, size=None):
    return torch.where(mask, y, 0.0)[rows]


def of_cells(rows, y, mask, size=None):
    return torch.where(mask, y, 0.0)[rows[0]][:, rows[1], None]


def test_a_group_with_its_rows_is_a_row_and_padding_is_none():
    """Another padding of the same groups changes nothing, and only the outer plate has weights."""
    y = torch.randn(3, 2).abs()
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    features = {"t": lambda rows, y, mask, size=None: of_groups(rows, y, mask).sum(1, keepdim=True), "s": of_cells}
    guide = AutoStructuredFlow(two_levels, encoder=features, init_scale=0.8)
    posterior = untrained(two_levels, guide, y, mask)
    local = posterior.local(y, mask, num_samples=200, seed=1)
    assert local.log_weights.shape == (200, 3)
    assert local.draws["s"].shape == (200, 3, 2)
    padded = torch.cat([torch.full((3, 2), torch.nan), y], 1), torch.cat([torch.zeros(3, 2).bool(), mask], 1)
    other = posterior.local(*padded, num_samples=200, seed=1)
    torch.testing.assert_close(other.log_weights, local.log_weights, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.draws["s"][:, :, 2:][:, mask], local.draws["s"][:, mask])
    resampled = local.resample(50, seed=0)
    assert resampled["s"].shape == (50, 3, 2)
    assert torch.equal(resampled["twice"], 2 * resampled["s"])
    assert len(local.summary(["s"])) == 5
    assert local.to_arviz(50)["posterior"]["s"].dims == ("chain", "draw", "g", "r")


def test_rows_without_latents_and_data_weigh_nothing():
    y, mask = torch.randn(3, 2).abs(), torch.tensor([True, False, True])

    def model(y, mask, size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("g", len(y), subsample_size=size) as i, poutine.mask(mask=mask[i]):
            z = pyro.sample("z", dist.LogNormal(mu, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[i, 0])

    guide = AutoStructuredFlow(model, encoder=lambda rows, y, mask, size=None: y[rows])
    local = untrained(model, guide, y, mask).local(y, mask, num_samples=100, seed=0)
    assert local.log_weights[:, 1].eq(0).all()
    assert local.log_weights[:, 0].std() > 0
    assert local.verdicts[1] == "good"


def test_verdicts_tell_rows_apart():
    """The law of the guide is that of the first rows, which others leave further and further."""

    def model(shift):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("g", len(shift)):
            pyro.sample("z", dist.Normal(shift, 1.0))

    shift = torch.tensor([0.0, 0.0, 0.7, 5.0])
    at_zero = init_to_value(values={"mu": torch.tensor(0.0), "z": torch.zeros(4)})
    encoder = {"z": lambda rows, shift: 0 * shift[rows, None]}
    guide = AutoStructuredFlow(model, encoder=encoder, init_loc_fn=at_zero, init_scale=1.0)
    guide(shift)
    guide.flow.transform.layers[0].levels[0].flow = None
    local = untrained(model, guide, shift).local(shift, num_samples=4000, seed=0)
    assert list(local.verdicts) == ["good", "good", "correct it", "do not use"]
    assert repr(local) == (
        "LocalDraws(4000 draws): of 4 rows of plate 'g', 2 can be used as drawn, 1 by their weights, and 1 not at all, "
        "since k-hat is above 0.70"
    )


def test_subsampled_fit_is_judged_on_all_rows():
    y = torch.randn(30)
    guide = AutoStructuredFlow(measured, encoder=encode)
    vi = pf.FlowVI(measured, guide, num_steps=10, num_particles=8, compile="none", seed=0, progress_bar=False)
    posterior = vi.run(y, 5)
    assert posterior.sample(3)["z"].shape == (3, 30)
    assert posterior.local(num_samples=85, seed=0).log_weights.shape == (100, 30)
    assert posterior.importance_sample(50, progress_bar=False).draws["z"].shape == (50, 30)
    assert math.isfinite(posterior.elbo)
    assert posterior.predictive(7, y[:4])["y"].shape == (7, 4)
    assert posterior.to_arviz(20)["posterior"]["z"].shape == (1, 20, 30)
    assert len(posterior.summary()) == 31
    assert torch.equal(posterior.local(NEW, seed=3).log_weights, posterior.local(NEW, seed=3).log_weights)


def test_predictions_of_other_data_are_those_of_their_rows(posterior):
    torch.manual_seed(0)
    posterior.guide.flow.transform.layers[0].levels[0].affine.net[-1].weight.data.normal_(0, 2.0)
    near, far = (posterior.predictive(4000, torch.full((2,), value), seed=0)["y"].mean() for value in (0.0, 20.0))
    assert (near - far).abs() > 0.5


def test_files_of_structured_posteriors(tmp_path):
    y, path = torch.randn(8), tmp_path / "posterior.safetensors"
    posterior = untrained(measured, AutoStructuredFlow(measured), y, 3)
    posterior.save(path)
    for loaded in (
        pf.load_posterior(path, measured, y, 3),
        pf.load_posterior(path, measured, y, 3, guide=AutoStructuredFlow(measured)),
    ):
        assert torch.equal(loaded.sample(5, seed=0)["z"], posterior.sample(5, seed=0)["z"])
        assert loaded.elbo == posterior.elbo
    with pytest.raises(CheckpointError, match="another flow than the guide"):
        pf.load_posterior(path, measured, y[:4], 3)
    with pytest.raises(CheckpointError, match="not with AutoFlow"):
        pf.load_posterior(path, measured, y, 3, guide=AutoFlow(measured))
    with pytest.raises(CheckpointError, match="'y' is missing"):
        pf.load_posterior(path, measured)

    encoded = untrained(measured, AutoStructuredFlow(measured, encoder=encode), y, 3)
    encoded.save(path)
    with pytest.raises(CheckpointError, match=r"guide=AutoStructuredFlow\(model, encoder=encoder\)"):
        pf.load_posterior(path, measured, y, 3)
    loaded = pf.load_posterior(path, measured, y, 3, guide=AutoStructuredFlow(measured, encoder=encode))
    assert torch.equal(loaded.local(NEW, seed=0).draws["z"], encoded.local(NEW, seed=0).draws["z"])

    plain = untrained(measured, AutoFlow(measured), y)
    plain.save(path)
    with pytest.raises(OptionError, match="holds no AutoStructuredFlow"):
        pf.load_posterior(path, measured, y, guide=AutoStructuredFlow(measured))


def test_posteriors_without_rows_have_no_local_draws():
    with pytest.raises(OptionError, match=r"FlowVI\(model, guide=AutoStructuredFlow"):
        untrained(measured, AutoFlow(measured), Y).local()


def test_learned_rows_serve_no_others():
    posterior = untrained(measured, AutoStructuredFlow(measured), Y)
    assert posterior.local(num_samples=30).draws["z"].shape == (40, 6)
    with pytest.raises(OptionError, match="each row of plate 'g' has parameters of its own"):
        posterior.local(NEW)


def test_data_outside_of_the_plate_are_an_error():
    def model(y, groups):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("g", 3):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Normal(z[groups], 1.0), obs=y)

    args = torch.randn(5), torch.tensor([0, 0, 1, 2, 2])
    with pytest.raises(ModelError, match="site 'y' depends on latents in plate 'g' and stands outside of it"):
        untrained(model, AutoStructuredFlow(model), *args).local(num_samples=30)


def test_rows_that_depend_on_one_another_are_an_error():
    def model(y):
        with pyro.plate("g", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z.cumsum(-1), 1.0), obs=y)

    with pytest.raises(ModelError, match="rows of plate 'g' are not independent given the global latents"):
        untrained(model, AutoStructuredFlow(model), Y).local(num_samples=30)


def test_plates_that_cross_are_an_error():
    def model(y):
        groups, rows = pyro.plate("g", 2, dim=-2), pyro.plate("r", 3, dim=-1)
        with groups:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with rows:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with groups, rows:
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    with pytest.raises(ModelError, match="plates 'g' and 'r' both have latents"):
        untrained(model, AutoStructuredFlow(model), torch.zeros(2, 3)).local()


def test_other_globals_are_an_error():
    def model(y, num):
        w = pyro.sample("w", dist.Normal(torch.zeros(num), 1.0).to_event(1))
        with pyro.plate("g", len(y)):
            z = pyro.sample("z", dist.Normal(w.sum(), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoStructuredFlow(model, encoder=lambda rows, y, num: y[rows, None])
    with pytest.raises(ModelError, match=r"other latents outside of plates.*3 elements.*2"):
        untrained(model, guide, Y, 2).local(Y, 3)


def test_rows_are_smoothed_as_each_alone():
    rng = np.random.default_rng(0)
    rows = np.stack([rng.normal(size=200), np.zeros(200), 3 * rng.standard_t(2, size=200), rng.normal(size=200)])
    rows[3, :150] = -np.inf
    smoothed, khat = pareto_smoothed_rows(rows)
    for row, values, k in zip(rows, smoothed, khat, strict=True):
        expected, expected_k = pareto_smoothed(row)
        np.testing.assert_allclose(values, expected)
        assert k == pytest.approx(expected_k)

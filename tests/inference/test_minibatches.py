"""Fits that see a part of the rows, or a batch of the data, in each step."""

import math
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.utils.data import DataLoader, TensorDataset

import pyroflows as pf
from pyroflows.errors import DataError, FitInterrupted, ModelError, OptionError
from pyroflows.fitting.estimators import ESTIMATORS
from pyroflows.guides import AutoFlow
from pyroflows.guides.structured import AutoStructuredFlow
from pyroflows.inference.batches import Batches, is_loader
from pyroflows.inference.effort import LEAST_DECAY_OF_ENCODERS, LEAST_DECAY_OF_TABLES, LEAST_STEPS_OF_PARTS
from pyroflows.inference.minibatches import elbo_of
from pyroflows.inference.preparation import prepared
from pyroflows.models.subsampling import random_rows
from pyroflows.training.history import History
from pyroflows.training.loop import Trainer

N = 40
torch.manual_seed(0)
Y = 1.0 + 1.4 * torch.randn(N)
ROWS = torch.arange(N)
OPTIONS = {"num_particles": 16, "seed": 0, "progress_bar": False}


def mean_alone(y, size=N):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", size, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(mu, 2**0.5), obs=y)


def hierarchy(y, size=N):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", size, subsample_size=len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def with_indices(rows, y, size=N):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", size, subsample=rows):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def reads_y(rows, *data):
    return data[-1][:, None]


def small_layer(dim, context_dim):
    return pf.transforms.Autoregressive(dim, "affine", context_dim=context_dim, hidden_dims=(4,))


def guide_of(model, **options):
    return AutoStructuredFlow(
        model, lambda dim: pf.flows.IAF(dim, num_layers=1, hidden_dims=(4,)), small_layer, **options
    )


def indexed_loader(y=Y, batch_size=16, **options):
    return DataLoader(TensorDataset(torch.arange(len(y)), y), batch_size, **options)


class Again:
    """Batches that come again and again."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def exact(y=Y):
    """Mean and standard deviation of mu in all of these models."""
    precision = 1 + len(y) / 2
    return y.sum() / 2 / precision, precision**-0.5


def objective_of(model, guide, loader, estimator="path"):
    arguments = Batches(model, loader)
    guide._setup_prototype(*arguments.first[0])
    log_joint, center = prepared(model, guide, *arguments.first, "none", may_move=False)
    make = elbo_of(guide, model, arguments, log_joint, center)
    return make(guide.flow, ESTIMATORS[estimator], 8)


def gradient(objective, *drawn):
    loss, _ = objective.loss(*drawn)
    return torch.autograd.grad(loss, objective.parameters, allow_unused=True, materialize_grads=True)


# The objective


@pytest.mark.parametrize("estimator", ["total", "path"])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "encoder"])
def test_gradients_of_batches_average_to_that_of_all_rows(estimator, learned):
    y = Y[:4].double()

    def model(rows, y):
        with_indices(rows, y, size=4)

    guide = guide_of(model, dtype=torch.float64, encoder=None if learned else reads_y)
    batches = objective_of(model, guide, indexed_loader(y, 2), estimator)
    whole = objective_of(model, guide, indexed_loader(y, 4), estimator)
    with torch.no_grad():
        for parameter in batches.parameters:
            parameter += 0.3 * torch.randn_like(parameter)
    noise, beta, rows, _ = whole.draw()
    assert noise.shape == (8, 5)
    expected = gradient(whole, noise, beta, rows, y)
    found = []
    for part in [[0, 3], [1, 2]]:
        index = torch.tensor(part)
        batches.draw()
        found.append(gradient(batches, noise[:, [0, *(1 + index)]], beta, index, y[index]))
    for a, b, total in zip(*found, expected, strict=True):
        torch.testing.assert_close((a + b) / 2, total)
    assert any(total.abs().max() > 1e-2 for total in expected)


def test_the_order_of_rows_does_not_matter():
    y = Y[:4]

    def model(rows, y):
        with_indices(rows, y, size=4)

    guide = guide_of(model)
    objective = objective_of(model, guide, indexed_loader(y, 4))
    with torch.no_grad():
        for parameter in objective.parameters:
            parameter += 0.3 * torch.randn_like(parameter)
    noise, beta, rows, _ = objective.draw()
    order = torch.tensor([2, 0, 3, 1])
    loss, _ = objective.loss(noise, beta, rows, y)
    other, _ = objective.loss(noise[:, [0, *(1 + order)]], beta, rows[order], y[order])
    swapped, _ = objective.loss(noise, beta, rows[order], y[order])
    torch.testing.assert_close(loss, other)
    assert (loss - swapped).abs() > 1e-3


def test_a_call_with_all_rows_in_another_order():
    model, y, order = partial(with_indices, size=4), Y[:4], torch.tensor([2, 0, 3, 1])
    guide = guide_of(model)
    guide(torch.arange(4), y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    laws = []
    for index in (torch.arange(4), order):
        nodes = poutine.trace(guide).get_trace(index, y[index]).nodes
        laws.append(next(node["fn"] for name, node in nodes.items() if name.endswith("_latent")))
    x = torch.randn(3, 5)
    expected = laws[0].log_prob(x)
    torch.testing.assert_close(laws[1].log_prob(x[:, [0, *(1 + order)]]), expected)
    assert (laws[1].log_prob(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_draws_come_with_all_signs_where_they_may_depend_on_one_another(estimator):
    guide = guide_of(with_indices)
    noise, *_ = objective_of(partial(with_indices, size=4), guide, indexed_loader(Y[:4], 2), estimator).draw()
    mu, rows = noise[:, 0].unflatten(0, (4, 2)), noise[:, 1:].unflatten(0, (4, 2))
    signs = torch.tensor([[1, 1], [-1, 1], [1, -1], [-1, -1]])
    is_mirrored = torch.equal(mu, mu[0] * signs[:, :1]) and torch.equal(rows, rows[0] * signs[:, 1:, None])
    assert is_mirrored == (estimator in ("total", "path"))
    assert len(mu[0].unique()) == 2


def test_rows_are_drawn_uniformly_without_repetition():
    torch.manual_seed(0)
    for size, count in [(10, 4), (200, 14)]:
        drawn = torch.stack([random_rows(size, count) for _ in range(2000)])
        assert all(len(row.unique()) == count for row in drawn)
        frequencies = drawn.flatten().bincount(minlength=size) / 2000 / count * size
        assert (frequencies - 1).abs().max() < 5 * (size / count / 2000) ** 0.5


# Fits


def require_close(posterior, y, tolerance):
    mu, sd = exact(y)
    draws = posterior.sample(20_000, seed=0)["mu"]
    assert abs(draws.mean() - mu) < tolerance * sd
    assert abs(draws.std() / sd - 1) < tolerance


def fit_learned(num_steps, y):
    model = partial(with_indices, size=len(y))
    return pf.FlowVI(model, guide_of(model), num_steps=num_steps, **OPTIONS).run(indexed_loader(y, 5, shuffle=True))


def fit_encoded(num_steps, y):
    model = partial(hierarchy, size=len(y))
    guide = guide_of(model, encoder=reads_y)
    return pf.FlowVI(model, guide, num_steps=num_steps, **OPTIONS).run(DataLoader(y, 16, shuffle=True))


def test_batches_without_local_latents():
    loader = DataLoader(Y, 16, shuffle=True)
    posterior = pf.FlowVI(mean_alone, num_steps=200, **OPTIONS).run(loader)
    require_close(posterior, Y, 0.1)
    assert posterior.with_data(Y).diagnose().verdict != "do not use"


def test_batches_of_a_hierarchy():
    require_close(fit_learned(1000, Y[:12]), Y[:12], 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("fit", "y"), [(fit_learned, Y[:12]), (fit_encoded, Y)])
def test_batches_of_a_hierarchy_fit_closely(fit, y):
    require_close(fit(3000, y), y, 0.05)


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "encoder"])
def test_a_recorded_step_is_the_eager_one(learned):
    """The batches have 16, 16 and 8 rows."""

    def elbos(mode):
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2)
        model = with_indices if learned else hierarchy
        data = TensorDataset(ROWS, Y) if learned else TensorDataset(Y)
        loader = DataLoader(data, 16, shuffle=True, generator=generator)
        guide = guide_of(model, encoder=None if learned else reads_y)
        return pf.FlowVI(model, guide, num_steps=12, compile=mode, **OPTIONS).run(loader).history["elbo"]

    traced, eager = elbos("trace"), elbos("none")
    assert abs(traced - eager).max() < 1e-3 * abs(eager).max()


def test_tuples_dictionaries_and_tensors_are_arguments():
    def elbos(loader):
        return pf.FlowVI(mean_alone, flow, num_steps=5, **OPTIONS).run(loader).history["elbo"].tolist()

    def flow(dim):
        return pf.flows.Planar(dim)

    expected = elbos(DataLoader(Y, 16))
    assert elbos(DataLoader(TensorDataset(Y), 16)) == expected
    assert elbos(DataLoader([{"y": y} for y in Y], 16)) == expected
    parts = Y.split(16)
    expected = elbos(Again(parts))
    assert elbos(Again([(part,) for part in parts])) == expected
    assert elbos(Again([{"y": part} for part in parts])) == expected
    assert elbos(Again([part.numpy() for part in parts])) == expected


def test_the_dtype_of_a_fit_is_that_of_its_option():
    posterior = pf.FlowVI(mean_alone, num_steps=3, dtype=torch.float64, **OPTIONS).run(DataLoader(Y, 16))
    assert posterior.sample(2)["mu"].dtype == torch.float64


def test_a_seed_makes_fits_to_a_loader_equal():
    def drawn():
        posterior = pf.FlowVI(hierarchy, guide_of(hierarchy, encoder=reads_y), num_steps=5, **OPTIONS).run(
            DataLoader(Y, 16, shuffle=True)
        )
        return posterior.sample(3, seed=1)["mu"]

    torch.manual_seed(3)
    first = drawn()
    torch.manual_seed(3)
    assert torch.equal(first, drawn())


def test_rows_that_are_given_once_are_the_data():
    part = torch.tensor([7, 3, 30])
    posterior = pf.FlowVI(with_indices, guide_of(with_indices), num_steps=20, **OPTIONS).run(part, Y[part])
    draws = posterior.sample(100)
    assert draws["z"].shape == (100, 3)
    # The density is that of these rows, each of which counts once.
    flow, z = posterior.guide.flow, torch.randn(4)
    ladj = torch.autograd.functional.jacobian(flow.transform, z).slogdet().logabsdet
    log_prob = flow().log_prob(flow.transform(z))
    torch.testing.assert_close(log_prob, dist.Normal(0.0, 1.0).log_prob(z).sum() - ladj)
    with pytest.raises(ModelError, match=r"'rows' is subsampled \(3 of 40 rows\)"):
        posterior.diagnose()


# The posterior


@pytest.fixture(scope="module")
def posterior():
    guide = guide_of(with_indices, encoder=lambda rows, index, y: y[:, None])
    return pf.FlowVI(with_indices, guide, num_steps=30, **OPTIONS).run(indexed_loader(shuffle=True))


def test_a_posterior_of_batches_has_the_globals(posterior):
    assert list(posterior.sample(7)) == ["mu"]
    assert list(posterior.summary().index) == ["mu"]
    assert "no verdict: fitted to batches" in repr(posterior)
    mu = torch.linspace(-1, 3, 1000)
    assert torch.trapezoid(posterior.log_prob({"mu": mu}).exp(), mu) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "ask", ["diagnose", "mcmc", "to_arviz", "bridge_sample", "fit_proposal", lambda p: p.importance_sample(10)]
)
def test_what_needs_all_rows_says_so(posterior, ask):
    with pytest.raises(ModelError, match="fitted to batches of data.*need all rows at once.*with_data"):
        ask(posterior) if callable(ask) else getattr(posterior, ask)()


def test_predictions_are_those_of_new_rows(posterior):
    assert posterior.predictive(5, torch.arange(3), torch.zeros(3))["y"].shape == (5, 3)
    with pytest.raises(ModelError, match="give predictive the arguments"):
        posterior.predictive(5)


def test_with_all_data_there_is_a_verdict(posterior):
    order = torch.randperm(N)
    whole, permuted = posterior.with_data(ROWS, Y), posterior.with_data(ROWS[order], Y[order])
    assert whole.sample(3)["z"].shape == (3, N)
    assert math.isfinite(whole.elbo)
    draws = whole.sample(5)
    moved = {"mu": draws["mu"], "z": draws["z"][:, order]}
    torch.testing.assert_close(whole.log_prob(draws), permuted.log_prob(moved))
    # The features are those of the data that are given.
    other = posterior.with_data(ROWS, Y.flip(0))
    assert (other.log_prob(draws) - whole.log_prob(draws)).abs().min() > 1e-3


def test_a_file_holds_the_globals(posterior, tmp_path):
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = pf.load_posterior(tmp_path / "posterior.safetensors", with_indices, flow_fn=posterior.guide.flow_fn)
    assert torch.equal(loaded.sample(5, seed=0)["mu"], posterior.sample(5, seed=0)["mu"])


def test_rows_that_a_file_cannot_hold_are_refused(tmp_path):
    def model(y):
        with pyro.plate("columns", 2, dim=-2):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", N, subsample_size=len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(mu.sum(-2), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = guide_of(model, encoder={"z": reads_y})
    posterior = pf.FlowVI(model, guide, num_steps=3, **OPTIONS).run(DataLoader(Y, 16))
    assert posterior.sample(3)["mu"].shape == (3, 2, 1)
    with pytest.raises(ModelError, match="a file holds the global latents alone, but plate columns"):
        posterior.save(tmp_path / "posterior.safetensors")


def test_deterministic_sites_of_globals_are_drawn():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("square", mu**2)
        with pyro.plate("rows", N, subsample_size=len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    draws = pf.FlowVI(model, guide_of(model, encoder=reads_y), num_steps=3, **OPTIONS).run(DataLoader(Y, 16)).sample(4)
    assert set(draws) == {"mu", "square"}
    assert torch.equal(draws["square"], draws["mu"] ** 2)


# Callbacks and interrupts


def test_a_callback_sees_the_posterior_so_far():
    seen = []

    def callback(history, posterior):
        seen.append(posterior.sample(3)["mu"].shape)
        return False

    guide = guide_of(hierarchy, encoder=reads_y)
    posterior = pf.FlowVI(hierarchy, guide, callback=callback, **OPTIONS).run(DataLoader(Y, 16))
    assert seen == [(3,)]
    assert posterior.history.num_steps == 50


def test_an_interrupt_leaves_a_posterior():
    class Interrupted:
        def __init__(self):
            self.count = 0

        def __iter__(self):
            for part in Y.split(16):
                self.count += 1
                if self.count > 20:
                    raise KeyboardInterrupt
                yield part

    vi = pf.FlowVI(hierarchy, guide_of(hierarchy, encoder=reads_y), **OPTIONS)
    with pytest.raises(FitInterrupted) as caught:
        vi.run(Interrupted())
    assert caught.value.result.sample(2)["mu"].shape == (2,)
    assert vi.posterior is caught.value.result
    assert 10 < vi.posterior.history.num_steps < 21


class Stopped(Exception):
    """Ends a fit before its first step."""


def options_of_training(monkeypatch, model, *args, **options):
    """What a fit tells the trainer and the schedule."""
    found = {}

    class Told(Trainer):
        def __init__(self, objective, schedule, *args, **options):
            found.update(options, schedule=schedule)
            raise Stopped

    monkeypatch.setattr("pyroflows.inference.vi.Trainer", Told)
    with pytest.raises(Stopped):
        pf.FlowVI(model, **OPTIONS, **options).run(*args)
    return found


LOADER_WITH_INDICES = DataLoader(TensorDataset(ROWS, Y), 16)


def test_gradients_of_parts_of_the_rows_are_not_clipped(monkeypatch):
    """Their mean would not be the gradient of all rows."""
    guide = guide_of(with_indices)
    assert options_of_training(monkeypatch, with_indices, LOADER_WITH_INDICES, guide=guide)["max_norm"] == math.inf
    guide = guide_of(hierarchy, encoder=reads_y)
    assert options_of_training(monkeypatch, hierarchy, DataLoader(Y, 16), guide=guide)["max_norm"] == math.inf
    assert "max_norm" not in options_of_training(monkeypatch, hierarchy, Y, guide=guide_of(hierarchy))


def test_gradients_for_an_optimizer_of_the_user_are_clipped(monkeypatch):
    options = {"guide": guide_of(with_indices), "optimizer": torch.optim.SGD}
    found = options_of_training(monkeypatch, with_indices, LOADER_WITH_INDICES, **options)
    assert found["optimizer"] is torch.optim.SGD and "max_norm" not in found


@pytest.mark.parametrize(
    ("model", "loader", "make", "num_decay"),
    [
        (mean_alone, DataLoader(Y, 16), lambda: None, LEAST_STEPS_OF_PARTS // 2),
        (hierarchy, DataLoader(Y, 16), lambda: guide_of(hierarchy, encoder=reads_y), LEAST_DECAY_OF_ENCODERS),
        (with_indices, LOADER_WITH_INDICES, lambda: guide_of(with_indices), LEAST_DECAY_OF_TABLES),
    ],
    ids=["globals", "encoder", "table"],
)
def test_rows_settle_over_a_long_decay(monkeypatch, model, loader, make, num_decay):
    schedule = options_of_training(monkeypatch, model, loader, guide=make())["schedule"]
    history = History()
    while schedule.num_steps is None:
        history.append(elbo=0.0)
        schedule.look(history)
    assert schedule.num_steps - history.num_steps == pytest.approx(num_decay, rel=0.2)


# SVI by hand


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "encoder"])
def test_svi_takes_batches_of_different_sizes(learned):
    model = with_indices if learned else hierarchy
    guide = guide_of(model, encoder=None if learned else reads_y)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=False)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    pyro.clear_param_store()
    losses = []
    for _ in range(10):
        for rows, y in indexed_loader(shuffle=True):
            losses.append(svi.step(rows, y) if learned else svi.step(y))
    assert sum(losses[-6:]) < sum(losses[:6])
    assert guide(*((ROWS[:5], Y[:5]) if learned else (Y[:5],)))["z"].shape == (5,)


# Errors


def without_size(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "loader", "error", "message"),
    [
        (mean_alone, Again([]), DataError, "the loader gives no batches"),
        (mean_alone, DataLoader(Y, 64, drop_last=True), DataError, "no batches.*drop_last"),
        (mean_alone, indexed_loader(batch_size=8).__iter__(), OptionError, "gives them once: give a DataLoader"),
        (mean_alone, DataLoader(TensorDataset(Y, Y, Y), 16), OptionError, "does not take these arguments"),
        (mean_alone, DataLoader([{"x": y} for y in Y], 16), OptionError, "does not take these arguments.*'y'"),
        (mean_alone, DataLoader(["a", "b"], batch_size=None), DataError, "a batch holds no tensor"),
        (
            without_size,
            DataLoader(Y, 16),
            OptionError,
            r"site 'y' has scale 1.*plate\('rows', N, subsample_size=len\(y\)",
        ),
        (
            hierarchy,
            DataLoader(Y, 16),
            ModelError,
            "16 of the 40 rows of plate 'rows', but not which.*subsample=indices",
        ),
    ],
    ids=["empty", "dropped", "once", "too-many", "other-name", "no-tensor", "no-size", "no-indices"],
)
def test_loaders_that_cannot_be_used(model, loader, error, message):
    with pytest.raises(error, match=message):
        pf.FlowVI(model, num_steps=3, **OPTIONS).run(loader)


def test_one_flow_over_all_latents_takes_no_local_ones():
    vi = pf.FlowVI(with_indices, AutoFlow(with_indices), num_steps=3, **OPTIONS)
    with pytest.raises(ModelError, match=r"'z' is local to plate 'rows'.*3 of 40 rows.*or use AutoStructuredFlow"):
        vi.run(ROWS[:3], Y[:3])


def test_batches_of_another_kind_are_refused():
    def model(y, name):
        mean_alone(y)

    with pytest.raises(DataError, match="differ by tensors alone, but one holds 'first' where another holds 'second'"):
        pf.FlowVI(model, num_steps=3, **OPTIONS).run(Again([(Y[:16], "first"), (Y[16:], "second")]))


def test_one_batch_needs_no_size():
    posterior = pf.FlowVI(without_size, num_steps=3, **OPTIONS).run(DataLoader(Y, N))
    with pytest.raises(ModelError, match="fitted to batches"):
        posterior.diagnose()


def test_what_is_a_loader():
    assert is_loader((DataLoader(Y),), {})
    assert is_loader((Again([]),), {})
    for data in (Y, Y.numpy(), [1.0, 2.0], (Y, Y), {"y": Y}, "text", TensorDataset(Y), 3):
        assert not is_loader((data,), {})
    assert not is_loader((DataLoader(Y), 1), {})

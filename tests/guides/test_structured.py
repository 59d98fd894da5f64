"""The structured guide: its objective over all parts of the rows, and what Pyro does with it."""

import copy
import itertools
import pickle
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyroflows as pf
from pyroflows.errors import CheckpointError, ModelError, OptionError
from pyroflows.fitting.estimators import ESTIMATORS
from pyroflows.guides import AutoStructuredFlow
from pyroflows.inference.batches import FixedArguments
from pyroflows.inference.elbo import ModelELBO
from pyroflows.inference.minibatches import elbo_of
from pyroflows.models.all_rows import WithAllRows
from pyroflows.models.log_joint import LogJoint
from tests.guides.hierarchies import (
    SIZES,
    crossed,
    encode,
    masked_groups,
    masked_rows,
    measured,
    nested,
    one_plate,
)

PARTS = {"g": 2, "r": 2}
Y = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).reshape(4, 3)


def of_groups(rows, y, sizes):
    return y[rows]


def of_cells(rows, y, sizes):
    return y[rows[0]][:, rows[1], None]


ENCODERS = {
    one_plate: of_groups,
    nested: {"t": of_groups, "s": of_cells},
    masked_rows: {"t": of_groups, "s": of_cells},
    masked_groups: {"s": of_cells},
    crossed: {"c": of_cells},
}


def perturbed(model, encoder):
    guide = AutoStructuredFlow(model, encoder=encoder, dtype=torch.float64)
    guide(Y, None)
    for parameter in guide.flow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return guide


def gradient(loss, guide):
    found = torch.autograd.grad(loss, list(guide.flow.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def noise_of_part(guide, call, rows, z):
    """The noise of some rows, of that of all; new noise for those that a mask leaves out."""
    found = torch.randn(len(z), call.layout.dim, dtype=z.dtype)
    for all_rows, part in zip(guide.levels, call.levels, strict=True):
        places = dict(zip(all_rows.ids({}).tolist(), all_rows.places, strict=True))
        for place, row in zip(part.places, part.ids(rows).tolist(), strict=True):
            if row in places:
                found[:, place] = z[:, places[row]]
    return found


def all_parts(call):
    plates = [plate for plate in call.layout.structure.plates.values() if plate.is_subsampled]
    for chosen in itertools.product(*(itertools.combinations(range(p.size), p.subsample_size) for p in plates)):
        yield {plate.name: torch.tensor(rows) for plate, rows in zip(plates, chosen, strict=True)}


@pytest.mark.parametrize("is_encoded", [False, True], ids=["learned", "encoded"])
@pytest.mark.parametrize("estimator", ["total", "path"])
@pytest.mark.parametrize("model", ENCODERS, ids=lambda model: model.__name__)
def test_mean_over_all_parts_is_the_objective_of_all_rows(model, estimator, is_encoded):
    """The loss and its gradient, also for latents behind a bijection and where masks leave out rows."""
    torch.manual_seed(0)
    guide = perturbed(model, ENCODERS[model] if is_encoded else None)
    dim, beta = guide.layout.dim, torch.tensor(1.0)
    examples, z = torch.randn(5, dim, dtype=torch.float64), torch.randn(3, dim, dtype=torch.float64)
    whole = LogJoint(WithAllRows(model), (Y, None), {}, guide.layout, examples)
    loss, _ = ModelELBO(guide.flow, whole, ESTIMATORS[estimator], 3).loss(z, beta)
    expected, expected_gradient = loss.item(), gradient(loss, guide)
    call = guide.call((Y, PARTS), {})
    make = elbo_of(guide, model, FixedArguments((Y, PARTS), {}), whole, torch.zeros(dim).double())
    objective = make(guide.flow, ESTIMATORS[estimator], 3)
    losses, gradients = [], []
    for rows in all_parts(call):
        loss, _ = objective.loss(noise_of_part(guide, call, rows, z), beta, *rows.values())
        losses.append(loss.item())
        gradients.append(gradient(loss, guide))
    assert sum(losses) / len(losses) == pytest.approx(expected, rel=1e-11)
    torch.testing.assert_close(torch.stack(gradients).mean(0), expected_gradient, rtol=1e-9, atol=1e-9)


class Replayed:
    """A guide that draws given rows and has given noise."""

    def __init__(self, guide, rows, z):
        self.guide, self.rows, self.z = guide, rows, z

    def __call__(self, *args):
        law = self.guide.law_at(self.guide.call(args, {}).levels, self.rows, args, {})
        latent = law.transforms[0](self.z)
        values = {**self.rows, f"_{self.guide._pyro_name}_latent": latent}
        with Drawing(values):
            return self.guide(*args)


class Drawing(poutine.messenger.Messenger):
    def __init__(self, values):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


@pytest.mark.parametrize(
    "model",
    [one_plate, masked_rows, *(pytest.param(model, marks=pytest.mark.slow) for model in (nested, masked_groups))],
    ids=lambda model: model.__name__,
)
def test_pyros_elbo_counts_rows_likewise(model):
    """Trace_ELBO, whose plates scale the densities, has the mean over all parts that all rows have."""
    torch.manual_seed(0)
    guide = perturbed(model, None)
    z = torch.randn(1, guide.layout.dim, dtype=torch.float64)
    expected = Trace_ELBO().loss(model, Replayed(guide, {}, z[0]), Y, None)
    call = guide.call((Y, PARTS), {})
    losses = [
        Trace_ELBO().loss(model, Replayed(guide, rows, noise_of_part(guide, call, rows, z)[0]), Y, PARTS)
        for rows in all_parts(call)
    ]
    assert sum(losses) / len(losses) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("encoder", "size"), [(None, 3), (encode, None)], ids=["learned", "encoded"])
@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=4, vectorize_particles=True),
        TraceGraph_ELBO(),
        TraceMeanField_ELBO(),
        RenyiELBO(num_particles=2),
    ],
    ids=lambda elbo: f"{type(elbo).__name__}-{elbo.vectorize_particles}",
)
def test_each_elbo_of_pyro_trains_it(elbo, encoder, size):
    torch.manual_seed(0)
    y = torch.randn(8) + 3
    guide = AutoStructuredFlow(measured, encoder=encoder, init_scale=0.5)
    svi = SVI(measured, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = [svi.step(y, size) for _ in range(40)]
    assert statistics.median(losses[-10:]) < statistics.median(losses[:10])


@pytest.mark.parametrize("is_parallel", [False, True])
def test_predictive_draws_the_rows_of_a_call(is_parallel):
    y = torch.randn(8)
    guide = AutoStructuredFlow(measured, encoder=encode)
    guide(y, 3)
    draws = Predictive(measured, guide=guide, num_samples=5, parallel=is_parallel)
    assert draws(y, 3)["z"].shape == (5, 3)
    assert draws(y)["z"].shape == (5, 8)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_scale_around_the_model_scales_both(factor):
    torch.manual_seed(0)
    guide = perturbed(one_plate, None)
    z = torch.randn(guide.layout.dim, dtype=torch.float64)
    rows = {"g": torch.tensor([1, 3])}
    call = guide.call((Y, PARTS), {})
    z = noise_of_part(guide, call, rows, z[None])[0]
    plain = Trace_ELBO().loss(one_plate, Replayed(guide, rows, z), Y, PARTS)
    scaled = poutine.scale(one_plate, factor), poutine.scale(Replayed(guide, rows, z), factor)
    assert Trace_ELBO().loss(*scaled, Y, PARTS) == pytest.approx(factor * plain, rel=1e-6)


def test_rows_get_what_they_depend_on_at_the_scale_of_its_posterior():
    """Four groups determine the mean, and three rows each group."""
    learned = AutoStructuredFlow(nested, dtype=torch.float64)
    learned(Y, None)
    assert all(level.given_scale is None for level in learned.flow.transform.layers[0].levels)
    guide = AutoStructuredFlow(nested, encoder=ENCODERS[nested], dtype=torch.float64)
    guide(Y, None)
    groups, rows = guide.flow.transform.layers[0].levels
    torch.testing.assert_close(groups.given_scale, torch.tensor([4**-0.5], dtype=torch.float64))
    torch.testing.assert_close(rows.given_scale, torch.tensor([3**-0.5], dtype=torch.float64))
    # The law of a row changes with its group by that factor.
    hierarchy = guide.flow.transform.layers[0]
    y = [torch.ones(1, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)]
    torch.testing.assert_close(
        hierarchy._given(rows, hierarchy.rows[1], y), torch.full((12, 1), 3**-0.5, dtype=torch.float64)
    )


def test_copies_draw_the_same():
    y = torch.randn(8)
    guide = AutoStructuredFlow(measured)
    guide(y, 3)
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        draws = []
        for one in (guide, other):
            torch.manual_seed(1)
            draws.append(one._built()().sample())
        assert torch.equal(*draws)
        assert not torch.equal(next(other.flow.parameters()), next(guide.flow.parameters()) + 1)
    torch.manual_seed(1)
    first = guide(y, 3)["z"]
    torch.manual_seed(1)
    assert torch.equal(copy.deepcopy(guide)(y, 3)["z"], first)


def test_state_goes_into_a_guide_that_was_called():
    y = torch.randn(8)
    guide, other = AutoStructuredFlow(measured), AutoStructuredFlow(measured)
    guide(y, 3)
    guide.flow.transform.layers[0].levels[0].affine.table.data += 1
    with pytest.raises(CheckpointError, match="call guide"):
        other.load_state_dict(guide.state_dict())
    other(y, 3)
    other.load_state_dict(guide.state_dict())
    torch.manual_seed(1)
    first = guide(y, 3)["z"]
    torch.manual_seed(1)
    assert torch.equal(other(y, 3)["z"], first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_dtype(dtype):
    guide = AutoStructuredFlow(measured, encoder=encode, dtype=dtype)
    draws = guide(torch.randn(8, dtype=dtype), 3)
    assert {value.dtype for value in draws.values()} == {dtype}


def test_rows_that_are_left_out_follow_their_prior_where_all_are_seen():
    torch.manual_seed(0)
    guide = AutoStructuredFlow(masked_groups, init_scale=1e-3)
    draws = torch.stack([guide(Y.float(), None)["t"].log() for _ in range(200)])
    kept, left_out = draws[:, 0], draws[:, 1]
    assert kept.std() < 0.1 < 0.5 < left_out.std()


def test_rows_that_are_given_are_left_out_as_among_all_rows():
    is_kept = torch.tensor([True, False, True, True, False, True, True, True])

    def model(rows):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("g", 8, subsample=rows) as i, poutine.mask(mask=is_kept[i]):
            pyro.sample("z", dist.LogNormal(mu, 1.0))

    guide = AutoStructuredFlow(model)
    with pytest.raises(ModelError, match="with all its rows"):
        guide(torch.tensor([1, 5]))
    guide(torch.arange(8))
    for rows in (torch.tensor([1, 5]), torch.tensor([3, 4])):
        trace = poutine.trace(guide).get_trace(rows)
        trace.compute_log_prob()
        assert torch.equal(trace.nodes["z"]["log_prob"] != 0, is_kept[rows])


def test_mask_of_a_part_of_a_row_is_an_error():
    def model():
        with pyro.plate("g", 3):
            pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False])).to_event(1))
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(3))

    with pytest.raises(ModelError, match="mask whole rows"):
        AutoStructuredFlow(model)()


def test_mask_of_a_group_without_its_rows_is_an_error():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("g", 3, dim=-2):
            with poutine.mask(mask=torch.tensor([[True], [False], [True]])):
                pyro.sample("t", dist.Normal(mu, 1.0))
            with pyro.plate("r", SIZES["r"], dim=-1):
                pyro.sample("s", dist.Normal(mu, 1.0))

    with pytest.raises(ModelError, match="leaves out a row of plate 'g'"):
        AutoStructuredFlow(model)()


@pytest.mark.parametrize("size", [None, 3])
def test_it_starts_where_it_is_told(size):
    y = torch.randn(8)
    guide = AutoStructuredFlow(measured)
    guide(y, size)
    loc = torch.arange(1.0, 1.0 + guide.layout.dim)
    guide.start_at(loc, torch.full_like(loc, 1e-4), y, size)
    torch.testing.assert_close(guide.flow().sample(), loc, rtol=0.0, atol=0.01)
    with pytest.raises(OptionError, match="give its diagonal"):
        guide.start_at(loc, torch.eye(len(loc)), y, size)


def estimated(dim):
    return pf.Flow([pf.transforms.Residual(dim, hidden_dims=(8,), log_det="roulette")])


def test_a_flow_of_globals_whose_densities_are_estimates_is_no_exact_one():
    y = torch.randn(8)
    guide = AutoStructuredFlow(measured, estimated)
    guide(y, 3)
    assert not guide.flow.transform.ladj_is_exact and guide.flow().is_exact
    exact, z = guide.flow.transform.exact(), torch.randn(3, guide.layout.dim)
    torch.testing.assert_close(exact.forward_and_ladj(z)[1], exact.forward_and_ladj(z)[1])


@pytest.mark.parametrize(
    ("flow_fn", "message"),
    [
        (lambda dim: pf.flows.IAF(dim, base="student_t"), "a standard normal base"),
        (lambda dim: pf.Flow([pf.transforms.BatchNorm(dim)]), "BatchNorm"),
    ],
)
def test_flows_of_globals_that_do_not_serve_are_refused(flow_fn, message):
    with pytest.raises(OptionError, match=message):
        AutoStructuredFlow(measured, flow_fn)(torch.randn(8), 3)

"""A batch of draws is compared with single runs where the examples of a model show nothing."""

import warnings

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows import ModelError
from pyroflows.inference.verdict.draws import DiagnosticDraws
from pyroflows.models.batching import BatchedModel
from pyroflows.models.comparison import keep_apart
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.run import RunRecord
from pyroflows.models.structure import describe
from pyroflows.models.value_reads import ValueReads, caught_failure

NEAR = {"x": torch.linspace(-1.0, 1.0, 5)}


def _observed(x, scale):
    pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(0.5))


def by_numpy():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    _observed(x, 3.0 if x.detach().numpy().max() > 2.5 else 1.0)


def by_list():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    _observed(x, 3.0 if "inf" in str((x.detach() - 2.5).clamp(min=0).div(0).tolist()) else 1.0)


def by_allclose():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    _observed(x, 1.0 if torch.allclose(x, torch.zeros(()), atol=2.5) else 3.0)


def by_many_branches():
    x, scale = pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0
    for i in range(10):
        scale = scale + 1.0 if (x > 2.5 + 0.1 * i).any() else scale
    _observed(x, scale)


BRANCHES = [by_numpy, by_list, by_allclose, by_many_branches]


@pytest.mark.parametrize("model", BRANCHES)
@pytest.mark.parametrize("is_compared", [True, False], ids=["compared", "in company"])
def test_a_branch_far_from_the_examples_ends_the_batch(model, is_compared):
    """Whether the draw that takes it is among those that are compared, or among the others of the batch."""
    batched = BatchedModel(model, (), {}, NEAR)
    assert batched.mode == "plate"
    values = {"x": torch.tensor([0.1, 0.2, 0.0, 3.0])}
    with pytest.warns(UserWarning, match=r"mode 'plate'.* draw by draw from now on"):
        assert batched.run_singly_if_wrong(values, torch.tensor([2, 3] if is_compared else [0, 1]))
    assert batched.mode == "loop"
    assert batched.drawing(NEAR).mode == "loop"
    found = batched(values, 4).log_probs["y"]
    expected = torch.stack([batched.single({"x": x}).log_probs["y"] for x in values["x"]])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("model", BRANCHES)
def test_draws_on_one_side_of_a_branch_stay_in_the_batch(model):
    batched = BatchedModel(model, (), {}, NEAR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not batched.run_singly_if_wrong({"x": torch.tensor([0.0, 1.0, 2.0])}, torch.tensor([0, 1]))
    assert batched.mode == "plate"


def test_variants_that_exist_run_draw_by_draw_too():
    batched = BatchedModel(by_numpy, (), {}, NEAR)
    drawing = batched.drawing(NEAR)
    assert drawing.mode == "plate"
    with pytest.warns(UserWarning, match="from now on"):
        batched.run_singly_if_wrong({"x": torch.tensor([0.0, 3.0])}, torch.arange(2))
    assert drawing.mode == "loop"


def test_draws_at_which_single_runs_fail_are_left_out():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x.numel() == 1 and x.detach().numpy().max() > 2.5:
            raise ValueError("too far")
        _observed(x, 1.0)

    batched = BatchedModel(model, (), {}, NEAR)
    assert not batched.run_singly_if_wrong({"x": torch.tensor([0.0, 3.0])}, torch.arange(2))


def test_what_a_batch_of_one_draw_rounds_in_the_same_way_is_right():
    def record(x):
        return RunRecord({"x": x}, {"x": x})

    far = {"x": torch.tensor([1.0, 2.0])}
    rounded = keep_apart(lambda v, _: record(v["x"] * 1.01), lambda v: record(v["x"]), {}, RunRecord({}, {}), far)
    mixed = keep_apart(
        lambda v, _: record(v["x"] + v["x"].mean()), lambda v: record(v["x"]), {}, RunRecord({}, {}), far
    )
    assert rounded
    assert not mixed


@pytest.mark.parametrize("model", [by_numpy, by_many_branches])
def test_the_figures_of_a_flow_are_those_of_single_runs(model):
    layout = Layout(describe(model, (), {}))
    log_joint = LogJoint(model, (), {}, layout, examples=NEAR["x"][:, None])
    law = pf.flows.Planar(1, base=dist.Normal(torch.zeros(1), 2.0).to_event(1))()
    with pytest.warns(UserWarning, match="from now on"):
        draws = DiagnosticDraws.first(law, log_joint, 100)
    expected = torch.cat([log_joint(row[None]) for row in draws.latents]) - law.log_prob(draws.latents)
    assert torch.allclose(draws.raw_log_weights, expected, atol=1e-4)


def test_importance_sampling_compares_too():
    def guide():
        pyro.sample("x", dist.Normal(0.0, 1.2))

    with pytest.warns(UserWarning, match="from now on"):
        found = pf.importance_sample(by_numpy, guide, num_samples=400, seed=0, progress_bar=False)
    x = found.draws["x"]
    scale = torch.where(x > 2.5, 3.0, 1.0)
    joint = dist.Normal(0.0, 1.0).log_prob(x) + dist.Normal(x, scale).log_prob(torch.tensor(0.5))
    expected = (joint - dist.Normal(0.0, 1.2).log_prob(x)).double()
    # Pareto smoothing replaces the largest weights only.
    assert (x > 2.5).any()
    order = expected.argsort()[:200]
    ratio = found.log_weights[order].double() - expected[order]
    assert torch.allclose(ratio, ratio[0], atol=1e-4)


# Factorisations whose errors are caught


def _matrix(x):
    return torch.eye(2) + 0.2 * x * (1 - torch.eye(2))


def caught_cholesky():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    try:
        factor = torch.linalg.cholesky(_matrix(x[..., None, None]))
    except RuntimeError:
        factor = torch.eye(2)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=torch.ones(2))


def caught_with_jitter():
    """The second factorisation would fail in its turn; the first is in no try."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    first = torch.linalg.cholesky(_matrix(0 * x))
    try:
        factor = torch.linalg.cholesky(_matrix(x))
    except torch.linalg.LinAlgError:
        factor = torch.linalg.cholesky(_matrix(x) + 9.0 * torch.eye(2))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=first @ factor), obs=torch.ones(2))


def caught_solve():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    try:
        mean = torch.linalg.solve(torch.relu(x + 4) * torch.eye(1), torch.ones(1))[0]
    except Exception:
        mean = torch.tensor(0.0)
    _observed(mean, 1.0)


def raised_again():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    try:
        factor = torch.linalg.cholesky(_matrix(x))
    except RuntimeError as error:
        raise ValueError("no covariance") from error
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=torch.ones(2))


def asked():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    factor, info = torch.linalg.cholesky_ex(_matrix(x))
    factor = factor if info == 0 else torch.eye(2)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=torch.ones(2))


def nothing_caught():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    covariance = _matrix(x[..., None, None])
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=torch.ones(2))


@pytest.mark.parametrize("model", [caught_cholesky, caught_with_jitter, caught_solve])
def test_a_model_that_catches_the_error_of_a_factorisation_runs_draw_by_draw(model):
    with pytest.warns(UserWarning, match=r"the factorisation at test_comparison.py:\d+.* is caught.*cholesky_ex"):
        batched = BatchedModel(model, (), {}, NEAR)
    assert batched.mode == "loop"


@pytest.mark.parametrize(("model", "mode"), [(raised_again, "vmap"), (asked, "paths"), (nothing_caught, "plate")])
def test_other_models_with_factorisations_run_for_all_draws(model, mode):
    batched = BatchedModel(model, (), {}, NEAR)
    assert batched.mode == mode
    x = torch.tensor([0.3, 4.0 if model is raised_again else 6.0, -1.0])
    found = batched({"x": x}, 3).log_probs["y"]
    for i in (0, 2) if model is nothing_caught else range(3):
        assert torch.allclose(found[i], batched.single({"x": x[i]}).log_probs["y"], atol=1e-5)


def test_every_factorisation_fails_once():
    calls = []

    def function():
        calls.append(torch.linalg.cholesky(torch.eye(2)))
        torch.linalg.inv(torch.eye(2))

    with ValueReads() as reads:
        function()
    assert len(reads.factorisations) == 2
    assert caught_failure(function, reads.factorisations) is None
    assert len(calls) == 2  # that of the reads, and that before the inverse fails


# Arguments that the model changes


def _added(y):
    y += 1


def _set(y):
    y[0] = float(pyro.sample("z", dist.Normal(0.0, 1.0)))


def _of_a_view(y):
    y.reshape(-1)[1:].clamp_(max=0.1)


@pytest.mark.parametrize("change", [_added, _set, _of_a_view])
@pytest.mark.parametrize("in_dict", [True, False], ids=["dict", "tensor"])
def test_a_model_that_changes_its_arguments_is_refused(change, in_dict):
    def model(data):
        y = data["y"] if in_dict else data
        change(y)
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0 + abs(float(x))).expand([3]).to_event(1), obs=y)

    y = torch.tensor([0.5, 0.2, 0.1])
    with pytest.raises(ModelError, match=r"changes an argument of shape \(3,\) in place.*clone"):
        describe(model, ({"y": y} if in_dict else y,), {})


def test_a_model_may_change_copies_of_its_arguments():
    def model(y):
        y = y.clone()
        y += 1
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0).expand([3]).to_event(1), obs=y)

    assert describe(model, (torch.zeros(3),), {}).has_data


def test_the_message_speaks_of_counters():
    count = []

    def model():
        count.append(1)
        _observed(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0 + len(count))

    with pytest.raises(ModelError, match="changes what later runs see, such as data in place or a counter"):
        BatchedModel(model, (), {}, NEAR)

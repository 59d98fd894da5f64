"""What a flow learns from data, from draws and from batches besides its gradients, and keeps when it is saved."""

import copy
import warnings
from functools import partial

import pytest
import torch
from pyro import distributions as dist
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.errors import DataError, OptionError, ShapeError, StateError
from pyroflows.fitting.maximum_likelihood import MaximumLikelihood
from pyroflows.flows import Flow, Mixture
from pyroflows.training.data import load
from pyroflows.training.shuffling import split
from pyroflows.transforms import ActNorm, Autoregressive, BatchNorm, Compose, Coupling, Elementwise, Planar, Standardize

SHAPE = (2, 4, 3)


def images(count=100, seed=0):
    """Images whose channels have locations 5 and -50 and scales 1 and 10, and whose first pixel hardly varies."""
    torch.manual_seed(seed)
    x = torch.randn(count, *SHAPE)
    x[:, :, 0, 0] *= 1e-3
    return torch.stack([5 + x[:, 0], -50 + 10 * x[:, 1]], 1)


def of_images(*norms):
    layers = [Coupling(SHAPE, hidden_dims=(8,)), *norms, Standardize(SHAPE, by_channel=True)]
    return Flow(layers)


def fit(flow, x, max_epochs=3, **options):
    return pf.fit_density(flow, x, max_epochs=max_epochs, **{"seed": 0, "progress_bar": False, **options})


# Location and scale by channel


def test_a_transform_that_standardises_takes_the_part_of_the_flows_own():
    flow = of_images()
    own = flow.standardization
    assert own is flow.transform.layers[-1] and len(flow.transform.layers) == 2
    assert flow.layers == [flow.transform.layers[0]]  # as long as it is the identity
    flow.adapt(images())
    assert own.loc.flatten().tolist() == pytest.approx([5, -50], abs=1.0)
    assert own.scale.flatten().tolist() == pytest.approx([1, 10], rel=0.1)
    bounded = Flow([Standardize(SHAPE, by_channel=True)], support=constraints.positive)
    bounded.adapt(images().exp())
    torch.testing.assert_close(bounded.standardization.loc, own.loc)
    torch.testing.assert_close(bounded.before_support(images().exp()), images())


def test_other_layers_of_location_and_scale_are_not_the_flows_own():
    given = Standardize(2, scale=torch.full((2,), 3.0))
    assert Flow([Planar(2), given]).standardization is None
    assert Flow([Standardize(2), Planar(2)]).standardization is None
    assert Flow([Planar(2), Standardize(2)], standardize=False).standardization is None


def test_data_are_looked_at_by_channel():
    x = images(500)
    x[7, 0, 0, 0] = 6.0  # an ordinary value of the channel, but no other row has it at this place
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(of_images(ActNorm(SHAPE)), x)
    with pytest.warns(UserWarning, match="row 7 of x has 6 in column 0"):
        fit(Flow([Coupling(SHAPE, hidden_dims=(8,))]), x)
    x[9, 1, 0, 0] = 1e9
    # The spread of channel 1 is 10, that of its first pixel 0.01.
    with pytest.warns(UserWarning, match=r"row 9 of x has 1e\+09 in column 12, 1(\.\d)?e\+08 standard deviations"):
        fit(of_images(), x, max_epochs=1)


def test_a_further_fit_to_other_channels_warns():
    flow = of_images()
    fit(flow, images(), max_epochs=1)
    x = images(seed=1)
    x[:, 1] *= 20
    with pytest.warns(UserWarning, match=r"channels \[1\] of x are far from the location and scale that this flow has"):
        fit(flow, x, max_epochs=1)
    mixture = Mixture([of_images(), of_images()])
    mixture.adapt(images())
    with pytest.warns(UserWarning, match=r"channels \[1\] of x are far from"):
        fit(mixture, x, max_epochs=1)
    both = Mixture([copy.deepcopy(flow), Flow([Elementwise(SHAPE)])])
    both.components[1].adapt(images())
    fit(both, x, max_epochs=1)  # there is no common shape of location and scale to compare with


def test_states_and_files_know_whether_a_flow_standardises_by_channel(tmp_path):
    flow = of_images(ActNorm(SHAPE), BatchNorm(SHAPE))
    fit(flow, images(), max_epochs=1)
    flow.save(tmp_path / "flow.safetensors")
    loaded = pf.load_flow(tmp_path / "flow.safetensors")
    assert loaded.standardization.by_channel and loaded.is_adapted and loaded.observes
    assert torch.equal(loaded().log_prob(images()), flow().log_prob(images()))
    twin = of_images(ActNorm(SHAPE), BatchNorm(SHAPE))
    twin.load_state_dict(flow.state_dict())
    assert twin.is_adapted and torch.equal(twin().log_prob(images()), flow().log_prob(images()))
    with pytest.raises(StateError, match="this state is of another flow"):
        of_images(BatchNorm(SHAPE), ActNorm(SHAPE)).load_state_dict(flow.state_dict())
    with pytest.raises(StateError, match="momentum"):
        of_images(ActNorm(SHAPE), BatchNorm(SHAPE, momentum=0.5)).load_state_dict(flow.state_dict())
    other = Flow([*of_images(ActNorm(SHAPE), BatchNorm(SHAPE)).transform.layers[:3], Standardize(SHAPE)])
    with pytest.raises((StateError, RuntimeError)):
        other.load_state_dict(flow.state_dict())


def test_a_student_of_another_shape_of_location_keeps_its_own():
    teacher, student = of_images(), Flow([Elementwise(SHAPE)])
    teacher.adapt(images())
    pf.distill(student, teacher, num_steps=2, warm_start=2, batch_size=8, progress_bar=False)
    assert student.standardization.loc.shape == SHAPE
    torch.testing.assert_close(
        student.standardization.loc[:, 1, 1], teacher.standardization.loc.flatten(), rtol=0.3, atol=1
    )


# ActNorm


def test_a_fit_adapts_once():
    flow = of_images(ActNorm(SHAPE))
    fit(flow, images(), max_epochs=1)
    norm = flow.transform.layers[1]
    learned = norm.parameters_of.value.clone()
    assert norm.is_adapted
    fit(flow, images() * 1.5, max_epochs=1)
    # It was trained on, not adapted anew: this many steps of Adam move it by a few thousandths at most.
    assert 0 < (norm.parameters_of.value - learned).abs().max() < 0.05
    flow.adapt(images() * 1.5)
    z = norm.inv(Compose(list(flow.transform.layers)[2:]).inv(images() * 1.5))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_reach_layers_behind_others(dtype):
    x = images().to(dtype)
    weights = torch.arange(100) % 4
    weighted, repeated = of_images(ActNorm(SHAPE)).to(dtype), of_images(ActNorm(SHAPE)).to(dtype)
    repeated.load_state_dict(weighted.state_dict())
    # Neither starts standard behind the flow's own location and scale.
    for flow in (weighted, repeated):
        flow.transform.layers[1].parameters_of.value.data.fill_(1.0)
    weighted.adapt(x, weights=weights)
    repeated.adapt(x.repeat_interleave(weights, 0))
    found, expected = weighted.transform.layers[1].parameters_of.value, repeated.transform.layers[1].parameters_of.value
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_an_inverse_in_a_flow_adapts_and_fits():
    flow = Flow([ActNorm(SHAPE).inv, Coupling(SHAPE, hidden_dims=(8,)).inv, Compose([ActNorm(SHAPE)]).inv])
    x = images() + 0.01 * torch.randn(100, *SHAPE)
    assert flow.adapts and not flow.is_adapted
    result = fit(flow, x)
    assert flow.is_adapted and result.history.num_steps == 3
    flow.adapt(x)
    z = flow().latent(x).detach()
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-4)


def test_components_of_a_mixture_adapt_to_their_own_rows():
    x = torch.cat([torch.randn(200, 2), 100 + torch.randn(200, 2)])
    mixture = Mixture([Flow([ActNorm(2)], standardize=False), Flow([Compose([ActNorm(2)])], standardize=False)])
    assert mixture.adapts and not mixture.is_adapted
    mixture.adapt(x)
    assert mixture.is_adapted
    means = sorted(round(flow().sample((1000,)).mean().item(), -1) for flow in mixture.components)
    assert means == [0, 100]


# Draws


def test_draws_of_the_base_stand_in_for_data():
    torch.manual_seed(0)
    base = dist.Normal(torch.full(SHAPE, 7.0), 3.0).to_event(3)
    flow = Flow([ActNorm(SHAPE), Elementwise(SHAPE, init=torch.ones(*SHAPE, 2)), ActNorm(SHAPE)], base=base)
    state = torch.get_rng_state()
    flow.adapt_to_draws()
    assert torch.equal(torch.get_rng_state(), state)
    x = flow().sample((2000,))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=0.06)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(2), rtol=0, atol=0.06)
    assert not flow.is_adapted and flow.standardization.is_identity  # it waits for data
    kept = copy.deepcopy(flow.state_dict())
    flow.adapt_to_draws()
    assert all(torch.equal(value, kept[name]) for name, value in flow.state_dict().items())


def test_flows_in_the_base_come_first():
    inner = Flow([ActNorm(2)], base=dist.Normal(torch.full((2,), 7.0), 3.0).to_event(1), standardize=False)
    flow = Flow([Elementwise(2, init=torch.ones(2, 2)), ActNorm(2)], base=inner, standardize=False)
    flow.adapt_to_draws()
    assert inner().sample((2000,)).mean(0).abs().max() < 0.2
    x = flow().sample((2000,))
    assert x.mean(0).abs().max() < 0.2 and (x.std(0) - 1).abs().max() < 0.2


def test_draws_at_contexts():
    flow = Flow([Coupling(2, context_dim=1, hidden_dims=(4,)), ActNorm(2, context_dim=1)], base="student_t")
    with pytest.raises(ShapeError, match="needs a context"):
        flow.adapt_to_draws()
    flow.adapt_to_draws(torch.randn(2000, 1))
    assert flow.transform.is_adapted_to_draws
    assert (flow(torch.randn(2000, 1)).sample().std(0) - 1).abs().max() < 0.2


def test_draws_need_values():
    with pytest.raises(OptionError, match="meta"):
        Flow([ActNorm(2)]).to("meta").adapt_to_draws()


# BatchNorm


def statistics(flow):
    return [layer.running_mean.clone() for layer in flow.modules() if isinstance(layer, BatchNorm)]


@pytest.mark.parametrize("compile", ["none", "trace"])
def test_a_fit_lets_running_statistics_see_the_batch_of_each_step(compile):
    """The same batches as those that are trained on, each before its step, and compilation counts as none."""
    flow, twin = of_images(BatchNorm(SHAPE)), of_images(BatchNorm(SHAPE))
    twin.load_state_dict(flow.state_dict())
    x, weights = images(), torch.linspace(0.5, 1.5, 100)
    seen, trained = [], []
    objectives = []
    for each in (flow, twin):
        each.adapt(x, weights=weights)
        torch.manual_seed(3)
        objectives.append(MaximumLikelihood(each, load(each, x, weights=weights), torch.arange(100), 10))
    observe, draw = flow._observe, objectives[0].draw
    flow._observe = lambda x, *rest: (seen.append(x.clone()), observe(x, *rest))[1]
    objectives[0].draw = lambda: (trained.append(drawn := draw()), drawn)[1]
    torch.manual_seed(4)
    pf.train(objectives[0], num_steps=12, compile=compile, progress_bar=False)
    steps = trained[-12:]  # compilation draws examples before
    assert len(seen) == 12 and all(torch.equal(a, b[0]) for a, b in zip(seen, steps, strict=True))
    torch.manual_seed(4)
    pf.train(objectives[1], num_steps=12, compile="none", progress_bar=False)
    torch.testing.assert_close(statistics(flow), statistics(twin), rtol=1e-4, atol=1e-5)
    # The recorded step reads the statistics anew.
    torch.testing.assert_close(dict(flow.named_parameters()), dict(twin.named_parameters()), rtol=1e-3, atol=1e-4)
    assert not torch.equal(statistics(flow)[0], torch.zeros(2))


def test_a_fit_observes_nothing_where_no_layer_does(monkeypatch):
    flow = of_images(ActNorm(SHAPE))
    monkeypatch.setattr(Flow, "observe", lambda *_: pytest.fail("this flow has no running statistics"))
    fit(flow, images(), max_epochs=1)


def test_running_statistics_belong_to_the_best_state():
    flow = Flow([Planar(2), BatchNorm(2, momentum=0.5)])
    x = torch.randn(300, 2).exp()
    result = fit(flow, x, max_epochs=10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = load(flow, x)
        _, held_out = split(data.rows, 0.1)
    assert flow().log_prob(x[held_out]).mean().item() == pytest.approx(result.best_log_prob, abs=1e-5)


def test_components_observe_rows_by_their_share_of_the_density():
    near, far = (Flow([BatchNorm(1, momentum=1.0)], standardize=False) for _ in range(2))
    mixture = Mixture([near, far])
    x = torch.cat([torch.randn(200, 1), 100 + 2 * torch.randn(100, 1)])
    mixture.adapt(x)
    assert mixture.observes
    mixture.observe(x + 1.0, weights=torch.ones(300))
    means = sorted(
        value.item() for value in (near.transform.layers[0].running_mean, far.transform.layers[0].running_mean)
    )
    assert means == pytest.approx([x[:200].mean().item() + 1, x[200:].mean().item() + 1], abs=1e-3)
    bounded = Flow([BatchNorm(1, momentum=1.0)], support=constraints.positive, standardize=False)
    mixture = Mixture([bounded, Flow([BatchNorm(1, momentum=1.0)], standardize=False)])
    y = torch.cat([torch.randn(200, 1).exp(), -5 + torch.randn(200, 1)])
    mixture.observe(y)
    inside = mixture.components[0].transform.layers[0].running_mean
    assert inside.isfinite().all() and inside.abs() < 1.0  # the mean of logarithms, of rows inside its support


def test_observing_takes_what_users_hold():
    flow = Flow([BatchNorm(2, momentum=1.0)])
    flow.observe([[1.0, 2.0], [3.0, 6.0]])
    assert flow.transform.layers[0].running_mean.tolist() == [2.0, 4.0]
    with pytest.raises(ShapeError):
        flow.observe(torch.randn(5, 3))


def test_a_fit_with_running_statistics_fits():
    """As well as its twin with ActNorm, on data whose law the layers between can follow."""
    torch.manual_seed(1)
    x = torch.randn(600, 2)
    x[:, 1] = x[:, 1] / 2 + x[:, 0] ** 2
    found = {}
    for norm in (ActNorm, BatchNorm):
        torch.manual_seed(2)
        layers = [layer for _ in range(2) for layer in (Autoregressive(2, hidden_dims=(16,)).inv, norm(2))]
        found[norm] = fit(Flow(layers), x, max_epochs=30, optimizer=partial(torch.optim.Adam, lr=0.01)).best_log_prob
    assert found[BatchNorm] > found[ActNorm] - 0.1


def test_components_of_a_mixture_bring_their_state_up_to_date():
    class Counting(Planar):
        def __init__(self, dim):
            super().__init__(dim)
            self.register_buffer("num_steps", torch.tensor(0))

        def before_step(self):
            self.num_steps += 1

    mixture = Mixture([Flow([Counting(2)]), Flow([Compose([Counting(2)])])])
    mixture.before_step()
    assert [layer.num_steps.item() for layer in mixture.modules() if isinstance(layer, Counting)] == [1, 1]


# Laws of some columns


def test_normalised_columns_are_independent():
    torch.manual_seed(0)
    layers = [ActNorm(3), BatchNorm(3), ActNorm(3).inv, Compose([BatchNorm(3)])]
    flow = Flow(layers, standardize=False).double()
    for parameter in flow.parameters():
        parameter.data.normal_()
    for layer in flow.modules():
        if isinstance(layer, BatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    x = flow().sample((5,))
    parts = flow.marginal([2]).log_prob(x[:, 2:]) + flow.conditional(x[:, 2:], columns=[2]).log_prob(x[:, :2])
    torch.testing.assert_close(parts, flow().log_prob(x))
    loc, scale = flow().transport(torch.zeros(3).double())[0], flow().transport(torch.ones(3).double())[0]
    expected = dist.Normal(loc[1], (scale - loc)[1].abs()).log_prob(x[:, 1])
    torch.testing.assert_close(flow.marginal([1]).log_prob(x[:, 1:2]), expected)


def test_distillation_in_closed_form_passes_through_act_norm():
    torch.manual_seed(0)
    teacher = Flow([ActNorm(2), Autoregressive(2, hidden_dims=(8,)).inv], standardize=False)
    teacher.transform.layers[0].parameters_of.value.data.normal_()
    student = Flow([Elementwise(2), ActNorm(2)], standardize=False)
    kl = pf.distill(student, teacher, num_steps=300, estimator="closed_form", seed=0, progress_bar=False).kl
    assert kl == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("layer", [lambda: BatchNorm(2).inv, lambda: Compose([Coupling(2), BatchNorm(2)]).inv])
def test_statistics_at_the_wrong_end_are_refused(layer):
    with pytest.raises(OptionError, match=r"\.inv in a flow would never learn, since the running statistics"):
        pf.Flow([layer(), Coupling(2)])


X, CONTEXT = torch.randn(20, 2), torch.randn(20, 3)


@pytest.mark.parametrize("learn", ["adapt", "observe"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], CONTEXT), ShapeError, r"learns from rows of shape \(n, 2\), got shape \(2,\)"),
        ((X[:, None], CONTEXT), ShapeError, r"learns from rows of shape \(n, 2\), got shape \(20, 1, 2\)"),
        ((X,), ShapeError, "needs contexts of size 3, but got none"),
        ((X, CONTEXT, torch.ones(19)), ShapeError, r"x has 20 rows, but weights have shape \(19,\)"),
        ((X, CONTEXT, -torch.ones(20)), DataError, "weights must be finite and not negative"),
        ((X, CONTEXT, torch.full((20,), torch.nan)), DataError, "weights must be finite and not negative"),
        ((X * torch.inf, CONTEXT), DataError, "x has NaN or infinite values"),
        ((X, CONTEXT * torch.nan), DataError, "context has NaN or infinite values"),
    ],
)
def test_rows_that_nothing_can_be_learned_from_are_refused(learn, arguments, error, message):
    flow = Flow([BatchNorm(2), Coupling(2, context_dim=3)])
    with pytest.raises(error, match=message):
        getattr(flow, learn)(*arguments)


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [
        (X[0], None, r"learns from a floating-point tensor of shape \(n, 2\), got torch.float32 of shape \(2,\)"),
        (X.long(), None, "got torch.int64"),
        (X, torch.ones(3), r"got 20 rows, but weights of shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("layer", [ActNorm(2), Compose([Planar(2), ActNorm(2)])], ids=["layer", "stack"])
def test_layers_refuse_what_are_no_rows(layer, x, weights, message):
    with pytest.raises(ShapeError, match=message):
        layer.adapt(x, None, weights)

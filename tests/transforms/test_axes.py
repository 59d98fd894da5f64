"""Layers that mask or order an axis of events with several axes, such as the channels or the rows of an image."""

from functools import partial

import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows.errors import OptionError, ShapeError
from pyroflows.nets import MLP, CausalConv, IncrementalGradient
from pyroflows.transforms import Autoregressive, Coupling, masks
from tests.transforms.networks import BackwardSteps, Plain, Stepwise, convolution
from tests.transforms.registry import perturb

SHAPE = (3, 4, 2)
ORDERS = {3: [1, 2, 0], 4: [2, 0, 3, 1], 2: [1, 0]}


def coupling(context_dim, **options):
    return Coupling(SHAPE, hidden_dims=(8,), context_dim=context_dim, **options)


def ordered(context_dim, axis=-1, conditioner=Stepwise, **options):
    order = ORDERS[SHAPE[axis]]
    return Autoregressive(SHAPE, order=order, conditioner=conditioner, context_dim=context_dim, axis=axis, **options)


def inputs(t, batch_shape=(), dtype=torch.float64):
    context = torch.randn(*batch_shape, *t.context_shape, dtype=dtype) if t.context_dim else None
    return 2 * torch.randn(*batch_shape, *t.event_shape, dtype=dtype), context


with_and_without_context = pytest.mark.parametrize("context_dim", [0, 5])


# What depends on what


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_elements_see_all_elements_at_earlier_places(axis, direction):
    t = perturb(ordered(0, axis).double(), 0.5)
    value, _ = inputs(t)
    matrix = torch.autograd.functional.jacobian(t if direction == "forward" else t.inv, value)
    size = SHAPE[axis]
    order = ORDERS[size]
    # (places, other elements, places, other elements)
    matrix = matrix.movedim((axis, 3 + axis), (0, 1)).reshape(size, size, t.dim // size, -1)
    blocks = matrix.transpose(1, 2)[order][:, :, order]
    for i in range(size):
        for k in range(size):
            block = blocks[i, :, k]
            if k > i:
                assert (block == 0).all()
            elif k == i:
                assert torch.equal(block, block.diag().diag()) and (block.diag() > 0).all()
            elif direction == "forward":
                assert (block != 0).all()


@pytest.mark.parametrize(("axis", "mask"), [(0, masks.half(3)), (1, masks.alternating(4)), (2, [True, False])])
def test_named_networks_see_one_place(axis, mask):
    """What passes is unchanged; what does not depends on itself and on what passes at its own place."""
    t = perturb(Coupling(SHAPE, mask=mask, hidden_dims=(8,), axis=axis).double())
    z, mask = inputs(t)[0], torch.as_tensor(mask)
    matrix = torch.autograd.functional.jacobian(t, z).movedim((axis, 3 + axis), (2, 5))
    matrix = matrix.reshape(24 // len(mask), len(mask), -1, len(mask))
    for place in range(len(matrix)):
        at_place = matrix[place][:, place]
        assert (matrix[place] != 0).sum() == (at_place != 0).sum()
        assert torch.equal(at_place[mask], torch.eye(len(mask), dtype=z.dtype)[mask])
        assert (at_place[~mask][:, mask] != 0).all() and (at_place.diagonal() > 0).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_coupling_along_an_axis_is_that_of_vectors_at_each_place(axis):
    size = SHAPE[axis]
    image, vector = coupling(5, axis=axis), Coupling(size, hidden_dims=(8,), context_dim=5)
    if axis == 2:
        vector.load_state_dict(perturb(image).state_dict())
    else:
        vector.conditioner.load_state_dict(perturb(image.conditioner.net).state_dict())
    z, context = torch.randn(7, *SHAPE), torch.randn(7, 5)
    x, ladj = image.forward_and_ladj(z, context)
    expected, ladj_of_places = vector.forward_and_ladj(z.movedim(1 + axis, -1), context[:, None, None])
    torch.testing.assert_close(x.movedim(1 + axis, -1), expected)
    torch.testing.assert_close(ladj, ladj_of_places.sum((1, 2)))


def test_time_first_is_a_sequence_transposed():
    first = perturb(Autoregressive((9, 2), order=None, conditioner="causal_conv", context_dim=(1, 9), axis=0))
    last = Autoregressive((2, 9), conditioner="causal_conv", context_dim=(1, 9))
    last.load_state_dict(first.state_dict())
    value, context = torch.randn(5, 9, 2), torch.randn(5, 1, 9)
    for t, u in ((first, last), (first.inv, last.inv)):
        (x, ladj), (y, expected) = t.forward_and_ladj(value, context), u.forward_and_ladj(value.mT, context)
        torch.testing.assert_close(x, y.mT)
        torch.testing.assert_close(ladj, expected)


def test_one_axis_may_be_counted_from_either_end():
    for axis in (0, -1):
        assert Autoregressive(3, axis=axis).triangular_order == (0, 1, 2)
        assert Coupling(3, axis=axis).axis == -1
    assert Coupling(SHAPE, axis=1).mask == Coupling(SHAPE, axis=-2).mask == [True, True, False, False]


@pytest.mark.parametrize("conditioner", ["conv", "residual_conv"])
def test_convolutions_see_the_places_around(conditioner):
    """Parameters depend on all channels that pass, at distances of up to two places along each axis."""
    shape = (3, 9, 7)
    t = perturb(Coupling(shape, mask=masks.half(3), conditioner=conditioner, hidden_dims=(8,)).double())
    z = torch.randn(shape, dtype=torch.float64)
    reach = 2 if conditioner == "conv" else 3
    for i, j in ((4, 3), (0, 6)):
        gradient = torch.autograd.functional.jacobian(lambda z, i=i, j=j: t(z)[1, i, j], z)
        near = [(torch.arange(size) - k).abs() <= reach for size, k in ((9, i), (7, j))]
        assert torch.equal(gradient[0] != 0, near[0][:, None] & near[1])
        assert gradient[1:].count_nonzero() == 1


def test_checkerboard_passes_the_squares_of_one_colour():
    """Those of the other colour depend on themselves and on those that pass, in all channels."""
    mask = masks.checkerboard(4, 2)[0]
    t = perturb(Coupling(SHAPE, mask=mask[None], conditioner="conv", hidden_dims=(8,)).double())
    z, _ = inputs(t)
    matrix = torch.autograd.functional.jacobian(t, z)
    assert torch.equal(t(z)[:, mask], z[:, mask]) and (t(z)[:, ~mask] != z[:, ~mask]).all()
    others = matrix[:, ~mask][:, :, :, ~mask].reshape(12, 12)
    assert torch.equal(others, others.diag().diag())
    # Squares in neighbouring rows and columns.
    assert (matrix[0, 0, 0, :, 0, 1] != 0).all() and (matrix[0, 0, 0, :, 1, 0] != 0).all()


@pytest.mark.parametrize("mask", [masks.half(3), masks.checkerboard(4, 2)], ids=["channels", "places"])
def test_image_as_context_is_seen_place_by_place(mask):
    t = perturb(Coupling(SHAPE, mask=mask, conditioner="conv", hidden_dims=(), context_dim=(2, 4, 2)).double())
    z, context = inputs(t)
    gradient = torch.autograd.functional.jacobian(lambda context: t.condition(context)(z)[2, 0, 0], context)
    near = torch.tensor([[1, 1], [1, 1], [0, 0], [0, 0]]).bool()
    assert torch.equal(gradient != 0, near.expand(2, 4, 2))


def test_vector_as_context_is_an_image_of_equal_places():
    options = {"conditioner": "conv", "hidden_dims": (8,)}
    vector, image = Coupling(SHAPE, context_dim=5, **options), Coupling(SHAPE, context_dim=(5, 4, 2), **options)
    image.load_state_dict(perturb(vector).state_dict())
    z, context = torch.randn(6, 1, *SHAPE), torch.randn(7, 5)
    torch.testing.assert_close(
        vector.forward_and_ladj(z, context), image.forward_and_ladj(z, context[..., None, None].expand(7, 5, 4, 2))
    )


def test_context_of_the_places_of_some_axes_is_repeated_along_the_others():
    """A film ``(time, channels, height, width)`` that is conditioned on one image."""
    shape = (3, 2, 4, 5)
    film = Coupling(shape, axis=1, conditioner="conv", hidden_dims=(8,), context_dim=(1, 4, 5))
    image = Coupling(shape[1:], conditioner="conv", hidden_dims=(8,), context_dim=(1, 4, 5))
    image.load_state_dict(perturb(film).state_dict())
    z, context = torch.randn(7, *shape), torch.randn(7, 1, 4, 5)
    x, ladj = film.forward_and_ladj(z, context)
    expected, ladj_of_images = image.forward_and_ladj(z, context[:, None])
    torch.testing.assert_close((x, ladj), (expected, ladj_of_images.sum(-1)))


# The inverse


@pytest.mark.parametrize("axis", [0, 1, 2])
@with_and_without_context
@pytest.mark.parametrize("batch_shape", [(), (2, 3)], ids=str)
def test_steps_give_what_passes_and_iterations_give(axis, context_dim, batch_shape):
    """Values, gradients and scores of a network that is evaluated place by place, and of one that is not."""
    by_steps = perturb(ordered(context_dim, axis=axis, univariate="spline").double(), 0.5)
    by_passes = ordered(context_dim, axis=axis, univariate="spline", conditioner=Plain).double()
    by_passes.load_state_dict(by_steps.state_dict())
    x, context = inputs(by_steps, batch_shape)
    weight, results = torch.randn_like(x), []
    for t in (by_steps, by_passes):
        leaves = [x.requires_grad_(), *([] if context is None else [context.requires_grad_()]), *t.parameters()]
        z, ladj = t.inverse_and_ladj(x, context)
        gradients = torch.autograd.grad((weight * z.sin()).sum() + ladj.square().sum(), leaves)
        results.append((z, ladj, *gradients, *t.forward_and_score(x, -weight, context)))
    torch.testing.assert_close(*results)


def test_backward_substitution_takes_the_steps_of_the_network(monkeypatch):
    calls, real = [], BackwardSteps.pull_back
    monkeypatch.setattr(BackwardSteps, "pull_back", lambda *args: calls.append(args[1]) or real(*args))
    t = perturb(ordered(0, axis=1).double())
    assert isinstance(t.conditioner, IncrementalGradient)
    z, _ = inputs(t, (5,))
    t.forward_and_score(z, -z)
    assert calls == [3, 2, 1]


def test_orders_of_different_axes_differ():
    shape = (4, 4)
    time, channels = (Autoregressive(shape, conditioner=Plain, axis=axis) for axis in (1, 0))
    assert time.triangular_order == (0, 1, 2, 3) != channels.triangular_order == channels.inv.triangular_order


# Flows


def test_flow_of_images():
    """Couplings of channels and of rows are fitted; the rows of an image are copies of the first, and noise."""
    torch.manual_seed(0)
    x = torch.randn(500, 3, 1, 2).expand(500, *SHAPE) + 0.3 * torch.randn(500, *SHAPE)
    options = {"hidden_dims": (16,)}
    rows = [Coupling(SHAPE, mask=mask, axis=1, **options) for mask in (masks.half(4), ~masks.half(4))]
    channels = [Coupling(SHAPE, mask=mask, conditioner=convolution, **options) for mask in ([True, True, False],)]
    flow = pf.Flow([*channels, *rows, ordered(0, axis=1).inv])
    untrained = flow().log_prob(x).mean().item()
    fit = pf.fit_density(
        flow, x, max_epochs=30, optimizer=partial(torch.optim.Adam, lr=0.02), seed=0, progress_bar=False
    )
    covariance = 0.09 * torch.eye(4) + 1
    entropy = 6 * torch.distributions.MultivariateNormal(torch.zeros(4), covariance).entropy()
    assert untrained < -30 < fit.best_log_prob < 0.5 - entropy
    draws, log_q = flow().rsample_and_log_prob((7,))
    assert draws.shape == (7, *SHAPE)
    torch.testing.assert_close(flow().log_prob(draws), log_q, rtol=1e-4, atol=1e-4)


# What is refused


@pytest.mark.parametrize("structure", [Coupling, Autoregressive])
@pytest.mark.parametrize(("dim", "axis"), [(SHAPE, 3), (SHAPE, -4), (5, 1)], ids=str)
def test_axis_that_the_event_does_not_have_raises(structure, dim, axis):
    with pytest.raises(OptionError, match=rf"{structure.__name__} has events of .* needs an axis from .*, got {axis}"):
        structure(dim, axis=axis)


@pytest.mark.parametrize(
    "mask", [[True, False], masks.channelwise(*SHAPE), masks.half(24)], ids=["short", "flat", "all"]
)
def test_mask_of_another_axis_raises(mask):
    with pytest.raises(OptionError, match=r"Coupling with events of shape \(3, 4, 2\).*be 3 booleans.* of axis 0 that"):
        Coupling(SHAPE, mask=mask)


def test_masks_that_do_nothing_raise():
    with pytest.raises(OptionError, match=r"events of shape \(3, 4, 2\).*transforms nothing.* indices of axis 1"):
        Coupling(SHAPE, mask=[True] * 4, axis=1)
    with pytest.raises(OptionError, match=r"events of shape \(3, 4, 2\).*nothing to condition on.* indices of axis 2"):
        Coupling(SHAPE, mask=[False] * 2, axis=2)


def test_contexts_of_other_places_raise():
    message = r"Coupling with events of shape \(3, 4, 2\) is a vector or has the shape \(channels, 4, 2\).*=\(2, 4\)"
    with pytest.raises(OptionError, match=message):
        Coupling(SHAPE, context_dim=(2, 4))
    with pytest.raises(OptionError, match=r"Coupling with events of size 3 is a vector, but got context_dim=\(2, 4\)"):
        Coupling(3, context_dim=(2, 4))


def test_convolutions_need_axes_after_the_masked_one():
    for dim in (5, (2, 2, 2, 2, 2)):
        with pytest.raises(
            OptionError, match=r"conv\' convolves over one to three axes after the masked one.* have [04]"
        ):
            Coupling(dim, conditioner="conv")


def test_masks_of_places_need_a_conditioner_that_looks_at_other_places():
    with pytest.raises(OptionError, match=r"looks at other places, but 'mlp' treats.*'conv', 'residual_conv'"):
        Coupling(SHAPE, mask=masks.checkerboard(4, 2))


@pytest.mark.parametrize("mask", [torch.ones(1, 4, 2).bool(), torch.zeros(1, 4, 2).bool()], ids=["all", "none"])
def test_masks_of_places_that_do_nothing_raise(mask):
    with pytest.raises(OptionError, match=r"shape \(3, 4, 2\).* for some places"):
        Coupling(SHAPE, mask=mask, conditioner="conv")


def test_mask_of_other_places_raises():
    with pytest.raises(
        OptionError, match=r"3 booleans.* or booleans of shape \(1, 4, 2\), true for the places that do"
    ):
        Coupling(SHAPE, mask=masks.checkerboard(2, 4), conditioner="conv")


def test_conditioner_that_gives_another_shape_raises():
    t = Coupling(SHAPE, conditioner=lambda in_dim, out_dim, _: nn.Conv2d(in_dim, out_dim, 2))
    message = r"conditioner of Coupling must map \(5, 1, 4, 2\) to \(..., 4, 4, 2\), but gave \(5, 4, 3, 1\)"
    with pytest.raises(ShapeError, match=message):
        t(torch.zeros(5, *SHAPE))
    t = Autoregressive((4, 2), "spline", conditioner=lambda *_, channels: CausalConv(range(2), 2, channels=channels))
    message = r"conditioner of Autoregressive must map \(5, 4, 2\) to \(5, 4, 2, 23\), but gave \(5, 4, 2, 2\)"
    with pytest.raises(ShapeError, match=message):
        t(torch.zeros(5, 4, 2))


@pytest.mark.parametrize("conditioner", ["made", "residual"])
def test_networks_for_vectors_refuse_images(conditioner):
    with pytest.raises(
        OptionError, match=r'takes vectors, but got events of shape \(3, 4, 2\): use "causal_conv".*factory'
    ):
        Autoregressive(SHAPE, conditioner=conditioner, axis=0)


@pytest.mark.parametrize(("axis", "channels"), [(0, (4, 2)), (1, (3, 2)), (-1, (3, 4))])
def test_factory_is_told_the_other_axes(axis, channels):
    calls = []

    def factory(*args, **options):
        calls.append((args, options))
        return Plain(*args, **options)

    Autoregressive(SHAPE, conditioner=factory, hidden_dims=(8,), context_dim=2, axis=axis)
    assert calls == [((list(range(SHAPE[axis])), 2, (8,), 2), {"channels": channels})]


def test_factory_of_couplings_is_called_with_sizes_along_the_axis():
    calls = []

    def factory(*args):
        calls.append(args)
        return MLP(*args)

    Coupling(SHAPE, mask=[True, False, False, True], conditioner=factory, hidden_dims=(8,), context_dim=5, axis=1)
    assert calls == [(2 + 5, 2 * 2, (8,))]

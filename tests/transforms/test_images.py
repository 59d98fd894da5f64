"""Layers of images: squeezes, 1 x 1 convolutions, and levels that factor out latents."""

import math

import pytest
import torch
from torch.nn import functional as F

from pyroflows.errors import OptionError, ShapeError
from pyroflows.transforms import (
    LU,
    ActNorm,
    Compose,
    Conv1x1,
    Coupling,
    Elementwise,
    EmergingConv,
    FlowTransform,
    Multiscale,
    Squeeze,
)
from pyroflows.transforms.image.normalized_conv import NormalizedConv1x1
from pyroflows.transforms.univariate import Affine
from tests.transforms.registry import perturb


def two_levels(context_dim=0):
    """Levels of images ``(1, 4, 8)`` whose latents are ``(8, 1, 2)`` and ``(2, 2, 4)``."""
    finest = Squeeze((1, 4, 8))
    coarsest = Squeeze((2, 2, 4))
    levels = [
        Compose([Coupling(s.base_shape, conditioner="conv", hidden_dims=(4,)), ActNorm(s.base_shape), s])
        for s in (coarsest, finest)
    ]
    return Multiscale(levels, context_dim)


# Squeezes


@pytest.mark.parametrize("factor", [2, 3])
def test_squeeze_is_torchs_unshuffling_of_pixels(factor):
    t = Squeeze((2, 6, 12), factor)
    x = torch.randn(5, 2, 6, 12)
    z = t.inv(x)
    assert torch.equal(z, F.pixel_unshuffle(x, factor)) and z.shape[1:] == t.base_shape
    assert torch.equal(t(z), x)


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 4, 5)], ids=str)
def test_squeeze_of_odd_sizes_raises(shape):
    with pytest.raises(OptionError, match=rf"Squeeze cannot divide images of shape \({shape[0]}, .*multiples of 2"):
        Squeeze(shape)


@pytest.mark.parametrize("make", [Squeeze, Conv1x1])
@pytest.mark.parametrize("shape", [8, (8, 8), (1, 3, 8, 8)], ids=str)
def test_other_shapes_than_those_of_images_raise(make, shape):
    with pytest.raises(OptionError, match=rf"{make.__name__} needs the shape of an image, \(channels, height, width\)"):
        make(shape)


# 1 x 1 convolutions


@pytest.mark.parametrize("context_dim", [0, 3])
def test_conv1x1_is_the_inverse_of_lu_at_each_place(context_dim):
    t = perturb(Conv1x1((4, 3, 2), order=[2, 0, 3, 1], context_dim=context_dim).double())
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    context = torch.randn(5, context_dim, dtype=torch.float64) if context_dim else None
    lu = LU(4, order=[2, 0, 3, 1], context_dim=context_dim).double()
    lu.load_state_dict(t.lu.state_dict())
    z, ladj = t.inverse_and_ladj(x, context)
    expected, ladj_of_places = lu.forward_and_ladj(
        x.movedim(1, -1), None if context is None else context[:, None, None]
    )
    torch.testing.assert_close(z.movedim(1, -1), expected)
    torch.testing.assert_close(ladj, ladj_of_places.sum((1, 2)))


def test_conv1x1_makes_its_matrix_once_for_all_places(monkeypatch):
    """A solve costs the same for any number of images and places: its right-hand side is the identity."""
    shapes, solve = [], torch.linalg.solve_triangular
    monkeypatch.setattr(
        torch.linalg, "solve_triangular", lambda a, b, **options: shapes.append(b.shape) or solve(a, b, **options)
    )
    Conv1x1((4, 8, 8))(torch.randn(5, 4, 8, 8))
    assert shapes == [(4, 4), (4, 4)]


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("is_batch_last", [False, True])
@pytest.mark.parametrize("direction", ["forward_and_ladj", "inverse_and_ladj"])
def test_normalized_conv1x1_is_the_composition(direction, is_batch_last, context_dim):
    """In values and log-determinants, in gradients, also those of a batch of losses, and in second derivatives."""
    t = perturb(NormalizedConv1x1(Conv1x1((4, 3, 2), order=[2, 0, 3, 1], context_dim=context_dim)).double())
    twin = Compose(list(t.layers))
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    x = (x.movedim(0, -1).contiguous().movedim(-1, 0) if is_batch_last else x).requires_grad_()
    given = [torch.randn(5, context_dim, dtype=torch.float64)] if context_dim else []
    weights = torch.randn(2, *x.shape, dtype=torch.float64)
    found = []
    for layer in (t, twin):
        value, ladj = getattr(layer, direction)(x, *given)
        inputs = [x, *twin.parameters()]
        losses = torch.stack([(value * weight).sum() + ladj.sin().sum() for weight in weights])
        batched = torch.autograd.grad(losses, inputs, torch.eye(2).double(), retain_graph=True, is_grads_batched=True)
        loss = (value.sin() * weights[0]).sum() + ladj.sin().sum()
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs)
        found.append([value, ladj, *batched, *gradients, *second, *first])
    torch.testing.assert_close(found[0], found[1])


def test_conv1x1_starts_at_a_matrix():
    """Rows keep their values up to a common sign, and an orthogonal matrix preserves volume."""
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    t = Conv1x1.starting_at(rotation, (12, 2, 3)).double()
    x = torch.eye(12, dtype=torch.float64)[..., None, None].expand(12, 12, 2, 3)
    z, ladj = t.inverse_and_ladj(x)
    matrix = z[:, :, 1, 2].T
    torch.testing.assert_close((matrix * rotation).sum(1).abs(), torch.ones(12, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(ladj, torch.zeros_like(ladj), atol=1e-5, rtol=0)


def test_conv1x1_refuses_an_order_of_other_channels():
    with pytest.raises(OptionError, match="order must be a permutation of 0 to 2"):
        Conv1x1((3, 4, 4), order=[0, 1])


# Levels


def test_latents_split_and_join():
    t = perturb(two_levels())
    x = torch.randn(5, 1, 4, 8)
    z = t.inv(x)
    latents = t.split(z)
    assert [part.shape for part in latents] == [(5, 8, 1, 2), (5, 2, 2, 4)]
    assert t.latent_shapes == [[8, 1, 2], [2, 2, 4]]
    assert torch.equal(t.join(latents), z)
    assert t(t.join([latents[0], torch.zeros(3, 1, 2, 2, 4)])).shape == (3, 5, 1, 4, 8)


def test_latents_are_those_of_the_levels_by_hand():
    """One half of the channels of the finest level is standardised given the other, which the coarsest level maps."""
    t = perturb(two_levels().double(), 0.3)
    beside, gaussian, finest = t.layers
    x = torch.randn(5, 1, 4, 8, dtype=torch.float64)
    h, ladj = finest.inverse_and_ladj(x)
    kept, factored = h.chunk(2, 1)
    loc, raw_scale = gaussian.conditioner(kept).chunk(2, 1)
    log_scale = torch.where(raw_scale > 0, 2 * torch.tanh(raw_scale / 2), 4 * torch.tanh(raw_scale / 4))
    fine = (factored - loc) * torch.exp(-log_scale)
    coarse, ladj_of_coarse = beside.layer.inverse_and_ladj(kept)
    z, total = t.inverse_and_ladj(x)
    torch.testing.assert_close(z, torch.cat([coarse, fine.flatten(1)], 1))
    torch.testing.assert_close(total, ladj + ladj_of_coarse - log_scale.sum((1, 2, 3)))


def test_each_level_has_a_gaussian_of_its_own():
    """With levels that do nothing but squeeze, the density is that of Gaussians, whose parameters start standard."""
    t = Multiscale([Squeeze((2, 2, 4)), Squeeze((1, 4, 8))])
    x = torch.randn(5, 1, 4, 8)
    z, ladj = t.inverse_and_ladj(x)
    assert (ladj == 0).all() and torch.equal(z.sort().values, x.flatten(1).sort().values)
    # Per element at the coarsest level; one convolution of the kept channels for each other one.
    assert [tuple(p.shape) for p in t.parameters()] == [(8, 1, 2, 2), (4, 2, 3, 3), (4,)]


def test_levels_adapt_to_what_arrives_there():
    t = two_levels()
    x = 3 + 2 * torch.randn(200, 1, 4, 8)
    assert t.adapts and not t.is_adapted
    t.adapt(x)
    norms = [module for module in t.modules() if isinstance(module, ActNorm)]
    assert t.is_adapted and len(norms) == 2 and all(norm.is_adapted for norm in norms)
    for latents in t.split(t.inv(x)):
        moments = latents.movedim(1, 0).flatten(1)
        torch.testing.assert_close(moments.mean(1), torch.zeros(len(moments)), atol=1e-4, rtol=0)
        torch.testing.assert_close(moments.std(1), torch.ones(len(moments)), atol=1e-2, rtol=0)


def test_levels_adapt_to_draws():
    t = perturb(two_levels())
    assert t.adapts_to_draws and not t.is_adapted_to_draws
    t.adapt_to_draws(torch.randn(500, 32))
    assert t.is_adapted_to_draws and all(norm.adapted for norm in t.modules() if isinstance(norm, ActNorm))


def test_levels_are_exact_if_their_layers_are():
    estimated = Multiscale([Compose([EstimatedImages((4, 1, 2)), Squeeze((1, 2, 4))]), Squeeze((1, 4, 8))])
    assert two_levels().ladj_is_exact and not estimated.ladj_is_exact
    exact = estimated.exact()
    x, ladj = exact.forward_and_ladj(torch.randn(3, 32))
    assert exact.ladj_is_exact and x.shape == (3, 1, 4, 8)
    assert torch.equal(ladj, torch.full((3,), 8.0))


class EstimatedImages(FlowTransform):
    """The map x = e z, whose log-determinant is the number of elements, with an estimate of that."""

    ladj_is_exact = False

    def _forward_and_ladj(self, z, context):
        return math.e * z, (torch.randn_like(z) ** 2).sum((-3, -2, -1))

    def _inverse_and_ladj(self, x, context):
        return x / math.e, -(torch.randn_like(x) ** 2).sum((-3, -2, -1))

    def _exact(self):
        return Elementwise(
            self.event_shape, Affine(None, None), init=torch.tensor([0.0, 1.0]).expand(*self.event_shape, 2)
        )


@pytest.mark.parametrize(
    ("levels", "shapes"),
    [
        (
            [Squeeze((4, 2, 4)), Squeeze((1, 4, 8))],
            r"gives images of shape \(4, 2, 4\).*takes images of shape \(4, 2, 4\)",
        ),
        (
            [Squeeze((2, 2, 2)), Squeeze((1, 4, 8))],
            r"gives images of shape \(2, 2, 2\).*takes images of shape \(4, 2, 4\)",
        ),
    ],
    ids=["nothing factored out", "other places"],
)
def test_levels_that_do_not_fit_raise(levels, shapes):
    with pytest.raises(ShapeError, match=f"level 0 of Multiscale {shapes}"):
        Multiscale(levels)


def test_latents_of_other_shapes_raise():
    t = two_levels()
    coarse, fine = t.split(torch.randn(32))
    with pytest.raises(ShapeError, match=r"Multiscale has event size 32, but got a tensor of shape \(31,\)"):
        t.split(torch.randn(31))
    for latents in ([coarse], [fine, coarse], [coarse, fine[:1]]):
        with pytest.raises(ShapeError, match=r"images of shape \(1, 4, 8\) joins latents .*\[8, 1, 2\], \[2, 2, 4\]"):
            t.join(latents)


@pytest.mark.parametrize("layer", [ActNorm, Conv1x1, EmergingConv, Elementwise])
def test_contexts_that_are_no_vectors_raise(layer):
    with pytest.raises(OptionError, match=r"reads vectors.*not what has the shape \(2, 4, 4\): flatten it"):
        layer((3, 4, 4), context_dim=(2, 4, 4))


def test_no_levels_raise():
    with pytest.raises(OptionError, match="Multiscale needs at least one level"):
        Multiscale([])


@pytest.mark.parametrize(
    "make",
    [ActNorm, Conv1x1, EmergingConv, lambda shape: Coupling(shape, conditioner="conv"), lambda _: two_levels()],
    ids=["act-norm", "conv-1x1", "emerging", "coupling", "multiscale"],
)
def test_no_step_waits_for_a_value(make):
    """On the meta device an operation that reads a value in Python, for which a GPU would have to wait, fails."""
    t = make((4, 8, 6)).to("meta")
    x = torch.empty(5, *t.event_shape, device="meta")
    z, ladj = t.inverse_and_ladj(x)
    (z.sum() + ladj.sum()).backward()
    with torch.no_grad():
        assert t.forward_and_ladj(z)[0].shape == x.shape

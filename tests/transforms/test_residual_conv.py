"""Residual layers of images and sequences: their convolutions, contexts and Jacobians."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import pyroflows as pf
from pyroflows.errors import OptionError, ShapeError
from pyroflows.nets.lipschitz.contraction import multiplied, multiplied_transposed
from pyroflows.transforms import Residual
from tests.transforms.registry import jacobian, perturb
from tests.transforms.test_residual_bound import largest_singular_values

SHAPES = {"sequence": (3, 7), "image": (3, 5, 4), "row": (2, 1, 6), "video": (2, 3, 4, 2)}
all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def residual(shape, hidden_dims=(8, 6), context_dim=0, seed=0, **options):
    torch.manual_seed(seed)
    return Residual(shape, hidden_dims, context_dim=context_dim, **options).double()


def convolution_matrix(kernel, size):
    """The matrix of a convolution of images of a size, from its taps."""
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(size) - 1]
    basis = torch.eye(kernel.shape[1] * torch.Size(size).numel(), dtype=kernel.dtype)
    images = basis.reshape(-1, kernel.shape[1], *size)
    return convolve(images, kernel, padding=[taps // 2 for taps in kernel.shape[2:]]).flatten(1).T


@all_shapes
@pytest.mark.parametrize("taps", [1, 3, 5])
@pytest.mark.parametrize("batch_shape", [(), (4,), (0,), (2, 1, 3)], ids=str)
def test_products_are_those_of_the_matrix(shape, taps, batch_shape):
    channels, *size = shape
    kernel = torch.randn(4, channels, *[taps] * len(size), dtype=torch.float64)
    v = torch.randn(*batch_shape, channels, *size, dtype=torch.float64)
    u = torch.randn(*batch_shape, 4, *size, dtype=torch.float64)
    matrix, num_axes = convolution_matrix(kernel, size), len(shape)
    torch.testing.assert_close(multiplied(kernel, v).flatten(-num_axes), v.flatten(-num_axes) @ matrix.T)
    torch.testing.assert_close(multiplied_transposed(kernel, u).flatten(-num_axes), u.flatten(-num_axes) @ matrix)


@all_shapes
@pytest.mark.parametrize("context", ["none", "vector", "array"])
def test_products_with_the_jacobian_are_those_of_autograd(shape, context):
    context_dim = {"none": 0, "vector": 2, "array": (2, *shape[1:])}[context]
    t = perturb(residual(shape, context_dim=context_dim))
    num_axes = len(shape)
    z = torch.randn(3, *shape, dtype=torch.float64)
    c = torch.randn(3, *t.context_shape, dtype=torch.float64) if context_dim else None
    g = t.net.at(c)
    matrix = jacobian(lambda z: g(z), z, num_axes)
    linear = g.linearized(z)
    v = torch.randn(2, 3, *shape, dtype=torch.float64)  # two probes a row
    of_rows = v.flatten(-num_axes)[..., None]
    torch.testing.assert_close(linear.value, g(z))
    torch.testing.assert_close(linear.times(v).flatten(-num_axes), (matrix @ of_rows)[..., 0])
    torch.testing.assert_close(linear.transposed_times(v).flatten(-num_axes), (matrix.mT @ of_rows)[..., 0])


@all_shapes
@pytest.mark.parametrize("hidden_dims", [(), (5,), (8, 6), (6, 3, 6)], ids=str)
def test_exact_log_determinant_is_that_of_the_jacobian(shape, hidden_dims):
    t = perturb(residual(shape, hidden_dims)).exact()
    z = torch.randn(3, *shape, dtype=torch.float64)
    x, ladj = t.forward_and_ladj(z)
    expected = torch.linalg.slogdet(jacobian(t, z, len(shape))).logabsdet
    torch.testing.assert_close(ladj, expected)
    back, back_ladj = t.inverse_and_ladj(x)
    torch.testing.assert_close(back, z, atol=1e-10, rtol=0)
    torch.testing.assert_close(back_ladj, -expected)


def test_norm_of_a_convolution_is_not_that_of_its_kernel():
    """With equal taps the norm is nearly nine times an entry on a large image, and that of the kernel three times."""
    t = residual((1, 20, 20), (), coefficient=0.9)
    nn.init.constant_(t.net.layers[0].weight, 1.0)
    (kernel,) = (weight.detach() for weight in t.net.at(None).weights)
    norm = torch.linalg.matrix_norm(convolution_matrix(kernel, (20, 20)), 2)
    assert 0.86 < norm < 0.9
    assert torch.linalg.matrix_norm(kernel.flatten(1), 2) < 0.35


@all_shapes
def test_hidden_layers_start_with_their_full_norm(shape):
    t = residual(shape, (8, 6), coefficient=0.9)
    *hidden, last = (weight.detach() for weight in t.net.at(None).weights)
    assert not last.any()
    scales = [1.0, *((max(1, width / shape[0])) ** 0.5 for width in (8, 6))]
    for kernel, (before, after) in zip(hidden, pairwise(scales), strict=True):
        values = torch.linalg.svdvals(convolution_matrix(kernel, shape[1:]))
        found = values[: min(kernel.shape[:2]) * torch.Size(shape[1:]).numel()]
        torch.testing.assert_close(found, torch.full_like(found, 0.9 ** (1 / 3) * after / before), rtol=0.02, atol=0)


@all_shapes
def test_neighbourhood(shape):
    """The first and the last convolution reach one place each."""
    t = perturb(residual(shape, (8, 6)))
    z = torch.zeros(shape, dtype=torch.float64)
    moved = z.clone()
    moved[(0, *[0] * len(shape[1:]))] = 1.0
    changed = (t(z) != t(moved)).any(0)
    expected = torch.zeros_like(changed)
    expected[tuple(slice(3) for _ in shape[1:])] = True
    assert torch.equal(changed, expected)


def test_context_of_places_acts_on_its_neighbourhood():
    t = perturb(residual((2, 5, 6), (4, 4), context_dim=(1, 5, 6)))
    z, c = torch.randn(2, 5, 6, dtype=torch.float64), torch.zeros(1, 5, 6, dtype=torch.float64)
    moved = c.clone()
    moved[0, 0, 0] = 1.0
    changed = (t.condition(c)(z) != t.condition(moved)(z)).any(0)
    assert changed[:3, :3].all() and changed.sum() == 9


@pytest.mark.parametrize("context_dim", [3, (2, 4, 4)], ids=str)
def test_context_shifts_without_steepening(context_dim):
    t = perturb(residual((2, 4, 4), (6, 6), context_dim=context_dim, coefficient=0.8), 3.0)
    c = 100 * torch.randn(50, *t.context_shape, dtype=torch.float64)
    linear = t.net.at(c).linearized(torch.randn(50, 2, 4, 4, dtype=torch.float64))
    assert largest_singular_values(linear).max() < 0.8
    assert linear.value.flatten(1).std(0).min() > 0.01


@pytest.mark.parametrize(
    ("shape", "context_dim", "message"),
    [
        ((1, 2, 2, 2, 2), 0, r"convolutions along one to three axes.*events of shape \(1, 2, 2, 2, 2\)"),
        ((3, 4, 4), (1, 4, 5), r"is a vector or has the shape \(channels, 4, 4\), but got context_dim=\(1, 4, 5\)"),
        ((3, 4), (1, 4, 4), r"is a vector or has the shape \(channels, 4\)"),
    ],
)
def test_what_does_not_fit_raises(shape, context_dim, message):
    with pytest.raises(OptionError, match=message):
        Residual(shape, (4,), context_dim=context_dim)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hidden_dims": (0,)}, "hidden_dims"), ({"activation": "relu"}, "activation must be one of")],
)
def test_options_that_do_not_fit_raise(options, message):
    with pytest.raises(OptionError, match=message):
        Residual((3, 4, 4), **options)


def test_images_of_another_shape_raise():
    with pytest.raises(ShapeError, match=r"shape \(3, 4, 5\)"):
        Residual((3, 4, 5))(torch.zeros(2, 3, 5, 4))


def test_files_rebuild_layers_of_images(tmp_path):
    torch.manual_seed(0)
    flow = perturb(pf.Flow([Residual((2, 3, 4), (5, 4), 0.9, context_dim=(1, 3, 4)).inv]))
    flow.save(tmp_path / "flow.safetensors")
    loaded = pf.load_flow(tmp_path / "flow.safetensors")
    x, c = torch.randn(5, 2, 3, 4), torch.randn(5, 1, 3, 4)
    torch.testing.assert_close(loaded(c).log_prob(x), flow(c).log_prob(x), rtol=0, atol=0)

"""Bounds of norms are above the norms, close to them, and differentiable; weights scaled by them keep their bound."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from pyroflows.compiling.program import compiled
from pyroflows.nets.lipschitz.norms import conv_norm_bound, norm_bound, normalized_conv

SHAPES = [(1, 1), (1, 5), (6, 1), (2, 2), (3, 2), (2, 64), (64, 64), (90, 130), (5, 4, 7), (2, 3, 3, 2), (0, 3, 2)]
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
IMAGES = [
    # out, in, taps, size, how far the bound may lie above the norm
    (1, 1, (3,), (1,), 1.001),
    (2, 3, (3,), (2,), 1.5),
    (2, 3, (5,), (7,), 1.2),
    (2, 2, (3,), (60,), 1.02),
    (4, 2, (7,), (3,), 1.7),  # an image smaller than the kernel
    (3, 2, (3, 3), (1, 1), 1.005),
    (3, 2, (3, 3), (1, 4), 1.2),
    (3, 2, (3, 3), (4, 4), 1.33),
    (3, 4, (3, 3), (8, 8), 1.1),
    (2, 3, (3, 3), (15, 17), 1.04),
    (1, 1, (3, 3), (22, 21), 1.04),
    (2, 2, (5, 3), (7, 3), 1.5),
    (5, 4, (1, 1), (3, 3), 1.005),
    (2, 3, (1, 3), (5, 6), 1.1),
]


def normalized(matrix, bound):
    """The matrix scaled down to a bound, as kernels are."""
    return matrix * (bound / norm_bound(matrix).clamp_min(bound))[..., None, None]


def eps(dtype):
    return 20 * torch.finfo(dtype).eps


def spectra(size):
    """Singular values that make a bound hard: all alike, two alike, one alone, and a slow decay."""
    return [torch.ones(size), (torch.arange(size) < 2) * 1.0, (torch.arange(size) < 1) * 1.0, 0.9 ** torch.arange(size)]


def with_spectrum(values, dtype, rows=None):
    rows = rows or len(values)
    u = torch.linalg.qr(torch.randn(rows, len(values), dtype=dtype))[0]
    v = torch.linalg.qr(torch.randn(len(values), len(values), dtype=dtype))[0]
    return u * values.to(dtype) @ v


def operator(kernel, size):
    """The matrix of a convolution with zeros beyond the borders."""
    channels, places = kernel.shape[1], torch.Size(size).numel()
    images = torch.eye(channels * places, dtype=kernel.dtype).view(-1, channels, *size)
    convolve = (F.conv1d, F.conv2d)[len(size) - 1]
    return convolve(images, kernel, padding=[taps // 2 for taps in kernel.shape[2:]]).flatten(1).T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bound_of_matrices_is_tight(shape, magnitude, dtype):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=dtype) * magnitude
    norm = torch.linalg.matrix_norm(matrix.to(torch.complex128), 2)
    bound = norm_bound(matrix)
    assert bound.shape == shape[:-2] and bound.dtype == matrix.abs().dtype
    assert (bound >= norm * (1 - eps(dtype))).all() and (bound <= norm * 1.005).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 17, 64, 150])
def test_bound_of_hard_spectra_is_tight(size, dtype):
    torch.manual_seed(0)
    for values in spectra(size):
        for matrix in (with_spectrum(values, dtype), with_spectrum(values, dtype, size + 5).mT):
            norm = torch.linalg.matrix_norm(matrix.to(torch.complex128), 2)
            assert norm * (1 - eps(dtype)) <= norm_bound(matrix) <= norm * 1.005


def test_bound_of_a_matrix_of_rank_one_is_its_norm():
    matrix = torch.outer(torch.randn(7), torch.randn(9)).double()
    torch.testing.assert_close(norm_bound(matrix), torch.linalg.matrix_norm(matrix, 2), rtol=1e-12, atol=0)


def test_bound_of_an_adjoint_matrix():
    matrix = torch.randn(3, 4, dtype=torch.complex128, requires_grad=True)
    torch.testing.assert_close(norm_bound(matrix.mH), norm_bound(matrix))
    expected = torch.autograd.grad(norm_bound(matrix), matrix)
    torch.testing.assert_close(torch.autograd.grad(norm_bound(matrix.mH), matrix), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_matrix_has_norm_and_gradient_zero(dtype):
    for function in (lambda m: norm_bound(m).sum(), lambda m: torch.func.vmap(norm_bound)(m).sum()):
        matrix = torch.zeros(2, 3, 4, dtype=dtype, requires_grad=True)
        bound = function(matrix)
        assert bound == 0
        (gradient,) = torch.autograd.grad(bound, matrix)
        assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(3, 4), (4, 2), (1, 3), (2, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    "function",
    [norm_bound, lambda w: normalized(w, 0.5), lambda w: normalized(w, 50.0)],
    ids=["norm", "above", "below"],
)
def test_gradients_of_matrices(function, dtype, shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(function, matrix, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, matrix, fast_mode=True)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
@pytest.mark.parametrize("size", [2, 64])
def test_gradient_does_not_depend_on_the_scale(size, magnitude):
    torch.manual_seed(0)
    matrix = torch.randn(size, size, requires_grad=True)
    scaled = (matrix.detach() * magnitude).requires_grad_()
    expected = torch.autograd.grad(norm_bound(matrix), matrix)[0]
    torch.testing.assert_close(torch.autograd.grad(norm_bound(scaled), scaled)[0], expected)


def test_gradient_where_singular_values_coincide():
    matrix = torch.eye(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm_bound(matrix), matrix, create_graph=True)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(gradient, "nuc"), torch.tensor(1.0).double(), rtol=0.005, atol=0
    )
    assert torch.autograd.grad(gradient.square().sum(), matrix)[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_normalized_keeps_the_bound(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    norms = torch.linalg.matrix_norm(normalized(weight, 0.7).to(torch.complex128), 2)
    above = torch.linalg.matrix_norm(weight, 2) > 0.7
    assert (norms <= 0.7 * (1 + eps(dtype))).all() and (norms[above] >= 0.7 / 1.006).all()
    assert torch.equal(normalized(weight, 1e3), weight)
    assert torch.equal(normalized(torch.zeros_like(weight), 0.7), torch.zeros_like(weight))


@pytest.mark.parametrize(("out_channels", "in_channels", "taps", "size", "slack"), IMAGES)
def test_bound_of_convolutions(out_channels, in_channels, taps, size, slack):
    torch.manual_seed(0)
    kernels = [
        torch.randn(out_channels, in_channels, *taps),
        torch.ones(out_channels, in_channels, *taps),  # has its largest symbol at the frequency zero
        (torch.arange(math.prod(taps)) % 2 * 2.0 - 1)
        .view(taps)
        .expand(out_channels, in_channels, *taps),  # the highest
    ]
    for kernel in (kernel.double() for kernel in kernels):
        norm = torch.linalg.matrix_norm(operator(kernel, size), 2)
        bound = conv_norm_bound(kernel, size)
        assert bound.shape == () and norm * (1 - 1e-12) <= bound <= norm * slack
        torch.testing.assert_close(conv_norm_bound(kernel.float(), size), bound.float(), rtol=5e-6, atol=0)
        result = torch.linalg.matrix_norm(operator(normalized_conv(kernel, size, 0.4), size), 2)
        assert min(0.4 / slack, norm) * (1 - 1e-12) <= result <= 0.4 * (1 + 1e-12)
        assert torch.equal(normalized_conv(kernel, size, 1e3), kernel)


def test_few_frequencies_bound_the_norm_of_waves_between_them():
    """The largest symbol lies halfway between two frequencies of the grid, where the grid misses most of it."""
    cos, sin = math.cos(math.pi / 20), math.sin(math.pi / 20)
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    kernel = torch.stack([turn.T, torch.zeros(2, 2), turn], -1)
    norm = torch.linalg.matrix_norm(operator(kernel, (200,)), 2)
    assert norm <= conv_norm_bound(kernel, (200,)) <= 1.005 * norm
    # In two dimensions the operator of a product is the product of the operators.
    product = torch.einsum("ois,pjt->opijst", kernel, kernel).reshape(4, 4, 3, 3)
    assert norm**2 <= conv_norm_bound(product, (200, 200)) <= 1.005 * norm**2


@pytest.mark.parametrize(("channels", "size"), [((3, 2), (4, 4)), ((1, 2), (1, 5)), ((2, 3), (2, 30))], ids=str)
def test_gradients_of_convolutions(channels, size):
    torch.manual_seed(0)
    kernel = torch.randn(*channels, 3, 3, dtype=torch.float64, requires_grad=True)
    for function in (lambda k: conv_norm_bound(k, size), lambda k: normalized_conv(k, size, 0.5)):
        assert torch.autograd.gradcheck(function, kernel, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, kernel, fast_mode=True)


def test_zero_kernel():
    kernel = torch.zeros(2, 3, 3, 3, requires_grad=True)
    assert conv_norm_bound(kernel, (5, 5)) == 0
    (gradient,) = torch.autograd.grad(normalized_conv(kernel, (5, 5), 0.9).sum(), kernel)
    assert (gradient == 1).all()


FUNCTIONS = {
    "norm": (norm_bound, (3, 4)),
    "tall": (norm_bound, (5, 2)),
    "normalized": (lambda w: normalized(w, 0.5), (3, 4)),
    "conv": (lambda k: conv_norm_bound(k, (5, 4)), (3, 2, 3, 3)),
    "normalized_conv": (lambda k: normalized_conv(k, (5, 4), 0.5), (3, 2, 3, 3)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_under_transformations(name):
    function, shape = FUNCTIONS[name]
    torch.manual_seed(0)
    weights = torch.randn(6, *shape, dtype=torch.float64, requires_grad=True)

    def gradients(values):
        return torch.autograd.grad(values.square().sum(), weights)[0]

    loop = torch.stack([function(weight) for weight in weights])
    batch = torch.func.vmap(function)(weights)
    torch.testing.assert_close(batch, loop)
    torch.testing.assert_close(gradients(batch), gradients(loop))
    slopes = torch.func.vmap(torch.func.grad(lambda w: function(w).square().sum()))(weights)
    torch.testing.assert_close(slopes, gradients(torch.stack([function(weight) for weight in weights])))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_recorded(name):
    function, shape = FUNCTIONS[name]
    torch.manual_seed(0)

    def step(weight):
        with torch.enable_grad():
            leaf = weight.detach().requires_grad_()
            value = function(leaf)
            return [value.detach(), *torch.autograd.grad(value.square().sum(), leaf)]

    first, second = torch.randn(2, *shape, dtype=torch.float64)
    expected = step(second)
    for recorded in (make_fx(step)(first), compiled(step, [first])):
        torch.testing.assert_close(recorded(second), expected)
    compiled_step = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled_step(second), expected[0])

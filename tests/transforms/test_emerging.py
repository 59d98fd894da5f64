"""Emerging convolutions: what they compute, what they read, and the solve along anti-diagonals."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyroflows as pf
from pyroflows.compiling.check import Compiler
from pyroflows.errors import OptionError, StateError
from pyroflows.transforms import LU, EmergingConv
from pyroflows.transforms.image.causal_solve import _iterated, offsets, solve_causal
from pyroflows.transforms.linear.lu import lu_factors
from tests.transforms.registry import jacobian, perturb

GROUPED_PROBLEMS = [(1, 3, 4, 3, 2), (2, 2, 3, 5, 1), (3, 1, 1, 4, 1)]  # (groups, channels, height, width, images)


def emerging(shape, kernel_size=3, scale=0.5, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return perturb(EmergingConv(shape, kernel_size).to(dtype), scale)


def problem(shape, kernel_size=2, seed=0):
    """A right-hand side and taps of a causal convolution."""
    torch.manual_seed(seed)
    num_groups, channels, *_ = shape
    taps = 0.5 * torch.randn(num_groups, kernel_size**2 - 1, channels, channels, dtype=torch.float64)
    return torch.randn(shape, dtype=torch.float64), taps


def by_pixels(t, x):
    """The map from data to base, pixel by pixel as the formula in the docstring has it."""
    core, a_taps, b_taps = t._matrices(None)
    lower, upper, _ = lu_factors(core)
    _, height, width = x.shape
    steps = offsets(t.num_taps)
    y, z = torch.empty_like(x), torch.empty_like(x)
    for i in range(height):
        for j in range(width):
            read = [(k, i - a, j - b) for k, (a, b) in enumerate(steps) if i >= a and j >= b]
            y[:, i, j] = lower @ upper @ (x[:, i, j] + sum(a_taps[k] @ x[:, row, col] for k, row, col in read))
    for i in range(height):
        for j in range(width):
            read = [(k, i + a, j + b) for k, (a, b) in enumerate(steps) if i + a < height and j + b < width]
            z[:, i, j] = y[:, i, j] + sum(b_taps[k] @ y[:, row, col] for k, row, col in read)
    return z


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_data_to_base_is_the_formula(kernel_size):
    t = emerging((3, 4, 5), kernel_size)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(t.inv(x), by_pixels(t, x))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_receptive_field_is_the_square_of_the_kernel(kernel_size):
    """At every pixel, also at borders: all channels of the pixels around it, and no others."""
    height, width = 6, 5
    t = emerging((2, height, width), kernel_size)
    reads = jacobian(t.inv, torch.randn(2, height, width, dtype=torch.float64), num_axes=3) != 0
    reads = reads.reshape(2, height, width, 2, height, width)
    rows, columns = torch.arange(height), torch.arange(width)
    near_rows = (rows[:, None] - rows).abs() <= kernel_size // 2
    near_columns = (columns[:, None] - columns).abs() <= kernel_size // 2
    near = near_rows[:, None, :, None] & near_columns[None, :, None, :]
    assert reads.permute(0, 3, 1, 2, 4, 5).equal(near.expand(2, 2, -1, -1, -1, -1))


def test_both_convolutions_are_triangular_over_pixels():
    """In opposite orders: without B, no pixel reads a later one, and without A none reads an earlier one."""
    for zeroed, is_upper in ((slice(4, 7), False), (slice(1, 4), True)):
        t = emerging((2, 3, 4))
        with torch.no_grad():
            t.matrices_of.value[zeroed] = 0
        matrix = jacobian(t.inv, torch.randn(2, 3, 4, dtype=torch.float64), num_axes=3)
        by_pixel = matrix.reshape(2, 12, 2, 12).abs().sum((0, 2))
        assert by_pixel.triu(1).any() == is_upper and by_pixel.tril(-1).any() != is_upper


def test_of_one_pixel_is_a_linear_layer_over_channels():
    t = emerging((4, 3, 2), kernel_size=1)
    linear = LU(4).double()
    linear.load_state_dict({**linear.state_dict(), "matrix_of.value": t.matrices_of.value[0]})
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    z, ladj = t.inverse_and_ladj(x)
    expected, expected_ladj = linear.forward_and_ladj(x.movedim(1, -1))
    torch.testing.assert_close(z, expected.movedim(-1, 1))
    torch.testing.assert_close(ladj, expected_ladj.sum((1, 2)))


def test_round_trip_in_single_precision():
    t = emerging((8, 16, 16), dtype=torch.float32)
    with torch.no_grad():
        x = torch.randn(10, 8, 16, 16)
        z = torch.randn(10, 8, 16, 16)
        torch.testing.assert_close(t(t.inv(x)), x, rtol=0, atol=1e-5)
        torch.testing.assert_close(t.inv(t(z)), z, rtol=0, atol=1e-5)


class Products(TorchDispatchMode):
    """It counts the products of matrices."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "addmm" in function.name() or "bmm" in function.name()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("context_dim", [0, 2])
def test_work_is_done_by_anti_diagonals(context_dim):
    """The number of products grows with H + W, and not with the number of pixels, images or channels."""
    counts = []
    for channels, height, width in ((2, 16, 16), (3, 32, 32), (2, 16, 48)):
        t = EmergingConv((channels, height, width), context_dim=context_dim)
        z, context = torch.randn(5, channels, height, width), torch.randn(5, 2)
        t = t.condition(context) if context_dim else t
        with Products() as products, torch.no_grad():
            t(z)
        counts.append(products.count)
    small, large, wide = counts
    assert large == wide and 4 * 31 <= small < large <= 2.1 * small


@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize("shape", GROUPED_PROBLEMS, ids=str)
def test_solve_by_iteration_is_that_by_anti_diagonals(shape, kernel_size):
    y, taps = problem(shape, kernel_size)
    torch.testing.assert_close(_iterated(y, taps), solve_causal(y, taps))


@pytest.mark.parametrize("kernel_size", [2, 3, 4])
@pytest.mark.parametrize("shape", GROUPED_PROBLEMS, ids=str)
def test_solve_reads_no_memory_that_it_did_not_write(shape, kernel_size):
    """With deterministic algorithms, torch fills new memory with NaN."""
    y, taps = problem(shape, kernel_size)
    expected = solve_causal(y, taps)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        torch.testing.assert_close(solve_causal(y, taps), expected, rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernel_size", [2, 3])
@pytest.mark.parametrize("shape", GROUPED_PROBLEMS, ids=str)
def test_first_and_second_derivatives_of_the_solve(shape, kernel_size):
    y, taps = (value.requires_grad_() for value in problem(shape, kernel_size))
    assert torch.autograd.gradcheck(solve_causal, (y, taps))
    assert torch.autograd.gradgradcheck(solve_causal, (y, taps), fast_mode=True)


def test_gradients_by_torch_func_are_those_of_autograd():
    t = emerging((2, 3, 4))
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    names = {name: parameter.detach() for name, parameter in t.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(t, p, (z,)).sin().sum())(names)
    (expected,) = torch.autograd.grad(t(z).sin().sum(), t.parameters())
    torch.testing.assert_close(gradients["matrices_of.value"], expected)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_recorded_solve_and_gradients_are_the_eager_ones(context_dim):
    """The compiler compares what it recorded with the function, at other values and other parameters."""
    torch.manual_seed(0)
    t = perturb(EmergingConv((2, 4, 3), context_dim=context_dim).double(), 0.3)
    parameters = list(t.parameters())
    z, other, context = (torch.randn(5, *shape, dtype=torch.float64) for shape in ((2, 4, 3), (2, 4, 3), (2,)))

    def function(z):
        with torch.enable_grad():
            x, ladj = t.forward_and_ladj(z, context if context_dim else None)
            gradients = torch.autograd.grad(x.sin().sum() + ladj.sum(), parameters)
        return [x.detach(), *gradients]

    program = Compiler("trace")(function, [z], [other], state=[t, context])
    perturb(t, 0.3)
    for result, expected in zip(program(other), function(other), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("kernel_size", [0, 2, -3, 3.5, "3"], ids=str)
def test_even_kernels_are_refused(kernel_size):
    with pytest.raises(OptionError, match="EmergingConv needs an odd kernel_size"):
        EmergingConv((3, 4, 4), kernel_size)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (1, 2, 3, 4)], ids=str)
def test_events_that_are_no_images_are_refused(shape):
    with pytest.raises(OptionError, match="EmergingConv needs the shape of an image"):
        EmergingConv(shape)


def test_a_saved_flow_is_the_flow(tmp_path):
    flow = pf.Flow([emerging((2, 4, 3), 5, dtype=torch.float32)])
    x = torch.randn(6, 2, 4, 3)
    flow.save(tmp_path / "flow.safetensors")
    torch.testing.assert_close(pf.load_flow(tmp_path / "flow.safetensors")().log_prob(x), flow().log_prob(x))
    with pytest.raises(StateError, match="kernel_size"):
        pf.Flow([EmergingConv((2, 4, 3), 3)]).load_state_dict(flow.state_dict())


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("which", [0, 1], ids="AB")
def test_inverse_enlarges_an_image_by_a_factor_that_does_not_grow_with_its_size(which, size):
    """The worst taps all have the sign that adds up: here each R is -10, and 1 + sum |R| = 61 for two channels."""
    t = EmergingConv((2, size, size))
    with torch.no_grad():
        t.matrices_of.value[1:].unflatten(0, (2, t.num_taps))[which] = -10.0
        largest = t(torch.ones(2, size, size)).max()
    assert largest < 61


def test_round_trip_with_large_parameters():
    t = EmergingConv((8, 16, 16))
    torch.nn.init.normal_(t.matrices_of.value, 0, 0.3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(20, 8, 16, 16)
    assert (t(t.inv(x)) - x).abs().max() < 1e-5 and (t.inv(t(x)) - x).abs().max() < 1e-5


def test_learns_the_correlations_of_neighbours():
    """A Gaussian field with known taps: maximum likelihood comes near its log-density."""
    truth = pf.Flow([emerging((1, 5, 4), dtype=torch.float32, seed=3)])
    with torch.no_grad():
        x, held_out = truth().sample((2, 4000))
        best = truth().log_prob(held_out).mean()
    flow = pf.Flow([EmergingConv((1, 5, 4))])
    start = flow().log_prob(held_out).mean()
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -flow().log_prob(x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    # Seven parameters, of 4,000 images, cost about 7 / (2 * 4000) nats in the mean.
    assert best - flow().log_prob(held_out).mean() < 0.02 < 1 < best - start

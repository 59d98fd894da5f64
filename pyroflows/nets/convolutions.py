"""The function that the convolutional networks with ReLU activations compute."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.compiling.eager import is_transformed
from pyroflows.nets.gradients import is_batch, recorded_gradients
from pyroflows.nets.products import product

_relu_backward = torch.ops.aten.threshold_backward.grad_input


def convolutions(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    r"""Return the output of convolutions with ReLU activations in between,

    .. math:: a_k = W_k * h_{k-1} + b_k, \qquad h_0 = x, \quad h_k = \max(a_k, 0),

    which is the last :math:`a_k`. Each :math:`W_k` has one tap or three along all axes. Places beyond the border are
    zero.

    On processors the batch is the last axis in memory, also in that of the output: loops over it are long however small
    the images are, channels are contiguous blocks, and each convolution is one product of matrices.

    Args:
        x: ``(N, channels, *rest)``, where ``rest`` has one to three axes.
        weights: the :math:`W_k`, ``(out, in, *taps)`` each.
        biases: the :math:`b_k`, ``(out,)`` each.

    Shapes: the output is ``(N, out, *rest)``.

    Example:
        >>> x, w, b = torch.randn(5, 3, 4, 6), torch.randn(2, 3, 3, 3), torch.randn(2)
        >>> torch.allclose(convolutions(x, [w], [b]), F.conv2d(x, w, b, padding=1), atol=1e-5)
        True
    """
    # The transforms of torch.func arrange the rows themselves, and cannot see into a gradient that is written out.
    if is_transformed() or x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return _recorded(x, weights, biases)
    return _WrittenOut.apply(x.movedim(0, -1).contiguous(), *weights, *biases).movedim(-1, 0)


def _recorded(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Return the output by operations that autograd records."""
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = convolve(F.relu(x) if k else x, weight, bias, padding=weight.shape[-1] // 2)
    return x


class _WrittenOut(torch.autograd.Function):
    r"""The convolutions of columns, ``(channels, *rest, N)``, with the gradient written out.

    Let :math:`S_t` shift an image by the tap t, so that :math:`W * h = \sum_t W_t S_t h`. A convolution with fewer
    channels in its input is the product of one matrix, :math:`[W_t]_t`, and the *unfolded* input :math:`[S_t h]_t`.
    One with fewer channels in its output *folds* the product of another matrix, :math:`[W_t]_t` one below the other,
    and the input,

    .. math:: U h = [S_t h]_t, \qquad W * h = [W_t]_t\, U h = U^\top [W_{-t}]_t\, h, \qquad
        U^\top y = \sum_t S_{-t}\, y_t.

    So the matrix M of a layer gives either :math:`a = M (U h) + b` or :math:`a = U^\top (M h) + b`, without U for one
    tap. From the gradient g by a follow

    .. math:: \nabla_b = \sum g, \qquad \nabla_M = g (U h)^\top \ \text{or}\ (U g) h^\top, \qquad
        \nabla_h = U^\top M^\top g \ \text{or}\ M^\top U g,

    where sums are over places and the batch. Where h > 0, :math:`\nabla_h` is the gradient by the activation before it,
    and that is zero elsewhere. Second derivatives are those of the recorded operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        count = len(parameters) // 2
        matrices = [_matrix(weight) for weight in parameters[:count]]
        hidden = [x]
        for k, (weight, bias) in enumerate(zip(parameters[:count], parameters[count:], strict=True)):
            a = product(matrices[k], _unfolded(hidden[k]) if _unfolds(weight) else hidden[k].flatten(1))
            a = _folded(a, x.shape[1:]) if _folds(weight) else a.view(a.shape[0], *x.shape[1:])
            a += bias.view(-1, *[1] * (x.dim() - 1))
            hidden.append(a.relu_() if k < count - 1 else a)
        ctx.save_for_backward(*parameters, *matrices, *hidden[:-1])
        return hidden[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        count = len(saved) // 4
        parameters, matrices, hidden = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        if torch.is_grad_enabled() or is_transformed() or is_batch(gradient):  # the first by create_graph=True
            return tuple(recorded_gradients(_of_columns, (hidden[0], *parameters), (gradient,)))
        g, shape = gradient.contiguous(), gradient.shape[1:]
        by_weights: list[Tensor] = []
        by_biases: list[Tensor] = []
        for k in reversed(range(count)):
            weight, h = parameters[k], hidden[k]
            by_biases.append(g.flatten(1).sum(1))
            # An unfolded input is larger than the input itself: to unfold again costs less than to keep it.
            columns = _unfolded(g) if _folds(weight) else g.flatten(1)
            by_matrix = product(columns, (_unfolded(h) if _unfolds(weight) else h.flatten(1)).T)
            by_weights.append(_weight(by_matrix, weight))
            if k == 0 and not ctx.needs_input_grad[0]:
                return None, *by_weights[::-1], *by_biases[::-1]
            g = product(matrices[k].T, columns)
            g = _folded(g, shape) if _unfolds(weight) else g.view(g.shape[0], *shape)
            if k:
                _relu_backward(g, h, 0, grad_input=g)
        return g, *by_weights[::-1], *by_biases[::-1]


def _of_columns(x: Tensor, *parameters: Tensor) -> Tensor:
    """Return the output for columns, by operations that autograd records."""
    count = len(parameters) // 2
    return _recorded(x.movedim(-1, 0), parameters[:count], parameters[count:]).movedim(0, -1)


def _unfolds(weight: Tensor) -> bool:
    """Tell whether a convolution unfolds its input."""
    return weight.shape[-1] > 1 and weight.shape[1] <= weight.shape[0]


def _folds(weight: Tensor) -> bool:
    """Tell whether a convolution folds its output."""
    return weight.shape[-1] > 1 and weight.shape[1] > weight.shape[0]


def _matrix(weight: Tensor) -> Tensor:
    """Return the matrix of a convolution, ``(out, in * taps)``, or ``(out * taps, in)`` if it folds its output."""
    if not _folds(weight):
        return weight.flatten(1)
    return weight.flatten(2).flip(-1).mT.reshape(-1, weight.shape[1])


def _weight(matrix: Tensor, like: Tensor) -> Tensor:
    """Return the weight whose matrix this is, of the shape of another one."""
    if not _folds(like):
        return matrix.view_as(like)
    return matrix.view(like.shape[0], like[0, 0].numel(), like.shape[1]).mT.flip(-1).view_as(like)


def _unfolded(h: Tensor) -> Tensor:
    """Return the neighbours of all places of columns ``(channels, *rest, N)``.

    They are ``(channels * taps, M)``, where M counts the places of the whole batch.
    """
    num_axes = h.dim() - 2
    padded = F.pad(h, (0, 0) + (1, 1) * num_axes)
    per_channel, *by_axis, per_row = padded.stride()
    shape = (h.shape[0], *[3] * num_axes, *h.shape[1:])
    columns = padded.as_strided(shape, (per_channel, *by_axis, *by_axis, per_row))
    # Of one channel along one axis reshape makes a view that overlaps itself, which oneDNN does not multiply.
    return columns.reshape(h.shape[0] * 3**num_axes, -1).contiguous()


def _folded(y: Tensor, shape: torch.Size) -> Tensor:
    """Return the sum of ``(channels * taps, M)`` over taps, each shifted back, as columns ``(channels, *shape)``.

    This is the transpose of :func:`_unfolded`; ``shape`` is ``(*rest, N)``. It overwrites y.
    """
    num_axes = len(shape) - 1
    y = y.view(y.shape[0] // 3**num_axes, *[3] * num_axes, *shape)
    for length in shape[:-1]:
        # The first axis of taps belongs to the axis of places that follows the axes of taps.
        before, y, after = y.unbind(1)
        y.narrow(num_axes, 0, length - 1).add_(before.narrow(num_axes, 1, length - 1))
        y.narrow(num_axes, 1, length - 1).add_(after.narrow(num_axes, 0, length - 1))
    return y.contiguous()

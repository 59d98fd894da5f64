"""Vector-Jacobian products of tensors that are already computed, and the score of an elementwise map."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pull_back(outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    r"""Return the vector-Jacobian products :math:`\sum_i c_i^\top \partial y_i / \partial x_j`, one for each input.

    An input that no output depends on gets zeros. The graph of the outputs is kept, so that it can be used again.

    Args:
        outputs: tensors :math:`y_i`; one without gradients counts as a constant.
        cotangents: :math:`c_i`, each of the shape of its output.
        inputs: tensors :math:`x_j` that require gradients.

    Example:
        >>> x, unused = torch.tensor(3.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        >>> pull_back([x**2], [torch.tensor(1.0)], [x, unused])
        (tensor(6.), tensor(0.))
    """
    pairs = [(output, cotangent) for output, cotangent in zip(outputs, cotangents, strict=True) if output.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(value) for value in inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def elementwise_score(z: Tensor, log_slopes: Tensor, score: Tensor) -> Tensor:
    r"""Return the score of the law of x, where :math:`x_j = T(z_j)`, from that of the law of z.

    .. math:: \partial_{x_j} \log q(x) = (\partial_{z_j} \log p(z) - \partial_{z_j} \log T'(z_j)) / T'(z_j)

    Args:
        z: the elements, which require gradients.
        log_slopes: :math:`\log T'(z_j)`, computed from this z and of its shape.
        score: :math:`\nabla_z \log p(z)`, of the shape of z.

    Example:
        >>> z = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> elementwise_score(z, torch.tensor([2.0, 2.0]).log(), -z)  # x = 2 z, z standard normal
        tensor([-0.5000,  1.0000])
    """
    with torch.no_grad():
        (slope_of_log_slopes,) = pull_back((log_slopes,), (torch.ones_like(log_slopes),), (z,))
        return (score - slope_of_log_slopes) * torch.exp(-log_slopes)

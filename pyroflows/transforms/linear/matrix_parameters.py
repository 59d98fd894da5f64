"""Parameters in the form of a matrix, which may depend on a context."""

import math

from torch import Tensor

from pyroflows.nets import Parameters


class MatrixParameters(Parameters):
    r"""The parameters of a matrix with n columns, ``theta = value + net(context) / sqrt(n)``.

    A network whose outputs are of order one would otherwise make triangular factors whose inverses grow like
    :math:`2^n`. The arguments, shapes and errors are those of :class:`pyroflows.nets.Parameters`.

    Example:
        >>> MatrixParameters(torch.zeros(3, 2), context_dim=4)(torch.randn(5, 4)).shape
        torch.Size([5, 3, 2])
    """

    def forward(self, context: Tensor | None = None) -> Tensor:
        if self.net is None:
            return self.value
        return self.value + self.net(context).unflatten(-1, self.value.shape) / math.sqrt(self.value.shape[-1])

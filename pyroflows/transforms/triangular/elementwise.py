"""The elementwise structure: each element has its own univariate map."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.errors import ShapeError
from pyroflows.nets import Parameters
from pyroflows.transforms import univariate
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.gradients import elementwise_score
from pyroflows.transforms.triangular.base import TriangularTransform
from pyroflows.transforms.univariate import AffineMap, Scale, UnivariateLike, univariate_named
from pyroflows.transforms.univariate.by_column import checked_columns


class Elementwise(TriangularTransform):
    r"""The elementwise layer :math:`x_j = T(z_j; \theta_j)`, in which each element has a univariate map of its own.

    The log-determinant is :math:`\sum_j \log T'(z_j; \theta_j)`. Both directions are parallel.

    Args:
        dim: the event size D, or the event shape.
        univariate: the map T: "additive", "scale", "affine", "leaky_relu", "sinh_arcsinh", "spline", "circular_spline",
            "sos", "monotone", or an instance; or a list of these, one for each dimension.
        context_dim: size of the context that the parameters depend on, 0 for none.
        init: initial parameters ``(*event_shape, univariate.num_params)``; None for zeros, which make the identity.

    Shapes: z and x are ``(..., *event_shape)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if the map's name is unknown.
        ShapeError: if ``init`` has another shape.

    Example:
        >>> from pyroflows.transforms.univariate import Affine
        >>> t = Elementwise(2, Affine(), init=torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> t(torch.zeros(2)).tolist()
        [1.0, -1.0]
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        univariate: UnivariateLike = "affine",
        context_dim: int = 0,
        init: Tensor | None = None,
    ) -> None:
        super().__init__(dim, context_dim)
        self.univariate = univariate_named(univariate)
        self.declare_angles(checked_columns(self.univariate, self.event_shape, "Elementwise"))
        shape = (*self.event_shape, self.univariate.num_params)
        if init is not None and init.shape != shape:
            raise ShapeError(f"Elementwise needs init of shape {shape}, got {tuple(init.shape)}")
        self.parameters_of = Parameters(torch.zeros(shape) if init is None else init, context_dim)

    @property
    def triangular_order(self) -> tuple[int, ...]:
        return ()

    @property
    def is_affine(self) -> bool:
        return isinstance(self.univariate, AffineMap)

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.univariate.forward_and_ladj(z, self.parameters_of(context))

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.univariate.inverse_and_ladj(x, self.parameters_of(context))

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        x, log_slopes = self._forward_and_log_slopes(z, context)
        return x, self._summed(log_slopes), elementwise_score(z, log_slopes, score)


class Diagonal(Elementwise):
    r"""The diagonal layer :math:`x_j = e^{s_j} z_j`, the last layer of NICE (Dinh et al. 2015, arXiv:1410.8516, section
    3.3).

    The log-determinant is :math:`\sum_j s_j`. Both directions are parallel.

    Args:
        dim: the event size D, or the event shape.
        context_dim: size of the context that the scales depend on, 0 for none.

    Shapes: z and x are ``(..., *event_shape)``, a context is ``(..., context_dim)``.

    Example:
        >>> t = Diagonal(2)
        >>> x, ladj = t.forward_and_ladj(torch.ones(5, 2))
        >>> x.shape, ladj.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(self, dim: int | Sequence[int], context_dim: int = 0) -> None:
        # The soft clamp is for scales in deep stacks of networks.
        super().__init__(dim, Scale(None, None), context_dim)


class LeakyReLU(Elementwise):
    r"""The leaky rectifier :math:`x_j = z_j` for :math:`z_j \ge 0` and :math:`x_j = e^{s_j} z_j` for :math:`z_j < 0`,
    which has a learned, positive slope for each element.

    The log-determinant is the sum of the :math:`s_j` of negative elements. Both directions are parallel.

    Args:
        dim: the event size D, or the event shape.
        context_dim: size of the context that the slopes depend on, 0 for none.

    Shapes: z and x are ``(..., *event_shape)``, a context is ``(..., context_dim)``.

    Example:
        >>> t = pf.transforms.LeakyReLU(2)
        >>> torch.equal(t(torch.tensor([1.0, -1.0])), torch.tensor([1.0, -1.0]))  # slopes start at one
        True
    """

    def __init__(self, dim: int | Sequence[int], context_dim: int = 0) -> None:
        super().__init__(dim, univariate.LeakyReLU(None, None), context_dim)

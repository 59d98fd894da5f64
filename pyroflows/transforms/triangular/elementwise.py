"""The elementwise structure: each element has its own univariate map."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyroflows.errors import ShapeError
from pyroflows.nets import Parameters
from pyroflows.transforms.base import Pair, Triple
from pyroflows.transforms.gradients import elementwise_score
from pyroflows.transforms.triangular.base import TriangularTransform
from pyroflows.transforms.univariate import Additive, Affine, UnivariateLike, univariate_named
from pyroflows.transforms.univariate.by_column import checked_columns


class Elementwise(TriangularTransform):
    r"""The elementwise layer :math:`x_j = T(z_j; \theta_j)`, in which each element has a univariate map of its own.

    The log-determinant is :math:`\sum_j \log T'(z_j; \theta_j)`. Both directions are parallel.

    Args:
        dim: the event size D, or the event shape.
        univariate: the map T: "additive", "affine", "spline", "circular_spline", "sos", "monotone", or an instance;
            or a list of these, one for each dimension.
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
        return isinstance(self.univariate, Additive | Affine)

    def _forward_and_log_slopes(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.univariate.forward_and_ladj(z, self.parameters_of(context))

    def _inverse_and_log_slopes(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.univariate.inverse_and_ladj(x, self.parameters_of(context))

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        x, log_slopes = self._forward_and_log_slopes(z, context)
        return x, self._summed(log_slopes), elementwise_score(z, log_slopes, score)

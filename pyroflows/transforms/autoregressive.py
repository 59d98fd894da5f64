"""Autoregressive structure: the parameters of each dimension depend on those before it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError
from pyroflows.nets import MADE, ResMADE
from pyroflows.transforms.base import FlowTransform, Pair
from pyroflows.transforms.univariate import Univariate, univariate_named

Conditioner = Callable[..., nn.Module]
_CONDITIONERS: dict[str, Conditioner] = {"made": MADE, "residual": ResMADE}


class Autoregressive(FlowTransform):
    r""":math:`x_j = T(z_j; \theta_j(z_{<j}, c))`, with all :math:`\theta_j` from one masked network.

    The forward direction is parallel; the inverse fills in one dimension after the other. With the affine map, a stack
    of these layers is an inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934), and a stack of their
    inverses a masked autoregressive flow (Papamakarios et al. 2017, arXiv:1705.07057).

    Args:
        dim: the event size D.
        univariate: the map T, a name or an instance.
        order: a permutation of ``range(dim)``, the order in which dimensions see each other; ascending by default.
        conditioner: "made", "residual", or a factory called as ``factory(order, num_params, hidden_dims, context_dim)`` whose
            module maps ``(z, context)`` to ``(..., dim, num_params)`` autoregressively in that order.
        hidden_dims: widths of the conditioner's hidden layers.
        context_dim: size of the context c.

    Raises:
        OptionError: if ``order`` is no permutation, or a name is unknown.

    Example:
        >>> iaf = Autoregressive(3)          # samples in one pass
        >>> maf = Autoregressive(3).inv      # scores in one pass
        >>> z = torch.randn(5, 3)
        >>> torch.allclose(maf.inv(maf(z)), z, atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        univariate: str | Univariate = "affine",
        order: Sequence[int] | None = None,
        conditioner: str | Conditioner = "made",
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
    ) -> None:
        super().__init__(dim, context_dim)
        order = list(range(dim)) if order is None else list(order)
        if sorted(order) != list(range(dim)):
            raise OptionError(f"order must be a permutation of 0 to {dim - 1}, got {order}")
        if isinstance(conditioner, str) and conditioner not in _CONDITIONERS:
            raise OptionError(f"conditioner must be one of {sorted(_CONDITIONERS)} or a factory, got {conditioner!r}")
        factory = _CONDITIONERS[conditioner] if isinstance(conditioner, str) else conditioner
        self.order = order
        self.univariate = univariate_named(univariate)
        self.conditioner = factory(order, self.univariate.num_params, hidden_dims, context_dim)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        x, ladj = self.univariate.forward_and_ladj(z, self.conditioner(z, context))
        return x, ladj.sum(-1)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        # theta_j needs z_<j only, so the zeros that stand for later dimensions do not matter.
        columns = [torch.zeros_like(x[..., 0])] * self.dim
        total = torch.zeros_like(x[..., 0])
        for j in self.order:
            theta = self.conditioner(torch.stack(columns, -1), context)
            columns[j], ladj = self.univariate.inverse_and_ladj(x[..., j], theta[..., j, :])
            total = total + ladj
        return torch.stack(columns, -1), total

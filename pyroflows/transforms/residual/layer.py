"""The residual layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.nets.lipschitz.conv import LipschitzConv
from pyroflows.nets.lipschitz.dense import LipschitzMLP
from pyroflows.options import checked_number, kind
from pyroflows.transforms.autocast import without_autocast
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.gradients import pull_back
from pyroflows.transforms.residual.fixed_point import inverted, solved_transposed
from pyroflows.transforms.residual.log_det import Exact, LogDet, RussianRoulette
from pyroflows.transforms.views import View

_LOG_DETS: dict[str, Any] = {"exact": Exact, "roulette": RussianRoulette}


class Residual(FlowTransform):
    r"""The residual layer (Behrmann et al. 2019, arXiv:1811.00995; Chen et al. 2019, arXiv:1906.02735):

    .. math::
        x = z + g(z, c), \qquad \|g(z, c) - g(z', c)\| \le \kappa\, \|z - z'\|, \qquad
        \log\left|\det \frac{\partial x}{\partial z}\right| = \log\det(I + J)
        = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k, \qquad J = \frac{\partial g}{\partial z}

    where g is one free-form network and :math:`\kappa < 1` is the coefficient. The bound holds for all parameters,
    since each weight is rescaled to its share of :math:`\kappa`, see
    :class:`pyroflows.nets.lipschitz.network.LipschitzNet`; nothing has to be called or kept up to date. For vectors g
    is a perceptron, for arrays ``(C, ...)`` it consists of convolutions. A context c shifts the pre-activations and
    does not touch the bound. The layer starts at the identity.

    The forward direction is one pass. The inverse iterates to float precision, with gradients of the implicit
    function. Stretching and shrinking are limited to factors between :math:`1 - \kappa` and :math:`1 + \kappa` a layer.

    The log-determinant is estimated without bias by default, so that its cost does not grow with the dimension; see
    :class:`pyroflows.transforms.residual.RussianRoulette`. :meth:`exact` gives the view with the exact one, which
    costs D products with J; log-densities of flows, and all that is reported, use it. In few dimensions that is also
    the cheaper one to train with: ``log_det="exact"``.

    Args:
        dim: the event size D, or the event shape (C, H, W) or (C, L).
        hidden_dims: widths, or channels, of the hidden layers of g.
        coefficient: the bound :math:`\kappa`, between 0 and 1.
        context_dim: size of the context, 0 for none.
        activation: "sine", "tanh" or "lipswish", whose slopes are at most 1.
        log_det: "roulette", "exact", or an instance of a class of :mod:`pyroflows.transforms.residual`.

    Shapes: z and x are ``(..., *event_shape)``, a context is ``(..., context_dim)``.

    Raises:
        OptionError: if the coefficient is not between 0 and 1, or a name is unknown.
        InversionError: when it inverts, if the iteration misses, which takes a network that is no contraction.

    Example:
        >>> t = Residual(2, hidden_dims=(16, 16))
        >>> z = torch.randn(5, 2)
        >>> x, estimate = t.forward_and_ladj(z)
        >>> torch.allclose(t.inv(x), z, atol=1e-5), t.ladj_is_exact, t.exact().ladj_is_exact
        (True, False, True)
    """

    def __init__(
        self,
        dim: int | Sequence[int],
        hidden_dims: Sequence[int] = (64, 64),
        coefficient: float = 0.97,
        context_dim: int = 0,
        activation: str = "sine",
        log_det: str | LogDet = "roulette",
    ) -> None:
        super().__init__(dim, context_dim)
        self.log_det = _log_det_named(log_det)
        is_vector = len(self.event_shape) == 1
        net: Any = LipschitzMLP if is_vector else LipschitzConv
        shape = self.dim if is_vector else self.event_shape
        coefficient = checked_number("coefficient", coefficient, below=1.0)
        self.net = net(shape, hidden_dims, coefficient, self.context_shape, activation)

    @property
    def coefficient(self) -> float:
        """The bound of the slope of g."""
        return self.net.coefficient

    @property
    def ladj_is_exact(self) -> bool:
        return self.log_det.is_exact

    def _exact(self) -> FlowTransform:
        return ExactResidual(self)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._forward_by(z, context, self.log_det)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self._inverse_by(x, context, self.log_det)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return self._score_by(z, score, context, self.log_det)

    @without_autocast
    def _forward_value(self, z: Tensor, context: Tensor | None) -> Tensor:
        return z + self.net.at(context)(z)

    @without_autocast
    def _inverse_value(self, x: Tensor, context: Tensor | None) -> Tensor:
        return inverted(self.net.at(context), x, len(self.event_shape))

    @without_autocast
    def _forward_by(self, z: Tensor, context: Tensor | None, log_det: LogDet) -> Pair:
        g, num_axes = self.net.at(context), len(self.event_shape)
        if isinstance(log_det, RussianRoulette):
            value, ladj = log_det.with_value(g, z, num_axes)
            return z + value, ladj
        at = g.linearized(z)
        return z + at.value, log_det(at, num_axes)

    @without_autocast
    def _inverse_by(self, x: Tensor, context: Tensor | None, log_det: LogDet) -> Pair:
        g = self.net.at(context)
        z = inverted(g, x, len(self.event_shape))
        return z, -log_det(g.linearized(z), len(self.event_shape))

    @without_autocast
    def _score_by(self, z: Tensor, score: Tensor, context: Tensor | None, log_det: LogDet) -> Triple:
        at, num_axes = self.net.at(context).linearized(z), len(self.event_shape)
        ladj = log_det(at, num_axes)
        (by_z,) = pull_back((ladj,), (torch.ones_like(ladj),), (z,))
        with torch.no_grad():
            score = solved_transposed(at.held(), score - by_z, num_axes)
        return z + at.value, ladj, score

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, coefficient={self.coefficient}, log_det={self.log_det}"


class ExactResidual(View):
    """The view of a residual layer whose log-determinant is exact; :meth:`Residual.exact` makes it."""

    layer: Residual
    ladj_is_exact = True

    def __init__(self, layer: Residual) -> None:
        super().__init__(layer, layer.event_shape, layer.context_shape, layer.base_shape)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self.layer._forward_by(z, context, Exact())

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self.layer._inverse_by(x, context, Exact())

    def _forward_value(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self.layer._forward_value(z, context)

    def _inverse_value(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.layer._inverse_value(x, context)

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        return self.layer._score_by(z, score, context, Exact())


def _log_det_named(log_det: Any) -> Any:
    """Return the way to compute log-determinants of this name, with its default options, or what is none."""
    if isinstance(log_det, str) and log_det in _LOG_DETS:
        return _LOG_DETS[log_det]()
    if isinstance(log_det, str | type) or not hasattr(log_det, "is_exact"):
        got = repr(log_det) if isinstance(log_det, str) else kind(log_det)
        raise OptionError(f"log_det must be one of {sorted(_LOG_DETS)} or an instance, got {got}")
    return log_det

r"""Layers :math:`x_j = T(z_j; \theta_j(z_{<j}))`: the diagonal of their triangular Jacobian is its determinant."""

from torch import Tensor

from pyroflows.transforms.base import FlowTransform, Pair


class TriangularTransform(FlowTransform):
    r"""A layer with a Jacobian that is triangular in :attr:`triangular_order`.

    A subclass writes ``_forward_and_log_slopes`` and ``_inverse_and_log_slopes``, which give the logarithms of the
    diagonal; their sums are the log-determinants.

    Example:
        >>> t = Autoregressive(3, order=[2, 0, 1])
        >>> isinstance(t, TriangularTransform), t.triangular_order, t.is_affine
        (True, (2, 0, 1), True)
    """

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        x, log_slopes = self._forward_and_log_slopes(z, context)
        return x, self._summed(log_slopes)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        z, log_slopes = self._inverse_and_log_slopes(x, context)
        return z, self._summed(log_slopes)

    def _summed(self, log_slopes: Tensor) -> Tensor:
        """The sum over all axes of the event."""
        return log_slopes.sum(tuple(range(-len(self.event_shape), 0)))

"""The differential equation of a row of a continuous flow: the row itself, and what is integrated along its path."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.nets.velocity import Field


@dataclass(frozen=True)
class Equation:
    r"""The equation :math:`dy/dt = r(t, y)` of rows y, which are columns z, log-determinant, score and penalties.

    .. math::
        \frac{dz}{dt} = v, \qquad \frac{d\ell}{dt} = \operatorname{tr} J, \qquad
        \frac{ds}{dt} = -J^\top s - \nabla \operatorname{tr} J, \qquad
        \frac{dk}{dt} = |v|^2, \qquad \frac{dj}{dt} = |\epsilon^\top J|^2, \qquad J = \frac{\partial v}{\partial z}

    Args:
        field: the velocity v.
        event_shape: the shape of z.
        has_ladj: whether there is a log-determinant; the columns after it need it.
        probe: signs :math:`\epsilon` of the shape of z, by which Hutchinson's estimator has
            :math:`\epsilon^\top J \epsilon` in the place of the trace; None for the trace itself.
        has_score: whether there is a score s.
        has_kinetic_energy: whether there is an integral k.
        jacobian_probe: signs by which the integral j is estimated; None if there is none.
    """

    field: Field
    event_shape: torch.Size
    has_ladj: bool
    probe: Tensor | None = None
    has_score: bool = False
    has_kinetic_energy: bool = False
    jacobian_probe: Tensor | None = None

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors to which gradients flow."""
        return self.field.tensors

    @property
    def sizes(self) -> list[int]:
        """The numbers of columns whose errors are controlled together; those of penalties are not."""
        dim = self.event_shape.numel()
        return [dim, *([1] if self.has_ladj else []), *([dim] if self.has_score else [])]

    @property
    def num_columns(self) -> int:
        return sum(self.sizes) + self.has_kinetic_energy + (self.jacobian_probe is not None)

    def start(self, z: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the rows ``(*batch, num_columns)`` that start at places ``(*batch, *event_shape)``."""
        columns = z.flatten(-len(self.event_shape))
        parts = [columns, columns.new_zeros(*columns.shape[:-1], 1)] if self.has_ladj else [columns]
        if score is not None:
            parts.append(score.flatten(-len(self.event_shape)))
        num_missing = self.num_columns - sum(part.shape[-1] for part in parts)
        return torch.cat([*parts, columns.new_zeros(*columns.shape[:-1], num_missing)], -1)

    def rate(self, t: Tensor, rows: Tensor) -> Tensor:
        """Return the derivatives of rows at a time, a scalar."""
        dim = self.event_shape.numel()
        z = self.events(rows[..., :dim])
        if not self.has_ladj:
            return self.field(t, z).flatten(-len(self.event_shape))
        velocity, trace, product = self._parts(t, z)
        columns = [velocity.flatten(-len(self.event_shape)), trace.unsqueeze(-1)]
        if self.has_score:
            columns.append(self._rate_of_score(t, z, self.events(rows[..., dim + 1 : 2 * dim + 1])))
        if self.has_kinetic_energy:
            columns.append(columns[0].square().sum(-1, keepdim=True))
        if self.jacobian_probe is not None:
            product = self.field.with_product(t, z, self.jacobian_probe)[1] if product is None else product
            columns.append(product.flatten(-len(self.event_shape)).square().sum(-1, keepdim=True))
        return torch.cat(columns, -1)

    def _parts(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the velocity, the trace or its estimate, and the product of the probe with the Jacobian."""
        if self.probe is None:
            return *self.field.with_divergence(t, z), None
        velocity, product = self.field.with_product(t, z, self.probe)
        return velocity, (product * self.probe).flatten(-len(self.event_shape)).sum(-1), product

    def _rate_of_score(self, t: Tensor, z: Tensor, score: Tensor) -> Tensor:
        """Return the derivative of scores, which are constants to autograd."""
        with torch.enable_grad():
            held = z.detach().requires_grad_()
            velocity, trace, _ = self._parts(t, held)
            (pulled,) = torch.autograd.grad((velocity, trace), held, (score.detach(), torch.ones_like(trace)))
        return -pulled.flatten(-len(self.event_shape))

    def events(self, columns: Tensor) -> Tensor:
        """Return columns ``(*batch, D)`` in the shape of events."""
        return columns if len(self.event_shape) == 1 else columns.unflatten(-1, self.event_shape)

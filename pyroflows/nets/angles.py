"""Conditioners of angles, which see the cosine and the sine of each, so that what they compute is periodic."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.nets.constants import Constants
from pyroflows.nets.incremental import GradientSteps, ParameterSteps
from pyroflows.nets.made import MADE
from pyroflows.shapes import as_given


class AngleFeatures(Constants):
    """The features of some columns: cosines of angles and the other columns as they are, then the sines of the angles.

    Args:
        is_angle: one boolean for each index along the axis.
        axis: the axis, counted from the end.

    Shapes: it maps ``(..., A, *rest)`` to ``(..., A + number of angles, *rest)``.

    Example:
        >>> AngleFeatures([True, False], axis=-1)(torch.tensor([torch.pi, 2.0]))
        tensor([-1.0000e+00,  2.0000e+00, -8.7423e-08])
    """

    angles: Tensor

    def __init__(self, is_angle: Sequence[bool], axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.is_angle = list(is_angle)
        self.register_constants()

    def constants(self) -> dict[str, Tensor | None]:
        return {"angles": torch.tensor([i for i, answer in enumerate(self.is_angle) if answer])}

    def forward(self, z: Tensor) -> Tensor:
        if all(self.is_angle):
            return torch.cat([z.cos(), z.sin()], self.axis)
        angles = z.index_select(self.axis, self.angles)
        return torch.cat([z.index_copy(self.axis, self.angles, angles.cos()), angles.sin()], self.axis)


class OnAngles(Constants):
    r"""An autoregressive network of angles: it sees two channels, :math:`\cos z_j` and :math:`\sin z_j`, of each.

    Columns that are no angles have the channels :math:`z_j` and 0. It offers what the network in it offers of
    :class:`pyroflows.nets.Incremental` and :class:`pyroflows.nets.IncrementalGradient`.

    Args:
        factory: the factory of the network, as :class:`pyroflows.transforms.Autoregressive` takes it. One that is no
            :class:`MADE` gets ``channels=`` for twice the channels, and the parameters of the second half are dropped.
        is_angle: one boolean for each index along the last axis.
        order: a permutation of ``range(D)``; ``order[i]`` is the index at place i.
        num_params: number of parameters of each element.
        hidden_dims: widths of the hidden layers.
        context_dim: size or shape of the context, 0 for none.
        channels: the axes of an event before the ordered one.

    Shapes: ``(..., *channels, D)`` and a context give ``(..., *channels, D, num_params)``.

    Example:
        >>> net = OnAngles(MADE, [True, True, False], [0, 1, 2], 4, (16,), 0)
        >>> z = torch.randn(5, 3)
        >>> torch.allclose(net(z), net(z + torch.tensor([2 * torch.pi, 0.0, 0.0])), atol=1e-5)
        True
    """

    angular: Tensor

    def __init__(
        self,
        factory: Callable[..., nn.Module],
        is_angle: Sequence[bool],
        order: Sequence[int],
        num_params: int,
        hidden_dims: Sequence[int],
        context_dim: Any,
        channels: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.order = list(order)
        self.is_angle = list(is_angle)
        self.channels = list(channels)
        self.register_constants()
        self.gives_all_channels = not (isinstance(factory, type) and issubclass(factory, MADE))
        if self.gives_all_channels:
            doubled = torch.Size([2 * self.channels[0], *self.channels[1:]] if channels else [2])
            options: dict[str, Any] = {"channels": as_given(doubled)}
        else:
            options = {"features": 2}
        self.net = factory(order, num_params, hidden_dims, context_dim, **options)

    def constants(self) -> dict[str, Tensor | None]:
        return {"angular": torch.tensor(self.is_angle)}

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self._own(self.net(self._features(z), context), axis=-2 - max(len(self.channels), 1))

    @property
    def incremental(self) -> Callable[..., ParameterSteps] | None:
        """The method ``incremental`` of :class:`pyroflows.nets.Incremental`, None if the network has none."""
        inner = getattr(self.net, "incremental", None)
        return inner and (lambda *arguments: _AngleParameterSteps(self, inner(*arguments)))

    @property
    def with_gradient_steps(self) -> Callable[..., Any] | None:
        """The method of :class:`pyroflows.nets.IncrementalGradient`, None if the network has none."""
        inner = getattr(self.net, "with_gradient_steps", None)
        return inner and partial(self._with_gradient_steps, inner)

    def _with_gradient_steps(
        self, inner: Callable[..., Any], z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Callable[[Tensor], GradientSteps]]:
        theta, start = inner(self._features(z), context)
        rows = z.detach().reshape(-1, *self.channels, z.shape[-1]).transpose(0, -1)
        return self._own(theta, axis=-2 - max(len(self.channels), 1)), partial(_AngleGradientSteps, self, rows, start)

    def _features(self, z: Tensor) -> Tensor:
        """Return the input of the network, ``(..., 2 * channels, D)``."""
        axis = -1 - max(len(self.channels), 1)
        z = z if self.channels else z.unsqueeze(axis)
        cosine, sine = z.cos(), z.sin()
        if not all(self.is_angle):
            cosine, sine = torch.where(self.angular, cosine, z), torch.where(self.angular, sine, 0.0)
        return torch.cat([cosine, sine], axis)

    def _own(self, theta: Tensor, axis: int) -> Tensor:
        """Return the parameters that the network gave for the first half of the channels along an axis."""
        if not self.gives_all_channels:
            return theta
        return theta.narrow(axis, 0, self.channels[0]) if self.channels else theta.select(axis, 0)


class _AngleParameterSteps:
    """The steps of :class:`OnAngles`, which read an input once it is known, and hand its channels to the network."""

    def __init__(self, net: OnAngles, steps: ParameterSteps) -> None:
        self._net = net
        self._steps = steps
        shape = [len(net.order), *net.channels, steps.inputs.shape[-1]]
        self.inputs = steps.inputs.new_empty(shape)

    def parameters_at(self, i: int) -> Tensor:
        """Return the parameters ``(num_params, *channels, N)`` at place i."""
        if i > 0:
            last = self.inputs[i - 1] if self._net.channels else self.inputs[i - 1 : i]
            is_angle = self._net.is_angle[self._net.order[i - 1]]
            pair = [last.cos(), last.sin()] if is_angle else [last, torch.zeros_like(last)]
            torch.cat(pair, out=self._steps.inputs[i - 1])
        return self._net._own(self._steps.parameters_at(i), axis=1)


class _AngleGradientSteps:
    """The backward steps of :class:`OnAngles`, which lead from the gradients of cosine and sine to that of the angle.

    Args:
        net: the network.
        z: its inputs by index, ``(D, *channels, N)``.
        start: makes the backward steps of the network inside.
        inputs: the gradient of the inputs, of the shape of z, to which the steps add in place.
    """

    def __init__(self, net: OnAngles, z: Tensor, start: Callable[[Tensor], GradientSteps], inputs: Tensor) -> None:
        self._net = net
        shape = [2 * net.channels[0], *net.channels[1:]] if net.channels else [2]
        self._gradients = inputs.new_zeros(len(z), *shape, z.shape[-1])
        self._steps = start(self._gradients)
        self._inputs, self._z = inputs, z

    def pull_back(self, i: int, gradient: Tensor) -> None:
        """Add what passes through the parameters at place i, given their gradient ``(num_params, *channels, N)``."""
        if self._net.gives_all_channels:
            gradient = gradient if self._net.channels else gradient[:, None]
            gradient = torch.cat([gradient, torch.zeros_like(gradient)], 1)
        self._steps.pull_back(i, gradient)
        # The gradient of the input before place i is complete now.
        j = self._net.order[i - 1]
        cosine, sine = self._gradients[j].chunk(2)
        if not self._net.channels:
            cosine, sine = cosine[0], sine[0]
        if self._net.is_angle[j]:
            self._inputs[j].addcmul_(cosine, self._z[j].sin(), value=-1).addcmul_(sine, self._z[j].cos())
        else:
            self._inputs[j].add_(cosine)

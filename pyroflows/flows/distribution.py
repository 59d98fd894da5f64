"""The distribution that a call of a flow makes."""

import copy
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyroflows.errors import OptionError, ShapeError
from pyroflows.shapes import as_given
from pyroflows.transforms.base import FlowTransform, Pair, Triple, pull_back, state_of


class FlowDistribution(TorchDistribution):
    r"""The law of ``x = t(z)``, z from a base distribution: :math:`\log q(x) = \log p(z) + \log|\det \partial
    z/\partial x|`.

    It remembers the last sample with its log-density, so that scoring a fresh sample is free, once. The memory is
    dropped by deepcopy and pickle, and does not count once a parameter or the sample has changed.

    Args:
        base: the distribution of z, of the transform's event shape.
        transform: the map from base to data.
        context: ``(..., *context_shape)``, if the transform takes one; what stands before belongs to the batch shape.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, base: Distribution, transform: FlowTransform, context: Tensor | None = None, validate_args: Any = None
    ) -> None:
        batch_shape = base.batch_shape
        if context is not None:
            context_batch = context.shape[: context.dim() - len(transform.context_shape)]
            batch_shape = torch.broadcast_shapes(batch_shape, context_batch)
        self.base = base
        self.transform = transform
        self.context = context
        self._last: tuple[Tensor, Tensor, tuple[Any, ...]] | None = None
        super().__init__(batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        return bool(self.base.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        return self.transform.codomain

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FlowDistribution":
        # The context stays as small as it is, so that what depends on it alone is computed once for all copies.
        base = self._expanded_base().expand(batch_shape)
        return FlowDistribution(base, self.transform, self.context, self._validate_args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def estimated(self) -> "FlowDistribution":
        """The same law with the layers' own log-determinants, for training; itself where these are exact."""
        return self

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> Pair:  # noqa: B008
        """Draws ``(*sample_shape, *batch_shape, *event_shape)`` and their log-densities, in one pass."""
        return self.transport(self._expanded_base().rsample(torch.Size(sample_shape)))

    def transport(self, z: Tensor) -> Pair:
        r"""``x = t(z)`` and :math:`\log q(x)`, for draws z of the base, ``(..., *event_shape)``.

        Example:
            >>> q = pf.flows.IAF(3)()
            >>> x, log_q = q.transport(q.base.rsample((5,)))
            >>> x.shape, log_q.shape
            (torch.Size([5, 3]), torch.Size([5]))
        """
        x, ladj = self.transform.forward_and_ladj(z, self.context)
        return x, self.base.log_prob(z) - ladj

    def transport_and_score(self, z: Tensor) -> Triple:
        r"""As :meth:`transport`, and :math:`\nabla_x \log q(x)`, through which no gradients flow.

        Its cost is that of :meth:`FlowTransform.forward_and_score`: no pass through the inverse where the forward
        direction of all layers is parallel.
        """
        with torch.enable_grad():
            at = z.detach().requires_grad_()
            log_p = self.base.log_prob(at)
        (score,) = pull_back((log_p,), (torch.ones_like(log_p),), (at,))
        x, ladj, score = self.transform.forward_and_score(z, score, self.context)
        return x, self.base.log_prob(z) - ladj, score

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        x, log_q = self.rsample_and_log_prob(sample_shape)
        self._last = x, log_q, self._state_of(x)
        return x

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            z = self._expanded_base().sample(torch.Size(sample_shape))
            return self.transform.forward_and_ladj(z, self.context)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        # Once, since a second backward needs a second graph.
        last, self._last = self._last, None
        if last is not None and value is last[0] and self._state_of(value) == last[2]:
            return last[1]
        if self._validate_args:
            self._validate_sample(value)
        z, ladj = self.transform.inverse_and_ladj(value, self.context)
        return self.base.log_prob(z) + ladj

    def _expanded_base(self) -> Distribution:
        return self.base if self.base.batch_shape == self.batch_shape else self.base.expand(self.batch_shape)

    def _state_of(self, sample: Tensor) -> tuple[Any, ...]:
        """What must be the same for the remembered log-density to hold: values, and whether it has gradients."""
        return sample._version, torch.is_grad_enabled(), *state_of(self.transform)

    def latent(self, value: Tensor) -> Tensor:
        """The base value z of x."""
        return self.transform.inverse_and_ladj(value, self.context)[0]


class DistributionModule(nn.Module):
    """A distribution whose tensors are buffers of a module (parameters stay parameters): they move and cast with it.

    Args:
        distribution: any torch or Pyro distribution.

    A call returns the distribution, made of the tensors as they are now.

    Raises:
        OptionError: if a tensor is computed from parameters.
    """

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self._template = distribution
        for name, value in vars(distribution).items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor) and value.requires_grad:
                raise OptionError(
                    f"{name} of the base {type(distribution).__name__} is computed from parameters, which would not be "
                    "found: give as base a module whose call returns the distribution"
                )
            elif isinstance(value, Tensor):
                self.register_buffer(name, value.detach().clone())
            elif isinstance(value, Distribution):
                self.add_module(name, DistributionModule(value))

    def forward(self) -> Distribution:
        # A shallow copy with today's tensors: its constructor would validate them again at every call.
        distribution = copy.copy(self._template)
        distribution._validate_args = distribution._validate_args and is_validation_enabled()
        vars(distribution).update(self._parameters)
        vars(distribution).update(self._buffers)
        vars(distribution).update({name: module() for name, module in self._modules.items() if module is not None})
        return distribution


def checked_event(base: Distribution, event_shape: torch.Size) -> Distribution:
    """The base, if it is one of events of that shape."""
    if base.event_shape != event_shape:
        raise ShapeError(
            f"the base of a flow of {as_given(event_shape)} dimensions must have event shape {tuple(event_shape)}, but "
            f"has batch shape {tuple(base.batch_shape)} and event shape {tuple(base.event_shape)}: use "
            f".expand({list(event_shape)}).to_event({len(event_shape)})"
        )
    return base

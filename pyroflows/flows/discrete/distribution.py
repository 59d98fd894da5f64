"""The distribution that a call of a flow of discrete layers returns."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyroflows.arrays import floating_tensor
from pyroflows.constraints import without_events
from pyroflows.errors import InexactError, OptionError, ShapeError
from pyroflows.flows.discrete.checks import validate_event
from pyroflows.flows.discrete.scoring import as_taken_by, log_prob_of, one_hot_log_prob
from pyroflows.flows.distribution import FlowDistribution
from pyroflows.shapes import described
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.codomain import is_met
from pyroflows.transforms.discrete.base import as_one_hot
from pyroflows.transforms.discrete.stacks import num_categories_of, one_hot_value

# A support with more sequences than this is not enumerated.
MAX_SUPPORT = 2**20


class DiscreteFlowDistribution(FlowDistribution):
    r"""The law of :math:`x = t(z)` of sequences of categories, where z follows a base distribution p:

    .. math:: q(x) = p(t^{-1}(x)).

    Log-probabilities are exact. Their gradients with respect to parameters of layers go straight through the layers,
    see :mod:`pyroflows.transforms.discrete.maps`; those of the base are derivatives. Draws carry no gradients.

    If the support has at most a million sequences, it can be enumerated, as Pyro's ``TraceEnum_ELBO`` does.

    Where values are not validated, the log-probability of a value that is no sequence of categories is -inf.

    Args:
        base: the distribution of z, of event shape ``(length,)``; or a module whose call returns it.
        transform: the discrete layers, composed.
        context: ``(..., *context_shape)``, if the transform takes one; its leading axes belong to the batch shape.
        validate_args: whether values are checked; None for the setting of Pyro.

    Shapes: draws are integers ``(*sample_shape, *batch_shape, length)``, or one-hot vectors with a last axis of K.

    Raises:
        DataError: when it scores a value that is no sequence of categories, if values are validated.

    Example:
        >>> q = pf.flows.DiscreteCoupling(3, num_categories=4, context_dim=2)(torch.zeros(5, 2))
        >>> x = q.sample((7,))
        >>> x.shape, x.dtype, q.log_prob(x).shape
        (torch.Size([7, 5, 3]), torch.int64, torch.Size([7, 5]))
    """

    has_enumerate_support = True

    @property
    def num_categories(self) -> int:
        """The number of categories K."""
        return num_categories_of(self.transform)

    @property
    def has_rsample(self) -> bool:
        return False

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Raise, since draws of categories carry no gradients."""
        raise NotImplementedError("draws of categories carry no gradients: use sample")

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> Pair:  # noqa: B008
        """Return draws, without gradients, and their log-probabilities, whose gradients reach all layers."""
        x = self.sample(sample_shape)
        return x, self.log_prob(x)

    def _transport(self, transform: FlowTransform, base: Distribution, z: Tensor) -> Pair:
        x, log_q = super()._transport(transform, base, as_taken_by(base, z))
        return x.long() if len(self.event_shape) == 1 else x, log_q

    def transport_and_score(self, z: Tensor) -> Triple:
        """Raise, since categories have no density whose gradient could be the score."""
        raise InexactError("the law of categories has no density, and so no score")

    def sample(self, sample_shape: Any = torch.Size(), temperature: float = 1.0) -> Tensor:  # noqa: B008
        """Return draws ``(*sample_shape, *batch_shape, *event_shape)``.

        Args:
            sample_shape: the shape of the sample.
            temperature: 1, since categories have no other.

        Raises:
            OptionError: if the temperature is not 1.
        """
        if temperature != 1:
            raise OptionError("draws of categories have no temperature, which would scale a normal base: leave it out")
        transform, base = self._bound()
        with torch.no_grad():
            shape = torch.Size(sample_shape)
            if 0 in shape + self.batch_shape:  # Torch cannot draw no categories.
                z = self._like.new_zeros(shape + self.batch_shape + transform.base_shape)
            else:
                z = self._expanded(base).sample(shape)
            return transform._data_value(z.long(), self.context)

    def log_prob(self, value: Tensor) -> Tensor:
        # What is the same for all copies that the distribution was expanded to is computed once.
        transform, base = self._unexpanded()
        value = self._as_tensor(value)
        if self._validate_args:
            self._validate_sample(value)
        num_axes = len(self.event_shape)
        if value.shape[max(value.dim() - num_axes, 0) :] != self.event_shape:
            raise ShapeError(
                f"this flow has events of {described(self.event_shape)}, but got a tensor of shape {tuple(value.shape)}"
            )
        batch_shape = torch.broadcast_shapes(value.shape[: value.dim() - num_axes], self.batch_shape)
        if not value.numel() or 0 in self.batch_shape:  # Torch cannot form the sums of no rows.
            return self._like.new_zeros(batch_shape)
        value, is_in = self._inside(value)
        if torch.is_grad_enabled():
            dtype = self._like.dtype
            one_hot = value.to(dtype) if num_axes > 1 else as_one_hot(value, self.num_categories, dtype)
            log_prob = self.one_hot_log_prob(one_hot)
        else:
            # Integers are cheaper, since they leave out all that is only there for gradients.
            log_prob = log_prob_of(base, transform.base_value(value, self.context).long())
        return torch.where(is_in, log_prob, -torch.inf).expand(batch_shape)

    def one_hot_log_prob(self, value: Tensor) -> Tensor:
        """Return log-probabilities of one-hot vectors ``(..., length, K)``, with gradients straight through.

        Flows of which this one is the base ask for it.
        """
        transform, base = self._unexpanded()
        batch_shape = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        return one_hot_log_prob(base, one_hot_value(transform, value, self.context, "inverse")).expand(batch_shape)

    def latent(self, value: Tensor) -> Tensor:
        """Return the base value z of x, ``(..., length)``; -1 at all places where x is no sequence of categories.

        Args:
            value: x, ``(..., *event_shape)``.
        """
        value = self._as_tensor(value)
        if self._validate_args:
            self._validate_sample(value)
        value, is_in = self._inside(value)
        return torch.where(is_in[..., None], self.transform.base_value(value, self.context).long(), -1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all sequences, ``(K ** length, *batch_shape, *event_shape)``.

        Args:
            expand: whether the batch shape is that of the distribution, or ones.

        Raises:
            OptionError: if there are more than a million.
        """
        size, length = self.num_categories, self.event_shape[0]
        if size**length > MAX_SUPPORT:
            raise OptionError(
                f"{length} places with {size} categories have {size**length} values, which are too many to enumerate: "
                "at most 2**20"
            )
        categories = torch.arange(size, device=self._like.device)
        values = torch.cartesian_prod(*[categories] * length).reshape(-1, *[1] * len(self.batch_shape), length)
        if len(self.event_shape) > 1:
            values = as_one_hot(values, size, self._like.dtype)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values

    def _validate_sample(self, value: Tensor) -> None:
        validate_event(super()._validate_sample, value, self.event_shape, self.num_categories)

    def _unexpanded(self) -> tuple[FlowTransform, Distribution]:
        """Return transform and base with the tensors that are bound, the base with a batch shape of its own."""
        return self._changed(_expanded_to=None)._bound()

    def _as_tensor(self, value: Any) -> Tensor:
        # Floating-point numbers of few digits, such as those of bfloat16, would round integers.
        if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
            return value.to(self._like.device, torch.long)
        return super()._as_tensor(value)

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype and device of the layers."""
        like: Any = floating_tensor(self.transform)
        return like

    def _inside(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return a value with zeros in place of what is no sequence of categories, and where it is one."""
        num_axes = len(self.event_shape)
        is_in = is_met(without_events(self.support), value, num_axes)
        return torch.where(is_in[(..., *[None] * num_axes)], value, 0), is_in

"""The distribution that a call of a mixture of flows returns."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyroflows.arrays import as_tensor
from pyroflows.compiling.eager import is_under_func, runs_in_python
from pyroflows.flows.discrete.checks import validate_event
from pyroflows.flows.law import refuse_moments, shapes_of_law
from pyroflows.flows.temperature import sample_at
from pyroflows.flows.union import union_of


class MixtureDistribution(TorchDistribution):
    """The law of a mixture of laws, whose draws carry no gradients. A :class:`Mixture` returns it.

    Log-densities are exact, and so are their gradients; :meth:`estimated` returns this law itself, since the logarithm
    of a sum of unbiased estimates would be biased.

    Args:
        components: laws of one event shape, whose log-densities are -inf outside their supports.
        log_weights: a function that returns the logarithms of their weights ``(*batch_shape, K)``, which sum to one.
        batch_shape: the batch shape of the weights; that of the law is broadcast from it and those of the components.
        validate_args: whether values are checked; None for the setting of Pyro.

    Shapes: draws are ``(*sample_shape, *batch_shape, *event_shape)``; log-densities lack the event shape.

    Example:
        >>> parts = [pf.flows.Gaussian(2)(), pf.flows.Gaussian(2)()]
        >>> MixtureDistribution(parts, lambda: torch.tensor([0.5, 0.5]).log()).sample((5,)).shape
        torch.Size([5, 2])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False
    is_exact = True
    mean = variance = property(refuse_moments)
    __repr__ = shapes_of_law

    def __init__(
        self,
        components: Sequence[Any],
        log_weights: Callable[[], Tensor],
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
        validate_args: bool | None = None,
    ) -> None:
        self.components = list(components)
        self.log_weights = log_weights
        # The batch shape before any expansion.
        self._own_shape = torch.broadcast_shapes(batch_shape, *(law.batch_shape for law in self.components))
        super().__init__(self._own_shape, self.components[0].event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The union of the supports of the components."""
        return union_of([law.support for law in self.components], self.event_shape)

    @property
    def has_enumerate_support(self) -> bool:
        """Whether the components are laws of categories."""
        return all(law.has_enumerate_support for law in self.components)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all sequences of categories, ``(S, *batch_shape, *event_shape)``, if the components have such laws.

        Args:
            expand: whether the batch shape is that of the mixture, or ones.
        """
        values: Tensor = self.components[0].enumerate_support(expand=False)
        values = values.reshape(-1, *[1] * len(self.batch_shape), *self.event_shape)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values

    def estimated(self) -> "MixtureDistribution":
        """Return this law: its log-densities are exact in training too."""
        return self

    @property
    def num_categories(self) -> int:
        """The number of categories, if the components are laws of categories."""
        return self.components[0].num_categories

    def _validate_sample(self, value: Tensor) -> None:
        if self.has_enumerate_support:
            validate_event(super()._validate_sample, value, self.event_shape, self.num_categories)
        else:
            super()._validate_sample(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MixtureDistribution":
        law = self._get_checked_instance(MixtureDistribution, _instance)
        law.components, law.log_weights, law._own_shape = self.components, self.log_weights, self._own_shape
        batch_shape = torch.broadcast_shapes(torch.Size(batch_shape), self.batch_shape)
        TorchDistribution.__init__(law, batch_shape, self.event_shape, validate_args=False)
        law._validate_args = self._validate_args
        return law

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size(), temperature: float = 1.0) -> Tensor:  # noqa: B008
        """Return draws ``(*sample_shape, *batch_shape, *event_shape)`` without gradients.

        Args:
            sample_shape: the shape of the sample.
            temperature: the temperature at which each component draws, see :meth:`FlowDistribution.sample`; the weights
                stay as they are.

        Raises:
            OptionError: if a component cannot draw at this temperature.
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        # Axes that an expansion added are further draws from the same laws.
        is_own = self.batch_shape[len(self.batch_shape) - len(self._own_shape) :] == self._own_shape
        own = self._own_shape if is_own else self.batch_shape
        count = shape[: len(shape) - len(own)].numel()
        log_weights = self.log_weights().expand(count, *own, len(self.components))
        # The largest of the log weights with Gumbel noise is each with the probability of its weight.
        which = (log_weights - torch.log(-torch.log(torch.rand_like(log_weights)))).argmax(-1)
        x = log_weights.new_zeros(count, *own, *self.event_shape)
        for k, law in enumerate(self.components):
            x = self._filled(x, which == k, law.expand(own), temperature)
        if self.has_enumerate_support and len(self.event_shape) == 1:
            x = x.long()
        return x.reshape(shape + self.event_shape)

    def _filled(self, x: Tensor, is_here: Tensor, law: Any, temperature: float) -> Tensor:
        """Return x ``(n, *batch, *event_shape)`` with draws from a law ``(*batch)`` at the places of a mask.

        Each cell of the batch takes as many draws in turn as it needs, and all cells draw as many as the neediest.
        """
        order = is_here.cumsum(0)
        num_draws = int(order.amax()) if runs_in_python() and order.numel() else len(x)
        if not num_draws:
            return x
        draws = sample_at(law, torch.Size([num_draws]), temperature)
        is_here, index = (t[(..., *[None] * len(self.event_shape))] for t in (is_here, (order - 1).clamp_min(0)))
        return torch.where(is_here, draws.gather(0, index.expand_as(x)), x)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Raise, since draws of a mixture carry no gradients."""
        raise NotImplementedError("draws of a mixture carry no gradients: use sample")

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Return draws without gradients, and their log-densities."""
        return self.transport(self.sample(sample_shape))

    def transport(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return draws themselves, as the mixture is its own base, and their log-densities."""
        return z, self._log_prob(z, self.log_weights())

    def latent(self, value: Tensor) -> Tensor:
        """Return the value itself, as the mixture is its own base."""
        return as_tensor("the value", value, self.log_weights())

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-densities ``(...)`` of values ``(..., *event_shape)``."""
        log_weights = self.log_weights()
        value = as_tensor("the value", value, log_weights)
        if self._validate_args and value.numel() and not is_under_func():
            self._validate_sample(value)
        return self._log_prob(value, log_weights)

    def _log_prob(self, value: Tensor, log_weights: Tensor) -> Tensor:
        parts = torch.broadcast_tensors(*(law.log_prob(value) for law in self.components))
        log_prob = _log_sum_exp(torch.stack(parts, -1) + log_weights)
        num_axes = value.dim() - len(self.event_shape)
        return log_prob.expand(torch.broadcast_shapes(value.shape[:num_axes], self.batch_shape))


def _log_sum_exp(terms: Tensor) -> Tensor:
    """Return the log of the sum of exponentials over the last axis, whose gradient is zero where all terms are -inf."""
    is_empty = (terms == -torch.inf).all(-1)
    return torch.where(is_empty, -torch.inf, terms.masked_fill(is_empty[..., None], 0.0).logsumexp(-1))

"""Base distributions of sequences of categories."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.arrays import ArrayLike
from pyroflows.errors import OptionError, ShapeError
from pyroflows.flows.base import checked_context
from pyroflows.flows.law import shapes_of_law
from pyroflows.nets.categories import OnCategories
from pyroflows.nets.checks import ConditionerFactory
from pyroflows.nets.mlp import MLP
from pyroflows.options import checked_int
from pyroflows.shapes import as_given, described, shape_of
from pyroflows.transforms.binding import Binding, Places
from pyroflows.transforms.discrete.autoregressive import checked_order, conditioner_named
from pyroflows.transforms.discrete.base import as_one_hot, require_categories
from pyroflows.transforms.discrete.maps import balanced, seen_by_network, straight_through
from pyroflows.transforms.held import is_validated

# Logits are this factor times the parameters, so that they learn at the speed of a network's.
LOGIT_SCALE = 10.0


class CategoricalBase(nn.Module):
    """The base class of laws of sequences of categories that are learned, and may depend on a context.

    A call returns the law, at a context ``(..., *context_shape)`` if it takes one. It validates values as Pyro is set.

    Args:
        context_dim: size or shape of the context, 0 for none.

    Raises:
        OptionError: if a size is not positive.
        ShapeError: at a call, if the context has another shape, or is missing.
        DataError: at a call, if the context has NaN or infinite values, where values are validated.
    """

    # That of a law without a context.
    batch_shape = torch.Size()

    def __init__(self, context_dim: int | Sequence[int] = 0) -> None:
        super().__init__()
        self.context_shape = shape_of(context_dim) if context_dim else torch.Size()
        if min(self.context_shape, default=1) < 1:
            raise OptionError(f"{type(self).__name__} needs context_dim >= 0, got {context_dim}")

    @property
    def context_dim(self) -> int:
        """The number of elements of a context, 0 for none."""
        return self.context_shape.numel() if self.context_shape else 0

    def _law(self, context: Tensor | None) -> Any:
        """Return the law at a context that was checked, or None."""
        raise NotImplementedError

    def forward(self, context: ArrayLike | None = None) -> Any:
        return self._law(checked_context(context, self, type(self).__name__))


class FactorizedCategorical(CategoricalBase):
    """Independent categories at all places of a sequence, whose logits are learned and start at zero.

    Args:
        length: number of places of a sequence.
        num_categories: number of categories K, at least 2.
        context_dim: size or shape of the context, 0 for none. With one, a network of it is added to the logits.
        hidden_dims: widths of the hidden layers of that network.

    Shapes: a draw is a sequence ``(length,)``; a context ``(..., *context_shape)`` gives batch shape ``(...)``.

    Example:
        >>> FactorizedCategorical(3, 5)().log_prob(torch.tensor([0, 4, 2])).exp()  # 1 / 125
        tensor(0.0080, grad_fn=<ExpBackward0>)
        >>> FactorizedCategorical(3, 5, context_dim=2)(torch.zeros(7, 2)).sample().shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        length: int,
        num_categories: int,
        context_dim: int | Sequence[int] = 0,
        hidden_dims: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__(context_dim)
        shape = checked_int("length", length), checked_int("num_categories", num_categories, least=2)
        self.scaled_logits = nn.Parameter(torch.zeros(shape))
        self.net = MLP(self.context_dim, self.scaled_logits.numel(), hidden_dims) if self.context_dim else None

    def _law(self, context: Tensor | None) -> dist.TorchDistribution:
        logits = LOGIT_SCALE * self.scaled_logits
        if self.net is not None and context is not None:
            logits = logits + self.net(context.flatten(-len(self.context_shape))).unflatten(-1, logits.shape)
        law: Any = dist.Categorical(logits=logits, validate_args=False).to_event(1)
        # Values are validated, but not the logits, so that it is the loss that shows a fit which diverges.
        law._validate_args = law.base_dist._validate_args = is_validated()
        return law


class AutoregressiveCategorical(CategoricalBase):
    r"""Categories :math:`z_j`, each drawn given those before it, :math:`p(z) = \prod_j p(z_j \mid z_{<j})`, with logits
    from one network.

    Args:
        length: number of places of a sequence.
        num_categories: number of categories K, at least 2.
        order: a permutation of ``range(length)``; ``order[i]`` is the index at place i. None for ascending order.
        conditioner: "made", "residual", "causal_conv" or a factory, as of
            :class:`pyroflows.transforms.DiscreteAutoregressive`.
        hidden_dims: widths of the network's hidden layers.
        embedding_dim: size of the vectors, learned, as which the network sees categories; None for one-hot vectors.
        context_dim: size of the context, 0 for none; with "causal_conv" or a factory also ``(context_channels,
            length)``.

    Shapes: a draw is a sequence ``(length,)``; a context ``(..., *context_shape)`` gives batch shape ``(...)``.

    Raises:
        OptionError: if ``order`` is not a permutation, a name is unknown, a size is not positive, or the conditioner
            takes no context of this shape or has dropout.

    Example:
        >>> base = AutoregressiveCategorical(3, 5)
        >>> base().sample((7,)).shape, base().log_prob(torch.tensor([0, 4, 2])).shape
        (torch.Size([7, 3]), torch.Size([]))
        >>> AutoregressiveCategorical(3, 5, context_dim=2)(torch.zeros(7, 2)).sample().shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        length: int,
        num_categories: int,
        order: Sequence[int] | None = None,
        conditioner: str | ConditionerFactory = "made",
        hidden_dims: Sequence[int] = (64, 64),
        embedding_dim: int | None = None,
        context_dim: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(context_dim)
        length, size = checked_int("length", length), checked_int("num_categories", num_categories, least=2)
        order = checked_order(order, length, type(self).__name__)
        factory = conditioner_named(conditioner, self.context_shape, type(self).__name__)
        self.net = OnCategories(factory, order, size, size, hidden_dims, as_given(self.context_shape), embedding_dim)

    def _law(self, context: Tensor | None) -> "AutoregressiveLaw":
        return AutoregressiveLaw.of(self.net, context, self.context_shape)


class AutoregressiveLaw(dist.TorchDistribution):
    """The law that a call of :class:`AutoregressiveCategorical` or :class:`GroupwiseCategorical` returns.

    It is the law of the parameters that the network holds when it is made, as those of flows are. Where values are not
    validated, the log-probability of one that is no sequence of categories is -inf.

    Args:
        binding: the network of the logits, an :class:`OnCategories` or :class:`GroupwiseConv`, with its tensors.
        context: ``(..., *context_shape)``, or None.
        batch_shape: the batch shape of the context.
        validate_args: whether values are checked; None for the setting of Pyro.

    Raises:
        ShapeError: if a value has another length, or the law cannot be expanded to a shape.
        DataError: when it scores a value that is no category, if values are validated.

    Example:
        >>> AutoregressiveCategorical(3, 5)().log_prob(torch.tensor([0, 5, 2]))
        Traceback (most recent call last):
        pyroflows.errors.DataError: a law of categories takes categories 0 to 4, but got 5 at [1]: ...
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    __repr__ = shapes_of_law

    def __init__(
        self,
        binding: Binding,
        context: Tensor | None = None,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
        validate_args: bool | None = None,
    ) -> None:
        self._binding = binding
        self.context = context
        # The batch shape before any expansion.
        self._own_shape = batch_shape
        super().__init__(batch_shape, torch.Size([len(self.net.order)]), validate_args=validate_args)

    @classmethod
    def of(cls, net: nn.Module, context: Tensor | None, context_shape: torch.Size) -> "AutoregressiveLaw":
        """Return the law of the parameters that a network holds now, at a context of this shape or None."""
        batch_shape = torch.Size() if context is None else context.shape[: context.dim() - len(context_shape)]
        return cls(Binding(Places(net)), context, batch_shape, is_validated())

    @property
    def net(self) -> Any:
        """The network of the logits, with the tensors that are bound."""
        return self._binding.modules[0]

    def __getstate__(self) -> dict[str, Any]:
        # The network goes along with the tensors that are bound, whatever it holds now.
        return {**self.__dict__, "_binding": self.net}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _binding=Binding(Places(state["_binding"])))

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.net.num_categories - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "AutoregressiveLaw":
        batch_shape = torch.Size(batch_shape)
        num_new = len(batch_shape) - len(self.batch_shape)
        if num_new < 0 or any(a not in (1, b) for a, b in zip(self.batch_shape, batch_shape[num_new:], strict=True)):
            raise ShapeError(f"a law of batch shape {tuple(self.batch_shape)} cannot expand to {tuple(batch_shape)}")
        # The context stays as small as it is, so that what depends on it alone is computed once for all copies.
        expanded = object.__new__(AutoregressiveLaw)
        expanded.__dict__.update(self.__dict__, _batch_shape=batch_shape)
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        if value.shape[-1:] != self.event_shape:
            raise ShapeError(
                f"this law has events of {described(self.event_shape)}, but got a tensor of shape {tuple(value.shape)}"
            )
        if self._validate_args:
            require_categories(value, self.net.num_categories, "a law of categories")
        batch_shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        like = next(self.net.parameters())
        if 0 in batch_shape:
            return like.new_zeros(batch_shape)
        log_prob = self.one_hot_log_prob(as_one_hot(value, self.net.num_categories, like.dtype))
        return torch.where(self.support.check(value), log_prob, -torch.inf).expand(batch_shape)

    def one_hot_log_prob(self, value: Tensor) -> Tensor:
        """Return log-probabilities of one-hot vectors ``(..., length, K)``, with gradients, before any expansion."""
        if self._own_shape:
            value = value.expand(*torch.broadcast_shapes(value.shape[:-2], self._own_shape), -1, -1)
        table = self.net(seen_by_network(value), self.context).log_softmax(-1)
        log_prob = (value.detach() * table).sum((-1, -2))
        return log_prob + straight_through((value * balanced(table.detach())).sum((-1, -2)))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape, net = self._extended_shape(torch.Size(sample_shape)), self.net
        like = next(net.parameters())
        uniform = torch.rand(shape, dtype=like.dtype, device=like.device)
        if not uniform.numel():
            return uniform.long()
        context = self.context
        if context is not None:
            context_shape = context.shape[len(self._own_shape) :]
            context = context.expand(*shape[:-1], *context_shape).reshape(-1, *context_shape)
        return net.by_place(uniform.reshape(-1, shape[-1]), context, _at_uniform).reshape(shape)


def _at_uniform(uniform: Tensor, logits: Tensor) -> Tensor:
    """Return the categories at which distribution functions pass uniform numbers."""
    below = logits.softmax(-1).cumsum(-1)[..., :-1] <= uniform[..., None]
    return below.sum(-1)

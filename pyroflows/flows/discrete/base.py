"""Base distributions of sequences of categories."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

from pyroflows.flows.law import shapes_of_law
from pyroflows.nets.categories import OnCategories
from pyroflows.nets.checks import ConditionerFactory, checked_conditioner
from pyroflows.options import checked_int
from pyroflows.transforms.discrete.autoregressive import checked_order, conditioner_named
from pyroflows.transforms.discrete.base import as_one_hot
from pyroflows.transforms.discrete.maps import balanced, seen_by_network, straight_through

# Logits are this factor times the parameters, so that they learn at the speed of a network's.
LOGIT_SCALE = 10.0


class FactorizedCategorical(nn.Module):
    """Independent categories at all places of a sequence, whose logits are learned and start at zero.

    Args:
        length: number of places of a sequence.
        num_categories: number of categories K, at least 2.

    Shapes: a draw is a sequence ``(length,)``.

    Example:
        >>> FactorizedCategorical(3, 5)().log_prob(torch.tensor([0, 4, 2])).exp()  # 1 / 125
        tensor(0.0080, grad_fn=<ExpBackward0>)
    """

    def __init__(self, length: int, num_categories: int) -> None:
        super().__init__()
        shape = checked_int("length", length), checked_int("num_categories", num_categories, least=2)
        self.scaled_logits = nn.Parameter(torch.zeros(shape))

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of the distribution."""
        return torch.Size()

    def forward(self) -> dist.TorchDistribution:
        return dist.Categorical(logits=LOGIT_SCALE * self.scaled_logits, validate_args=False).to_event(1)


class AutoregressiveCategorical(nn.Module):
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

    Shapes: a draw is a sequence ``(length,)``.

    Example:
        >>> base = AutoregressiveCategorical(3, 5)
        >>> base().sample((7,)).shape, base().log_prob(torch.tensor([0, 4, 2])).shape
        (torch.Size([7, 3]), torch.Size([]))
    """

    def __init__(
        self,
        length: int,
        num_categories: int,
        order: Sequence[int] | None = None,
        conditioner: str | ConditionerFactory = "made",
        hidden_dims: Sequence[int] = (64, 64),
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        length, size = checked_int("length", length), checked_int("num_categories", num_categories, least=2)
        order = checked_order(order, length, type(self).__name__)
        factory = conditioner_named(conditioner)
        net = OnCategories(factory, order, size, size, hidden_dims, embedding_dim=embedding_dim)
        self.net = checked_conditioner(net)

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of the distribution."""
        return torch.Size()

    def forward(self) -> "AutoregressiveLaw":
        return AutoregressiveLaw(self.net)


class AutoregressiveLaw(dist.TorchDistribution):
    """The distribution that a call of :class:`AutoregressiveCategorical` returns.

    Args:
        net: the network of the logits.
        batch_shape: the shape of independent sequences.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    __repr__ = shapes_of_law

    def __init__(self, net: Any, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        self.net = net
        super().__init__(batch_shape, torch.Size([len(net.order)]), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.integer_interval(0, self.net.num_categories - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "AutoregressiveLaw":
        return AutoregressiveLaw(self.net, torch.Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        batch_shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        one_hot = as_one_hot(value, self.net.num_categories, next(self.net.parameters()).dtype)
        log_prob = self.one_hot_log_prob(one_hot.expand(*batch_shape, -1, -1))
        return torch.where(self.support.check(value), log_prob, -torch.inf)

    def one_hot_log_prob(self, value: Tensor) -> Tensor:
        """Return log-probabilities of one-hot vectors ``(..., length, K)``, with gradients."""
        table = self.net(seen_by_network(value)).log_softmax(-1)
        log_prob = (value.detach() * table).sum((-1, -2))
        return log_prob + straight_through((value * balanced(table.detach())).sum((-1, -2)))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(torch.Size(sample_shape))
        like = next(self.net.parameters())
        uniform = torch.rand(shape, dtype=like.dtype, device=like.device)
        return self.net.by_place(uniform.reshape(-1, shape[-1]), None, _at_uniform).reshape(shape)


def _at_uniform(uniform: Tensor, logits: Tensor) -> Tensor:
    """Return the categories at which distribution functions pass uniform numbers."""
    below = logits.softmax(-1).cumsum(-1)[..., :-1] <= uniform[..., None]
    return below.sum(-1)

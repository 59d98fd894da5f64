"""Log-probabilities of sequences of categories under a base distribution, with gradients for layers."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent

from pyroflows.flows.temperature import innermost
from pyroflows.transforms.discrete.maps import balanced, straight_through


def log_prob_of(law: Any, categories: Tensor) -> Tensor:
    """Return the log-probabilities of whole numbers ``(..., length)`` under any distribution of them.

    Example:
        >>> log_prob_of(dist.Bernoulli(torch.full((3,), 0.5)).to_event(1), torch.tensor([0, 1, 1])).exp()
        tensor(0.1250)
    """
    log_prob: Tensor = law.log_prob(as_taken_by(law, categories))
    return log_prob


def as_taken_by(law: Any, categories: Tensor) -> Tensor:
    """Return whole numbers in the dtype that a distribution of them takes.

    Example:
        >>> as_taken_by(dist.Bernoulli(0.5), torch.tensor([0, 1]))
        tensor([0., 1.])
    """
    # Torch's Bernoulli variables are the only ones that do not take integers.
    inner = innermost(law)
    return categories.to(inner.logits) if isinstance(inner, Bernoulli) else categories.long()


def one_hot_log_prob(law: Any, value: Tensor) -> Tensor:
    r"""Return log-probabilities of one-hot vectors, whose gradient says what another category at a place would give.

    The gradient with respect to entry k at place j is :math:`\log p(z_1, \dots, z_j = k, \dots)`. For independent
    places that is the derivative, up to a constant (:func:`pyroflows.transforms.discrete.maps.balanced`). Laws of this
    library know their own. For others the law is evaluated once for each place and category, unless its places are
    independent.

    Args:
        law: a distribution of sequences of categories, of event shape ``(length,)``.
        value: one-hot vectors ``(..., length, K)``.

    Example:
        >>> law = dist.Categorical(logits=torch.zeros(2, 4)).to_event(1)
        >>> one_hot_log_prob(law, torch.eye(4)[torch.tensor([1, 3])]).exp()  # 1 / 16
        tensor(0.0625)
    """
    if hasattr(law, "one_hot_log_prob"):
        known: Tensor = law.one_hot_log_prob(value)
        return known
    categories = value.argmax(-1)
    log_prob = log_prob_of(law, categories)
    if not value.requires_grad:
        return log_prob
    with torch.no_grad():
        table = _independent_table(law, value) if _is_independent(law) else _table(law, categories, value.shape[-1])
    # Of a category without probability the gradient is finite.
    table = table - table.amax(-1, keepdim=True).clamp(min=torch.finfo(table.dtype).min)
    table = table.clamp(min=math.log(torch.finfo(table.dtype).tiny))
    return log_prob + straight_through((value * balanced(table)).sum((-1, -2)))


def _is_independent(law: Any) -> bool:
    return isinstance(law, Independent) and law.reinterpreted_batch_ndims == 1


def _independent_table(law: Any, value: Tensor) -> Tensor:
    """Return the log-probabilities of all categories at each place, ``(..., length, K)``."""
    categories = torch.arange(value.shape[-1], device=value.device)
    places = law.base_dist.batch_shape
    table = log_prob_of(law.base_dist, categories.reshape(-1, *[1] * len(places)).expand(-1, *places))
    return table.movedim(0, -1)


def _table(law: Any, categories: Tensor, size: int) -> Tensor:
    """Return the log-probabilities of sequences with another category at one place, ``(..., length, K)``."""
    length = categories.shape[-1]
    is_place = torch.eye(length, dtype=torch.bool, device=categories.device)
    columns = []
    for k in range(size):
        changed = torch.where(is_place, k, categories[..., None, :])  # (..., length, length)
        columns.append(log_prob_of(law, changed.movedim(-2, 0)).movedim(0, -1))
    return torch.stack(columns, -1)

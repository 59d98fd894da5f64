"""Conditional and marginal laws of subvectors, which flows of one order have in closed form."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, constraints

from pyroflows.arrays import as_tensor, require_finite
from pyroflows.compiling.eager import runs_in_python
from pyroflows.constraints import of_columns
from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.flows.discrete.refusal import require_real
from pyroflows.flows.distribution import FlowDistribution
from pyroflows.flows.law import shapes_of_law
from pyroflows.transforms.codomain import is_inside, is_unbounded, moved_inside
from pyroflows.transforms.foreign import Foreign
from pyroflows.transforms.held import is_validated
from pyroflows.transforms.triangular.chain import (
    flattened,
    forward_and_log_slopes,
    inverse_and_log_slopes,
    orders_of,
)


class SubvectorDistribution(TorchDistribution):
    r"""The law of a subvector, some columns of x, given the columns before them and without those after them.

    If all layers of a flow are triangular in one order, and the base has independent dimensions, then :math:`z_j`
    depends on :math:`x_{\le j}` alone, and the law of the columns B that follow the given columns A in that order is

    .. math:: \log q(x_B \mid x_A) = \sum_{j \in B} \log p(z_j) + \log \frac{\partial z_j}{\partial x_j}.

    :meth:`pyroflows.Flow.conditional` and :meth:`pyroflows.Flow.marginal` make it.

    Args:
        law: the law of x, of event shape ``(dim,)``, that a call of such a flow returned.
        columns: the columns of the subvector.
        given_columns: the columns before it, which together with those of the subvector are the first of the order.
        given: their values ``(..., len(given_columns))``.

    Shapes: draws are ``(*sample_shape, *batch_shape, len(columns))``; the batch shape is that of law and ``given``.

    Attributes:
        columns: the columns of x that a draw consists of, in this order.

    Example:
        >>> q = pf.flows.Gaussian(3)()
        >>> part = SubvectorDistribution(q, columns=[1, 2], given_columns=[0], given=torch.zeros(5, 1))
        >>> part.sample((7,)).shape, part.log_prob(torch.zeros(2)).shape
        (torch.Size([7, 5, 2]), torch.Size([5]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    __repr__ = shapes_of_law

    def __init__(
        self, law: FlowDistribution, columns: Sequence[int], given_columns: Sequence[int], given: Tensor
    ) -> None:
        self.columns = list(columns)
        self._law = law
        self._layers = flattened(law.transform)
        self._context = law.transform.layer_context(law.context)
        self._given_columns, self._given = list(given_columns), given
        batch_shape = torch.broadcast_shapes(law.batch_shape, given.shape[:-1])
        super().__init__(batch_shape, torch.Size([len(self.columns)]), validate_args=is_validated())

    @property
    def has_rsample(self) -> bool:
        return self._law.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        return of_columns(self._law.support, self.columns)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SubvectorDistribution":
        given = self._given.expand(*batch_shape, -1)
        return SubvectorDistribution(self._law, self.columns, self._given_columns, given)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws ``(*sample_shape, *batch_shape, len(columns))``, which carry gradients if ``has_rsample``."""
        base = self._scalars()
        draw = base.rsample if self.has_rsample else base.sample
        return self._forward(draw(torch.Size(sample_shape)))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws ``(*sample_shape, *batch_shape, len(columns))`` without gradients."""
        return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-densities ``(...)`` of values ``(..., len(columns))``."""
        value = as_tensor("the value", value, self._given)
        if self._validate_args and value.numel():
            self._validate_sample(value)
        if is_unbounded(self.support):
            return self._log_prob(value)
        is_in = is_inside(self.support, value, 1)
        return torch.where(is_in, self._log_prob(moved_inside(self.support, value, is_in, 1)), -torch.inf)

    def _log_prob(self, value: Tensor) -> Tensor:
        z, log_slopes = self._inverse(value)
        terms = self._scalars().log_prob(z) + log_slopes
        return terms[..., self.columns].sum(-1)

    def conditional_cdf(self, value: Tensor) -> Tensor:
        r"""Return :math:`F(x_j \mid x_{<j})` for each column j of the subvector, given the columns before it.

        This is the Rosenblatt transform: it is uniform on the unit cube if x follows this law, so that histograms of it
        show by which columns, and how, data differ from the fitted law.

        Args:
            value: ``(..., len(columns))``.

        Raises:
            NotImplementedError: if the base has no distribution function, such as Student's.
        """
        z, _ = self._inverse(as_tensor("the value", value, self._given))
        level = self._call_scalars("cdf", z)
        return torch.where(self._increases(), level, 1 - level)[..., self.columns]

    def conditional_icdf(self, level: Tensor) -> Tensor:
        """Return the values ``(..., len(columns))`` that :meth:`conditional_cdf` maps to these levels.

        Args:
            level: numbers in (0, 1), ``(..., len(columns))``.

        Raises:
            NotImplementedError: if the base has no quantile function.
        """
        level = as_tensor("the level", level, self._given)
        levels = level.new_full((*level.shape[:-1], self._law.event_shape[0]), 0.5)
        levels = _replaced(levels, self.columns, level)
        return self._forward(self._call_scalars("icdf", torch.where(self._increases(), levels, 1 - levels)))

    def _scalars(self) -> Any:
        """Return the law of z as one of independent scalars."""
        base: Any = self._law.base
        return base.base_dist.expand(self.batch_shape + self._law.event_shape)

    def _call_scalars(self, name: str, value: Tensor) -> Tensor:
        scalars = self._scalars()
        try:
            return getattr(scalars, name)(value)
        except NotImplementedError:
            kind = type(scalars).__name__
            raise NotImplementedError(f"the base of this flow, {kind}, has no {name}: a normal one has") from None

    def _forward(self, z: Tensor) -> Tensor:
        """Return the columns of the subvector at base values ``(..., dim)``, whose given columns are replaced."""
        if self._given_columns:
            z_given, _ = self._latent(self._filled([]))
            z = _replaced(z, self._given_columns, z_given[..., self._given_columns])
        x, _ = forward_and_log_slopes(self._layers, z, self._context)
        return x[..., self.columns]

    def _inverse(self, value: Tensor) -> tuple[Tensor, Tensor]:
        batch_shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        filled = self._filled(batch_shape)
        return self._latent(_replaced(filled, self.columns, value))

    def _latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return inverse_and_log_slopes(self._layers, x, self._context)

    def _filled(self, batch_shape: Any) -> Tensor:
        """Return rows with the given columns in place; what stands in those after the subvector does not matter."""
        origin = self._given.new_zeros(self.batch_shape + self._law.event_shape)
        with torch.no_grad():
            x, _ = forward_and_log_slopes(self._layers, origin, self._context)
        x = x.expand(*torch.broadcast_shapes(x.shape[:-1], batch_shape), -1)
        return _replaced(x, self._given_columns, self._given) if self._given_columns else x

    def _increases(self) -> Tensor:
        """Return whether each column grows with its base value; maps of torch may fall, all others grow."""
        z = self._given.new_tensor([[-0.1], [0.1]]).expand(2, *self._law.event_shape)
        signs = [
            (layer(z)[1] > layer(z)[0]) if isinstance(layer, Foreign) else torch.tensor(True) for layer in self._layers
        ]
        falls = torch.stack(torch.broadcast_tensors(*[~sign for sign in signs])).sum(0)
        return falls % 2 == 0


def subvector(
    law: FlowDistribution, columns: Sequence[int] | None, given_columns: Sequence[int] | None, given: Tensor
) -> SubvectorDistribution:
    """Return the law of some columns given others, after a check that the flow has it in closed form.

    Args:
        law: the law that a call of the flow returned.
        columns: the columns of the subvector; None for all that are not given.
        given_columns: the given columns; None for the first of the flow's order.
        given: their values ``(..., k)``.

    Raises:
        OptionError: if the layers have no common order, the base's dimensions are not independent, or the columns do
            not come first in that order.
        ShapeError: if the number of given values is not that of the given columns.
        DataError: if a given value is NaN, infinite or outside of the support, where values are validated.
    """
    order = _common_order(law)
    dim, k = law.event_shape[0], (*given.shape, 0)[given.dim() - 1]
    first = list(order or range(dim))[:k] if given_columns is None else checked_columns(given_columns, dim)
    if not given.dim() or len(first) != k or not k < dim:
        raise ShapeError(
            f"given must be (..., k) with one value for each of k < {dim} columns, got {tuple(given.shape)}"
        )
    if is_validated() and runs_in_python():
        require_possible(given, law.support, first)
    rest = [j for j in range(dim) if j not in first] if columns is None else checked_columns(columns, dim)
    for part in (first, [*first, *rest]):
        if order and set(part) != set(order[: len(part)]):
            raise OptionError(
                f"columns {sorted(part)} are not the first {len(part)} of this flow's order {list(order)}, so their "
                "law is not known in closed form: make the flow with an order that begins with them, or use "
                "pf.sample_conditional"
            )
    return SubvectorDistribution(law, rest, first, given)


def checked_columns(columns: Any, dim: int) -> list[int]:
    """Return columns as a list, if they are one or more different columns of vectors of this size.

    Example:
        >>> checked_columns(torch.tensor([2, 0]), 3)
        [2, 0]
    """
    found = columns.tolist() if isinstance(columns, Tensor | np.ndarray) else columns
    is_list = isinstance(found, Sequence) and len(found) > 0 and all(type(j) is int and 0 <= j < dim for j in found)
    if is_list and len(set(found)) == len(found):
        return list(found)
    raise OptionError(
        f"columns must be one or more different numbers from 0 to {dim - 1}, such as [0], got {columns!r}"
    )


def require_possible(given: Tensor, support: constraints.Constraint, columns: Sequence[int]) -> None:
    """Raise if given values are not finite or outside of what the support of a law allows in their columns.

    Args:
        given: ``(..., len(columns))``.
        support: the support of the law of all columns.
        columns: the given columns.

    Raises:
        DataError: if they are.

    Example:
        >>> require_possible(torch.tensor([1.0]), constraints.positive, [0])
    """
    require_finite("given", given, 1)
    allowed = of_columns(support, columns)
    if not is_unbounded(allowed) and not is_inside(allowed, given, 1).all():
        raise DataError(f"given has values outside of the support {allowed} of columns {list(columns)}")


def _common_order(law: FlowDistribution) -> tuple[int, ...]:
    """Return the order in which all layers are triangular, empty if any will do."""
    if not isinstance(law, FlowDistribution):
        raise OptionError("a mixture has no conditional and marginal laws in closed form: use pf.sample_conditional")
    require_real(
        law,
        "a conditional or marginal law",
        "where the support is small, weigh flow().enumerate_support() by flow().log_prob",
    )
    layers = flattened(law.transform)
    orders = orders_of(layers)
    distinct = {order for order in orders if order}
    base = law.base
    is_independent = isinstance(base, Independent) and base.base_dist.event_shape == torch.Size()
    if len(distinct) > 1 or None in orders or len(law.event_shape) > 1 or not is_independent:
        names = ", ".join(
            f"layer {i} ({type(layer).__name__}): {'none' if order is None else list(order)}"
            for i, (layer, order) in enumerate(zip(layers, orders, strict=True))
            if order != ()
        )
        what = f"the orders differ: {names}" if is_independent else f"the base is a {type(base).__name__}"
        raise OptionError(
            "conditional and marginal laws need layers that are triangular in one order, and a base of independent "
            f"scalars, but {what}. Make an autoregressive flow with an order, such as pf.flows.MAF(3, order=[2, 0, 1]),"
            " or use pf.sample_conditional"
        )
    return next(iter(distinct), ())


def _replaced(x: Tensor, columns: Sequence[int], values: Tensor) -> Tensor:
    """Return x with these columns replaced by values ``(..., len(columns))``; batch shapes broadcast."""
    batch_shape = torch.broadcast_shapes(x.shape[:-1], values.shape[:-1])
    index = torch.as_tensor(columns, device=x.device)
    return x.expand(*batch_shape, -1).index_copy(-1, index, values.expand(*batch_shape, -1))

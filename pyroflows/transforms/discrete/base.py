"""The base class of discrete layers, bijections of sequences of categories."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroflows.compiling.eager import runs_in_python
from pyroflows.errors import DataError, OptionError
from pyroflows.options import checked_int, checked_number
from pyroflows.transforms.base import FlowTransform, Pair
from pyroflows.transforms.discrete.maps import MAPS, MapFactory, map_named, seen_by_network
from pyroflows.transforms.held import is_validated

# The temperature of relaxations falls by this factor each step, down to the last one.
COOLING, LAST_TEMPERATURE = 0.999, 0.1


class DiscreteTransform(FlowTransform):
    r"""The base class of discrete layers: bijections :math:`x = t(z)` of sequences of categories 0 to K - 1.

    A bijection of a finite set changes no probability, :math:`q(t(z)) = p(z)`: the log-determinant is zero. A subclass
    writes the value in both directions for integers, and for one-hot vectors, whose values have gradients straight
    through (:mod:`pyroflows.transforms.discrete.maps`).

    There is no score, since the law of categories has no density, and nothing to adapt to data before training.

    Args:
        length: number of places of a sequence.
        num_categories: number of categories K, at least 2.
        univariate: the map of each place, "additive", "affine" or "permutation".
        context_dim: size or shape of the context, 0 for none.
        temperature: the temperature at which relaxations start, above 0; each step of training lowers it by a
            thousandth, down to a tenth. One that starts at a tenth or lower stays.

    Shapes: z and x are ``(..., length)`` and of the same dtype, which may be any that has the number K - 1; one-hot
    vectors are ``(..., length, K)``.

    Attributes:
        temperature: the temperature now. It is part of the state, which is copied, saved and loaded.

    Raises:
        OptionError: if a size is too small, a name is unknown, or the temperature is not positive; if the layer is
            asked to adapt.
        DataError: at a call, if a value is none of the categories, where values are validated.
    """

    temperature: Tensor
    rounded_off: Tensor
    # The maps of a place, by the name of the option.
    maps: ClassVar[dict[str, MapFactory]] = MAPS

    def __init__(
        self,
        length: int,
        num_categories: int,
        univariate: str = "affine",
        context_dim: int | Sequence[int] = 0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(checked_int("length", length), context_dim)
        self.num_categories = checked_int("num_categories", num_categories, least=2)
        self.univariate = map_named(univariate, self.num_categories, self.maps)
        self.register_buffer("temperature", torch.tensor(checked_number("temperature", temperature)))
        # What the dtype of the temperature lacks of it, which the next step adds again.
        self.register_buffer("rounded_off", torch.zeros(()))
        self.domain = self.codomain = constraints.independent(
            constraints.integer_interval(0, self.num_categories - 1), 1
        )

    # These are the hooks of a subclass: it writes all four.

    def _forward_categories(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Return x for categories z of dtype ``torch.long``, without gradients."""
        raise NotImplementedError

    def _inverse_categories(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return z for categories x of dtype ``torch.long``, without gradients."""
        raise NotImplementedError

    def _forward_one_hot(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Return x for one-hot vectors z, with gradients."""
        raise NotImplementedError

    def _inverse_one_hot(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return z for one-hot vectors x, with gradients."""
        raise NotImplementedError

    # What follows is the same for all discrete layers.

    def _forward_value(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._mapped(self._forward_categories, z, context)

    def _inverse_value(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self._mapped(self._inverse_categories, x, context)

    @torch.no_grad()
    def _mapped(self, function: Callable[..., Tensor], value: Tensor, context: Tensor | None) -> Tensor:
        require_categories(value, self.num_categories, type(self).__name__)
        return function(value.long(), context).to(value.dtype)

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return self._forward_value(z, context), self._zeros(z)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return self._inverse_value(x, context), self._zeros(x)

    def _zeros(self, value: Tensor) -> Tensor:
        return self.temperature.new_zeros(value.shape[:-1])

    def adapt(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Raise an error: categories have no location and scale to learn before training."""
        raise OptionError(
            f"{type(self).__name__} maps categories, which have no location and scale: it learns by gradients alone, "
            "so leave out adapt"
        )

    def adapt_to_draws(self, z: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Raise an error: categories have no location and scale to learn before training."""
        self.adapt(z, context, weights)

    @torch.no_grad()
    def before_step(self) -> None:
        """Lower the temperature."""
        # A number of half precision would stay as it is, since a thousandth of it is lost when it is rounded.
        exact = self.temperature.to(torch.promote_types(self.temperature.dtype, torch.float32)) + self.rounded_off
        lower = torch.minimum(exact, (COOLING * exact).clamp(min=LAST_TEMPERATURE))
        self.temperature.copy_(lower)
        self.rounded_off.copy_(lower - self.temperature)

    def one_hot(self, value: Tensor) -> Tensor:
        """Return categories ``(..., length)`` as one-hot vectors ``(..., length, K)`` of the layer's dtype."""
        return as_one_hot(value, self.num_categories, self.temperature.dtype)

    def _seen(self, one_hot: Tensor) -> Tensor:
        """Return what networks see of one-hot vectors."""
        return seen_by_network(one_hot) if self.univariate.differentiates_contexts else one_hot.detach()

    def extra_repr(self) -> str:
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"length={self.dim}, num_categories={self.num_categories}{context}"


def as_one_hot(categories: Tensor, num_categories: int, dtype: torch.dtype) -> Tensor:
    """Return categories ``(...)`` as one-hot vectors ``(..., num_categories)``.

    Example:
        >>> as_one_hot(torch.tensor([2, 0]), 3, torch.float32).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    return (categories[..., None] == torch.arange(num_categories, device=categories.device)).to(dtype)


def require_categories(value: Tensor, num_categories: int, name: str) -> None:
    """Raise if a value is none of the categories, where values are validated, or if its dtype does not have them all.

    Args:
        value: any numbers.
        num_categories: the number of categories K.
        name: what the message calls what takes them.

    Raises:
        DataError: if one is not; the message names the first and its place.

    Example:
        >>> try:
        ...     require_categories(torch.tensor([[0, 2], [1, 3]]), 3, "this layer")
        ... except pf.FlowError as error:
        ...     print(error)
        this layer takes categories 0 to 2, but got 3 at [1, 1]: the largest is 3, which takes num_categories=4
    """
    if _largest_of(value.dtype) < num_categories - 1:
        raise DataError(
            f"{name} maps categories 0 to {num_categories - 1}, and {value.dtype} does not have all these numbers: "
            "give it torch.long"
        )
    if not (is_validated() and runs_in_python()):
        return
    number = value if value.is_floating_point() else value.long()
    is_wrong = ~((number >= 0) & (number < num_categories) & (number == number.round()))
    if is_wrong.any():
        place = is_wrong.nonzero()[0].tolist()
        raise DataError(
            f"{name} takes categories 0 to {num_categories - 1}, but got {number[tuple(place)].item():g} at {place}: "
            f"{advice_on(number)}"
        )


def advice_on(numbers: Tensor) -> str:
    """Return what to do with numbers of which some are no categories, for a message.

    Example:
        >>> advice_on(torch.tensor([-1, 4]))
        'the smallest is -1 and the largest 4: give x + 1, whose categories are 0 to 5, with num_categories=6'
        >>> advice_on(torch.tensor([2, 4]))
        'the largest is 4, which takes num_categories=5'
    """
    if not (numbers.isfinite() & (numbers == numbers.round())).all():
        return "give it whole numbers from 0 to num_categories - 1"
    smallest, largest = int(numbers.min()), int(numbers.max())
    if smallest >= 0:
        return f"the largest is {largest}, which takes num_categories={largest + 1}"
    last = largest - smallest
    return (
        f"the smallest is {smallest} and the largest {largest}: give x + {-smallest}, whose categories are 0 to "
        f"{last}, with num_categories={last + 1}"
    )


def _largest_of(dtype: torch.dtype) -> float:
    """Return the largest number up to which a dtype has all whole numbers."""
    if dtype == torch.bool:
        return 1
    return 2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(dtype).max

r"""Maps of one category: bijections of 0 to K - 1, with the gradients that train their parameters.

A map knows categories and their parameters, nothing of sequences, as univariate maps do of real numbers. Its values are
exact.

Where gradients are wanted, categories are one-hot vectors, and gradients go straight through (Bengio et al. 2013,
arXiv:1308.3432): the value is that of the bijection, and the gradient is that of a relaxation. Relaxations have a
temperature: at a high one many categories get a gradient, at a low one those that the map has nearly chosen.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyroflows.errors import OptionError
from pyroflows.nets.constants import Constants
from pyroflows.options import checked_int, kind

# Categories whose scores are equal up to rounding are told apart by this much for each category.
TIE_BREAK = 1e-3


class DiscreteMap(Constants):
    """The base class of maps of one category.

    Args:
        num_categories: number of categories K, at least 2.

    Shapes: categories z and x are integers ``(...)``, parameters ``(..., num_params)``, one-hot vectors ``(..., K)``,
    and the temperature is a number.

    Attributes:
        num_params: number of parameters of a place; where all are zero, the map is the identity.
        differentiates_contexts: whether the gradient of a value may go on to the parameters of places that depend on
            it, since it is an approximate derivative.
    """

    categories: Tensor
    num_params: int
    differentiates_contexts = True

    def __init__(self, num_categories: int) -> None:
        super().__init__()
        self.num_categories = checked_int("num_categories", num_categories, least=2)
        self.register_constants()

    def constants(self) -> dict[str, Tensor | None]:
        return {"categories": torch.arange(self.num_categories)}

    def forward(self, z: Tensor, theta: Tensor) -> Tensor:
        """Return the category x."""
        raise NotImplementedError

    def inverse(self, x: Tensor, theta: Tensor) -> Tensor:
        """Return the category z."""
        raise NotImplementedError

    def one_hot_forward(self, z: Tensor, theta: Tensor, temperature: Tensor) -> Tensor:
        """Return the one-hot vector x of a one-hot vector z, with gradients of z and of the parameters."""
        raise NotImplementedError

    def one_hot_inverse(self, x: Tensor, theta: Tensor, temperature: Tensor) -> Tensor:
        """Return the one-hot vector z of a one-hot vector x, with gradients of x and of the parameters."""
        raise NotImplementedError


class Modular(DiscreteMap):
    r"""The map :math:`x = (\mu + \sigma z) \bmod K` (Tran et al. 2019, arXiv:1905.10347).

    The location :math:`\mu` is the category with the largest of K parameters, and the scale :math:`\sigma` is the unit
    modulo K with the largest of the others. A unit has no divisor in common with K, so that it has an inverse:
    :math:`z = \sigma^{-1} (x - \mu) \bmod K`.

    The gradient is that of two expectations of a linear function of the one-hot vector x: over locations, drawn from
    the softmax of their parameters divided by the temperature, at the chosen scale; and over scales at the chosen
    location.

    Args:
        num_categories: number of categories K, at least 2.
        has_scale: whether there is a scale; without one it is 1.

    Example:
        >>> shift = Modular(4, has_scale=False)
        >>> shift(torch.arange(4), torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(4, 4))
        tensor([1, 2, 3, 0])
        >>> Modular(12).units
        tensor([ 1,  5,  7, 11])
    """

    units: Tensor
    inverse_units: Tensor

    def __init__(self, num_categories: int, has_scale: bool = True) -> None:
        self.has_scale = has_scale
        super().__init__(num_categories)
        self.num_params = num_categories + (len(self.units) if has_scale else 0)

    def constants(self) -> dict[str, Tensor | None]:
        size = self.num_categories
        units = [k for k in range(1, size) if math.gcd(k, size) == 1] if self.has_scale else [1]
        inverses = [pow(k, -1, size) for k in units]
        return {**super().constants(), "units": torch.tensor(units), "inverse_units": torch.tensor(inverses)}

    def _chosen(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the location, the scale, and its inverse, ``(..., 1)``."""
        loc = without_ties(theta[..., : self.num_categories]).argmax(-1, keepdim=True)
        if not self.has_scale:
            return loc, torch.ones_like(loc), torch.ones_like(loc)
        of_units = without_ties(theta[..., self.num_categories :])
        index = of_units.argmax(-1, keepdim=True)
        return (
            loc,
            self.units.expand_as(of_units).gather(-1, index),
            self.inverse_units.expand_as(of_units).gather(-1, index),
        )

    def _relaxed(self, theta: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probabilities of all locations and of all scales."""
        size = self.num_categories
        return (theta[..., :size] / temperature).softmax(-1), (theta[..., size:] / temperature).softmax(-1)

    def forward(self, z: Tensor, theta: Tensor) -> Tensor:
        loc, scale, _ = self._chosen(theta)
        return (loc + scale * z[..., None])[..., 0] % self.num_categories

    def inverse(self, x: Tensor, theta: Tensor) -> Tensor:
        loc, _, inverse_scale = self._chosen(theta)
        return (inverse_scale * (x[..., None] - loc))[..., 0] % self.num_categories

    def one_hot_forward(self, z: Tensor, theta: Tensor, temperature: Tensor) -> Tensor:
        size = self.num_categories
        loc, scale, inverse_scale = self._chosen(theta)
        locs, scales = self._relaxed(theta, temperature)
        value = z.argmax(-1, keepdim=True)
        x = z.gather(-1, inverse_scale * (self.categories - loc) % size)
        # The location k - scale z leads to the category k.
        x = x + straight_through(locs.gather(-1, (self.categories - scale * value) % size))
        return x if not self.has_scale else x + _scattered(scales, (loc + self.units * value) % size, x)

    def one_hot_inverse(self, x: Tensor, theta: Tensor, temperature: Tensor) -> Tensor:
        size = self.num_categories
        loc, scale, _ = self._chosen(theta)
        locs, scales = self._relaxed(theta, temperature)
        value = x.argmax(-1, keepdim=True)
        z = x.gather(-1, (loc + scale * self.categories) % size)
        # The location x - scale k leads back to the category k.
        z = z + straight_through(locs.gather(-1, (value - scale * self.categories) % size))
        return z if not self.has_scale else z + _scattered(scales, self.inverse_units * (value - loc) % size, z)


class Ranking(DiscreteMap):
    r"""The permutation that ranks categories by scores: x is the rank of z, and the largest score has rank 0.

    .. math:: x = \#\{k : s_k - \epsilon k > s_z - \epsilon z\}

    The K parameters are the scores :math:`s_k`. Equal scores leave the order of categories as it is, since
    :math:`\epsilon` is 0.001 (:func:`without_ties`). Every permutation of the categories has scores, so that the map is
    the most general one. If the scores order categories by their probability given what is known, ranks have the least
    entropy that a bijection of one category can give them.

    So the scores learn to predict z: their gradient is that of :math:`\log \operatorname{softmax}(s)_z`, times the
    derivative of the loss with respect to the log-probability, which the entries of the one-hot vector x have in common
    (:func:`balanced`). It goes on neither to z nor to parameters that depend on the rank: each layer learns by itself
    the law that it ranks by, and one that ranks can only lower the sum of the entropies of the places.

    In the other direction, where z is what a rank x stands for, there is nothing to predict, and the gradient is that
    of learning to rank (LambdaRank, Burges 2010, MSR-TR-2010-82). Where :math:`g_k` is the loss with k instead of z,

    .. math:: \frac{\partial}{\partial s_k} = \pm (g_k - g_z)\, \sigma((s_k - s_z) / T) / T, \qquad
        \frac{\partial}{\partial s_z} = -\sum_{k \ne z} \frac{\partial}{\partial s_k},

    with a minus where k stands before z. The slopes are those of the logistic loss of a pair, as if z should stand
    before k.

    Args:
        num_categories: number of categories K, at least 2.

    Example:
        >>> ranking, scores = Ranking(3), torch.tensor([0.1, 0.7, 0.2]).expand(3, 3)
        >>> ranking(torch.arange(3), scores), ranking.inverse(torch.arange(3), scores)
        (tensor([2, 0, 1]), tensor([1, 2, 0]))
    """

    differentiates_contexts = False

    def __init__(self, num_categories: int) -> None:
        super().__init__(num_categories)
        self.num_params = num_categories

    def forward(self, z: Tensor, theta: Tensor) -> Tensor:
        return self._is_before(z[..., None], theta).sum(-1)

    def inverse(self, x: Tensor, theta: Tensor) -> Tensor:
        return _order(theta).gather(-1, x[..., None])[..., 0]

    def one_hot_forward(self, z: Tensor, theta: Tensor, temperature: Tensor) -> Tensor:
        log_prob = (z.detach() * theta.log_softmax(-1)).sum(-1, keepdim=True)
        return z.gather(-1, _order(theta)) + straight_through(log_prob / self.num_categories)

    def one_hot_inverse(self, x: Tensor, theta: Tensor, temperature: Tensor) -> Tensor:
        # Of two categories the one at the rank x is the value; the gain of a swap is that of the other in its place.
        order = _order(theta)
        value = order.gather(-1, x.argmax(-1, keepdim=True))
        return x.gather(-1, order.argsort(dim=-1)) + self._swaps(value, theta, temperature)

    def _is_before(self, category: Tensor, scores: Tensor) -> Tensor:
        """Tell which categories ``(..., K)`` stand before one, ``(..., 1)``."""
        scores = without_ties(scores)
        own = scores.gather(-1, category)
        return (scores > own) | ((scores == own) & (self.categories < category))

    def _swaps(self, category: Tensor, scores: Tensor, temperature: Tensor) -> Tensor:
        """Return zeros ``(..., K)`` with the gradient of swaps of a category ``(..., 1)`` with each of the others."""
        gaps = scores - scores.gather(-1, category)
        with torch.no_grad():
            slopes = torch.sigmoid(gaps / temperature) / temperature
            slopes = torch.where(self._is_before(category, scores), -slopes, slopes)
        weights = slopes * gaps
        return straight_through(weights - (self.categories == category) * weights.sum(-1, keepdim=True))


class Sorting(Ranking):
    r"""The inverse of :class:`Ranking`: x is the category of rank z, with the largest score first.

    Args:
        num_categories: number of categories K, at least 2.

    Example:
        >>> sorting, scores = Sorting(3), torch.tensor([0.1, 0.7, 0.2]).expand(3, 3)
        >>> sorting(torch.arange(3), scores)
        tensor([1, 2, 0])
    """

    def forward(self, z: Tensor, theta: Tensor) -> Tensor:
        return super().inverse(z, theta)

    def inverse(self, x: Tensor, theta: Tensor) -> Tensor:
        return super().forward(x, theta)

    def one_hot_forward(self, z: Tensor, theta: Tensor, temperature: Tensor) -> Tensor:
        return super().one_hot_inverse(z, theta, temperature)

    def one_hot_inverse(self, x: Tensor, theta: Tensor, temperature: Tensor) -> Tensor:
        return super().one_hot_forward(x, theta, temperature)


def straight_through(relaxed: Tensor) -> Tensor:
    """Return zeros that have the gradient of a tensor.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> straight_through(3 * x).tolist()
        [0.0, 0.0]
    """
    return relaxed - relaxed.detach()


def balanced(table: Tensor) -> Tensor:
    """Return log-probabilities of all categories ``(..., K)`` with a constant added that makes their mean one.

    As the gradient of a one-hot vector it means the same to whatever moves probability from one category to others, and
    the mean over its entries is the derivative with respect to the log-probability itself.

    Example:
        >>> balanced(torch.tensor([-1.0, -2.0, -3.0]))
        tensor([2., 1., 0.])
    """
    return table - table.mean(-1, keepdim=True) + 1


def seen_by_network(one_hot: Tensor) -> Tensor:
    """Return one-hot vectors as networks see them: their gradient leaves the mean of :func:`balanced` ones alone."""
    return one_hot.detach() + straight_through(one_hot - one_hot.mean(-1, keepdim=True))


def without_ties(scores: Tensor) -> Tensor:
    """Return scores ``(..., K)`` of which earlier ones are larger by a little.

    Scores of categories that never occur stay equal in training, but each row of a batch rounds them differently. The
    order of such categories, which a bijection needs, must not depend on rounding.

    Example:
        >>> without_ties(torch.zeros(3))
        tensor([ 0.0000, -0.0010, -0.0020])
    """
    return scores - TIE_BREAK * torch.arange(scores.shape[-1], dtype=scores.dtype, device=scores.device)


def _order(scores: Tensor) -> Tensor:
    """Return the categories in descending order of their scores; equal ones in the order of their numbers."""
    # Networks give the scores of a place with a stride, with which sorting is slow.
    return without_ties(scores).contiguous().argsort(dim=-1, descending=True, stable=True)


def _scattered(weights: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """Return zeros ``(..., K)`` with the gradient of weights at categories."""
    return straight_through(torch.zeros_like(like).scatter_add(-1, places.expand_as(weights), weights))


# It makes a map from the number of categories.
MapFactory = Callable[[int], DiscreteMap]

MAPS: dict[str, MapFactory] = {
    "additive": lambda num_categories: Modular(num_categories, has_scale=False),
    "affine": Modular,
    "permutation": Ranking,
}


def map_named(name: str, num_categories: int, maps: Mapping[str, MapFactory] = MAPS) -> DiscreteMap:
    """Return a new map of this name.

    Args:
        name: the name.
        num_categories: number of categories K.
        maps: the maps by name.

    Raises:
        OptionError: if the name is unknown.

    Example:
        >>> map_named("affine", 6).num_params
        8
    """
    if not isinstance(name, str) or name not in maps:
        got = repr(name) if isinstance(name, str) else kind(name)
        raise OptionError(f"the univariate map of a discrete layer must be one of {sorted(maps)}, got {got}")
    return maps[name](num_categories)

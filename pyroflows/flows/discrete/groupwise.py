"""A base distribution of sequences of categories that is drawn in few steps."""

import math
from collections.abc import Sequence

from torch import Tensor

from pyroflows.flows.discrete.base import AutoregressiveLaw, CategoricalBase
from pyroflows.nets.groupwise import GroupwiseConv
from pyroflows.options import checked_int
from pyroflows.shapes import as_given


class GroupwiseCategorical(CategoricalBase):
    r"""Categories in m groups, each drawn at once given the groups before it,

    .. math:: p(z) = \prod_{r=0}^{m-1} \prod_{j \,:\, j \bmod m = r} p(z_j \mid z_{i}, \, i \bmod m < r),

    with logits from one network, a :class:`pyroflows.nets.GroupwiseConv`: those of place j depend on the places before
    it in its block of m adjacent places, and on the same places of blocks within reach. It takes m steps to draw a
    sequence of any length, where :class:`AutoregressiveCategorical` takes a step for each place. In return, a block
    starts without knowing how the one before it ends: the more groups there are, the less is lost.

    Args:
        length: number of places of a sequence.
        num_categories: number of categories K, at least 2.
        num_groups: number m of groups, from 1 to ``length``; None for about the square root of the length.
        hidden_dims: widths of the network, whose dilations double with each: five let a place see a block of 32.
        embedding_dim: size of the vectors, learned, as which the network sees categories; None for one-hot vectors.
        reach: number of blocks on either side that the network sees; 0 makes blocks independent, which learns faster
            where places so far apart have little to do with each other.
        context_dim: size of the context, 0 for none; or ``(context_channels, length)``, a sequence of which each place
            sees its own element.

    Shapes: a draw is a sequence ``(length,)``; a context ``(..., *context_shape)`` gives batch shape ``(...)``.

    Raises:
        OptionError: if a size is not positive, the reach is negative, there is no hidden layer, there are more groups
            than places, or the context is a sequence of another length.

    Example:
        >>> base = GroupwiseCategorical(100, 5)
        >>> base().sample((7,)).shape, base().log_prob(torch.zeros(100)).shape
        (torch.Size([7, 100]), torch.Size([]))
    """

    def __init__(
        self,
        length: int,
        num_categories: int,
        num_groups: int | None = None,
        hidden_dims: Sequence[int] = (64,) * 5,
        embedding_dim: int | None = None,
        reach: int = 1,
        context_dim: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(context_dim)
        length, size = checked_int("length", length), checked_int("num_categories", num_categories, least=2)
        num_groups = round(math.sqrt(length)) if num_groups is None else num_groups
        context = as_given(self.context_shape)
        self.net = GroupwiseConv(length, size, size, num_groups, hidden_dims, embedding_dim, reach, context)

    def _law(self, context: Tensor | None) -> AutoregressiveLaw:
        return AutoregressiveLaw.of(self.net, context, self.context_shape)

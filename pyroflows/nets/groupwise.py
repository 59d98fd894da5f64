"""A network of sequences of categories in groups, whose parameters at a place depend on the groups before its own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyroflows.compiling.eager import is_transformed
from pyroflows.errors import OptionError
from pyroflows.nets.categories import Embedding, by_passes
from pyroflows.nets.causal_conv import CausalConv
from pyroflows.nets.constants import Constants
from pyroflows.options import checked_int
from pyroflows.shapes import shape_of


class GroupwiseConv(Constants):
    r"""Causal convolutions along all blocks of a sequence at once.

    A sequence is cut into blocks of m adjacent places. Group r consists of the r-th places of all blocks, so that place
    j is in group ``j % m``. Let :math:`x_{b,r}` be the category of place r in block b. One pass gives, for all places,

    .. math:: \theta_{b,r} = f_r(x_{b-h,<r}, \dots, x_{b,<r}, \dots, x_{b+h,<r}),

    where one :class:`CausalConv` computes all :math:`f_r`: it runs along the block and sees the embeddings of the
    blocks within reach h as channels. So parameters depend on earlier groups only, and can also be computed group after
    group, in m steps however long the sequence is. The last block may be shorter. Places beyond the border have
    embeddings of zeros.

    Args:
        length: number of places of a sequence.
        num_categories: number of categories K.
        num_params: number of parameters of each place.
        num_groups: number m of groups, from 1 to ``length``.
        hidden_dims: one or more widths, a block of the network for each.
        embedding_dim: size of an embedding; None for one-hot vectors.
        reach: number h of blocks on either side that the network sees.
        context_dim: size of a context vector that all places see, 0 for none; or ``(context_channels, length)``, the
            shape of a conditioning sequence, whose elements the gates see each at its own place.

    Shapes: ``(..., length, K)`` and a context give ``(..., length, num_params)``.

    Attributes:
        order: all places, group after group.

    Raises:
        OptionError: if a size is not positive, the reach is negative, there is no hidden layer, there are more groups
            than places, or a conditioning sequence has another length.

    Example:
        >>> net = GroupwiseConv(100, num_categories=5, num_params=7, num_groups=8, hidden_dims=(16,) * 3)
        >>> net(torch.eye(5)[torch.randint(5, (3, 100))]).shape, net.order[:4]
        (torch.Size([3, 100, 7]), [0, 8, 16, 24])
    """

    one_hots: Tensor

    def __init__(
        self,
        length: int,
        num_categories: int,
        num_params: int,
        num_groups: int,
        hidden_dims: Sequence[int] = (64,) * 5,
        embedding_dim: int | None = None,
        reach: int = 1,
        context_dim: int | Sequence[int] = 0,
    ) -> None:
        super().__init__()
        self.reach = checked_int("reach", reach, least=0)
        self.length, self.num_groups = checked_int("length", length), checked_int("num_groups", num_groups)
        if self.num_groups > self.length:
            raise OptionError(f"num_groups must be at most the length {self.length}, got {self.num_groups}")
        self.context_shape = shape_of(context_dim) if context_dim else torch.Size()
        if len(self.context_shape) > 1 and self.context_shape[1:] != (self.length,):
            raise OptionError(
                f"a conditioning sequence of {self.length} places has shape (channels, {self.length}), got "
                f"{tuple(self.context_shape)}"
            )
        self.num_categories = num_categories
        self.num_params = num_params
        self.order = [place for r in range(self.num_groups) for place in range(r, self.length, self.num_groups)]
        self.register_constants()
        self.embedding = Embedding(num_categories, embedding_dim)
        channels = (1 + 2 * self.reach) * self.embedding.dim
        in_block = [*self.context_shape[:1], self.num_groups] if len(self.context_shape) > 1 else self.context_shape
        self.net = CausalConv(
            range(self.num_groups), -(-num_params // channels), hidden_dims, in_block, channels=channels
        )

    def constants(self) -> dict[str, Tensor | None]:
        return {"one_hots": torch.eye(self.num_categories)}

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return -(-self.length // self.num_groups)

    def forward(self, one_hot: Tensor, context: Tensor | None = None) -> Tensor:
        batch_shape = one_hot.shape[:-2]
        vectors = self._in_blocks(self.embedding(one_hot).reshape(-1, self.length, self.embedding.dim))
        if context is not None:
            context = context.expand(*batch_shape, *self.context_shape).reshape(-1, *self.context_shape)
        # (N, blocks, channels, m, parameters of a channel)
        theta = self.net(self._with_neighbours(vectors).mT, self._context_in_blocks(context))
        theta = theta.movedim(-1, -3).flatten(-3, -2)[..., : self.num_params, :]
        return theta.mT.flatten(1, 2)[:, : self.length].reshape(*batch_shape, self.length, self.num_params)

    @torch.no_grad()
    def by_place(
        self, given: Tensor, context: Tensor | None, category_of: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Find the categories of rows group after group; see :meth:`pyroflows.nets.categories.OnCategories.by_place`.

        Args:
            given: what is known of each place, ``(N, length)``.
            context: ``(N, *context_shape)``, or None.
            category_of: the categories of places ``(n,)``, from what is known of them ``(n,)`` and from their
                parameters ``(n, num_params)``.

        Returns:
            Categories ``(N, length)``.
        """
        if is_transformed():
            return by_passes(self, self.num_groups, given, context, category_of)
        num_rows, num_blocks, num_groups = len(given), self.num_blocks, self.num_groups
        with torch.inference_mode():  # half the overhead of no_grad; what leaves it is cloned
            given = self._in_blocks(given[..., None])[..., 0]
            categories = torch.empty_like(given, dtype=torch.long)
            vectors = self.embedding(self.one_hots)
            context = self._context_in_blocks(context)
            if context is not None:
                context = context.expand(-1, num_blocks, *context.shape[2:]).flatten(0, 1)
            steps = self.net.incremental(num_rows * num_blocks, context)
            for r in range(num_groups):
                theta = steps.parameters_at(r).flatten(0, 1)[: self.num_params]
                categories[..., r] = category_of(given[..., r].flatten(), theta.mT).unflatten(0, (num_rows, -1))
                seen = vectors[categories[..., r]]  # (N, blocks, E)
                if r + (num_blocks - 1) * num_groups >= self.length:  # The last block is shorter.
                    seen[:, -1] = 0.0
                steps.inputs[r] = self._with_neighbours(seen).flatten(0, 1).mT
            categories = categories.flatten(1)[:, : self.length]
        return categories.clone()

    def _in_blocks(self, value: Tensor) -> Tensor:
        """Return places ``(N, length, channels)`` as ``(N, blocks, m, channels)``, with zeros beyond the end."""
        padded = F.pad(value, (0, 0, 0, self.num_blocks * self.num_groups - self.length))
        return padded.unflatten(1, (self.num_blocks, self.num_groups))

    def _context_in_blocks(self, context: Tensor | None) -> Tensor | None:
        """Return contexts ``(N, *context_shape)`` of rows as those of blocks, ``(N, blocks or 1, ...)``."""
        if context is None:
            return None
        return self._in_blocks(context.mT).mT if len(self.context_shape) > 1 else context[:, None]

    def _with_neighbours(self, blocks: Tensor) -> Tensor:
        """Append to the channels of blocks ``(N, blocks, ..., E)`` those of the blocks within reach, zero outside."""
        outside = torch.zeros_like(blocks[:, :1]).expand(-1, self.reach, *blocks.shape[2:])
        padded = torch.cat([outside, blocks, outside], 1)
        return torch.cat([padded[:, i : i + self.num_blocks] for i in range(1 + 2 * self.reach)], -1)

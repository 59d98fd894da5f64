"""Conditioners of categories: each category of a sequence enters as a vector, its embedding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.compiling.eager import is_transformed
from pyroflows.errors import ShapeError
from pyroflows.nets.checks import checked_conditioner
from pyroflows.nets.constants import Constants
from pyroflows.nets.made import MADE
from pyroflows.options import checked_int


class Embedding(nn.Module):
    r"""The embeddings :math:`e_k \in R^E` of categories, of which a vector w of weights gets :math:`\sum_k w_k e_k`.

    Args:
        num_categories: number of categories K.
        dim: size E of a vector; None for one-hot vectors, without parameters.

    Shapes: it maps ``(..., K)`` to ``(..., E)``.

    Raises:
        OptionError: if the size is not positive.

    Example:
        >>> Embedding(5, 2)(torch.eye(5)).shape
        torch.Size([5, 2])
    """

    def __init__(self, num_categories: int, dim: int | None = None) -> None:
        super().__init__()
        self.dim = num_categories if dim is None else checked_int("embedding_dim", dim)
        self.weight = None if dim is None else nn.Parameter(torch.randn(num_categories, self.dim))

    def forward(self, one_hot: Tensor) -> Tensor:
        return one_hot if self.weight is None else one_hot @ self.weight


def by_passes(
    net: Any,
    num_passes: int,
    given: Tensor,
    context: Tensor | None,
    category_of: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Find the categories of rows by passes of a network, which can be traced.

    Args:
        net: a network whose parameters depend on earlier places only, with ``one_hots`` of all categories.
        num_passes: the number of passes after which all places are known.
        given: what is known of each place, ``(N, length)``.
        context: ``(N, *context_shape)``, or None.
        category_of: as for :meth:`OnCategories.by_place`.

    Returns:
        Categories ``(N, length)``.
    """
    categories = torch.zeros_like(given, dtype=torch.long)
    for _ in range(num_passes):  # what stands at later places does not matter to those that are known
        theta = net(net.one_hots[categories], context)
        categories = category_of(given.flatten(), theta.flatten(0, 1)).view_as(given)
    return categories


class OnCategories(Constants):
    """An autoregressive network of categories: it sees the embedding of each as channels.

    It offers what the network in it offers of :class:`pyroflows.nets.Incremental`.

    Args:
        factory: the factory of the network, as :class:`pyroflows.transforms.Autoregressive` takes it. A :class:`MADE`
            gets ``features=``, the size of an embedding. Others get ``channels=`` for it, and the parameters of all
            channels of a place are those of the place.
        order: a permutation of ``range(length)``; ``order[i]`` is the index at place i.
        num_categories: number of categories K.
        num_params: number of parameters of each place.
        hidden_dims: widths of the hidden layers.
        context_dim: size or shape of the context, 0 for none.
        embedding_dim: size of an embedding; None for one-hot vectors.

    Shapes: ``(..., length, K)`` and a context give ``(..., length, num_params)``.

    Raises:
        OptionError: if a size is not positive, or the network has dropout or the like.
        ShapeError: at a call, if the network gives parameters of another shape.

    Example:
        >>> OnCategories(MADE, [0, 1, 2], 5, 7, (16,))(torch.eye(5)[torch.tensor([3, 0, 4])]).shape
        torch.Size([3, 7])
    """

    one_hots: Tensor

    def __init__(
        self,
        factory: Callable[..., nn.Module],
        order: Sequence[int],
        num_categories: int,
        num_params: int,
        hidden_dims: Sequence[int],
        context_dim: Any = 0,
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.order = list(order)
        self.num_categories = num_categories
        self.num_params = num_params
        self.register_constants()
        self.embedding = Embedding(num_categories, embedding_dim)
        self.gives_all_channels = not (isinstance(factory, type) and issubclass(factory, MADE))
        size = self.embedding.dim
        if self.gives_all_channels:
            net = factory(self.order, -(-num_params // size), hidden_dims, context_dim, channels=size)
        else:
            net = factory(self.order, num_params, hidden_dims, context_dim, features=size)
        self.net = checked_conditioner(net)

    def constants(self) -> dict[str, Tensor | None]:
        return {"one_hots": torch.eye(self.num_categories)}

    def forward(self, one_hot: Tensor, context: Tensor | None = None) -> Tensor:
        seen = self.embedding(one_hot).mT
        if not self.gives_all_channels:
            theta = self.net(seen[..., 0, :] if self.embedding.dim == 1 else seen, context)
            return theta.contiguous()  # choosing and sorting are slow along an axis with a stride
        theta = self.net(seen, context)
        expected = (*seen.shape, -(-self.num_params // self.embedding.dim))
        if theta.shape != expected:
            raise ShapeError(
                f"the conditioner of a discrete layer must map {tuple(seen.shape)}, embeddings as channels, to "
                f"{expected}, but gave {tuple(theta.shape)}"
            )
        return theta.movedim(-3, -2).flatten(-2)[..., : self.num_params].contiguous()

    @torch.no_grad()
    def by_place(
        self, given: Tensor, context: Tensor | None, category_of: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Find the categories of rows one place after the other, where each place's parameters depend on those before.

        Args:
            given: what is known of each place, ``(N, length)``.
            context: ``(N, *context_shape)``, or None.
            category_of: the categories of places ``(n,)``, from what is known of them ``(n,)`` and from their
                parameters ``(n, num_params)``.

        Returns:
            Categories ``(N, length)``.
        """
        incremental = getattr(self.net, "incremental", None)
        if incremental is None or is_transformed():
            return by_passes(self, len(self.order), given, context, category_of)
        with torch.inference_mode():  # half the overhead of no_grad; what leaves it is cloned
            steps = incremental(len(given), context)
            vectors = self.embedding(self.one_hots)
            categories = given.new_empty(given.shape, dtype=torch.long)
            for i, j in enumerate(self.order):
                theta = steps.parameters_at(i)
                if self.gives_all_channels:  # (parameters of a channel, channels, N)
                    theta = theta.transpose(0, 1).flatten(0, 1)[: self.num_params]
                category = category_of(given[:, j], theta.mT)
                categories[:, j] = category
                steps.inputs[i] = vectors[category].mT
        return categories.clone()

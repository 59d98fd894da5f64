"""The recipes of discrete flows (Tran et al. 2019, arXiv:1905.10347)."""

from collections.abc import Sequence

from pyroflows.errors import OptionError
from pyroflows.flows.base import Base
from pyroflows.flows.discrete.base import AutoregressiveCategorical, FactorizedCategorical
from pyroflows.flows.discrete.groupwise import GroupwiseCategorical
from pyroflows.flows.flow import Flow
from pyroflows.nets.checks import ConditionerFactory
from pyroflows.options import checked_int
from pyroflows.transforms import DiscreteAutoregressive as AutoregressiveLayer
from pyroflows.transforms import DiscreteCoupling as CouplingLayer
from pyroflows.transforms import FlowTransform
from pyroflows.transforms.discrete import OneHot

# Couplings divide a sequence into as many groups of places, if it is that long.
MAX_GROUPS = 8
BASES = ("factorized", "autoregressive", "groupwise")


class StackedDiscreteFlow(Flow):
    """The base class of the recipes of discrete flows. Each recipe says which layer it stacks.

    Every recipe takes the arguments below. Options of continuous flows, such as ``support`` and ``mixing``, do not
    apply.

    Args:
        length: number of places of a sequence.
        num_categories: number of categories K, at least 2.
        num_layers: number of layers, at least 1.
        univariate: the map of each place, "additive", "affine" or "permutation", see
            :class:`pyroflows.transforms.DiscreteAutoregressive`. None for permutations, or for affine maps in
            autoregressive flows whose base is autoregressive too, and sees the context if there is one.
        hidden_dims: widths of the hidden layers of each layer's network.
        conditioner: the network of each layer, by name or as a factory, see the layers.
        context_dim: size of the context, 0 for none. Layers see it, and so does a base that is named.
        base: the law of z: "factorized" for independent categories with learned probabilities
            (:class:`pyroflows.flows.FactorizedCategorical`), as is None; "autoregressive" for
            :class:`pyroflows.flows.AutoregressiveCategorical`; "groupwise" for
            :class:`pyroflows.flows.GroupwiseCategorical`, which is drawn in few steps; any Pyro distribution of event
            shape ``(length,)`` and the categories 0 to K - 1; or a module whose call returns one, see
            :class:`pyroflows.Flow` for those that take a context.
        embedding_dim: size of the vectors, learned, as which networks see categories; None for one-hot vectors.
        one_hot: whether events are one-hot vectors ``(length, K)``, rather than integers.

    Shapes: ``flow()`` has event shape ``(length,)``, or ``(length, K)`` for one-hot vectors; for a context
    ``(..., context_dim)``, ``flow(context)`` has batch shape ``(...)``.

    Raises:
        OptionError: if a size is too small, a name is unknown, or the base has other categories.
        ShapeError: if the base has another event shape.

    Example:
        >>> flow = pf.flows.DiscreteCoupling(3, num_categories=5, one_hot=True)
        >>> flow().sample((7,)).shape
        torch.Size([7, 3, 5])
    """

    def __init__(
        self, layers: Sequence[FlowTransform], length: int, num_categories: int, base: Base, one_hot: bool
    ) -> None:
        super().__init__([*layers, OneHot(length, num_categories)] if one_hot else layers, base)


class DiscreteAutoregressive(StackedDiscreteFlow):
    r"""The autoregressive discrete flow: layers :math:`z_j = T(x_j; \theta_j(x_{<j}, c))`, the inverses of
    :class:`pyroflows.transforms.DiscreteAutoregressive`, on an autoregressive base.

    Scoring is parallel; sampling computes one place after the other, in each layer and in the base. The other arguments
    are those of :class:`pyroflows.flows.discrete.recipes.StackedDiscreteFlow`.

    Args:
        conditioner: "made", "residual", "causal_conv" or a factory. An autoregressive base has the same network.
        order: the order of all layers and of an autoregressive base, a permutation of ``range(length)``; None for
            layers that are ascending and descending by turns, and an ascending base.
        context_dim: size of the context, 0 for none; with "causal_conv" also ``(context_channels, length)``.

    Example:
        >>> flow = DiscreteAutoregressive(4, num_categories=6)
        >>> x = torch.randint(6, (500, 4))
        >>> flow().log_prob(x).shape, flow().sample((5,)).shape
        (torch.Size([500]), torch.Size([5, 4]))
    """

    def __init__(
        self,
        length: int,
        num_categories: int,
        num_layers: int = 1,
        univariate: str | None = None,
        hidden_dims: Sequence[int] = (64, 64),
        conditioner: str | ConditionerFactory = "made",
        order: Sequence[int] | None = None,
        context_dim: int | Sequence[int] = 0,
        base: Base = "autoregressive",
        embedding_dim: int | None = None,
        one_hot: bool = False,
    ) -> None:
        length = checked_int("length", length)
        base = base_named(base, length, num_categories, order, conditioner, hidden_dims, context_dim, embedding_dim)
        if univariate is None:
            # Measured, with contexts too: an autoregressive base learns dependence better than layers do, which then
            # had better do little. What a base does not see is left to layers, which say it best by permutations.
            sees_all = isinstance(base, AutoregressiveCategorical) and bool(base.context_dim or not context_dim)
            univariate = "affine" if sees_all else "permutation"
        layers = [
            AutoregressiveLayer(
                length,
                num_categories,
                univariate,
                range(length)[:: -1 if i % 2 else 1] if order is None else order,
                conditioner,
                hidden_dims,
                context_dim,
                embedding_dim,
            ).inv
            for i in range(checked_int("num_layers", num_layers))
        ]
        super().__init__(layers, length, num_categories, base, one_hot)


class DiscreteCoupling(StackedDiscreteFlow):
    r"""The coupling discrete flow ("bipartite"): layers :math:`x_A = z_A, \; x_B = T(z_B; \theta(z_A, c))`, see
    :class:`pyroflows.transforms.DiscreteCoupling`, on a factorised base.

    Sampling and scoring are parallel: each layer is one pass of its network, whatever the length. Layer i transforms
    every place j with ``j % num_groups == i % num_groups``, given all others. With as many layers as groups, places of
    the last group are predicted from those of all others, of the one before from those of the groups before it, and so
    on. The other arguments are those of :class:`pyroflows.flows.discrete.recipes.StackedDiscreteFlow`.

    Args:
        conditioner: "mlp" or "residual", networks of all places; or "dilated_conv", "conv" or "residual_conv",
            convolutions along the sequence, for long ones; or a factory of such convolutions.
        context_dim: size of the context, 0 for none; with convolutions also ``(context_channels, length)``.
        num_groups: number of groups of places, from 2 to ``length``; None for one of each place, at most 8.
        num_layers: number of layers; None for one of each group, and at least four.

    Example:
        >>> flow = DiscreteCoupling(4, num_categories=6)
        >>> x = flow().sample((5,))
        >>> x.shape, flow().log_prob(x).shape
        (torch.Size([5, 4]), torch.Size([5]))
    """

    def __init__(
        self,
        length: int,
        num_categories: int,
        num_layers: int | None = None,
        univariate: str | None = None,
        hidden_dims: Sequence[int] = (64, 64),
        conditioner: str | ConditionerFactory = "mlp",
        num_groups: int | None = None,
        context_dim: int | Sequence[int] = 0,
        base: Base = None,
        embedding_dim: int | None = None,
        one_hot: bool = False,
    ) -> None:
        length = checked_int("length", length)
        # Places of a group see the others alone, so that few places have a group each, and each group has its layer.
        if num_groups is None:
            num_groups = max(2, min(length, MAX_GROUPS))
        if checked_int("num_groups", num_groups, least=2) > max(length, 2):
            raise OptionError(f"num_groups must be at most the length {length}, got {num_groups}")
        if num_layers is None:
            num_layers = max(4, num_groups)
        if univariate is None:
            univariate = "permutation"
        layers = [
            CouplingLayer(
                length,
                num_categories,
                univariate,
                # A single place is transformed by all layers.
                [length > 1 and place % num_groups != i % num_groups for place in range(length)],
                conditioner,
                hidden_dims,
                context_dim,
                embedding_dim,
            )
            for i in range(checked_int("num_layers", num_layers))
        ]
        # Masked networks take context vectors alone.
        of_base = "causal_conv" if isinstance(context_dim, Sequence) else "made"
        base = base_named(base, length, num_categories, None, of_base, hidden_dims, context_dim, embedding_dim)
        super().__init__(layers, length, num_categories, base, one_hot)


def base_named(
    base: Base,
    length: int,
    num_categories: int,
    order: Sequence[int] | None = None,
    conditioner: str | ConditionerFactory = "made",
    hidden_dims: Sequence[int] = (64, 64),
    context_dim: int | Sequence[int] = 0,
    embedding_dim: int | None = None,
) -> Base:
    """Return the base that a recipe's argument names; a distribution or a module is returned as it is.

    Args:
        base: "factorized" or None, "autoregressive", "groupwise", a distribution, or a module whose call returns one.
        length: number of places of a sequence.
        num_categories: number of categories K.
        order: of an autoregressive base, see :class:`pyroflows.flows.AutoregressiveCategorical`, like the arguments
            that follow.
        conditioner: its network.
        hidden_dims: widths of the hidden layers.
        context_dim: size or shape of the context, 0 for none.
        embedding_dim: size of embeddings.

    Raises:
        OptionError: if the name is unknown.

    Example:
        >>> type(base_named("factorized", 3, 5)).__name__
        'FactorizedCategorical'
    """
    if base is None or base == "factorized":
        return FactorizedCategorical(length, num_categories, context_dim, hidden_dims)
    if base == "autoregressive":
        return AutoregressiveCategorical(
            length, num_categories, order, conditioner, hidden_dims, embedding_dim, context_dim
        )
    if base == "groupwise":
        return GroupwiseCategorical(length, num_categories, embedding_dim=embedding_dim, context_dim=context_dim)
    if isinstance(base, str):
        raise OptionError(f"base must be one of {list(BASES)}, or a distribution of categories, got {base!r}")
    return base

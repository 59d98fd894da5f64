"""The recipes of the literature: each class says which layer it stacks, and which of its directions are parallel.

:class:`pyroflows.flows.stacking.StackedFlow` describes the arguments that they share. The recipes of splines stand in
:mod:`pyroflows.flows.spline_recipes`.
"""

from collections.abc import Sequence
from typing import Unpack

from torch.distributions import constraints

from pyroflows import transforms
from pyroflows.flows.base import Base
from pyroflows.flows.factories import (
    autoregressive,
    coupling,
    inverse_autoregressive,
    inverse_block_autoregressive,
    residual_block,
)
from pyroflows.flows.flow import Flow
from pyroflows.flows.stacking import Conditioner, StackedFlow, StackOptions, spell_out_options
from pyroflows.options import checked_int
from pyroflows.transforms import Elementwise, Triangular
from pyroflows.transforms.residual.log_det import LogDet
from pyroflows.transforms.univariate import Affine


class IAF(StackedFlow):
    r"""The inverse autoregressive flow (Kingma et al. 2016, arXiv:1606.04934): layers
    :math:`x_j = t_j(z_{<j}, c) + e^{s_j(z_{<j}, c)} z_j`.

    Sampling and scoring a fresh sample are parallel, so it suits a guide; scoring another value goes dimension by
    dimension. The arguments are those of :class:`pyroflows.flows.stacking.StackedFlow`.

    Example:
        >>> IAF(3, num_layers=2)().rsample((5,)).shape
        torch.Size([5, 3])
    """

    @spell_out_options
    def __init__(
        self,
        dim: int,
        num_layers: int = 4,
        hidden_dims: Sequence[int] = (32, 32),
        conditioner: Conditioner = "made",
        order: Sequence[int] | None = None,
        **options: Unpack[StackOptions],
    ) -> None:
        super().__init__(autoregressive(dim, "affine", hidden_dims, conditioner, order), num_layers, **options)


class MAF(StackedFlow):
    r"""The masked autoregressive flow (Papamakarios et al. 2017, arXiv:1705.07057): layers
    :math:`z_j = t_j(x_{<j}, c) + e^{s_j(x_{<j}, c)} x_j`, the inverses of those of :class:`IAF`.

    Scoring is parallel, so it suits a likelihood; sampling goes dimension by dimension. The arguments are those of
    :class:`pyroflows.flows.stacking.StackedFlow`.

    Example:
        >>> MAF(3, context_dim=2)(torch.zeros(5, 2)).log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    @spell_out_options
    def __init__(
        self,
        dim: int,
        num_layers: int = 5,
        hidden_dims: Sequence[int] = (64, 64),
        conditioner: Conditioner = "made",
        order: Sequence[int] | None = None,
        **options: Unpack[StackOptions],
    ) -> None:
        super().__init__(inverse_autoregressive(dim, "affine", hidden_dims, conditioner, order), num_layers, **options)


class NAF(StackedFlow):
    r"""The neural autoregressive flow (Huang et al. 2018, arXiv:1804.00779): layers
    :math:`z_j = T(x_j; \theta_j(x_{<j}, c))` with a monotone network T.

    Scoring is parallel, so it suits a likelihood; sampling goes dimension by dimension, with a root search in each. The
    arguments are those of :class:`pyroflows.flows.stacking.StackedFlow`.

    Example:
        >>> NAF(3, num_layers=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    @spell_out_options
    def __init__(
        self,
        dim: int,
        num_layers: int = 3,
        hidden_dims: Sequence[int] = (64, 64),
        conditioner: Conditioner = "made",
        order: Sequence[int] | None = None,
        **options: Unpack[StackOptions],
    ) -> None:
        super().__init__(
            inverse_autoregressive(dim, "monotone", hidden_dims, conditioner, order), num_layers, **options
        )


class BNAF(StackedFlow):
    r"""The block neural autoregressive flow (De Cao et al. 2019, arXiv:1904.04676): layers in which one masked network
    computes :math:`z_j` from :math:`x_{\le j}`, increasing in :math:`x_j`, see
    :class:`pyroflows.transforms.BlockAutoregressive`.

    It has far fewer parameters than a :class:`NAF`, whose networks compute the parameters of other networks. Scoring is
    parallel, so it suits a likelihood; sampling goes dimension by dimension, with a root search in each. The arguments
    are those of :class:`pyroflows.flows.stacking.StackedFlow`, except that ``hidden_dims`` are the numbers of hidden
    units that each dimension has: a layer of the network is D times as wide.

    Example:
        >>> BNAF(3, num_layers=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    @spell_out_options
    def __init__(
        self,
        dim: int,
        num_layers: int = 3,
        hidden_dims: Sequence[int] = (32,),
        order: Sequence[int] | None = None,
        **options: Unpack[StackOptions],
    ) -> None:
        super().__init__(inverse_block_autoregressive(dim, hidden_dims, order), num_layers, **options)


class SOS(StackedFlow):
    r"""The sum-of-squares polynomial flow (Jaini et al. 2019, arXiv:1905.02325): layers
    :math:`z_j = T(x_j; \theta_j(x_{<j}, c))`, where T is the integral of a sum of squared polynomials.

    Scoring is parallel, so it suits a likelihood; sampling goes dimension by dimension, with a root search in each. The
    arguments are those of :class:`pyroflows.flows.stacking.StackedFlow`.

    Example:
        >>> SOS(3, num_layers=2)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    @spell_out_options
    def __init__(
        self,
        dim: int,
        num_layers: int = 3,
        hidden_dims: Sequence[int] = (64, 64),
        conditioner: Conditioner = "made",
        order: Sequence[int] | None = None,
        **options: Unpack[StackOptions],
    ) -> None:
        super().__init__(inverse_autoregressive(dim, "sos", hidden_dims, conditioner, order), num_layers, **options)


class NICE(StackedFlow):
    r"""The flow of non-linear independent components (Dinh et al. 2015, arXiv:1410.8516): couplings
    :math:`x_B = z_B + t(z_A, c)`.

    A last layer shifts and scales each dimension, since the couplings preserve volume. Each coupling transforms the
    half of the dimensions that the one before passed unchanged. Sampling and scoring are parallel. The arguments are
    those of :class:`pyroflows.flows.stacking.StackedFlow`.

    Example:
        >>> NICE(3, num_layers=4)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    @spell_out_options
    def __init__(
        self,
        dim: int,
        num_layers: int = 6,
        hidden_dims: Sequence[int] = (64, 64),
        conditioner: Conditioner = "mlp",
        **options: Unpack[StackOptions],
    ) -> None:
        scale = Elementwise(dim, Affine(None, None))
        super().__init__(coupling(dim, "additive", hidden_dims, conditioner), num_layers, 2, [scale], **options)


class RealNVP(StackedFlow):
    r"""The real-valued non-volume-preserving flow (Dinh et al. 2017, arXiv:1605.08803): couplings
    :math:`x_B = t(z_A, c) + e^{s(z_A, c)} z_B`.

    Each coupling transforms the half of the dimensions that the one before passed unchanged. Sampling and scoring are
    parallel. The arguments are those of :class:`pyroflows.flows.stacking.StackedFlow`.

    Example:
        >>> x, log_q = RealNVP(3, mixing="lu")().rsample_and_log_prob((5,))
        >>> x.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    @spell_out_options
    def __init__(
        self,
        dim: int,
        num_layers: int = 6,
        hidden_dims: Sequence[int] = (64, 64),
        conditioner: Conditioner = "mlp",
        **options: Unpack[StackOptions],
    ) -> None:
        super().__init__(coupling(dim, "affine", hidden_dims, conditioner), num_layers, 2, **options)


class Planar(StackedFlow):
    """The planar flow, a stack of planar layers (Rezende and Mohamed 2015, arXiv:1505.05770), see
    :class:`pyroflows.transforms.Planar`.

    Sampling and scoring a fresh sample are parallel; scoring another value costs one scalar root search a layer. The
    arguments are those of :class:`pyroflows.flows.stacking.StackedFlow`. A planar layer sees all dimensions alike, so
    that "lu" as ``mixing`` adds to it and "permutation" does not.

    Example:
        >>> Planar(2, num_layers=8)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    @spell_out_options
    def __init__(self, dim: int, num_layers: int = 16, **options: Unpack[StackOptions]) -> None:
        super().__init__(lambda _, context_dim: transforms.Planar(dim, context_dim), num_layers, **options)


class Radial(StackedFlow):
    """The radial flow, a stack of radial layers (Rezende and Mohamed 2015, arXiv:1505.05770), see
    :class:`pyroflows.transforms.Radial`.

    Both directions are parallel and in closed form. The arguments are those of
    :class:`pyroflows.flows.stacking.StackedFlow`. A radial layer sees all dimensions alike, so that "lu" as ``mixing``
    adds to it and "permutation" does not.

    Example:
        >>> Radial(2, num_layers=8)().rsample((5,)).shape
        torch.Size([5, 2])
    """

    @spell_out_options
    def __init__(self, dim: int, num_layers: int = 16, **options: Unpack[StackOptions]) -> None:
        super().__init__(lambda _, context_dim: transforms.Radial(dim, context_dim), num_layers, **options)


class Sylvester(StackedFlow):
    """The Sylvester flow, a stack of Sylvester layers (van den Berg et al. 2018, arXiv:1803.05649), see
    :class:`pyroflows.transforms.Sylvester`.

    Sampling and scoring a fresh sample are parallel; scoring another value costs ``rank`` scalar root searches a layer.
    The other arguments are those of :class:`pyroflows.flows.stacking.StackedFlow`. A Sylvester layer sees all
    dimensions alike, so that "lu" as ``mixing`` adds to it and "permutation" does not.

    Args:
        rank: number of columns of Q, from 1 to D; None for 8, or D if that is smaller.

    Example:
        >>> Sylvester(3, num_layers=2)().rsample((5,)).shape
        torch.Size([5, 3])
    """

    @spell_out_options
    def __init__(self, dim: int, num_layers: int = 8, rank: int | None = None, **options: Unpack[StackOptions]) -> None:
        columns = min(dim, 8) if rank is None else rank
        super().__init__(lambda _, context_dim: transforms.Sylvester(dim, columns, context_dim), num_layers, **options)


class Residual(StackedFlow):
    r"""The residual flow (Chen et al. 2019, arXiv:1906.02735): layers :math:`z + g(z, c)`, where g is a contraction,
    see :class:`pyroflows.transforms.Residual`, each with a location and scale of each dimension, since a residual layer
    stretches by less than a factor of 2.

    Every output of a block depends freely on every input. The other direction takes an iteration in each block, which
    converges to float precision. The other arguments are those of :class:`pyroflows.flows.stacking.StackedFlow`.

    Args:
        num_blocks: number of blocks, at least 1.
        coefficient: the bound of the slope of g, between 0 and 1.
        activation: "sine", "tanh" or "lipswish".
        log_det: how training computes log-determinants, "exact", "roulette" for estimates without bias, or an instance
            of a class of :mod:`pyroflows.transforms.residual`; None for "exact" in up to 16 dimensions, where it costs
            about the same with the default widths, and "roulette" above. Reported densities are exact in any case.
        parallel: the direction that is one pass, "scoring" for a likelihood, or "sampling" for a guide, whose own draws
            are then scored in the same pass.

    Example:
        >>> density = Residual(3, num_blocks=2)
        >>> density().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
        >>> x, log_q = Residual(3, num_blocks=2, parallel="sampling")().rsample_and_log_prob((5,))
    """

    @spell_out_options
    def __init__(
        self,
        dim: int,
        num_blocks: int = 8,
        hidden_dims: Sequence[int] = (64,),
        coefficient: float = 0.97,
        activation: str = "sine",
        log_det: str | LogDet | None = None,
        parallel: str = "scoring",
        **options: Unpack[StackOptions],
    ) -> None:
        num_blocks = checked_int("num_blocks", num_blocks)
        block = residual_block(dim, hidden_dims, coefficient, activation, log_det, parallel)
        super().__init__(block, num_blocks, **options)


class Gaussian(Flow):
    """The flow of one triangular layer, a Gaussian of full covariance if its base is normal.

    Sampling and scoring are parallel, see :class:`pyroflows.transforms.Triangular`.

    Args:
        dim: the event size D.
        context_dim: size of the context, 0 for none.
        base: base distribution, see :class:`pyroflows.Flow`.
        support: the constraint that the data meet, see :class:`pyroflows.Flow`.

    Example:
        >>> Gaussian(2)().log_prob(torch.zeros(2))
        tensor(-1.8379, grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int = 0,
        base: Base = None,
        support: constraints.Constraint | None = None,
    ) -> None:
        super().__init__([Triangular(dim, context_dim)], base, support)

"""The recipes of spline flows, on real numbers and on circles; :mod:`pyroflows.flows.recipes` has all others."""

from collections.abc import Sequence
from typing import Unpack

from pyroflows.constraints import angles_in, circular
from pyroflows.errors import OptionError
from pyroflows.flows.factories import coupling, inverse_autoregressive
from pyroflows.flows.stacking import Conditioner, LayerFactory, StackedFlow, StackOptions, spell_out_options
from pyroflows.transforms.univariate import ByColumn, CircularSpline, Spline, Univariate


class NSF(StackedFlow):
    r"""The neural spline flow (Durkan et al. 2019, arXiv:1906.04032): layers of monotone rational-quadratic splines on
    :math:`[-B, B]`, which are the identity outside and whose knots depend on other dimensions.

    With couplings, sampling and scoring are parallel. With autoregressive layers, which are stronger, scoring is
    parallel and sampling goes dimension by dimension. The other arguments are those of
    :class:`pyroflows.flows.stacking.StackedFlow`.

    Args:
        conditioner: the network of each layer; None for "made" in autoregressive layers and "mlp" in couplings.
        bins: number of bins of a spline, from 2 to 999.
        bound: B > 0; each layer leaves values beyond it as they are, so most of the data should lie within.
        autoregressive: whether the layers are inverses of autoregressive layers, rather than couplings.

    Example:
        >>> NSF(3, bins=4)().rsample((5,)).shape
        torch.Size([5, 3])
        >>> NSF(3, bins=4, autoregressive=True)().log_prob(torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    @spell_out_options
    def __init__(
        self,
        dim: int,
        num_layers: int = 5,
        hidden_dims: Sequence[int] = (64, 64),
        conditioner: Conditioner | None = None,
        bins: int = 8,
        bound: float = 5.0,
        autoregressive: bool = False,
        order: Sequence[int] | None = None,
        **options: Unpack[StackOptions],
    ) -> None:
        spline = Spline(bins=bins, bound=bound)
        layer, between = _spline_layers(dim, spline, hidden_dims, conditioner, autoregressive, order)
        super().__init__(layer, num_layers, between, **options)


class CircularNSF(StackedFlow):
    r"""The neural spline flow on circles (Rezende et al. 2020, arXiv:2002.02428): layers of circular rational-quadratic
    splines with a phase shift, whose parameters depend on the cosines and sines of other angles.

    It is a density of angles in radians, from :math:`-\pi` to :math:`\pi`, that is continuous all around the circle or
    torus, at first the uniform one. Other columns may be real or bounded, and then have the splines of :class:`NSF`
    in the same layers. The other arguments are those of :class:`pyroflows.flows.stacking.StackedFlow`.

    Args:
        conditioner: the network of each layer; None for "made" in autoregressive layers and "mlp" in couplings.
        bins: number of bins of a spline, from 2 to 999.
        bound: of the splines of columns that are not angles, as in :class:`NSF`.
        autoregressive: whether the layers are inverses of autoregressive layers, rather than couplings.
        support: None if all columns are angles; otherwise ``constraints.cat([...], dim=-1, lengths=[...])`` with
            ``pf.constraints.circular`` for those that are.

    Raises:
        OptionError: if no column is an angle, or if ``mixing`` would mix angles with other columns.

    Example:
        >>> flow = CircularNSF(2, bins=4)
        >>> flow().sample((5,)).abs().max() <= torch.pi
        tensor(True)
        >>> constraints = torch.distributions.constraints
        >>> columns = constraints.cat([pf.constraints.circular, constraints.positive], dim=-1)
        >>> (CircularNSF(2, bins=4, support=columns)().sample((5,))[:, 1] > 0).all()
        tensor(True)
    """

    @spell_out_options
    def __init__(
        self,
        dim: int,
        num_layers: int = 5,
        hidden_dims: Sequence[int] = (64, 64),
        conditioner: Conditioner | None = None,
        bins: int = 8,
        bound: float = 5.0,
        autoregressive: bool = False,
        order: Sequence[int] | None = None,
        **options: Unpack[StackOptions],
    ) -> None:
        support = options.get("support")
        angles = angles_in(circular if support is None else support, dim)
        if not any(angles):
            raise OptionError(f"no column of the support {support} is an angle, pf.constraints.circular: use NSF")
        kinds = {True: CircularSpline(bins), False: Spline(bins, bound)}
        univariate = kinds[True] if all(angles) else ByColumn([kinds[is_angle] for is_angle in angles])
        layer, between = _spline_layers(dim, univariate, hidden_dims, conditioner, autoregressive, order)
        super().__init__(layer, num_layers, between, **options)


def _spline_layers(
    dim: int,
    univariate: Univariate,
    hidden_dims: Sequence[int],
    conditioner: Conditioner | None,
    autoregressive: bool,
    order: Sequence[int] | None,
) -> tuple[LayerFactory, int]:
    """Return the layers of a spline flow, and the number of them between two that mix."""
    if autoregressive:
        return inverse_autoregressive(dim, univariate, hidden_dims, conditioner or "made", order), 1
    if order is not None:
        raise OptionError("couplings have no order: give one with autoregressive=True only")
    return coupling(dim, univariate, hidden_dims, conditioner or "mlp"), 2

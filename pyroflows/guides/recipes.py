"""Flow guides by name: :class:`AutoFlow` with one of the recipes of :mod:`pyroflows.flows`."""

from collections.abc import Sequence
from typing import Any

from pyroflows.flows import Recipe
from pyroflows.guides.packed import AutoFlow
from pyroflows.models.structure import Model


class AutoPlanar(AutoFlow):
    """A guide of planar layers; see :class:`pyroflows.flows.Planar`. Good at few dimensions and several modes.

    Args:
        model: a Pyro model.
        num_layers: number of layers.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.
    """

    def __init__(self, model: Model, num_layers: int = 16, **options: Any) -> None:
        super().__init__(model, Recipe("Planar", num_layers=num_layers), **options)


class AutoRadial(AutoFlow):
    """A guide of radial layers; see :class:`pyroflows.flows.Radial`.

    Args:
        model: a Pyro model.
        num_layers: number of layers.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.
    """

    def __init__(self, model: Model, num_layers: int = 16, **options: Any) -> None:
        super().__init__(model, Recipe("Radial", num_layers=num_layers), **options)


class AutoSylvester(AutoFlow):
    """A guide of Sylvester layers; see :class:`pyroflows.flows.Sylvester`.

    Args:
        model: a Pyro model.
        num_layers: number of layers.
        rank: number of columns of Q, 1 to the latent dimension; by default the smaller of it and 8.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.
    """

    def __init__(self, model: Model, num_layers: int = 8, rank: int | None = None, **options: Any) -> None:
        super().__init__(model, Recipe("Sylvester", num_layers=num_layers, rank=rank), **options)


class AutoIAF(AutoFlow):
    """A guide of affine inverse autoregressive layers; see :class:`pyroflows.flows.IAF`. The best first choice.

    With its defaults it is what :class:`AutoFlow` makes by itself for 2 to 64 latents.

    Args:
        model: a Pyro model.
        num_layers: number of layers.
        hidden_dims: widths of the hidden layers of the masked networks.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.
    """

    def __init__(
        self, model: Model, num_layers: int = 4, hidden_dims: Sequence[int] = (32, 32), **options: Any
    ) -> None:
        super().__init__(model, Recipe("IAF", num_layers=num_layers, hidden_dims=hidden_dims), **options)


class AutoRealNVP(AutoFlow):
    """A guide of affine couplings; see :class:`pyroflows.flows.RealNVP`. Fast at drawing and at scoring any value.

    Args:
        model: a Pyro model. Of a single latent the guide stays an affine map of the base: a Gaussian.
        num_layers: number of layers.
        hidden_dims: widths of the hidden layers of the conditioners.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.
    """

    def __init__(
        self, model: Model, num_layers: int = 6, hidden_dims: Sequence[int] = (64, 64), **options: Any
    ) -> None:
        super().__init__(model, Recipe("RealNVP", num_layers=num_layers, hidden_dims=hidden_dims), **options)


class AutoSpline(AutoFlow):
    """A guide of spline couplings; see :class:`pyroflows.flows.NSF`. Stronger and dearer a layer than affine ones.

    Args:
        model: a Pyro model.
        num_layers: number of layers.
        hidden_dims: widths of the hidden layers of the conditioners.
        bins: number of bins of a spline.
        bound: splines act where a component of the standardised latent is below this in size.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.
    """

    def __init__(
        self,
        model: Model,
        num_layers: int = 5,
        hidden_dims: Sequence[int] = (64, 64),
        bins: int = 8,
        bound: float = 5.0,
        **options: Any,
    ) -> None:
        recipe = Recipe("NSF", num_layers=num_layers, hidden_dims=hidden_dims, bins=bins, bound=bound)
        super().__init__(model, recipe, **options)

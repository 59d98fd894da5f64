"""Flow guides by name: :class:`AutoFlow` with one of the recipes of :mod:`pyroflows.flows`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from pyroflows import flows
from pyroflows.guides.flow import AutoFlow
from pyroflows.model import Model


class AutoPlanar(AutoFlow):
    """A guide of planar layers; see :class:`pyroflows.flows.Planar`. Good at few dimensions and several modes.

    Args:
        model: a Pyro model.
        num_layers: number of layers.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.
    """

    def __init__(self, model: Model, num_layers: int = 16, **options: Any) -> None:
        super().__init__(model, partial(flows.Planar, num_layers=num_layers), **options)


class AutoRadial(AutoFlow):
    """A guide of radial layers; see :class:`pyroflows.flows.Radial`.

    Args:
        model: a Pyro model.
        num_layers: number of layers.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.
    """

    def __init__(self, model: Model, num_layers: int = 16, **options: Any) -> None:
        super().__init__(model, partial(flows.Radial, num_layers=num_layers), **options)


class AutoSylvester(AutoFlow):
    """A guide of Sylvester layers; see :class:`pyroflows.flows.Sylvester`.

    Args:
        model: a Pyro model.
        num_layers: number of layers.
        rank: number of columns of Q, 1 to the latent dimension; by default the smaller of it and 8.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.
    """

    def __init__(self, model: Model, num_layers: int = 8, rank: int | None = None, **options: Any) -> None:
        super().__init__(model, partial(flows.Sylvester, num_layers=num_layers, rank=rank), **options)


class AutoIAF(AutoFlow):
    """A guide of affine inverse autoregressive layers; see :class:`pyroflows.flows.IAF`. The best first choice.

    Args:
        model: a Pyro model.
        num_layers: number of layers.
        hidden_dims: widths of the masked networks.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.
    """

    def __init__(
        self, model: Model, num_layers: int = 4, hidden_dims: Sequence[int] = (64, 64), **options: Any
    ) -> None:
        super().__init__(model, partial(flows.IAF, num_layers=num_layers, hidden_dims=hidden_dims), **options)

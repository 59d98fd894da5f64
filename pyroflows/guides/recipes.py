"""Flow guides by name, each :class:`AutoFlow` with one recipe of :mod:`pyroflows.flows`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyroflows.flows import Flow, Recipe
from pyroflows.guides.centering import Centering
from pyroflows.guides.packed import AutoFlow
from pyroflows.models.tracing import Model


class AutoPlanar(AutoFlow):
    """A guide of planar layers, which suits few dimensions and several modes; see :class:`pyroflows.flows.Planar`.

    Args:
        model: a Pyro model.
        num_layers: number of layers, at least 1.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.

    Example:
        >>> guide = AutoPlanar(lambda: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
        >>> guide()["x"].shape
        torch.Size([3])
    """

    def __init__(self, model: Model, num_layers: int = 16, **options: Any) -> None:
        super().__init__(model, Recipe("Planar", num_layers=num_layers), **options)


class AutoRadial(AutoFlow):
    """A guide of radial layers; see :class:`pyroflows.flows.Radial`.

    Args:
        model: a Pyro model.
        num_layers: number of layers, at least 1.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.

    Example:
        >>> guide = AutoRadial(lambda: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
        >>> guide()["x"].shape
        torch.Size([3])
    """

    def __init__(self, model: Model, num_layers: int = 16, **options: Any) -> None:
        super().__init__(model, Recipe("Radial", num_layers=num_layers), **options)


class AutoSylvester(AutoFlow):
    """A guide of Sylvester layers; see :class:`pyroflows.flows.Sylvester`.

    Args:
        model: a Pyro model.
        num_layers: number of layers, at least 1.
        rank: number of columns of Q, from 1 to the latent dimension; None for 8, or the dimension if smaller.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.

    Example:
        >>> guide = AutoSylvester(lambda: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
        >>> guide()["x"].shape
        torch.Size([3])
    """

    def __init__(self, model: Model, num_layers: int = 8, rank: int | None = None, **options: Any) -> None:
        super().__init__(model, Recipe("Sylvester", num_layers=num_layers, rank=rank), **options)


class AutoIAF(AutoFlow):
    """A guide of affine inverse autoregressive layers, the best first choice; see :class:`pyroflows.flows.IAF`.

    Its networks are :class:`pyroflows.nets.ScaledMADE`, which plain SVI trains at learning rates up to 0.05. With these
    defaults the flow is that of :class:`AutoFlow` without ``flow_fn`` for 2 to 64 latents.

    Args:
        model: a Pyro model.
        num_layers: number of layers, at least 1.
        hidden_dims: widths of the hidden layers of the masked networks.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.

    Example:
        >>> guide = AutoIAF(lambda: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
        >>> guide()["x"].shape
        torch.Size([3])
    """

    def __init__(
        self, model: Model, num_layers: int = 4, hidden_dims: Sequence[int] = (32, 32), **options: Any
    ) -> None:
        recipe = Recipe("IAF", num_layers=num_layers, hidden_dims=hidden_dims, conditioner="scaled_made")
        super().__init__(model, recipe, **options)


class AutoRealNVP(AutoFlow):
    """A guide of affine couplings, quick both to draw and to score; see :class:`pyroflows.flows.RealNVP`.

    Its networks are :class:`pyroflows.nets.ScaledMLP`, which plain SVI trains at learning rates up to 0.05.

    Args:
        model: a Pyro model; if it has a single latent, the guide is a Gaussian.
        num_layers: number of layers, at least 1.
        hidden_dims: widths of the hidden layers of the conditioners.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.

    Example:
        >>> guide = AutoRealNVP(lambda: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
        >>> guide()["x"].shape
        torch.Size([3])
    """

    def __init__(
        self, model: Model, num_layers: int = 6, hidden_dims: Sequence[int] = (64, 64), **options: Any
    ) -> None:
        recipe = Recipe("RealNVP", num_layers=num_layers, hidden_dims=hidden_dims, conditioner="scaled_mlp")
        super().__init__(model, recipe, **options)


class AutoSpline(AutoFlow):
    """A guide of spline couplings, more flexible and slower than affine ones; see :class:`pyroflows.flows.NSF`.

    Its networks are :class:`pyroflows.nets.ScaledMLP`, which plain SVI trains at learning rates up to 0.05.

    Args:
        model: a Pyro model.
        num_layers: number of layers, at least 1.
        hidden_dims: widths of the hidden layers of the conditioners.
        bins: number of bins of a spline, at least 2.
        bound: half the width of the interval around zero on which splines act, in the standardised space, positive.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.

    Example:
        >>> guide = AutoSpline(lambda: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
        >>> guide()["x"].shape
        torch.Size([3])
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
        recipe = Recipe(
            "NSF",
            num_layers=num_layers,
            hidden_dims=hidden_dims,
            bins=bins,
            bound=bound,
            conditioner="scaled_mlp",
        )
        super().__init__(model, recipe, **options)


class AutoResidual(AutoFlow):
    """A guide of residual layers, in which every latent depends freely on every other; see
    :class:`pyroflows.flows.Residual`.

    Its networks are contractions for all parameters, so that plain SVI trains them at learning rates up to 0.05.

    Args:
        model: a Pyro model.
        num_blocks: number of blocks, at least 1.
        hidden_dims: widths of the hidden layers of the residual networks.
        coefficient: the bound of the slope of the networks, between 0 and 1.
        parallel: the direction that is one pass, "sampling", which training and importance sampling use, or "scoring",
            which takes an iteration for each draw and one pass for the density of given values.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.

    Example:
        >>> guide = AutoResidual(lambda: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
        >>> guide()["x"].shape
        torch.Size([3])
    """

    def __init__(
        self,
        model: Model,
        num_blocks: int = 4,
        hidden_dims: Sequence[int] = (64,),
        coefficient: float = 0.97,
        parallel: str = "sampling",
        **options: Any,
    ) -> None:
        recipe = Recipe(
            "Residual", num_blocks=num_blocks, hidden_dims=hidden_dims, coefficient=coefficient, parallel=parallel
        )
        super().__init__(model, recipe, **options)


class AutoCNF(AutoFlow):
    """A guide of one continuous layer, in which every latent depends freely on every other; see
    :class:`pyroflows.flows.CNF`.

    Training takes equal steps of the solver, so that a step compiles; verdicts, and draws without gradients, are
    adaptive. Unlike that of other guides, the last layer is triangular: it takes the correlations, for which the
    continuous layer would need a steep field. Where the field gets steep nevertheless, so that the equal steps are too
    few, the ELBO of training is too high, and the verdict shows it: give more steps.
    ``pf.FlowVI(model, pf.flows.Recipe("CNF", hidden_dims=(64, 64)))`` starts at the Gaussian of the posterior instead,
    and trains in less time. Plain SVI trains the guide at a learning rate of 0.01.

    Args:
        model: a Pyro model.
        hidden_dims: widths of the hidden layers of the velocity network.
        num_steps: number of equal steps of a solve in training, four evaluations each.
        options: ``init_loc_fn``, ``init_scale`` and ``dtype`` of :class:`AutoFlow`.

    Example:
        >>> guide = AutoCNF(lambda: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1)))
        >>> guide()["x"].shape
        torch.Size([3])
    """

    def __init__(self, model: Model, hidden_dims: Sequence[int] = (64, 64), num_steps: int = 8, **options: Any) -> None:
        super().__init__(model, Recipe("CNF", hidden_dims=hidden_dims, num_steps=num_steps), **options)

    def _flow_at(self, loc: Tensor, scale: Tensor | None = None, centering: Centering | None = None) -> Flow:
        if scale is None:
            scale = self._init_scale * torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
        return super()._flow_at(loc, scale, centering)

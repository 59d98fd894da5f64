"""A flow on the latents of a Pyro model, which draws and scores values by site."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.compiling.check import Compiler
from pyroflows.errors import ModelError, OptionError
from pyroflows.flows import Flow
from pyroflows.grad_mode import with_gradients
from pyroflows.guides import AutoFlow
from pyroflows.guides.packed import NOT_BUILT
from pyroflows.inference.predictive import posterior_predictive
from pyroflows.models.arguments import explain_failure, in_dtype, usable_arguments
from pyroflows.models.batching import NUM_EXAMPLES, BatchedModel
from pyroflows.models.fixed_supports import require_fixed_supports
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.requirements import check_static, describe_for_flow, require_full_plates
from pyroflows.models.tracing import Model
from pyroflows.randomness import seeded


class Approximation:
    """What a flow guide and the arguments of its model give without a judgement of the fit: draws and densities.

    Args:
        model: the Pyro model.
        guide: a flow guide of the model, built.
        args: the model's positional arguments.
        kwargs: the model's keyword arguments.
        compile: how the log joint is compiled for chains, as for :class:`pyroflows.FlowVI`.
        log_joint: the log joint of the model with these arguments, if a fit has made it; None to make it when needed.

    Raises:
        ModelError: if the guide is not built yet, or the model shows other latents than the guide's.
    """

    def __init__(
        self, model: Model, guide: AutoFlow, args: Any, kwargs: Any, compile: str, log_joint: LogJoint | None
    ) -> None:
        if guide.layout is None or guide.flow is None:
            raise ModelError(NOT_BUILT)
        self.model = model
        self.guide = guide
        self._model = in_dtype(model, guide.dtype)
        self._args, self._kwargs = usable_arguments(self._model, args, kwargs, guide.dtype)
        self._compile = compile
        self._flow = guide.flow
        self._center = _median(self._flow)
        self._init_fn = init_to_value(values=guide.layout.constrain(self._center)[0])
        if log_joint is None:
            structure, _ = describe_for_flow(self._model, self._args, self._kwargs, self._init_fn)
            require_fixed_supports(structure, self._model, self._args, self._kwargs)
            check_static(guide.layout.structure, structure)
            self.layout = Layout(structure).at_centers(guide.layout.centers)
        else:
            self.log_joint = log_joint
            self.layout = log_joint.layout
        self.structure = self.layout.structure

    @cached_property
    @with_gradients
    def log_joint(self) -> LogJoint:
        """The log joint of the model with these arguments, made at the first use."""
        with seeded(0), torch.no_grad():
            examples = self._flow().sample((NUM_EXAMPLES,))
        return LogJoint(self._model, self._args, self._kwargs, self.layout, examples, Compiler(self._compile))

    @with_gradients
    def sample(self, num_samples: int) -> dict[str, Tensor]:
        """Draw latents from the flow, in the constrained space, and the deterministic sites that follow from them.

        Args:
            num_samples: number of draws, at least 1.

        Returns:
            Tensors ``(num_samples, *site shape)`` by site.

        Raises:
            OptionError: if ``num_samples`` is not a positive integer.
        """
        return self._sites(self._draw(num_samples))

    def log_prob(self, draws: Mapping[str, Tensor]) -> Tensor:
        """The log-density of the flow at values of all latent sites, as a density on the constrained space, ``(S,)``.

        Args:
            draws: tensors ``(S, *site shape)`` by site.

        Raises:
            ShapeError: if a latent site is missing or has another shape.
            DataError: if a value is outside of its site's support.
        """
        self.layout.check_draws(draws)
        vectors = self.layout.unconstrain(draws).to(self._center)
        _, ladj = self.layout.constrain(vectors)
        with torch.no_grad():
            return self._flow().log_prob(vectors) - ladj

    @with_gradients
    def predictive(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw observed and deterministic sites given draws from the flow, ``(num_samples, *site shape)`` by site.

        Observed sites are drawn even where the arguments give them values.

        Args:
            num_samples: number of draws, at least 1.
            args: arguments of the model, for instance new inputs; those of the fit if none are given.
            kwargs: keyword arguments of the model.

        Raises:
            OptionError: if ``num_samples`` is not a positive integer.
            ModelError: if a latent site has another shape at these arguments.
            DataError: if the model fails because an argument holds NaN, infinite values, or something other than
                numbers; names the argument.

        Example:
            >>> def model(x, y=None):
            ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("rows", len(x)):
            ...         pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)
            >>> x = torch.arange(3.0)
            >>> posterior = pf.FlowVI(model, seed=0, progress_bar=False).run(x, 2 * x)
            >>> posterior.predictive(100, torch.arange(5.0))["y"].shape
            torch.Size([100, 5])
        """
        values, _ = self.layout.constrain(self._draw(num_samples))
        if args or kwargs:
            args, kwargs = usable_arguments(self._model, args, kwargs, self.guide.dtype)
            try:
                batched = BatchedModel(self._model, args, kwargs, values, draw=True, kept=self.structure.kept)
            except (ValueError, RuntimeError) as error:
                explain_failure(self._model, args, kwargs, error)
                raise
        else:
            batched = self.log_joint.batched.drawing(values, self.structure.kept)
        return posterior_predictive(batched, values, num_samples)

    def _draw(self, num_samples: int) -> Tensor:
        """Draw unconstrained vectors ``(S, dim)`` from the flow."""
        _check_number(num_samples)
        return self._flow().sample((num_samples,))

    @torch.no_grad()
    def _latents(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draw unconstrained vectors ``(S, dim)`` from the flow, and give their log-densities ``(S,)``."""
        _check_number(num_samples)
        return self._flow().rsample_and_log_prob((num_samples,))

    def _sites(self, latents: Tensor) -> dict[str, Tensor]:
        """Latent and deterministic sites, except those in a subsampled plate, whose rows differ from run to run.

        Entries of latents that are masked and have no posterior are drawn from their prior given the rest.
        """
        values, _ = self.layout.constrain(latents)
        kept = self.structure.kept
        subsampled = {plate.name for plate in self.structure.subsampled}
        names = [site.name for site in self.structure.deterministic if not subsampled.intersection(site.plate_names)]
        if not names and not kept:
            return values
        batched = self.log_joint.batched.filling(values, kept) if kept else self.log_joint.batched
        recorded = batched.in_chunks(values, len(latents)).values
        return {name: recorded[name] for name in (*values, *names)}

    def _require_full_plates(self) -> None:
        require_full_plates(
            self.structure, "use posterior.with_data(...) with arguments for which the model runs on all rows"
        )


def _check_number(num_samples: int) -> None:
    if not isinstance(num_samples, int) or num_samples < 1:
        raise OptionError(f"num_samples must be positive and an integer, got {num_samples!r}")


@torch.no_grad()
def _median(flow: Flow) -> Tensor:
    with seeded(0):
        return flow().sample((100,)).median(0).values

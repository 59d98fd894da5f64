"""A flow on the latents of a Pyro model, which draws and scores values by site."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.compiling.check import Compiler
from pyroflows.errors import ModelError, OptionError
from pyroflows.exclusive import exclusive_property
from pyroflows.flows import Flow
from pyroflows.grad_mode import isolated
from pyroflows.guides import AutoFlow
from pyroflows.guides.packed import NOT_BUILT
from pyroflows.inference.discrete_sites import completed, local_draws, without_local
from pyroflows.inference.local import draw_amortized
from pyroflows.inference.predictive import posterior_predictive
from pyroflows.models.arguments import (
    explain_failure,
    in_dtype,
    require_arguments,
    require_own_options,
    usable_arguments,
)
from pyroflows.models.batching import NUM_EXAMPLES, BatchedModel
from pyroflows.models.fixed_supports import require_fixed_supports
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.requirements import check_static, describe_for_flow, require_full_plates
from pyroflows.models.run import OtherRowsError
from pyroflows.models.structure import ModelStructure
from pyroflows.models.tracing import Model
from pyroflows.options import checked_int
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
            self.layout = self._found_layout()
        else:
            self.log_joint = log_joint
            self.layout = log_joint.layout
        self.structure = self.layout.structure

    def _found_layout(self) -> Layout:
        """The layout of the latents that the model shows at these arguments."""
        assert self.guide.layout is not None
        structure, _ = describe_for_flow(self._model, self._args, self._kwargs, self._init_fn)
        require_fixed_supports(structure, self._model, self._args, self._kwargs)
        check_static(self.guide.layout.structure, structure)
        return Layout(structure).at_centers(self.guide.layout.centers)

    @exclusive_property
    @isolated
    def log_joint(self) -> LogJoint:
        """The log joint of the model with these arguments, made at the first use."""
        with seeded(0):
            with torch.no_grad():
                examples = self._flow().sample((NUM_EXAMPLES,))
            return LogJoint(self._model, self._args, self._kwargs, self.layout, examples, Compiler(self._compile))

    @isolated
    def sample(self, num_samples: int, seed: int | None = None) -> dict[str, Tensor]:
        """Draw latents from the flow, in the constrained space, and the deterministic sites that follow from them.

        Discrete latents, which the fit sums out, are drawn from their joint conditional given the others.

        Args:
            num_samples: number of draws, at least 1.
            seed: seed that makes the draws reproducible and leaves the global generator as it was; None to use the
                global generator.

        Returns:
            Tensors ``(num_samples, *site shape)`` by site.

        Raises:
            OptionError: if ``num_samples`` is not a positive integer.

        Example:
            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            >>> posterior = pf.FlowVI(model, seed=0, progress_bar=False).run(torch.tensor(1.0))
            >>> torch.equal(posterior.sample(5, seed=1)["mu"], posterior.sample(5, seed=1)["mu"])
            True
        """
        with seeded(seed):
            return self._sites(self._draw(num_samples))

    def log_prob(self, draws: Mapping[str, Any]) -> Tensor:
        """The log-density of the flow at values of all latent sites, as a density on the constrained space, ``(S,)``.

        Args:
            draws: tensors or arrays ``(S, *site shape)`` by site. Those of discrete, deterministic and observed sites
                are no part of the density.

        Raises:
            OptionError: if a name is that of no site.
            ShapeError: if a latent site is missing or has another shape.
            DataError: if a value is outside of its site's support.
        """
        self._require_sites(draws)
        draws = {site.name: torch.as_tensor(draws[site.name]) for site in self.structure.latents if site.name in draws}
        self.layout.check_draws(draws)
        vectors = self.layout.unconstrain(draws).to(self._center)
        _, ladj = self.layout.constrain(vectors)
        with torch.no_grad():
            return self._flow().log_prob(vectors) - ladj

    @isolated
    def predictive(self, num_samples: int, *args: Any, seed: int | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """Draw observed and deterministic sites given draws from the flow, ``(num_samples, *site shape)`` by site.

        Observed sites are drawn even where the arguments give them values, in the shape of these values. Latents are
        those of the fit, whatever values are given; but if :class:`pyroflows.guides.AutoStructuredFlow` has encoders
        for all rows, their latents are drawn given these values, and there may be other rows.

        At other arguments, discrete latents in a plate of data or in ``pyro.markov`` are drawn anew, and returned too:
        given the data, where the arguments hold some, and from their prior elsewhere. Other discrete latents keep the
        draws that they have given the data of the fit.

        Args:
            num_samples: number of draws, at least 1. A model with an argument of this name gets it by position.
            args: arguments of the model, for instance new inputs; those of the fit if none are given.
            seed: seed that makes the draws reproducible and leaves the global generator as it was; None to use the
                global generator. A model with an argument of this name gets it by position.
            kwargs: keyword arguments of the model.

        Raises:
            OptionError: if ``num_samples`` is not a positive integer, or the model does not take these arguments.
            ModelError: if a latent site has another shape at these arguments (the message says how to draw it anew for
                other rows), if the distribution of a site cannot be drawn from, or if the model has neither observed
                nor deterministic sites; names the site.
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
        require_own_options({"seed": seed is not None}, self._model, args)
        if args or kwargs:
            require_arguments(self._model, args, kwargs)
        with seeded(seed):
            predicted = self._predicted(num_samples, args, kwargs)
        if not predicted:
            raise ModelError(_nothing_to_predict(self.structure))
        return predicted

    def _predicted(self, num_samples: int, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Draw all sites but the latents given draws from the flow; with the arguments of the fit if none are given."""
        values, kept = self.layout.constrain(self._draw(num_samples))[0], self.structure.kept
        if self.structure.enumerated:
            self._require_full_plates()
            values |= self.log_joint.batched.discrete_draws.in_chunks(values, num_samples).values
        local: dict[str, Tensor] = {}
        if args or kwargs:
            args, kwargs = usable_arguments(self._model, args, kwargs, self.guide.dtype)
            try:
                if self.structure.enumerated:
                    values = without_local(self.structure, values)
                    local = local_draws(self._model, args, kwargs, self.structure, values, num_samples)
                    values |= local
                values, kept = draw_amortized(self._model, self.guide, args, kwargs, num_samples) or (values, kept)
                batched = BatchedModel(self._model, args, kwargs, values, draw=True, kept=kept)
            except OtherRowsError as error:
                raise ModelError(f"{error}. {_way_to_other_rows(error, self.structure, num_samples)}") from error
            except (ValueError, RuntimeError) as error:
                explain_failure(self._model, args, kwargs, error)
                raise
        else:
            batched = self.log_joint.batched.drawing(values, self.structure.kept)
        return local | posterior_predictive(batched, values, num_samples)

    def _draw(self, num_samples: int) -> Tensor:
        """Draw unconstrained vectors ``(S, dim)`` from the flow."""
        return self._flow().sample((checked_int("num_samples", num_samples),))

    @torch.no_grad()
    def _latents(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draw unconstrained vectors ``(S, dim)`` from the flow, and give their log-densities ``(S,)``."""
        return self._flow().rsample_and_log_prob((checked_int("num_samples", num_samples),))

    def _sites(self, latents: Tensor) -> dict[str, Tensor]:
        """Latent and deterministic sites, except those in a subsampled plate; see :func:`completed`."""
        values, _ = self.layout.constrain(latents)
        structure = self.structure
        if not structure.deterministic and not structure.enumerated and not structure.kept:
            return values
        return completed(self.log_joint.batched, structure, values, len(latents))

    def _require_sites(self, names: Iterable[str]) -> None:
        """Raise if a name is that of no site."""
        structure = self.structure
        sites = (*structure.latents, *structure.enumerated, *structure.deterministic, *structure.observed)
        known = [site.name for site in sites]
        for name in names:
            if name not in known:
                raise OptionError(f"the model has no site {name!r}: its sites are {', '.join(map(repr, known))}")

    def _require_full_plates(self) -> None:
        require_full_plates(
            self.structure, "use posterior.with_data(...) with arguments for which the model runs on all rows"
        )


def _nothing_to_predict(structure: ModelStructure) -> str:
    """Say why a model without observed and deterministic sites predicts nothing."""
    if not structure.factors:
        return "there is nothing to predict, since the model has neither observed nor deterministic sites"
    return (
        f"there is nothing to predict: data enter this model by pyro.factor('{structure.factors[0].name}', ...), which "
        "weights the latents and has no law to draw from. Observe them by pyro.sample(..., obs=...), or compute what "
        "is to be predicted by pyro.deterministic"
    )


def _way_to_other_rows(error: OtherRowsError, structure: ModelStructure, num_samples: int) -> str:
    """Say, as code that runs, how to draw the latents of other rows from their prior given all other latents."""
    resized = {
        name for name, size in error.sizes.items() if name in structure.plates and structure.plates[name].size != size
    }
    others = [s.name for s in structure.latents if s.name != error.site and not resized.intersection(s.plate_names)]
    given = f"draws = posterior.sample({num_samples}); pyro.infer.Predictive(model, {{k: draws[k] for k in {others}}})"
    if not others:
        given = f"pyro.infer.Predictive(model, num_samples={num_samples})"
    return (
        f"To draw such latents anew, from their prior given all others, for rows that are none of those of the fit: "
        f"{given}(...), with these arguments and without observed values"
    )


@torch.no_grad()
def _median(flow: Flow) -> Tensor:
    with seeded(0):
        return flow().sample((100,)).median(0).values

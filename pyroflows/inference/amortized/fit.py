"""Fit a flow to simulations of a Pyro model, so that it is the posterior at any value of the data."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.constraints import angles_in
from pyroflows.errors import OptionError, ShapeError
from pyroflows.fitting.density import LEARNING_RATE, fit_density
from pyroflows.fitting.methods import fit_method, require_options
from pyroflows.flows import NSF, Flow, Mixture, Recipe
from pyroflows.flows.discrete.refusal import require_real
from pyroflows.flows.embedded import checked_embedding, with_embedding
from pyroflows.grad_mode import isolated
from pyroflows.inference.amortized.amortized import Amortized
from pyroflows.inference.amortized.data_sites import DataSites, SiteEmbedding
from pyroflows.inference.amortized.simulated_range import SimulatedRange
from pyroflows.inference.amortized.simulator import Simulator
from pyroflows.interruption import keeping
from pyroflows.models.tracing import Model
from pyroflows.nets.checks import checked_conditioner
from pyroflows.options import checked_int, kind
from pyroflows.progress import Progress
from pyroflows.randomness import seeded
from pyroflows.shapes import described

ConditionalFlowFn = Callable[[int, int], Any]

NUM_LAYERS, HIDDEN_DIMS = 5, (64, 64)
# Of 10,000 simulations a flow of this size learns noise too, and each flow another one: the mean of their densities has
# less of it, at a cost that grows with their number.
NUM_FLOWS = 3
# Precision of the normal prior on the parameters, as in fit_density, which has 3 by default. The dependence on data
# makes more of the flow to be learned by heart; of 3, 10 and 30 one task needs the first, another the last.
PRIOR_PRECISION = 10.0
MIN_SIMULATIONS = 20
UNSTEADY = "so that the density of the same data would differ from call to call"


@isolated
def fit_amortized(
    model: Model,
    observed: str | Sequence[str] = "y",
    num_simulations: int = 10_000,
    flow: Flow | ConditionalFlowFn | Recipe | None = None,
    embedding: nn.Module | None = None,
    seed: int | None = None,
    progress_bar: bool = True,
    *,
    latents: Sequence[str] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    method: str = "auto",
    num_flows: int | None = None,
    **options: Any,
) -> Amortized:
    r"""Fit one flow as the posterior of a Pyro model at any value of its data, by simulations.

    Latents :math:`\theta` and data y are drawn together from the model, and a conditional flow q maximises

    .. math:: \sum_i \log q(\theta_i \mid y_i), \qquad \theta_i, y_i \sim p(\theta, y),

    in the unconstrained space of the latents, which minimises the mean forward KL divergence from the exact posteriors
    (neural posterior estimation, Papamakarios and Murray 2016, arXiv:1605.06376). After that the posterior at data
    costs no training. It is as good as the flow is for data like those; where the likelihood can be evaluated, it
    judges and corrects itself. A continuous flow is trained by flow matching instead, towards the same posteriors.

    By default q is an ensemble: the mixture in equal parts of flows that are trained one after the other on the same
    simulations, each from initial parameters and with validation rows of its own. Where the flows agree, so does their
    mixture; where they err, it errs less.

    Args:
        model: a Pyro model whose priors can be drawn from. Values that it gives to observed sites do not matter.
        observed: the name of the observed site, or a list of names. Data are then a tensor, or a dictionary by site. A
            ``pyro.deterministic`` site can be observed too.
        num_simulations: number of draws, at least 20.
        flow: a flow over the unconstrained latents that takes the flattened data, or the vector of the embedding, as
            context; or a function ``(dim, context_dim) -> flow``, or a :class:`pyroflows.flows.Recipe`; None for an
            autoregressive :class:`pyroflows.flows.NSF`. It is trained in place, in the dtype of the latents.
        embedding: a module from data to a vector, which is trained with the flow and becomes part of it. It takes the
            values of the observed site ``(n, *site shape)`` as they are, in the dtype of the latents, or a dictionary
            of such tensors if ``observed`` is a list, and returns ``(n, k)``. None to give the flow the data
            themselves, standardised.
        seed: makes the fit reproducible, and leaves torch's global generator as it was; None to draw from that.
        progress_bar: whether to show one.
        latents: names of the latents to infer; None for all. The others, which may be discrete, are part of the
            simulator, and posteriors have then no likelihood.
        args: positional arguments of the model, such as covariates, which are the same in all simulations. An argument
            for the data themselves may be left out, or has a value of their shape if the model asks for it.
        kwargs: keyword arguments of the model.
        method: "maximum_likelihood"; "flow_matching" for continuous flows, such as :class:`pyroflows.flows.CNF`; or
            "auto", which chooses by the flow.
        num_flows: the number of flows in the ensemble, at least 1; None for 3 where ``flow`` is None, and otherwise for
            1. A flow that is given as such is one: more of a kind need a function or a recipe.
        options: options of :func:`pyroflows.fit_density` or :func:`pyroflows.fit_flow_matching`, such as ``max_epochs``
            and ``patience``. By maximum likelihood ``optimizer`` is by default that of ``fit_density`` with
            ``weight_decay`` 10 / n for n simulations.

    Raises:
        OptionError: for an option outside its range, or a model that lacks an argument.
        ModelError: if a site does not exist, or cannot be drawn or inferred; names the site.
        DataError: if most simulations are not finite.
        ShapeError: if the flow does not fit the sizes of latents and data.
        DivergedError: if log-densities stay non-finite.
        FitInterrupted: if the fit is interrupted, such as by Ctrl-C; its ``result`` is the ensemble of the flows that
            were trained by then, or the first flow in its best state so far.

    Example:
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("y", dist.Normal(slope * x, scale), obs=y)
        >>> x = torch.linspace(-1.0, 1.0, 8)
        >>> options = {"max_epochs": 5, "seed": 0, "progress_bar": False}
        >>> amortized = pf.fit_amortized(model, args=(x,), num_simulations=1000, **options)
        >>> posterior = amortized.posterior(0.5 * x)
        >>> sorted(posterior.sample(100))
        ['scale', 'slope']
        >>> amortized
        Amortized(slope, scale given y: 1000 simulations; posteriors are judged by the likelihood)
        DensityFit(5 epochs, ...
        >>> len(amortized.fits)
        3
    """
    num_simulations = checked_int("num_simulations", num_simulations, MIN_SIMULATIONS)
    num_flows = _checked_num_flows(num_flows, flow)
    with seeded(seed), Progress(progress_bar) as progress:
        progress.say("describing the model")
        simulator = Simulator.of(model, observed, latents, args, kwargs)
        if embedding is not None:
            embedding = checked_conditioner(embedding, "an embedding", UNSTEADY)
        size, embedder = _context_of(simulator.data, embedding, simulator.layout.dtype)
        flows = [_flow(flow, simulator.layout.dim, size).to(simulator.layout.dtype) for _ in range(num_flows)]
        fit = fit_method(flows[0], method)
        require_options(fit, options)
        x, rows, num_left_out = simulator.draws(num_simulations, progress)
        if embedder is not None:
            flows = _with_embeddings(flows, embedder, simulator.data.num_entries)
        if fit is fit_density and options.get("optimizer") is None:
            options["optimizer"] = partial(
                torch.optim.Adam, lr=LEARNING_RATE, weight_decay=PRIOR_PRECISION / len(x), fused=True
            )
        fits: list[Any] = []

        def found(interrupted: Any = None) -> Amortized | None:
            complete = fits or ([] if interrupted is None else [interrupted])
            if not complete:
                return None
            trained = flows[0] if len(complete) == 1 else Mixture(flows[: len(complete)], context_dim=0)
            return Amortized(trained, tuple(complete), simulator, SimulatedRange.of(rows), len(x), num_left_out)

        with keeping("the fit", found, least="a flow in training"):
            for number, member in enumerate(flows, start=1):
                progress.start("training of the flow" + (f" {number} of {num_flows}" if num_flows > 1 else ""))
                fits.append(fit(member, x, rows, progress_bar=progress, **options))
        amortized = found()
    assert amortized is not None
    return amortized


def _checked_num_flows(num_flows: int | None, flow: Any) -> int:
    if num_flows is None:
        return NUM_FLOWS if flow is None else 1
    if checked_int("num_flows", num_flows) > 1 and isinstance(flow, Flow):
        raise OptionError(
            f"num_flows is {num_flows}, but flow is one flow: give a function (dim, context_dim) -> flow, or a Recipe"
        )
    return num_flows


def _context_of(data: DataSites, embedding: nn.Module | None, dtype: torch.dtype) -> tuple[int, SiteEmbedding | None]:
    """Return the size of the context of the flow, and the embedding that takes rows of data."""
    if embedding is None:
        return data.num_entries, None
    embedder = SiteEmbedding(embedding, data).to(dtype)
    try:
        return checked_embedding(embedder, _examples(data, dtype)), embedder
    except OptionError as error:
        takes = "a tensor (n, *site shape)" if data.is_single else "a dictionary of such tensors by site"
        raise OptionError(f"{error}. It gets {takes}; a list observed=[...] makes the data a dictionary") from error


def _examples(data: DataSites, dtype: torch.dtype) -> Tensor:
    return torch.zeros(2, data.num_entries, dtype=dtype)


def _with_embeddings(flows: Sequence[Flow], embedder: SiteEmbedding, num_entries: int) -> list[Flow]:
    """Give each flow an embedding of its own: the first the one that was given, the others copies of it."""
    embedders = [embedder, *(copy.deepcopy(embedder) for _ in flows[1:])]
    return [with_embedding(flow, own, num_entries) for flow, own in zip(flows, embedders, strict=True)]


def _flow(flow: Any, dim: int, context_dim: int) -> Flow:
    """Return the flow to be trained."""
    if flow is None:
        return NSF(dim, NUM_LAYERS, HIDDEN_DIMS, autoregressive=True, context_dim=context_dim)
    if isinstance(flow, Recipe):
        flow = Recipe(flow.name, **{**flow.options, "context_dim": context_dim})(dim)
    if not isinstance(flow, Flow):
        if isinstance(flow, type) or not callable(flow):
            raise OptionError(f"flow must be a flow, or a function (dim, context_dim) -> flow, got {kind(flow)}")
        try:
            inspect.signature(flow).bind(dim, context_dim)
        except TypeError:
            raise OptionError(
                "flow must be a function of two arguments, as in lambda dim, context_dim: pf.flows.NSF(dim, "
                "context_dim=context_dim)"
            ) from None
        flow = flow(dim, context_dim)
    if not isinstance(flow, Flow):
        raise OptionError(f"the function (dim, context_dim) -> flow must give a pyroflows.Flow, got {kind(flow)}")
    if flow.event_shape != (dim,) or flow.context_shape != (context_dim,):
        raise ShapeError(
            f"the flow must have events of size {dim}, the unconstrained latents, and context size {context_dim}, the "
            f"data or their embedding, but has events of {described(flow.event_shape)} and context "
            f"{described(flow.context_shape)}"
        )
    require_real(flow, "an amortised posterior", "take pf.flows.NSF")
    if any(angles_in(flow.support, dim)):
        raise OptionError(
            "a flow of real numbers is needed, but this one is of angles: sites of angles are mapped to them"
        )
    return flow

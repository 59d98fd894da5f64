"""Importance sampling of a model with any proposal, be it a Pyro guide, a flow or a posterior."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyroflows.errors import ModelError, OptionError, ShapeError
from pyroflows.flows import Flow
from pyroflows.flows.discrete.refusal import require_real
from pyroflows.grad_mode import isolated
from pyroflows.guides import AutoFlow
from pyroflows.inference.component_labels import ComponentLabels
from pyroflows.inference.discrete_sites import completed
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.weights import WeightedDraws, Weights, in_batches
from pyroflows.interruption import keeping
from pyroflows.models.arguments import in_dtype, require_arguments, require_own_options, usable_arguments
from pyroflows.models.batching import NUM_EXAMPLES, BatchedModel
from pyroflows.models.bijections import declared_bijection
from pyroflows.models.fixed_supports import require_fixed_supports
from pyroflows.models.layout import Layout
from pyroflows.models.masks import CountLeftOut, entry_mask, to_rank
from pyroflows.models.requirements import describe_for_flow, require_full_plates
from pyroflows.models.run import SiteValues
from pyroflows.models.structure import ModelStructure
from pyroflows.models.supports import has_declared_support
from pyroflows.models.tracing import Model
from pyroflows.options import checked_int
from pyroflows.randomness import seeded
from pyroflows.shapes import described

# The largest number of draws at once; with fewer, the tensors of a small model stay in the processor's cache.
BATCH_SIZE = 16_384
NUM_SAMPLES = 10_000
NUM_COMPARED = 8  # draws of the first batch, with single runs

# Maps a number S of draws to values (S, *site shape) by latent site, and to log q (S,) on the constrained space.
Proposal = Callable[[int], tuple[SiteValues, Tensor]]


@isolated
@torch.no_grad()
def importance_sample(
    model: Model,
    proposal: Callable[..., Any] | Flow | Posterior,
    *args: Any,
    num_samples: int = NUM_SAMPLES,
    seed: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> WeightedDraws:
    r"""Draw from a proposal q, and weight the draws by Pareto-smoothed importance weights :math:`p(x, y) / q(x)`.

    Model and guide run for many draws at once, each of which gets what a run for it alone gives.

    Args:
        model: a Pyro model whose latents are the same in every run. Discrete ones are summed out of the weights, and
            drawn given the others.
        proposal: any Pyro guide of the model, trained or not, which may be an autoguide or a function with
            ``pyro.sample`` statements for the same continuous sites; or a :class:`pyroflows.Flow` over the vector
            of the latents, which are made unconstrained, flattened and joined in the order of the model; or a
            :class:`pyroflows.Posterior`.
        args: arguments of model and guide.
        num_samples: number of draws, at least 1. A model with an argument of this name gets it by position.
        seed: seed that makes the draws reproducible and leaves the global generator as it was; None to use the global
            generator. A model with an argument of this name gets it by position.
        progress_bar: whether to show one.
        kwargs: keyword arguments of model and guide.

    Raises:
        ModelError: if the sites of proposal and model differ, if the proposal is a point mass at a site, or if a plate
            is subsampled; names the site or plate.
        ShapeError: if a flow has another dimension than the model.
        OptionError: if ``num_samples`` is not a positive integer, if the model does not take these arguments, or if one
            of them has the name of an option and is not given by position.
        FitInterrupted: if the call is interrupted, such as by Ctrl-C; its ``result`` holds the draws so far, if there
            are any, and otherwise is None.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y):
        ...     pyro.sample("mu", dist.Normal(y / 2, 1.0))
        >>> y = torch.tensor(1.0)
        >>> weighted = importance_sample(model, guide, y, num_samples=20_000, progress_bar=False)
        >>> error = weighted.log_evidence - dist.Normal(0.0, 2**0.5).log_prob(y).item()
        >>> abs(error) < 4 * weighted.log_evidence_se
        True
    """
    num_samples = checked_int("num_samples", num_samples)
    require_own_options({"seed": seed is not None, "num_samples": num_samples != NUM_SAMPLES}, model, args)
    require_arguments(model, args, kwargs)
    with seeded(seed):
        return _weighted_draws(model, proposal, args, kwargs, num_samples, progress_bar)


@keeping("importance sampling", lambda found: found, "a batch of draws")
def _weighted_draws(
    model: Model, proposal: Any, args: Any, kwargs: Any, num_samples: int, progress_bar: bool
) -> WeightedDraws:
    labels = ComponentLabels()
    if isinstance(proposal, Posterior):
        labels, proposal = proposal.labels, proposal.guide
    dtype = proposal.dtype if isinstance(proposal, AutoFlow) else None
    model = in_dtype(model, dtype)
    args, kwargs = usable_arguments(model, args, kwargs, dtype)
    structure, _ = describe_for_flow(model, args, kwargs)
    require_full_plates(structure, "give arguments for which the model runs on all rows")
    if isinstance(proposal, Flow | AutoContinuous):
        require_fixed_supports(structure, model, args, kwargs)
    draw = _proposal(proposal, Layout(structure), args, kwargs)
    examples, _ = draw(NUM_EXAMPLES)
    # Entries without a posterior follow their prior. A guide that draws and scores them is weighted by its density.
    scored = _scored_entries(proposal, structure, args, kwargs)
    model = CountLeftOut(scored)(model) if scored else model
    taken = {s.name: s.kept | scored.get(s.name, s.kept) for s in structure.latents if s.kept is not None}
    batched = BatchedModel(
        model,
        args,
        kwargs,
        examples,
        kept={s.name: to_rank(taken[s.name], len(s.shape)) for s in structure.latents if s.name in taken},
        zero_outside_support=True,
        enumeration=structure.enumeration,
    )
    kept = [site.name for site in structure.latents]
    kept += [] if structure.enumerated else [site.name for site in structure.deterministic]
    size = min(BATCH_SIZE, batched.chunk_size)

    def weighted(rows: slice) -> tuple[SiteValues, Tensor]:
        num_draws = rows.stop - rows.start
        values, log_q = draw(num_draws)
        if rows.start == 0:
            batched.run_singly_if_wrong(values, torch.arange(min(NUM_COMPARED, num_draws)))
        record = batched(values, num_draws)
        return {name: record.values[name] for name in kept}, _total(record.log_probs, num_draws) - log_q

    def make(draws: dict[str, Tensor], weights: Weights) -> WeightedDraws:
        if structure.enumerated:
            draws = completed(batched, structure, draws, len(weights.log_weights))
        _require_density(structure, draws)
        return WeightedDraws(draws, weights, structure, labels.updated(structure), batched)

    return in_batches(weighted, make, num_samples, size, progress_bar)


def _proposal(proposal: Any, layout: Layout, args: Any, kwargs: Any) -> Proposal:
    if isinstance(proposal, AutoFlow):
        if proposal.layout is None:
            proposal._setup_prototype(*args, **kwargs)
        assert proposal.flow is not None
        assert proposal.layout is not None
        return _of_flow(proposal.flow, layout.at_centers(proposal.layout.centers))
    if isinstance(proposal, Flow):
        return _of_flow(proposal, layout)
    if isinstance(proposal, torch.nn.Module | Callable):
        # A guide is set up at its first call.
        trace = prune_subsample_sites(poutine.block(poutine.trace(proposal).get_trace)(*args, **kwargs))
        _check_sites(dict(trace.iter_stochastic_nodes()), layout.structure)
        if isinstance(proposal, AutoContinuous):
            return _of_packed(proposal, _declared(layout.structure, proposal.prototype_trace), args, kwargs)
        return _of_program(proposal, layout.structure, args, kwargs)
    raise OptionError(f"proposal must be a guide, a flow or a posterior, got {type(proposal).__name__}")


def _scored_entries(proposal: Any, structure: ModelStructure, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """The entries without a posterior that a proposal draws with a density of its own, by site."""
    if not structure.kept or isinstance(proposal, AutoFlow | Flow):
        return {}
    nodes = poutine.block(poutine.trace(proposal).get_trace)(*args, **kwargs).nodes
    scored = {}
    for site in structure.latents:
        if site.kept is not None:
            mask = entry_mask(nodes[site.name]["fn"], nodes[site.name]["mask"], site.shape)
            is_masked = torch.tensor(False) if mask is None else ~_at_rank(mask, site.kept)
            scored[site.name] = ~site.kept & ~is_masked
    return {name: mask for name, mask in scored.items() if mask.any()}


def _at_rank(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of a site in the dimensions of another mask of it."""
    return mask.flatten(like.dim()).any(-1) if mask.dim() > like.dim() else to_rank(mask, like.dim()).expand_as(like)


def _of_flow(flow: Flow, layout: Layout) -> Proposal:
    if flow.event_shape != (layout.dim,) or flow.context_dim:
        raise ShapeError(
            f"the model has {layout.dim} unconstrained latents, but the flow has events of "
            f"{described(flow.event_shape)} and context {described(flow.context_shape)}"
        )

    require_real(flow, "a proposal of unconstrained latents", "take pf.flows.IAF")

    def draw(num_draws: int) -> tuple[SiteValues, Tensor]:
        vectors, log_q = flow().rsample_and_log_prob((num_draws,))
        values, ladj = layout.constrain(vectors)
        return values, log_q - ladj

    return draw


def _declared(structure: ModelStructure, trace: Trace) -> Layout:
    """The layout of Pyro's own guides, whose bijections are those of the supports that distributions declare."""
    latents = []
    for site in structure.latents:
        fn = trace.nodes[site.name]["fn"]
        is_ours = has_declared_support(fn)
        latents.append(site if is_ours else replace(site, bijection=declared_bijection(fn, site.shape)))
    return Layout(replace(structure, latents=tuple(latents)))


def _of_packed(guide: AutoContinuous, layout: Layout, args: Any, kwargs: Any) -> Proposal:
    """Propose from a Pyro guide over one vector, which may be unable to score values that it did not just draw."""
    # Pyro's vector has all entries, also those without a posterior.
    latents = tuple(replace(site, kept=None) for site in layout.structure.latents)
    layout = Layout(replace(layout.structure, latents=latents))
    sizes = {name: shape.numel() for name, shape in guide._unconstrained_shapes.items()}

    def draw(num_draws: int) -> tuple[SiteValues, Tensor]:
        law = guide.get_posterior(*args, **kwargs)
        vectors = law.rsample((num_draws,))
        log_q = law.log_prob(vectors)
        # The guide's vector has the order of the guide's model, which may be another one.
        by_name = dict(zip(sizes, vectors.split(list(sizes.values()), -1), strict=True))
        values, ladj = layout.constrain(torch.cat([by_name[name] for name in layout.slices], -1))
        return values, log_q - ladj

    return draw


def _of_program(guide: Callable[..., Any], structure: ModelStructure, args: Any, kwargs: Any) -> Proposal:
    # A guide runs like a model without data; auxiliary sites and the densities of Delta sites count in its log q.
    batched = BatchedModel(guide, args, kwargs, {}, draw=True)

    def draw(num_draws: int) -> tuple[SiteValues, Tensor]:
        record = batched.in_chunks({}, num_draws)
        values = {site.name: record.values[site.name] for site in structure.latents}
        return values, _total(record.log_probs, num_draws)

    return draw


def _total(log_probs: SiteValues, num_draws: int) -> Tensor:
    return torch.stack([log_prob.reshape(num_draws, -1).sum(-1) for log_prob in log_probs.values()]).sum(0)


def _check_sites(nodes: dict[str, Any], structure: ModelStructure) -> None:
    latents = {site.name: site for site in structure.latents}
    for name, site in latents.items():
        if name not in nodes:
            raise ModelError(
                f"latent site '{name}' of the model is no site of the proposal, which has {sorted(nodes)}: a proposal "
                "must draw every latent"
            )
        shape = nodes[name]["value"].shape
        if shape != site.shape:
            raise ModelError(
                f"site '{name}' has shape {tuple(shape)} in the proposal and {tuple(site.shape)} in the model"
            )
    for name, node in nodes.items():
        is_auxiliary = node["infer"].get("is_auxiliary") or node["infer"].get("_deterministic")
        if name not in latents and not is_auxiliary:
            raise ModelError(
                f"site '{name}' of the proposal is no latent of the model, which has {sorted(latents)}: its density "
                "would be wrong in the weights; mark it infer={'is_auxiliary': True} if a latent follows from it"
            )


def _require_density(structure: ModelStructure, draws: SiteValues) -> None:
    for site in structure.latents:
        value = draws[site.name]
        if len(value) > 1 and (value == value[0]).all():
            raise ModelError(
                f"the proposal is a point mass at site '{site.name}', such as AutoDelta is, and has no density there: "
                "its weights would mean nothing"
            )

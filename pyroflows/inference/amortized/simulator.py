"""A Pyro model as a simulator: what is drawn, what is inferred, and whether it has a likelihood."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroflows.errors import DataError, FlowError, ModelError, OptionError, warn
from pyroflows.inference.amortized.data_sites import DataSites
from pyroflows.models.arguments import explain_failure, usable_arguments
from pyroflows.models.batching import BatchedModel
from pyroflows.models.fixed_supports import require_fixed_supports
from pyroflows.models.layout import Layout
from pyroflows.models.masks import entry_mask
from pyroflows.models.once import run_once
from pyroflows.models.replicates import SamplerError
from pyroflows.models.requirements import describe_for_flow
from pyroflows.models.signature import missing_arguments
from pyroflows.models.simulation import require_continuous, require_drawable
from pyroflows.models.structure import ModelStructure, Site, describe_run
from pyroflows.models.tracing import Model, sample_nodes, trace_anywhere
from pyroflows.options import kind
from pyroflows.progress import Progress
from pyroflows.shapes import counted

# A draw of the prior may be one for which the simulator fails, so that it is described by another.
NUM_TRIALS = 20
# Runs that are compared to find out whether the model has random numbers outside of its sites.
NUM_RUNS = 3
# With more failures than this share the law of the rest is no longer that of the model.
MAX_LEFT_OUT = 0.5


class _Unobserved(Messenger):
    """An effect handler that takes the values away from observed sites, so that they are drawn."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._names and not msg["infer"].get("_deterministic"):
            msg["is_observed"], msg["value"] = False, None


@dataclass(frozen=True, eq=False)
class Simulator:
    """A Pyro model that draws latents and data from the prior predictive.

    Args:
        model: the model, in which no site that is inferred or simulated has a value.
        args: its positional arguments.
        kwargs: its keyword arguments.
        data: the observed sites.
        layout: the layout of the latents that are inferred.
        nuisance: the latents that are not inferred, and so are part of the simulator.
        no_likelihood: why the likelihood cannot be evaluated, as a clause; None if it can.
    """

    model: Model
    args: Any
    kwargs: Any
    data: DataSites
    layout: Layout
    nuisance: tuple[str, ...]
    no_likelihood: str | None

    @classmethod
    def of(
        cls, model: Model, observed: str | Sequence[str], latents: Sequence[str] | None, args: Any, kwargs: Any
    ) -> "Simulator":
        """Describe a model as a simulator.

        Args:
            model: the Pyro model.
            observed: the name of the observed site, or a list of names.
            latents: the names of the latents to infer; None for all.
            args: the model's positional arguments.
            kwargs: its keyword arguments.

        Raises:
            OptionError: if names are no names, or the model lacks an argument.
            ModelError: if a site does not exist, cannot be drawn or inferred; names the site.
            DataError: if the model fails because of its arguments.
        """
        if not callable(model):
            raise OptionError(f"model must be a function with pyro.sample statements, got {type(model).__name__}")
        if not isinstance(args, tuple | list):
            raise OptionError(f"args must be a tuple of arguments, as in args=(x,), got {kind(args)}")
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise OptionError(f"kwargs must be a dictionary of arguments by name, got {kind(kwargs)}")
        names = _checked_names("observed", observed)
        free = _Unobserved(names)(model)
        args, kwargs = _complete(model, names, tuple(args), dict(kwargs or {}))
        args, kwargs = usable_arguments(free, args, kwargs)
        structure, trace = _described(free, args, kwargs, names)
        _require_drawn(structure, names)
        _require_fixed_masks(free, args, kwargs, structure)
        inferred = _inferred(structure, names, latents)
        nuisance = tuple(s.name for s in structure.latents if s.name not in {*names, *inferred})
        values = {name: torch.as_tensor(trace.nodes[name]["value"]) for name in names}
        data = DataSites.of(_sites(structure, names), values, isinstance(observed, str))
        conditioned = poutine.block(_at(free, values), hide=list(nuisance)) if nuisance else _at(free, values)
        inner, inner_trace = describe_for_flow(conditioned, args, kwargs)
        require_fixed_supports(inner, conditioned, args, kwargs)
        reason = _no_likelihood(trace, inner, names, nuisance)
        if reason is None:
            latent_values = {site.name: inner_trace.nodes[site.name]["value"] for site in inner.latents}
            reason = _no_fixed_density(conditioned, args, kwargs, latent_values)
        return cls(free, args, kwargs, data, Layout(inner), nuisance, reason)

    def conditioned(self, data: Mapping[str, Tensor]) -> Model:
        """The model at data, values by site, with the inferred latents alone."""
        at_data = _at(self.model, data)
        return poutine.block(at_data, hide=list(self.nuisance)) if self.nuisance else at_data

    def draws(self, num_draws: int, progress: Progress) -> tuple[Tensor, Tensor, int]:
        """Draw latents and data from the prior predictive, without those that are not finite.

        Args:
            num_draws: the number of draws.
            progress: the bar in which this is shown.

        Returns:
            Unconstrained latents ``(n, dim)``, rows of data ``(n, num_entries)``, and how many draws were left out.

        Raises:
            DataError: if most draws are not finite.
            ModelError: if a site has another shape in another run.
        """
        names = [*(site.name for site in self.layout.structure.latents), *self.data.shapes]
        batched = _batched(self.model, self.args, self.kwargs)
        if batched is not None:
            progress.say(counted(num_draws, "simulation"))
            values, num_failed = batched.in_chunks({}, num_draws).values, 0
        else:
            values, num_failed = self._one_by_one(names, num_draws, progress)
        x = self.layout.unconstrain(values)
        rows = self.data.rows(values, self.layout.dtype)
        is_finite = x.isfinite().all(-1) & rows.isfinite().all(-1)
        num_left_out = num_failed + int((~is_finite).sum())
        if num_left_out:
            found = f"{num_left_out} of {num_draws} simulations failed, or are not finite"
            if num_left_out > MAX_LEFT_OUT * num_draws:
                raise DataError(f"{found}: a posterior cannot be learned from the rest; look at draws of the model")
            warn(f"{found}, and are left out: the prior is then that of the rest")
        return x[is_finite], rows[is_finite], num_left_out

    def _one_by_one(self, names: Sequence[str], num_draws: int, progress: Progress) -> tuple[dict[str, Tensor], int]:
        """Draw by one run of the model each; the values by site, and the number of runs that failed."""
        values: dict[str, list[Tensor]] = {name: [] for name in names}
        first_error: Exception | None = None
        num_failed = 0
        progress.start("simulations", num_draws, unit="simulation")
        with torch.no_grad(), pyro.validation_enabled(False):
            for _ in range(num_draws):
                progress.update()
                try:
                    with poutine.block():
                        trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
                    drawn = {name: torch.as_tensor(trace.nodes[name]["value"]) for name in names}
                except (ValueError, RuntimeError, ArithmeticError) as error:
                    if isinstance(error, FlowError):
                        raise
                    first_error, num_failed = first_error or error, num_failed + 1
                    continue
                except KeyError as error:
                    raise ModelError(f"site {error} appears in one run of the model and not in another") from None
                for name, value in drawn.items():
                    values[name].append(_of_one_shape(name, value, values[name]))
        if num_failed > MAX_LEFT_OUT * num_draws:
            raise DataError(f"{num_failed} of {num_draws} simulations failed, the first with: {first_error}")
        return {name: torch.stack(parts) for name, parts in values.items()}, num_failed


def _batched(model: Model, args: Any, kwargs: Any) -> BatchedModel | None:
    """The model as one that draws many at once; None if it runs draw by draw alone."""
    for _ in range(NUM_TRIALS):
        try:
            batched = BatchedModel(model, args, kwargs, {}, draw=True)
        except SamplerError:
            continue
        except FlowError:
            raise
        except (ValueError, RuntimeError, ArithmeticError):  # at a draw for which the simulator fails
            continue
        return None if batched.mode == "loop" else batched
    return None


def _at(model: Model, data: Mapping[str, Tensor]) -> Model:
    """A model with values of its observed sites; those that follow from others without noise keep doing so."""
    return poutine.condition(model, data=dict(data))


def _checked_names(option: str, names: Any) -> list[str]:
    found = [names] if isinstance(names, str) else names
    if not isinstance(found, list | tuple) or not found or not all(isinstance(name, str) for name in found):
        raise OptionError(f"{option} must be the name of a site, or a list of names, got {names!r}")
    if len(set(found)) < len(found):
        raise OptionError(f"{option} names a site twice: {names!r}")
    return list(found)


def _complete(model: Model, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Give None to arguments without a value that have the name of an observed site, since it is drawn."""
    missing = missing_arguments(model, args, kwargs)
    unknown = [name for name in missing if name not in names]
    if unknown:
        raise OptionError(
            f"the model needs a value of {', '.join(map(repr, unknown))}: give the arguments that are the same in all "
            "simulations by args=(...) or kwargs={...}"
        )
    return args, {**kwargs, **dict.fromkeys(missing)}


def _described(model: Model, args: Any, kwargs: Any, names: Sequence[str]) -> tuple[ModelStructure, Trace]:
    """Describe a simulator by a run with finite data, if there is one among the first."""
    failure: Exception | None = None
    found = None
    for _ in range(NUM_TRIALS):
        try:
            found = describe_run(model, args, kwargs)
        except FlowError:
            raise
        except (ValueError, RuntimeError, ArithmeticError, TypeError, AttributeError) as error:
            failure = error
            continue
        values = [found[1].nodes[name]["value"] for name in names if name in found[1].nodes]
        if all(torch.as_tensor(value).isfinite().all() for value in values):
            return found
    if found is not None:
        return found
    assert failure is not None
    explain_failure(model, args, kwargs, failure)
    if isinstance(failure, TypeError | AttributeError):
        raise OptionError(
            f"the model does not run ({type(failure).__name__}: {failure}): a model that takes its data as an argument "
            "needs a value of their shape, such as args=(torch.zeros(10),)"
        ) from failure
    raise failure


def _sites(structure: ModelStructure, names: Sequence[str]) -> dict[str, Site]:
    sites = {site.name: site for site in (*structure.latents, *structure.deterministic)}
    missing = [name for name in names if name not in sites]
    if missing:
        known = sorted({*sites, *(site.name for site in structure.observed)})
        raise ModelError(
            f"the model has no site '{missing[0]}' to observe: its sites are {known}. What "
            f"a simulator computes or returns becomes a site by pyro.deterministic('{missing[0]}', value)"
        )
    return {name: sites[name] for name in names}


def _require_drawn(structure: ModelStructure, names: Sequence[str]) -> None:
    """Raise if the prior predictive of a model cannot be drawn, or is not all that its posterior follows from."""
    _sites(structure, names)
    for site in structure.observed:
        raise ModelError(
            f"site '{site.name}' is observed too, but not named in observed={list(names)}: name it, or give it no value"
        )
    require_drawable(structure, names)


def _require_fixed_masks(model: Model, args: Any, kwargs: Any, structure: ModelStructure) -> None:
    """Raise if a mask differs from run to run, since rows of data are read by the mask of the first."""
    masks = {site.name: site.mask for site in structure.latents}
    if not structure.reads_values and all(mask is None for mask in masks.values()):
        return
    for _ in range(NUM_TRIALS):
        try:
            trace = trace_anywhere(model, args, kwargs, None)
        except (ValueError, RuntimeError, ArithmeticError):  # at a draw for which the simulator fails
            continue
        for name in masks.keys() & trace.nodes.keys():
            node, expected = trace.nodes[name], masks[name]
            mask = entry_mask(node["fn"], node["mask"], node["value"].shape)
            found = [m for m in (expected, mask) if m is not None and not m.all()]
            if found and (len(found) == 1 or not torch.equal(found[0], found[1])):
                raise ModelError(
                    f"the mask of site '{name}' differs from one simulation to the next, and an amortised posterior "
                    "needs one mask for all data: mask by arguments of the model alone, or observe which entries are "
                    "missing at a site of their own"
                )


def _inferred(structure: ModelStructure, names: Sequence[str], latents: Sequence[str] | None) -> list[str]:
    free = {site.name: site for site in structure.latents if site.name not in names}
    if latents is None:
        require_continuous(structure, names)
        return list(free)
    inferred = _checked_names("latents", latents)
    for name in inferred:
        if name not in free:
            raise OptionError(f"latents names '{name}', but the latents of the model are {sorted(free)}")
    return inferred


def _no_likelihood(
    trace: Trace, structure: ModelStructure, names: Sequence[str], nuisance: Sequence[str]
) -> str | None:
    """Say why the likelihood of the observed sites cannot be evaluated; None if it can."""
    if nuisance:
        return f"latent site '{nuisance[0]}' is not inferred, and the likelihood is an integral over it"
    observed = {site.name for site in structure.observed}
    for name in names:
        if name not in observed:
            return f"site '{name}' follows from other sites without noise of its own"
    with torch.no_grad():
        for node in sample_nodes(trace):
            if node["infer"].get("_deterministic"):
                continue
            try:
                node["fn"].log_prob(node["value"])
            except NotImplementedError:
                return f"the distribution of site '{node['name']}' ({type(node['fn']).__name__}) has no log_prob"
            except (ValueError, RuntimeError):  # a value that the distribution refuses
                continue
    return None


def _no_fixed_density(model: Model, args: Any, kwargs: Any, latents: Mapping[str, Tensor]) -> str | None:
    """Say that two runs of a model at the same latents and data have other log-densities; None if they agree."""
    try:
        with torch.no_grad():
            first, *others = (run_once(model, args, kwargs, latents).log_probs for _ in range(NUM_RUNS))
    except (ValueError, RuntimeError):  # as at data that a distribution refuses
        return None
    for other in others:
        for name in first.keys() & other.keys():
            a, b = first[name], other[name]
            if a.shape == b.shape and not torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True):
                return (
                    f"site '{name}' has another log-density in each run at the same values of all sites: the model "
                    "draws random numbers outside of pyro.sample"
                )
    return None


def _of_one_shape(name: str, value: Tensor, before: Sequence[Tensor]) -> Tensor:
    if before and value.shape != before[0].shape:
        raise ModelError(
            f"site '{name}' has shape {tuple(before[0].shape)} in one simulation and {tuple(value.shape)} in another: "
            "an amortised posterior needs data and latents of one shape; pad them, or simulate a summary"
        )
    return value

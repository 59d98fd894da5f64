"""Masks: which entries of a site have a density, and which entries of a latent belong to the posterior.

Pyro multiplies nothing by a mask: where a mask is False, the log-density of an entry is left out of the log joint. For
a latent this has two meanings. If the rest of the log joint depends on the entry, its prior is flat. If nothing depends
on it, as in the padding of a sequence, the entry has no posterior: given the rest, it follows its own prior.
"""

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, biject_to

from pyroflows.errors import ModelError
from pyroflows.models.observations import TensorObservations
from pyroflows.models.replicates import replicate
from pyroflows.models.tracing import Model, latent_nodes, trace_model
from pyroflows.randomness import seeded

SiteValues = Mapping[str, Tensor]

NUM_LOOKS = 5


def entry_mask(fn: Any, mask: bool | Tensor | None, shape: torch.Size) -> Tensor | None:
    """Where the log-density of a site counts, as booleans over leading dimensions of its value.

    Args:
        fn: the distribution of the site, whose own masks count too, those inside of ``to_event`` included.
        mask: the mask of the effect handlers around the site.
        shape: the shape of its value.

    Returns:
        Booleans over the batch dimensions, and over those event dimensions that a mask inside of ``to_event`` tells
        apart; None without a mask.

    Example:
        >>> mask = torch.tensor([True, False])
        >>> entry_mask(dist.Normal(torch.zeros(3, 2), 1.0).mask(mask).to_event(1), None, torch.Size([3, 2])).shape
        torch.Size([3, 2])
    """
    found = [(mask, fn.event_dim)]
    while isinstance(fn, MaskedDistribution | Independent):
        if isinstance(fn, MaskedDistribution):
            found.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    masks = [_over(m, shape[: len(shape) - event_dim]) for m, event_dim in found if m is not None and m is not True]
    if not masks:
        return None
    rank = max(m.dim() for m in masks)
    return reduce(torch.logical_and, [to_rank(m, rank).expand(shape[:rank]) for m in masks])


def to_rank(mask: Tensor, rank: int) -> Tensor:
    """Add dimensions of one on the right of a mask, so that it broadcasts with a value of this many dimensions."""
    return mask.reshape(mask.shape + (1,) * (rank - mask.dim()))


def _over(mask: bool | Tensor, shape: torch.Size) -> Tensor:
    """Broadcast a mask to a shape; an entry counts if it does so anywhere along dimensions that the shape lacks."""
    mask = torch.as_tensor(mask)
    for _ in range(mask.dim() - len(shape)):
        mask = mask.any(0)
    for dim, size in enumerate(mask.shape, len(shape) - mask.dim()):
        if size != 1 and shape[dim] == 1:
            mask = mask.any(dim - len(shape), keepdim=True)
    return mask.expand(shape)


def innermost(fn: Any, rank: int) -> Any:
    """The distribution under masks and ``to_event`` whose batch dimensions are the first ``rank`` of its value."""
    while isinstance(fn, MaskedDistribution | Independent) and len(fn.batch_shape) < rank:
        fn = fn.base_dist
    return fn


class Given(Messenger):
    """An effect handler that gives latent sites their values.

    Args:
        values: values by site.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._values:
            msg["value"] = self._values[msg["name"]]
        elif msg["is_observed"] and may_hide_nan(msg):
            msg["value"] = without_masked_nan(msg, draw_like(msg["fn"], msg["value"]))


class Drawn(Messenger):
    """An effect handler that draws latents from their priors, whatever values the model's own handlers give them."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or type(fn).__name__ == "_Subsample":
            return
        try:
            msg["value"] = fn.sample()
        except NotImplementedError:  # an improper prior
            transform = biject_to(fn.support)
            msg["value"] = transform(torch.randn(transform.inverse_shape(fn.shape())))


class CountLeftOut(Messenger):
    """An effect handler under which entries that are left out of the posterior have the density of their prior.

    With it, a proposal that draws and scores those entries too has proper importance weights.

    Args:
        left_out: the entries, booleans over leading dimensions of a latent, by site.
    """

    def __init__(self, left_out: SiteValues) -> None:
        super().__init__()
        self._left_out = left_out

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if name not in self._left_out:
            return
        left_out = self._left_out[name]
        inner = innermost(fn, left_out.dim())
        shape = torch.broadcast_shapes(inner.batch_shape, left_out.shape)
        mask = entry_mask(fn, msg["mask"], shape + inner.event_shape)
        counts = left_out if mask is None else mask | left_out
        msg["fn"] = unmasked(inner).mask(counts).to_event(fn.event_dim - inner.event_dim)
        msg["mask"] = None
        if left_out.dim() == len(fn.batch_shape):
            # The density of the entries must integrate to one.
            msg["scale"] = torch.where(left_out, 1.0, msg["scale"])


def unmasked(fn: Any) -> Any:
    """A distribution without its masks."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    return unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims) if isinstance(fn, Independent) else fn


def require_same_mask(name: str, first: Tensor | None, second: Tensor | None) -> None:
    """Raise if two runs of a model mask a latent at different entries.

    Args:
        name: the name of the site.
        first: its mask in one run; None without a mask.
        second: its mask in the other run.

    Raises:
        ModelError: if they differ.
    """
    masks = [mask for mask in (first, second) if mask is not None and not mask.all()]
    if masks and not torch.equal(masks[0], masks[-1] if len(masks) == 2 else torch.ones_like(masks[0])):
        raise ModelError(
            f"latent site '{name}' is masked at other entries in one run than in another, so that its posterior has "
            "other dimensions: make a guide for each mask"
        )


def may_hide_nan(msg: Any) -> bool:
    """Whether an observed site is masked, so that its value may be NaN where it does not count."""
    value = msg["value"]
    if not isinstance(value, Tensor) or not value.is_floating_point() or msg["infer"].get("_deterministic"):
        return False
    return entry_mask(msg["fn"], msg["mask"], value.shape) is not None


def without_masked_nan(msg: Any, filler: Tensor) -> Tensor:
    """Replace NaN in masked entries of an observed value, since a NaN under a mask makes gradients NaN."""
    value = msg["value"]
    mask = entry_mask(msg["fn"], msg["mask"], value.shape)
    if mask is None:  # in this run nothing is masked, where another has masked entries
        return value
    return torch.where(value.isnan() & ~to_rank(mask, value.dim()), filler, value)


def drawn_where_left_out(fn: Any, value: Tensor, kept: Tensor) -> Tensor:
    """Replace the entries of a latent that are left out of the posterior by draws from its distribution.

    Args:
        fn: the distribution of the site.
        value: a value of the site.
        kept: which entries stay, broadcast with the value from the right.
    """
    return torch.where(kept.to(value.device), value, draw_like(fn, value))


def draw_like(fn: Any, value: Tensor) -> Tensor:
    """Draw from a distribution in the shape of a value; the value itself if there is no way to draw."""
    try:
        return replicate(fn, value)
    except NotImplementedError:
        return value


def dependent_entries(model: Model, args: Any, kwargs: Any, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find the entries of masked latents on which the log joint depends, with all its masks.

    The gradient tells them entry by entry, at draws of the prior. It does not see a dependence through a comparison;
    so the entries without a gradient are drawn anew as well, and if the log joint changes, all entries count.

    Args:
        model: the Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        masks: the masks of the latents that have one, by site.

    Returns:
        Booleans of the shape of the mask, by site; True everywhere if the model cannot run at draws of its prior, or if
        the masks depend on latents.
    """
    depends = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    everywhere = {name: torch.ones_like(mask) for name, mask in masks.items()}

    def log_joint(values: SiteValues) -> Tensor:
        with pyro.validation_enabled(False), seeded(0), poutine.block(), TensorObservations():
            trace = poutine.trace(Given(values)(model)).get_trace(*args, **kwargs)
            return torch.as_tensor(trace.log_prob_sum())

    try:
        with seeded(0), pyro.validation_enabled(False):
            traces = [trace_model(Drawn()(model), args, kwargs) for _ in range(NUM_LOOKS)]
        if not all(torch.equal(_mask_in(trace, name), mask) for trace in traces for name, mask in masks.items()):
            return everywhere
        first, *others = map(_latents, traces)
        for values in (first, others[0]):
            for name, gradient in _gradients(log_joint, values, list(masks)).items():
                # A gradient of NaN shows a dependence, too.
                depends[name] |= (gradient != 0).reshape(*masks[name].shape, -1).any(-1)
        counts = {name: to_rank(mask | depends[name], first[name].dim()) for name, mask in masks.items()}
        with torch.no_grad():
            expected = log_joint(first)
            redrawn = ({n: torch.where(c, first[n], other[n]) for n, c in counts.items()} for other in others)
            same = all(torch.allclose(log_joint(first | values), expected, equal_nan=True) for values in redrawn)
    except (RuntimeError, ValueError):  # at extreme draws of a vague prior a matrix may be singular, for instance
        return everywhere
    return depends if same else everywhere


def _gradients(log_joint: Callable[[SiteValues], Tensor], values: SiteValues, names: list[str]) -> dict[str, Tensor]:
    leaves = {name: values[name].detach().clone().requires_grad_() for name in names}
    with torch.enable_grad():
        total = log_joint({**values, **leaves})
        if not total.requires_grad:
            return {}
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(names, gradients, strict=True) if g is not None}


def _mask_in(trace: Trace, name: str) -> Tensor:
    node = trace.nodes[name]
    shape = node["value"].shape
    mask = entry_mask(node["fn"], node["mask"], shape)
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask


def _latents(trace: Trace) -> dict[str, Tensor]:
    return {node["name"]: node["value"] for node in latent_nodes(trace)}

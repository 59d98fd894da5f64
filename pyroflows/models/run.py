"""One run of a model, with values given to its sites, as the values and log-densities of all sites."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroflows.errors import ModelError
from pyroflows.models.edges import Logs, log_density
from pyroflows.models.inside import inside_support, inside_turn
from pyroflows.models.masks import draw_like, drawn_where_left_out, may_hide_nan, without_masked_nan
from pyroflows.models.observations import observe_tensor
from pyroflows.models.replicates import draw_site, replicate_shape
from pyroflows.models.structure import Enumeration
from pyroflows.models.tracing import follows_from_others
from pyroflows.randomness import seeded

SiteValues = Mapping[str, Tensor]
LogsBySite = Mapping[str, Logs]


@dataclass
class RunRecord:
    """The values and log-densities of all sites in one run, or in a batch of runs along the first dimension.

    Args:
        values: values by site, ``pyro.deterministic`` included.
        log_probs: log-densities by site, ``pyro.factor`` included, scaled and masked, in the batch shape of the site.
    """

    values: dict[str, Tensor]
    log_probs: dict[str, Tensor]


class OtherRowsError(ModelError):
    """A latent has another shape in a run than its draws, as where a plate of latents has other rows.

    Args:
        message: what is wrong.
        site: the name of the latent.
        sizes: the sizes of its plates in the run, by name.
    """

    def __init__(self, message: str, site: str, sizes: Mapping[str, int]) -> None:
        super().__init__(message)
        self.site, self.sizes = site, sizes


@dataclass(frozen=True)
class RunOptions:
    """What all runs of a batched model have in common.

    Args:
        draw: whether every site without a given value is drawn, observed sites included.
        needs_densities: whether a site whose distribution has no log-density is an error; otherwise, and for ``draw``,
            it is left out of the log-densities.
        zero_outside_support: whether a given value outside of its support has log-density -inf.
        is_scaled: whether ``poutine.scale`` counts.
        fillers: values in place of masked NaN, by observed site; the first run, which is a single one, draws them.
        undrawn: the sites that are not drawn although others are. Their value is NaN, and so is what follows from it;
            they are left out of values and log-densities.
        enumeration: the latents that are summed out; None if there are none.
    """

    draw: bool = False
    needs_densities: bool = True
    zero_outside_support: bool = False
    is_scaled: bool = True
    fillers: dict[str, Tensor] = field(default_factory=dict)
    undrawn: frozenset[str] = frozenset()
    enumeration: Enumeration | None = None


class RunHandler(Messenger):
    """An effect handler that gives sites their values, and records values and log-densities.

    Args:
        options: what all runs of a model have in common.
        values: values by site.
        subsample: row indices by subsampled plate; other plates draw theirs.
        logs: the logarithms of the values' distances from the edges of their supports, by site whose log-density is
            computed from them.
        kept: which entries of a given value are taken, by site; the others are drawn from the site's distribution.
        single: whether this is a run for one draw outside of a batch, which checks the shapes of values.

    Attributes:
        record: the values and log-densities of the sites so far.
        event_dims: the number of event dimensions, by site that can be given a value.
        unscored: those of them that have no log-density.
        rows: the indices that were drawn, by subsampled plate.
        max_plate_nesting: the largest number of batch dimensions of a site.
        scored: the site whose log-density is being computed; None between sites.
        factor_sizes: the number of entries of each factor that is summed over discrete latents.
        groups: the names of the sites whose log-densities are recorded as one, by the name of the record.
    """

    def __init__(
        self,
        options: RunOptions,
        values: SiteValues,
        subsample: SiteValues,
        logs: LogsBySite,
        kept: SiteValues,
        single: bool,
    ) -> None:
        super().__init__()
        self._options = options
        self._values, self._subsample, self._logs, self._kept, self._single = values, subsample, logs, kept, single
        self.record = RunRecord({}, {})
        self.event_dims: dict[str, int] = {}
        self.unscored: set[str] = set()
        self.rows: dict[str, Tensor] = {}
        self.max_plate_nesting = 0
        self.scored: str | None = None
        self.factor_sizes: list[int] = []
        self.groups: dict[str, tuple[str, ...]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        observe_tensor(msg)
        if name in self._values:
            shape = self._shape(msg) if self._single else None
            msg["value"] = self._values[name]
            if shape is not None and msg["value"].shape != shape:
                raise OtherRowsError(
                    f"site '{name}' has shape {tuple(shape)} with these arguments, but its draws have shape "
                    f"{tuple(msg['value'].shape)}: latents that are local to rows of the data cannot serve other rows",
                    name,
                    {frame.name: frame.size for frame in msg["cond_indep_stack"] if frame.vectorized},
                )
            if name in self._kept:
                msg["value"] = drawn_where_left_out(fn, msg["value"], self._kept[name])
        elif name in self._subsample and msg["value"] is None:
            msg["value"] = self._subsample[name]
        elif self._options.draw:
            if not _is_fixed(msg) and type(fn).__name__ != "_Subsample":
                is_drawn = name not in self._options.undrawn
                msg["value"] = draw_site(name, fn, _observed(msg), _plate_dims(msg)) if is_drawn else _no_draw(msg)
                msg["is_observed"] = False
        elif not msg["is_observed"] and type(fn).__name__ != "_Subsample":
            raise ModelError(
                f"the model has dynamic structure: site '{name}' is neither observed nor a latent of the model's first "
                "run; a flow needs the same sites in every run"
            )
        elif msg["is_observed"] and not _is_fixed(msg):
            if self._single and may_hide_nan(msg):
                # Other runs take the same numbers, since drawing costs time, and not every distribution can under vmap.
                with seeded(0):
                    filler = draw_like(fn, msg["value"])
                while filler.dim() > msg["value"].dim():  # by the dimension of a discrete site
                    filler = filler[0]
                self._options.fillers[name] = filler
            if name in self._options.fillers:
                msg["value"] = without_masked_nan(msg, self._options.fillers[name])

    def _shape(self, msg: Any) -> torch.Size:
        """The shape of a value of a site."""
        return replicate_shape(msg["fn"], _observed(msg), _plate_dims(msg))

    def _pyro_post_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if type(fn).__name__ == "_Subsample":
            self.rows[name] = msg["value"]
            return
        self._note_nesting(msg)
        if name in self._options.undrawn:
            return
        self._record_value(msg)
        if not msg["infer"].get("_deterministic"):
            log_prob = self._log_prob(msg)
            if log_prob is None:
                self.unscored |= self.event_dims.keys() & {name}
            else:
                self._record_log_prob(msg, log_prob, msg["scale"] if self._options.is_scaled else 1.0)

    def _note_nesting(self, msg: Any) -> None:
        fn = msg["fn"]
        self.max_plate_nesting = max(self.max_plate_nesting, len(fn.batch_shape))
        if msg["name"] not in self._options.undrawn:
            # Data may have more batch dimensions than their distribution.
            self.max_plate_nesting = max(self.max_plate_nesting, torch.as_tensor(msg["value"]).dim() - fn.event_dim)

    def _record_value(self, msg: Any) -> None:
        if not _is_fixed(msg):
            self.event_dims[msg["name"]] = msg["fn"].event_dim
        if not isinstance(msg["fn"], dist.Unit):
            self.record.values[msg["name"]] = torch.as_tensor(msg["value"])

    def _record_log_prob(self, msg: Any, log_prob: Tensor, scale: float | Tensor) -> None:
        self.record.log_probs[msg["name"]] = scale_and_mask(log_prob, scale, msg["mask"])

    def _log_prob(self, msg: Any) -> Tensor | None:
        """The log-density of a site, neither scaled nor masked; None if it has none and needs none."""
        name, fn = msg["name"], msg["fn"]
        self.scored = name
        try:
            if name in self._logs:
                log_prob = log_density(fn, self._logs[name])
            else:
                log_prob = fn.log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        except NotImplementedError:
            if self._options.needs_densities and not self._options.draw:  # a simulator need not have a density
                raise
            self.scored = None
            return None
        self.scored = None
        is_proposed = self._options.zero_outside_support and name in self._values
        for is_inside in (
            inside_support(fn, torch.as_tensor(msg["value"])) if msg["is_observed"] or is_proposed else None,
            inside_turn(fn, msg["value"]) if is_proposed else None,
        ):
            if is_inside is not None:
                log_prob = torch.where(is_inside, log_prob, -torch.inf)
        return log_prob


def _observed(msg: Any) -> Tensor | None:
    return msg["value"] if msg["is_observed"] else None


def _plate_dims(msg: Any) -> list[int]:
    """The batch dimensions that plates with a size declare."""
    return [frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized and frame.size != -1]


def _no_draw(msg: Any) -> Tensor:
    """NaN in place of a draw, so that what follows from it can be told."""
    shape = replicate_shape(msg["fn"], _observed(msg), _plate_dims(msg))
    return torch.full(shape, torch.nan, device=getattr(_observed(msg), "device", None))


def _is_fixed(msg: Any) -> bool:
    """Whether a site has no value of its own: factors, and sites that follow from others."""
    return isinstance(msg["fn"], dist.Unit) or follows_from_others(msg)

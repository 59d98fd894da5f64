"""Run a model for a batch of draws at once, so that every draw gets what a run for it alone gives.

Three ways are tried, and the first whose results agree with single runs is taken:

- "plate" is one run under an outer ``pyro.plate``, which is right for models that are written to broadcast;
- "vmap" is ``torch.func.vmap`` of a run, which is right for any model whose operations vmap supports;
- "loop" is one run for each draw.
"""

import copy
import time
import warnings
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyroflows.compiling.singular import nan_where_singular
from pyroflows.errors import FlowError, ModelError, warn
from pyroflows.models.run import LogsBySite, RunHandler, RunOptions, RunRecord, SiteValues
from pyroflows.models.tracing import Model
from pyroflows.randomness import random_state, seeded

Mode = Literal["plate", "vmap", "loop"]

# A batch is cut into chunks whose sites hold about this many numbers, since work that stays in a processor's cache is
# up to four times as fast as work that does not.
MAX_NUMBERS = 2**19
NUM_EXAMPLES = 5
# A model that draws random numbers of its own, such as dropout with a small rate, repeats itself by chance only rarely.
NUM_REPEATS, SEED_OF_REPEATS = 10, 20_011
NOT_FIXED = (
    "the model has no fixed log joint: two runs at equal values of all sites give site '{}' other log-densities, since "
    "the model draws random numbers outside of pyro.sample, or at a site that poutine.block hides. Take rows by "
    "pyro.plate(..., subsample_size=...) instead of torch.randperm, noise by pyro.sample instead of torch.randn, and "
    "call .eval() on a module with dropout"
)
LONG = 5.0  # a warning says how long draws one by one take, if it is more than this many seconds


class BatchedModel:
    """A model with its arguments, which runs for a batch of draws at once.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        examples: values ``(n, *site shape)`` by latent site, n at least 1, at which the ways of running a batch are
            compared with single runs; may be empty if ``draw`` is True.
        draw: whether every site without a given value is drawn, observed sites included; otherwise a latent without a
            value is an error.
        subsample: row indices by subsampled plate, for the runs at the examples.
        kept: which entries of a given value are taken, by site, booleans over leading dimensions of the site; the
            others are drawn from the site's distribution. None to take all.
        zero_outside_support: whether a given value outside of its support has log-density -inf, as an observed one has;
            without validation the distribution's ``log_prob`` may give any number there.

    Attributes:
        mode: the way of running that agrees with single runs: "plate", "vmap" or "loop".
        reference: the single run at the first example that passes validation.

    Raises:
        ModelError: if a latent has no value, a given value has another shape than its site, or the log-densities of two
            runs at equal values differ, as in a model that draws random numbers outside of ``pyro.sample``.

    Example:
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.deterministic("length", x.norm())
        >>> batched = BatchedModel(model, (), {}, {"x": torch.randn(5, 2)})
        >>> batched.mode  # under a plate the norm would be that of the whole batch
        'vmap'
        >>> record = batched({"x": torch.tensor([[3.0, 4.0], [0.0, 1.0]])}, num_draws=2)
        >>> record.values["length"], record.log_probs["x"].shape
        (tensor([5., 1.]), torch.Size([2]))
    """

    def __init__(
        self,
        model: Model,
        args: Any,
        kwargs: Any,
        examples: SiteValues,
        draw: bool = False,
        subsample: SiteValues | None = None,
        kept: SiteValues | None = None,
        zero_outside_support: bool = False,
    ) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs
        self._kept = kept or {}
        self._options = RunOptions(draw=draw, zero_outside_support=zero_outside_support)
        examples = {name: value[torch.arange(NUM_EXAMPLES) % len(value)] for name, value in examples.items()}
        with torch.no_grad():
            state = random_state()
            handler, index = self._first_valid(examples, subsample or {})
            examples = {name: value.roll(-index, 0) for name, value in examples.items()}
            self._handler, self.reference = handler, handler.record
            self._first = {name: value[0] for name, value in examples.items()}
            if not draw and not kept and _differs(state, random_state()):
                self._require_fixed()
            self._variants: dict[tuple[frozenset[str], bool, bool], BatchedModel] = {}
            self._failures: dict[str, str] = {}
            self.mode: Mode = self._right_mode(examples, subsample or {})

    def __call__(
        self,
        values: SiteValues,
        num_draws: int,
        subsample: SiteValues | None = None,
        logs: LogsBySite | None = None,
    ) -> RunRecord:
        """Run the model for a batch of draws, with gradients.

        Args:
            values: values ``(num_draws, *site shape)`` by site.
            num_draws: the number of draws, at least 1.
            subsample: row indices by subsampled plate; None to let each run draw them.
            logs: the logarithms of the values' distances from the edges of their supports, of the shapes of the values,
                by site whose log-density is computed from them.
        """
        return self._batch(self.mode, values, num_draws, subsample or {}, logs or {})

    @property
    def chunk_size(self) -> int:
        """The number of draws that one run should hold, so that they fit into a processor's cache."""
        return max(1, MAX_NUMBERS // sum(value.numel() for value in self.reference.values.values()))

    @torch.no_grad()
    def in_chunks(self, values: SiteValues, num_draws: int, logs: LogsBySite | None = None) -> RunRecord:
        """Run the model for any number of draws, chunk by chunk and without gradients."""
        if self.mode == "loop" and num_draws * self._seconds > LONG:
            self._warn(f"draw by draw, which takes about {num_draws * self._seconds:.0f} seconds for {num_draws} draws")
        size = self.chunk_size
        parts = []
        for start in range(0, num_draws, size):
            rows = slice(start, start + size)
            parts.append(self(_rows(values, rows), min(size, num_draws - start), logs=_rows(logs or {}, rows)))
        return RunRecord(_join([p.values for p in parts], torch.cat), _join([p.log_probs for p in parts], torch.cat))

    def unscaled(self) -> "BatchedModel":
        """The same model without ``poutine.scale``, for the log-densities of single observations."""
        made = copy.copy(self)
        made._options = replace(self._options, is_scaled=False)
        return made

    def drawing(self, examples: SiteValues, kept: SiteValues | None = None) -> "BatchedModel":
        """The same model with ``draw=True``, made once for each set of sites with given values.

        Args:
            examples: values ``(n, *site shape)`` by given site, as for the class; may be empty.
            kept: which entries of a given value are taken, as for the class.
        """
        return self._variant(examples, True, kept)

    def filling(self, examples: SiteValues, kept: SiteValues) -> "BatchedModel":
        """The same model, except that it takes only some entries of given values, and draws the others.

        Args:
            examples: values ``(n, *site shape)`` by latent site, as for the class.
            kept: which entries of a given value are taken, as for the class.
        """
        return self._variant(examples, self._options.draw, kept)

    def _variant(self, examples: SiteValues, draw: bool, kept: SiteValues | None) -> "BatchedModel":
        key = (frozenset(examples), draw, bool(kept))
        if key not in self._variants:
            self._variants[key] = BatchedModel(self._model, self._args, self._kwargs, examples, draw, kept=kept)
        return self._variants[key]

    def _require_fixed(self) -> None:
        """Raise if another run at the values of the reference, with other random numbers, has other log-densities."""
        with seeded(SEED_OF_REPEATS):
            for _ in range(NUM_REPEATS):
                state = random_state()
                other = self._run(self._first, self._handler.rows).record.log_probs
                for name, log_prob in self.reference.log_probs.items():
                    if name in other and not _close(log_prob, other[name]):
                        raise ModelError(NOT_FIXED.format(name))
                # A model that draws no numbers of torch's has now shown what it does.
                if not _differs(state, random_state()):
                    break

    def _first_valid(self, examples: SiteValues, subsample: SiteValues) -> tuple[RunHandler, int]:
        """Run at the first example that passes validation, which may fail where the density is zero."""
        first_error = None
        for index in range(NUM_EXAMPLES if examples else 1):
            try:
                values = {name: value[index] for name, value in examples.items()}
                return self._run(values, subsample, single=True), index
            except ValueError as error:
                if isinstance(error, FlowError):
                    raise
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _right_mode(self, examples: SiteValues, subsample: SiteValues) -> Mode:
        # Log-densities of drawn values show whether a batch is right. Where a site has none, vmap alone is right.
        unscored = self._handler.event_dims.keys() - self.reference.log_probs.keys()
        modes: tuple[Mode, ...] = ("vmap",) if unscored else ("plate", "vmap")
        if unscored:
            self._failures["plate"] = f"site '{min(unscored)}' has no log-density to compare"
        for mode in modes:
            try:
                record = self._batch(mode, examples, NUM_EXAMPLES, subsample, {})
                if unscored and not self._differ_by_draw(unscored):
                    self._failures[mode] = "all draws of a batch have the same noise"
                    continue
            except Exception as error:  # a model that is written for one draw may raise anything in a batch
                self._failures[mode] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            if self._agrees(record, subsample):
                return mode
            self._failures[mode] = "differs from single draws"
        start = time.perf_counter()
        self._run(self._first, subsample)
        self._seconds = time.perf_counter() - start
        if not self._options.draw and not self._kept:
            self._require_fixed()
            self._warn("draw by draw, which makes every step slow")
        return "loop"

    def _differ_by_draw(self, names: Collection[str]) -> bool:
        """Whether sites differ between the draws of a batch at equal values of all others, if they do in single runs.

        Noise that is not torch's, such as NumPy's, is drawn once for a whole batch under vmap.
        """
        given = {name: self.reference.values[name] for name in self._handler.event_dims if name not in names}
        repeated = {name: value.expand(2, *value.shape) for name, value in given.items()}
        batch = self._batch("vmap", repeated, 2, {}, {}).values
        singles = [self._run(given, {}).record.values for _ in range(2)]
        return all(
            torch.equal(*(single[name] for single in singles)) or not torch.equal(*batch[name]) for name in names
        )

    def _warn(self, how: str) -> None:
        warn(
            f"the model runs {how}: under an outer plate it fails with [{self._failures['plate']}], under vmap with "
            f"[{self._failures['vmap']}]. A model runs under a plate if it indexes from the right, x[..., 0] for x[0], "
            "and x[..., None] where a scalar site meets a vector",
        )

    def _agrees(self, record: RunRecord, subsample: SiteValues) -> bool:
        """Whether single runs at the values of a batch give the same values and log-densities as the batch."""
        for i in range(NUM_EXAMPLES):
            given = {name: record.values[name][i] for name in self._handler.event_dims}
            is_known = i == 0 and not self._options.draw and not self._kept
            # An example may lie where the density is zero, at which validation would raise.
            with pyro.validation_enabled(False):
                # All entries of the batch's values are given, also those that it has drawn.
                single = self.reference if is_known else self._run(given, subsample, takes_all=True).record
            batched = RunRecord(
                {k: v[i] for k, v in record.values.items()}, {k: v[i] for k, v in record.log_probs.items()}
            )
            pairs = [(single.values, batched.values), (single.log_probs, batched.log_probs)]
            if not all(a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a) for a, b in pairs):
                return False
        return True

    def _run(
        self,
        values: SiteValues,
        subsample: SiteValues,
        logs: LogsBySite | None = None,
        plate: Any = nullcontext(),  # noqa: B008
        single: bool = False,
        takes_all: bool = False,
    ) -> RunHandler:
        kept = {} if takes_all else self._kept

        def run() -> RunHandler:
            # The plate is the inner context, so that the handler sees the distributions that it has expanded.
            with RunHandler(self._options, values, subsample, logs or {}, kept, single) as handler, plate:
                self._model(*self._args, **self._kwargs)
            return handler

        return nan_where_singular(run)

    def _batch(
        self, mode: Mode, values: SiteValues, num_draws: int, subsample: SiteValues, logs: LogsBySite
    ) -> RunRecord:
        # The single run has validated the arguments; vmap cannot look at values, and validation costs time.
        with pyro.validation_enabled(False):
            if mode == "plate":
                return self._plate(values, num_draws, subsample, logs)
            if mode == "vmap":
                return self._vmap(values, num_draws, subsample, logs)
            singles = [self._run(_rows(values, i), subsample, _rows(logs, i)).record for i in range(num_draws)]
        for name in {name for single in singles for name in single.values.keys() ^ self.reference.values.keys()}:
            raise ModelError(
                f"the model has dynamic structure: site '{name}' appears in one run and not in another; a flow "
                "needs the same sites in every run"
            )
        return RunRecord(
            _join([s.values for s in singles], torch.stack), _join([s.log_probs for s in singles], torch.stack)
        )

    def _vmap(self, values: SiteValues, num_draws: int, subsample: SiteValues, logs: LogsBySite) -> RunRecord:
        def single(values: SiteValues, logs: LogsBySite, _: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            record = self._run(values, subsample, logs).record
            return record.values, record.log_probs

        run = torch.func.vmap(single, randomness="different")
        with warnings.catch_warnings():
            # Torch warns of operations that it runs one by one, about which a user can do nothing.
            warnings.filterwarnings("ignore", "There is a performance drop")
            return RunRecord(*run(dict(values), dict(logs), torch.arange(num_draws)))

    def _plate(self, values: SiteValues, num_draws: int, subsample: SiteValues, logs: LogsBySite) -> RunRecord:
        nesting = self._handler.max_plate_nesting

        def placed(name: str, value: Tensor) -> Tensor:
            batch_dim = value.dim() - 1 - self._handler.event_dims[name]
            return value.reshape((num_draws,) + (1,) * (nesting - batch_dim) + value.shape[1:])

        placed_values = {name: placed(name, value) for name, value in values.items()}
        placed_logs = {name: tuple(placed(name, part) for part in parts) for name, parts in logs.items()}
        plate = pyro.plate("_pyroflows_draws", num_draws, dim=-1 - nesting)
        record = self._run(placed_values, subsample, placed_logs, plate).record

        def flat(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: _draws_first(t, num_draws, like[name].shape) for name, t in tensors.items()}

        return RunRecord(flat(record.values, self.reference.values), flat(record.log_probs, self.reference.log_probs))


def _differs(state: list[Tensor], other: list[Tensor]) -> bool:
    return not all(map(torch.equal, state, other))


def _draws_first(tensor: Tensor, num_draws: int, shape: torch.Size) -> Tensor:
    """Bring a tensor from a run under an outer plate to ``(num_draws, *shape)``, also if no draw affects it."""
    if tensor.numel() == num_draws * shape.numel():
        return tensor.reshape((num_draws, *shape))
    return tensor.expand((num_draws, *shape))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = torch.finfo(torch.promote_types(a.dtype, b.dtype)).eps ** 0.5
    return torch.allclose(a.to(b.dtype), b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _rows(values: Mapping[str, Any], rows: int | slice) -> dict[str, Any]:
    """Take rows of the tensors of each site."""
    return tree_map(lambda value: value[rows], dict(values))


def _join(parts: list[dict[str, Tensor]], how: Any) -> dict[str, Tensor]:
    return {name: how([part[name] for part in parts]) for name in parts[0]}

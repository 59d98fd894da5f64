"""Run a model for a batch of draws at once, so that every draw gets what a run for it alone gives.

Four ways are tried, and the first whose results agree with single runs is taken:

- "plate" is one run under an outer ``pyro.plate``, which is right for models that are written to broadcast;
- "vmap" is ``torch.func.vmap`` of a run, which is right for any model whose operations vmap supports;
- "paths" is the same for models that fill tensors in place or branch on values, see :mod:`pyroflows.models.paths`;
- "loop" is one run for each draw.
"""

import copy
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyroflows.compiling.singular import nan_where_singular
from pyroflows.errors import FlowError, warn
from pyroflows.models.leaves import are_close, gradients_of_leaves, gradients_of_leaves_with_writes
from pyroflows.models.mixed import keeps_draws_apart
from pyroflows.models.one_draw import ManyPaths, Place, WritesOutside
from pyroflows.models.paths import DifferentPaths, Results, run_paths, run_vmapped
from pyroflows.models.repeats import close, differs, require_same
from pyroflows.models.run import LogsBySite, RunHandler, RunOptions, RunRecord, SiteValues
from pyroflows.models.slow import duration, failure, how_to_speed_up
from pyroflows.models.tracing import Model
from pyroflows.models.value_reads import ValueReads
from pyroflows.models.ways import chunks_with_all_factors, joined, rows_of, run_plate, run_singly
from pyroflows.randomness import random_state, seeded

Mode = Literal["plate", "vmap", "paths", "loop"]

# A batch is cut into chunks whose sites hold about this many numbers, since work that stays in a processor's cache is
# up to four times as fast as work that does not.
MAX_NUMBERS = 2**19
NUM_EXAMPLES = 5
NUM_FAR = 8  # further examples, which may lie anywhere
NUM_SLOW = 10  # draws of a chunk where each takes a run of its own
NUM_TRIALS = 10  # draws of a vague prior may be ones that the rest of the model refuses
SEED_OF_VARIANTS = 20_021
LONG = 5.0  # a warning says how long draws one by one take, if it is more than this many seconds


class BatchedModel:
    """A model with its arguments, which runs for a batch of draws at once.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        examples: values ``(n, *site shape)`` by latent site, n at least 1, at which the ways of running a batch are
            compared with single runs; may be empty if ``draw`` is True. Those after the first ``NUM_EXAMPLES`` may lie
            anywhere.
        draw: whether every site without a given value is drawn, observed sites included; otherwise a latent without a
            value is an error.
        subsample: row indices by subsampled plate, for the runs at the examples.
        kept: which entries of a given value are taken, by site, booleans over leading dimensions of the site; the
            others are drawn from the site's distribution. None to take all.
        zero_outside_support: whether a given value outside of its support has log-density -inf, as an observed one has;
            without validation the distribution's ``log_prob`` may give any number there.
        undrawn: the sites that are not drawn although others are, for ``draw``, see :class:`RunOptions`.
        needs_densities: whether a site whose distribution has no log-density is an error, see :class:`RunOptions`.

    Attributes:
        mode: the way of running that agrees with single runs: "plate", "vmap", "paths" or "loop".
        said: the warnings about ArviZ data that were given, which need not be repeated.
        reference: the single run at the first example that passes validation.

    Raises:
        ModelError: if a latent has no value, a given value has another shape than its site, a site cannot be drawn
            although it should be, or the log-densities of two runs at equal values differ, as in a model that draws
            random numbers outside of ``pyro.sample``.

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
        undrawn: frozenset[str] = frozenset(),
        needs_densities: bool = True,
    ) -> None:
        self._model, self._args, self._kwargs = model, args, kwargs
        self._kept = kept or {}
        self.said: set[str] = set()
        self._options = RunOptions(
            draw=draw,
            needs_densities=needs_densities,
            zero_outside_support=zero_outside_support,
            undrawn=undrawn,
        )
        self._far = {name: value[NUM_EXAMPLES:][:NUM_FAR] for name, value in examples.items()}
        examples = {name: value[torch.arange(NUM_EXAMPLES) % len(value)] for name, value in examples.items()}
        with torch.no_grad():
            state = random_state()
            with ValueReads() as reads:
                handler, index = self._first_valid(examples, subsample or {})
            self._reads_values = reads.any
            examples = {name: value.roll(-index, 0) for name, value in examples.items()}
            self._handler, self.reference = handler, handler.record
            self._first = {name: value[0] for name, value in examples.items()}
            if not draw and not kept and differs(state, random_state()):
                self._require_fixed()
            self._variants: dict[tuple[frozenset[str], bool, bool, frozenset[str]], BatchedModel] = {}
            self._failures: dict[str, str] = {}
            self._places: set[Place] = set()
            self._is_said = False
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
        try:
            return self._batch(self.mode, values, num_draws, subsample or {}, logs or {})
        except (ManyPaths, DifferentPaths) as error:  # such as with rows of data that the examples did not have
            self._failures = {"plate": "can differ from single draws", **self._failures, "paths": failure(error)}
            self._warn("which makes some steps slow")
            return self._batch("loop", values, num_draws, subsample or {}, logs or {})

    @property
    def chunk_size(self) -> int:
        """The number of draws that one run should hold, so that they fit into a processor's cache; few one by one."""
        most = NUM_SLOW if self.mode == "loop" else MAX_NUMBERS  # progress is shown, and kept, chunk by chunk
        return max(1, min(most, MAX_NUMBERS // sum(value.numel() for value in self.reference.values.values())))

    @torch.no_grad()
    def in_chunks(self, values: SiteValues, num_draws: int, logs: LogsBySite | None = None) -> RunRecord:
        """Run the model for any number of draws, chunk by chunk and without gradients."""
        if self.mode == "loop" and num_draws * self._seconds > LONG:
            self._warn(f"which takes about {duration(num_draws * self._seconds)} for {num_draws} draws")
        size = self.chunk_size
        sizes = [min(size, num_draws - start) for start in range(0, num_draws, size)]
        parts = []
        for i, length in enumerate(sizes):
            rows = slice(i * size, i * size + length)
            parts.append(self(rows_of(values, rows), length, logs=rows_of(logs or {}, rows)))
        log_probs = chunks_with_all_factors([part.log_probs for part in parts], sizes)
        return RunRecord(joined([part.values for part in parts], torch.cat), log_probs)

    def unscaled(self) -> "BatchedModel":
        """The same model without ``poutine.scale``, for the log-densities of single observations."""
        made = copy.copy(self)
        made._options = replace(self._options, is_scaled=False)
        return made

    def drawing(
        self, examples: SiteValues, kept: SiteValues | None = None, undrawn: frozenset[str] = frozenset()
    ) -> "BatchedModel":
        """The same model with ``draw=True``, made once for each set of sites with given values.

        Args:
            examples: values ``(n, *site shape)`` by given site, as for the class; may be empty.
            kept: which entries of a given value are taken, as for the class.
            undrawn: the sites that are not drawn although others are, as for the class.
        """
        return self._variant(examples, True, kept, undrawn)

    def filling(self, examples: SiteValues, kept: SiteValues) -> "BatchedModel":
        """The same model, except that it takes only some entries of given values, and draws the others.

        Args:
            examples: values ``(n, *site shape)`` by latent site, as for the class.
            kept: which entries of a given value are taken, as for the class.
        """
        return self._variant(examples, self._options.draw, kept)

    def _variant(
        self, examples: SiteValues, draw: bool, kept: SiteValues | None, undrawn: frozenset[str] = frozenset()
    ) -> "BatchedModel":
        key = (frozenset(examples), draw, bool(kept), undrawn)
        if key not in self._variants:
            # The draws of a caller with a seed are then the same whether or not the variant existed before.
            with seeded(SEED_OF_VARIANTS):
                made = BatchedModel(self._model, self._args, self._kwargs, examples, draw, kept=kept, undrawn=undrawn)
            made._is_said |= self._is_said
            self._variants[key] = made
        return self._variants[key]

    def _require_fixed(self) -> None:
        """Raise if another run at the values of the reference, with other random numbers, has other log-densities."""
        require_same(self.reference.log_probs, lambda: self._run(self._first, self._handler.rows).record.log_probs)

    def _require_fixed_paths(self, examples: SiteValues) -> None:
        """The same for each path through the branches of the model, most of which the reference does not take."""

        def check(results: Results, again: Callable[[], Results]) -> None:
            require_same(results[1], lambda: again()[1])

        self._batch("paths", examples, NUM_EXAMPLES, self._handler.rows, {}, check)

    def _first_valid(self, examples: SiteValues, subsample: SiteValues) -> tuple[RunHandler, int]:
        """Run at the first example that passes validation, which may fail where the density is zero."""
        first_error = None
        # Without examples each run draws all sites anew; without some draws no validation would pass.
        for index in range(NUM_EXAMPLES if examples else NUM_TRIALS):
            try:
                values = {name: value[index] for name, value in examples.items()}
                with pyro.validation_enabled(False) if self._options.undrawn else nullcontext():
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
        modes: tuple[Mode, ...] = ("plate", "vmap", "paths")
        if unscored:
            self._failures["plate"] = f"cannot be compared, since site '{min(unscored)}' has no log-density"
            modes = ("vmap", "paths")
        elif self._reads_values and not self._is_right("vmap", examples, subsample, unscored):
            # Under a plate (x > 0).all() asks for all draws at once, which examples on one side do not show.
            modes = ("paths", "plate")
        for mode in modes:
            if self._is_right(mode, examples, subsample, unscored):
                return mode
        start = time.perf_counter()
        self._run(self._first, subsample)
        self._seconds = time.perf_counter() - start
        if not self._options.draw and not self._kept:
            self._require_fixed()
            self._warn(f"which makes every step slow: a run takes about {duration(self._seconds)}")
        return "loop"

    def _is_right(self, mode: Mode, examples: SiteValues, subsample: SiteValues, unscored: Collection[str]) -> bool:
        """Whether a way of running gives what single runs give; if it does not, note why."""
        try:
            record = self._batch(mode, examples, NUM_EXAMPLES, subsample, {})
            if unscored and not self._differ_by_draw(mode, unscored):
                self._failures[mode] = "gives all draws of a batch the same noise"
                return False
            if not self._agrees(record, subsample) or not self._keeps_draws_apart(mode, examples, record, subsample):
                self._failures[mode] = "differs from single draws"
                return False
        except Exception as error:  # a model that is written for one draw may raise anything in a batch
            if isinstance(error, WritesOutside) and not self._options.draw:
                raise  # the next step of a fit would go through the gradients of all steps before
            self._failures[mode] = failure(error)
            return False
        if mode == "paths" and not self._options.draw and not self._kept:
            self._require_fixed_paths(examples)
            return self._is_right_under_gradients(mode, examples, subsample)
        return True

    @torch.enable_grad()
    def _is_right_under_gradients(self, mode: Mode, examples: SiteValues, subsample: SiteValues) -> bool:
        """Whether a way of running gives what single runs give, and their gradients; if it does not, note why.

        Code that fills tensors runs in another way where gradients are needed, see :class:`OneDraw`.
        """
        leaves = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in examples.items()}

        def singly() -> Tensor:
            rows = [{k: v[i].clone() for k, v in leaves.items()} for i in range(NUM_EXAMPLES)]
            return _total([self._run(values, subsample).record for values in rows])

        try:
            record = self._batch(mode, {k: v.clone() for k, v in leaves.items()}, NUM_EXAMPLES, subsample, {})
            found = gradients_of_leaves(_total([record]))
            with pyro.validation_enabled(False):
                expected = gradients_of_leaves_with_writes(singly)
        except Exception as error:  # as above
            self._failures[mode] = failure(error)
            return False
        with torch.no_grad():
            is_same = self._agrees(RunRecord(*tree_map(torch.detach, (record.values, record.log_probs))), subsample)
        if not is_same or not are_close(found, expected):
            self._failures[mode] = "differs from single draws where gradients are computed"
            return False
        return True

    def _keeps_draws_apart(self, mode: Mode, near: SiteValues, record: RunRecord, subsample: SiteValues) -> bool:
        """Whether draws keep their log-densities in a batch with draws that lie far from them."""
        if self._options.draw or self._kept:
            return True

        def batch(values: SiteValues, num_draws: int) -> RunRecord:
            return self._batch(mode, values, num_draws, subsample, {})

        def single(values: SiteValues) -> RunRecord:
            with pyro.validation_enabled(False):
                return self._run(values, subsample).record

        return keeps_draws_apart(batch, single, close, near, record, self._far)

    def _differ_by_draw(self, mode: Mode, names: Collection[str]) -> bool:
        """Whether sites differ between the draws of a batch at equal values of all others, if they do in single runs.

        Noise that is not torch's, such as NumPy's, is drawn once for a whole batch under vmap.
        """
        given = {name: self.reference.values[name] for name in self._handler.event_dims if name not in names}
        repeated = {name: value.expand(2, *value.shape) for name, value in given.items()}
        batch = self._batch(mode, repeated, 2, {}, {}).values
        singles = [self._run(given, {}).record.values for _ in range(2)]
        return all(
            torch.equal(*(single[name] for single in singles)) or not torch.equal(*batch[name]) for name in names
        )

    def _warn(self, cost: str) -> None:
        if not self._is_said:
            warn(f"the model runs draw by draw, {cost}; {how_to_speed_up(self._failures)}")
            self._is_said = True

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
            if not all(a.keys() == b.keys() and all(close(a[k], b[k]) for k in a) for a, b in pairs):
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
        self,
        mode: Mode,
        values: SiteValues,
        num_draws: int,
        subsample: SiteValues,
        logs: LogsBySite,
        check: Callable[[Results, Callable[[], Results]], None] | None = None,
    ) -> RunRecord:
        def run(values: SiteValues, logs: LogsBySite, plate: Any = nullcontext()) -> RunRecord:  # noqa: B008
            return self._run(values, subsample, logs, plate).record

        def results(inputs: tuple[SiteValues, LogsBySite]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            record = run(*inputs)
            return record.values, record.log_probs

        inputs = (dict(values), dict(logs))
        # The single run has validated the arguments; vmap cannot look at values, and validation costs time.
        with pyro.validation_enabled(False):
            if mode == "plate":
                return run_plate(run, inputs, num_draws, self._handler)
            if mode == "vmap":
                return RunRecord(*run_vmapped(results, inputs, num_draws))
            if mode == "paths":
                seed = int(torch.randint(2**62, ())) if self._options.draw or self._kept else None
                return RunRecord(*run_paths(results, inputs, num_draws, self._places, seed, check))
            return run_singly(run, inputs, num_draws, self.reference)


def _total(records: list[RunRecord]) -> Tensor:
    return torch.stack([log_prob.sum() for record in records for log_prob in record.log_probs.values()]).sum()

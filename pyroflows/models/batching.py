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
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyroflows.errors import FlowError, warn
from pyroflows.models.comparison import agrees, differ_by_draw, keep_apart
from pyroflows.models.leaves import run_with_gradients
from pyroflows.models.one_draw import ManyPaths, WritesOutside
from pyroflows.models.paths import DifferentPaths, Results
from pyroflows.models.repeats import differs, require_same
from pyroflows.models.run import LogsBySite, RunHandler, RunOptions, RunRecord, SiteValues
from pyroflows.models.runner import Mode, ModelRunner
from pyroflows.models.slow import duration, failure, how_to_speed_up, refuted
from pyroflows.models.structure import Enumeration
from pyroflows.models.tracing import Model
from pyroflows.models.value_reads import ValueReads, caught_failure
from pyroflows.models.ways import chunks_with_all_factors, joined, rows_of
from pyroflows.randomness import random_state, seeded

# A batch is cut into chunks whose largest site holds about this many numbers, since work that stays in a processor's
# cache is up to four times as fast as work that does not, and all sites this many, since they are kept.
MAX_NUMBERS, MAX_NUMBERS_OF_ALL = 2**19, 2**23
NUM_EXAMPLES = 5
NUM_FAR = 8  # further examples, which may lie anywhere
NUM_SLOW = 10  # draws of a chunk where each takes a run of its own
NUM_TRIALS = 10  # draws of a vague prior may be ones that the rest of the model refuses
SEED_OF_VARIANTS = 20_021
MAX_COMPANY = 500  # draws in a batch of which some are compared with single runs
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
        enumeration: the latents that are summed out of the log-densities; None if there are none.

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
        enumeration: Enumeration | None = None,
    ) -> None:
        self.said: set[str] = set()
        options = RunOptions(
            draw=draw,
            needs_densities=needs_densities,
            zero_outside_support=zero_outside_support,
            undrawn=undrawn,
            enumeration=enumeration,
        )
        self._runner = self._make_runner(model, args, kwargs, options, kept or {})
        self._far = {name: value[NUM_EXAMPLES:][:NUM_FAR] for name, value in examples.items()}
        examples = {name: value[torch.arange(NUM_EXAMPLES) % len(value)] for name, value in examples.items()}
        with torch.no_grad():
            state = random_state()
            with ValueReads() as reads:
                handler, index = self._first_valid(examples, subsample or {})
            self._reads_values, self._factorisations = reads.any, reads.factorisations
            examples = {name: value.roll(-index, 0) for name, value in examples.items()}
            self._runner.handler, self.reference = handler, handler.record
            self._first = {name: value[0] for name, value in examples.items()}
            if not self._is_random and differs(state, random_state()):
                self._require_fixed()
            self._variants: dict[tuple[frozenset[str], bool, bool, frozenset[str]], BatchedModel] = {}
            self._failures: dict[str, str] = {}
            self._is_said = self._is_refuted = False
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
            return self._runner.batch(self.mode, values, num_draws, subsample or {}, logs or {})
        except (ManyPaths, DifferentPaths) as error:  # such as with rows of data that the examples did not have
            self._failures = {"plate": "can differ from single draws", **self._failures, "paths": failure(error)}
            self._warn("which makes some steps slow")
            return self._runner.batch("loop", values, num_draws, subsample or {}, logs or {})

    def _make_runner(self, model: Model, args: Any, kwargs: Any, options: RunOptions, kept: SiteValues) -> ModelRunner:
        return ModelRunner(model, args, kwargs, options, kept)

    def single(self, values: SiteValues, subsample: SiteValues | None = None) -> RunRecord:
        """Run the model for one draw, without validation.

        Args:
            values: values by site.
            subsample: row indices by subsampled plate; None to take those of the reference.
        """
        with pyro.validation_enabled(False):
            return self._runner.once(values, self._runner.handler.rows if subsample is None else subsample).record

    def run_singly_if_wrong(self, values: SiteValues, rows: Tensor) -> bool:
        """Run draw by draw from now on, with a warning, if draws have other log-densities in a batch than alone.

        The examples need not show a branch on values far from them, which a batch takes for all of its draws.

        Args:
            values: values ``(n, *site shape)`` by site.
            rows: the indices of the draws for which the model also runs alone; others are in the batch for company.

        Returns:
            Whether they have other log-densities.
        """
        if self.mode == "loop" or self._is_random:
            return False

        def batch(values: SiteValues, num_draws: int) -> RunRecord:
            return self(values, num_draws, self._runner.handler.rows)

        compared, company = rows_of(values, rows), rows_of(values, slice(MAX_COMPANY))
        if keep_apart(batch, self.single, {}, RunRecord({}, {}), compared, company):
            return False
        if not self._is_refuted:
            warn(refuted(self.mode, self._seconds))
        for batched in (self, *self._variants.values()):
            batched.mode, batched._is_refuted, batched._is_said = "loop", True, True
        return True

    @property
    def chunk_size(self) -> int:
        """The number of draws that one run should hold, so that they fit into a processor's cache; few one by one."""
        most = NUM_SLOW if self.mode == "loop" else MAX_NUMBERS  # progress is shown, and kept, chunk by chunk
        sizes = [value.numel() for value in self.reference.values.values()] + self._runner.handler.factor_sizes
        return max(1, min(most, MAX_NUMBERS // max(sizes), MAX_NUMBERS_OF_ALL // sum(sizes)))

    @property
    def _is_random(self) -> bool:
        """Whether runs at equal values differ, since they draw sites."""
        return self._runner.draws

    @cached_property
    def _seconds(self) -> float:
        """How long a run for one draw takes."""
        start = time.perf_counter()
        self.single(self._first)
        return time.perf_counter() - start

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
        made._runner = copy.copy(self._runner)
        made._runner.options = replace(self._runner.options, is_scaled=False)
        return made

    def at(self, args: Any, kwargs: Any) -> "BatchedModel":
        """The same model with other arguments, which differ by the values of tensors."""
        made = copy.copy(self)
        made._runner = copy.copy(self._runner)
        made._runner.args, made._runner.kwargs = args, kwargs
        return made

    @cached_property
    def discrete_draws(self) -> "BatchedModel":
        """The same model, which draws the discrete latents given values of all others; its record has them alone."""
        enumeration = self._runner.options.enumeration
        assert enumeration is not None
        made = copy.copy(self)
        made._runner = runner = copy.copy(self._runner)
        runner.options = replace(runner.options, enumeration=replace(enumeration, is_drawn=True))
        rows = self._runner.handler.rows
        with torch.no_grad(), seeded(SEED_OF_VARIANTS), pyro.validation_enabled(False):
            runner.handler = runner.once(self._first, rows)
            made.reference = runner.handler.record
            repeated = {name: value.expand(2, *value.shape) for name, value in self._first.items()}
            try:
                runner.batch(self.mode, repeated, 2, rows, {})
            except Exception:  # what sums in a batch need not draw in a batch
                made.mode = "loop"
        return made

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The names of the sites whose log-densities are recorded as one, by the name of the record."""
        return self._runner.handler.groups

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
        return self._variant(examples, self._runner.options.draw, kept)

    def _variant(
        self, examples: SiteValues, draw: bool, kept: SiteValues | None, undrawn: frozenset[str] = frozenset()
    ) -> "BatchedModel":
        key = (frozenset(examples), draw, bool(kept), undrawn)
        if key not in self._variants:
            # The draws of a caller with a seed are then the same whether or not the variant existed before.
            with seeded(SEED_OF_VARIANTS):
                runner = self._runner
                made = BatchedModel(
                    runner.model, runner.args, runner.kwargs, examples, draw, kept=kept, undrawn=undrawn
                )
            made._is_said |= self._is_said
            if self._is_refuted:
                made.mode = "loop"
            self._variants[key] = made
        return self._variants[key]

    def _require_fixed(self) -> None:
        """Raise if another run at the values of the reference, with other random numbers, has other log-densities."""
        require_same(
            self.reference.log_probs, lambda: self._runner.once(self._first, self._runner.handler.rows).record.log_probs
        )

    def _require_fixed_paths(self, examples: SiteValues) -> None:
        """The same for each path through the branches of the model, most of which the reference does not take."""

        def check(results: Results, again: Callable[[], Results]) -> None:
            require_same(results[1], lambda: again()[1])

        self._runner.batch("paths", examples, NUM_EXAMPLES, self._runner.handler.rows, {}, check)

    def _first_valid(self, examples: SiteValues, subsample: SiteValues) -> tuple[RunHandler, int]:
        """Run at the first example that passes validation, which may fail where the density is zero."""
        first_error = None
        # Without examples each run draws all sites anew; without some draws no validation would pass.
        for index in range(NUM_EXAMPLES if examples else NUM_TRIALS):
            try:
                values = {name: value[index] for name, value in examples.items()}
                with pyro.validation_enabled(False) if self._runner.options.undrawn else nullcontext():
                    return self._runner.once(values, subsample, single=True), index
            except ValueError as error:
                if isinstance(error, FlowError):
                    raise
                first_error = first_error or error
        assert first_error is not None
        raise first_error

    def _right_mode(self, examples: SiteValues, subsample: SiteValues) -> Mode:
        # Log-densities of drawn values show whether a batch is right. Where a site has none, vmap alone is right.
        unscored = self._runner.handler.unscored
        modes: tuple[Mode, ...] = ("plate", "vmap", "paths")
        with pyro.validation_enabled(False):
            caught = caught_failure(lambda: self._runner.once(self._first, subsample), self._factorisations)
        if caught is not None:
            modes = ()
            self._failures = dict.fromkeys(
                ("plate", "vmap"),
                f"would take one branch for all draws, since the error of the factorisation{caught} is caught",
            )
        elif unscored:
            self._failures["plate"] = f"cannot be compared, since site '{min(unscored)}' has no log-density"
            modes = ("vmap", "paths")
        elif self._reads_values and not self._is_right("vmap", examples, subsample, unscored):
            # Under a plate (x > 0).all() asks for all draws at once, which examples on one side do not show.
            modes = ("paths", "plate")
        for mode in modes:
            if self._is_right(mode, examples, subsample, unscored):
                return mode
        if not self._is_random:
            self._require_fixed()
            self._warn(f"which makes every step slow: a run takes about {duration(self._seconds)}")
        return "loop"

    def _is_right(self, mode: Mode, examples: SiteValues, subsample: SiteValues, unscored: Collection[str]) -> bool:
        """Whether a way of running gives what single runs give; if it does not, note why."""

        def batch(values: SiteValues, num_draws: int) -> RunRecord:
            return self._runner.batch(mode, values, num_draws, subsample, {})

        def single(values: SiteValues) -> RunRecord:
            return self.single(values, subsample)

        try:
            record = batch(examples, NUM_EXAMPLES)
            given = {
                name: self.reference.values[name] for name in self._runner.handler.event_dims if name not in unscored
            }
            if unscored and not differ_by_draw(batch, single, given, unscored):
                self._failures[mode] = "gives all draws of a batch the same noise"
                return False
            if not self._agrees(record, subsample) or not (
                self._is_random or keep_apart(batch, single, examples, record, self._far)
            ):
                self._failures[mode] = "differs from single draws"
                return False
        except Exception as error:  # a model that is written for one draw may raise anything in a batch
            if isinstance(error, WritesOutside) and not self._runner.options.draw:
                raise  # the next step of a fit would go through the gradients of all steps before
            self._failures[mode] = failure(error)
            return False
        if mode == "paths" and not self._is_random:
            self._require_fixed_paths(examples)
            return self._is_right_under_gradients(mode, examples, subsample)
        return True

    def _is_right_under_gradients(self, mode: Mode, examples: SiteValues, subsample: SiteValues) -> bool:
        """Whether a way of running gives what single runs give, and their gradients; if it does not, note why.

        Code that fills tensors runs in another way where gradients are needed, see :class:`OneDraw`.
        """

        def batch(values: SiteValues) -> RunRecord:
            return self._runner.batch(mode, values, NUM_EXAMPLES, subsample, {})

        try:
            found = run_with_gradients(batch, partial(self.single, subsample=subsample), examples, NUM_EXAMPLES)
        except Exception as error:  # as above
            self._failures[mode] = failure(error)
            return False
        if not found[1] or not self._agrees(found[0], subsample):
            self._failures[mode] = "differs from single draws where gradients are computed"
            return False
        return True

    def _warn(self, cost: str) -> None:
        if not self._is_said:
            warn(f"the model runs draw by draw, {cost}; {how_to_speed_up(self._failures)}")
            self._is_said = True

    def _agrees(self, record: RunRecord, subsample: SiteValues) -> bool:
        """Whether single runs at the values of a batch give the same values and log-densities as the batch."""

        def single(i: int, values: SiteValues) -> RunRecord:
            if i == 0 and not self._is_random:
                return self.reference
            # All entries of the batch's values are given, also those that it has drawn.
            given = {name: values[name] for name in self._runner.handler.event_dims}
            # An example may lie where the density is zero, at which validation would raise.
            with pyro.validation_enabled(False):
                return self._runner.once(given, subsample, takes_all=True).record

        return agrees(record, single, NUM_EXAMPLES)

"""Runs of a model with its arguments, for one draw or for a batch of draws in a given way."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from pyroflows.compiling.singular import nan_where_singular
from pyroflows.models.enumeration import run_handler
from pyroflows.models.one_draw import Place
from pyroflows.models.paths import Results, run_paths, run_vmapped
from pyroflows.models.run import LogsBySite, RunHandler, RunOptions, RunRecord, SiteValues
from pyroflows.models.tracing import Model
from pyroflows.models.ways import run_plate, run_singly

Mode = Literal["plate", "vmap", "paths", "loop"]


class ModelRunner:
    """A model with its arguments, which runs in any way that is asked for, right or wrong.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        options: what all runs have in common.
        kept: which entries of a given value are taken, by site.

    Attributes:
        handler: the handler of a single run, to be set before the first batch.
        places: where the model makes tensors that it fills, as far as known.
    """

    handler: RunHandler

    def __init__(self, model: Model, args: Any, kwargs: Any, options: RunOptions, kept: SiteValues) -> None:
        self.model, self.args, self.kwargs, self.options, self.kept = model, args, kwargs, options, kept
        self.places: set[Place] = set()

    def once(
        self,
        values: SiteValues,
        subsample: SiteValues,
        logs: LogsBySite | None = None,
        plate: Any = nullcontext(),  # noqa: B008
        single: bool = False,
        takes_all: bool = False,
    ) -> RunHandler:
        """Run the model once.

        Args:
            values: values by site.
            subsample: row indices by subsampled plate.
            logs: the logarithms of the values' distances from the edges of their supports, by site.
            plate: a plate around the model.
            single: whether the shapes of values are checked.
            takes_all: whether all entries of given values are taken.
        """
        kept = {} if takes_all else self.kept

        def run() -> RunHandler:
            # The plate is the inner context, so that the handler sees the distributions that it has expanded.
            with self._make_handler(values, subsample, logs or {}, kept, single) as handler, plate:
                self.model(*self.args, **self.kwargs)
            return handler

        return nan_where_singular(run)

    def _make_handler(
        self, values: SiteValues, subsample: SiteValues, logs: LogsBySite, kept: SiteValues, single: bool
    ) -> AbstractContextManager[RunHandler]:
        return run_handler(self.options, values, subsample, logs, kept, single)

    @property
    def draws(self) -> bool:
        """Whether runs draw random numbers."""
        enumeration = self.options.enumeration
        return self.options.draw or bool(self.kept) or (enumeration is not None and enumeration.is_drawn)

    def batch(
        self,
        mode: Mode,
        values: SiteValues,
        num_draws: int,
        subsample: SiteValues,
        logs: LogsBySite,
        check: Callable[[Results, Callable[[], Results]], None] | None = None,
    ) -> RunRecord:
        """Run the model for a batch of draws.

        Args:
            mode: the way of running.
            values: values ``(num_draws, *site shape)`` by site.
            num_draws: the number of draws.
            subsample: row indices by subsampled plate.
            logs: the logarithms of the values' distances from the edges of their supports, by site.
            check: is called for each path, see :func:`run_paths`.
        """

        def run(values: SiteValues, logs: LogsBySite, plate: Any = nullcontext()) -> RunRecord:  # noqa: B008
            return self.once(values, subsample, logs, plate).record

        def results(inputs: tuple[SiteValues, LogsBySite]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            record = run(*inputs)
            return record.values, record.log_probs

        inputs = (dict(values), dict(logs))
        # The single run has validated the arguments; vmap cannot look at values, and validation costs time.
        with pyro.validation_enabled(False):
            if mode == "plate":
                return run_plate(run, inputs, num_draws, self.handler)
            if mode == "vmap":
                return RunRecord(*run_vmapped(results, inputs, num_draws))
            if mode == "paths":
                seed = int(torch.randint(2**62, ())) if self.draws else None
                return RunRecord(*run_paths(results, inputs, num_draws, self.places, seed, check))
            return run_singly(run, inputs, num_draws, self.handler.record)

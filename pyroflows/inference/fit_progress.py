"""What a fit shows while it runs."""

import numpy as np

from pyroflows.inference.candidates import FittedCandidate
from pyroflows.inference.search.starts import Starts
from pyroflows.progress import Progress
from pyroflows.shapes import counted
from pyroflows.training.schedules import WINDOW


class FitProgress(Progress):
    """The progress bar of a fit: it describes the model, searches for modes, trains flows and judges them."""

    def __init__(self, is_shown: bool, prefix: str = "") -> None:
        super().__init__(is_shown, prefix)
        self._num_starts: int | None = None
        self._candidate, self._num_flows, self._num_trained = "flow", 1, 0

    def found(self, found: Starts, num_expected: int) -> None:
        """Show what the search for modes has found by now.

        Args:
            found: a summary of the search.
            num_expected: the number of starts there will be, if no more modes are found.
        """
        text = f"search for modes, {counted(len(found.modes), 'mode')} so far"
        if self._num_starts is None:
            self.start(text, num_expected, found.num_starts, unit="start")
        else:
            self.update(found.num_starts - self._num_starts, num_expected, text)
        self._num_starts = found.num_starts

    def fit(self, candidate: str, num_flows: int) -> None:
        """Note that flows of a candidate will be trained, one after the other."""
        self._candidate, self._num_flows, self._num_trained = candidate, num_flows, 0

    def train(self) -> None:
        """Show that the next flow is being trained."""
        self._num_trained += 1
        several = f" {self._num_trained} of {self._num_flows}" if self._num_flows > 1 else ""
        self.start(f"training of the {self._candidate}{several}")

    def done(self, fitted: FittedCandidate) -> None:
        """Show what was fitted."""
        history, found = fitted.history, fitted.found
        parts = []
        if found is not None:
            parts += [counted(found.num_starts, "start"), counted(len(fitted.candidate.starts), "mode")]
        is_mixture = len(fitted.candidate.starts) > 1
        of_first = " of the first flow" if is_mixture else ""
        parts.append(f"{counted(history.num_steps, 'step')}{of_first}" if history else "a Gaussian was enough")
        # The ELBO of one flow of a mixture is not that of the mixture.
        elbos = history.recent("elbo", WINDOW) if history and not is_mixture else ()
        if len(elbos):
            parts.append(f"ELBO {np.mean(elbos):.2f}")
        if "draws" in vars(fitted):
            parts.append(f"verdict: {fitted.diagnosis.verdict}")
        self.finish(f"fit: {', '.join(parts)}")

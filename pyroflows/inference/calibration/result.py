"""The result of a calibration: ranks, their tests, and a verdict in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from pyroflows.inference.calibration.pictures import plot_coverage, plot_ecdf_differences
from pyroflows.inference.calibration.quantities import COVERAGE, Component
from pyroflows.inference.calibration.uniformity import (
    Test,
    adjusted,
    chi_square_p,
    kolmogorov_p,
    pooled_shift_p,
    pooled_spread_p,
    scores,
    shift_p,
    spread_p,
)
from pyroflows.inference.calibration.words import TOGETHER, clause, tag

if TYPE_CHECKING:
    import pandas as pd

# The chance that an exact fit is called not calibrated.
FALSE_ALARMS = 0.05
# More failed fits than this share are a fault by themselves.
MAX_FAILED = 0.05
# The shares of the false alarms that each group of tests may cause; those of the components count first, since they
# name the error.
WEIGHTS = {"components": 0.4, "together": 0.4, "shape": 0.1, "others": 0.1}
MAX_ROWS, MAX_FINDINGS = 30, 5
POWER = 0.8


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Whether the posteriors of a fit are calibrated; made by :func:`pyroflows.sbc`.

    ``print`` shows the verdict and a table.

    Args:
        components: the scalar components of the latents.
        others: the names of the other quantities: the log-likelihood if there is one, and the coverage by TARP.
        levels: the levels of the true values among the draws, between 0 and 1, ``(N, components + others)``, for the N
            data sets whose fit did not fail.
        shapes: the shapes of the latents.
        num_draws: the numbers of draws of the fits that did not fail.
        failures: the errors of the fits that failed, by number of the data set.
        no_likelihood: why the log-likelihood is not among the quantities; empty if it is.

    Example:
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def exact(model):
        ...     return {"mu": dist.Normal(model.data["y"] / 2, 0.5**0.5).sample((1000,))}
        >>> calibration = pf.sbc(model, exact, seed=0, progress_bar=False)
        >>> calibration.is_calibrated, calibration.ranks["mu"].shape
        (True, (100,))
        >>> prior = pf.sbc(model, lambda model: {"mu": torch.randn(1000)}, seed=0, progress_bar=False)
        >>> prior.verdict.partition(" (")[0]
        'not calibrated: the log-likelihood of the true values is higher than that of the draws'
    """

    components: Sequence[Component]
    others: Sequence[str]
    levels: np.ndarray
    shapes: dict[str, tuple[int, ...]]
    num_draws: Sequence[int]
    failures: dict[int, str]
    no_likelihood: str

    @property
    def num_datasets(self) -> int:
        """The number of data sets, those with failed fits included."""
        return len(self.levels) + len(self.failures)

    @property
    def num_samples(self) -> int:
        """The number of draws of a fit, the largest if they differ."""
        return max(self.num_draws, default=0)

    @property
    def ranks(self) -> dict[str, np.ndarray]:
        """The ranks of the true values among the draws, from 0 to ``num_samples``, ``(N, *site shape)`` by latent.

        If a fit has returned fewer draws, or weighted ones, its rank is scaled to this range.
        """
        ranks = np.minimum((self.levels * (self.num_samples + 1)).astype(int), self.num_samples)
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        parts = np.split(ranks, np.cumsum(sizes), axis=1)
        return {name: part.reshape(-1, *self.shapes[name]) for name, part in zip(self.shapes, parts, strict=False)}

    @cached_property
    def labels(self) -> list[str]:
        """The names of the tested quantities: components that vary, then the others."""
        return [*(c.label for c in self.components if not c.is_constant), *self.others]

    @cached_property
    def tested(self) -> np.ndarray:
        """The levels of the tested quantities, ``(N, len(labels))``."""
        varies = [not component.is_constant for component in self.components]
        return self.levels[:, [*varies, *(True for _ in self.others)]]

    @property
    def is_calibrated(self) -> bool:
        """Whether no test rejects, and few fits failed."""
        return not self._findings

    @property
    def verdict(self) -> str:
        """One sentence: "calibrated", or "not calibrated" with what is wrong."""
        if self.is_calibrated:
            return "calibrated"
        shown = self._findings[:MAX_FINDINGS]
        more = len(self._findings) - len(shown)
        return f"not calibrated: {'; '.join(shown)}" + (f"; and {more} more" if more else "")

    @cached_property
    def tests(self) -> list[Test]:
        """All tests on which the verdict rests."""
        z, num = self._scores, len(self.labels) - len(self.others)
        tests = []
        p_values = {"shift": shift_p(z), "spread": spread_p(z), "shape": self._p_shape}
        # With one component there is nothing to pool.
        spare = WEIGHTS["together"] if num == 1 else 0.0
        for i, label in enumerate(self.labels):
            for kind, p in p_values.items():
                if i >= num:
                    weight = WEIGHTS["others"] / (3 * len(self.others))
                elif kind == "shape":
                    weight = WEIGHTS["shape"] / num
                else:
                    weight = (WEIGHTS["components"] + spare) / (2 * num)
                tests.append(Test(label, kind, float(p[i]), weight))
        if num > 1:
            half = WEIGHTS["together"] / 2
            tests.append(Test(TOGETHER, "shift", pooled_shift_p(z[:, :num]), half))
            tests.append(Test(TOGETHER, "spread", pooled_spread_p(z[:, :num]), half))
        return tests

    @cached_property
    def adjusted_p_values(self) -> np.ndarray:
        """The p-value of each of ``tests``, adjusted for their number; the verdict compares them with 0.05."""
        return adjusted(self.tests)

    def table(self) -> "pd.DataFrame":
        """A table with a row for each quantity.

        ``shift`` is how far the mean of the fit lies above the right one, in units of the right standard deviation, and
        ``sd ratio`` is the standard deviation of the fit divided by the right one; both are estimates from ranks. Then
        follow the p-values, and the smallest of them after adjustment for the number of tests.
        """
        import pandas as pd

        z = self._scores
        table = pd.DataFrame(
            {
                "shift": self._shifts,
                "sd ratio": self._ratios,
                "p shift": shift_p(z),
                "p spread": spread_p(z),
                "p KS": self._p_shape,
                "p chi2": chi_square_p(self.tested),
            },
            index=self.labels,
        )
        least = dict.fromkeys(self.labels, 1.0)
        for test, p in zip(self.tests, self.adjusted_p_values, strict=True):
            least[test.quantity] = min(least.get(test.quantity, 1.0), float(p))
        table["adjusted p"] = [least[label] for label in self.labels]
        table.loc[list(self.others), ["shift", "sd ratio"]] = np.nan
        return table

    def plot(self) -> Any:
        """Plot the distribution of the levels of each quantity, minus the uniform one, with a simultaneous 95 % band.

        There is a panel for each latent, with a line for each of its components, and one for each other quantity. A
        fit that is too narrow goes up and then down below zero, one that is too wide the other way round; one that is
        shifted up lies above zero. Quantities that the verdict calls wrong are coloured, and the legend has their
        estimates, as in "mu: sd x 0.76".

        Returns:
            A matplotlib figure.

        Raises:
            PlotError: if matplotlib is not installed.
        """
        lines: dict[str, dict[str, np.ndarray]] = {}
        sites = [c.site for c in self.components if not c.is_constant]
        for label, panel, column in zip(self.labels, [*sites, *self.others], self.tested.T, strict=True):
            lines.setdefault(panel, {})[label] = column
        wrong = {
            quantity: tag(quantity, kinds, *self._estimates(quantity)) for quantity, kinds in self._rejected.items()
        }
        return plot_ecdf_differences(lines, wrong, self.verdict)

    def plot_coverage(self) -> Any:
        """Plot how often regions of a credibility level hold the true value, with a simultaneous 95 % band.

        The regions are those of TARP (Lemos et al. 2023, arXiv:2302.03026).

        Returns:
            A matplotlib figure.

        Raises:
            PlotError: if matplotlib is not installed.
        """
        return plot_coverage(self.tested[:, self.labels.index(COVERAGE)])

    def __repr__(self) -> str:
        table = self.table()
        cut = ""
        if len(table) > MAX_ROWS:
            kept = table.index.isin(table["adjusted p"].nsmallest(MAX_ROWS).index)
            cut = f"\n({len(table) - MAX_ROWS} more rows with larger p-values are in .table())"
            table = table[kept]
        formats = {"shift": "{:+.2f}".format, "sd ratio": "{:.2f}".format}
        body = table.to_string(formatters=formats, float_format="{:.3f}".format, na_rep="")
        return "\n".join([body + cut, *(f"({note})" for note in self._notes), self.verdict])

    @cached_property
    def _scores(self) -> np.ndarray:
        return scores(self.tested)

    @cached_property
    def _p_shape(self) -> np.ndarray:
        return kolmogorov_p(self.tested)

    @cached_property
    def _ratios(self) -> np.ndarray:
        return 1 / self._scores.std(0, ddof=1)

    @cached_property
    def _shifts(self) -> np.ndarray:
        return -self._scores.mean(0) * self._ratios

    @cached_property
    def _findings(self) -> list[str]:
        """What is wrong, a clause for each quantity, that with the smallest p-value first."""
        found = []
        if len(self.failures) > MAX_FAILED * self.num_datasets:
            found.append(f"{len(self.failures)} of {self.num_datasets} fits failed ({self._first_failure})")
        found += [clause(name, kinds, *self._estimates(name)) for name, kinds in self._rejected.items()]
        return found

    @cached_property
    def _rejected(self) -> dict[str, list[str]]:
        """The kinds of the tests that reject, by quantity, those with the smallest p-values first."""
        found: dict[str, list[str]] = {}
        for i in np.argsort(self.adjusted_p_values, kind="stable"):
            if self.adjusted_p_values[i] <= FALSE_ALARMS:
                found.setdefault(self.tests[i].quantity, []).append(self.tests[i].kind)
        return found

    def _estimates(self, quantity: str) -> tuple[float, float]:
        """The shift of a quantity in right standard deviations, and its ratio of standard deviations."""
        if quantity == TOGETHER:
            num = len(self.labels) - len(self.others)
            return float(-self._scores[:, :num].mean()), float(np.exp(np.log(self._ratios[:num]).mean()))
        i = self.labels.index(quantity)
        return float(self._shifts[i]), float(self._ratios[i])

    @property
    def _first_failure(self) -> str:
        number, error = next(iter(self.failures.items()))
        return f"the first at data set {number} with {error}"

    @property
    def _notes(self) -> list[str]:
        num = len(self.levels)
        up_to = "up to " if len(set(self.num_draws)) > 1 else ""
        notes = [
            f"{num} data sets, {up_to}{self.num_samples} draws each; an exact fit is called not calibrated with "
            f"probability {FALSE_ALARMS:.0%} at most"
        ]
        if self.is_calibrated:
            weight = min(test.weight for test in self.tests if test.kind == "shift")
            margin = stats.norm.isf(FALSE_ALARMS * weight / 2) + stats.norm.ppf(POWER)
            notes.append(
                f"of one component, a shift of {margin / num**0.5:.2f} sd or an sd that is off by a factor of "
                f"{np.exp(margin / (2 * num) ** 0.5):.2f} would be seen with probability {POWER:.0%}; smaller errors "
                "need more data sets"
            )
        if self.no_likelihood:
            notes.append(f"the log-likelihood has no ranks: {self.no_likelihood}")
        if self.failures:
            notes.append(f"{len(self.failures)} fits failed and are left out: {self._first_failure}")
        return notes

"""What an amortised fit gives: posteriors at any value of the data, from one training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import warn
from pyroflows.fitting import DensityFit, MatchingFit
from pyroflows.flows import Flow
from pyroflows.flows.embedded import flow_at
from pyroflows.inference.amortized.posterior import posterior_at
from pyroflows.inference.amortized.simulated_range import SimulatedRange
from pyroflows.inference.amortized.simulator import Simulator
from pyroflows.inference.posterior import Posterior
from pyroflows.options import checked_int
from pyroflows.randomness import seeded
from pyroflows.shapes import listed

# Draws of several data sets are made at once, up to this many.
MAX_DRAWS = 2**17


@dataclass(frozen=True, eq=False)
class Amortized:
    """A flow for the latents of a Pyro model that takes the data as context; :func:`pyroflows.fit_amortized` makes it.

    Args:
        flow: the flow: ``amortized.flow(rows)``, with rows of all data flattened, is the law of unconstrained latents.
            Of an ensemble it is the :class:`pyroflows.flows.Mixture` of its flows.
        fits: the fit of each flow of the ensemble, with its history and ``plot()``; one if there is no ensemble.
        simulator: the model as a simulator.
        simulated: the range of the simulated data.
        num_simulations: the number of simulations that the fits used.
        num_left_out: the number of those that were left out, since they were not finite.

    Example:
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("N", 3):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> options = {"max_epochs": 5, "num_flows": 2, "seed": 0, "progress_bar": False}
        >>> amortized = pf.fit_amortized(model, num_simulations=1000, **options)
        >>> amortized.posterior([0.5, 1.0, 1.5]).sample(100)["mu"].shape
        torch.Size([100])
        >>> amortized.sample(torch.zeros(20, 3), num_samples=100)["mu"].shape
        torch.Size([20, 100])
    """

    flow: Flow
    fits: tuple[DensityFit | MatchingFit, ...]
    simulator: Simulator
    simulated: SimulatedRange
    num_simulations: int
    num_left_out: int = 0

    def posterior(self, data: Any) -> Posterior:
        """Give the posterior at data.

        Where the likelihood can be evaluated, the posterior judges and corrects itself as that of any fit: k-hat,
        evidence, ``importance_sample``, ``mcmc``. Where it cannot, the posterior says so, and what needs the likelihood
        raises a ``ModelError``.

        Args:
            data: a value of the observed site, or values by site.

        Raises:
            ShapeError: if a value has another shape than in the simulations.
            DataError: if a value is not finite.
            OptionError: if the names are not those of the observed sites.
        """
        values = self.simulator.data.read(data)
        rows = self._rows(values)
        note = self._note(rows[None])
        if note is not None:
            warn(note)
        return posterior_at(self.simulator, flow_at(self.flow, rows.to(_like(self.flow))), values, note)

    @torch.no_grad()
    def sample(self, data: Any, num_samples: int = 1000, seed: int | None = None) -> dict[str, Tensor]:
        """Draw latents for many data sets at once, without a correction.

        Args:
            data: values ``(num_data_sets, *site shape)`` of the observed site, or such values by site.
            num_samples: number of draws for each data set, at least 1.
            seed: seed that makes the draws reproducible and leaves the global generator as it was; None to use the
                global generator.

        Returns:
            Tensors ``(num_data_sets, num_samples, *site shape)`` by latent site.

        Raises:
            ShapeError: if a value has another shape than in the simulations.
            DataError: if a value is not finite.
            OptionError: if the names are not those of the observed sites, or ``num_samples`` is not positive.
        """
        num_samples = checked_int("num_samples", num_samples)
        rows = self._rows(self.simulator.data.read(data, num_batch_axes=1))
        is_far = self.simulated.far_out(rows)
        if is_far.any():
            places = listed(is_far.nonzero().flatten().tolist())
            warn(f"data sets {places} are far outside of what was simulated, where draws may be far off")
        parts = rows.to(_like(self.flow)).split(max(1, MAX_DRAWS // num_samples))
        with seeded(seed):
            latents = [self.flow(part).sample((num_samples,)).movedim(0, 1) for part in parts]
        return self.simulator.layout.constrain(torch.cat(latents))[0]

    def save(self, path: str | Path) -> None:
        """Write the fit to a safetensors file, which :func:`pyroflows.load_amortized` reads.

        Of an embedding of a class of your own the file holds the state alone.

        Raises:
            OptionError: if the flow holds what no file can rebuild, such as a layer of a class of your own.
            CheckpointError: if the file cannot be written.
        """
        from pyroflows.inference.amortized.files import save_amortized

        save_amortized(self, path)

    def plot(self, number: int = 0) -> Any:
        """Plot the log-density of training and validation simulations over the epochs, as a matplotlib figure.

        Args:
            number: which flow of the ensemble is shown, counted from 0.

        Raises:
            PlotError: if matplotlib is not installed.
        """
        return self.fits[number].plot()

    def _rows(self, values: dict[str, Tensor]) -> Tensor:
        return self.simulator.data.rows(values, self.simulator.layout.dtype)

    def _note(self, rows: Tensor) -> str | None:
        """Say that a row ``(1, num_entries)`` is far outside of what was simulated; None if it is not."""
        if not self.simulated.far_out(rows)[0]:
            return None
        far = self.simulator.data.by_site(self.simulated.far_entries(rows).double())
        sites = [
            f"'{name}' ({int(value.sum())} of {value.numel()} values)" for name, value in far.items() if value.any()
        ]
        where = (
            f"at site {' and at site '.join(sites)}" if sites else "in their joint pattern, though no value by itself"
        )
        return (
            f"these data are far outside of the {self.num_simulations} simulations, {where}: there the flow "
            "extrapolates, and its draws may be far off. Is the prior, or the model, as it should be?"
        )

    def __repr__(self) -> str:
        simulator = self.simulator
        sites = ", ".join(site.name for site in simulator.layout.structure.latents)
        reason = simulator.no_likelihood
        judged = (
            "posteriors are judged by the likelihood" if reason is None else f"posteriors have no verdict: {reason}"
        )
        count = f"{self.num_simulations} simulations"
        count += f", {self.num_left_out} more left out" if self.num_left_out else ""
        head = f"Amortized({sites} given {', '.join(simulator.data.shapes)}: {count}; {judged})"
        return "\n".join([head, *map(repr, self.fits)])


def _like(flow: Flow) -> Tensor:
    return next(flow.parameters())

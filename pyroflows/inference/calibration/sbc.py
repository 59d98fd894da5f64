"""Simulation-based calibration of a fit on a Pyro model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch

from pyroflows.errors import ModelError
from pyroflows.grad_mode import isolated
from pyroflows.inference.amortized.amortized import Amortized as AmortizedFit
from pyroflows.inference.calibration.fits import Draws, Fitter, draws_of, fitter
from pyroflows.inference.calibration.likelihood import log_likelihood_of
from pyroflows.inference.calibration.quantities import Quantities
from pyroflows.inference.calibration.result import Calibration
from pyroflows.inference.calibration.simulation import ConditionedModel, Simulations, simulate
from pyroflows.interruption import keeping
from pyroflows.models.arguments import require_own_options, usable_arguments
from pyroflows.models.signature import missing_arguments
from pyroflows.models.tracing import Model
from pyroflows.options import checked_int
from pyroflows.progress import Progress
from pyroflows.randomness import seeded

MIN_DATASETS, NUM_DATASETS, NUM_SAMPLES = 10, 100, 1000
# If the fits to this many data sets all fail, so will the others.
NUM_FIRST = 3


@isolated
def sbc(
    model: Model,
    fit: Any,
    *args: Any,
    observed: str | Sequence[str] | None = None,
    latents: str | Sequence[str] | None = None,
    num_datasets: int = NUM_DATASETS,
    num_samples: int = NUM_SAMPLES,
    seed: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Calibration:
    r"""Check by simulation whether the posteriors of a fit are calibrated (Talts et al. 2018, arXiv:1804.06788).

    Latents x and data y are drawn jointly from the model, many times. The fit gets y, and returns draws of its
    posterior. If it is exact, x and these draws follow the same law given y, so that the rank of x among them is
    uniform. Ranks at both ends say that a fit is too narrow, ranks in the middle that it is too wide, low ranks that
    it is shifted up. The ranks are tested for each component of the latents, for the log-likelihood (Modrák et al.
    2023, arXiv:2211.02383), and for the distance from a random point (TARP, Lemos et al. 2023, arXiv:2302.03026). An
    exact fit is called not calibrated with a probability of at most 5 %.

    Args:
        model: a Pyro model with proper priors whose latents are continuous.
        fit: what is calibrated; one of

            - a :class:`pyroflows.FlowVI`, whose options are used for each data set, with another seed each time;
            - an object with ``posterior(y)``, such as an amortised posterior; y is the value of the observed site, or
              a dictionary of values by site if there are several. A fit by :func:`pyroflows.fit_amortized` says
              itself which sites are data and latents, and which arguments the model has;
            - a function of the model, conditioned on simulated data, as in ``lambda model: pf.FlowVI(model).run()``.
              Its arguments need not be given again, and ``model.data`` has the data by site. It returns a posterior,
              weighted draws, chains, or a dictionary of draws ``(S, *site shape)`` by latent.
        args: arguments of the model, such as covariates. Data can be left out if the model runs without them; the
            numbers of data that are given do not matter.
        observed: the sites that are data. None for those that the model observes with these arguments, or, if there are
            none, those with the name of an argument that is None or left out, as in ``def model(x, y=None)``.
        latents: the latents that the fit infers; None for all. The others, which may be discrete, are part of the
            simulator.
        num_datasets: number of data sets, at least 10.
        num_samples: number of draws from each posterior, at least 10; a fit that returns draws chooses itself.
        seed: seed that makes the result reproducible and leaves the global generator as it was; None to use the global
            generator. Each fit starts from a seed of its own, and with an empty parameter store of Pyro's.
        progress_bar: whether to show one.
        kwargs: keyword arguments of the model.

    Raises:
        OptionError: for an option outside its range, if no site is data, or if an argument of the model has the name of
            an option and is not given by position.
        ModelError: if the model cannot be simulated, as with flat priors, ``pyro.factor`` or subsampled plates, or has
            discrete latents, names the site; or if the first fits all fail.
        DataError: if simulated values are not finite.
        FitInterrupted: if the fits are interrupted, such as by Ctrl-C; its ``result`` is the calibration by the data
            sets so far, if they are at least 10, and otherwise None.

    Example:
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)
        >>> x = torch.linspace(-1.0, 1.0, 10)
        >>> vi = pf.FlowVI(model, num_starts=1)
        >>> calibration = pf.sbc(model, vi, x, num_datasets=10, seed=0, progress_bar=False)
        >>> calibration.verdict
        'calibrated'
    """
    is_set = {"num_datasets": num_datasets != NUM_DATASETS, "num_samples": num_samples != NUM_SAMPLES}
    require_own_options({**is_set, "seed": seed is not None}, model, args)
    num_datasets = checked_int("num_datasets", num_datasets, MIN_DATASETS)
    num_samples = checked_int("num_samples", num_samples, 10)
    run = fitter(fit, model)
    if isinstance(fit, AmortizedFit):
        args, kwargs = (args, kwargs) if args or kwargs else (fit.simulator.args, fit.simulator.kwargs)
        observed = list(fit.simulator.data.shapes) if observed is None else observed
        latents = [site.name for site in fit.simulator.layout.structure.latents] if latents is None else latents
    with seeded(seed), Progress(progress_bar) as progress:
        progress.say(f"simulation of {num_datasets} data sets")
        # A model that takes its data as an argument without a default needs none to be simulated.
        absent = dict.fromkeys(missing_arguments(model, args, kwargs))
        args, kwargs = usable_arguments(model, args, {**kwargs, **absent})
        simulations = simulate(model, args, kwargs, _names(observed) or [], _names(latents), num_datasets)
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        log_likelihood, reason = log_likelihood_of(model, args, kwargs, simulations)
        quantities = Quantities(simulations, log_likelihood, rng)
        models = _conditioned(model, simulations, args, kwargs)
        seeds = torch.randint(2**62, (num_datasets,)).tolist()
        levels: list[np.ndarray] = []
        num_draws: list[int] = []
        failures: dict[int, str] = {}
        shapes = {site.name: tuple(site.shape) for site in simulations.structure.latents}

        def found(_: Any = None) -> Calibration | None:
            num = min(len(levels), len(num_draws))
            if num + len(failures) < MIN_DATASETS:
                return None
            tested = np.array(levels[:num])
            return Calibration(quantities.components, quantities.others, tested, shapes, num_draws, failures, reason)

        with keeping("sbc", found, least=f"the fits to {MIN_DATASETS} data sets"):
            progress.start("fits", num_datasets, unit="fit")
            for number in range(num_datasets):
                result = _attempt(run, models[number], seeds[number], simulations, num_samples)
                progress.update()
                if isinstance(result, Draws):
                    levels.append(quantities.levels(number, result))
                    num_draws.append(len(result.weights))
                    continue
                failures[number] = f"{type(result).__name__}: {str(result).partition(chr(10))[0]}"
                if len(failures) == number + 1 == NUM_FIRST:
                    raise ModelError(
                        f"the fits to the first {NUM_FIRST} data sets all failed, the last with {failures[number]}"
                    ) from result
        calibration = found()
    assert calibration is not None
    return calibration


def _names(sites: str | Sequence[str] | None) -> list[str] | None:
    return [sites] if isinstance(sites, str) else None if sites is None else list(sites)


def _conditioned(
    model: Model, simulations: Simulations, args: Any, kwargs: Mapping[str, Any]
) -> list[ConditionedModel]:
    num_datasets = len(next(iter(simulations.data.values())))
    data = ({name: value[i] for name, value in simulations.data.items()} for i in range(num_datasets))
    return [ConditionedModel(model, values, args, kwargs) for values in data]


def _attempt(
    run: Fitter, model: ConditionedModel, seed: int, simulations: Simulations, num_samples: int
) -> Draws | Exception:
    """Fit to one data set; the error if that fails."""
    # What a fit leaves in Pyro's parameter store must not be where the next one starts.
    with seeded(seed), pyro.get_param_store().scope():
        try:
            return draws_of(run(model, seed), simulations.structure, num_samples)
        except Exception as error:  # a fit of the user's may raise anything
            return error

"""Fit continuous flows to data by flow matching."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch

from pyroflows.arrays import ArrayLike
from pyroflows.compiling.check import Compiler
from pyroflows.compiling.worthwhile import worthwhile
from pyroflows.errors import DivergedError, OptionError
from pyroflows.fitting.adaptation import adapted_to
from pyroflows.fitting.coupling import COUPLINGS
from pyroflows.fitting.dequantization import check_dequantization
from pyroflows.fitting.gaussian import gaussian_log_prob
from pyroflows.fitting.maximum_likelihood import log_probs
from pyroflows.fitting.velocity_regression import VelocityRegression, continuous_layer
from pyroflows.flows import Flow
from pyroflows.grad_mode import isolated, require_trainable
from pyroflows.interruption import keeping
from pyroflows.nets.velocity import VelocityMLP
from pyroflows.options import checked_fraction, checked_int, checked_number, kind
from pyroflows.plots import plot_matching_fit
from pyroflows.progress import Progress
from pyroflows.randomness import seeded
from pyroflows.shapes import counted
from pyroflows.training.data import DataLike, Rows
from pyroflows.training.history import History
from pyroflows.training.loop import OptimizerLike, Trainer
from pyroflows.training.objective import trained_parameters
from pyroflows.training.schedules import EarlyStopping

LEARNING_RATE = 1e-2
# Most of the noise of a step comes from base draws and times, so that batches pay that have each of few rows several
# times. An epoch goes through the rows as often as it takes for 16 steps, beside which its validation costs little.
BATCH_SIZE = 512
MIN_STEPS_PER_EPOCH = 16


# A solve for one row of dimension D costs hundreds of D products with a Jacobian, which grow with D themselves.
MAX_PRODUCTS = 2**19


@dataclass(frozen=True)
class MatchingFit:
    """A matching fit is what :func:`fit_flow_matching` returns; the flow itself was trained in place.

    Args:
        flow: the flow, in its best state.
        history: one number for each epoch of ``loss`` and ``validation_loss``, mean squared errors of an element of the
            velocity, of ``grad_norm`` and of ``learning_rate``.
        best_loss: the loss of the validation rows in the best state.
        best_log_prob: mean log-density of the validation rows in the best state, in nats per row; of fewer rows, or NaN
            if there are none, where the exact trace of images or of a network of your own is dear.
        best_epoch: the epoch after which the flow was in that state; 0 for the state before training.
        stopped_early: whether the fit ended because the validation loss no longer fell, before ``max_epochs``.
        still_improving: whether it still fell where ``max_epochs`` made the learning rate fall. To go on from there,
            call :func:`fit_flow_matching` again, with the same seed to have the same validation rows.
        gaussian_log_prob: mean log-density that a Gaussian gives to the validation rows, see
            :class:`pyroflows.DensityFit`.

    Example:
        >>> flow = pf.flows.CNF(2, hidden_dims=(16, 16))
        >>> fit = pf.fit_flow_matching(flow, torch.randn(500, 2), max_epochs=5, progress_bar=False)
        >>> fit.flow is flow, fit.history.num_steps
        (True, 5)
        >>> fit
        MatchingFit(5 epochs, all of max_epochs; best validation loss ..., after epoch ...;
        validation log-density ... nats a row, a Gaussian has ...)...
    """

    flow: Flow
    history: History
    best_loss: float
    best_log_prob: float
    best_epoch: int
    stopped_early: bool
    still_improving: bool
    gaussian_log_prob: float | None

    def plot(self) -> Any:
        """Plot the loss of training and validation rows over the epochs.

        Returns:
            The matplotlib figure.

        Raises:
            PlotError: if matplotlib is not installed.
        """
        return plot_matching_fit(self.history, self.best_epoch)

    def __repr__(self) -> str:
        ending = ", stopped early" if self.stopped_early else ", all of max_epochs"
        beside = "" if self.gaussian_log_prob is None else f", a Gaussian has {self.gaussian_log_prob:.4g}"
        scored = "not computed, since the exact trace is dear"
        if not math.isnan(self.best_log_prob):
            scored = f"{self.best_log_prob:.4g} nats a row"
        text = (
            f"MatchingFit({counted(self.history.num_steps, 'epoch')}{ending}; best validation loss "
            f"{self.best_loss:.4g}, after epoch {self.best_epoch};\n"
            f"validation log-density {scored}{beside})"
        )
        if self.still_improving:
            text += (
                "\nThe validation loss was still falling where max_epochs ended the fit: give more epochs, or\n"
                "call fit_flow_matching again with the same seed to go on from here."
            )
        return text


@isolated
def fit_flow_matching(
    flow: Flow,
    x: DataLike,
    context: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    validation: float = 0.1,
    batch_size: int = BATCH_SIZE,
    max_epochs: int = 300,
    patience: int = 80,
    optimizer: OptimizerLike | None = None,
    compile: str = "auto",
    seed: int | None = None,
    progress_bar: bool | Progress = True,
    dequantization: str | None = None,
    coupling: str = "independent",
    time_power: float = 1.0,
    average: float = 0.999,
) -> MatchingFit:
    r"""Fit a continuous flow to data by conditional flow matching, without solving its differential equation.

    The fit minimises the error of the velocity v of the flow on straight lines from base draws to data,

    .. math:: E\, \big| v(z_t, t, c) - (z_1 - z_0) \big|^2, \qquad z_t = (1 - t) z_0 + t z_1

    (Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003), whose minimiser
    :math:`v(z, t, c) = E[z_1 - z_0 \mid z_t = z, c]` carries the base onto the law of the data. A step costs one
    evaluation of the network, where one of :func:`fit_density` costs a whole solve.

    Data, contexts, validation rows, early stopping and interrupts are as in :func:`fit_density`: the first fit stores
    location and scale of the training rows in the flow, and z1 are the data without these, before the map onto a
    bounded support. What is validated, and what the flow holds at the end, is a moving average of the parameters over
    the steps. The validation loss is taken with noise and times that are drawn once. At the end the validation rows are
    scored by their exact log-density.

    Args:
        flow: the flow to train, such as :class:`pyroflows.flows.CNF`: one layer
            :class:`pyroflows.transforms.Continuous`, and no other trained layer. A base with parameters stays as it is.
        x: rows ``(n, *event_shape)``, as for :func:`fit_density`.
        context: rows ``(n, *context_shape)``, if the flow takes a context.
        weights: weights of the rows ``(n,)``, not negative, of which only the ratios count; None for equal weights. An
            epoch has each row as often as its weight says, by systematic resampling.
        validation: fraction of the rows that is set aside for validation, between 0 and 1.
        batch_size: number of rows in a step, at least 1.
        max_epochs: number of epochs at most, at least 1. An epoch goes once through the training rows, or, where there
            are few, as often as it takes for 16 steps; noise and times are drawn anew each time.
        patience: number of epochs without a better validation loss, at least 1.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam at 0.01.
        compile: as for :func:`fit_density`.
        seed: makes the fit reproducible and leaves the global generator as it was; None to draw from the global one.
        progress_bar: whether to show a progress bar.
        dequantization: None for continuous data, "uniform" for integers, as for :func:`fit_density`.
        coupling: how draws and rows of a batch are paired: "independent", or "optimal_transport" for straighter paths,
            which solvers pass in fewer steps; pairs then keep their contexts.
        time_power: the power a of the density :math:`(1 + a)\, t^a` of times, above -1; 0 for uniform times. Larger
            powers give weight to times near 1, where the law has its details (Dax et al. 2023, arXiv:2305.17161).
        average: decay of the moving average, from 0 for none up to 1.

    Raises:
        ShapeError: if numbers of rows or columns of the data do not fit.
        DataError: if values cannot be used; the message names the row or the columns.
        OptionError: if an option is outside its range, or the flow has not exactly one trained layer, a continuous one.
        UntraceableError: if a step cannot be compiled, and ``compile`` is not "auto".
        DivergedError: if losses stay non-finite; its ``result`` is the fit in its best state.
        FitInterrupted: if the fit is interrupted, such as by Ctrl-C; its ``result`` is the fit in its best state.

    Example:
        >>> x = torch.randn(2000, 2) @ torch.tensor([[100.0, 0.0], [80.0, 1.0]])
        >>> flow = pf.flows.CNF(2, hidden_dims=(16, 16))
        >>> fit = pf.fit_flow_matching(flow, x, max_epochs=20, seed=0, progress_bar=False)
        >>> sorted(fit.history)
        ['grad_norm', 'learning_rate', 'loss', 'validation_loss']
        >>> flow().log_prob(x).shape, flow().latent(x).shape
        (torch.Size([2000]), torch.Size([2000, 2]))
    """
    _check_options(flow, validation, batch_size, max_epochs, patience, dequantization, coupling, time_power, average)
    compiler = Compiler(compile)
    # The guard handles values that are not finite; torch's validation would raise at them.
    with seeded(seed), pyro.validation_enabled(False):
        data, training, held_out = adapted_to(flow, x, context, weights, validation, dequantization is not None)
        num_passes = -(-MIN_STEPS_PER_EPOCH * batch_size // len(training))
        steps_per_epoch = num_passes * len(training) // batch_size
        objective = VelocityRegression(
            flow, data, training.repeat(num_passes), batch_size, COUPLINGS[coupling], time_power, average
        )
        schedule = EarlyStopping(
            objective.monitor,
            objective.score(data.rows[held_out]),
            [*flow.parameters(), *flow.buffers(), *objective.average.values],
            steps_per_epoch,
            max_epochs,
            patience,
            falls=True,
        )
        optimizer = optimizer or partial(torch.optim.Adam, lr=LEARNING_RATE, fused=True)
        compiler = worthwhile(compiler, max_epochs * steps_per_epoch)

        def put_best() -> None:
            schedule.restore_best()
            objective.average.put_in()

        def found(_: Any = None) -> MatchingFit:
            put_best()
            return MatchingFit(
                flow,
                schedule.epochs,
                schedule.best,
                _mean_log_prob(flow, data.rows[held_out[: _num_affordable(flow)]]),
                schedule.best_epoch,
                schedule.epochs.num_steps < max_epochs,
                schedule.still_growing,
                gaussian_log_prob(flow, data.rows[training], data.rows[held_out]),
            )

        with keeping("the fit", found):
            try:
                Trainer(objective, schedule, optimizer, compile=compiler, progress_bar=progress_bar).run()
            finally:
                put_best()
            if not math.isfinite(schedule.best):
                raise DivergedError("the validation rows never had a finite loss: look for outliers in x")
            return found()


def _num_affordable(flow: Flow) -> int | None:
    """Return how many rows to score; None for all, where the trace of the Jacobian takes no automatic derivatives."""
    layer = continuous_layer(flow)[1]
    return None if isinstance(layer.net, VelocityMLP) else MAX_PRODUCTS // layer.dim**2


def _mean_log_prob(flow: Flow, rows: Rows) -> float:
    if not len(rows):
        return math.nan
    return torch.dot(rows.weights, log_probs(flow, rows)).item() / rows.weights.sum().item()


def _check_options(
    flow: Flow,
    validation: float,
    batch_size: int,
    max_epochs: int,
    patience: int,
    dequantization: Any,
    coupling: Any,
    time_power: float,
    average: float,
) -> None:
    if not isinstance(flow, Flow):
        raise OptionError(
            f"fit_flow_matching fits a pyroflows.Flow, got {kind(flow)}: give the flow itself, such as "
            "pf.flows.CNF(2), and the data second"
        )
    if not trained_parameters(continuous_layer(flow)[1]):
        raise OptionError("the continuous layer of this flow has no parameters to train")
    require_trainable(flow)
    checked_fraction("validation", validation)
    for name, value in (("batch_size", batch_size), ("max_epochs", max_epochs), ("patience", patience)):
        checked_int(name, value)
    if isinstance(dequantization, Flow):
        raise OptionError('flow matching has no likelihood by which noise could be learned: use "uniform"')
    check_dequantization(flow, dequantization)
    if not isinstance(coupling, str) or coupling not in COUPLINGS:
        raise OptionError(f"coupling must be one of {list(COUPLINGS)}, got {coupling!r}")
    checked_number("time_power", time_power, above=-1.0)
    if average != 0:
        checked_number("average", average, below=1.0)

"""Estimate densities: fit a flow to data by maximum likelihood."""

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
from pyroflows.fitting.dequantization import (
    VariationalDequantization,
    adapt_noise,
    check_dequantization,
)
from pyroflows.fitting.gaussian import gaussian_log_prob
from pyroflows.fitting.maximum_likelihood import MaximumLikelihood
from pyroflows.flows import Flow
from pyroflows.grad_mode import isolated, require_trainable
from pyroflows.interruption import keeping
from pyroflows.options import checked_fraction, checked_int, kind
from pyroflows.plots import plot_density_fit
from pyroflows.progress import Progress
from pyroflows.randomness import seeded
from pyroflows.shapes import counted
from pyroflows.training.data import DataLike, Rows
from pyroflows.training.history import History
from pyroflows.training.loop import OptimizerLike, Trainer
from pyroflows.training.objective import trained_parameters
from pyroflows.training.schedules import EarlyStopping

LEARNING_RATE = 2e-3
# An epoch has about eight steps, unless batches would have fewer than 32 rows or more than 256. On sets of 120 to 800
# training rows more and smaller steps, under the prior below, gave better held-out log-densities.
STEPS_PER_EPOCH = 8
MIN_BATCH_SIZE, MAX_BATCH_SIZE = 32, 256
# Precision of the normal prior on the parameters, whose weight beside the likelihood falls as one over the rows.
PRIOR_PRECISION = 3.0


@dataclass(frozen=True)
class DensityFit:
    """A density fit is what :func:`fit_density` returns; the flow itself was trained in place.

    Args:
        flow: the flow, in its best state.
        history: one number for each epoch of ``log_prob`` and ``validation_log_prob``, means in nats per row, of
            ``grad_norm`` and of ``learning_rate``.
        best_log_prob: mean log-density of the validation rows in the best state, in nats per row.
        best_epoch: the epoch after which the flow was in that state; 0 for the state before training.
        stopped_early: whether the fit ended before ``max_epochs``, because the validation log-density no longer grew or
            the fit was interrupted.
        still_improving: whether it still grew where ``max_epochs`` made the learning rate fall. To go on from there,
            call :func:`fit_density` again, with the same seed to have the same validation rows.
        gaussian_log_prob: mean log-density that a Gaussian of full covariance, which has the moments of the training
            rows, gives to the validation rows; with contexts, its mean is linear in them. None if there is none, as for
            angles and counts.
        noise: the flow that draws the noise of integers, trained in place too; None if there is none. Of integers with
            noise, all log-densities are bounds of the log-probability of the integers.

    Example:
        >>> flow = pf.flows.MAF(2, num_layers=2, hidden_dims=(16,))
        >>> fit = pf.fit_density(flow, torch.randn(500, 2), max_epochs=5, progress_bar=False)
        >>> fit.flow is flow, fit.history.num_steps
        (True, 5)
        >>> fit
        DensityFit(5 epochs, all of max_epochs; best validation log-density ... nats a row, after epoch ...;
        a Gaussian has ...)...
    """

    flow: Flow
    history: History
    best_log_prob: float
    best_epoch: int
    stopped_early: bool
    still_improving: bool
    gaussian_log_prob: float | None
    noise: Flow | None = None

    def plot(self) -> Any:
        """Plot the log-density of training and validation rows over the epochs, beside that of a Gaussian.

        Returns:
            The matplotlib figure.

        Raises:
            PlotError: if matplotlib is not installed.
        """
        return plot_density_fit(self.history, self.best_epoch, self.gaussian_log_prob)

    def __repr__(self) -> str:
        ending = ", stopped early" if self.stopped_early else ", all of max_epochs"
        beside = "" if self.gaussian_log_prob is None else f";\na Gaussian has {self.gaussian_log_prob:.4g}"
        text = (
            f"DensityFit({counted(self.history.num_steps, 'epoch')}{ending}; best validation log-density "
            f"{self.best_log_prob:.4g} nats a row, after epoch {self.best_epoch}{beside})"
        )
        if self.still_improving:
            text += (
                "\nThe validation log-density was still growing where max_epochs ended the fit: give more epochs, "
                "or\ncall fit_density again with the same seed to go on from here."
            )
        return text


@isolated
def fit_density(
    flow: Flow,
    x: DataLike,
    context: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    validation: float = 0.1,
    batch_size: int | None = None,
    max_epochs: int = 500,
    patience: int = 20,
    optimizer: OptimizerLike | None = None,
    compile: str = "auto",
    seed: int | None = None,
    progress_bar: bool | Progress = True,
    dequantization: str | Flow | None = None,
) -> DensityFit:
    r"""Fit a flow to data by maximum likelihood.

    The fit maximises :math:`\sum_i w_i \log q(x_i \mid c_i)` by mini-batches, and watches the log-density of validation
    rows. Once that has not grown for ``patience`` epochs, training goes back to the best state and the learning rate
    falls to zero, for half as many epochs again. The flow is trained in place and is left in the state of the best
    validation log-density, also if the fit diverges or is interrupted.

    The first fit stores location and scale of the training rows in the flow (:meth:`pyroflows.Flow.adapt`), so that
    data can have any units and ``log_prob`` is the density in these units; a further fit goes on from there. Bounded
    data need a flow with a ``support``. Location and scale of contexts are stored in the same way.
    ``flow(context).latent(x)`` gives the latent codes of data.

    Integers x have no density. With ``dequantization`` the flow is the density p of x + u, where u is noise between 0
    and 1 that is drawn afresh for each batch. What is maximised, and reported for the validation rows with one fixed
    draw of their noise, is a lower bound of the log-probability of the integers,

    .. math:: \log P(x \mid c) = \log \int_{[0, 1]^D} p(x + u \mid c) \, du
        \ge E_{q(u \mid x)}[\log p(x + u \mid c) - \log q(u \mid x)],

    with uniform q (Theis et al. 2016, arXiv:1511.01844), or with a flow q that is trained beside p (Ho et al. 2019,
    arXiv:1902.00275). :func:`pyroflows.bits_per_dim` estimates P itself; ``flow().sample().floor()`` are integers.

    Rows are looked at before the fit. Columns that depend linearly on others have no density, which is an error; there
    is a warning of few or repeated values, of rows far out, and of flows that do not suit the data.

    Args:
        flow: the flow to train.
        x: rows ``(n, *event_shape)``: a tensor, a NumPy array, lists, a pandas frame, or a Dataset whose items are
            ``x`` or ``(x, context)``. Items of a Dataset are read anew for each training batch, so that an augmentation
            is drawn afresh; all of them are held in memory once.
        context: rows ``(n, *context_shape)``, if the flow takes a context.
        weights: weights of the rows ``(n,)``, not negative, of which only the ratios count; None for equal weights.
        validation: fraction of the rows that is set aside for validation, between 0 and 1.
        batch_size: number of rows in a step, at least 1; None for an eighth of the training rows, between 32 and 256.
        max_epochs: number of epochs at most, at least 1.
        patience: number of epochs without a better validation log-density, at least 1.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam at 0.002 with
            ``weight_decay`` 3 / n for n training rows, which is a normal prior on the parameters.
        compile: as for :class:`pyroflows.FlowVI`; "auto" traces only if ``max_epochs`` allow 200 steps or more, since
            tracing costs as much time as it saves in about a hundred steps. The others warn where they do not pay.
        seed: makes the fit reproducible and leaves the global generator as it was; None to draw from the global one.
            The flow draws its initial parameters when it is made: call ``pyro.set_rng_seed`` before that.
        progress_bar: whether to show a progress bar.
        dequantization: None for continuous data; for integers "uniform", or a flow with support (0, 1) that draws the
            noise and takes x as context, such as :class:`pyroflows.flows.Dequantizer`. A bounded ``support`` of the
            flow must leave room for the noise: from 0 to 256 for bytes.

    Raises:
        ShapeError: if numbers of rows or columns of the data do not fit.
        DataError: if values cannot be used; the message names the row or the columns.
        OptionError: if an option is outside its range.
        UntraceableError: if a step cannot be compiled, and ``compile`` is not "auto".
        DivergedError: if log-densities stay non-finite; its ``result`` is the fit in its best state.
        FitInterrupted: if the fit is interrupted, such as by Ctrl-C; its ``result`` is the fit in its best state.

    Example:
        >>> x = torch.randn(2000, 2) @ torch.tensor([[100.0, 0.0], [80.0, 1.0]])
        >>> flow = pf.flows.MAF(2, num_layers=2, hidden_dims=(16,))
        >>> fit = pf.fit_density(flow, x, max_epochs=20, seed=0, progress_bar=False)
        >>> sorted(fit.history)
        ['grad_norm', 'learning_rate', 'log_prob', 'validation_log_prob']
        >>> flow().log_prob(x).shape, flow().latent(x).shape
        (torch.Size([2000]), torch.Size([2000, 2]))
    """
    _check_options(flow, validation, batch_size, max_epochs, patience)
    check_dequantization(flow, dequantization)
    noise = dequantization if isinstance(dequantization, Flow) else None
    compiler = Compiler(compile)
    # The guard handles values that are not finite; torch's validation would raise at them.
    with seeded(seed), pyro.validation_enabled(False):
        data, training, held_out = adapted_to(flow, x, context, weights, validation, dequantization is not None)
        if noise is not None:
            require_trainable(noise)
            adapt_noise(noise, data.rows[training])
        if batch_size is None:
            batch_size = min(max(len(training) // STEPS_PER_EPOCH, MIN_BATCH_SIZE), MAX_BATCH_SIZE)
        batch_size = min(batch_size, len(training))
        steps_per_epoch = len(training) // batch_size
        compiler = worthwhile(compiler, max_epochs * steps_per_epoch)
        objective = (
            MaximumLikelihood(flow, data, training, batch_size)
            if noise is None
            else VariationalDequantization(flow, noise, data, training, batch_size)
        )
        trained = [flow] if noise is None else [flow, noise]
        schedule = EarlyStopping(
            objective.monitor,
            partial(_mean_log_prob, objective, data.rows[held_out]),
            [tensor for part in trained for tensor in (*part.parameters(), *part.buffers())],
            steps_per_epoch,
            max_epochs,
            patience,
        )
        optimizer = optimizer or partial(
            torch.optim.Adam, lr=LEARNING_RATE, weight_decay=PRIOR_PRECISION / len(training), fused=True
        )

        def found(_: Any = None) -> DensityFit:
            schedule.restore_best()
            return DensityFit(
                flow,
                schedule.epochs,
                schedule.best,
                schedule.best_epoch,
                schedule.epochs.num_steps < max_epochs,
                schedule.still_growing,
                gaussian_log_prob(flow, data.rows[training], data.rows[held_out]),
                noise,
            )

        with keeping("the fit", found):
            try:
                Trainer(objective, schedule, optimizer, compile=compiler, progress_bar=progress_bar).run()
            finally:
                schedule.restore_best()
            fit = found()
    if not math.isfinite(schedule.best):
        raise DivergedError(
            "the validation rows never had a finite mean log-density: look for outliers in x, or give a wider base"
        )
    return fit


def _mean_log_prob(objective: MaximumLikelihood, rows: Rows) -> float:
    return torch.dot(rows.weights, objective.log_prob(rows)).item() / rows.weights.sum().item()


def _check_options(flow: Flow, validation: float, batch_size: int | None, max_epochs: int, patience: int) -> None:
    if not isinstance(flow, Flow):
        raise OptionError(f"fit_density fits a pyroflows.Flow, got {kind(flow)}")
    if not trained_parameters(flow):
        raise OptionError("this flow has no parameters to train")
    require_trainable(flow)
    checked_fraction("validation", validation)
    for name, value in (("batch_size", batch_size), ("max_epochs", max_epochs), ("patience", patience)):
        if value is not None:
            checked_int(name, value)

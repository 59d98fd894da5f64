"""How a fit trains: its draws a step, its updates, and when the final decay of the learning rate begins."""

import math
from functools import partial
from typing import Any

from pyroflows.guides.hierarchical import has_block, hierarchical_layer
from pyroflows.inference.elbo import MinibatchELBO, ModelELBO
from pyroflows.training.history import History
from pyroflows.training.loop import LEARNING_RATE, OptimizerLike
from pyroflows.training.schedules import Plateau
from pyroflows.training.table_adam import TableAdam

NUM_PARTICLES = 128
# In hierarchies a step has about so many numbers in all its draws.
LEAST_PARTICLES, MAX_NUMBERS_A_STEP, NUM_PARTICLES_OF_BLOCKS = 4, 2**12, 32
# The rows of a draw all contribute to the flow that they share, so that it settles in few steps.
LEAST_DECAY_OF_ROWS = 100
# Where a step sees a part of the rows, further draws would not reduce the noise that this leaves, but further steps do.
NUM_PARTICLES_OF_PARTS, LEAST_STEPS_OF_PARTS = 16, 2000
# How latents of rows depend on the global ones is small beside the noise of steps, and settles while the rate falls.
# Each step sees few rows of a table, but all of an encoder.
LEAST_STEPS_OF_ENCODERS = 1500
LEAST_DECAY_OF_TABLES, LEAST_DECAY_OF_ENCODERS = 3600, 1500
# The mean of clipped gradients over parts is not that of all rows, so that global latents end beside the optimum.
# Without clipping Adam has to forget the first, large gradients sooner, and no step is then above its rate.
BETAS_OF_PARTS = (0.9, 0.99)
# Below this variance, averaged over the window of steps, the learning rate starts its final decay.
SETTLED_LOG_WEIGHT_VARIANCE = 0.02
SETTLED_WINDOW = 50
# In hierarchies it also does where the mean ELBO of so many steps is not above that of as many before, up to noise.
WINDOW_OF_ROWS = 100


def num_particles_of(objective: ModelELBO) -> int:
    """The number of draws a step.

    Args:
        objective: the objective of the training.
    """
    if isinstance(objective, MinibatchELBO):
        return NUM_PARTICLES_OF_PARTS
    if hierarchical_layer(objective.flow) is None:
        return NUM_PARTICLES
    # Each draw has all rows, which share a flow; of a block the flow of a few global latents alone is trained.
    most = NUM_PARTICLES_OF_BLOCKS if has_block(objective.flow) else NUM_PARTICLES
    return max(LEAST_PARTICLES, min(most, MAX_NUMBERS_A_STEP // objective.flow.dim))


def schedule_of(objective: ModelELBO, num_steps: int | None, hold: int) -> Plateau:
    """The schedule of a training.

    Args:
        objective: the objective.
        num_steps: the number of steps; None for as many as it takes.
        hold: the number of steps before which the decay cannot begin.
    """
    options: dict[str, Any] = {"falls": objective.falls}
    if isinstance(objective, MinibatchELBO):
        # The variance of the log weights is that of a part of the rows, and says nothing of all.
        least, layer = LEAST_STEPS_OF_PARTS, hierarchical_layer(objective.flow)
        if layer is not None:
            has_table = any(level.affine.table is not None for level in layer.levels)
            least = LEAST_STEPS_OF_PARTS if has_table else LEAST_STEPS_OF_ENCODERS
            options["min_decay"] = LEAST_DECAY_OF_TABLES if has_table else LEAST_DECAY_OF_ENCODERS
        return Plateau(objective.monitor, num_steps, hold=max(hold, least), **options)
    # The row of a block stands alone, and its global latents need the steps of any flow.
    if hierarchical_layer(objective.flow) is not None and not has_block(objective.flow):
        options["min_decay"] = LEAST_DECAY_OF_ROWS
        return Plateau(objective.monitor, num_steps, _rows_are_settled, hold, **options)
    return Plateau(objective.monitor, num_steps, _is_settled, hold, **options)


def updates_of(objective: ModelELBO, optimizer: OptimizerLike | None) -> dict[str, Any]:
    """The options of the :class:`Trainer` that say what a step makes of a gradient.

    Args:
        objective: the objective.
        optimizer: the optimizer that the user gave, or None.
    """
    layer = hierarchical_layer(objective.flow)
    if optimizer is not None or layer is None or not isinstance(objective, MinibatchELBO):
        return {"optimizer": optimizer}
    levels = layer.levels
    adam = partial(TableAdam, lr=LEARNING_RATE, betas=BETAS_OF_PARTS, fused=True)
    # Where there are networks that read features besides, tables take updates of all their rows.
    is_by_rows = all(level.embedding is not None and level.affine.net is None for level in levels)
    tables = [table for level in levels for table in (level.embedding, level.affine.table)] if is_by_rows else []
    return {"optimizer": adam, "max_norm": math.inf, "tables": tables}


def _is_settled(history: History) -> bool:
    recent = history.recent("log_weight_variance", SETTLED_WINDOW)
    return len(recent) == SETTLED_WINDOW and float(recent.mean()) < SETTLED_LOG_WEIGHT_VARIANCE


def _rows_are_settled(history: History) -> bool:
    """Whether the flow of a hierarchy is as good as it gets at this learning rate, to which its rows all contribute."""
    last, before = history.recent("elbo", WINDOW_OF_ROWS), history.recent("elbo", 2 * WINDOW_OF_ROWS)[:-WINDOW_OF_ROWS]
    if len(before) < WINDOW_OF_ROWS:
        return _is_settled(history)
    noise = math.sqrt((last.var() + before.var()) / WINDOW_OF_ROWS)
    return _is_settled(history) or float(last.mean() - before.mean()) < noise

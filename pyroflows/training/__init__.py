"""Train flows: one trainer minimises any objective, by compiled steps, for as long as a schedule says."""

from pyroflows.training.history import History
from pyroflows.training.loop import Trainer, train
from pyroflows.training.objective import Objective
from pyroflows.training.schedules import EarlyStopping, Plateau

__all__ = ["EarlyStopping", "History", "Objective", "Plateau", "Trainer", "train"]

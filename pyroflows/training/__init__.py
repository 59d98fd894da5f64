"""How everything here is trained: an objective, its compiled step, one trainer, schedules."""

from pyroflows.training.history import History
from pyroflows.training.loop import Trainer, train
from pyroflows.training.objective import Objective
from pyroflows.training.schedules import EarlyStopping, Plateau

__all__ = ["EarlyStopping", "History", "Objective", "Plateau", "Trainer", "train"]

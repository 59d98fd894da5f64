"""How everything here is trained: an objective, its compiled step, one trainer, schedules."""

from pyroflows.training.loop import Trainer, train
from pyroflows.training.objective import Objective

__all__ = ["Objective", "Trainer", "train"]

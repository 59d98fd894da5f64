"""How a fit ended: after which time, and whether by itself."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pyroflows.shapes import counted

Ending: TypeAlias = Literal["fitted", "interrupted", "diverged", "ended by the callback", "still in training"]


@dataclass(frozen=True)
class Outcome:
    """How a fit ended.

    Args:
        seconds: the wall time of the fit.
        ending: "fitted" if it ended by itself.

    Example:
        >>> Outcome(2.13).in_words(850), Outcome(75.0, "interrupted").in_words(350)
        ('fitted in 2.1 s, 850 steps', 'interrupted after 350 steps, 1 min 15 s')
    """

    seconds: float
    ending: Ending = "fitted"

    @property
    def is_complete(self) -> bool:
        """Whether the fit ended by itself."""
        return self.ending == "fitted"

    def in_words(self, num_steps: int) -> str:
        """The outcome in words.

        Args:
            num_steps: the number of steps of training; 0 where no flow was trained.
        """
        steps, duration = counted(num_steps, "step"), _duration(self.seconds)
        if self.is_complete:
            return f"fitted in {duration}, {steps}" if num_steps else f"fitted in {duration}"
        return f"{self.ending} after {steps}, {duration}" if num_steps else f"{self.ending} after {duration}, untrained"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"

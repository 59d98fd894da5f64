"""A progress bar for work in several stages."""

from typing import Any, Self

from tqdm.auto import tqdm

# The bar of a stage whose length is unknown shows what is done and for how long.
WITHOUT_COUNT = "{desc} [{elapsed}]"


class Progress:
    """One bar for work in several stages, which is printed at the first of them.

    A stage without steps shows what is done, and one with steps how many were done, and how long the rest takes if
    their number is known.

    Args:
        is_shown: whether anything is printed.
        prefix: what stands before the name of each stage.

    Example:
        >>> with Progress(is_shown=False) as progress:
        ...     progress.say("describing the model")
        ...     progress.start("training", total=3)
        ...     progress.update(elbo="-3.1")
    """

    def __init__(self, is_shown: bool, prefix: str = "") -> None:
        self._is_shown = is_shown
        self._prefix = prefix
        self._bar: tqdm | None = None
        self._began = 0.0

    def say(self, text: str) -> None:
        """Begin a stage without steps."""
        self._begin(text, None, 0, "", WITHOUT_COUNT)

    def start(self, text: str, total: int | None = None, initial: int = 0, unit: str = "step") -> None:
        """Begin a stage with steps.

        Args:
            text: its name.
            total: the number of its steps; None if it is not known yet.
            initial: the number of steps that were made before.
            unit: what a step is called.
        """
        self._begin(text, total, initial, unit, None)

    def update(self, num: int = 1, total: int | None = None, text: str | None = None, **figures: str) -> None:
        """Note steps of the stage.

        Args:
            num: how many more were made.
            total: the number of all steps, if it is known by now.
            text: another name of the stage; None to keep it.
            figures: what is shown behind the bar, by name.
        """
        if self._bar is None:
            return
        if total is not None and total != self._bar.total:
            self._set_total(total)
        if text is not None:
            self._bar.set_description_str(self._prefix + text, refresh=False)
        if figures:
            self._bar.set_postfix(figures, refresh=False)
        self._bar.update(num)

    def finish(self, text: str) -> None:
        """Say what was done, with the time of all stages."""
        self.say(text)
        if self._bar is not None:
            self._bar.start_t = self._began

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _begin(self, text: str, total: int | None, initial: int, unit: str, bar_format: str | None) -> None:
        if not self._is_shown:
            return
        if self._bar is not None:
            self._bar.leave = False  # the new bar stands in its line
            self._bar.close()
        text = self._prefix + text
        self._bar = tqdm(desc=text or None, total=total, initial=initial, unit=unit, bar_format=bar_format)
        self._began = self._began or self._bar.start_t

    def _set_total(self, total: int) -> None:
        assert self._bar is not None
        self._bar.total = total
        # In a notebook the bar is a widget, which learns of a total at its start alone, and is a dot without one.
        container = getattr(self._bar, "container", None)
        if container is not None:
            widget = container.children[1]
            widget.max, widget.layout.width, widget.bar_style = total, None, ""

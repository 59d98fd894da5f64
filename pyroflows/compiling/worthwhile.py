"""Compile a step only where the fit has so many of them that this saves time."""

from pyroflows.compiling.check import Compiler
from pyroflows.errors import warn

# Tracing costs as much time as it saves in 60 to 130 steps, and generating machine code as much as in thousands.
MIN_STEPS = {"trace": 200, "inductor": 10_000}


def worthwhile(compiler: Compiler, num_steps: int) -> Compiler:
    """Return the compiler to use for so many steps at most; warn if one that was asked for costs more than it saves.

    Args:
        compiler: the compiler that the user asked for.
        num_steps: the number of steps.

    Example:
        >>> worthwhile(Compiler("auto"), 100).mode, worthwhile(Compiler("auto"), 1000).mode
        ('none', 'auto')
    """
    if compiler.mode == "none" or num_steps >= MIN_STEPS[mode := "trace" if compiler.mode == "auto" else compiler.mode]:
        return compiler
    if compiler.mode == "auto":
        return Compiler("none")
    warn(
        f"compile={mode!r} pays from about {MIN_STEPS[mode]} steps on, but this fit has at most {num_steps}: "
        "leave compile='auto', which decides by itself"
    )
    return compiler

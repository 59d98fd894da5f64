"""Compile functions where that is asked for, and check that the compiled ones compute the same."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyroflows.compiling.program import State, compiled
from pyroflows.errors import FlowError, OptionError, UntraceableError, warn

# "auto" traces, and goes on without compilation where tracing fails.
MODES = ("auto", "trace", "inductor", "none")


class Compiler:
    """A compiler turns functions of tensors into programs, and compares these with the originals at other inputs.

    Args:
        mode: "trace" or "inductor", which :func:`pyroflows.compiling.program.compiled` describes; "none" to compile
            nothing; "auto" to trace, and to warn and go on without compilation where tracing fails.

    Raises:
        OptionError: if the mode is unknown.

    Attributes:
        failure: the reason why a function could not be compiled, or None.
        is_quiet: whether it goes on without compilation and without a warning; False unless it is set.

    Example:
        >>> scale = torch.tensor(2.0)
        >>> compiler = Compiler("trace")
        >>> scaled = compiler(lambda x: [scale * x], [torch.ones(2)], [torch.zeros(2)], state=[scale])
        >>> scale += 1.0
        >>> scaled(torch.tensor([3.0, 4.0]))
        (tensor([ 9., 12.]),)
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise OptionError(f"compile must be one of {list(MODES)}, got {mode!r}")
        self.mode = mode
        self.failure: str | None = None
        self.is_quiet = False

    def __call__(
        self, function: Callable[..., Any], examples: Sequence[Tensor], others: Sequence[Tensor], state: State = ()
    ) -> Any:
        """Compile a function, and check the program at inputs that it was not recorded with.

        Args:
            function: a function of tensors that returns a sequence of tensors without gradients.
            examples: the inputs that it is recorded with; the program takes inputs of their shapes and dtypes.
            others: inputs of the same shapes and other values, for the check. Examples that are parameters hold these
                values during the check, and their own again after it.
            state: modules and tensors that the function reads besides its inputs. The program reads the tensors, and
                the parameters and persistent buffers of the modules, anew at each call.

        Returns:
            The program; the function itself in the mode "none", and in the mode "auto" after a failure.

        Raises:
            UntraceableError: if the function cannot be compiled, or the program gives other values than the function,
                and the mode is not "auto".
        """
        if self.mode == "none" or self.failure is not None:
            return function
        try:
            with pyro.validation_enabled(False):
                fast = compiled(function, examples, "trace" if self.mode == "auto" else self.mode, state)
                _check(function, fast, examples, others)
        except Exception as error:  # tracing raises errors of any class at operations that it does not know
            if isinstance(error, FlowError) and not isinstance(error, UntraceableError):
                raise  # the function would raise it without compilation too
            if self.mode != "auto":
                raise UntraceableError(f"compilation failed: {error}") from error
            self.failure = str(error) or type(error).__name__
            if not self.is_quiet:
                warn(
                    f"this fit runs without compilation, several times slower: {self.failure}. Give compile='none' to "
                    "silence this warning",
                )
            return function
        return fast


def _check(
    function: Callable[..., Any], fast: Callable[..., Any], examples: Sequence[Tensor], others: Sequence[Tensor]
) -> None:
    saved = [example.detach().clone() for example in examples]
    with torch.no_grad(), torch.random.fork_rng():
        try:
            for example, other in zip(examples, others, strict=True):
                example.copy_(other)
            torch.manual_seed(0)
            expected = function(*examples)
            torch.manual_seed(0)
            found = fast(*(example.detach() for example in examples))
        finally:
            for example, value in zip(examples, saved, strict=True):
                example.copy_(value)
    for a, b in zip(found, expected, strict=True):
        if not _close(a, b):
            difference = (a.double() - b.double()).abs().max().item()
            raise UntraceableError(
                f"the traced model differs from the model by {difference:.1e} at other values than those it was traced "
                "at: its Python code depends on the latents, or its rounding errors are as large, which "
                "dtype=torch.float64 reduces"
            )


def _close(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors agree up to rounding, measured by their largest finite number.

    A small number may be a sum of large ones, and then has their rounding error.
    """
    if not b.is_floating_point():
        return torch.equal(a, b)
    tolerance = torch.finfo(b.dtype).eps ** 0.5
    size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * (1 + size), equal_nan=True)

"""Whether to compile, and whether what was compiled is right."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyroflows.compiling.program import State, compiled
from pyroflows.errors import OptionError, UntraceableError

# "auto" traces, and goes on without where that fails.
MODES = ("auto", "trace", "inductor", "none")


class Compiler:
    """Compiles functions of tensors and compares them with the originals at other inputs.

    Args:
        mode: "trace" or "inductor", see :func:`pyroflows.compiling.program.compiled`; "none" to compile nothing;
            "auto" for "trace", or, with a warning, nothing where that fails.

    Raises:
        OptionError: for an unknown mode.

    Attributes:
        failure: why a function could not be compiled, or None.
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise OptionError(f"compile must be one of {list(MODES)}, got {mode!r}")
        self.mode = mode
        self.failure: str | None = None

    def __call__(
        self, function: Callable[..., Any], examples: Sequence[Tensor], others: Sequence[Tensor], state: State = ()
    ) -> Any:
        """The compiled function, for inputs like ``examples``, checked at ``others``, which are no inputs of it yet.

        It reads the parameters and persistent buffers of the modules in ``state``, and the tensors there, anew at each
        call.
        Examples that are parameters are overwritten by the others for the check, and restored.

        Raises:
            UntraceableError: if it cannot be compiled or differs, and the mode is not "auto".
        """
        if self.mode == "none" or self.failure is not None:
            return function
        try:
            with pyro.validation_enabled(False):
                fast = compiled(function, examples, "trace" if self.mode == "auto" else self.mode, state)
                _check(function, fast, examples, others)
        except Exception as error:  # whatever tracing says of operations it does not know
            if self.mode != "auto":
                raise UntraceableError(f"compilation failed: {error}") from error
            self.failure = str(error) or type(error).__name__
            warnings.warn(
                f"this fit runs without compilation, several times slower: {self.failure}. Give compile='none' to "
                "run it so without this warning",
                stacklevel=2,
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
                "at: its Python code depends on the latents"
            )


def _close(a: Tensor, b: Tensor) -> bool:
    """Up to rounding, which sums of large numbers make large for the small ones beside them."""
    if not b.is_floating_point():
        return torch.equal(a, b)
    tolerance = torch.finfo(b.dtype).eps ** 0.5
    size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * (1 + size), equal_nan=True)


def is_singular(error: RuntimeError) -> bool:
    """Whether a factorisation or a solve failed; compiled, torch's own error class is lost."""
    return "linalg" in str(error)

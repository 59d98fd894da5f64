"""Laws that one test tries at many cases in turn: a test for each of thousands of cases costs more than the case."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

Law = Callable[..., None]


def in_turn(*varied: str, cases: Callable[..., Iterable[tuple]]) -> Callable[[Law], Law]:
    """Make one test of a law at many cases, each from the same seed; a failure says at which.

    Args:
        varied: the arguments of the law that vary.
        cases: gives their values, from arguments of the test that it takes by name.
    """

    def decorate(law: Law) -> Law:
        own = [name for name in inspect.signature(law).parameters if name not in varied]
        asked = list(inspect.signature(cases).parameters)

        def test(**arguments: Any) -> None:
            for values in cases(**{name: arguments[name] for name in asked}):
                torch.manual_seed(0)
                case = dict(zip(varied, values, strict=True))
                try:
                    law(**{name: arguments[name] for name in own}, **case)
                except Exception as error:
                    error.add_note(f"with {case}")
                    raise

        test.__name__, test.__doc__, test.__module__ = law.__name__, law.__doc__, law.__module__
        names = dict.fromkeys([*own, *asked])
        test.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names])
        return test

    return decorate

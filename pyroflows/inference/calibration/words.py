"""What a rejected test says of a quantity, as a clause of the verdict."""

from collections.abc import Sequence

from pyroflows.inference.calibration.quantities import COVERAGE, LOG_LIKELIHOOD

TOGETHER = "all together"


def clause(quantity: str, kinds: Sequence[str], shift: float, ratio: float) -> str:
    """Say what is wrong with a quantity.

    Args:
        quantity: its name.
        kinds: the kinds of the tests that reject, that with the smallest p-value first.
        shift: how far the mean of the fit lies above the right one, in units of the right standard deviation.
        ratio: the standard deviation of the fit divided by the right one.

    Example:
        >>> clause("mu", ["spread", "shape"], 0.1, 0.71)
        "'mu' is too narrow (its sd is 0.71 times the right one)"
    """
    # A shape that differs is news only where neither shift nor spread explains it.
    kinds = [kind for kind in kinds if kind != "shape"] or ["shape"]
    if quantity == LOG_LIKELIHOOD:
        return f"the log-likelihood of the true values {_of_log_likelihood(kinds[0], shift, ratio)}"
    if quantity == COVERAGE:
        return f"credible regions around random points {_of_coverage(kinds[0], ratio)}"
    if quantity == TOGETHER:
        return f"all components together are {' and '.join(_of_all(kind, shift, ratio) for kind in kinds)}"
    return f"'{quantity}' is {' and '.join(_of_component(kind, shift, ratio) for kind in kinds)}"


def tag(quantity: str, kinds: Sequence[str], shift: float, ratio: float) -> str:
    """Say the same in a legend; the arguments are those of :func:`clause`.

    Example:
        >>> tag("mu", ["spread", "shift"], 0.1, 0.71)
        'mu: sd x 0.71, shift +0.10 sd'
    """
    if quantity in (LOG_LIKELIHOOD, COVERAGE):
        return quantity
    words = {"shift": f"shift {shift:+.2f} sd", "spread": f"sd x {ratio:.2f}"}
    return f"{quantity}: {', '.join(words[kind] for kind in kinds if kind in words) or 'another shape'}"


def _of_component(kind: str, shift: float, ratio: float) -> str:
    if kind == "shift":
        return f"shifted {'up' if shift > 0 else 'down'} by {abs(shift):.2f} sd"
    if kind == "spread":
        return f"too {'wide' if ratio > 1 else 'narrow'} (its sd is {ratio:.2f} times the right one)"
    return "of another shape (its ranks are not uniform)"


def _of_all(kind: str, shift: float, ratio: float) -> str:
    if kind == "shift":
        return f"shifted {'up' if shift > 0 else 'down'}"
    return f"too {'wide' if ratio > 1 else 'narrow'}"


def _of_log_likelihood(kind: str, shift: float, ratio: float) -> str:
    if kind == "shift":
        if shift > 0:
            return "is lower than that of the draws (the fit follows the data too closely, or is too narrow)"
        return "is higher than that of the draws (the fit makes too little of the data, or is too wide)"
    if kind == "spread":
        near, little = ("near", "much") if ratio > 1 else ("far from", "little")
        return f"lies too {near} the median of that of the draws (which varies too {little} from draw to draw)"
    return "has ranks that are not uniform"


def _of_coverage(kind: str, ratio: float) -> str:
    if kind == "shift":
        return "lie off the true values"
    if kind == "spread":
        return f"are too {'wide' if ratio > 1 else 'narrow'}"
    return "do not have their level"

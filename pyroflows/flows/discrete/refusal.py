"""Refuse discrete laws where real numbers are needed."""

from typing import Any

from pyroflows.errors import OptionError


def require_real(law: Any, use: str, instead: str) -> None:
    """Raise if a flow or a distribution is discrete, for a use that needs real ones.

    Args:
        law: a flow or a distribution.
        use: what needs real numbers, as the subject of a sentence.
        instead: what to do, as a clause.

    Raises:
        OptionError: if it is discrete.

    Example:
        >>> require_real(pf.flows.MAF(2), "a guide", "take pf.flows.IAF")
        >>> require_real(pf.flows.DiscreteCoupling(2, 3), "a guide", "take pf.flows.IAF")
        Traceback (most recent call last):
        pyroflows.errors.OptionError: a guide needs a law of real numbers, but this one is discrete: take pf.flows.IAF
    """
    try:
        is_discrete = law.support.is_discrete
    except NotImplementedError:  # A law of the user's own need not say where its values lie.
        return
    if is_discrete:
        raise OptionError(f"{use} needs a law of real numbers, but this one is discrete: {instead}")

"""Whether each draw of a batch keeps its own result when other draws of the batch lie far from it.

A model that reads values through NumPy, or catches the error of a factorisation, may take one branch for a whole batch.
Draws that lie close together all want the same branch, and do not show it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyroflows.models.run import RunRecord, SiteValues
from pyroflows.models.ways import joined, rows_of

Close = Callable[[Tensor, Tensor], bool]


def keeps_draws_apart(
    batch: Callable[[SiteValues, int], RunRecord],
    single: Callable[[SiteValues], RunRecord],
    close: Close,
    near: SiteValues,
    expected: RunRecord,
    far: SiteValues,
) -> bool:
    """Whether a batch of near and far draws gives each draw what a single run gives it.

    Far draws without a finite log-density are left out. Other far draws may have large numbers, which a batch rounds
    otherwise than a single run, so that a draw also counts as right if a batch of it alone gives the same.

    Args:
        batch: runs the model for a batch of draws.
        single: runs the model for one draw.
        close: whether two tensors are the same up to rounding.
        near: values ``(n, *site shape)`` by site, at which the batch is right.
        expected: the record of the batch of these.
        far: other values of the same sites.
    """
    num_near, num_far = _length(near), _length(far)
    draws = [rows_of(near, i) for i in range(num_near)]
    log_probs = [rows_of(expected.log_probs, i) for i in range(num_near)]
    for row in (rows_of(far, i) for i in range(num_far)):
        found = _finite_log_probs(single, row)
        if found is not None:
            draws.append(row)
            log_probs.append(found)
    if len(draws) == num_near:
        return True
    mixed = batch(joined(draws, torch.stack), len(draws)).log_probs
    for i, draw in enumerate(draws):
        found = rows_of(mixed, i)
        if _same(log_probs[i], found, close):
            continue
        alone = batch(joined([draw] * len(draws), torch.stack), len(draws)).log_probs
        if not _same(rows_of(alone, i), found, close):
            return False
    return True


def _length(values: SiteValues) -> int:
    return len(next(iter(values.values()), ()))


def _finite_log_probs(single: Callable[[SiteValues], RunRecord], values: SiteValues) -> dict[str, Tensor] | None:
    """The log-densities of a run; None if one is not finite, or the model raises, as it may do far from its data."""
    try:
        log_probs = single(values).log_probs
    except Exception:
        return None
    return log_probs if all(bool(log_prob.isfinite().all()) for log_prob in log_probs.values()) else None


def _same(first: dict[str, Tensor], second: dict[str, Tensor], close: Close) -> bool:
    return first.keys() == second.keys() and all(close(first[name], second[name]) for name in first)

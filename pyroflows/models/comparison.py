"""Compare a batch of draws with single runs.

Each draw has to keep its own result when other draws of the batch lie far from it. A model that reads values through
NumPy may take one branch for a whole batch. Draws that lie close together all want the same branch, and do not show it.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from pyroflows.models.repeats import close
from pyroflows.models.run import RunRecord, SiteValues
from pyroflows.models.ways import joined, rows_of

Batch = Callable[[SiteValues, int], RunRecord]
Single = Callable[[SiteValues], RunRecord]


def agrees(record: RunRecord, single: Callable[[int, SiteValues], RunRecord], num_draws: int) -> bool:
    """Whether single runs at the values of a batch give the same values and log-densities as the batch.

    Args:
        record: the record of the batch.
        single: runs the model for the draw of a number, at its values.
        num_draws: the number of draws.
    """
    for i in range(num_draws):
        values, log_probs = rows_of(record.values, i), rows_of(record.log_probs, i)
        alone = single(i, values)
        if not _same(alone.values, values) or not _same(alone.log_probs, log_probs):
            return False
    return True


def differ_by_draw(batch: Batch, single: Single, given: SiteValues, names: Collection[str]) -> bool:
    """Whether sites differ between the draws of a batch at equal values of all others, if they do in single runs.

    Noise that is not torch's, such as NumPy's, is drawn once for a whole batch under vmap.

    Args:
        batch: runs the model for a batch of draws.
        single: runs the model for one draw.
        given: values of the other sites for one draw.
        names: the names of the sites.
    """
    values = batch({name: value.expand(2, *value.shape) for name, value in given.items()}, 2).values
    singles = [single(given).values for _ in range(2)]
    return all(torch.equal(*(found[name] for found in singles)) or not torch.equal(*values[name]) for name in names)


def keep_apart(
    batch: Batch,
    single: Single,
    near: SiteValues,
    expected: RunRecord,
    far: SiteValues,
    others: SiteValues | None = None,
) -> bool:
    """Whether a batch of near and far draws gives each draw what a single run gives it.

    Far draws without a finite log-density are left out. Other far draws may have large numbers, which a batch rounds
    otherwise than a single run, so that a draw also counts as right if a batch of it alone gives the same.

    Args:
        batch: runs the model for a batch of draws.
        single: runs the model for one draw.
        near: values ``(n, *site shape)`` by site, at which the batch is right.
        expected: the record of the batch of these.
        far: other values of the same sites.
        others: values of further draws in the batch, of which nothing is known.
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
    together = joined(draws, torch.stack)
    if others:
        together = joined([together, dict(others)], torch.cat)
    size = _length(together)
    mixed = batch(together, size).log_probs
    for i, draw in enumerate(draws):
        found = rows_of(mixed, i)
        if _same(log_probs[i], found):
            continue
        alone = batch(joined([draw] * size, torch.stack), size).log_probs
        if not _same(rows_of(alone, i), found):
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


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(close(first[name], second[name]) for name in first)

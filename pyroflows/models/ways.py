"""Ways of running a model for a batch of draws without vmap: under an outer plate, and draw by draw."""

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyroflows.errors import ModelError
from pyroflows.models.run import LogsBySite, RunHandler, RunRecord, SiteValues


def run_plate(
    run: Callable[[SiteValues, LogsBySite, Any], RunRecord],
    inputs: tuple[SiteValues, LogsBySite],
    num_draws: int,
    single: RunHandler,
) -> RunRecord:
    """Run a model for a batch of draws by one run under an outer plate.

    Args:
        run: runs the model at values by site and their logarithms, under a plate.
        inputs: the values and logarithms of all draws, along the first dimensions.
        num_draws: the number of draws.
        single: the handler of a single run, which knows the shapes of sites.
    """
    nesting = single.max_plate_nesting

    def placed(name: str, value: Tensor) -> Tensor:
        batch_dim = value.dim() - 1 - single.event_dims[name]
        return value.reshape((num_draws,) + (1,) * (nesting - batch_dim) + value.shape[1:])

    values = {name: placed(name, value) for name, value in inputs[0].items()}
    logs = {name: tuple(placed(name, part) for part in parts) for name, parts in inputs[1].items()}
    record = run(values, logs, pyro.plate("_pyroflows_draws", num_draws, dim=-1 - nesting))

    def flat(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: _draws_first(tensor, num_draws, like[name].shape) for name, tensor in tensors.items()}

    return RunRecord(flat(record.values, single.record.values), flat(record.log_probs, single.record.log_probs))


def run_singly(
    run: Callable[[SiteValues, LogsBySite], RunRecord],
    inputs: tuple[SiteValues, LogsBySite],
    num_draws: int,
    reference: RunRecord,
) -> RunRecord:
    """Run a model for a batch of draws by one run for each of them.

    Args:
        run: runs the model at values by site and their logarithms.
        inputs: the values and logarithms of all draws, along the first dimensions.
        num_draws: the number of draws.
        reference: the record of a run, whose sites all runs must have.

    Raises:
        ModelError: if sites differ between draws; names one.
    """
    singles = [run(*(rows_of(part, i) for part in inputs)) for i in range(num_draws)]
    for name in {name for single in singles for name in single.values.keys() ^ reference.values.keys()}:
        raise ModelError(
            f"the model has dynamic structure: site '{name}' appears in one run and not in another; a flow needs the "
            "same sites in every run"
        )
    return RunRecord(
        joined([single.values for single in singles], torch.stack),
        rows_with_all_factors([single.log_probs for single in singles], reference.log_probs),
    )


def rows_with_all_factors(rows: Sequence[dict[str, Tensor]], reference: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the log-densities of single runs; a factor that a run leaves out, as in a branch, counts zero there."""
    like = dict(ChainMap(*rows, reference))
    return joined([{name: row.get(name, torch.zeros_like(like[name])) for name in like} for row in rows], torch.stack)


def chunks_with_all_factors(chunks: Sequence[dict[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Join the log-densities of chunks of draws; a factor that all runs of a chunk leave out counts zero there.

    Args:
        chunks: log-densities by site, with the draws along the first dimension, by chunk.
        sizes: the numbers of draws.
    """
    like = dict(ChainMap(*chunks))
    return joined(
        [
            {name: chunk.get(name, like[name].new_zeros(size, *like[name].shape[1:])) for name in like}
            for chunk, size in zip(chunks, sizes, strict=True)
        ],
        torch.cat,
    )


def rows_of(values: Mapping[str, Any], rows: int | slice | Tensor) -> dict[str, Any]:
    """Take rows of the tensors of each site."""
    return tree_map(lambda value: value[rows], dict(values))


def joined(parts: Sequence[dict[str, Tensor]], how: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """Join the tensors of each site, by ``torch.cat`` or ``torch.stack``."""
    return {name: how([part[name] for part in parts]) for name in parts[0]}


def _draws_first(tensor: Tensor, num_draws: int, shape: torch.Size) -> Tensor:
    """Bring a tensor from a run under an outer plate to ``(num_draws, *shape)``, also if no draw affects it."""
    if tensor.numel() == num_draws * shape.numel():
        return tensor.reshape((num_draws, *shape))
    return tensor.expand((num_draws, *shape))
